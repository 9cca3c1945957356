"""Causal attention within the documents of a row, as parts of it that each see the tokens of one document.

A block of queries is cut where documents begin. The queries of one document see the keys from where it begins to the
last of them, causally, and no others: what is left is attention whose last query and last key are of one token, which
every kernel has. Nothing of another document is read, so that no gradient can cross from one to another.

FlashAttention takes all parts of a block in one call, by the cumulative lengths of their queries and of their keys
(arXiv:2205.14135 and arXiv:2307.08691; "varlen" is its name for that, and PyTorch's).
"""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch

from longctx.kernels.fused import KERNELS, activate

try:
    from torch.nn.attention import varlen
except ImportError:  # PyTorch 2.6, which nnScaler takes; its engine keeps no documents apart
    varlen: Any = None

_varlen_attn: Any = varlen and varlen.varlen_attn  # which returns more only if it is asked to
# PyTorch 2.11 has no such argument, and takes query heads that share keys without it.
_GROUPED = varlen and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
GROUPED: dict[str, Any] = {"enable_gqa": True} if _GROUPED else {}


@dataclass(frozen=True)
class Part:
    """Queries of one document within a block, and the keys that they see: slices of a rank's and of a row's tokens."""

    queries: slice
    keys: slice


def blocks_of_parts(document_starts: Sequence[int], starts: Sequence[int], n: int) -> Iterator[list[Part]]:
    """The parts of each block of n queries, which begins at one of `starts` in the row.

    Args:
        document_starts: the tokens of the row at which a document begins, ascending from 0.
    """
    for number, start in enumerate(starts):
        first = bisect_right(document_starts, start) - 1  # the document of the block's first query
        within = document_starts[first : bisect_right(document_starts, start + n - 1)]
        cuts = [start, *within[1:], start + n]
        shift = number * n - start
        yield [
            Part(slice(begin + shift, end + shift), slice(document, end))
            for document, (begin, end) in zip(within, pairwise(cuts), strict=True)
        ]


def attend_in_parts(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_starts: Sequence[int],
    starts: Sequence[int],
) -> torch.Tensor:
    """Each part by `attend`, which takes its query, key and value: [b, heads, q, d] and so on -> [b, q, heads, e]."""
    n = query.shape[2] // len(starts)
    outputs = [
        attend(query[:, :, part.queries], key[:, :, part.keys], value[:, :, part.keys])
        for parts in blocks_of_parts(document_starts, starts, n)
        for part in parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


# --- all parts of a block in one call --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """The parts of a block as FlashAttention takes them: cumulative lengths on the device, int32, and the greatest.

    `keys` are those of the row from where the first part's document begins to the block's end, one part's behind the
    other's.
    """

    queries: slice
    keys: slice
    of_queries: torch.Tensor
    of_keys: torch.Tensor
    most_queries: int
    most_keys: int


@lru_cache(maxsize=4)  # all layers have the same documents; on the device the lengths are a few kilobytes
def packed_blocks(
    document_starts: tuple[int, ...], starts: tuple[int, ...], n: int, device: torch.device
) -> tuple[Packed, ...]:
    """The blocks of n queries that begin at `starts`. The host knows all lengths, so it waits for no device."""
    blocks = []
    for parts in blocks_of_parts(document_starts, starts, n):
        queries = [part.queries.stop - part.queries.start for part in parts]
        keys = [part.keys.stop - part.keys.start for part in parts]
        blocks.append(
            Packed(
                slice(parts[0].queries.start, parts[-1].queries.stop),
                slice(parts[0].keys.start, parts[-1].keys.stop),
                _cumulative(queries, device),
                _cumulative(keys, device),
                max(queries),
                max(keys),
            )
        )
    return tuple(blocks)


def _cumulative(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return sums.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sums


def attend_packed(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_starts: Sequence[int],
    starts: Sequence[int],
) -> torch.Tensor:
    """Each block by `attend`: [1, heads, q, d], [1, kv_heads, l, d], [1, kv_heads, l, e] -> [1, q, heads, e].

    `attend` takes a block's query, key and value, [q, heads, d] each, and its Packed.
    """
    (query,), (key,), (value,) = (x.transpose(1, 2) for x in (query, key, value))
    n = query.shape[0] // len(starts)
    outputs = [
        attend(query[block.queries], key[block.keys], value[block.keys], block)
        for block in packed_blocks(tuple(document_starts), tuple(starts), n, query.device)
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def flash_packed(query, key, value, block: Packed, scale: float, window: int, kernel: str) -> torch.Tensor:
    """A block by PyTorch's FlashAttention, or by the one that `kernel` puts in its place. cuDNN's stays out of it."""
    activate(KERNELS[kernel].activates if kernel in KERNELS else None)
    return _varlen_attn(
        query,
        key,
        value,
        block.of_queries,
        block.of_keys,
        block.most_queries,
        block.most_keys,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        **GROUPED,
    )
