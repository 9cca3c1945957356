"""Speeds of devices and of the links between them: tables with sources, and profiles that longctx/measure.py wrote.

A new device is one entry of HARDWARE. Every rate says whether it was measured, and where.
"""

import re
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from longctx.compiler.work import PRODUCT_KINDS, Work
from longctx.errors import HardwareError, MemoryLimitError
from longctx.schema import Positive, Range, decode, read_json

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Link:
    """What joins the devices of a node, or one node to others; full duplex, figures for one direction.

    bandwidth: bytes/s that one device sends at most; pair_bandwidth: bytes/s of it that any one receiver can be sent;
    efficiency: the fraction of them that large collectives reach; latency: seconds of one step of a collective.
    """

    bandwidth: Positive
    pair_bandwidth: Positive
    efficiency: Annotated[float, Range(above=0, at_most=1)]
    latency: Positive


@dataclass(frozen=True)
class Timing:
    """Measured seconds of a collective over n_ranks, at whole tensors' bytes in ascending order."""

    kind: Collective
    n_ranks: Annotated[int, Range(at_least=2)]
    whole_bytes: tuple[Annotated[int, Range(at_least=1)], ...]
    seconds: tuple[Positive, ...]


@dataclass(frozen=True)
class Rate:
    """What a kind of work reaches a second, and where the figure is from: 'measured, ...' or 'derived, ...'."""

    a_second: Positive
    source: str

    @property
    def is_measured(self) -> bool:
        return self.source.startswith("measured")


@dataclass(frozen=True)
class Hardware:
    """One device and its links.

    matrix_flops: dense bfloat16 (and float16) matrix rate at peak, FLOP/s; memory_bytes; rates: what each kind of work
    reaches; kernel_latency: seconds that a kernel takes however little it does; launch_latency: seconds that any
    collective takes before its first step; devices_per_node: that `node_link` joins; published_peak: whether
    matrix_flops is its maker's figure, by which MFU counts. `timings` are of measured profiles only.
    """

    name: str
    matrix_flops: Positive
    memory_bytes: Positive
    rates: dict[Work, Rate]
    kernel_latency: Positive
    launch_latency: Positive
    node_link: Link
    network: Link
    devices_per_node: Annotated[int, Range(at_least=1)] = 8
    published_peak: bool = True
    timings: tuple[Timing, ...] = ()

    def product_rate(self, work: Work, dtype: torch.dtype) -> float:
        """FLOP/s of products or attention in this dtype; in float32 attention is to products as on the H200."""
        if dtype != torch.float32 or work is Work.FLOAT32_PRODUCTS:
            return self.rates[work].a_second
        share = _H200_RATES[work].a_second / _H200_RATES[Work.PRODUCTS].a_second
        return self.rates[Work.FLOAT32_PRODUCTS].a_second * share

    def copy_seconds(self, work: Work, n_bytes: float) -> float:
        """Seconds of a kernel that reads and writes so many bytes; 0 if it has none, since then there is no kernel."""
        return n_bytes / self.rates[work].a_second + self.kernel_latency if n_bytes else 0.0

    def peak_rate(self, dtype: torch.dtype) -> float | None:
        """FLOP/s that MFU counts by: the datasheet's, for 16 bits; None for float32 and for CPUs, which have none."""
        return self.matrix_flops if self.published_peak and dtype != torch.float32 else None


# Sources.
# Peak rates, memory, link bandwidths: NVIDIA's A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 datasheets; AMD's
#   Instinct MI300X datasheet. Dense: the headline matrix rates, "with sparsity", are twice these. A datasheet's link
#   bandwidth counts both directions, and is twice these: NVLink 3, 4, 5 give 300, 450, 900 GB/s each way, all of it to
#   any one peer through NVSwitch; an MI300X has 7 xGMI links of 64 GB/s, one to each peer.
# node_link.efficiency: bus bandwidths of large ring collectives on 8 devices in github.com/stas00/ml-engineering,
#   network: A100 235 of 300; H200 363 of 450 (H100 has the same links); B200 682 of 900; MI300X 313 of 448 (48 of 64 on
#   two). NVLink SHARP makes all-reduce, and it alone, up to 1.3 times faster on H100 and later: not counted, a measured
#   profile knows.
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

# What one H200 reached with PyTorch 2.11 and cuDNN 9.19 on 28 November 2026, while it ran whole micro-batches of rank 0
# of 8 of Llama-3-8B: at that heat products run slower than in a test of their own (798 TFLOP/s, 8,192 cubed).
# Products: the linear layers together, at 131,072, 32,768 and 8,192 tokens: 758, 763, 754 TFLOP/s.
# Attention, 4 heads of 128 features: 566 forward and 524 backward at 131,072 tokens, 578 and 530 at 32,768, and 401
#   and 402 at 8,192, where a kernel is too short to fill the device.
# Copies: 4.2 TB/s; residual additions and SwiGLU's product ran at 4.4. Strided: RoPE's products on transposed heads and
#   the packing for all-to-all, 1.4 TB/s. FSDP's copies: the all-gathers' outputs 4.1, the reduce-scatters' inputs 2.1.
# The optimizer: fused AdamW of 268 million parameters.
# kernel_latency: what kernels of 8,192 tokens took beyond their bytes.
_H200_SOURCE = "measured, an H200, PyTorch 2.11, cuDNN 9.19"
_H200_RATES = {
    Work.PRODUCTS: Rate(758e12, f"{_H200_SOURCE}, in whole micro-batches"),
    Work.FLOAT32_PRODUCTS: Rate(51e12, f"{_H200_SOURCE}, 4,096 cubed"),
    Work.ATTENTION_FORWARD: Rate(570e12, f"{_H200_SOURCE}, in whole micro-batches"),
    Work.ATTENTION_BACKWARD: Rate(525e12, f"{_H200_SOURCE}, in whole micro-batches"),
    Work.COPIES: Rate(4.2e12, f"{_H200_SOURCE}, 2 GB"),
    Work.STRIDED: Rate(1.4e12, f"{_H200_SOURCE}, in whole micro-batches"),
    Work.FSDP_COPIES: Rate(2.6e12, f"{_H200_SOURCE}, in whole micro-batches"),
    Work.OPTIMIZER: Rate(3.4e12, f"{_H200_SOURCE}, 268 million parameters"),
}
KERNEL_LATENCY = 3e-6


def in_proportion(rates: dict[Work, Rate]) -> dict[Work, Rate]:
    """Rates of every kind, where only products' and copies' are known: the others as on the H200.

    Attention is slower than the known products, and other copies than the known ones, by as much as on the H200.
    """
    of = {work: Work.PRODUCTS if work in PRODUCT_KINDS else Work.COPIES for work in Work}
    derived = {
        work: Rate(
            rates[of[work]].a_second * rate.a_second / _H200_RATES[of[work]].a_second,
            f"derived from the {of[work]}, in the H200's proportion",
        )
        for work, rate in _H200_RATES.items()
    }
    return derived | rates


def _published(
    products: float, float32: float, copies: float, products_from: str, copies_from: str
) -> dict[Work, Rate]:
    """Rates of a device of which only these are published; float32's is taken to fall as short of its peak."""
    return in_proportion(
        {
            Work.PRODUCTS: Rate(products, products_from),
            Work.FLOAT32_PRODUCTS: Rate(float32, "derived from the peak, as far below it as the matrix products are"),
            Work.COPIES: Rate(copies, copies_from),
        }
    )


# products: "Maximum Achievable Matmul FLOPS" in github.com/stas00/ml-engineering, compute/accelerator: 271.2, 1745.0
#   and 668.4 TFLOP/s. Float32 is the CUDA cores' (MI300X: the matrix cores').
# copies: NVIDIA's datasheets, less what the H200's copy falls short of its own, 4.2 of 4.8 TB/s. MI300X: BabelStream
#   copy, 4.18 of 5.3 TB/s, in AMD's MI300X system validation guide.
_BOOK = "published, Maximum Achievable Matmul FLOPS"
_OF_DATASHEET = "derived from the datasheet, in the H200's proportion"
_A100_RATES = _published(271e12, 0.87 * 19.5e12, 2.039e12 * 4.2 / 4.8, _BOOK, _OF_DATASHEET)
_B200_RATES = _published(1745e12, 0.78 * 80e12, 8.0e12 * 4.2 / 4.8, _BOOK, _OF_DATASHEET)
_MI300X_RATES = _published(668e12, 0.51 * 163.4e12, 4.18e12, _BOOK, "published, AMD's BabelStream copy")
# The same chip as an H200's, with slower memory.
_OF_H200 = "derived from the H200, which has the same cores"
_H100_RATES = in_proportion(
    {
        **{work: Rate(_H200_RATES[work].a_second, _OF_H200) for work in PRODUCT_KINDS},
        Work.COPIES: Rate(3.35e12 * 4.2 / 4.8, _OF_DATASHEET),
    }
)

# One core, as torchrun gives each process one thread. Rough, and of one class only: what longctx/measure.py gave on a
# 2-core virtual machine of an AMD EPYC without bfloat16 instructions, its ranks joined by gloo over the loopback.
_LOOPBACK = Link(0.5e9, 0.5e9, 1.0, 300e-6)
_CPU_SOURCE = "measured, one core of an AMD EPYC, PyTorch 2.13"
_CPU_RATES = in_proportion(
    {
        Work.PRODUCTS: Rate(1.2e9, _CPU_SOURCE),
        Work.FLOAT32_PRODUCTS: Rate(65e9, _CPU_SOURCE),
        Work.ATTENTION_FORWARD: Rate(20e9, _CPU_SOURCE),
        Work.ATTENTION_BACKWARD: Rate(1.5e9, _CPU_SOURCE),
        Work.COPIES: Rate(10e9, _CPU_SOURCE),
        Work.STRIDED: Rate(8e9, _CPU_SOURCE),
    }
)

HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100", 989e12, 80e9, _H100_RATES, KERNEL_LATENCY, 8.4e-6, _NVLINK_4, _NETWORK_400G),
        Hardware("h200", 989e12, 141e9, _H200_RATES, KERNEL_LATENCY, 8.4e-6, _NVLINK_4, _NETWORK_400G),
        Hardware("a100", 312e12, 80e9, _A100_RATES, KERNEL_LATENCY, 8.4e-6, _NVLINK_3, _NETWORK_200G),
        Hardware("b200", 2250e12, 180e9, _B200_RATES, KERNEL_LATENCY, 8.4e-6, _NVLINK_5, _NETWORK_400G),
        Hardware("mi300x", 1307e12, 192e9, _MI300X_RATES, KERNEL_LATENCY, 8.4e-6, _XGMI, _NETWORK_400G),
        Hardware("cpu", 1.2e9, 8e9, _CPU_RATES, KERNEL_LATENCY, 300e-6, _LOOPBACK, _LOOPBACK, published_peak=False),
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
    gpu = here()
    return gpu and gpu.peak_rate(dtype)


def here() -> Hardware | None:
    """The table's entry for the GPU that is here; None where there is none, or it is not in the table."""
    return identify(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def check_memory_limit(name_or_path: str | None, limit: float) -> None:
    """Raises a MemoryLimitError if `limit` bytes are more than the named GPU has, or the one that is here.

    CPUs are left out: their entry has no card's memory.
    """
    gpu = here() if name_or_path is None else load(name_or_path)
    if gpu and gpu.published_peak and limit > gpu.memory_bytes:
        raise MemoryLimitError(f"the {gpu.name} that the plan is for has {gpu.memory_bytes / 1e9:g} GB")


def load(name_or_path: str | None) -> Hardware:
    """The hardware of a table's name or a measured profile's file; of None, the GPU that is here, else the H100.

    Raises:
        HardwareError: it is neither; the message lists the names.
    """
    if name_or_path is None:
        return here() or HARDWARE["h100"]
    if name_or_path.lower() in HARDWARE:
        return HARDWARE[name_or_path.lower()]
    names = ", ".join(sorted(HARDWARE))
    path = Path(name_or_path)
    if not path.is_file():
        raise HardwareError(f"it is neither a profile's file nor one of {names}")
    try:
        return _read_profile(path)
    except ValueError as error:
        written_by = "python -m longctx.measure"
        raise HardwareError(f"it is no profile that {written_by} wrote ({error}), nor one of {names}") from error


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


def passing_seconds(hardware: Hardware, n_bytes: float, n_ranks: int) -> float:
    """Seconds in which each of n_ranks devices, the first of them filling a node, sends so many bytes to the next one.

    The slowest link between two of them sets the pace, and one adapter alone carries what goes from a node to the next.
    """
    if n_ranks == 1:
        return 0.0
    link = hardware.network if n_ranks > hardware.devices_per_node else hardware.node_link
    return hardware.launch_latency + link.latency + n_bytes / _rate(link, 1)


def passed_bytes(hardware: Hardware, n_bytes: float, n_ranks: int) -> tuple[float, float]:
    """Of the bytes that a device sends to the next one, those over its node's links, and over the network; of n_ranks
    the average, since the last one of each node sends all to another."""
    in_node = min(n_ranks, hardware.devices_per_node)
    share = 1 / in_node if n_ranks > in_node else 0.0
    return n_bytes * (1 - share), n_bytes * share


_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}  # round a ring


def sent_bytes(hardware: Hardware, kind: str, whole_bytes: float, n_ranks: int) -> tuple[float, float]:
    """The bytes that a device sends in a collective over its node's links, and over the network.

    In a ring each rank sends N (n - 1) / n bytes, and for an all-reduce twice that: the bus bandwidth factors of
    nccl-tests, doc/PERFORMANCE.md. Across nodes there are as many rings as devices in a node, each crossing over
    another device's adapter, so an adapter carries that share of the bytes. All-to-all sends N / n^2 bytes to each
    other rank.
    """
    if n_ranks == 1:
        return 0.0, 0.0
    in_node = min(n_ranks, hardware.devices_per_node)
    if kind == "all_to_all":
        to_each = whole_bytes / n_ranks**2
        return to_each * (in_node - 1), to_each * (n_ranks - in_node)
    sent = _PASSES[kind] * whole_bytes * (n_ranks - 1) / n_ranks
    return sent if in_node > 1 else 0.0, sent / in_node if n_ranks > in_node else 0.0


def _modelled_seconds(hardware: Hardware, kind: str, whole_bytes: float, n_ranks: int) -> float:
    """Launch, the steps' latencies, and the bytes over the slowest link that they cross.

    A ring takes n - 1 steps, and for an all-reduce twice as many; nodes - 1 of them are between nodes (NCCL,
    src/graph/tuning.cc). All-to-all sends all at once.
    """
    in_node = min(n_ranks, hardware.devices_per_node)
    n_nodes = -(-n_ranks // hardware.devices_per_node)
    node_bytes, network_bytes = sent_bytes(hardware, kind, whole_bytes, n_ranks)
    if kind == "all_to_all":
        node_steps, network_steps = 1, min(n_nodes - 1, 1)
    else:
        passes = _PASSES[kind]
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


@dataclass(frozen=True)
class _Profile:
    """What is read of a profile's file."""

    hardware: Hardware


def _read_profile(file: Path) -> Hardware:
    """Raises a ValueError that says where the file is not as longctx/measure.py writes it."""
    facts = read_json(file)
    if isinstance(facts, dict) and "matrix_efficiency" in (facts.get("hardware") or ()):
        raise HardwareError(
            "it is an older profile, without rates by kind of work; write it anew with python -m longctx.measure"
        )
    hardware = decode(_Profile, facts).hardware
    if missing := set(Work) - set(hardware.rates):
        raise ValueError(f"hardware.rates.{min(missing)} is missing")
    for timing in hardware.timings:
        sizes = timing.whole_bytes
        if not sizes or len(sizes) != len(timing.seconds) or list(sizes) != sorted(set(sizes)):
            raise ValueError(
                f"hardware.timings: {timing.kind} over {timing.n_ranks} has no seconds for ascending sizes"
            )
    return hardware
