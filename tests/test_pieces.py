"""Attention of some of a row's queries, in pieces that are merged, against the formula for the whole row."""

import pytest
import torch
from test_kernels import formula
from torch.utils.checkpoint import checkpoint

from longctx.compiler.ops import REGISTERED_OPS, target_of
from longctx.kernels import pieces
from longctx.kernels.attention import attention, sink_attention
from longctx.kernels.kept import keep, kept
from longctx.kernels.pieces import attention_in_pieces

LENGTH, SCALE = 24, 0.3


def inputs(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, 8) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def taken(whole: torch.Tensor, starts: tuple[int, ...], dim: int) -> torch.Tensor:
    """The blocks of a fourth of the row in all that begin there."""
    n = LENGTH // 4 // len(starts)
    return torch.cat([whole.narrow(dim, start, n) for start in starts], dim)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "starts_of", [lambda r: (6 * r,), lambda r: (3 * r, 21 - 3 * r)], ids=["first to last", "balanced"]
)
def test_four_ranks_compute_attention_and_its_gradients_together(kv_heads, starts_of, monkeypatch):
    monkeypatch.setattr(pieces, "KEYS", 5)  # so that what is before a block is several pieces
    whole = [x.requires_grad_() for x in inputs(kv_heads)]
    expected = formula(*whole, SCALE)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_gradients = torch.autograd.grad(expected, whole, gradient)

    of_keys = [torch.zeros_like(x) for x in whole[1:]]
    for rank in range(4):
        starts = starts_of(rank)
        own = [taken(whole[0], starts, 2), *whole[1:]]
        own = [x.detach().clone().requires_grad_() for x in own]
        output = attention(*own, SCALE, starts=starts)
        torch.testing.assert_close(output, taken(expected, starts, 1), rtol=1e-12, atol=1e-12)
        of_query, *terms = torch.autograd.grad(output, own, taken(gradient, starts, 1))
        torch.testing.assert_close(of_query, taken(expected_gradients[0], starts, 2), rtol=1e-12, atol=1e-12)
        of_keys = [total + term for total, term in zip(of_keys, terms, strict=True)]
    torch.testing.assert_close(of_keys, list(expected_gradients[1:]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"window": 7}, {"softcap": 2.0}, {"implementation": "eager"}, {"dropout": 0.0}])
def test_queries_of_the_row_s_end_are_taken_where_no_starts_are_given(options):
    query, key, value = inputs(2)
    whole = attention(query, key, value, SCALE, **options)
    part = attention(query[:, :, 18:], key, value, SCALE, **options)
    torch.testing.assert_close(part, whole[:, 18:], rtol=1e-6, atol=1e-6)


def test_blocks_see_the_window_the_sinks_and_the_keys_of_their_own_places():
    query, key, value = inputs(2)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(2))
    whole = sink_attention(query, key, value, sinks, SCALE, window=7)
    part = sink_attention(taken(query, (3, 18), 2), key, value, sinks, SCALE, window=7, starts=(3, 18))
    torch.testing.assert_close(part, taken(whole, (3, 18), 1), rtol=1e-6, atol=1e-6)


def test_a_layer_that_keeps_attention_does_not_compute_its_pieces_again(monkeypatch):
    ran = []
    forward = pieces._cpu_forward
    monkeypatch.setattr(pieces, "_cpu_forward", lambda *args: ran.append(args) or forward(*args))
    query, key, value = (x.requires_grad_() for x in inputs(2))

    def layer(query: torch.Tensor) -> torch.Tensor:
        return kept("attention", attention, 2 * query, key, value, SCALE, starts=(3, 18)).square()

    checkpoint(layer, query[:, :, :6], use_reentrant=False, context_fn=keep("attention")).sum().backward()
    assert len(ran) == 4  # two pieces of each of two blocks


def test_the_operator_is_what_pytorch_demands_of_one():
    query, key, value = (x.requires_grad_() for x in inputs(2))
    torch.library.opcheck(attention_in_pieces, (query[:, :, :6], key, value, [3, 18], SCALE, "auto"))


def test_an_engine_that_tells_nobody_where_a_part_begins_is_given_an_annotation_that_splits_no_queries():
    registered = REGISTERED_OPS[target_of(attention)]
    assert registered.annotation_untold == "b (k g) q^ d^, b k l^ d^, b k l^ e^ -> b q^ (k g) e^"
