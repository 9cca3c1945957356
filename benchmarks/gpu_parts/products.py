"""Matrix products of a layer at one rank's sizes: forward and both gradients, in bfloat16 and FP8."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts.measuring import (
    DEVICE,
    ON_GPU,
    LeftOut,
    Measurement,
    Row,
    Sizes,
    normal,
    timed_row,
)


def product_measurements(size: Sizes) -> Iterator[Measurement]:
    """[tokens, k] by [n, k], for every shape of weight in a layer of Llama-3-8B."""
    key_value = size.hidden // 4
    shapes = [(size.hidden, size.intermediate), (size.intermediate, size.hidden)]
    for k, n in (*shapes, (size.hidden, size.hidden), (size.hidden, key_value)):
        name = f"product {size.tokens:,} x {k:,} x {n:,}"
        yield Measurement(name, partial(linear_rows, name, size.tokens, k, n))
        yield Measurement(f"{name}, FP8", partial(fp8_rows, f"{name}, FP8", size.tokens, k, n))


def linear_rows(name: str, m: int, k: int, n: int) -> list[Row]:
    """y = x w^T, dx = dy w, dw = dy^T x in bfloat16, each 2 m k n FLOPs."""
    x, w, dy = normal(m, k), normal(n, k), normal(m, n)
    calls = {"forward": partial(F.linear, x, w), "dx": lambda: dy @ w, "dw": lambda: dy.t() @ x}
    return [timed_row(f"{name}, {which}", call, flops=2 * m * k * n) for which, call in calls.items()]


def fp8_rows(name: str, m: int, k: int, n: int) -> list[Row]:
    """The same three products of operands that are in FP8 already; casting and scaling them is not counted."""
    x, w, dy = normal(m, k), normal(n, k), normal(m, n)
    calls = {"forward": fp8_product(x, w.t()), "dx": fp8_product(dy, w), "dw": fp8_product(dy.t(), x)}
    return [timed_row(f"{name}, {which}", call, flops=2 * m * k * n) for which, call in calls.items()]


def fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that multiplies [m, k] by [k, n] in float8_e4m3, one scale a row of `a` and a column of `b`.

    The tensor cores want the first operand by rows and the second by columns, whichever product it is.
    """
    if not ON_GPU:
        raise LeftOut("FP8 products need a GPU")
    by_rows = a.contiguous().to(torch.float8_e4m3fn)
    by_columns = b.t().contiguous().to(torch.float8_e4m3fn).t()
    scales = torch.ones(len(a), 1, device=DEVICE), torch.ones(1, b.shape[1], device=DEVICE)
    return partial(torch._scaled_mm, by_rows, by_columns, *scales, out_dtype=torch.bfloat16)
