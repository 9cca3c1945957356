"""Time and traffic of an op under a partition, and of a move between two: a roofline with achievable rates.

An op takes as long as its matrix products at the hardware's achievable rate, or as its bytes at the memory's bandwidth,
whichever is longer (Williams et al., doi:10.1145/1498765.1498785).
"""

from dataclasses import dataclass, replace
from math import prod

import torch

from longctx.compiler.annotation import Partition, Placement
from longctx.compiler.hardware import Hardware, collective_seconds
from longctx.compiler.memory import FLOAT32, saved_tensors
from longctx.compiler.partition import COLLECTIVES, Move, local_shape
from longctx.compiler.trace import Op, Tensor

VIEWS = {"view", "transpose", "permute", "t", "unsqueeze", "squeeze", "slice", "select", "expand", "chunk", "split"}
VIEWS |= {"split_with_sizes", "detach", "alias", "flatten", "unflatten"}
ATTENTION = "longctx.kernels.attention.attention"
LOSS = "chunk_linear_cross_entropy.chunk_linear_cross_entropy"
# Backward FLOPs over forward FLOPs. A product has two gradients; flash attention recomputes the scores for its four
# products (arXiv:2307.08691, section 3.1.2); the chunked loss makes its gradients with its losses.
BACKWARD_FLOPS = {ATTENTION: 2.5}
# Of the rate of large products, whichever kernel runs: FlashAttention-3's, whose causal attention with heads of 128
# reaches some 640 TFLOP/s forward and 550 backward on an H100, where large products reach 790 (arXiv:2407.08608,
# figures 5 and 6). FlashAttention-2, which the package flash-attn is there, reaches some 350 (same paper, section 1):
# with it, or by blocks of queries, attention takes longer than is predicted.
ATTENTION_EFFICIENCY, ATTENTION_KERNEL = 0.75, "FlashAttention-3"


@dataclass(frozen=True)
class Seconds:
    """One execution of an op or a move: forward, and backward."""

    forward: float = 0.0
    backward: float = 0.0


def bytes_of(tensor: Tensor, placement: Placement = "R", n_ranks: int = 1) -> int:
    """Bytes of a rank's part of a tensor."""
    return prod(local_shape(tensor.shape, placement, n_ranks)) * tensor.dtype.itemsize


def forward_flops(op: Op) -> float:
    """FLOPs of an op's matrix products, computed whole; causal attention counts the half that it needs."""
    name = op.target if not op.target.startswith("aten.") else op.target.split(".")[1]
    inputs = op.inputs
    if name in ("linear", "matmul", "mm", "bmm"):
        return 2.0 * prod(op.outputs[0].shape) * inputs[0].shape[-1]
    if name == LOSS:
        hidden_states, weight = inputs[:2]
        return 2.0 * prod(hidden_states.shape) * weight.shape[0]
    if name == ATTENTION:
        query, key, value = inputs[:3]
        b, heads, length, d = query.shape
        window = op.kwargs.get("window", 0) or length
        seen = length * (length + 1) / 2 - max(0, length - window) * (length - window + 1) / 2
        return 2.0 * b * heads * seen * (d + value.shape[-1])
    return 0.0


def op_seconds(op: Op, partition: Partition, n_ranks: int, hardware: Hardware) -> Seconds:
    """The time of one rank's part of an op."""
    share = n_ranks if partition.dim is not None else 1
    rate = hardware.matrix_rate(op.outputs[0].dtype if op.target != LOSS else op.inputs[0].dtype)
    rate *= ATTENTION_EFFICIENCY if op.target == ATTENTION else 1.0
    flops = forward_flops(op) / share
    moved = _traffic(op, partition, n_ranks)
    forward = max(flops / rate, moved / hardware.achievable_bandwidth)
    if not op.outputs[0].requires_grad:
        return Seconds(forward)
    backward = max(BACKWARD_FLOPS.get(op.target, 2.0) * flops / rate, 2 * moved / hardware.achievable_bandwidth)
    return Seconds(forward, backward)


def _traffic(op: Op, partition: Partition, n_ranks: int) -> int:
    """Bytes that a rank reads and writes in an op's forward; views move nothing."""
    if op.target.startswith("aten.") and op.target.split(".")[1] in VIEWS:
        return 0
    read = sum(bytes_of(t, p, n_ranks) for t, p in zip(op.inputs, partition.inputs, strict=True))
    if op.target.startswith("aten.embedding"):
        read = bytes_of(op.outputs[0], partition.outputs[0], n_ranks)  # the rows that are looked up
    return read + sum(bytes_of(t, p, n_ranks) for t, p in zip(op.outputs, partition.outputs, strict=True))


# What each move does forward and, to the gradient, backward.
_TRAFFIC = {
    "all_to_all": ("all_to_all", "all_to_all"),
    "all_gather": ("all_gather", None),
    "all_gather_reduce": ("all_gather", "reduce_scatter"),
    "take_slice": (None, "all_gather"),
    "replicate": (None, "all_reduce"),
    "all_reduce": ("all_reduce", None),
    "all_reduce_both": ("all_reduce", "all_reduce"),
    "reduce_scatter": ("reduce_scatter", "all_gather"),
}


def move_seconds(tensor: Tensor, move: Move | None, n_ranks: int, hardware: Hardware) -> Seconds:
    """The time of a move of a tensor; nothing hides it, since the next op waits for it."""
    if move is None or n_ranks == 1:
        return Seconds()
    forward, backward = (
        collective_seconds(hardware, kind, bytes_of(tensor), n_ranks) if kind else 0.0
        for kind in _TRAFFIC[move.function]
    )
    return Seconds(forward, backward if tensor.requires_grad else 0.0)


def local_move_seconds(op: Op, n_ranks: int, hardware: Hardware) -> Seconds:
    """The time of an op of one rank's graph, if it is a move; none otherwise."""
    function = op.target.rsplit(".", 1)[-1]
    if not op.target.startswith(COLLECTIVES) or function not in _TRAFFIC:
        return Seconds()
    before, after = op.inputs[0], op.outputs[0]
    whole = (
        replace(before, shape=(prod(before.shape) * n_ranks,))
        if function == "all_to_all"
        else max((before, after), key=bytes_of)
    )
    return move_seconds(whole, Move(function), n_ranks, hardware)


def fsdp_seconds(n_parameters: float, dtype: torch.dtype, world_size: int, hardware: Hardware) -> Seconds:
    """The traffic of FSDP's weights in a micro-batch: gathered for the forward, and for the backward with the
    recomputation; their gradients reduced in float32."""
    if world_size == 1 or not n_parameters:
        return Seconds()
    gather = collective_seconds(hardware, "all_gather", n_parameters * dtype.itemsize, world_size)
    return Seconds(gather, gather + collective_seconds(hardware, "reduce_scatter", n_parameters * FLOAT32, world_size))


def resident_seconds(
    n_parameters: float, plan_ngpus: int, runtime_ngpus: int, hardware: Hardware, grad_accumulation_steps: int
) -> float:
    """A micro-batch's share of the all-reduce of a resident weight's float32 gradient, over the ranks that keep the
    same part of it. There is one a step, after the last micro-batch, and nothing hides it."""
    n_ranks = runtime_ngpus // plan_ngpus
    in_node = max(1, hardware.devices_per_node // plan_ngpus)  # a plan's ranks are neighbours, these are one of each
    spread = replace(hardware, devices_per_node=in_node, timings=hardware.timings if n_ranks <= in_node else ())
    whole = collective_seconds(spread, "all_reduce", n_parameters / plan_ngpus * FLOAT32, n_ranks)
    return whole / grad_accumulation_steps


def saved_by(op: Op) -> list[Tensor]:
    """The activations that an op's backward needs."""
    return [t for t in saved_tensors(op) if t.kind == "activation" and (t.requires_grad or t in op.outputs)]
