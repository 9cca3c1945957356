"""Attention of one rank, by every kernel that is here: forward, backward, memory, and whether it repeats its bits."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_parts.measuring import (
    ON_GPU,
    Measurement,
    Row,
    Sizes,
    gradient_call,
    kernel_table,
    normal,
    peak_gb,
    timed_row,
)
from longctx.kernels.attention import attention

RANKS, GROUP = 8, 4  # ranks that share the query heads; query heads that share a key
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DETERMINISTIC = "flash" if ON_GPU else "auto"
SAME_BITS = "the same bits twice"


def attention_measurements(size: Sizes) -> Iterator[Measurement]:
    """[1, heads/RANKS, l, d] with one key-value head for each GROUP query heads, at every length."""
    heads = max(GROUP, size.heads // RANKS)
    for length in size.attention_lengths:
        for kernel in ("auto", *BACKENDS) if ON_GPU else ("auto", "eager"):
            name = f"attention at {length:,}, {kernel}"
            yield Measurement(name, partial(attention_rows, name, kernel, heads, length, size.head_dim))
        name = f"attention at {length:,}, {DETERMINISTIC}, deterministic"
        yield Measurement(name, partial(deterministic_rows, name, heads, length, size.head_dim))


def attend(kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention by one kernel: [1, heads, l, d], [1, kv_heads, l, d] twice -> [1, l, heads, d]."""
    if kernel not in BACKENDS:
        return attention(query, key, value, query.shape[-1] ** -0.5, implementation=kernel)
    if kernel == "efficient":  # it knows no grouped queries
        key, value = (x.repeat_interleave(GROUP, 1) for x in (key, value))
    with sdpa_kernel(BACKENDS[kernel]):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=kernel != "efficient")
    return output.transpose(1, 2)


def attention_rows(name: str, kernel: str, heads: int, length: int, head_dim: int) -> list[Row]:
    """Two products over half of all pairs in the forward, five in the backward (arXiv:2307.08691, section 3.1.2)."""
    query = normal(1, heads, length, head_dim).requires_grad_()
    key, value = (normal(1, heads // GROUP, length, head_dim).requires_grad_() for _ in range(2))
    forward = partial(attend, kernel, query, key, value)
    flops = 2 * 2 * heads * head_dim * length**2 / 2
    with torch.no_grad():
        ahead = timed_row(f"{name}, forward", forward, flops, peak_gb=peak_gb(forward), detail=kernel_table(forward, 3))
    backward = gradient_call(forward(), [query, key, value])
    back = timed_row(
        f"{name}, backward",
        backward,
        2.5 * flops,
        peak_gb=peak_gb(backward),
        note=same_bits(backward, ("dq", "dk", "dv")),
        detail=kernel_table(backward, 5),
    )
    return [ahead, back]


def deterministic_rows(name: str, heads: int, length: int, head_dim: int) -> list[Row]:
    """What --deterministic costs: the kernel that it takes, told to add in a fixed order, which needs more memory.

    Raises:
        RuntimeError: it gave other bits the second time.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        rows = attention_rows(name, DETERMINISTIC, heads, length, head_dim)
    finally:
        torch.use_deterministic_algorithms(False)
    if SAME_BITS not in rows[1].note:
        raise RuntimeError(rows[1].note)
    return rows


def same_bits(call: Callable[[], tuple[torch.Tensor, ...]], names: tuple[str, ...]) -> str:
    """Which of a call's results had other bits when it was called again."""
    pairs = zip(names, call(), call(), strict=True)
    differ = [name for name, first, second in pairs if not torch.equal(first, second)]
    return f"other bits the second time: {', '.join(differ)}" if differ else SAME_BITS
