"""Attention of one rank, by every kernel that is here: forward, backward, memory, and whether it repeats its bits."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_parts.measuring import (
    DEVICE,
    ON_GPU,
    Sizes,
    gradient_call,
    kernel_table,
    normal,
    peak_gb,
    timed_row,
)
from benchmarks.gpu_parts.results import LeftOut, Measurement, Row
from longctx.kernels.attention import attention
from longctx.kernels.fused import KERNELS, why_not

RANKS, GROUP = 8, 4  # ranks that share the query heads; query heads that share a key
OTHERS = ("sdpa",) if ON_GPU else ("sdpa", "eager")  # at a GPU's sizes the plain formula would take minutes
SAME_BITS = "the same bits twice"


def attention_measurements(size: Sizes) -> Iterator[Measurement]:
    """[1, heads/RANKS, l, d] with one key-value head for each GROUP query heads, at every length."""
    heads = max(GROUP, size.heads // RANKS)
    deterministic = [name for name, kernel in KERNELS.items() if kernel.deterministic]
    for length in size.attention_lengths:
        shape = (heads, length, size.head_dim)
        for kernel in (*KERNELS, *OTHERS):
            name = f"attention at {length:,}, {kernel}"
            yield Measurement(name, partial(attention_rows, name, kernel, *shape))
        for kernel in deterministic:
            name = f"attention at {length:,}, {kernel}, deterministic"
            yield Measurement(name, partial(deterministic_rows, name, kernel, *shape))


def attention_rows(
    name: str, kernel: str, heads: int, length: int, head_dim: int, deterministic: bool = False
) -> list[Row]:
    """Two products over half of all pairs in the forward, five in the backward (arXiv:2307.08691, section 3.1.2)."""
    if reason := why_not(kernel, torch.bfloat16, DEVICE.type):
        raise LeftOut(reason)
    query = normal(1, heads, length, head_dim).requires_grad_()
    key, value = (normal(1, heads // GROUP, length, head_dim).requires_grad_() for _ in range(2))
    options = {"implementation": kernel, "deterministic": deterministic}
    forward = partial(attention, query, key, value, head_dim**-0.5, **options)
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


def deterministic_rows(name: str, kernel: str, heads: int, length: int, head_dim: int) -> list[Row]:
    """What --deterministic costs: the kernel is told to add in a fixed order, for which it may need more memory.

    Raises:
        RuntimeError: it gave other bits the second time.
    """
    torch.use_deterministic_algorithms(True)
    # As runs with --deterministic have it: by default PyTorch then fills all memory that it allocates.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        rows = attention_rows(name, kernel, heads, length, head_dim, deterministic=True)
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
