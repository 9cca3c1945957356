"""What a micro-batch's time and memory go to, from profiles; the parts of its time are those of a prediction."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from longctx.runtime.stand_in import COPIES

ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
LINEAR, REST, LOSS = "linear layers", "the rest of the layers", "loss"
FSDP, PACKING = "FSDP's copies", "packing for reshards"
PARTS = (ATTENTION_FORWARD, ATTENTION_BACKWARD, LINEAR, REST, LOSS, FSDP, PACKING)

# Names of the events that an operator's events lie in, by which it belongs to a part. The outermost of them that is
# here decides: the loss multiplies matrices, and is the loss.
_ENCLOSING = {
    COPIES: COPIES,
    "_Reshard": PACKING,
    "_ReshardBackward": PACKING,
    "_ChunkLinearCrossEntropy": LOSS,
    "_ChunkLinearCrossEntropyBackward": LOSS,
}
_ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "FlashAttn", "aten::bmm", "aten::baddbmm")
_PRODUCTS = ("aten::mm", "aten::addmm")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a GPU, over a whole micro-batch."""

    name: str
    count: int
    seconds: float


def seconds_by_part(profiled: profile, device: torch.device) -> dict[str, float]:
    """Seconds that the device works for each of PARTS and, under COPIES, for what a stand-in for collectives copies.

    On a CPU they are the time that an operator takes itself, without the operators that it calls.
    """
    seconds: dict[str, float] = dict.fromkeys((*PARTS, COPIES), 0.0)
    for event in profiled.events() or []:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.device_type == DeviceType.CPU and own:
            seconds[_part_of(event)] += own / 1e6
    return seconds


def _part_of(event: Any) -> str:
    """The part that an operator's event belongs to, by its own name and the names of the events it lies in."""
    names = list(_names_outwards(event))
    for name in reversed(names):
        if name in _ENCLOSING:
            return _ENCLOSING[name]
        if name.startswith("FSDP::"):
            return FSDP
    for name in names:
        if any(part in name for part in _ATTENTION) and not name.startswith("autograd::"):
            return ATTENTION_BACKWARD if "ackward" in name else ATTENTION_FORWARD
    return LINEAR if any(name in _PRODUCTS for name in names) else REST


def _names_outwards(event: Any) -> Iterable[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def kernels(profiled: profile, most: int) -> list[Kernel]:
    """The GPU's kernels that took most time, the longest first."""
    entries = [entry for entry in profiled.key_averages() if entry.device_type == DeviceType.CUDA]
    entries.sort(key=lambda entry: -entry.self_device_time_total)
    return [Kernel(entry.key, entry.count, entry.self_device_time_total / 1e6) for entry in entries[:most]]


def activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])


def bytes_allocated(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Of what `call` allocates: the most that it holds at a time, and what it leaves allocated; in bytes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results: Any = profiled.profiler and profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak, held
