"""The time of an operator under a partition, and of a reshard, by a roofline model with achievable rates.

An operator takes as long as its matrix products take at the hardware's achievable rate, or as its bytes take at the
achievable bandwidth of the memory, whichever is longer (Williams et al., doi:10.1145/1498765.1498785). Its OpSpec says
how many FLOPs and bytes these are, and hardware.py what a device and a link achieve.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from longctx.compiler.hardware import Hardware, collective_seconds
from longctx.compiler.ir import Op, Tensor
from longctx.compiler.lifetimes import saved_tensors
from longctx.compiler.ops import View, spec_of
from longctx.compiler.ops.reshards import RESHARDS, target_of_reshard
from longctx.compiler.ops.spec import FLOAT32_BYTES
from longctx.compiler.placement import REPLICATE, Partition, Placement, Reshard, local_shape


@dataclass(frozen=True)
class Seconds:
    """The time of one execution of an op or a reshard, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0


def bytes_of(tensor: Tensor, placement: Placement = REPLICATE, plan_size: int = 1) -> int:
    """The size of a rank's part of a tensor in bytes."""
    return prod(local_shape(tensor.shape, placement, plan_size)) * tensor.dtype.itemsize


def op_seconds(op: Op, partition: Partition, plan_size: int, hardware: Hardware) -> Seconds:
    """The time that a rank takes for its part of an op."""
    spec = spec_of(op)
    share = plan_size if partition.dim is not None else 1
    flops = spec.flops(op)
    rate = hardware.matrix_rate(op.inputs[0].dtype) * spec.efficiency if flops.forward or flops.backward else 1.0
    moved = _traffic(op, partition, plan_size)
    forward = max(flops.forward / share / rate, moved / hardware.achievable_bandwidth)
    if not op.outputs[0].requires_grad:
        return Seconds(forward)
    return Seconds(forward, max(flops.backward / share / rate, 2 * moved / hardware.achievable_bandwidth))


def _traffic(op: Op, partition: Partition, plan_size: int) -> float:
    """Bytes that a rank reads and writes in the forward of an op. A view reads and writes none."""
    spec = spec_of(op)
    if spec.view is View.ALWAYS:
        return 0.0
    inputs = [bytes_of(t, p, plan_size) for t, p in zip(op.inputs, partition.inputs, strict=True)]
    outputs = [bytes_of(t, p, plan_size) for t, p in zip(op.outputs, partition.outputs, strict=True)]
    return spec.traffic(inputs, outputs)


def reshard_seconds(tensor: Tensor, reshard: Reshard | None, plan_size: int, hardware: Hardware) -> Seconds:
    """The time of a reshard of a tensor. It is not hidden behind computation, since the next op waits for it."""
    resharding = RESHARDS[target_of_reshard(reshard.function)].resharding if reshard else None
    if resharding is None or plan_size == 1:
        return Seconds()
    forward, backward = (
        collective_seconds(hardware, kind, bytes_of(tensor), plan_size) if kind else 0.0
        for kind in (resharding.forward, resharding.backward)
    )
    return Seconds(forward, backward if tensor.requires_grad else 0.0)


def local_reshard_seconds(op: Op, plan_size: int, hardware: Hardware) -> Seconds:
    """The time of an op of one rank's graph if the op is a reshard; zero for every other op."""
    spec = spec_of(op)
    if spec.resharding is None:
        return Seconds()
    before, after = op.inputs[0], op.outputs[0]
    whole = max((before, after), key=bytes_of)
    if spec.resharding.forward == "all_to_all":  # a rank has only a part of the tensor, before and after
        whole = replace(before, shape=(prod(before.shape) * plan_size,))
    return reshard_seconds(whole, Reshard(spec.name), plan_size, hardware)


def fsdp_seconds(n_parameters: float, dtype: torch.dtype, world_size: int, hardware: Hardware) -> Seconds:
    """The time of FSDP's traffic in a micro-batch.

    The weights are gathered once for the forward, and once more for the backward and the recomputation in it. Their
    gradients are reduced in float32.
    """
    if world_size == 1 or not n_parameters:
        return Seconds()
    gather = collective_seconds(hardware, "all_gather", n_parameters * dtype.itemsize, world_size)
    reduced = collective_seconds(hardware, "reduce_scatter", n_parameters * FLOAT32_BYTES, world_size)
    return Seconds(gather, gather + reduced)


def plan_sharded_seconds(
    n_parameters: float, plan_size: int, world_size: int, hardware: Hardware, grad_accumulation_steps: int
) -> float:
    """A micro-batch's share of the time of the all-reduce of a plan-sharded weight's gradient, in float32.

    The gradient is reduced over the ranks that have the same shard of the weight, once in a step, after the last
    micro-batch. That is not hidden behind computation.
    """
    data_parallel_size = world_size // plan_size
    in_node = max(1, hardware.devices_per_node // plan_size)  # of each plan one rank takes part
    timings = hardware.timings if data_parallel_size <= in_node else ()
    spread = replace(hardware, devices_per_node=in_node, timings=timings)
    whole = collective_seconds(spread, "all_reduce", n_parameters / plan_size * FLOAT32_BYTES, data_parallel_size)
    return whole / grad_accumulation_steps


def saved_activations(op: Op) -> list[Tensor]:
    """The activations that an op's backward needs."""
    return [t for t in saved_tensors(op) if t.kind == "activation" and (t.requires_grad or t in op.outputs)]
