"""The differentiable moves of the partition algebra over a plan's ranks, which generated code calls; NCCL or gloo.

A tensor is R (the same on every rank), S(i) (split along dimension i into P equal parts, rank r holding part r) or
P (partial sums: the true value is the sum over ranks). Each function moves one state to another, and its gradient
back; whether a consumer is partitioned decides the state of the gradient that arrives, so it decides the function.

Sums are made in the tensor's own dtype: partial results in bfloat16 are added in bfloat16, float32 ones in float32.
In the docstrings P is also the number of ranks, and bytes are those that each rank sends, which are as many as it
receives; N is the bytes of the whole tensor, N/P those of one part. All-gather, reduce-scatter and all-reduce are
counted as bandwidth-optimal algorithms make them (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002).

Inputs may have any strides. A split that does not come out even raises ValueError.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

TensorMove = Callable[[torch.Tensor], torch.Tensor]

# Generated modules are plain code with no group to pass around, and a process takes part in one plan only.
_plan_group: dist.ProcessGroup | None = None


def set_plan_group(group: dist.ProcessGroup) -> None:
    """Names the ranks that the moves are over: the P ranks of one copy of the plan, this one among them."""
    global _plan_group
    _plan_group = group


def plan_rank() -> int:
    """This rank's number in the plan group, 0 to P - 1: the part of a split tensor that it holds."""
    return dist.get_rank(_group())


def plan_size() -> int:
    """P, the number of ranks in the plan group."""
    return dist.get_world_size(_group())


def all_to_all(x: torch.Tensor, split: int, gather: int) -> torch.Tensor:
    """S(gather) -> S(split): [.. s .. g/P ..] -> [.. s/P .. g ..].

    Backward is the inverse, S(split) -> S(gather). Each sends (P-1)/P of a part: N/P * (P-1)/P bytes.
    """
    return _move(x, partial(_exchanged, split=split, gather=gather), partial(_exchanged, split=gather, gather=split))


def all_gather(x: torch.Tensor, dim: int) -> torch.Tensor:
    """S(dim) -> R, for a consumer that every rank computes whole: [.. n/P ..] -> [.. n ..].

    Forward sends N * (P-1)/P bytes. The gradient is R, and backward takes this rank's slice of it: nothing is sent.
    """
    return _move(x, partial(_gathered, dim=dim), partial(_sliced, dim=dim))


def all_gather_reduce(x: torch.Tensor, dim: int) -> torch.Tensor:
    """S(dim) -> R, for a partitioned consumer: [.. n/P ..] -> [.. n ..].

    The gradient is P, and backward reduce-scatters it. Each sends N * (P-1)/P bytes.
    """
    return _move(x, partial(_gathered, dim=dim), partial(_reduce_scattered, dim=dim))


def take_slice(x: torch.Tensor, dim: int) -> torch.Tensor:
    """R -> S(dim): [.. n ..] -> [.. n/P ..], a copy of this rank's slice, so that the whole can be freed.

    Forward sends nothing; backward all-gathers the gradient, N * (P-1)/P bytes. Integers have no gradient to gather.
    """
    return _move(x, partial(_sliced, dim=dim), partial(_gathered, dim=dim))


def replicate(x: torch.Tensor) -> torch.Tensor:
    """R -> R, for a partitioned consumer: the same tensor, any shape.

    Forward sends nothing. The gradient is P, and backward all-reduces it: 2N * (P-1)/P bytes.
    """
    return _move(x, _same, _all_reduced)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """P -> R, for a consumer that every rank computes whole: any shape, summed over ranks.

    Forward sends 2N * (P-1)/P bytes. The gradient is R, which is each partial sum's gradient: nothing is sent.
    """
    return _move(x, _all_reduced, _same)


def all_reduce_both(x: torch.Tensor) -> torch.Tensor:
    """P -> R, for a partitioned consumer: any shape, summed over ranks.

    The gradient is P, and backward all-reduces it too. Each sends 2N * (P-1)/P bytes.
    """
    return _move(x, _all_reduced, _all_reduced)


def reduce_scatter(x: torch.Tensor, dim: int) -> torch.Tensor:
    """P -> S(dim): [.. n ..] -> [.. n/P ..], this rank's slice of the sum over ranks.

    Backward all-gathers the gradient. Each sends N * (P-1)/P bytes.
    """
    return _move(x, partial(_reduce_scattered, dim=dim), partial(_gathered, dim=dim))


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """The same tensor, any shape, its gradient multiplied by `factor`; nothing is sent.

    For a weight under FSDP whose op every rank computes whole: FSDP's sum over ranks counts its gradient P times, and
    a factor of 1/P makes that once. Done before the sum, in the gradient's dtype: exact where P is a power of two.
    """
    return _Move.apply(x, _same, partial(torch.mul, other=factor))


def own_slice(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's slice of a weight that FSDP has gathered: [.. n ..] -> [.. n/P ..]; nothing is sent.

    A view, unlike take_slice's copy: FSDP frees and refills the memory that it looks into. Its gradient is padded with
    zeros, a partial sum, which FSDP's own sum over ranks makes whole.
    """
    start, length = _own_range(weight, dim)
    return weight.narrow(dim, start, length)


class _Move(torch.autograd.Function):
    """A move forward and the move of its gradient, each a function of one tensor."""

    @staticmethod
    def forward(ctx, x, move, move_gradient):
        ctx.move_gradient = move_gradient
        return move(x)

    @staticmethod
    @once_differentiable  # a gradient of the gradient would miss what the other ranks sent
    def backward(ctx, gradient):
        return ctx.move_gradient(gradient), None, None


def _move(x: torch.Tensor, move: TensorMove, move_gradient: TensorMove) -> torch.Tensor:
    return x if plan_size() == 1 else _Move.apply(x, move, move_gradient)


def _group() -> dist.ProcessGroup:
    if _plan_group is None:
        raise RuntimeError("set_plan_group must be called before the generated code runs")
    return _plan_group


def _part(x: torch.Tensor, dim: int) -> int:
    """Length of one rank's part of dimension `dim`."""
    length, size = x.shape[dim], plan_size()
    if length % size:
        raise ValueError(f"dimension {dim} of shape {list(x.shape)} can't be split evenly over {size} ranks")
    return length // size


def _own_range(x: torch.Tensor, dim: int) -> tuple[int, int]:
    """Start and length of this rank's part of dimension `dim`."""
    part = _part(x, dim)
    return plan_rank() * part, part


def _parts_first(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[.. n ..] -> [P, .. n/P ..] contiguous, as the collectives take their input: part r for rank r."""
    dim %= x.dim()
    return x.unflatten(dim, (plan_size(), _part(x, dim))).movedim(dim, 0).contiguous()


def _joined(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """[P, .. n/P ..] -> [.. n ..]: what _parts_first took apart; a view where all dimensions before `dim` are 1."""
    dim %= parts.dim() - 1
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _sliced(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.narrow(dim, *_own_range(x, dim)).clone(memory_format=torch.contiguous_format)


def _gathered(x: torch.Tensor, dim: int) -> torch.Tensor:
    parts = x.new_empty(plan_size(), *x.shape)
    dist.all_gather_single(parts.view(-1), x.reshape(-1), group=_group())  # gloo takes a concatenation, not a stack
    return _joined(parts, dim)


def _reduce_scattered(x: torch.Tensor, dim: int) -> torch.Tensor:
    parts = _parts_first(x, dim)
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter_single(mine.view(-1), parts.view(-1), group=_group())
    return mine


def _all_reduced(x: torch.Tensor) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # the collective works in place, and x is others' too
    dist.all_reduce(total, group=_group())
    return total


def _exchanged(x: torch.Tensor, split: int, gather: int) -> torch.Tensor:
    parts = _parts_first(x, split)
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_group())
    return _joined(received, gather)
