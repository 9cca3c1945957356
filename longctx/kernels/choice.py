"""Which fused attention kernel a process takes: those that are there are run once, at the shapes of the plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from longctx.errors import one_line
from longctx.kernels.attention import attention
from longctx.kernels.fused import KERNELS, why_not

RUNS = 3  # that are timed, after one that is not
LONGEST = 131_072  # tokens that are timed: from some 32,000 on a kernel's rate no longer depends on the length

Shapes = Sequence[Sequence[int]]  # of query [b, heads, l, d], key [b, kv_heads, l, d] and value [b, kv_heads, l, e]


@dataclass(frozen=True)
class Choice:
    """What `choose` found: the fastest kernel, None if none runs, and the times and errors of all, in words."""

    kernel: str | None
    findings: str


@dataclass(frozen=True)
class Milliseconds:
    """Of one forward and one backward at each of some shapes, together."""

    forward: float
    backward: float

    def __str__(self) -> str:
        return f"{self.forward:.1f} + {self.backward:.1f}"


def candidates(implementation: str, deterministic: bool, documents_apart: bool = False) -> tuple[str, ...]:
    """The kernels among which `choose` is to choose: the one that was asked for, or, of 'auto', all that are there, or
    that are there and take documents apart.

    Where the same bits are wanted each time, 'auto' is PyTorch's flash backend without a choice, since the fastest
    may be another one in another run.
    """
    if implementation != "auto":
        return (implementation,) if implementation in KERNELS else ()
    if deterministic:
        return ("flash",)
    able = [name for name, kernel in KERNELS.items() if kernel.documents or not documents_apart]
    return tuple(name for name in able if why_not(name, torch.bfloat16, "cuda") is None)


def choose(names: Sequence[str], shapes: Sequence[Shapes], dtype: torch.dtype) -> Choice:
    """The fastest of these kernels on this process's GPU, over all the shapes together, each run alone.

    Takes some 0.5 s for each kernel at 131,072 tokens and 4 heads, and the memory of one layer's attention. Longer rows
    are cut to LONGEST.
    """
    shapes = [[(*leading, min(length, LONGEST), width) for *leading, length, width in tensors] for tensors in shapes]
    times: dict[str, Milliseconds] = {}
    refusals = []
    for name in names:
        try:
            times[name] = time_kernel(name, shapes, dtype)
        except Exception as error:  # whatever a kernel raises that does not take a shape, or can't be compiled
            refusals.append(f"{name} can't: {one_line(error)}")
    torch.cuda.empty_cache()
    if not times:
        return Choice(None, "; ".join(refusals))
    fastest, *others = sorted(times, key=lambda name: times[name].forward + times[name].backward)
    beside = "; ".join([*(f"{name} {times[name]}" for name in others), *refusals])
    places = " and ".join(str(list(query)) for query, *_ in shapes)
    return Choice(fastest, f"{fastest}, {times[fastest]} ms at {places}{f' ({beside})' if beside else ''}")


def time_kernel(name: str, shapes: Sequence[Shapes], dtype: torch.dtype) -> Milliseconds:
    """The median times of a kernel's forward and backward, summed over the shapes."""
    forward, backward = zip(*(_time_at(name, shape, dtype) for shape in shapes), strict=True)
    return Milliseconds(sum(forward), sum(backward))


def _time_at(name: str, shapes: Shapes, dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward of a kernel, on random inputs that lie in memory as in a plan."""
    query, key, value = (torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes)
    scale, deterministic = query.shape[-1] ** -0.5, torch.are_deterministic_algorithms_enabled()

    def forward() -> torch.Tensor:
        return attention(query, key, value, scale, implementation=name, deterministic=deterministic)

    output = forward()
    gradient = torch.randn(output.shape, device="cuda", dtype=dtype)

    def backward() -> None:
        torch.autograd.grad(output, (query, key, value), gradient, retain_graph=True)

    return _milliseconds(forward), _milliseconds(backward)


def _milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call on the GPU, after one that loads or compiles the kernel."""
    call()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
