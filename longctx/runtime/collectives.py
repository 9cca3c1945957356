"""The reshards between placements that generated code calls, each with the reshard of its gradient; NCCL or gloo.

The ranks are those of one copy of the plan, plan_size of them. Over these a tensor has one of three placements, named
as PyTorch's DTensor names them: Replicate (every rank holds the whole tensor), Shard(i) (dimension i is split into
plan_size equal parts, and rank r holds part r) and Partial (every rank holds a tensor of the whole shape, and the true
value is the sum of them). Each function takes a tensor from one placement to another in the forward pass, and its
gradient back in the backward pass. Some pairs of functions share their forward pass and differ in the gradient that
they expect: if the op that takes the result is partitioned, each rank's gradient covers only that rank's share of the
work and is Partial; if every rank computes the op whole, the gradient is Replicate.

Sums are made in the tensor's own dtype: bfloat16 partial results are added in bfloat16, float32 ones in float32. The
byte counts in the docstrings are what each rank sends, which equals what it receives: N is the size of the whole tensor
in bytes, and n the length of the dimension that is split. All-gather, reduce-scatter and all-reduce are counted as
bandwidth-optimal algorithms do them (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002).

With `copies`, the part of a split dimension that a rank holds is also held by its neighbours, so many in all: it is
the (r / copies)-th of plan_size / copies parts. N and n are then those of a tensor with so many copies of each part.

With `balanced` a dimension is in balanced order: it is cut into 2 * plan_size blocks, and rank r holds block r and the
r-th from the end. A tensor that is whole is always in the model's own order.

A plan over several nodes may have groups of neighbours, with a fast network within each. A function that is told
`within=8` is over each 8 neighbours of a plan, and one that is told `across=8` over the ranks that are each 8 from the
next, which have the same place in their groups. plan_size is then the number of these.

Inputs may have any strides. Every function that splits a dimension raises ValueError if plan_size doesn't divide it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

TensorFunction = Callable[[torch.Tensor], torch.Tensor]

# PyTorch 2.13 has these two under new names and warns about the old ones; 2.11 has only the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Module variables, since generated code has no group to pass around and a process takes part in one plan only.
_plan_group: dist.ProcessGroup | None = None
_part_groups: dict[tuple[str, int], dist.ProcessGroup] = {}


@dataclass(frozen=True)
class Ranks:
    """Those that a reshard is over, and this rank's number among them, from 0."""

    group: dist.ProcessGroup
    size: int
    rank: int


def set_plan_group(group: dist.ProcessGroup) -> None:
    """Sets the process group that reshards are over: the ranks of this rank's copy of the plan, neighbours all."""
    global _plan_group
    _plan_group = group
    _part_groups.clear()


def plan_rank() -> int:
    """This rank's number within its copy of the plan, from 0: which part of a sharded tensor it holds."""
    return dist.get_rank(_group())


def plan_size() -> int:
    """The number of ranks of one copy of the plan."""
    return dist.get_world_size(_group())


def ranks_of(within: int = 0, across: int = 0) -> Ranks:
    """The ranks of the plan; of these each `within` neighbours; or those that are each `across` from the next.

    A group of some of them is made when it is first asked for. PyTorch needs all ranks to take part in making each
    group, and they do, since all run the same code.
    """
    if not within and not across:
        return Ranks(_group(), plan_size(), plan_rank())
    size = within or plan_size() // across
    rank = plan_rank() % within if within else plan_rank() // across
    kind = ("within", within) if within else ("across", across)
    if kind not in _part_groups:
        own, _ = dist.new_subgroups_by_enumeration(_ranks_of_all_groups(within, across))
        assert isinstance(own, dist.ProcessGroup), "every rank is in one group"
        _part_groups[kind] = own
    return Ranks(_part_groups[kind], size, rank)


def _ranks_of_all_groups(within: int, across: int) -> list[list[int]]:
    """The numbers of all ranks, by group, in all copies of the plan."""
    plans = [range(first, first + plan_size()) for first in range(0, dist.get_world_size(), plan_size())]
    if within:
        return [list(plan[first : first + within]) for plan in plans for first in range(0, len(plan), within)]
    return [list(plan[first::across]) for plan in plans for first in range(across)]


def draw_own(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `compute` returns, with its random numbers drawn for this rank's own part of what the ranks share out.

    The ranks of a plan draw the same numbers from PyTorch's generators, so that what all of them compute whole is the
    same on each. Here the next of these numbers and the rank seed the generators while `compute` runs, and then they
    go on as they were: ranks draw different numbers here and the same ones behind it, and a layer that is recomputed
    from the state that it began with draws them again.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))  # by the generator of the CPU, for which no GPU is waited for
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed + plan_rank())
        return compute()


def own_starts(length: int, balanced: bool = False, across: int = 1) -> tuple[int, ...]:
    """Where this rank's blocks of a dimension of that length begin, for an op that has to know: one, or two.

    With `across`, so many neighbours have the same blocks.
    """
    return _starts(length, balanced, plan_size() // across)[plan_rank() // across]


def _starts(length: int, balanced: bool, size: int) -> tuple[tuple[int, ...], ...]:
    """Where each rank's blocks of a dimension begin."""
    if not balanced:
        return tuple((rank * (length // size),) for rank in range(size))
    block = length // (2 * size)
    return tuple((rank * block, length - (rank + 1) * block) for rank in range(size))


@dataclass(frozen=True)
class Ring:
    """Ranks that have the parts of a dimension, for an op that passes them round.

    starts: of each rank, where its blocks of the dimension begin.
    """

    ranks: Ranks
    starts: tuple[tuple[int, ...], ...]

    @property
    def rank(self) -> int:
        return self.ranks.rank

    def pass_on(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Sends a contiguous tensor, of any shape, to the next rank; returns what waits for the tensor of that shape
        that the rank before sends, and returns it. Until then the first must not be written to.

        It is an all-to-all in which each rank has one receiver: two sends and receives, which gloo has for tensors on
        GPUs too.
        """
        size, arriving = self.ranks.size, torch.empty_like(x)
        to_each, from_each = [0] * size, [0] * size
        to_each[(self.rank + 1) % size] = from_each[(self.rank - 1) % size] = x.numel()
        flat = arriving.view(-1), x.view(-1)
        work = dist.all_to_all_single(*flat, from_each, to_each, group=self.ranks.group, async_op=True)
        return partial(_arrived, arriving, work, x)

    def exchange(self, x: torch.Tensor, to_each: Sequence[int], from_each: Sequence[int]) -> torch.Tensor:
        """Sends each rank its share of a vector, of these lengths one after another, and returns those that come."""
        received = x.new_empty(sum(from_each))
        dist.all_to_all_single(received, x, list(from_each), list(to_each), group=self.ranks.group)
        return received


def _arrived(arriving: torch.Tensor, work: dist.Work | None, sent: torch.Tensor) -> torch.Tensor:
    """What arrives, when it has. What is sent is held until then: NCCL reads it while this process goes on."""
    if work is not None:
        work.wait()
    return arriving


def ring_of(length: int, balanced: bool = False, across: int = 1) -> Ring:
    """The ranks that have a dimension of that length in parts: all of a plan, or those that are each `across` from the
    next."""
    ranks = ranks_of(across=across) if across > 1 else ranks_of()
    return Ring(ranks, _starts(length, balanced, ranks.size))


def all_to_all(
    x: torch.Tensor,
    split: int,
    gather: int,
    copies: int = 1,
    balanced_split: bool = False,
    balanced_gather: bool = False,
    **over: int,
) -> torch.Tensor:
    """Shard(gather) -> Shard(split): [.., s, .., g/plan_size, ..] -> [.., s/plan_size, .., g, ..].

    Backward is the inverse, Shard(split) -> Shard(gather). Each sends N/plan_size * (plan_size-1)/plan_size bytes.
    """
    ranks, one, other = ranks_of(**over), (split, balanced_split), (gather, balanced_gather)
    x = _with_copies(x, split, copies, ranks)
    exchanged = partial(_exchanged, ranks=ranks)
    return _reshard(x, ranks, partial(exchanged, split=one, gather=other), partial(exchanged, split=other, gather=one))


def reorder(x: torch.Tensor, dim: int, balanced: bool, **over: int) -> torch.Tensor:
    """Shard(dim) -> Shard(dim) in balanced order, or from that if not `balanced`: [.., n/plan_size, ..], the same.

    Backward is the inverse. Each sends N/plan_size bytes at the most.
    """
    ranks = ranks_of(**over)
    reordered = partial(_reordered, dim=dim, ranks=ranks)
    return _reshard(x, ranks, partial(reordered, balanced=balanced), partial(reordered, balanced=not balanced))


def all_gather(x: torch.Tensor, dim: int, balanced: bool = False, **over: int) -> torch.Tensor:
    """Shard(dim) -> Replicate, for an op that every rank computes whole: [.., n/plan_size, ..] -> [.., n, ..].

    Forward sends N * (plan_size-1)/plan_size bytes. The gradient is Replicate, and backward takes this rank's slice of
    it, which sends nothing.
    """
    cut = _Cut(dim, balanced, ranks_of(**over))
    return _reshard(x, cut.ranks, partial(_gathered, cut=cut), partial(_sliced, cut=cut))


def all_gather_reduce(x: torch.Tensor, dim: int, balanced: bool = False, **over: int) -> torch.Tensor:
    """Shard(dim) -> Replicate, for a partitioned op: [.., n/plan_size, ..] -> [.., n, ..].

    The gradient is Partial, and backward reduce-scatters it. Each sends N * (plan_size-1)/plan_size bytes.
    """
    cut = _Cut(dim, balanced, ranks_of(**over))
    return _reshard(x, cut.ranks, partial(_gathered, cut=cut), partial(_reduce_scattered, cut=cut))


def take_slice(x: torch.Tensor, dim: int, copies: int = 1, balanced: bool = False, **over: int) -> torch.Tensor:
    """Replicate -> Shard(dim): [.., n, ..] -> [.., n/plan_size, ..], copied so that the whole tensor can be freed.

    Forward sends nothing. Backward all-gathers the gradient, which sends N * (plan_size-1)/plan_size bytes; integers
    have no gradient.
    """
    cut = _Cut(dim, balanced, ranks_of(**over))
    x = _with_copies(x, dim, copies, cut.ranks)
    return _reshard(x, cut.ranks, partial(_sliced, cut=cut), partial(_gathered, cut=cut))


def replicate(x: torch.Tensor, **over: int) -> torch.Tensor:
    """Replicate -> Replicate, for a partitioned op: the same tensor, of any shape.

    Forward sends nothing. The gradient is Partial, and backward all-reduces it, which sends
    2N * (plan_size-1)/plan_size bytes.
    """
    ranks = ranks_of(**over)
    return _reshard(x, ranks, _same, partial(_all_reduced, ranks=ranks))


def all_reduce(x: torch.Tensor, **over: int) -> torch.Tensor:
    """Partial -> Replicate, for an op that every rank computes whole: the sum over ranks, of any shape.

    Forward sends 2N * (plan_size-1)/plan_size bytes. The gradient is Replicate and is every summand's gradient as it
    stands: backward sends nothing.
    """
    ranks = ranks_of(**over)
    return _reshard(x, ranks, partial(_all_reduced, ranks=ranks), _same)


def all_reduce_both(x: torch.Tensor, **over: int) -> torch.Tensor:
    """Partial -> Replicate, for a partitioned op: the sum over ranks, of any shape.

    The gradient is Partial, and backward all-reduces it too. Each sends 2N * (plan_size-1)/plan_size bytes.
    """
    ranks = ranks_of(**over)
    return _reshard(x, ranks, partial(_all_reduced, ranks=ranks), partial(_all_reduced, ranks=ranks))


def reduce_scatter(x: torch.Tensor, dim: int, copies: int = 1, balanced: bool = False, **over: int) -> torch.Tensor:
    """Partial -> Shard(dim): [.., n, ..] -> [.., n/plan_size, ..], this rank's slice of the sum over ranks.

    Backward all-gathers the gradient. Each sends N * (plan_size-1)/plan_size bytes.
    """
    cut = _Cut(dim, balanced, ranks_of(**over))
    x = _with_copies(x, dim, copies, cut.ranks)
    return _reshard(x, cut.ranks, partial(_reduce_scattered, cut=cut), partial(_gathered, cut=cut))


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """The same tensor, of any shape, whose gradient is multiplied by `factor`. Nothing is sent.

    For an FSDP-sharded weight of an op that every rank computes whole: FSDP sums the gradients of all ranks, which
    counts this one plan_size times, and a factor of 1/plan_size corrects that. The factor is applied before the sum, in
    the gradient's dtype, which is exact where plan_size is a power of two.
    """
    return _Reshard.apply(x, _same, partial(torch.mul, other=factor))


def own_slice(weight: torch.Tensor, dim: int, copies: int = 1, **over: int) -> torch.Tensor:
    """This rank's slice of a weight that FSDP has gathered: [.., n, ..] -> [.., n/plan_size, ..]. Nothing is sent.

    Unlike take_slice's copy, this is a view: FSDP frees the gathered weight's memory and fills it again, and a view
    follows that. Outside the slice the gradient is zero, so it is Partial, and FSDP's own sum over ranks completes it.
    """
    ranks = ranks_of(**over)
    length = _part_length(weight, dim, ranks.size // copies)
    return weight.narrow(dim, ranks.rank // copies * length, length)


class _Reshard(torch.autograd.Function):
    """Applies one function of a tensor in the forward pass, and another one to its gradient in the backward pass."""

    @staticmethod
    def forward(ctx, x, reshard, reshard_gradient):
        ctx.reshard_gradient = reshard_gradient
        return reshard(x)

    @staticmethod
    @once_differentiable  # the gradient of this gradient would miss what other ranks contribute to it
    def backward(ctx, gradient):
        return ctx.reshard_gradient(gradient), None, None


def _reshard(x: torch.Tensor, ranks: Ranks, reshard: TensorFunction, reshard_gradient: TensorFunction) -> torch.Tensor:
    return x if ranks.size == 1 else _Reshard.apply(x, reshard, reshard_gradient)


def _group() -> dist.ProcessGroup:
    if _plan_group is None:
        raise RuntimeError("set_plan_group must be called before the generated code runs")
    return _plan_group


@dataclass(frozen=True)
class _Cut:
    """A dimension that is split over ranks."""

    dim: int
    balanced: bool
    ranks: Ranks

    def blocks_of(self, rank: int) -> tuple[int, int]:
        """The numbers of the two of 2 * size blocks that a rank's part of the dimension is made of."""
        return (rank, 2 * self.ranks.size - 1 - rank) if self.balanced else (2 * rank, 2 * rank + 1)

    def part(self, blocks: Sequence[torch.Tensor], rank: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """A rank's part, of all the blocks."""
        return torch.cat([blocks[number] for number in self.blocks_of(rank)], self.dim, out=out)


def _with_copies(x: torch.Tensor, dim: int, copies: int, ranks: Ranks) -> torch.Tensor:
    """As many of each of a dimension's size / copies parts as neighbours hold it; the gradient is their sum."""
    if copies == 1:
        return x
    dim %= x.dim()
    length = _part_length(x, dim, ranks.size // copies)
    return x.unflatten(dim, (-1, 1, length)).repeat_interleave(copies, dim + 1).flatten(dim, dim + 2)


def _part_length(x: torch.Tensor, dim: int, n_parts: int) -> int:
    """The length of one part of dimension `dim`; raises ValueError if the parts would not be equal."""
    length = x.shape[dim]
    if length % n_parts:
        raise ValueError(f"dimension {dim} of shape {list(x.shape)} can't be split evenly over {n_parts} ranks")
    return length // n_parts


def _blocks(x: torch.Tensor, cut: _Cut) -> tuple[torch.Tensor, ...]:
    """The 2 * size blocks of the dimension; raises ValueError if they would not be equal."""
    return x.split(_part_length(x, cut.dim, 2 * cut.ranks.size), cut.dim)


def _parts_first(x: torch.Tensor, cut: _Cut) -> torch.Tensor:
    """[.., n, ..] -> [size, .., n/size, ..], contiguous: a collective's input, part r being rank r's."""
    dim, size = cut.dim % x.dim(), cut.ranks.size
    if not cut.balanced:
        return x.unflatten(dim, (size, _part_length(x, dim, size))).movedim(dim, 0).contiguous()
    blocks = _blocks(x, cut)
    parts = x.new_empty(size, *(2 * length if d == dim else length for d, length in enumerate(blocks[0].shape)))
    for rank, part in enumerate(parts):
        cut.part(blocks, rank, out=part)
    return parts


def _joined(parts: torch.Tensor, cut: _Cut) -> torch.Tensor:
    """[size, .., n/size, ..] -> [.., n, ..], the inverse of _parts_first.

    It is a view where every dimension before `dim` has length 1, and a copy elsewhere. Its elements lie in the order of
    its dimensions, so that it can be viewed as the whole graph's tensor is; flatten sees to that, but for parts that
    have length 1 along `dim`. From balanced order it is always a copy.
    """
    dim = cut.dim % (parts.dim() - 1)
    if not cut.balanced:
        return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()
    front, back = parts.chunk(2, dim + 1)
    return torch.cat([*front, *reversed(back.unbind())], dim).contiguous()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _sliced(x: torch.Tensor, cut: _Cut) -> torch.Tensor:
    """This rank's part of the dimension, as a copy, so that the whole tensor can be freed.

    One number that is expanded, as the gradient of a sum is, stays one, which takes no memory. Its strides tell the
    loss that all gradients are equal, so that the host need not wait for the device to compare them.
    """
    length = _part_length(x, cut.dim, cut.ranks.size)
    if cut.balanced and any(x.stride()):
        return cut.part(_blocks(x, cut), cut.ranks.rank).contiguous()
    part = x.narrow(cut.dim, cut.ranks.rank * length, length)
    return part.clone(memory_format=torch.contiguous_format) if any(part.stride()) else part


def _gathered(x: torch.Tensor, cut: _Cut) -> torch.Tensor:
    parts = x.new_empty(cut.ranks.size, *x.shape)
    # Both are flat, since gloo takes the output as a concatenation of the inputs and not as a stack of them.
    all_gather_single(parts.view(-1), x.contiguous().view(-1), group=cut.ranks.group)
    return _joined(parts, cut)


def _reduce_scattered(x: torch.Tensor, cut: _Cut) -> torch.Tensor:
    parts = _parts_first(x, cut)
    own = torch.empty_like(parts[0])
    reduce_scatter_single(own.view(-1), parts.view(-1), group=cut.ranks.group)
    return own


def _all_reduced(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # all_reduce works in place, and x may be in use elsewhere
    dist.all_reduce(total, group=ranks.group)
    return total


def _exchanged(x: torch.Tensor, split: tuple[int, bool], gather: tuple[int, bool], ranks: Ranks) -> torch.Tensor:
    """Each dimension with whether it is in balanced order."""
    parts = _parts_first(x, _Cut(*split, ranks))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=ranks.group)
    return _joined(received, _Cut(*gather, ranks))


def _reordered(x: torch.Tensor, dim: int, balanced: bool, ranks: Ranks) -> torch.Tensor:
    """Each rank's two blocks go to the ranks that hold them in the other order."""
    before, after = _Cut(dim, not balanced, ranks), _Cut(dim, balanced, ranks)
    everyone = range(ranks.size)
    holder = {number: rank for rank in everyone for number in after.blocks_of(rank)}
    leaves = [sorted(before.blocks_of(rank), key=holder.__getitem__) for rank in everyone]
    block = dict(zip(before.blocks_of(ranks.rank), x.chunk(2, dim), strict=True))
    sent = torch.stack([block[number] for number in leaves[ranks.rank]]).contiguous()
    received = torch.empty_like(sent)
    to_each = [[holder[number] for number in leaves[ranks.rank]].count(rank) for rank in everyone]
    from_each = [[holder[number] for number in leaves[rank]].count(ranks.rank) for rank in everyone]
    dist.all_to_all_single(received, sent, from_each, to_each, group=ranks.group)
    arrived = [number for rank in everyone for number in leaves[rank] if holder[number] == ranks.rank]
    return torch.cat([received[arrived.index(number)] for number in after.blocks_of(ranks.rank)], dim).contiguous()
