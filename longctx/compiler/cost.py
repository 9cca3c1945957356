"""The time of an operator under a partition, and of a reshard, by a roofline model with achievable rates.

An operator takes as long as its matrix products take at the rate of their kind, or as its bytes take at the achievable
bandwidth of the memory, whichever is longer (Williams et al., doi:10.1145/1498765.1498785). Its OpSpec says how many
FLOPs and bytes these are, layout.py which bytes come on top, and hardware.py what a device and a link achieve.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch

from longctx.compiler.hardware import Hardware, collective_seconds, passed_bytes, passing_seconds, sent_bytes
from longctx.compiler.ir import Graph, LayerKind, Op, Tensor, nbytes
from longctx.compiler.layout import Layout
from longctx.compiler.lifetimes import saved_tensors, wants_gradient
from longctx.compiler.ops import (
    Flops,
    Ring,
    Shares,
    passed_round,
    ring_of,
    spec_of,
    splits_queries,
    told_share,
    told_split,
)
from longctx.compiler.ops.reshards import target_of_reshard
from longctx.compiler.ops.spec import FLOAT32_BYTES
from longctx.compiler.placement import REPLICATE, Partition, Placement, Reshard, local_shape, reshard_steps
from longctx.compiler.work import Work


@dataclass(frozen=True)
class Seconds:
    """The time of one execution of an op or a reshard, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0


def bytes_of(tensor: Tensor, placement: Placement = REPLICATE, plan_size: int = 1) -> int:
    """The size of a rank's part of a tensor in bytes."""
    return prod(local_shape(tensor.shape, placement, plan_size)) * tensor.dtype.itemsize


def op_seconds(
    op: Op, partition: Partition, layout: Layout, plan_size: int, hardware: Hardware, evenly: bool = False
) -> Seconds:
    """The time that the busiest rank takes for its part of an op.

    Args:
        layout: that of the body which the op is in.
        evenly: whether to take all ranks to have as much of attention's queries to compute, even where they have not.
    """
    evenly = evenly and splits_queries(op, partition)
    flops = (even_flops if evenly else flops_of_busiest)(op, partition, plan_size)
    forward = _phase_seconds(op, "forward", flops.forward, partition, layout, plan_size, hardware)
    if not wants_gradient(op):
        return Seconds(forward)
    backward = _phase_seconds(op, "backward", flops.backward, partition, layout, plan_size, hardware)
    for place in layout.added_gradients.get(op, ()):  # both are read, and the sum is written
        size = bytes_of(op.inputs[place], partition.inputs[place], plan_size)
        backward += hardware.copy_seconds(Work.COPIES, 3 * size)
    return Seconds(forward, backward)


def _phase_seconds(
    op: Op, phase: str, flops: float, partition: Partition, layout: Layout, plan_size: int, hardware: Hardware
) -> float:
    spec = spec_of(op)
    rate = (
        hardware.product_rate(spec.rates[phase == "backward"], op.inputs[0].dtype) * spec.efficiency if flops else 1.0
    )
    work = Work.STRIDED if layout.is_strided(op) else Work.COPIES
    moved = _local_bytes(op, _traffic(op, phase, layout), partition, plan_size)
    share = told_share(op, partition, plan_size)
    passes = {t: size * (share if t in op.inputs else 1.0) for t, size in spec.passes(op, phase).items()}
    passed = _local_bytes(op, passes, partition, plan_size)
    seconds = max(flops / rate, hardware.copy_seconds(work, moved)) + hardware.copy_seconds(Work.COPIES, passed)
    ring = _ring_of(op, partition, plan_size, hardware)
    if ring and ring.goes_round:
        by_part = _local_bytes(op, ring.spec.passes(op, phase), partition, plan_size)
        seconds += ring.n_ranks * hardware.copy_seconds(Work.COPIES, by_part)
    return seconds


def flops_of_busiest(op: Op, partition: Partition, plan_size: int) -> Flops:
    """FLOPs of the rank that has the most of an op's; all have as much, but where they are told where theirs begins."""
    spec, split = spec_of(op), told_split(op, partition)
    if spec.told is None or split is None:
        return even_flops(op, partition, plan_size)
    length, placement, sharing = split
    starts, n = placement.blocks(length, plan_size // sharing)
    busiest = max((spec.told.flops(op, own, n) for own in starts), key=lambda flops: flops.forward)
    return Flops(busiest.forward / sharing, busiest.backward / sharing)


def even_flops(op: Op, partition: Partition, plan_size: int) -> Flops:
    """FLOPs of each rank, if all have as much to compute of an op."""
    share = plan_size if partition.dim is not None else 1
    whole = spec_of(op).flops(op)
    return Flops(whole.forward / share, whole.backward / share)


@dataclass(frozen=True)
class _Ring:
    """The ranks round which an op's inputs are passed, and what one sends to the next at a time.

    goes_round: whether all parts go round, one after another, rather than what is in reach of a part straight to it.
    """

    spec: Ring
    n_ranks: int
    links: Hardware
    n_bytes: float
    goes_round: bool


def _ring_of(op: Op, partition: Partition, plan_size: int, hardware: Hardware) -> _Ring | None:
    spec, split = ring_of(op, partition), told_split(op, partition)
    if spec is None or split is None:
        return None
    length, placed, sharing = split
    n, reach = plan_size // sharing, spec.reach(op)
    links = spread(hardware, sharing, n) if sharing > 1 else hardware
    places = dict(zip(op.inputs, partition.inputs, strict=True))
    part = sum(bytes_of(tensor, places[tensor], plan_size) for tensor in passed_round(op, spec))
    if reach is None:
        return _Ring(spec, n, links, part, goes_round=True)
    blocks = 2 if placed.balanced else 1
    return _Ring(spec, n, links, part * min(n - 1, blocks * reach * n / length), goes_round=False)


def ring_seconds(op: Op, partition: Partition, computing: Seconds, plan_size: int, hardware: Hardware) -> Seconds:
    """How long an op waits for what is passed round its ranks, given what it computes; 0 if nothing is.

    Where all parts go round, a step computes with one of n of them while the next one travels. In the forward n - 1
    steps do; in the backward as many, in which gradients travel behind the parts, and then once more, to come home.
    What travels longer than a step computes is waited for, and that last step. Where only what is in reach is sent, it
    is before anything is computed, and its gradient when all is.
    """
    ring = _ring_of(op, partition, plan_size, hardware)
    if ring is None:
        return Seconds()
    once = passing_seconds(ring.links, ring.n_bytes, ring.n_ranks)
    forward = backward = once
    if ring.goes_round:
        forward = (ring.n_ranks - 1) * max(0.0, once - computing.forward / ring.n_ranks)
        backward = (ring.n_ranks - 1) * max(0.0, 2 * once - computing.backward / ring.n_ranks) + once
    return Seconds(forward, backward if wants_gradient(op) else 0.0)


def ring_bytes(op: Op, partition: Partition, plan_size: int, hardware: Hardware) -> list[tuple[float, float]]:
    """What `collective_bytes` tells of a reshard, of what an op passes round; empty if it passes nothing."""
    ring = _ring_of(op, partition, plan_size, hardware)
    if ring is None:
        return []
    steps = ring.n_ranks - 1 if ring.goes_round else 1
    times = (steps, (2 * steps + 1 if ring.goes_round else 1) if wants_gradient(op) else 0)
    return [passed_bytes(ring.links, n * ring.n_bytes, ring.n_ranks) for n in times]


def _local_bytes(op: Op, shares: Shares, partition: Partition, plan_size: int) -> float:
    """The bytes on a rank of shares of an op's inputs and outputs."""
    places = dict(zip((*op.inputs, *op.outputs), (*partition.inputs, *partition.outputs), strict=True))
    return sum(share * bytes_of(tensor, places[tensor], plan_size) for tensor, share in shares.items())


def _traffic(op: Op, phase: str, layout: Layout) -> Shares:
    """What an op reads and writes in a phase.

    In general a forward reads every input and writes every output once. For each gradient that a backward makes it
    reads that of the output and writes that of the input, and in all it reads once what autograd has saved. A view
    moves nothing, and a gradient that is the output's own is not made.
    """
    spec = spec_of(op)
    if spec.traffic is not None:
        return spec.traffic(op, phase)
    if phase == "forward":
        return {} if layout.is_view(op) else _counted([*op.inputs, *op.outputs])
    output = op.outputs[0]
    made = [t for t in op.inputs if t.requires_grad and not spec.shares_gradient(t, output)]
    return _counted([*made, *(len(made) * [*op.outputs]), *(saved_tensors(op) if made else [])])


def _counted(tensors: Iterable[Tensor]) -> Shares:
    """Each tensor, as often as it is there."""
    return {tensor: float(times) for tensor, times in Counter(tensors).items()}


def reshard_op(
    tensor: Tensor, reshard: Reshard | None, source: Placement, target: Placement, plan_size: int
) -> Op | None:
    """A reshard of a tensor of the whole graph, as the op that it is in the graph of one rank."""
    if reshard is None or plan_size == 1:
        return None
    before, after = (replace(tensor, shape=local_shape(tensor.shape, p, plan_size)) for p in (source, target))
    return Op(target_of_reshard(reshard.function), (before,), dict(reshard.arguments), (after,), "", None)


def reshard_ops(
    tensor: Tensor, source: Placement, target: Placement, consumer_partitioned: bool, plan_size: int
) -> list[Op]:
    """All that leads a tensor of the whole graph from one placement to another, as ops of the graph of one rank."""
    ops = []
    for reshard, after in reshard_steps(source, target, consumer_partitioned, tensor.requires_grad):
        ops.append(reshard_op(tensor, reshard, source, after, plan_size))
        source = after
    return [op for op in ops if op is not None]


def collective_time(op: Op, plan_size: int, hardware: Hardware) -> Seconds:
    """The time of the collectives of an op of one rank's graph; zero if it is no reshard.

    It is not hidden behind computation, since the next op waits for it.
    """
    sides = [
        collective_seconds(links, kind, whole, n_ranks)
        for kind, whole, n_ranks, links in _collectives_of(op, plan_size, hardware)
    ]
    return Seconds(*sides)


def collective_bytes(op: Op, plan_size: int, hardware: Hardware) -> list[tuple[float, float]]:
    """The bytes that a rank sends in the collectives of an op of one rank's graph, forward and, if there is a gradient,
    backward: over its node's links, and over the network each."""
    return [sent_bytes(links, kind, whole, n) for kind, whole, n, links in _collectives_of(op, plan_size, hardware)]


def _collectives_of(op: Op, plan_size: int, hardware: Hardware) -> list[tuple[str, float, int, Hardware]]:
    """The collective of an op's forward and that of its backward: kind, bytes of the whole tensor, ranks, and links."""
    resharding = spec_of(op).resharding
    if resharding is None or plan_size == 1:
        return []
    n_ranks, links = _ranks_of(op, plan_size, hardware)
    before, after = nbytes(op.inputs[0]), nbytes(op.outputs[0])
    whole = max(before, after)
    if resharding.forward == "all_to_all":  # a rank has only a part of the tensor, before and after
        whole *= n_ranks
    elif after < before:  # of which several ranks may have the same part
        whole = after * n_ranks
    kinds = [resharding.forward, resharding.backward if op.inputs[0].requires_grad else None]
    return [(kind or NOTHING, float(whole), n_ranks if kind else 1, links) for kind in kinds]


def _ranks_of(op: Op, plan_size: int, hardware: Hardware) -> tuple[int, Hardware]:
    """How many ranks a reshard is over, and the links between them: all of a plan, the neighbours of a group, or those
    that have one place in all groups."""
    if within := op.kwargs.get("within"):
        return within, hardware
    if apart := op.kwargs.get("across"):
        return plan_size // apart, spread(hardware, apart, plan_size // apart)
    return plan_size, hardware


def packing_time(op: Op, layout: Layout, hardware: Hardware) -> Seconds:
    """The time of a reshard's copies, which cut a tensor into the ranks' parts and join parts; zero for other ops.

    A strided tensor is packed in the order of its dimensions, and its gradient comes back in that order and is copied
    into the tensor's own.
    """
    spec, tensor = spec_of(op), op.inputs[0] if op.inputs else None
    if spec.resharding is None or tensor is None:
        return Seconds()
    forward, backward = (dict(spec.workspace(op, phase)) for phase in ("forward", "backward"))
    if spec.resharding.forward and layout.is_strided(op):
        forward[tensor] = 1.0
        backward[tensor] = backward.get(tensor, 0.0) + 1.0
    seconds = [
        sum(hardware.copy_seconds(Work.STRIDED, 2 * share * nbytes(t)) for t, share in copies.items())
        for copies in (forward, backward)
    ]
    return Seconds(seconds[0], seconds[1] if tensor.requires_grad else 0.0)


NOTHING = "nothing"  # a collective of one rank, which moves nothing
GRADIENT_SUM_BYTES = 3 * FLOAT32_BYTES  # of a parameter: a gradient is added to those of the micro-batches before
STEP_BYTES = 10 * FLOAT32_BYTES  # of a parameter: the norm reads the gradient, the scale reads and writes it, and AdamW
# reads master, gradient and two moments and writes all but the gradient


def gathers_of(owner: Graph | LayerKind) -> int:
    """How often FSDP gathers weights in a micro-batch: a layer's for each pass, the root's once for both."""
    return 2 if isinstance(owner, LayerKind) else 1


def fsdp_copy_seconds(
    n_parameters: float, dtype: torch.dtype, world_size: int, hardware: Hardware, n_gathers: int
) -> float:
    """The time of FSDP's own copies in a micro-batch, which PyTorch's fully_shard makes around its collectives.

    Before each of `n_gathers` all-gathers a rank casts its shard and copies it into the buffer, and behind it the whole
    weights are copied out of the buffer. Before the reduce-scatter the whole gradients are copied and cast into its
    buffer, and behind it the shard's is added to those of the micro-batches before.
    """
    c = dtype.itemsize
    of_shard = n_gathers * (FLOAT32_BYTES + 3 * c) + GRADIENT_SUM_BYTES
    of_whole = n_gathers * 2 * c + c + FLOAT32_BYTES
    n_bytes = n_parameters * (of_shard / world_size + of_whole)
    return n_bytes / hardware.rates[Work.FSDP_COPIES].a_second


def plan_sharded_copy_seconds(n_parameters: float, dtype: torch.dtype, plan_size: int, hardware: Hardware) -> float:
    """The time in a micro-batch of casting a plan-sharded weight and its gradient, and of adding up the gradient."""
    n_bytes = n_parameters / plan_size * (2 * (dtype.itemsize + FLOAT32_BYTES) + GRADIENT_SUM_BYTES)
    return n_bytes / hardware.rates[Work.COPIES].a_second


def optimizer_seconds(n_parameters: float, n_ranks: int, hardware: Hardware, grad_accumulation_steps: int) -> float:
    """A micro-batch's share of a step's end, for parameters that lie on `n_ranks`: norm, scale and AdamW."""
    n_bytes = n_parameters / n_ranks * STEP_BYTES
    return n_bytes / hardware.rates[Work.OPTIMIZER].a_second / grad_accumulation_steps


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
    links = spread(hardware, plan_size, data_parallel_size)
    whole = collective_seconds(links, "all_reduce", n_parameters / plan_size * FLOAT32_BYTES, data_parallel_size)
    return whole / grad_accumulation_steps


def spread(hardware: Hardware, apart: int, n_ranks: int) -> Hardware:
    """The links of collectives over n_ranks of which each is `apart` from the next: fewer of them share a node."""
    in_node = max(1, hardware.devices_per_node // apart)
    return replace(hardware, devices_per_node=in_node, timings=hardware.timings if n_ranks <= in_node else ())
