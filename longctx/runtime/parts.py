"""What a micro-batch's time and memory go to, from profiles; the parts of its time are those of a prediction."""

from collections import defaultdict
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
    "_Reshard": PACKING,
    "_ReshardBackward": PACKING,
    "_ChunkLinearCrossEntropy": LOSS,
    "_ChunkLinearCrossEntropyBackward": LOSS,
}
_ATTENTION = (
    "scaled_dot_product",
    "flash_attn",
    "flash_attention",
    "FlashAttn",
    "attention_in_pieces",
    "_RingAttention",
    "_KeysInReach",
    "aten::bmm",
    "aten::baddbmm",
)
_PRODUCTS = ("aten::mm", "aten::addmm")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a GPU, over a whole micro-batch."""

    name: str
    count: int
    seconds: float


def seconds_by_part(profiled: profile, device: torch.device) -> dict[str, float]:
    """Seconds that the device works for each of PARTS and, under COPIES, for what a stand-in for collectives copies.

    Of the copies only those count that computing waits for.
    """
    seconds: dict[str, float] = dict.fromkeys((*PARTS, COPIES), 0.0)
    times = list(_kernel_times(profiled) if device.type == "cuda" else _operator_times(profiled))
    by_stream: dict[int, float] = defaultdict(float)
    for _, own, stream in times:
        by_stream[stream] += own
    computing = max(by_stream, key=lambda stream: by_stream[stream])
    for operator, own, stream in times:
        part = _part_of(operator)
        # FSDP's collectives have streams of their own: what is copied there takes no time from the computing.
        if part != COPIES or stream == computing:
            seconds[part] += own
    return seconds


def _operator_times(profiled: profile) -> Iterable[tuple[Any, float, int]]:
    """Every operator's event, and the seconds that it takes itself, without those that it calls; all in one stream."""
    for event in profiled.events() or []:
        yield event, event.self_cpu_time_total / 1e6, 0


def _kernel_times(profiled: profile) -> Iterable[tuple[Any, float, int]]:
    """For every kernel and copy of a GPU the event of the operator that launched it, or None, its seconds, its stream.

    The sums that PyTorch makes for an operator also have, as if they were kernels, the spans on the GPU of what lies
    in a record_function, as FSDP's collectives do. Here every kernel counts once.
    """
    results: Any = profiled.profiler and profiled.profiler.kineto_results
    on_host = [event for event in results.events() if event.device_type() == DeviceType.CPU]
    names = {event.name() for event in on_host}
    # Calls of CUDA's runtime are linked to the operator that makes them, and count their own numbers.
    numbers = {event.correlation_id() for event in on_host if not event.linked_correlation_id()}
    cpu = [event for event in profiled.events() or [] if event.device_type == DeviceType.CPU]
    operators = {event.id: event for event in cpu if event.id in numbers}
    for event in results.events():
        if event.device_type() == DeviceType.CUDA and event.name() not in names:
            operator = operators.get(event.linked_correlation_id())
            yield operator, event.duration_ns() / 1e9, event.device_resource_id()


def _part_of(event: Any) -> str:
    """The part that an operator's event belongs to, by its own name and the names of the events it lies in."""
    names = list(_names_outwards(event))
    if COPIES in names:
        return COPIES
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
    averages = profiled.key_averages()
    recorded = {entry.key for entry in averages if entry.device_type == DeviceType.CPU}
    entries = [entry for entry in averages if entry.device_type == DeviceType.CUDA and entry.key not in recorded]
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
