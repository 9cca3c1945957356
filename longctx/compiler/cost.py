"""Seconds of an operator under a partition, and of a reshard: a roofline with achievable rates.

An operator takes as long as its matrix products at the hardware's achievable rate, or as its bytes at the memory's
bandwidth, whichever is longer (Williams et al., doi:10.1145/1498765.1498785). What it multiplies and moves is in its
OpSpec; what a device and a link achieve is in hardware.py.
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from longctx.compiler.hardware import Hardware, collective_seconds
from longctx.compiler.ir import Op, Tensor
from longctx.compiler.memory import saved_tensors
from longctx.compiler.ops import COLLECTIVES, View, spec_of
from longctx.compiler.ops.reshards import RESHARDS
from longctx.compiler.ops.spec import FLOAT32_BYTES
from longctx.compiler.placement import REPLICATE, Partition, Placement, Reshard, local_shape


@dataclass(frozen=True)
class Seconds:
    """One execution of an op or a reshard: forward, and backward."""

    forward: float = 0.0
    backward: float = 0.0


def bytes_of(tensor: Tensor, placement: Placement = REPLICATE, plan_size: int = 1) -> int:
    """Bytes of a rank's part of a tensor."""
    return prod(local_shape(tensor.shape, placement, plan_size)) * tensor.dtype.itemsize


def op_seconds(op: Op, partition: Partition, plan_size: int, hardware: Hardware) -> Seconds:
    """The time of one rank's part of an op."""
    spec = spec_of(op)
    share = plan_size if partition.dim is not None else 1
    flops = spec.flops(op)
    rate = hardware.matrix_rate(op.inputs[0].dtype) * spec.efficiency if flops.forward else 1.0
    moved = _traffic(op, partition, plan_size)
    forward = max(flops.forward / share / rate, moved / hardware.achievable_bandwidth)
    if not op.outputs[0].requires_grad:
        return Seconds(forward)
    return Seconds(forward, max(flops.backward / share / rate, 2 * moved / hardware.achievable_bandwidth))


def _traffic(op: Op, partition: Partition, plan_size: int) -> float:
    """Bytes that a rank reads and writes in an op's forward; views move nothing."""
    spec = spec_of(op)
    if spec.view is View.ALWAYS:
        return 0.0
    inputs = [bytes_of(t, p, plan_size) for t, p in zip(op.inputs, partition.inputs, strict=True)]
    outputs = [bytes_of(t, p, plan_size) for t, p in zip(op.outputs, partition.outputs, strict=True)]
    return spec.traffic(inputs, outputs)


def reshard_seconds(tensor: Tensor, reshard: Reshard | None, plan_size: int, hardware: Hardware) -> Seconds:
    """The time of a reshard of a tensor; nothing hides it, since the next op waits for it."""
    resharding = RESHARDS[f"{COLLECTIVES}.{reshard.function}"].resharding if reshard else None
    if resharding is None or plan_size == 1:
        return Seconds()
    forward, backward = (
        collective_seconds(hardware, kind, bytes_of(tensor), plan_size) if kind else 0.0
        for kind in (resharding.forward, resharding.backward)
    )
    return Seconds(forward, backward if tensor.requires_grad else 0.0)


def local_reshard_seconds(op: Op, plan_size: int, hardware: Hardware) -> Seconds:
    """The time of an op of one rank's graph, if it is a reshard; none otherwise."""
    spec = spec_of(op)
    if spec.resharding is None:
        return Seconds()
    before, after = op.inputs[0], op.outputs[0]
    whole = max((before, after), key=bytes_of)
    if spec.resharding.forward == "all_to_all":  # it has a part on either side
        whole = replace(before, shape=(prod(before.shape) * plan_size,))
    return reshard_seconds(whole, Reshard(spec.name), plan_size, hardware)


def fsdp_seconds(n_parameters: float, dtype: torch.dtype, world_size: int, hardware: Hardware) -> Seconds:
    """The traffic of FSDP's weights in a micro-batch: gathered for the forward, and for the backward with the
    recomputation; their gradients reduced in float32."""
    if world_size == 1 or not n_parameters:
        return Seconds()
    gather = collective_seconds(hardware, "all_gather", n_parameters * dtype.itemsize, world_size)
    reduced = collective_seconds(hardware, "reduce_scatter", n_parameters * FLOAT32_BYTES, world_size)
    return Seconds(gather, gather + reduced)


def plan_sharded_seconds(
    n_parameters: float, plan_size: int, world_size: int, hardware: Hardware, grad_accumulation_steps: int
) -> float:
    """A micro-batch's share of the all-reduce of a plan-sharded weight's float32 gradient, over the ranks that keep the
    same shard of it. There is one a step, after the last micro-batch, and nothing hides it."""
    data_parallel_size = world_size // plan_size
    in_node = max(1, hardware.devices_per_node // plan_size)  # a plan's ranks are neighbours, these are one of each
    timings = hardware.timings if data_parallel_size <= in_node else ()
    spread = replace(hardware, devices_per_node=in_node, timings=timings)
    whole = collective_seconds(spread, "all_reduce", n_parameters / plan_size * FLOAT32_BYTES, data_parallel_size)
    return whole / grad_accumulation_steps


def saved_activations(op: Op) -> list[Tensor]:
    """The activations that an op's backward needs."""
    return [t for t in saved_tensors(op) if t.kind == "activation" and (t.requires_grad or t in op.outputs)]
