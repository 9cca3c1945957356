"""Causal attention where each rank has some of a row's queries, and the keys and values of the same tokens.

Without a window every query needs the keys before it, of whatever rank. Blocks of keys and values go round the ranks
(Liu, Zaharia and Abbeel, arXiv:2310.01889): each rank computes its queries against the block that it has, in pieces as
pieces.py does, while the next one travels. So two blocks are held at a time, and not the whole row's. In the backward
pass the blocks go round again, and behind them their gradients, to which every rank adds its terms in turn: the order
of each sum is fixed, and it is made in the tensors' own dtype, as reduce-scatters make theirs.

With a window a block of queries sees few keys of other ranks. These are sent to it straight from where they are, before
it computes, and their gradients back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch.autograd.function import once_differentiable

from longctx.kernels import pieces
from longctx.kernels.kept import computed_once


class Ring(Protocol):
    """Ranks that have a row's queries, keys and values among them; longctx/runtime/collectives.py has one.

    rank: this rank's number; starts: of each rank the tokens at which its blocks begin, all of one length.
    """

    @property
    def rank(self) -> int: ...

    @property
    def starts(self) -> tuple[tuple[int, ...], ...]: ...

    def pass_on(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Sends a contiguous tensor to the next rank; returns what waits for that of the rank before, and returns it.

        Until then the tensor must not be written to.
        """
        ...

    def exchange(self, x: torch.Tensor, to_each: Sequence[int], from_each: Sequence[int]) -> torch.Tensor:
        """Sends each rank its share of a vector, of these lengths one after another, and returns those that come."""
        ...


def ring_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, kernel: str, ring: Ring
) -> torch.Tensor:
    """Causal attention of this rank's part of a row: [b, heads, n, d], twice [b, kv_heads, n, d] -> [b, heads, n, d].

    Args:
        kernel: what `resolve` of fused.py says.
    """
    return _RingAttention.apply(query, key, value, scale, kernel, ring)


class _RingAttention(torch.autograd.Function):
    """A layer that keeps attention and is computed again has the forward's results, and nothing goes round for it."""

    @staticmethod
    def forward(ctx, query, key, value, scale, kernel, ring):
        output, logarithms = computed_once(lambda: _forward(query, key, value, scale, kernel, ring))
        ctx.save_for_backward(query, key, value, output, logarithms)
        ctx.scale, ctx.kernel, ctx.ring = scale, kernel, ring
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradients = _backward(gradient, ctx.saved_tensors, ctx.scale, ctx.kernel, ctx.ring)
        return *gradients, None, None, None


def _forward(query, key, value, scale: float, kernel: str, ring: Ring) -> pieces.Tensors:
    """The output, and the logarithms of the sums of exponentials, [b, heads, n]."""
    run = pieces.kernel_for(query, kernel)
    blocks = list(pieces.blocks_of(query, ring.starts[ring.rank]))
    merged: list[pieces.Tensors | None] = [None] * len(blocks)
    for here, starts in _rounds(ring, key, value):
        n = here[0].shape[2] // len(starts)
        for number, (rows, start) in enumerate(blocks):
            for seen, is_causal in pieces.keys_seen(start, n, starts, n):
                found = pieces.attend(run, query[:, :, rows], here[0], here[1], seen, is_causal, scale)
                merged[number] = pieces.merge(merged[number], found)
    output, logarithms = pieces.empty_result(query)
    for (rows, _), block in zip(blocks, merged, strict=True):
        assert block is not None, "a block sees its own keys"
        output[:, :, rows], logarithms[:, :, rows] = block
    return output, logarithms


def _backward(gradient: torch.Tensor, saved: pieces.Tensors, scale: float, kernel: str, ring: Ring) -> pieces.Tensors:
    """The gradients of query, key and value. That of a block of keys has gone round with it when it comes home.

    Args:
        saved: query, key, value, output and logarithms.
    """
    query, key, value, output, logarithms = saved
    run = pieces.kernel_for(query, kernel)
    blocks = [
        (start, rows, pieces.Queries(*(x[:, :, rows] for x in (gradient, query, output, logarithms)), scale=scale))
        for rows, start in pieces.blocks_of(query, ring.starts[ring.rank])
    ]
    of_blocks: list[torch.Tensor | None] = [None] * len(blocks)

    def terms_of(here: list[torch.Tensor], starts: Sequence[int]) -> list[torch.Tensor]:
        """This rank's terms of the gradients of the keys and values that are here."""
        terms, n = [torch.zeros_like(x) for x in here], here[0].shape[2] // len(starts)
        for number, (start, _, queries) in enumerate(blocks):
            seen = pieces.keys_seen(start, n, starts, n, most=pieces.KEYS)
            of_blocks[number] = queries.add_gradients(run, seen, here, terms, of_blocks[number])
        return terms

    coming: list[Callable[[], torch.Tensor]] = []  # gradients of what is here next, from the ranks that had it
    for here, starts in _rounds(ring, key, value):
        totals = terms_of(here, starts)
        for total, before in zip(totals, _take(coming), strict=False):  # nothing comes in the first round
            total += before
        coming = [ring.pass_on(total) for total in totals]
        del totals  # they are held until they are sent, and the next ones have room
    of_query = torch.empty_like(query)
    for (_, rows, _), block in zip(blocks, of_blocks, strict=True):
        assert block is not None, "a block sees its own keys"
        of_query[:, :, rows] = block
    of_key, of_value = _take(coming)
    return of_query, of_key, of_value


def _rounds(ring: Ring, *own: torch.Tensor) -> Iterator[tuple[list[torch.Tensor], tuple[int, ...]]]:
    """The tensors of one rank after another, from this one's, with where their blocks begin; the next ones travel while
    those are used. It is one list, so that nobody holds what has gone."""
    n_ranks = len(ring.starts)
    here = [x.contiguous() for x in own]
    for step in range(n_ranks):
        coming = [ring.pass_on(x) for x in here] if step + 1 < n_ranks else []
        yield here, ring.starts[(ring.rank - step) % n_ranks]
        here[:] = _take(coming)


def _take(coming: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """What arrives. The list is empty then, and what was sent is free."""
    return [coming.pop(0)() for _ in range(len(coming))]


# --- windows ---------------------------------------------------------------------------------------------------------


def keys_in_reach(x: torch.Tensor, ring: Ring, window: int) -> tuple[torch.Tensor, ...]:
    """For each of this rank's blocks of queries the keys (or values) that it sees, up to the block's last.

    [b, kv_heads, blocks * n, d] -> for each block [b, kv_heads, those before it + n, d]. Each query sees `window` keys,
    its own included, or all before it if this is 0.
    """
    return _KeysInReach.apply(x, ring, window)


class _KeysInReach(torch.autograd.Function):
    """One function for all blocks, so that every rank takes part in sending the gradients back."""

    @staticmethod
    def forward(ctx, x, ring, window):
        n = x.shape[2] // len(ring.starts[ring.rank])
        ctx.ring, ctx.n, ctx.parts = ring, n, parts_in_reach(ring.starts, n, window)
        leaving, coming = _sent_and_received(ctx.parts, ring.rank)
        sent = [(part.rank, x[:, :, part.at : part.at + part.length]) for part in leaving]
        arrived = _exchange(ring, x, sent, [(part.holder, part.length) for part in coming])
        before = dict(zip(coming, arrived, strict=True))
        own = ctx.parts[ring.rank]
        return tuple(
            torch.cat([*(before[part] for part in own if part.block == number), block], 2)
            for number, block in enumerate(x.split(n, 2))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        leaving, coming = _sent_and_received(ctx.parts, ctx.ring.rank)
        terms = {}  # of parts of other ranks, and of this one's
        for number, gradient in enumerate(gradients):
            own = [part for part in ctx.parts[ctx.ring.rank] if part.block == number]
            terms.update(zip(own, gradient.split([*(part.length for part in own), ctx.n], 2), strict=False))
        total = torch.cat([gradient[:, :, -ctx.n :] for gradient in gradients], 2)
        sent = [(part.holder, terms[part]) for part in coming]
        arrived = _exchange(ctx.ring, total, sent, [(part.rank, part.length) for part in leaving])
        for part, term in zip(leaving, arrived, strict=True):
            total[:, :, part.at : part.at + part.length] += term
        return total, None, None


@dataclass(frozen=True)
class Part:
    """Keys that a rank's block of queries sees before its own: `length` of them, from place `at` of what the rank
    `holder` has."""

    rank: int
    block: int
    holder: int
    at: int
    length: int


@cache
def parts_in_reach(starts: tuple[tuple[int, ...], ...], n: int, window: int) -> tuple[tuple[Part, ...], ...]:
    """For each rank the parts that its blocks see, those of a block in the order of the row.

    Args:
        starts: of each rank, where its blocks of n tokens begin.
    """
    holders = sorted((first, rank, place * n) for rank, own in enumerate(starts) for place, first in enumerate(own))

    def parts_of(rank: int) -> Iterator[Part]:
        for block, start in enumerate(starts[rank]):
            reach = max(0, start - window + 1) if window else 0
            for first, holder, at in holders:
                begin, end = max(first, reach), min(first + n, start)
                if begin < end:
                    yield Part(rank, block, holder, at + begin - first, end - begin)

    return tuple(tuple(parts_of(rank)) for rank in range(len(starts)))


def _sent_and_received(parts: Sequence[Sequence[Part]], rank: int) -> tuple[list[Part], list[Part]]:
    """The parts that a rank sends, those for each rank after another, and those that come, from each after another."""
    leaving = [part for of_rank in parts for part in of_rank if part.holder == rank]
    return leaving, sorted(parts[rank], key=lambda part: part.holder)


def _exchange(
    ring: Ring, like: torch.Tensor, sent: Sequence[tuple[int, torch.Tensor]], coming: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """Sends tensors [b, kv_heads, length, d] to ranks and returns those that come, of which the lengths are known; both
    in the order of the ranks. `like` is such a tensor of any length."""
    width = like.numel() // like.shape[2]
    ranks = range(len(ring.starts))
    to_each = [sum(tensor.numel() for rank, tensor in sent if rank == other) for other in ranks]
    from_each = [width * sum(length for rank, length in coming if rank == other) for other in ranks]
    arrived = ring.exchange(
        torch.cat([like.new_empty(0), *(tensor.flatten() for _, tensor in sent)]), to_each, from_each
    )
    parts = arrived.split([width * length for _, length in coming])
    return [part.view(*like.shape[:2], length, like.shape[3]) for part, (_, length) in zip(parts, coming, strict=True)]
