"""Kernels at the shapes of one rank of eight that train Llama-3-8B: what a step is made of, piece by piece."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F

from benchmarks.gpu_parts.attention import attention_measurements
from benchmarks.gpu_parts.measuring import DEVICE, ON_GPU, Sizes, gradient_call, normal, peak_gb, sizes, timed_row
from benchmarks.gpu_parts.products import product_measurements
from benchmarks.gpu_parts.results import Measurement, Row
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.kernels.rms_norm import rms_norm

RANKS = 8  # that attention's all-to-alls are over
BYTES = 2  # of a bfloat16
CHUNKS = (512, 1024, 2048, 4096, 8192)  # of the loss


def measurements(small: bool, folder: Path) -> Iterator[Measurement]:
    size = sizes(small)
    yield from attention_measurements(size)
    yield from product_measurements(size)
    for name, measure in (("RMSNorm", rms_norm_rows), ("RoPE", rope_rows), ("SwiGLU", swiglu_rows)):
        yield Measurement(name, partial(measure, name, size, compiled=False))
        yield Measurement(f"{name} compiled", partial(measure, f"{name} compiled", size, compiled=True))
    yield Measurement("residual addition", partial(addition_rows, size))
    yield Measurement("packing", partial(packing_rows, size))
    yield Measurement("AdamW", partial(optimizer_rows, size.optimized))
    for chunk in CHUNKS:
        name = f"loss, chunks of {chunk:,}"
        yield Measurement(name, partial(loss_rows, name, size, chunk))


# --- elementwise work. TB/s counts every tensor that must be read or written once, whatever the kernels move ---------


def maybe_compiled(function: Callable, compiled: bool) -> Callable:
    """The function as it is, or under torch.compile; on a CPU without kernels of its own, which take long to build."""
    if not compiled:
        return function
    functorch.donated_buffer = False  # it would forbid a second backward of one forward
    return torch.compile(function, dynamic=False, backend="inductor" if ON_GPU else "aot_eager")


def both_passes(name: str, output: Callable[[], torch.Tensor], inputs: list, forward: int, backward: int) -> list[Row]:
    """Rows of a function's forward and backward, which move at least `forward` and `backward` bytes."""
    gradient = gradient_call(output(), inputs)
    return [
        timed_row(f"{name}, forward", output, nbytes=forward),
        timed_row(f"{name}, backward", gradient, nbytes=backward),
    ]


def rms_norm_rows(name: str, size: Sizes, compiled: bool) -> list[Row]:
    """[1, l, d]: the forward reads x and writes y; the backward reads x and dy and writes dx."""
    x, weight = normal(1, size.tokens, size.hidden).requires_grad_(), normal(size.hidden).requires_grad_()
    call = partial(maybe_compiled(rms_norm, compiled), x, weight, 1e-5)
    return both_passes(name, call, [x, weight], 2 * BYTES * x.numel(), 3 * BYTES * x.numel())


def rope(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding as generated code has it: query [1, heads, l, d], cos and sin [1, 1, l, d]."""
    half = query.shape[-1] // 2
    return query * cos + torch.cat((-query[..., half:], query[..., :half]), dim=-1) * sin


def rope_rows(name: str, size: Sizes, compiled: bool) -> list[Row]:
    """The query as the linear layer leaves it, heads innermost but one: each pass reads it once and writes it once."""
    query = normal(1, size.tokens, size.heads, size.head_dim).transpose(1, 2).requires_grad_()
    cos, sin = (normal(1, 1, size.tokens, size.head_dim) for _ in range(2))
    call = partial(maybe_compiled(rope, compiled), query, cos, sin)
    return both_passes(name, call, [query], 2 * BYTES * query.numel(), 2 * BYTES * query.numel())


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def swiglu_rows(name: str, size: Sizes, compiled: bool) -> list[Row]:
    """The forward reads two tensors and writes one; the backward reads three and writes two."""
    gate, up = (normal(1, size.tokens, size.intermediate).requires_grad_() for _ in range(2))
    call = partial(maybe_compiled(swiglu, compiled), gate, up)
    return both_passes(name, call, [gate, up], 3 * BYTES * gate.numel(), 5 * BYTES * gate.numel())


def addition_rows(size: Sizes) -> list[Row]:
    x, y = (normal(1, size.tokens, size.hidden) for _ in range(2))
    return [timed_row("residual addition", partial(torch.add, x, y), nbytes=3 * BYTES * x.numel())]


def packing_rows(size: Sizes) -> list[Row]:
    """What stands before and after an all-to-all of query heads, in copies as runtime/collectives.py makes them.

    Before, [1, heads, l, d] becomes RANKS parts of heads/RANKS heads, one after the other. After, the parts are joined
    along the sequence.
    """
    heads = normal(1, size.tokens, size.heads, size.head_dim).transpose(1, 2)
    parts = normal(RANKS, 1, size.heads // RANKS, size.tokens, size.head_dim)
    calls = {
        "packing heads for an all-to-all": lambda: heads.unflatten(1, (RANKS, -1)).movedim(1, 0).contiguous(),
        "joining its parts along the sequence": lambda: parts.movedim(0, 2).flatten(2, 3),
    }
    return [timed_row(name, call, nbytes=2 * BYTES * heads.numel()) for name, call in calls.items()]


def optimizer_rows(parameters: int) -> list[Row]:
    """AdamW in float32 reads the parameter, its gradient and two moments, and writes all but the gradient."""
    weight = torch.randn(parameters, device=DEVICE, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return [timed_row(f"fused AdamW, {parameters / 1e6:,.3g}M parameters", optimizer.step, nbytes=7 * 4 * parameters)]


# --- the loss --------------------------------------------------------------------------------------------------------


def loss_rows(name: str, size: Sizes, chunk: int) -> list[Row]:
    """Forward and backward: three products, whatever the chunk."""
    hidden = normal(1, size.tokens, size.hidden).requires_grad_()
    weight = normal(size.vocab, size.hidden, std=2 / size.hidden**0.5).requires_grad_()
    labels = torch.randint(size.vocab, (1, size.tokens), device=DEVICE)

    def both() -> None:
        hidden.grad = weight.grad = None
        chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=chunk).sum().backward()

    flops = 3 * 2 * size.tokens * size.hidden * size.vocab
    return [timed_row(name, both, flops=flops, peak_gb=peak_gb(both))]
