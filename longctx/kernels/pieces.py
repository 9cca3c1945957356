"""Causal attention of some of a row's queries against all of its keys, by fused kernels that know only squares.

A rank that has a part of the queries has one block of them or two. A block sees the keys before it whole, and those
beside it causally, so it is computed in pieces: each is one call of a fused kernel, without a mask or with a square
one. A kernel also returns the logarithm of the sum of exponentials of each query's scores, by which pieces are merged
as the kernel itself merges its tiles (arXiv:2205.14135, section 3.1; arXiv:2310.01889 has the same between devices).
The backward of a fused kernel makes the weights anew from scores and these logarithms: given the merged ones, it
returns the piece's term of the whole gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Sequence  # noqa: UP035 - custom_op of PyTorch 2.6, which nnScaler takes, knows no other

import torch

from longctx.kernels.fused import HALF, KERNELS, activate

KEYS = 32_768  # of a piece in the backward, at most: kernels make the gradient of shared keys for each query head

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class PieceKernel:
    """A fused kernel by the operators of its forward and of its backward, for [b, heads, l, d].

    forward: query, key, value, is_causal, scale -> output, and the logarithms, [b, heads, l] or [b, heads, l, 1];
    backward: the output's gradient, query, key, value, output, logarithms, is_causal, scale -> three gradients.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]


def can_be_pieces(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether a kernel here takes pieces of these: what is dropped in one piece is not known to the others."""
    if query.is_cuda:
        return not dropout and fits_gpu_kernels(query.shape, value.shape, query.dtype)
    return not dropout and query.shape[-1] == value.shape[-1]


def fits_gpu_kernels(query: Sequence[int], value: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a GPU's fused kernels take queries and values of these shapes and this dtype."""
    return dtype in HALF and heads_fit_gpu_kernels(query, value)


def heads_fit_gpu_kernels(query: Sequence[int], value: Sequence[int]) -> bool:
    """Whether a GPU's fused kernels take heads of these shapes: of a multiple of 8, of 256 at most.

    PyTorch pads others only above these operators.
    """
    d = query[-1]
    return d % 8 == 0 and d <= 256 and d == value[-1]


@torch.library.custom_op("longctx::attention_in_pieces", mutates_args=())
def attention_in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scale: float, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of blocks of queries: [b, heads, q, d], twice [b, kv_heads, l, d] -> [b, heads, q, d], and the
    logarithms of the sums of exponentials, float32 (float64 of float64), [b, heads, q].

    It is one operator, so that torch.utils.checkpoint keeps its output and not that of each piece.

    Args:
        starts: where in the row each block of queries begins; all are of one length.
        kernel: what `resolve` of fused.py says.
    """
    run = kernel_for(query, kernel)
    output, logarithms = empty_result(query)
    for rows, start in blocks_of(query, starts):
        merged = None
        for keys, is_causal in keys_seen(start, rows.stop - rows.start, (0,), key.shape[2]):
            merged = merge(merged, attend(run, query[:, :, rows], key, value, keys, is_causal, scale))
        assert merged is not None, "a block sees its own keys"
        output[:, :, rows], logarithms[:, :, rows] = merged
    return output, logarithms


@attention_in_pieces.register_fake
def _(query, key, value, starts, scale, kernel):
    return empty_result(query)


def _save(ctx, inputs, output) -> None:
    query, key, value, ctx.starts, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of query, key and value. Two terms at most are added up for a key, so that is exact to a rounding;
    those of a query are added up in float32."""
    query, key, value, output, logarithms = ctx.saved_tensors
    run = kernel_for(query, ctx.kernel)
    of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, start in blocks_of(query, ctx.starts):
        made = (x[:, :, rows] for x in (gradient, query, output, logarithms))
        queries = Queries(*made, scale=ctx.scale)
        seen = keys_seen(start, rows.stop - rows.start, (0,), key.shape[2], most=KEYS)
        of_block = queries.add_gradients(run, seen, (key, value), (of_key, of_value))
        assert of_block is not None, "a block sees its own keys"
        of_query[:, :, rows] = of_block
    return of_query, of_key, of_value, None, None, None


attention_in_pieces.register_autograd(_backward, setup_context=_save)


# --- what ring.py does too -------------------------------------------------------------------------------------------


def blocks_of(query: torch.Tensor, starts: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """For each block its place among the queries, and where in the row it begins."""
    n = query.shape[2] // len(starts)
    return ((slice(number * n, (number + 1) * n), start) for number, start in enumerate(starts))


def keys_seen(
    start: int, n: int, key_starts: Sequence[int], n_keys: int, most: int | None = None
) -> Iterator[tuple[slice, bool]]:
    """The pieces of some of a row's keys that a block of queries sees, each with whether it sees them causally.

    The block sees those before it whole, its own causally, and those after it not at all.

    Args:
        start: where in the row the n queries begin.
        key_starts: where each block of n_keys begins; the queries' own keys are all in one of them, or in none.
        most: keys of a piece, at most.
    """
    for number, first in enumerate(key_starts):
        begin = number * n_keys
        end = begin + min(n_keys, max(0, start - first))
        for place in range(begin, end, most or n_keys):
            yield slice(place, min(place + (most or n_keys), end)), False
        if first <= start < first + n_keys:
            yield slice(end, end + n), True


def empty_result(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the output, and for the logarithms."""
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=wide(query.dtype))


def attend(run: PieceKernel, query, key, value, keys: slice, is_causal: bool, scale: float) -> Tensors:
    """The output of a piece, and the logarithms, in float32."""
    found, log = run.forward(query, key[:, :, keys], value[:, :, keys], is_causal, scale)
    return found.to(wide(query.dtype)), log.view(found.shape[:3]).to(wide(query.dtype))


def merge(one: Tensors | None, other: Tensors) -> Tensors:
    """Two outputs over different keys as one over both, with their logarithms; the first is written over."""
    if one is None:
        return other
    share = (other[1] - one[1]).sigmoid().unsqueeze(-1)
    return one[0].lerp_(other[0], share), torch.logaddexp(one[1], other[1])


@dataclass(frozen=True)
class Queries:
    """A block of queries in the backward pass: the gradient of its output, itself, its output, and the logarithms."""

    gradient: torch.Tensor
    query: torch.Tensor
    output: torch.Tensor
    logarithms: torch.Tensor
    scale: float

    def add_gradients(
        self,
        run: PieceKernel,
        seen: Iterable[tuple[slice, bool]],
        keys_values: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        of_query: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Adds the terms of the pieces to the gradients of keys and values, and returns that of the queries, to which
        it adds theirs, in float32; None if it is None and no piece is seen."""
        logarithms = self.logarithms.contiguous()
        for keys, is_causal in seen:
            key, value = (x[:, :, keys] for x in keys_values)
            of_piece, *others = run.backward(
                self.gradient, self.query, key, value, self.output, logarithms, is_causal, self.scale
            )
            of_piece = of_piece.to(logarithms.dtype)
            of_query = of_piece if of_query is None else of_query.add_(of_piece)
            for total, term in zip(gradients, others, strict=True):
                total[:, :, keys] += term
        return of_query


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is merged and added up in: float32, or float64 of float64."""
    return torch.promote_types(dtype, torch.float32)


# --- kernels ---------------------------------------------------------------------------------------------------------


def kernel_for(query: torch.Tensor, kernel: str) -> PieceKernel:
    """The kernel on the query's device. Where none was chosen, and for 'sdpa', it is PyTorch's flash backend."""
    if not query.is_cuda:
        return PieceKernel(_cpu_forward, _cpu_backward)
    if kernel == "cudnn":
        return PieceKernel(_cudnn_forward, _cudnn_backward)
    activate(KERNELS[kernel].activates if kernel in KERNELS else None)
    return FLASH


def _flash_forward(query, key, value, is_causal, scale) -> Tensors:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]


def _flash_backward(gradient, query, key, value, output, logarithms, is_causal, scale) -> Tensors:
    nothing_drawn = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_zeros((), dtype=torch.uint64)
    lengths = None, None, query.shape[2], key.shape[2]  # None: all rows of the batch are of one length
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, output, logarithms, *lengths, 0.0, is_causal, *nothing_drawn, scale=scale
    )


FLASH = PieceKernel(_flash_forward, _flash_backward)


def _cudnn_forward(query, key, value, is_causal, scale) -> Tensors:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )[:2]


def _cudnn_backward(gradient, query, key, value, output, logarithms, is_causal, scale) -> Tensors:
    nothing_drawn = (query.new_zeros((), dtype=torch.int64),) * 2
    lengths = None, None, None, query.shape[2], key.shape[2]  # no bias, and all rows of the batch are of one length
    forward = query, key, value, output, logarithms.unsqueeze(-1)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        gradient, *forward, *nothing_drawn, *lengths, 0.0, is_causal, scale=scale
    )


def _cpu_forward(query, key, value, is_causal, scale) -> Tensors:
    key, value = (_for_each_query_head(x, query) for x in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)


def _cpu_backward(gradient, query, key, value, output, logarithms, is_causal, scale) -> Tensors:
    heads = key.shape[1]
    key, value = (_for_each_query_head(x, query) for x in (key, value))
    of_query, *others = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, logarithms, 0.0, is_causal, scale=scale
    )
    return of_query, *(x.unflatten(1, (heads, -1)).sum(2) for x in others)


def _for_each_query_head(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The keys or values of the head that each query head shares; the CPU's kernel knows no such sharing."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)
