"""The loss of one rank against its peers, which are those of benchmarks/loss.py: time, memory, and errors."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import loss as benchmark
from benchmarks.gpu_parts.measuring import Sizes, kernel_table, sizes, timed_row
from benchmarks.gpu_parts.results import LeftOut, Measurement, Row

OUR_CHUNKS = [512, 1024, 2048, 4096]
ON_GPUS = ("Liger's fused", "Apple's cut")  # peers that are packages for a GPU


def measurements(small: bool, folder: Path) -> Iterator[Measurement]:
    size = sizes(small)
    inputs = benchmark.make_inputs(size.tokens, size.hidden, size.vocab, torch.bfloat16)
    peers = benchmark.make_peers(torch.bfloat16, OUR_CHUNKS)
    peers.append(benchmark.Peer("cross_entropy of all logits at once", all_at_once))
    for peer in peers:
        yield Measurement(f"loss, {peer.name}", partial(peer_rows, peer, inputs, size))
    for name in sorted(set(ON_GPUS) - {peer.name for peer in peers}):
        yield Measurement(f"loss, {name}", not_here)


def all_at_once(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual way, which holds every token's logits in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def peer_rows(peer: benchmark.Peer, inputs: tuple[torch.Tensor, ...], size: Sizes) -> list[Row]:
    """Forward and backward. FLOPs are those of three products, so that the rates of all peers compare."""
    hidden, weight, labels = inputs

    def both() -> None:
        hidden.grad = weight.grad = None
        peer.loss(hidden, weight, labels).backward()

    try:
        benchmark.measure_peak_and_errors(peer, *inputs)
        flops = 3 * 2 * size.tokens * size.hidden * size.vocab
        row = timed_row(f"loss, {peer.name}", both, flops, detail=kernel_table(both, 14))
    except torch.OutOfMemoryError as error:
        raise LeftOut("it does not fit in this GPU's memory") from error
    of_loss, of_hidden, of_weight = peer.errors
    note = f"errors against float64: loss {of_loss:.1e}, dhidden {of_hidden:.1e}, dweight {of_weight:.1e}"
    return [replace(row, peak_gb=peer.peak_bytes / 1e9, note=note)]


def not_here() -> list[Row]:
    raise LeftOut("the package is not installed, or there is no GPU")
