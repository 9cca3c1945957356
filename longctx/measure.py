"""Measures this machine's speeds, as a profile that train.py's --hardware takes.

    torchrun --nproc_per_node 8 -m longctx.measure --output profile.json

It times large products, attention by the first of PyTorch's kernels that takes it (cuDNN's where there is one), copies
through memory, in order and strided, and every collective over every number of ranks that divides the whole. One
process alone measures no collectives; its profile has the links of compiler/hardware.py's table. Every rate in the
profile says whether it was measured.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from longctx import torchrun
from longctx.atomic import whole_file
from longctx.command_line import option, parse
from longctx.compiler.hardware import HARDWARE, Collective, Hardware, Link, Rate, Timing, identify, in_proportion
from longctx.compiler.work import Work
from longctx.errors import UserError, run_script
from longctx.kernels.attention import attention
from longctx.runtime.collectives import all_gather_single, reduce_scatter_single
from longctx.runtime.parallel import process_group
from longctx.schema import read_json

# Measuring. Every rank takes part, and the slowest rank's time counts: the others would wait for it.

POINT_S = 0.1  # spent on one size of a measurement; the next size, four times as long or eight, may take that once
LARGEST_PRODUCT = 8192
QUERY_HEADS, KEY_HEADS, HEAD_FEATURES = 4, 1, 128  # a rank's of Llama-3-8B over 8
LARGEST_ATTENTION = 131072  # tokens
SMALLEST_COLLECTIVE, LARGEST_COLLECTIVE = 2**14, 2**30  # bytes
PROFILE_FIELDS = ("machine", "torch", "ranks", "hardware")
KINDS: tuple[Collective, ...] = get_args(Collective)


def measure(device: torch.device) -> dict:
    """Measures this machine with all ranks of the default group; returns the profile, which every rank has."""
    n_ranks = dist.get_world_size()
    group_sizes = [size for size in range(2, n_ranks + 1) if n_ranks % size == 0]
    measurements = _rate_measurements(device)
    rates: dict[Work, float] = {}
    timings: list[Timing] = []
    n_measurements = len(measurements) + len(KINDS) * len(group_sizes)
    with tqdm(total=n_measurements, unit="measurement", disable=dist.get_rank() != 0) as bar:
        for work, measurement in measurements.items():
            bar.set_description(work)
            rates[work] = measurement()
            bar.update()
        for size in group_sizes:
            group = dist.new_subgroups(size)[0]  # all groups of this size work at once, as plan groups do
            assert isinstance(group, dist.ProcessGroup), "every rank is in a group of each size"
            for kind in KINDS:
                bar.set_description(f"{kind} over {size}")
                timings.append(_time_collective(kind, group, device))
                bar.update()
    hardware = _measured_hardware(device, rates, tuple(timings))
    facts = (hardware.name, torch.__version__, n_ranks, asdict(hardware))
    return dict(zip(PROFILE_FIELDS, facts, strict=True))


def _rate_measurements(device: torch.device) -> dict[Work, Callable[[], float]]:
    """For each kind of work that is measured, what measures it: FLOP/s of products, bytes/s of all else."""
    return {
        Work.PRODUCTS: partial(_matrix_rate, torch.bfloat16, device),
        Work.FLOAT32_PRODUCTS: partial(_matrix_rate, torch.float32, device),
        Work.ATTENTION_FORWARD: partial(_attention_rate, _attention_forward, device),
        Work.ATTENTION_BACKWARD: partial(_attention_rate, _attention_backward, device),
        Work.COPIES: partial(_copy_bandwidth, device),
        Work.STRIDED: partial(_strided_bandwidth, device),
    }


def _matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square products, at the size that has most."""
    best, n = 0.0, 256
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # not zeros: GPUs run those faster
        seconds = _seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        best = max(best, 2 * n**3 / seconds)
        if n == LARGEST_PRODUCT or 8 * seconds > POINT_S:
            return best
        n *= 2


def _attention_rate(make_call: Callable, device: torch.device) -> float:
    """FLOP/s of one pass of causal attention at a rank's shapes in bfloat16, at the length that has most.

    `make_call` makes of query, key and value the call to time, and says how many FLOPs it has for each of the forward.
    """
    best, length = 0.0, 256
    while True:
        shapes = [(1, heads, length, HEAD_FEATURES) for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)]
        query_key_value = [torch.randn(s, device=device).bfloat16().requires_grad_() for s in shapes]
        call, share = make_call(*query_key_value)
        seconds = _seconds(call, device)
        forward_flops = 2 * QUERY_HEADS * HEAD_FEATURES * length * (length + 1)  # two products over half of the pairs
        best = max(best, share * forward_flops / seconds)
        if length == LARGEST_ATTENTION or 4 * seconds > POINT_S:
            return best
        length *= 2


def _attention_forward(*query_key_value: torch.Tensor) -> tuple[Callable[[], object], float]:
    call = partial(attention, *query_key_value, scale=HEAD_FEATURES**-0.5)
    return torch.no_grad()(call), 1.0


def _attention_backward(*query_key_value: torch.Tensor) -> tuple[Callable[[], object], float]:
    """The backward has five products for the forward's two: see longctx/kernels/attention.py."""
    output = attention(*query_key_value, scale=HEAD_FEATURES**-0.5)
    gradient = torch.randn_like(output)
    return partial(torch.autograd.grad, output, query_key_value, gradient, retain_graph=True), 2.5


def _strided_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of a product as RoPE has it: of heads that were transposed, [1, heads, l, d]."""
    length = 2**15 if device.type == "cuda" else 2**12
    heads = torch.ones(1, length, 32, HEAD_FEATURES, dtype=torch.bfloat16, device=device).transpose(1, 2)
    cos = torch.ones(1, 1, length, HEAD_FEATURES, dtype=torch.bfloat16, device=device)
    return 2 * heads.nbytes / _seconds(partial(torch.mul, heads, cos, out=torch.empty_like(heads)), device)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy far larger than any cache."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    return 2 * source.nbytes / _seconds(partial(torch.empty_like(source).copy_, source), device)


def _time_collective(kind: Collective, group: dist.ProcessGroup, device: torch.device) -> Timing:
    """Times a collective at sizes four times apart, as long as they fit in POINT_S."""
    n_ranks, sizes, seconds = group.size(), [], []
    target = SMALLEST_COLLECTIVE
    while not seconds or (4 * seconds[-1] <= POINT_S and target <= LARGEST_COLLECTIVE):
        n_each = -(-target // (4 * n_ranks**2))  # floats that a rank has for each other one
        seconds.append(_seconds(_collective(kind, n_each, group, device), device))
        sizes.append(4 * n_ranks**2 * n_each)
        target = 4 * sizes[-1]
    # More bytes never take less time: where they seemed to, it was noise.
    return Timing(kind, n_ranks, tuple(sizes), tuple(np.maximum.accumulate(seconds).tolist()))


def _collective(kind: str, n_each: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], object]:
    """A call of the collective on a whole tensor of n_ranks^2 * n_each floats, its buffers made beforehand."""
    whole = torch.zeros(group.size() ** 2 * n_each, device=device)
    part = torch.zeros(group.size() * n_each, device=device)
    return {
        "all_gather": partial(all_gather_single, whole, part, group=group),
        "reduce_scatter": partial(reduce_scatter_single, part, whole, group=group),
        "all_reduce": partial(dist.all_reduce, whole, group=group),
        "all_to_all": partial(dist.all_to_all_single, torch.empty_like(part), part, group=group),
    }[kind]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the mean of a batch, the best of three, on the slowest rank; as many calls on every rank."""
    call()
    repeats = min(max(int(POINT_S / 3 / _batch_seconds(call, 1, device)), 1), 1000)
    return min(_batch_seconds(call, repeats, device) for _ in range(3)) / repeats


def _batch_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _measured_hardware(device: torch.device, rates: dict[Work, float], timings: tuple[Timing, ...]) -> Hardware:
    """The table's entry for this device with what was measured in place; a known peak stays, since MFU counts by it."""
    known = identify(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    table = known or HARDWARE["h100" if device.type == "cuda" else "cpu"]
    peak = known.matrix_flops if known else rates[Work.PRODUCTS]
    ranks_here = torchrun.local_world_size()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes, n_devices = properties.name, properties.total_memory, torch.cuda.device_count()
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here
        name, n_devices = _cpu_name(), max(ranks_here, os.cpu_count() or 1)
    source = f"measured, {name}, PyTorch {torch.__version__}"
    hardware = replace(
        table,
        name=name,
        matrix_flops=peak,
        memory_bytes=memory_bytes,
        rates=in_proportion({work: Rate(rate, source) for work, rate in rates.items()}),
        devices_per_node=n_devices,
        timings=timings,
        published_peak=known is not None,
    )
    gathers = [timing for timing in timings if timing.kind == "all_gather"]
    inside, across = ([t for t in gathers if (t.n_ranks > ranks_here) == is_across] for is_across in (False, True))
    if inside:
        link = _fit_link(inside[-1], 1)
        hardware = replace(hardware, node_link=link, launch_latency=link.latency)
    if across:
        hardware = replace(hardware, network=_fit_link(across[-1], ranks_here))
    return hardware


def _fit_link(gather: Timing, n_rings: int) -> Link:
    """The link that explains a measured all-gather, for numbers of ranks that were not: see hardware.py's
    _modelled_seconds."""
    n = gather.n_ranks
    bandwidth = gather.whole_bytes[-1] * (n - 1) / n / n_rings / gather.seconds[-1]
    return Link(bandwidth, bandwidth, 1.0, gather.seconds[0] / n)  # n - 1 steps and the launch


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.machine()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What longctx.measure is asked to write."""

    output: Path = option(help="the profile to write, which --hardware takes")


def main(argv: list[str] | None = None) -> None:
    output = parse(Asked, argv, "Measures this machine's speeds.").output
    if problem := torchrun.why_not_usable():
        raise UserError(problem)
    check_output(output)
    with process_group() as device:
        profile = measure(device)
        if dist.get_rank() == 0:
            with whole_file(output) as aside:
                aside.write_text(json.dumps(profile, indent=2) + "\n")


def check_output(output: Path) -> None:
    """Raises a UserError for an output that can't be written, or that would replace what this program did not write."""
    if output.is_dir() or not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"--output {output}: no file can be written there; name one in a folder that can be")
    if output.exists() and not is_profile(output):
        raise UserError(f"--output {output}: it is there already, and is no profile; name another file")


def is_profile(file: Path) -> bool:
    try:
        facts = read_json(file)
    except ValueError:
        return False
    return isinstance(facts, dict) and set(facts) == set(PROFILE_FIELDS)


if __name__ == "__main__":
    run_script(main)
