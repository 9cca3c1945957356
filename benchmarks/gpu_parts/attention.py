"""Attention of one rank, by every kernel that is here: forward, backward, memory, and whether it repeats its bits."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_parts.measuring import (
    DEVICE,
    ON_GPU,
    Attention,
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

OTHERS = ("sdpa",) if ON_GPU else ("sdpa", "eager")  # at a GPU's sizes the plain formula would take minutes
MEMORY_EFFICIENT = "memory-efficient"  # PyTorch's, which sdpa takes where no other does, as for float32
SAME_BITS = "the same bits twice"


def attention_measurements(size: Sizes) -> Iterator[Measurement]:
    """Every kernel at each of the sizes' shapes."""
    deterministic = [name for name, kernel in KERNELS.items() if kernel.deterministic]
    for shape in size.attention:
        for kernel in (*KERNELS, *OTHERS, MEMORY_EFFICIENT):
            name = f"attention {shape}, {kernel}"
            yield Measurement(name, partial(attention_rows, name, kernel, shape))
        for kernel in deterministic:
            name = f"attention {shape}, {kernel}, deterministic"
            yield Measurement(name, partial(deterministic_rows, name, kernel, shape))


def attention_rows(name: str, kernel: str, shape: Attention, deterministic: bool = False) -> list[Row]:
    """Two products over half of all pairs in the forward, five in the backward (arXiv:2307.08691, section 3.1.2)."""
    if reason := why_not(kernel, torch.bfloat16, DEVICE.type):
        raise LeftOut(reason)
    query = normal(1, shape.heads, shape.length, shape.head_dim).requires_grad_()
    key, value = (normal(1, shape.kv_heads, shape.length, shape.head_dim).requires_grad_() for _ in range(2))
    if kernel == MEMORY_EFFICIENT:
        forward = partial(memory_efficient, query, key, value)
    else:
        options = {"implementation": kernel, "deterministic": deterministic}
        forward = partial(attention, query, key, value, shape.head_dim**-0.5, **options)
    flops = 2 * 2 * shape.heads * shape.head_dim * shape.length**2 / 2
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


def memory_efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, [1, heads, l, d] -> the same; the kernel wants a key and a value for every query head.

    Raises:
        LeftOut: there is no GPU.
    """
    if not ON_GPU:
        raise LeftOut("it runs on a GPU")
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def deterministic_rows(name: str, kernel: str, shape: Attention) -> list[Row]:
    """What --deterministic costs: the kernel is told to add in a fixed order, for which it may need more memory.

    Raises:
        RuntimeError: it gave other bits the second time.
    """
    torch.use_deterministic_algorithms(True)
    # As runs with --deterministic have it: by default PyTorch then fills all memory that it allocates.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        rows = attention_rows(name, kernel, shape, deterministic=True)
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
