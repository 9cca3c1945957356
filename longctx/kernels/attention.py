"""Causal attention, as generated code calls it: by a fused kernel where there is one, in blocks of queries elsewhere.

The first half of the file is the function; its fused kernels are in fused.py, what they need for some of a row's
queries in pieces.py, and what keeps the documents of a row apart in documents.py. The second half is what the compiler
has to know of it: its FLOPs, what autograd saves, and its workspace.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from longctx.compiler.ir import Op, OwnRing, OwnStarts, Tensor, nbytes
from longctx.compiler.ops.registered import arguments_of, register_op
from longctx.compiler.ops.spec import FLOAT32_BYTES, Flops, Shares, Told
from longctx.compiler.ops.spec import Ring as RingSpec
from longctx.compiler.work import Work
from longctx.kernels.documents import Packed, attend_in_parts, attend_packed, flash_packed
from longctx.kernels.fused import HALF, resolve, sdpa
from longctx.kernels.pieces import KEYS, attention_in_pieces, can_be_pieces, fits_gpu_kernels, heads_fit_gpu_kernels
from longctx.kernels.ring import Ring, keys_in_reach, ring_attention

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func: Any = None
    flash_attn_varlen_func: Any = None

QUERY_BLOCK = 1024  # queries whose scores are held at a time where there is no fused kernel
BY_BLOCKS = ("eager", "flash_attention_2")  # implementations that are given all keys of a block of queries at once
MULTIPROCESSORS = 132  # of an H100 and an H200; an A100 has 108, so that it needs less than is predicted, a B200 148


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    implementation: str = "auto",
    deterministic: bool = False,
    starts: Sequence[int] = (),
    ring: Ring | None = None,
    document_starts: Sequence[int] = (),
) -> torch.Tensor:
    """Causal attention: [b, heads, q, d], [b, kv_heads, l, d], [b, kv_heads, l, e] -> [b, q, heads, e].

    The queries are those of all l tokens, or of some of them.

    Args:
        scale: the factor by which the scores are multiplied, usually d ** -0.5.
        window: each query sees the last `window` keys, its own included, or all of them if this is 0.
        softcap: if not 0, scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118, section 2).
        dropout: the probability that an attention weight is dropped.
        implementation: 'auto' takes the fused kernel that was chosen for this process (choice.py). With a window or a
            soft-cap it takes flash-attn, the only one that knows these, where it is installed, else blocks of queries.
            'cudnn', 'flash', 'fa3', 'fa4' and 'flash_attention_2' are fused kernels (fused.py), 'sdpa' is what PyTorch
            prefers of its own, and 'eager' the formula.
        deterministic: whether the backward gives the same bits each time. PyTorch's kernels ask
            torch.are_deterministic_algorithms_enabled(), which has to say so too.
        starts: the tokens at which the blocks begin, all of one length, that the queries are of, if these are not of
            all tokens. Left out, they are of the last ones.
        ring: the ranks that have the row's queries, keys and values among them, if these are of the same l tokens of a
            longer row.
        document_starts: the tokens of the row at which a document begins, ascending from 0, if each token is to see
            only those of its own document. On a GPU, in 16 bits, FlashAttention takes them all at once, windows
            included; elsewhere they are computed one after the other.

    Raises:
        RuntimeError: the kernel that was asked for does not take these tensors.
    """
    length = key.shape[2] * (len(ring.starts) if ring else 1)
    masks_more = bool(softcap or 0 < window < length)  # than the keys that come after a query
    kernel = resolve(implementation)
    if ring and not masks_more and implementation not in BY_BLOCKS and can_be_pieces(query, value, dropout):
        return ring_attention(query, key, value, scale, kernel, ring).transpose(1, 2)
    of_row, mask = (starts, ring, document_starts), (scale, window, softcap, dropout)
    if kernel == "flash_attention_2" or (masks_more and _is_for_flash_attn(implementation, query)):
        return _by_flash_attn(query, key, value, *of_row, None, deterministic, *mask)
    if document_starts:
        places = document_starts, _starts_of(query, key, starts)
        if query.is_cuda and can_be_pieces(query, value, dropout) and not softcap and implementation != "eager":
            attend = partial(flash_packed, scale=scale, window=window, kernel=kernel)
            return attend_packed(attend, query, key, value, *places)
        options = {"implementation": implementation, "deterministic": deterministic}
        return attend_in_parts(lambda q, k, v: attention(q, k, v, *mask, **options), query, key, value, *places)
    if implementation == "eager" or masks_more:
        of_rows = _attend_in_float32 if softcap or implementation == "eager" else _attend_masked
        attend = partial(_blockwise_attention, attend=of_rows)
    elif ring is None and query.shape[2] == length:
        return sdpa(query, key, value, scale, dropout, kernel, is_causal=True).transpose(1, 2)
    elif ring is None and can_be_pieces(query, value, dropout):
        return attention_in_pieces(query, key, value, _starts_of(query, key, starts), scale, kernel)[0].transpose(1, 2)
    else:
        attend = partial(_blockwise_attention, attend=_attend_masked)
    return _each_block(attend, query, key, value, *of_row, *mask)


def alibi_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    implementation: str = "auto",
    deterministic: bool = False,
    starts: Sequence[int] = (),
    ring: Ring | None = None,
    document_starts: Sequence[int] = (),
) -> torch.Tensor:
    """`attention` with linear biases (ALiBi, arXiv:2108.12409, section 3), which take the place of positions.

    To the score of query i and key j of a head, scaled and capped, slopes[head] * (j - i) is added. `slopes` are
    float32, [heads]. Of the fused kernels flash-attn's knows biases; elsewhere blocks of queries are taken.
    """
    of_row, mask = (starts, ring, document_starts), (scale, window, softcap, dropout)
    if resolve(implementation) == "flash_attention_2" or _is_for_flash_attn(implementation, query):
        return _by_flash_attn(query, key, value, *of_row, slopes, deterministic, *mask)
    attend = partial(_blockwise_attention, attend=partial(_attend_in_float32, slopes=slopes))
    return _each_block(attend, query, key, value, *of_row, *mask)


def sink_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    implementation: str = "auto",
    deterministic: bool = False,
    starts: Sequence[int] = (),
    ring: Ring | None = None,
    document_starts: Sequence[int] = (),
) -> torch.Tensor:
    """`attention` with a sink for each head, as GPT-OSS has it (arXiv:2508.10925, section 2.3).

    `sinks`, [heads], are scores of one more key that every query sees, whose value is 0. No fused kernel here knows
    them, so blocks of queries are taken, whatever the implementation.
    """
    attend = partial(_blockwise_attention, attend=partial(_attend_in_float32, sinks=sinks))
    return _each_block(attend, query, key, value, starts, ring, document_starts, scale, window, softcap, dropout)


def _is_for_flash_attn(implementation: str, query: torch.Tensor) -> bool:
    """Whether 'auto' takes flash-attn for what none of PyTorch's fused kernels knows."""
    return implementation == "auto" and flash_attn_func is not None and query.is_cuda and query.dtype in HALF


def _starts_of(query: torch.Tensor, key: torch.Tensor, starts: Sequence[int]) -> Sequence[int]:
    """Where in the row each block of queries begins. Where nothing is said, they are the last ones of the row."""
    return starts or [key.shape[2] - query.shape[2]]


def _each_block(
    attend: Callable[..., torch.Tensor], query, key, value, starts, ring, document_starts, scale, window, *mask
) -> torch.Tensor:
    """Attention of each block of queries by `attend`, against the keys that are not after the block; [b, q, heads, e].

    A block is cut where documents begin, if these are told. So the last query that `attend` is given and the last key
    are of one token.
    """
    if ring is None:
        starts = _starts_of(query, key, starts)
        return attend_in_parts(
            lambda q, k, v: attend(q, k, v, scale, window, *mask), query, key, value, document_starts or (0,), starts
        )
    seen = zip(*(keys_in_reach(x, ring, window) for x in (key, value)), strict=True)
    n = query.shape[2] // len(ring.starts[ring.rank])
    blocks = [
        attend(rows, *keys_values, scale, window, *mask)
        for rows, keys_values in zip(query.split(n, 2), seen, strict=True)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _by_flash_attn(query, key, value, starts, ring, document_starts, slopes, deterministic, *mask) -> torch.Tensor:
    """FlashAttention-2 by the package flash-attn; it adds -slope * |i - j| to the scores, if there are slopes."""
    more = {"slopes": slopes, "deterministic": deterministic}
    if not document_starts:
        return _each_block(partial(_flash_attn, **more), query, key, value, starts, ring, (), *mask)
    attend = partial(_flash_attn_packed, mask=mask, **more)
    return attend_packed(attend, query, key, value, document_starts, _starts_of(query, key, starts))


def _flash_attn(query, key, value, scale, window, softcap, dropout, slopes, deterministic) -> torch.Tensor:
    """It takes the last query and the last key to be of one token."""
    options = _flash_attn_options((scale, window, softcap, dropout), slopes, deterministic)
    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), **options)


def _flash_attn_packed(query, key, value, block: Packed, mask, slopes, deterministic) -> torch.Tensor:
    """It takes the last query and the last key of each part to be of one token."""
    lengths = block.of_queries, block.of_keys, block.most_queries, block.most_keys
    return flash_attn_varlen_func(query, key, value, *lengths, **_flash_attn_options(mask, slopes, deterministic))


def _flash_attn_options(mask, slopes, deterministic) -> dict[str, Any]:
    scale, window, softcap, dropout = mask
    return {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "causal": True,
        "window_size": (window - 1, 0) if window else (-1, -1),
        "softcap": softcap,
        "alibi_slopes": slopes,
        "deterministic": deterministic,
    }


def _blockwise_attention(query, key, value, scale, window, softcap, dropout, attend) -> torch.Tensor:
    """Attention for one block of queries after another, over the keys that the block sees, by `attend`.

    The last query and the last key are of one token. The scores are recomputed in the backward. At any time,
    QUERY_BLOCK x (QUERY_BLOCK + window) scores of each head are held, or QUERY_BLOCK x l without a window.
    """
    before = key.shape[2] - query.shape[2]  # keys before the first query's
    window = window if window < key.shape[2] else 0  # a window over all keys is no window
    blocks = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, query.shape[2])
        first = max(0, before + start - window + 1) if window else 0
        k, v = key[:, :, first : before + stop], value[:, :, first : before + stop]
        block = (query[:, :, start:stop], k, v, scale, window, softcap, dropout)
        blocks.append(checkpoint(attend, *block, use_reentrant=False))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _distance(rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """How far each query is behind each key, [rows, keys]. The last query and the last key are at one position."""
    return torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)


def _visible(distance: torch.Tensor, window: int) -> torch.Tensor:
    """Which keys each query sees, bool [rows, keys]."""
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _attend_masked(query, key, value, scale, window, softcap, dropout) -> torch.Tensor:
    """Attention of a block of queries by PyTorch's own kernel with a mask; [b, heads, rows, e]."""
    mask = _visible(_distance(query.shape[2], key.shape[2], query.device), window)
    return sdpa(query, key, value, scale, dropout, attn_mask=mask)


def _attend_in_float32(query, key, value, scale, window, softcap, dropout, slopes=None, sinks=None) -> torch.Tensor:
    """Attention of a block of queries by its formula, with scores and weights in float32; [b, heads, rows, e]."""
    b, heads, rows, d = query.shape
    distance = _distance(rows, key.shape[2], query.device)
    query = query.view(b, key.shape[1], -1, rows, d)  # a group of heads shares its keys without a copy of them
    scores = (query.float() @ key.float().transpose(-1, -2).unsqueeze(2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.float().view(key.shape[1], -1, 1, 1) * distance
    scores = scores.masked_fill(~_visible(distance, window), float("-inf"))
    if sinks is not None:
        column = sinks.float().view(key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights, dropout)
    return (weights @ value.float().unsqueeze(2)).to(value.dtype).flatten(1, 2)


# --- what the compiler knows of attention ----------------------------------------------------------------------------


def takes_blocks(op: Op) -> bool:
    """Whether attention is predicted to run in blocks of queries: whether PyTorch has no fused kernel for it.

    flash-attn has one. Where 'auto' finds it installed, attention needs less memory than is predicted.
    """
    n_queries, n_keys = op.inputs[0].shape[2], op.inputs[1].shape[2]
    return _masks_more(op) or (n_queries != n_keys and _falls_back(op))


def _masks_more(op: Op) -> bool:
    """Whether attention of all queries runs in blocks of them."""
    return arguments_of(op)["implementation"] != "flash_attention_2" and (
        _holds_scores(op) or (_windowed(op) and not _is_packed(op))
    )


def _falls_back(op: Op) -> bool:
    """Whether attention of some of the queries runs in blocks of them: whether no kernel of a GPU takes its pieces."""
    query, _, value = op.inputs[:3]
    has_kernel = not arguments_of(op)["dropout"] and heads_fit_gpu_kernels(query.shape, value.shape)
    return arguments_of(op)["implementation"] != "flash_attention_2" and not has_kernel


def _holds_scores(op: Op) -> bool:
    """Whether blocks of scores are computed in float32: for a soft-cap, biases or sinks, or for 'eager'."""
    arguments = arguments_of(op)
    more = bool(arguments["softcap"]) or "slopes" in arguments or "sinks" in arguments
    return more or arguments["implementation"] == "eager"


def _windowed(op: Op) -> bool:
    """Whether there is a window that does not span all keys."""
    return 0 < arguments_of(op)["window"] < _row_length(op)


def _row_length(op: Op) -> int:
    """The number of a row's keys, of which a rank has a part where there is a ring."""
    ring = _ring(op)
    return ring.length if ring else op.inputs[1].shape[2]


def _ring(op: Op) -> OwnRing | None:
    """The ring that an op of one rank's graph is told of."""
    return arguments_of(op)["ring"]


def fits_ring(op: Op) -> bool:
    """Whether it is of use that keys and values stay with their tokens: with a window, of which few are sent, and where
    a fused kernel takes pieces of them; not where documents do not see each other, as a ring does not know them."""
    if arguments_of(op)["document_starts"]:
        return False
    if _windowed(op):
        return True
    is_fused = not takes_blocks(op) and arguments_of(op)["implementation"] not in BY_BLOCKS
    return is_fused and not _falls_back(op)


def keys_before(op: Op) -> int | None:
    """The keys before its own that a block of queries sees; None if it is all of them."""
    return arguments_of(op)["window"] - 1 if _windowed(op) else None


def merges(op: Op, phase: str) -> Shares:
    """The small kernels for each part that goes round. In the forward its output is cast to float32, and this and what
    is merged so far are read and the latter is written; in the backward likewise the gradient of the queries, and the
    gradients of keys and values are added to those that arrive."""
    query, key, value = op.inputs[:3]
    float32 = FLOAT32_BYTES / query.dtype.itemsize
    if phase == "forward":
        return {op.outputs[0]: 1 + 4 * float32}
    return _shares((query, 1 + 4 * float32), (key, 7.0), (value, 7.0))


def _is_packed(op: Op) -> bool:
    """Whether documents that do not see each other are one call of FlashAttention on a GPU, which knows windows too."""
    query, _, value = op.inputs[:3]
    return bool(arguments_of(op)["document_starts"]) and fits_gpu_kernels(query.shape, value.shape, query.dtype)


def _seen_by_all(op: Op) -> float:
    """How many keys the tokens of a row see together, on average over the rows.

    Documents are taken to be of one length, as many as `document_starts` has: see trace.sample_row.
    """
    window, length = arguments_of(op)["window"], op.inputs[1].shape[2]
    document_starts = arguments_of(op)["document_starts"]
    n_documents = document_starts.shape[0] if document_starts else 1
    return n_documents * _seen_by_first(length / n_documents, window or length)


def _seen_by_first(n: float, window: int) -> float:
    """How many keys the first n queries of a row, or of a document, see together."""
    return n * (n + 1) / 2 - max(0, n - window) * (n - window + 1) / 2


def flops(op: Op) -> Flops:
    """Two products, scores and weighted values, over every pair of a query and a key that the query sees.

    The backward of a fused kernel has four products and computes the scores again: five products, or 2.5 times the
    forward (arXiv:2307.08691, section 3.1.2). Blocks of queries are computed again before it.
    """
    return flops_of_queries(op, (0,), op.inputs[1].shape[2])


def flops_of_queries(op: Op, starts: Sequence[int], n: int) -> Flops:
    """Those of blocks of n queries, which begin at these tokens of a row.

    Where documents begin differs from row to row, so that of these no block has more to compute than another.
    """
    if arguments_of(op)["document_starts"]:
        seen = _seen_by_all(op) * len(starts) * n / _row_length(op)
    else:
        window = arguments_of(op)["window"] or _row_length(op)
        seen = sum(_seen_by_first(start + n, window) - _seen_by_first(start, window) for start in starts)
    forward = _forward_flops(op, seen)
    in_blocks = _masks_more(op) or (len(starts) * n < op.inputs[1].shape[2] and _falls_back(op))
    return Flops(forward, (3.5 if in_blocks else 2.5) * forward)


def unmasked_flops(op: Op) -> float:
    """The FLOPs of the forward if every query saw as many keys as the last one does, or as its window spans."""
    length, document_starts = op.inputs[0].shape[2], arguments_of(op)["document_starts"]
    document = length / document_starts.shape[0] if document_starts else length
    return _forward_flops(op, length * min(arguments_of(op)["window"] or document, document))


def _forward_flops(op: Op, pairs: float) -> float:
    """Two products over so many pairs of a query and a key in each head."""
    query, _, value = op.inputs[:3]
    return 2.0 * query.shape[0] * query.shape[1] * pairs * (query.shape[-1] + value.shape[-1])


def passes(op: Op, phase: str) -> Shares:
    """The small kernels around a fused backward.

    One reads the output and its gradient, for their product in each row. The query's gradient is summed up in float32,
    which is filled with zeros before and read and cast after. Where query heads share keys, each head's gradients of
    key and value are read, to be added up.
    """
    if phase == "forward" or takes_blocks(op):
        return {}
    query, key = op.inputs[:2]
    float32 = FLOAT32_BYTES / query.dtype.itemsize
    return {op.outputs[0]: 2.0, query: 2 * float32 + 1 + (2.0 if key.shape[1] != query.shape[1] else 0.0)}


def saves(op: Op) -> list[Tensor]:
    """The inputs, from which blocks are recomputed. The backward of a fused kernel needs its output too.

    With a window and a ring copies of the keys and values that blocks see take their place.
    """
    if not takes_blocks(op):
        return [*op.inputs, *op.outputs]
    return [t for t in op.inputs if t not in op.inputs[1:3]] if _ring(op) else op.inputs


def saves_besides(op: Op) -> Shares:
    """A fused kernel also saves the logarithm of the sum of exponentials of each query's scores, in float32."""
    query, key, value = op.inputs[:3]
    if takes_blocks(op):
        return _shares((key, 1 + _reach(op)), (value, 1 + _reach(op))) if _ring(op) else {}
    return {query: FLOAT32_BYTES / (query.dtype.itemsize * query.shape[-1])}


def _reach(op: Op) -> float:
    """What is sent to a rank with a window, as a share of its own keys."""
    ring = _ring(op)
    assert ring is not None and _windowed(op)
    own = op.inputs[1].shape[2]
    return min((1 + ring.balanced) * (arguments_of(op)["window"] - 1), ring.length - own) / own


def workspace(op: Op, phase: str) -> Shares:
    """What attention holds while it runs, besides its inputs, its output and their gradients."""
    if takes_blocks(op):
        return _blocks_workspace(op, phase)
    if _ring(op):
        return _ring_workspace(op, phase)
    is_whole = op.inputs[0].shape[2] == op.inputs[1].shape[2]
    return _fused_workspace(op, phase) if is_whole else _pieces_workspace(op, phase)


def _fused_workspace(op: Op, phase: str) -> Shares:
    """The workspace of a fused kernel: nothing in the forward.

    The backward (arXiv:2307.08691, algorithm 2) holds the gradient of the query in float32, the sum of output *
    gradient for each query and head, and, if several query heads share a key, the gradients of key and value for each
    query head. At [1, 4, 131072, 128] with one key-value head that is, with the gradients of the inputs, the 0.740 GB
    which cuDNN was measured to take on an H200. PyTorch's flash backend took 1.009 GB there: it copies the output and
    its gradient if they lie in memory as [b, heads, l, d]. Behind an all-to-all the output does; the gradient does not.
    """
    query, key = op.inputs[:2]
    if phase == "forward":
        return {}
    float32 = FLOAT32_BYTES / query.dtype.itemsize
    grouped = 2.0 if key.shape[1] != query.shape[1] else 0.0
    copied_output = 1.0 if _is_flash(op) else 0.0
    return {query: float32 * _query_gradients(op) + float32 / query.shape[-1] + grouped + copied_output}


def _pieces_workspace(op: Op, phase: str) -> Shares:
    """The workspace of attention in pieces: in the forward, a block's output in float32, and that of a piece, as it
    comes and in float32.

    The backward holds the gradient of a block's queries in float32, as a sum and as a kernel makes it, and a piece's;
    the gradients of a piece's keys and values; and these for each query head, if several share them. The package
    flash-attn is given all keys at once, and so is whatever takes a block's documents in one call.
    """
    query, key, value = op.inputs[:3]
    float32 = FLOAT32_BYTES / query.dtype.itemsize
    if phase == "forward":
        return {query: (1.0 if _is_packed(op) else 2 * float32 + 1.0) / _blocks_of_queries(op)}
    at_once = _is_packed(op) or arguments_of(op)["implementation"] == "flash_attention_2"
    of_keys = _gradients_of_keys(op, 1.0 if at_once else min(1.0, KEYS / key.shape[2]))
    return _shares((query, _gradients_of_queries(op) / _blocks_of_queries(op)), (key, of_keys), (value, of_keys))


def _ring_workspace(op: Op, phase: str) -> Shares:
    """The workspace of attention whose keys and values go round: in the forward, two parts of these, the output in
    float32, and that of a piece as `_pieces_workspace` has it.

    In the backward, besides these two parts, the gradients of the one that is here: this rank's terms, and what leaves
    and what comes, of which one part is the gradient that is counted with the inputs'. Then the gradient of the queries
    in float32; of a block of these, it as a kernel makes it, and cast; and the gradients of a piece's keys and values.
    """
    query, key, value = op.inputs[:3]
    float32, blocks = FLOAT32_BYTES / query.dtype.itemsize, _blocks_of_queries(op)
    if phase == "forward":
        return _shares((query, float32 + (float32 + 1.0) / blocks), (key, 2.0), (value, 2.0))
    of_keys = 4.0 + _gradients_of_keys(op, min(1.0, KEYS / key.shape[2]))
    return _shares((query, float32 + _gradients_of_queries(op) / blocks), (key, of_keys), (value, of_keys))


def _gradients_of_queries(op: Op) -> float:
    """What the backward of a piece makes for its queries, as a share of these: their gradient in float32, as a sum and
    as a kernel makes it, and in their own dtype; the logarithms; and a copy of the output, if the kernel wants one."""
    query = op.inputs[0]
    float32 = FLOAT32_BYTES / query.dtype.itemsize
    copied_output = 1.0 if _is_flash(op) else 0.0
    return (1 + _query_gradients(op)) * float32 + float32 / query.shape[-1] + 1.0 + copied_output


def _gradients_of_keys(op: Op, piece: float) -> float:
    """The gradients of a piece's keys, as a share of all: also for each query head, if several share them."""
    groups = op.inputs[0].shape[1] / op.inputs[1].shape[1]
    return piece * (1.0 + (groups if groups > 1 else 0.0))


def _shares(*shares: tuple[Tensor, float]) -> Shares:
    """Shares of tensors, some of which may be the same one: of that their sum."""
    total: Shares = {}
    for tensor, share in shares:
        total[tensor] = total.get(tensor, 0.0) + share
    return total


def _blocks_of_queries(op: Op) -> int:
    """How many blocks the queries of a rank are, which are computed one after the other: two in balanced order."""
    starts = arguments_of(op)["ring"] or arguments_of(op)["starts"]
    return 1 if isinstance(starts, OwnStarts) and not starts.balanced else 2


def _is_flash(op: Op) -> bool:
    """Whether this is PyTorch's flash backend for certain: asked for, or the only one of PyTorch's that will do."""
    arguments = arguments_of(op)
    return arguments["implementation"] in (("flash", "auto", "sdpa") if arguments["deterministic"] else ("flash",))


def _query_gradients(op: Op) -> int:
    """How many float32 gradients of the query a fused backward holds: one, unless FlashAttention-2 is deterministic.

    Its thread blocks add theirs to one tensor, in whatever order. So that the order is fixed, it has a tensor for each
    block that works on the same batch and head, of which there are as many as keep the device's multiprocessors busy
    (nsplits in mha_bwd of flash_api.cpp, PyTorch's and the package's). FlashAttention-3 and 4 wait for each other's
    turn instead.
    """
    arguments, (b, heads) = arguments_of(op), op.inputs[0].shape[:2]
    if not arguments["deterministic"] or arguments["implementation"] in ("fa3", "fa4"):
        return 1
    return ceil(MULTIPROCESSORS / (b * heads))


def _blocks_workspace(op: Op, phase: str) -> Shares:
    """The workspace of _blockwise_attention.

    It holds the blocks of the output before they are joined, and in the backward the gradients of key and value from
    one block, padded with zeros. To these comes what a single block needs. Where scores are computed in float32, that
    is three tensors of their size in the forward, and in the backward the weights, the tanh and two gradients.
    Elsewhere it is the mask while it is made (int64 distances and three bytes for each pair of a query and a key), or
    the keys and values for all heads with their gradients, whichever is larger. With a ring, what is sent and what
    arrives of keys and values is there too.
    """
    query, key, value = op.inputs[:3]
    n_queries, length, window = query.shape[2], key.shape[2], arguments_of(op)["window"]
    rows = min(QUERY_BLOCK, n_queries)
    keys = min(length, window + rows) if window else length
    if _holds_scores(op):
        scores = rows * keys * FLOAT32_BYTES / (n_queries * query.shape[-1] * query.dtype.itemsize)
        block = (3 if phase == "forward" else 4) * scores
    else:
        mask = rows * keys * (8 + 3) / nbytes(query)
        block = max(mask, (2 if phase == "forward" else 4) * keys / n_queries)
    sent = 2 * _reach(op) if _ring(op) and _windowed(op) else 0.0
    of_keys = sent + (1.0 if phase == "backward" else 0.0)
    return _shares((query, 1 + block), (key, of_keys), (value, of_keys))


def strides(op: Op, strided: bool) -> bool:
    """The output lies in memory as the query does, [b, heads, l, d], and is returned as [b, l, heads, d]."""
    return not strided or takes_blocks(op)


def draws_random(op: Op) -> bool:
    """Only dropout draws random numbers."""
    return bool(arguments_of(op)["dropout"])


def is_one_kernel(op: Op) -> bool:
    """Whether attention of all queries is one fused kernel for certain, whose output a recomputation can use.

    Of some queries the kernel is called for each block of them, and its outputs are kept all the same.
    """
    return not _masks_more(op) and not arguments_of(op)["dropout"]


def fused_shapes(op: Op) -> tuple[tuple[int, ...], ...]:
    """The shapes of query, key and value, if a fused kernel computes them; () if not."""
    return () if takes_blocks(op) else tuple(tensor.shape for tensor in op.inputs[:3])


def heads_and_queries(op: Op) -> str:
    """What the ranks of a plan share out, besides rows."""
    heads, length = op.inputs[0].shape[1:3]
    return f"its {heads} heads and {length:,} queries"


RULES = {
    "flops": flops,
    "unmasked_flops": unmasked_flops,
    "rates": (Work.ATTENTION_FORWARD, Work.ATTENTION_BACKWARD),
    "passes": passes,
    "saves": saves,
    "saves_besides": saves_besides,
    "workspace": workspace,
    "strides": strides,
    "draws_random": draws_random,
    "can_be_kept": is_one_kernel,
    "shared_out": heads_and_queries,
    "told": Told("q", "starts", flops_of_queries, ring=RingSpec("l", "ring", fits_ring, keys_before, merges)),
}
register_op("b (k g) q d^, b k l^ d^, b k l^ e^ -> b q (k g) e^", **RULES)(attention)
register_op("b (k g) q d^, b k l^ d^, b k l^ e^, (k g) -> b q (k g) e^", **RULES)(alibi_attention)
register_op("b (k g) q d^, b k l^ d^, b k l^ e^, (k g) -> b q (k g) e^", **RULES)(sink_attention)
