"""How the parts measure: sizes, timing, peak memory, errors, tables of kernels."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts.results import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

WARM_UPS = 2
TIMED_MS = 300.0  # calls are timed for about as long as this, or LEAST_CALLS times if that takes longer
LEAST_CALLS, MOST_CALLS = 3, 30 if ON_GPU else 3  # a CPU's figures are of sizes too small to mean anything
HEAD_START_CYCLES = 20_000_000  # some 10 ms of a GPU


@dataclass(frozen=True)
class Attention:
    """Causal attention of one row: query [1, heads, length, head_dim], keys and values with kv_heads of them."""

    heads: int
    kv_heads: int
    length: int
    head_dim: int

    def __str__(self) -> str:
        return f"of {self.heads}/{self.kv_heads} heads at {self.length:,}"


@dataclass(frozen=True)
class Sizes:
    """What is measured: the tokens and layer of one rank, and its attention."""

    tokens: int
    hidden: int
    intermediate: int
    heads: int  # of `hidden`, each of head_dim features
    head_dim: int
    vocab: int
    attention: tuple[Attention, ...]
    square: int  # the side of a product as large as any
    copied: int  # bytes of a copy far larger than any cache
    optimized: int  # parameters of an optimizer's step


# A rank of eight that train Llama-3-8B has 4 of its 32 query heads, and one that trains it alone has them all.
ATTENTION = (*(Attention(4, 1, length, 128) for length in (131_072, 32_768, 8_192)), Attention(32, 8, 8_192, 128))
# At 131,072 tokens the rank of eight has 16,384 of them.
LLAMA_8B = Sizes(16_384, 4096, 14_336, 32, 128, 128_256, ATTENTION, 8192, 2**31, 2**28)
SMALL = Sizes(128, 64, 128, 8, 16, 500, (Attention(4, 1, 128, 16),), 128, 2**22, 2**16)


def sizes(small: bool) -> Sizes:
    return SMALL if small else LLAMA_8B


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> torch.Tensor:
    """Normal numbers on the device. Zeros would be multiplied faster: they cost a GPU less power."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).mul_(std).to(dtype)


def milliseconds(call: Callable[[], object]) -> float:
    """The median of one call's time after warm-up: on a GPU by its own clock, from the call's first kernel to its last.

    On a GPU the calls are queued behind a wait, so that the device never waits for the host between two kernels. Calls
    that synchronize by themselves lose that head start, and their time then includes the waiting.
    """
    for _ in range(WARM_UPS):
        call()
    time_calls = _milliseconds_on_gpu if ON_GPU else _milliseconds_on_cpu
    (first,) = time_calls(call, 1)
    calls = min(max(round(TIMED_MS / max(first, 1e-3)), LEAST_CALLS), MOST_CALLS)
    return statistics.median(time_calls(call, calls))


def _milliseconds_on_gpu(call: Callable[[], object], calls: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _milliseconds_on_cpu(call: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def peak_gb(call: Callable[[], object]) -> float | None:
    """1e9 bytes that one call allocates at most, its results included; None on a CPU, where nobody counts them."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def timed_row(what: str, call: Callable[[], object], flops: float = 0.0, nbytes: float = 0.0, **more: Any) -> Row:
    """The row of a call that needs `flops` floating-point operations, or moves `nbytes` bytes at the least."""
    ms = milliseconds(call)
    tflops, tb_per_s = flops / ms / 1e9 or None, nbytes / ms / 1e9 or None
    return Row(what, ms=ms, tflops=tflops, tb_per_s=tb_per_s, **more)


def gradient_call(output: torch.Tensor, inputs: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that computes the gradients of `inputs` for a random gradient of `output`, as often as is wanted."""
    return partial(torch.autograd.grad, output, inputs, torch.randn_like(output), retain_graph=True)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|, norms in float64."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def kernel_table(call: Callable[[], object], longest: int) -> list[tuple[str, int, float, float]]:
    """The kernels that take most of a call's time on the GPU: name, launches, milliseconds, share. Empty on a CPU."""
    if not ON_GPU:
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    return [
        (event.key[:120], event.count, event.self_device_time_total / 1e3, event.self_device_time_total / total)
        for event in events[:longest]
    ]
