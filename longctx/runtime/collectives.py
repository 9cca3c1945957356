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

Inputs may have any strides. Every function that splits a dimension raises ValueError if plan_size doesn't divide it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

TensorFunction = Callable[[torch.Tensor], torch.Tensor]

# PyTorch 2.13 has these two under new names and warns about the old ones; 2.11 has only the old ones.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# A module variable, since generated code has no group to pass around and a process takes part in one plan only.
_plan_group: dist.ProcessGroup | None = None


def set_plan_group(group: dist.ProcessGroup) -> None:
    """Sets the process group that every reshard is over: the ranks of this rank's copy of the plan."""
    global _plan_group
    _plan_group = group


def plan_rank() -> int:
    """This rank's number within its copy of the plan, from 0: which part of a sharded tensor it holds."""
    return dist.get_rank(_group())


def plan_size() -> int:
    """The number of ranks of one copy of the plan."""
    return dist.get_world_size(_group())


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


def own_starts(length: int, balanced: bool = False) -> tuple[int, ...]:
    """Where this rank's blocks of a dimension of that length begin, for an op that has to know: one, or two."""
    if not balanced:
        return (plan_rank() * (length // plan_size()),)
    block = length // (2 * plan_size())
    return tuple(block * number for number in _blocks_of(plan_rank(), balanced))


def all_to_all(
    x: torch.Tensor,
    split: int,
    gather: int,
    copies: int = 1,
    balanced_split: bool = False,
    balanced_gather: bool = False,
) -> torch.Tensor:
    """Shard(gather) -> Shard(split): [.., s, .., g/plan_size, ..] -> [.., s/plan_size, .., g, ..].

    Backward is the inverse, Shard(split) -> Shard(gather). Each sends N/plan_size * (plan_size-1)/plan_size bytes.
    """
    x, one, other = _with_copies(x, split, copies), (split, balanced_split), (gather, balanced_gather)
    return _reshard(x, partial(_exchanged, split=one, gather=other), partial(_exchanged, split=other, gather=one))


def reorder(x: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    """Shard(dim) -> Shard(dim) in balanced order, or from that if not `balanced`: [.., n/plan_size, ..], the same.

    Backward is the inverse. Each sends N/plan_size bytes at the most.
    """
    return _reshard(
        x, partial(_reordered, dim=dim, balanced=balanced), partial(_reordered, dim=dim, balanced=not balanced)
    )


def all_gather(x: torch.Tensor, dim: int, balanced: bool = False) -> torch.Tensor:
    """Shard(dim) -> Replicate, for an op that every rank computes whole: [.., n/plan_size, ..] -> [.., n, ..].

    Forward sends N * (plan_size-1)/plan_size bytes. The gradient is Replicate, and backward takes this rank's slice of
    it, which sends nothing.
    """
    return _reshard(x, partial(_gathered, dim=dim, balanced=balanced), partial(_sliced, dim=dim, balanced=balanced))


def all_gather_reduce(x: torch.Tensor, dim: int, balanced: bool = False) -> torch.Tensor:
    """Shard(dim) -> Replicate, for a partitioned op: [.., n/plan_size, ..] -> [.., n, ..].

    The gradient is Partial, and backward reduce-scatters it. Each sends N * (plan_size-1)/plan_size bytes.
    """
    gradient = partial(_reduce_scattered, dim=dim, balanced=balanced)
    return _reshard(x, partial(_gathered, dim=dim, balanced=balanced), gradient)


def take_slice(x: torch.Tensor, dim: int, copies: int = 1, balanced: bool = False) -> torch.Tensor:
    """Replicate -> Shard(dim): [.., n, ..] -> [.., n/plan_size, ..], copied so that the whole tensor can be freed.

    Forward sends nothing. Backward all-gathers the gradient, which sends N * (plan_size-1)/plan_size bytes; integers
    have no gradient.
    """
    x = _with_copies(x, dim, copies)
    return _reshard(x, partial(_sliced, dim=dim, balanced=balanced), partial(_gathered, dim=dim, balanced=balanced))


def replicate(x: torch.Tensor) -> torch.Tensor:
    """Replicate -> Replicate, for a partitioned op: the same tensor, of any shape.

    Forward sends nothing. The gradient is Partial, and backward all-reduces it, which sends
    2N * (plan_size-1)/plan_size bytes.
    """
    return _reshard(x, _same, _all_reduced)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Partial -> Replicate, for an op that every rank computes whole: the sum over ranks, of any shape.

    Forward sends 2N * (plan_size-1)/plan_size bytes. The gradient is Replicate and is every summand's gradient as it
    stands: backward sends nothing.
    """
    return _reshard(x, _all_reduced, _same)


def all_reduce_both(x: torch.Tensor) -> torch.Tensor:
    """Partial -> Replicate, for a partitioned op: the sum over ranks, of any shape.

    The gradient is Partial, and backward all-reduces it too. Each sends 2N * (plan_size-1)/plan_size bytes.
    """
    return _reshard(x, _all_reduced, _all_reduced)


def reduce_scatter(x: torch.Tensor, dim: int, copies: int = 1, balanced: bool = False) -> torch.Tensor:
    """Partial -> Shard(dim): [.., n, ..] -> [.., n/plan_size, ..], this rank's slice of the sum over ranks.

    Backward all-gathers the gradient. Each sends N * (plan_size-1)/plan_size bytes.
    """
    forward = partial(_reduce_scattered, dim=dim, balanced=balanced)
    return _reshard(_with_copies(x, dim, copies), forward, partial(_gathered, dim=dim, balanced=balanced))


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """The same tensor, of any shape, whose gradient is multiplied by `factor`. Nothing is sent.

    For an FSDP-sharded weight of an op that every rank computes whole: FSDP sums the gradients of all ranks, which
    counts this one plan_size times, and a factor of 1/plan_size corrects that. The factor is applied before the sum, in
    the gradient's dtype, which is exact where plan_size is a power of two.
    """
    return _Reshard.apply(x, _same, partial(torch.mul, other=factor))


def own_slice(weight: torch.Tensor, dim: int, copies: int = 1) -> torch.Tensor:
    """This rank's slice of a weight that FSDP has gathered: [.., n, ..] -> [.., n/plan_size, ..]. Nothing is sent.

    Unlike take_slice's copy, this is a view: FSDP frees the gathered weight's memory and fills it again, and a view
    follows that. Outside the slice the gradient is zero, so it is Partial, and FSDP's own sum over ranks completes it.
    """
    n_parts = plan_size() // copies
    length = _part_length(weight, dim, n_parts)
    return weight.narrow(dim, plan_rank() // copies * length, length)


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


def _reshard(x: torch.Tensor, reshard: TensorFunction, reshard_gradient: TensorFunction) -> torch.Tensor:
    return x if plan_size() == 1 else _Reshard.apply(x, reshard, reshard_gradient)


def _group() -> dist.ProcessGroup:
    if _plan_group is None:
        raise RuntimeError("set_plan_group must be called before the generated code runs")
    return _plan_group


def _with_copies(x: torch.Tensor, dim: int, copies: int) -> torch.Tensor:
    """As many of each of a dimension's plan_size / copies parts as neighbours hold it; the gradient is their sum."""
    if copies == 1:
        return x
    dim %= x.dim()
    length = _part_length(x, dim, plan_size() // copies)
    return x.unflatten(dim, (-1, 1, length)).repeat_interleave(copies, dim + 1).flatten(dim, dim + 2)


def _part_length(x: torch.Tensor, dim: int, n_parts: int | None = None) -> int:
    """The length of one rank's part of dimension `dim`, of which there are plan_size unless told otherwise; raises
    ValueError if the parts would not be equal."""
    length, size = x.shape[dim], n_parts or plan_size()
    if length % size:
        raise ValueError(f"dimension {dim} of shape {list(x.shape)} can't be split evenly over {size} ranks")
    return length // size


def _blocks_of(rank: int, balanced: bool) -> tuple[int, int]:
    """The numbers of the two of 2 * plan_size blocks that a rank's part of a dimension is made of."""
    return (rank, 2 * plan_size() - 1 - rank) if balanced else (2 * rank, 2 * rank + 1)


def _blocks(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """The 2 * plan_size blocks of dimension `dim`; raises ValueError if they would not be equal."""
    return x.split(_part_length(x, dim, 2 * plan_size()), dim)


def _parts_first(x: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    """[.., n, ..] -> [plan_size, .., n/plan_size, ..], contiguous: a collective's input, part r being rank r's."""
    dim %= x.dim()
    if not balanced:
        return x.unflatten(dim, (plan_size(), _part_length(x, dim))).movedim(dim, 0).contiguous()
    blocks = _blocks(x, dim)
    parts = x.new_empty(plan_size(), *(2 * size if d == dim else size for d, size in enumerate(blocks[0].shape)))
    for rank, part in enumerate(parts):
        torch.cat([blocks[number] for number in _blocks_of(rank, balanced)], dim, out=part)
    return parts


def _joined(parts: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    """[plan_size, .., n/plan_size, ..] -> [.., n, ..], the inverse of _parts_first.

    It is a view where every dimension before `dim` has length 1, and a copy elsewhere. Its elements lie in the order of
    its dimensions, so that it can be viewed as the whole graph's tensor is; flatten sees to that, but for parts that
    have length 1 along `dim`. From balanced order it is always a copy.
    """
    dim %= parts.dim() - 1
    if not balanced:
        return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()
    front, back = parts.chunk(2, dim + 1)
    return torch.cat([*front, *reversed(back.unbind())], dim).contiguous()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _sliced(x: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    """This rank's part of dimension `dim`, as a copy, so that the whole tensor can be freed.

    One number that is expanded, as the gradient of a sum is, stays one, which takes no memory. Its strides tell the
    loss that all gradients are equal, so that the host need not wait for the device to compare them.
    """
    length = _part_length(x, dim)
    if not any(x.stride()):
        return x.narrow(dim, 0, length)
    if balanced:
        blocks = _blocks(x, dim)
        return torch.cat([blocks[number] for number in _blocks_of(plan_rank(), balanced)], dim).contiguous()
    return x.narrow(dim, plan_rank() * length, length).clone(memory_format=torch.contiguous_format)


def _gathered(x: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    parts = x.new_empty(plan_size(), *x.shape)
    # Both are flat, since gloo takes the output as a concatenation of the inputs and not as a stack of them.
    all_gather_single(parts.view(-1), x.contiguous().view(-1), group=_group())
    return _joined(parts, dim, balanced)


def _reduce_scattered(x: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    parts = _parts_first(x, dim, balanced)
    own = torch.empty_like(parts[0])
    reduce_scatter_single(own.view(-1), parts.view(-1), group=_group())
    return own


def _all_reduced(x: torch.Tensor) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # all_reduce works in place, and x may be in use elsewhere
    dist.all_reduce(total, group=_group())
    return total


def _exchanged(x: torch.Tensor, split: tuple[int, bool], gather: tuple[int, bool]) -> torch.Tensor:
    """Each dimension with whether it is in balanced order."""
    parts = _parts_first(x, *split)
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_group())
    return _joined(received, *gather)


def _reordered(x: torch.Tensor, dim: int, balanced: bool) -> torch.Tensor:
    """Each rank's two blocks go to the ranks that hold them in the other order."""
    me, ranks, dim = plan_rank(), range(plan_size()), dim % x.dim()
    holder = {number: rank for rank in ranks for number in _blocks_of(rank, balanced)}
    leaves = [sorted(_blocks_of(rank, not balanced), key=holder.__getitem__) for rank in ranks]
    block = dict(zip(_blocks_of(me, not balanced), x.chunk(2, dim), strict=True))
    sent = torch.stack([block[number] for number in leaves[me]]).contiguous()
    received = torch.empty_like(sent)
    to_each = [[holder[number] for number in leaves[me]].count(rank) for rank in ranks]
    from_each = [[holder[number] for number in leaves[rank]].count(me) for rank in ranks]
    dist.all_to_all_single(received, sent, from_each, to_each, group=_group())
    arrived = [number for rank in ranks for number in leaves[rank] if holder[number] == me]
    return torch.cat([received[arrived.index(number)] for number in _blocks_of(me, balanced)], dim).contiguous()
