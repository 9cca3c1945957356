"""Causal attention, as generated code calls it: fused kernels where there are some, blocks of queries elsewhere."""

from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longctx.compiler.annotation import register_op

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

QUERY_BLOCK = 1024  # rows of scores held at a time where no fused kernel does the job


@register_op("b (k g) l^ d^, b k l^ d^, b k l^ e^ -> b l^ (k g) e^")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    implementation: str = "auto",
) -> torch.Tensor:
    """Causal attention: [b, heads, l, d], [b, kv_heads, l, d], [b, kv_heads, l, e] -> [b, l, heads, e].

    Args:
        scale: what the scores are multiplied by, usually d ** -0.5.
        window: each query sees the last `window` keys, itself included; 0 for all.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118, section 2); 0 for none.
        dropout: probability of dropping an attention weight.
        implementation: 'auto' takes flash-attn where it is installed and applies, else PyTorch's fused kernels, and
            blocks of queries where those can't (a soft-cap, a window); the others force one.
    """
    fused = flash_attn_func is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if implementation == "flash_attention_2" or (implementation == "auto" and fused):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        window_size = (window - 1, 0) if window else (-1, -1)
        return flash_attn_func(q, k, v, dropout, scale, causal=True, window_size=window_size, softcap=softcap)
    window = window if window < query.shape[2] else 0  # a window over everything is none
    if implementation == "eager" or softcap or window:
        return _blockwise_attention(query, key, value, scale, window, softcap, dropout, implementation == "eager")
    return _sdpa(query, key, value, scale, dropout, is_causal=True).transpose(1, 2)


def _sdpa(query, key, value, scale, dropout, **mask) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, held to its memory-efficient kernels on GPUs."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1], **mask
        )
    half = query.dtype in (torch.float16, torch.bfloat16) and "attn_mask" not in mask
    if not half:  # only the memory-efficient kernel is left, which knows no grouped queries
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, enable_gqa=half, **mask
        )


def _blockwise_attention(query, key, value, scale, window, softcap, dropout, eager) -> torch.Tensor:
    """Attention a block of queries at a time, over the keys in its reach; the scores are recomputed in the backward.

    Holds QUERY_BLOCK x (QUERY_BLOCK + window) scores a head at a time, or QUERY_BLOCK x l without a window.
    """
    attend = _attend_in_float32 if softcap or eager else _attend_masked
    blocks = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, query.shape[2])
        first = max(0, start - window + 1) if window else 0
        k, v = key[:, :, first:stop], value[:, :, first:stop]
        block = (query[:, :, start:stop], k, v, scale, window, softcap, dropout)
        blocks.append(checkpoint(attend, *block, use_reentrant=False))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _visible(rows: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Which keys each row sees, [rows, keys], the last row and the last key being at the same position."""
    distance = torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _attend_masked(query, key, value, scale, window, softcap, dropout) -> torch.Tensor:
    mask = _visible(query.shape[2], key.shape[2], window, query.device)
    return _sdpa(query, key, value, scale, dropout, attn_mask=mask)


def _attend_in_float32(query, key, value, scale, window, softcap, dropout) -> torch.Tensor:
    b, heads, rows, d = query.shape
    query = query.view(b, key.shape[1], -1, rows, d)  # a group of heads shares its keys without a copy of them
    scores = (query.float() @ key.float().transpose(-1, -2).unsqueeze(2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(rows, key.shape[2], window, query.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ value.float().unsqueeze(2)).to(value.dtype).flatten(1, 2)


def keep_attention() -> tuple:
    """What torch.utils.checkpoint's context_fn takes: attention's output is kept, all else computed again.

    It costs most to compute again, and its output is no larger than the layer's input.
    """
    return create_selective_checkpoint_contexts(attention_kernels())


@cache
def attention_kernels() -> list:
    """The operators of the fused attention kernels, PyTorch's and flash-attn's, that there are here."""
    names = [
        f"aten._scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention")
    ]
    names += ["aten._scaled_dot_product_flash_attention_for_cpu", "flash_attn._flash_attn_forward"]
    kernels = []
    for namespace, name in (name.split(".") for name in names):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        kernels += [packet.default] if packet is not None else []
    return kernels
