"""Speeds of devices and of the links between them: tables with sources, and profiles measured on the spot.

    torchrun --nproc_per_node 8 -m longctx.compiler.hardware --measure --output profile.json

measures this machine's matrix rates, memory bandwidth and collectives, and writes a profile that load() takes. One
process alone measures no collectives; its profile has the table's links.
"""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from longctx.atomic import whole_file
from longctx.errors import HardwareError, UserError, run_script


@dataclass(frozen=True)
class Link:
    """What joins the devices of a node, or one node to others; full duplex, figures for one direction.

    bandwidth: bytes/s that one device sends at most; pair_bandwidth: bytes/s of it that any one receiver can be sent;
    efficiency: the fraction of them that large collectives reach; latency: seconds of one step of a collective.
    """

    bandwidth: float
    pair_bandwidth: float
    efficiency: float
    latency: float


@dataclass(frozen=True)
class Timing:
    """Measured seconds of a collective over n_ranks, at whole tensors' bytes in ascending order."""

    kind: str
    n_ranks: int
    whole_bytes: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Hardware:
    """One device and its links.

    matrix_flops: dense bfloat16 (and float16) matrix rate, FLOP/s; matrix_efficiency: the fraction of it that large
    products reach; float32_flops: float32 matrix rate that large products reach, FLOP/s, without TF32;
    memory_bandwidth: bytes/s; memory_efficiency: the fraction of it that a large copy reaches, counting bytes read and
    written; memory_bytes; launch_latency: seconds that any collective takes before its first step; devices_per_node:
    that `node_link` joins; published_peak: whether matrix_flops is its maker's figure, by which MFU counts. `timings`
    are of measured profiles only.
    """

    name: str
    matrix_flops: float
    memory_bandwidth: float
    memory_bytes: float
    matrix_efficiency: float
    float32_flops: float
    memory_efficiency: float
    launch_latency: float
    node_link: Link
    network: Link
    devices_per_node: int = 8
    published_peak: bool = True
    timings: tuple[Timing, ...] = ()

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s that large products of this dtype reach."""
        return self.float32_flops if dtype == torch.float32 else self.matrix_flops * self.matrix_efficiency

    def peak_rate(self, dtype: torch.dtype) -> float | None:
        """FLOP/s that MFU counts by: the datasheet's, for 16 bits; None for float32 and for CPUs, which have none."""
        return self.matrix_flops if self.published_peak and dtype != torch.float32 else None

    @property
    def achievable_bandwidth(self) -> float:
        """Bytes/s, read and written, that a large copy reaches."""
        return self.memory_bandwidth * self.memory_efficiency


# Sources.
# Rates, memory, link bandwidths: NVIDIA's A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 datasheets; AMD's Instinct
#   MI300X datasheet. Dense: the headline matrix rates, "with sparsity", are twice these. float32 is the CUDA cores'
#   (MI300X: the matrix cores'), times matrix_efficiency, which nobody publishes for float32. A datasheet's link
#   bandwidth counts both directions, and is twice these: NVLink 3, 4, 5 give 300, 450, 900 GB/s each way, all of it to
#   any one peer through NVSwitch; an MI300X has 7 xGMI links of 64 GB/s, one to each peer.
# matrix_efficiency: "Maximum Achievable Matmul FLOPS" in github.com/stas00/ml-engineering, compute/accelerator: 271.2,
#   794.5 (H200 "is the same"), 1745.0 and 668.4 TFLOP/s.
# memory_efficiency: a copy of 4.3 GB through PyTorch on an H200 moved 4.3 TB/s of 4.8; taken for NVIDIA's others too.
#   MI300X: BabelStream copy, 4.18 of 5.3 TB/s, in AMD's MI300X system validation guide.
# node_link.efficiency: bus bandwidths of large ring collectives on 8 devices, same book, network: A100 235 of 300;
#   H200 363 of 450 (H100 has the same links); B200 682 of 900; MI300X 313 of 448 (48 of 64 on two). NVLink SHARP makes
#   all-reduce, and it alone, up to 1.3 times faster on H100 and later: not counted, a measured profile knows.
# network: one adapter a device, of 200 Gb/s (DGX A100) or 400 Gb/s (DGX H100, H200, B200; AMD's reference design).
#   Efficiency: all-reduces of 4 GiB and up on 4 nodes of 8 B200, same book, under the ring model below; taken for all.
# Latencies: NCCL's tuning model, src/graph/tuning.cc, ring with the Simple protocol: 8.4 us, and 3.4 us a step over
#   NVLink, 14 us over the network; 2.1 us over xGMI in RCCL's for gfx942 (src/graph/tuning.cc).
_NETWORK_200G = Link(25e9, 25e9, 0.94, 14e-6)
_NETWORK_400G = Link(50e9, 50e9, 0.94, 14e-6)
_NVLINK_3 = Link(300e9, 300e9, 0.78, 3.4e-6)
_NVLINK_4 = Link(450e9, 450e9, 0.80, 3.4e-6)
_NVLINK_5 = Link(900e9, 900e9, 0.76, 3.4e-6)
_XGMI = Link(448e9, 64e9, 0.70, 2.1e-6)

# One core, as torchrun gives each process one thread. Rough, and of one class only: what --measure gave on a 2-core
# virtual machine of an AMD EPYC without bfloat16 instructions, its ranks joined by gloo over the loopback.
_LOOPBACK = Link(0.5e9, 0.5e9, 1.0, 300e-6)
_CPU = Hardware("cpu", 1.2e9, 10e9, 8e9, 1.0, 65e9, 1.0, 300e-6, _LOOPBACK, _LOOPBACK, published_peak=False)

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100", 989e12, 3.35e12, 80e9, 0.80, 0.80 * 67e12, 0.90, 8.4e-6, _NVLINK_4, _NETWORK_400G),
        Hardware("h200", 989e12, 4.8e12, 141e9, 0.80, 0.80 * 67e12, 0.90, 8.4e-6, _NVLINK_4, _NETWORK_400G),
        Hardware("a100", 312e12, 2.039e12, 80e9, 0.87, 0.87 * 19.5e12, 0.90, 8.4e-6, _NVLINK_3, _NETWORK_200G),
        Hardware("b200", 2250e12, 8.0e12, 180e9, 0.78, 0.78 * 80e12, 0.90, 8.4e-6, _NVLINK_5, _NETWORK_400G),
        Hardware("mi300x", 1307e12, 5.3e12, 192e9, 0.51, 0.51 * 163.4e12, 0.79, 8.4e-6, _XGMI, _NETWORK_400G),
        _CPU,
    )
}


def identify(device_name: str) -> Hardware | None:
    """The table's entry for a GPU's name ('NVIDIA H100 80GB HBM3'), or None."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())  # whole words: 'GB200' and 'GH200' are other devices
    if {"pcie", "nvl"} & set(words):  # slower cards under the same name
        return None
    return next((HARDWARE[word] for word in words if word in HARDWARE), None)


def peak_rate_here(dtype: torch.dtype) -> float | None:
    """FLOP/s that the GPU that is here is specified for; None where there is none, or it is not in the table."""
    here = identify(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return here and here.peak_rate(dtype)


def load(name_or_path: str | None) -> Hardware:
    """The hardware of a table's name or a measured profile's file; of None, the GPU that is here, else the H100.

    Raises:
        HardwareError: it is neither; the message lists the names.
    """
    if name_or_path is None:
        here = identify(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return here or HARDWARE["h100"]
    if name_or_path.lower() in HARDWARE:
        return HARDWARE[name_or_path.lower()]
    names = ", ".join(sorted(HARDWARE))
    path = Path(name_or_path)
    if not path.is_file():
        raise HardwareError(f"it is neither a profile's file nor one of {names}")
    try:
        return _from_json(json.loads(path.read_text())["hardware"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        written_by = "python -m longctx.compiler.hardware --measure"
        raise HardwareError(f"it is no profile that {written_by} wrote, nor one of {names}") from error


def collective_seconds(hardware: Hardware, kind: str, whole_bytes: float, n_ranks: int) -> float:
    """Seconds of one collective over n_ranks devices, the first of them filling a node; 0 for one rank.

    `kind` is 'all_gather', 'reduce_scatter', 'all_reduce' or 'all_to_all'; `whole_bytes` are N, the bytes of the whole
    tensor, whichever the kind: what each rank has after an all-gather, before a reduce-scatter, before and after an
    all-reduce, and what all ranks have together before and after an all-to-all (N / n_ranks each).
    A profile that measured the kind on n_ranks is interpolated; else _modelled_seconds says.
    """
    if n_ranks == 1:
        return 0.0
    for timing in hardware.timings:
        if (timing.kind, timing.n_ranks) == (kind, n_ranks):
            return _interpolate(timing, whole_bytes)
    return _modelled_seconds(hardware, kind, whole_bytes, n_ranks)


def _modelled_seconds(hardware: Hardware, kind: str, whole_bytes: float, n_ranks: int) -> float:
    """Launch, the steps' latencies, and the bytes over the slowest link that they cross.

    A ring takes n - 1 steps in which each rank sends N (n - 1) / n bytes, and for an all-reduce twice both: the bus
    bandwidth factors of nccl-tests, doc/PERFORMANCE.md. Across nodes there are as many rings as devices in a node, each
    crossing over another device's adapter, so an adapter carries that share of the bytes; of the steps, nodes - 1 are
    between nodes (NCCL, src/graph/tuning.cc). All-to-all sends N / n^2 bytes to each other rank, at once.
    """
    in_node = min(n_ranks, hardware.devices_per_node)
    n_nodes = -(-n_ranks // hardware.devices_per_node)
    if kind == "all_to_all":
        to_each = whole_bytes / n_ranks**2
        node_bytes, network_bytes = to_each * (in_node - 1), to_each * (n_ranks - in_node)
        node_steps, network_steps = 1, min(n_nodes - 1, 1)
    else:
        passes = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}[kind]
        node_bytes = passes * whole_bytes * (n_ranks - 1) / n_ranks
        network_bytes = node_bytes / in_node if n_nodes > 1 else 0.0
        network_steps = passes * (n_nodes - 1)
        node_steps = passes * (n_ranks - 1) - network_steps
    latency = node_steps * hardware.node_link.latency + network_steps * hardware.network.latency
    return (
        hardware.launch_latency
        + latency
        + max(
            node_bytes / _rate(hardware.node_link, in_node - 1),
            network_bytes / _rate(hardware.network, n_ranks - in_node),
        )
    )


def _rate(link: Link, n_receivers: int) -> float:
    """Bytes/s that a device sends to this many others in a collective; infinite to none, since no bytes go."""
    return min(link.bandwidth, link.pair_bandwidth * n_receivers) * link.efficiency or inf


def _interpolate(timing: Timing, whole_bytes: float) -> float:
    """Linear between measured sizes; below the least, its time, all latency; above the largest, at its rate."""
    beyond = max(1.0, whole_bytes / timing.whole_bytes[-1])
    return float(np.interp(whole_bytes, timing.whole_bytes, timing.seconds)) * beyond


def _from_json(fields: dict) -> Hardware:
    """Raises ValueError, KeyError or TypeError where these are not a Hardware's fields."""
    timings = tuple(
        Timing(entry["kind"], entry["n_ranks"], tuple(entry["whole_bytes"]), tuple(entry["seconds"]))
        for entry in fields["timings"]
    )
    links = {name: Link(**fields[name]) for name in ("node_link", "network")}
    numbers = [value for name, value in fields.items() if name not in ("name", "timings", "published_peak", *links)]
    numbers += [value for link in links.values() for value in asdict(link).values()]
    numbers += [value for timing in timings for value in (*timing.whole_bytes, *timing.seconds)]
    if not all(isfinite(value) and value > 0 for value in numbers):
        raise ValueError("a figure is not a number above 0")
    return Hardware(**{**fields, **links, "timings": timings})


# Measuring. Every rank takes part, and the slowest rank's time counts: the others would wait for it.

POINT_S = 0.1  # spent on one size of a measurement; the next size, four times as long or eight, may take that once
LARGEST_PRODUCT = 8192
SMALLEST_COLLECTIVE, LARGEST_COLLECTIVE = 2**14, 2**30  # bytes
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def measure() -> dict:
    """Measures this machine with all ranks of the default group; returns the profile, which every rank has."""
    device, n_ranks = _device(), dist.get_world_size()
    group_sizes = [size for size in range(2, n_ranks + 1) if n_ranks % size == 0]
    rates, timings = {}, []
    with tqdm(total=3 + len(KINDS) * len(group_sizes), unit="measurement", disable=dist.get_rank() != 0) as bar:
        for dtype in (torch.bfloat16, torch.float32):
            bar.set_description(f"products in {str(dtype).removeprefix('torch.')}")
            rates[dtype] = _matrix_rate(dtype, device)
            bar.update()
        bar.set_description("memory")
        bandwidth = _copy_bandwidth(device)
        bar.update()
        for size in group_sizes:
            group = dist.new_subgroups(size)[0]  # all groups of this size work at once, as plan groups do
            for kind in KINDS:
                bar.set_description(f"{kind} over {size}")
                timings.append(_time_collective(kind, group, device))
                bar.update()
    hardware = _measured_hardware(device, rates, bandwidth, tuple(timings))
    return {"machine": hardware.name, "torch": torch.__version__, "ranks": n_ranks, "hardware": asdict(hardware)}


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


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy far larger than any cache."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    return 2 * source.nbytes / _seconds(partial(torch.empty_like(source).copy_, source), device)


def _time_collective(kind: str, group: dist.ProcessGroup, device: torch.device) -> Timing:
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
        "all_gather": partial(dist.all_gather_into_tensor, whole, part, group=group),
        "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole, group=group),
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


def _measured_hardware(
    device: torch.device, rates: dict[torch.dtype, float], bandwidth: float, timings: tuple[Timing, ...]
) -> Hardware:
    """The table's entry for this device with what was measured in place; a known peak stays, since MFU counts by it."""
    known = identify(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    table = known or HARDWARE["h100" if device.type == "cuda" else "cpu"]
    peak = known.matrix_flops if known else rates[torch.bfloat16]
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes, n_devices = properties.name, properties.total_memory, torch.cuda.device_count()
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here
        name, n_devices = _cpu_name(), max(ranks_here, os.cpu_count() or 1)
    hardware = replace(
        table,
        name=name,
        matrix_flops=peak,
        matrix_efficiency=rates[torch.bfloat16] / peak,
        float32_flops=rates[torch.float32],
        memory_bandwidth=bandwidth,
        memory_efficiency=1.0,
        memory_bytes=memory_bytes,
        devices_per_node=n_devices,
        timings=timings,
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
    """The link that explains a measured all-gather, for numbers of ranks that were not: see _modelled_seconds."""
    n = gather.n_ranks
    bandwidth = gather.whole_bytes[-1] * (n - 1) / n / n_rings / gather.seconds[-1]
    return Link(bandwidth, bandwidth, 1.0, gather.seconds[0] / n)  # n - 1 steps and the launch


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.machine()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def _process_group() -> Iterator[None]:
    """Joins the ranks that torchrun started, or stands alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m longctx.compiler.hardware", description="Measures this machine's speeds."
    )
    parser.add_argument("--measure", action="store_true", required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="the profile that --hardware of train.py takes, .json"
    )
    args = parser.parse_args()
    if args.output.is_dir() or not os.access(args.output.absolute().parent, os.W_OK):
        raise UserError(f"--output {args.output}: no file can be written there; name one in a folder that can be")
    with _process_group():
        profile = measure()
        if dist.get_rank() == 0:
            with whole_file(args.output) as aside:
                aside.write_text(json.dumps(profile, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
