"""Linear attention with a decaying state, as generated code calls it: gated delta nets, and the scan of Mamba-2.

Each head carries a state S, a [d, e] matrix, from token to token. It is computed in chunks: within a chunk as products
of small matrices, from chunk to chunk as a recurrence (arXiv:2405.21060, section 6; arXiv:2412.06464, section 3.3).
Everything is computed in float32, whatever the dtype of the inputs. Where the package flash-linear-attention is
installed, its kernel takes over the gated delta rule in 16 bits on a GPU; the tests have not run that.
"""

from functools import partial
from math import ceil
from typing import Any

import torch

from longctx.compiler.ir import Op
from longctx.compiler.ops.registered import register_op
from longctx.compiler.ops.spec import FLOAT32_BYTES, Flops, Shares, always, draws_nothing, never_strided, saves_inputs
from longctx.compiler.work import Work
from longctx.kernels.segments import in_segments

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
except ImportError:
    chunk_gated_delta_rule: Any = None

CHUNK = 64  # tokens whose pairs are looked at one by one
SEGMENT = 1024  # tokens of which the intermediate results are held at a time


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    normalized: bool = False,
) -> torch.Tensor:
    """The gated delta rule (arXiv:2412.06464, equation 10), from a state of zeros.

    For each token, S = exp(decay) S, then S += k (beta (v - S^T k))^T, and the output is scale * S^T q.

    Args:
        query: [b, l, key_heads, d], and `key` likewise; consecutive value heads share a key head.
        value: [b, l, value_heads, e], as is the output.
        decay: [b, l, value_heads], at most 0.
        beta: [b, l, value_heads], how much of what the state holds under a key is replaced.
        normalized: whether queries and keys are divided by their lengths first.
    """
    if chunk_gated_delta_rule is not None and query.is_cuda and query.dtype != torch.float32:
        return chunk_gated_delta_rule(query, key, value, decay, beta, scale=scale, use_qk_l2norm_in_kernel=normalized)[
            0
        ]
    step = partial(_segment, scale=scale, normalized=normalized)
    return in_segments(step, SEGMENT, _zero_state(key, value), (value, query, key, decay, beta))


def decaying_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """Linear attention whose state decays, from a state of zeros (arXiv:2405.21060, section 3).

    For each token, S = exp(decay) S + k v^T, and the output is S^T q.

    Args:
        query: [b, l, key_heads, d], and `key` likewise; consecutive value heads share a key head.
        value: [b, l, value_heads, e], as is the output.
        decay: [b, l, value_heads], at most 0.
    """
    return in_segments(_segment, SEGMENT, _zero_state(key, value), (value, query, key, decay))


def _zero_state(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[b, key_heads, value heads of each, d, e] in float32, or in float64 if the inputs are."""
    b, _, key_heads, d = key.shape
    value_heads, e = value.shape[2:]
    dtype = torch.promote_types(value.dtype, torch.float32)
    return value.new_zeros(b, key_heads, value_heads // key_heads, d, e, dtype=dtype)


def _segment(
    state: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float = 1.0,
    normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a segment, and the state behind it; with `beta` by the delta rule.

    What is computed for all chunks at once is [b, key_heads, value heads of each, chunks, ...]. Within a chunk,
    `between[i, j]` is how far what token j wrote has decayed when token i reads it, and `since_start` and `until_end`
    are how far a state decays from the chunk's start to a token, and from a token to the chunk's end.
    """
    heads, dtype, length = (state.shape[1], state.shape[2]), state.dtype, value.shape[1]
    q, k = (_in_chunks(x, (heads[0], 1), dtype) for x in (query, key))
    v = _in_chunks(value, heads, dtype)
    summed = _in_chunks(decay.unsqueeze(-1), heads, dtype).squeeze(-1).cumsum(-1)
    if normalized:
        q, k = _normalize(q), _normalize(k)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).tril()
    between = (summed.unsqueeze(-1) - summed.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    since_start, until_end = summed.exp().unsqueeze(-1), (summed[..., -1:] - summed).exp().unsqueeze(-1)

    read = None
    if beta is not None:
        v, read = _by_delta(k, v, _in_chunks(beta.unsqueeze(-1), heads, dtype), between, since_start)
    weights = scale * (q @ k.mT) * between
    q, k, whole_chunk = scale * q * since_start, k * until_end, since_start[..., -1:, :]
    outputs = []
    for chunk in range(summed.shape[3]):
        written = v[..., chunk, :, :]
        if read is not None:
            written = written - read[..., chunk, :, :] @ state
        outputs.append(q[..., chunk, :, :] @ state + weights[..., chunk, :, :] @ written)
        state = whole_chunk[..., chunk, :, :] * state + k[..., chunk, :, :].mT @ written
    output = torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)[:, :length]
    return output.to(value.dtype), state


def _by_delta(
    k: torch.Tensor, v: torch.Tensor, rate: torch.Tensor, between: torch.Tensor, since_start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token of a chunk writes after a state of zeros, [.., e], and by what it reads the state found, [.., d].

    What it reads there is taken back from what it writes. Each token's write depends on those of the tokens before it,
    which makes a triangular system (arXiv:2406.06484, section 3.2).
    """
    system = rate * (k @ k.mT) * between
    right = rate * torch.cat((v, (k * since_start).expand(*v.shape[:-1], -1)), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    return written, read


def _in_chunks(x: torch.Tensor, heads: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """[b, n, heads, width] -> [b, *heads, chunks, CHUNK, width], with zeros behind the last token."""
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).unflatten(3, heads).permute(0, 3, 4, 1, 2, 5)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    """Divided by its length, as flash-linear-attention does; [*, d]."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


# --- what the compiler knows of linear attention ---------------------------------------------------------------------


def annotation_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *per_head, **options) -> str:
    """Rows and heads may be split, with the key heads that several value heads share; one that all share is whole."""
    key_heads, value_heads = ("1", "h") if key.shape[2] == 1 else ("k", "(k g)")
    of_tokens = ", ".join(f"b l^ {value_heads}" for x in per_head if hasattr(x, "shape"))
    of_keys = f"b l^ {key_heads} d^"
    return f"{of_keys}, {of_keys}, b l^ {value_heads} e^, {of_tokens} -> b l^ {value_heads} e^"


def flops(op: Op) -> Flops:
    """Products of chunks with themselves and with the state; the backward computes all again, and two for each."""
    query, value = op.inputs[0], op.inputs[2]
    b, length, key_heads, d = query.shape
    value_heads, e = value.shape[2:]
    of_key_head = 2 * CHUNK * d
    of_value_head = 2 * CHUNK * e + 4 * d * e
    if _by_delta_rule(op):
        of_key_head += 2 * CHUNK * d
        of_value_head += CHUNK * (d + e) + 2 * d * e
    forward = float(b * length * (key_heads * of_key_head + value_heads * of_value_head))
    return Flops(forward, 3 * forward)


def _by_delta_rule(op: Op) -> bool:
    return len(op.inputs) == 5


def saves_besides(op: Op) -> Shares:
    """The state before each segment, in float32."""
    d, length = op.inputs[0].shape[3], op.inputs[2].shape[1]
    return _float32_rows(op, ceil(length / SEGMENT) * d)


def workspace(op: Op, phase: str) -> Shares:
    """The intermediate results of one segment."""
    return _float32_rows(op, min(op.inputs[2].shape[1], SEGMENT) * _width_of_intermediates(op, phase))


def passes(op: Op, phase: str) -> Shares:
    """Each intermediate result is written once and read once."""
    return _float32_rows(op, 2 * op.inputs[2].shape[1] * _width_of_intermediates(op, phase))


def _width_of_intermediates(op: Op, phase: str) -> float:
    """How many float32 numbers are held for a token and a value head, as counted by MemTracker on a CPU.

    Most are rows of keys (d), of values (e) and of pairs of tokens (CHUNK); some are shared by the value heads of a
    key head.
    """
    query, value = op.inputs[0], op.inputs[2]
    (key_heads, d), (value_heads, e) = query.shape[2:], value.shape[2:]
    shared, delta = key_heads / value_heads, _by_delta_rule(op)
    if phase == "forward":
        return 3 * CHUNK + 4 * d + 5 * e if delta else 2 * CHUNK + 2 * d + 4 * e
    if delta:
        return 2 * CHUNK + 11 * d + 9 * e + shared * (3 * CHUNK + 8 * d)
    return 7 * d + 7 * e + shared * (CHUNK + 5 * d)


def _float32_rows(op: Op, numbers: float) -> Shares:
    """So many float32 numbers for each row and value head, as a share of the values, [b, l, value_heads, e]."""
    value = op.inputs[2]
    return {value: numbers * FLOAT32_BYTES / (value.shape[1] * value.shape[3] * value.dtype.itemsize)}


_RULES = {
    "flops": flops,
    "rates": (Work.FLOAT32_PRODUCTS, Work.FLOAT32_PRODUCTS),
    "passes": passes,
    "saves": saves_inputs,
    "saves_besides": saves_besides,
    "workspace": workspace,
    "strides": never_strided,
    "draws_random": draws_nothing,
    "can_be_kept": always,
    "crosses_documents": True,
}
register_op(annotation_of, **_RULES, not_kept_by="flash-linear-attention")(gated_delta_rule)
register_op(annotation_of, **_RULES)(decaying_linear_attention)
