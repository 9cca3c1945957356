"""Attention whose keys and values are on many ranks, against the formula for the whole row."""

import queue
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from placed import in_balanced_order
from test_kernels import formula
from torch.utils.checkpoint import checkpoint

from longctx.kernels import pieces
from longctx.kernels.attention import alibi_attention, attention, sink_attention
from longctx.kernels.kept import keep, kept
from longctx.kernels.ring import parts_in_reach

SCALE, BLOCK = 0.3, 4


@dataclass(frozen=True)
class ThreadRing:
    """A ring of threads, each of which plays a rank."""

    rank: int
    starts: tuple[tuple[int, ...], ...]
    boxes: list[list[queue.Queue]]  # boxes[sender][receiver]
    passed: list[int]  # by each rank, how many tensors

    def pass_on(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        assert x.is_contiguous()
        n = len(self.starts)
        self.passed[self.rank] += 1
        self.boxes[self.rank][(self.rank + 1) % n].put(x.clone())
        time.sleep(random.uniform(0, 0.005))  # so that ranks are ahead of each other, otherwise each time
        return lambda: self.boxes[(self.rank - 1) % n][self.rank].get(timeout=60)

    def exchange(self, x: torch.Tensor, to_each: list[int], from_each: list[int]) -> torch.Tensor:
        for other, part in enumerate(x.split(to_each)):
            self.boxes[self.rank][other].put(part.clone())
        arrived = [self.boxes[other][self.rank].get(timeout=60) for other in range(len(self.starts))]
        assert [part.numel() for part in arrived] == from_each
        return torch.cat(arrived)


class Echo(ThreadRing):
    """A ring of one rank, which gets what it sends."""

    def pass_on(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.passed[self.rank] += 1
        return x.clone


def on_each_rank(compute: Callable[[ThreadRing], list], n_ranks: int, balanced: bool) -> list[list[torch.Tensor]]:
    """What `compute` returns on each rank; what it raises on one is raised."""
    n = n_ranks * (2 if balanced else 1)
    starts = tuple((BLOCK * r, BLOCK * (n - 1 - r)) if balanced else (BLOCK * r,) for r in range(n_ranks))
    boxes = [[queue.Queue() for _ in range(n_ranks)] for _ in range(n_ranks)]
    rings = [ThreadRing(rank, starts, boxes, [0] * n_ranks) for rank in range(n_ranks)]
    with ThreadPoolExecutor(n_ranks) as pool:
        return list(pool.map(compute, rings))


def inputs(kv_heads: int, length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, 8) for heads in (4, kv_heads, kv_heads)]  # transposed, as models' are
    return [torch.randn(shape, dtype=dtype, generator=generator).transpose(1, 2) for shape in shapes]


def part_of(whole: torch.Tensor, ring: ThreadRing, dim: int) -> torch.Tensor:
    if len(ring.starts[0]) == 1:
        return whole.chunk(len(ring.starts), dim)[ring.rank]
    return in_balanced_order(whole, len(ring.starts), dim)[ring.rank]


def check(attend: Callable, expect: Callable, kv_heads: int, n_ranks: int, balanced: bool, tolerance: float) -> None:
    length = BLOCK * n_ranks * (2 if balanced else 1)
    whole = [x.requires_grad_() for x in inputs(kv_heads, length)]
    expected = expect(*whole)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, whole, gradient)

    def compute(ring: ThreadRing) -> list[torch.Tensor]:
        own = [part_of(x, ring, 2).detach().requires_grad_() for x in whole]
        output = attend(*own, ring=ring)
        return [output, *torch.autograd.grad(output, own, part_of(gradient, ring, 1))]

    results = on_each_rank(compute, n_ranks, balanced)
    for rank, (output, *found) in enumerate(results):
        ring = ThreadRing(rank, ((0,) * (1 + balanced),) * n_ranks, [], [])
        wanted = [part_of(expected, ring, 1), *(part_of(g, ring, 2) for g in gradients)]
        torch.testing.assert_close([output, *found], wanted, rtol=tolerance, atol=tolerance)


ORDERS = pytest.mark.parametrize("balanced", [False, True], ids=["first to last", "balanced"])


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@ORDERS
def test_ranks_round_which_keys_and_values_go_compute_attention_and_its_gradients(
    n_ranks, kv_heads, balanced, monkeypatch
):
    monkeypatch.setattr(pieces, "KEYS", 3)  # so that a block is several pieces in the backward pass

    def attend(query, key, value, ring):
        return attention(query, key, value, SCALE, ring=ring)

    check(attend, lambda *whole: formula(*whole, SCALE), kv_heads, n_ranks, balanced, 1e-12)


MASKS = {
    "a window within a block": (attention, {"window": 3}),
    "a window over blocks": (attention, {"window": 2 * BLOCK + 3}),
    "a soft-cap": (attention, {"softcap": 2.0}),
    "a window and a soft-cap": (attention, {"window": 6, "softcap": 2.0}),
    "the formula": (attention, {"implementation": "eager"}),
    "biases": (alibi_attention, {"window": 6}),
    "sinks": (sink_attention, {"window": 6}),
}


@pytest.mark.parametrize("mask", MASKS)
@ORDERS
def test_what_a_block_of_queries_sees_is_brought_to_it_where_attention_masks_more(mask, balanced):
    function, options = MASKS[mask]
    more = () if function is attention else (torch.linspace(0.1, 0.7, 4),)

    def attend(query, key, value, **ring):
        return function(query, key, value, *more, SCALE, **options, **ring)

    check(attend, attend, 2, 3, balanced, 1e-5)  # scores of these are computed in float32


@ORDERS
def test_of_other_ranks_only_the_keys_that_a_window_reaches_are_sent(balanced):
    n, window = 8, 5
    starts = tuple((n * r, n * (7 - r)) if balanced else (n * r,) for r in range(4))
    for rank, parts in enumerate(parts_in_reach(starts, n, window)):
        sees = {first: sum(part.length for part in parts if part.block == i) for i, first in enumerate(starts[rank])}
        assert sees == {first: min(first, window - 1) for first in starts[rank]}


def test_a_layer_that_keeps_attention_passes_nothing_round_when_it_is_computed_again():
    ring = Echo(1, ((0,), (BLOCK,), (2 * BLOCK,)), [], [0, 0, 0])
    query, key, value = (part_of(x, ring, 2).detach().requires_grad_() for x in inputs(2, 3 * BLOCK))

    def layer(query: torch.Tensor) -> torch.Tensor:
        return kept("attention", attention, 2 * query, key, value, SCALE, ring=ring).square()

    out = checkpoint(layer, query, use_reentrant=False, context_fn=keep("attention"))
    assert ring.passed[1] == 2 * 2  # of three ranks each passes keys and values on twice
    out.sum().backward()
    assert ring.passed[1] == 2 * (2 + 2 + 3)  # in the backward again, and their gradients thrice


def test_the_gradients_are_the_same_bits_each_time():
    def compute(ring: ThreadRing) -> list[torch.Tensor]:
        own = [part_of(x, ring, 2).detach().requires_grad_() for x in inputs(2, 4 * BLOCK, torch.bfloat16)]
        return list(torch.autograd.grad(attention(*own, SCALE, ring=ring).float().square().sum(), own))

    once, again = (on_each_rank(compute, 4, balanced=False) for _ in range(2))
    for ones, others in zip(once, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ones, others, strict=True))
