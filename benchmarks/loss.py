"""Compares the chunked loss with its peers: time, memory and error of forward + backward, in one interleaved run.

    python benchmarks/loss.py
    python benchmarks/loss.py --tokens 16384 --hidden 4096 --vocab 128256 --dtype bfloat16 --chunk_size 1024 4096

Peers: the reference program's loop of checkpointed chunks, PyTorch's own linear_cross_entropy, and on a GPU, where they
are installed, Liger's fused linear cross entropy (liger_kernel) and Apple's cut cross entropy (cut_cross_entropy).
Writes a table and, if matplotlib is installed, a plot to benchmarks/results/.
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from chunk_linear_cross_entropy import chunk_linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DISTURBED = 0.05  # a timed run is made again if other processes take more than this part of the CPUs


@dataclasses.dataclass
class Peer:
    """A summed loss of hidden [t, d], weight [n, d] and labels [t], and what was measured of it."""

    name: str
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    tokens: int = 0  # of a run
    seconds: list[float] = dataclasses.field(default_factory=list)  # scaled to all tokens
    disturbance: float = 0.0  # the most that other processes took of the CPUs in those seconds
    peak_bytes: int = 0  # above the inputs and their gradients
    errors: Sequence[float] = ()  # of the loss, the hidden states' gradient and the weight's


def ours(hidden, weight, labels, chunk_size):
    return chunk_linear_cross_entropy(hidden[None], weight, labels[None], chunk_size=chunk_size).sum()


def checkpointed_loop(hidden, weight, labels, chunk_size):
    """The reference program's: whole chunks of logits, made again in the backward pass."""

    def chunk_losses(hidden, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    return torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def float32_loop(hidden, weight, labels, chunk_size):
    return checkpointed_loop(hidden.float(), weight.float(), labels, chunk_size)


def pytorchs(hidden, weight, labels, chunk_size):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size)
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def make_peers(dtype, chunk_sizes):
    """Ours with every chunk size, then the peers that this machine has."""
    peers = [Peer(f"ours, chunks of {c:,}", functools.partial(ours, chunk_size=c)) for c in chunk_sizes]
    peers.append(Peer("checkpointed loop, chunks of 1,024", functools.partial(checkpointed_loop, chunk_size=1024)))
    if DEVICE == "cpu" and dtype != torch.float32:
        peers.append(Peer("checkpointed loop of float32 copies", functools.partial(float32_loop, chunk_size=1024)))
    if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
        peers.append(Peer("PyTorch's linear_cross_entropy", functools.partial(pytorchs, chunk_size=None)))
        peers.append(Peer("PyTorch's, chunks of 1,024", functools.partial(pytorchs, chunk_size=1024)))
    if DEVICE == "cuda":
        peers += gpu_peers()
    return peers


def gpu_peers():
    peers = []
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        peers.append(Peer("Liger's fused", lambda hidden, weight, labels: liger(weight, hidden, labels)))
    except ImportError:
        print("liger_kernel is not installed: left out")
    try:
        from cut_cross_entropy import linear_cross_entropy

        peers.append(Peer("Apple's cut", functools.partial(linear_cross_entropy, reduction="sum")))
    except ImportError:
        print("cut_cross_entropy is not installed: left out")
    return peers


def make_inputs(tokens, hidden_size, vocab, dtype):
    """Logits of standard deviation 2, as trained models have them, and labels of which all count."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=DEVICE).to(dtype)
    weight = torch.randn(vocab, hidden_size, device=DEVICE).mul_(2 / hidden_size**0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@functools.lru_cache(maxsize=1)
def float64_results(hidden, weight, labels):
    """The loss and both gradients by the plain formula, a few tokens at a time."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = 0.0
    for part, part_labels in zip(hidden.split(256), labels.split(256), strict=True):
        part_loss = F.cross_entropy(part @ weight.T, part_labels, reduction="sum")
        part_loss.backward()
        loss += part_loss.item()
    return torch.tensor(loss, dtype=torch.float64, device=DEVICE), hidden.grad, weight.grad


def run(peer, hidden, weight, labels):
    """Seconds of one forward + backward, and the loss; gradients are left in .grad."""
    hidden.grad = weight.grad = None
    synchronize()
    start = time.perf_counter()
    loss = peer.loss(hidden, weight, labels)
    loss.backward()
    synchronize()
    return time.perf_counter() - start, loss.detach()


def run_undisturbed(peer, hidden, weight, labels, attempts=2):
    """Adds a run to a peer's measurements: the first that other processes leave alone, or else the least disturbed."""
    runs = []
    while len(runs) < attempts and not (runs and runs[-1][0] <= DISTURBED):
        others_before = cpu_seconds_of_others()
        seconds, _ = run(peer, hidden, weight, labels)
        others = cpu_seconds_of_others() - others_before
        runs.append((max(0.0, others) / (seconds * (os.cpu_count() or 1)), seconds))
    disturbance, seconds = min(runs)
    peer.seconds.append(seconds)
    peer.disturbance = max(peer.disturbance, disturbance)


def cpu_seconds_of_others():
    """CPU time since the machine started that was not this process's, what its host took from it included."""
    user, nice, system, _, _, *interrupts_and_steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ticks = user + nice + system + sum(interrupts_and_steal)
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def memory_in_use(reset_peak=False):
    """Bytes in use, and the most since the last reset, by the GPU's allocator or by this process as Linux counts."""
    gc.collect()
    if DEVICE == "cuda":
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if reset_peak:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def measure_peak_and_errors(peer, hidden, weight, labels):
    """The first full run of a peer. Returns its seconds."""
    hidden.grad = weight.grad = None
    before, _ = memory_in_use(reset_peak=True)
    seconds, loss = run(peer, hidden, weight, labels)
    _, peak = memory_in_use()
    gradients = [x.grad for x in (hidden, weight)]
    peer.peak_bytes = peak - before - sum(x.numel() * x.element_size() for x in gradients)
    exact = float64_results(hidden, weight, labels)
    peer.errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip((loss, *gradients), exact, strict=True)]
    return seconds


def compare(dtype, options):
    """Peers with their measurements."""
    inputs = make_inputs(options.tokens, options.hidden, options.vocab, dtype)
    hidden, weight, labels = inputs
    peers = [peer for peer in make_peers(dtype, options.chunk_size) if peer.name not in options.without]
    for peer in peers:
        few = max(1, options.tokens // 64)
        expected_s = run(peer, hidden.detach()[:few].requires_grad_(), weight, labels[:few])[0] * options.tokens / few
        peer.tokens = options.tokens
        # Times of fewer tokens than these would mislead: every chunk costs a pass over the weight's gradient.
        while expected_s * peer.tokens / options.tokens > options.longest_s and peer.tokens > 4 * few:
            peer.tokens //= 2
    for tokens in sorted({peer.tokens for peer in peers}):
        part = hidden.detach()[:tokens].requires_grad_(), weight, labels[:tokens]
        for peer in peers:
            if peer.tokens == tokens:
                seconds = measure_peak_and_errors(peer, *part)
                print(f"{dtype} {peer.name}: {tokens:,} tokens in {seconds:.2f} s", flush=True)
                if tokens < options.tokens:
                    peer.seconds = [seconds * options.tokens / tokens]
    for _ in range(options.repeats):
        for peer in peers:
            if peer.tokens == options.tokens:
                run_undisturbed(peer, *inputs)
    return peers


def machine_name():
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


def table(peers, options):
    """Markdown; "times ours" is of the first chunk size."""
    lines = [
        "| | seconds | spread | times ours | peak MB | error of loss | of hidden gradient | of weight gradient |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in peers:
        median = statistics.median(peer.seconds)
        spread, peak = f"{min(peer.seconds):.2f}-{max(peer.seconds):.2f}", f"{peer.peak_bytes / 1e6:,.0f}"
        if peer.tokens < options.tokens:
            spread, peak = f"scaled from {peer.tokens:,} tokens", f"{peak} at {peer.tokens:,} tokens"
        cells = [peer.name, f"{median:.2f}", spread, f"{median / statistics.median(peers[0].seconds):.2f}", peak]
        lines.append("| " + " | ".join(cells + [f"{error:.1e}" for error in peer.errors]) + " |")
    return "\n".join(lines) + "\n"


def plot(peers, options, title, path):
    """Time against memory; what was scaled is left out."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 5))
    whole = [peer for peer in peers if peer.tokens == options.tokens]
    for peer in whole:
        place = peer.peak_bytes / 1e6, statistics.median(peer.seconds)
        panel.plot(*place, "o", color="C0" if peer.name.startswith("ours") else "C1")
        panel.annotate(peer.name, place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    panel.set(xlabel="peak memory above inputs and gradients, MB", ylabel="forward + backward, s")
    panel.set_xlim(0, 1.5 * max((peer.peak_bytes for peer in whole), default=1) / 1e6)
    panel.set_ylim(0, 1.15 * max((statistics.median(peer.seconds) for peer in whole), default=1))
    panel.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_arguments():
    on_gpu = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 4096)
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    parser.add_argument("--chunk_size", type=int, nargs="+", default=[1024, 256, 4096], help="of ours")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out, by name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest_s", type=float, default=200, help="what would take longer runs fewer tokens, once")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main():
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    machine = machine_name()
    for dtype in options.dtype:
        peers = compare(getattr(torch, dtype), options)
        size = f"{options.tokens:,} tokens, hidden size {options.hidden:,}, vocabulary {options.vocab:,}"
        # Which instructions a CPU has decides how fast it multiplies bfloat16.
        instructions = "" if DEVICE == "cuda" else f" with {torch.backends.cpu.get_cpu_capability()}"
        title = f"Loss, forward + backward, {dtype}: {size}; {machine}{instructions}, PyTorch {torch.__version__}"
        text = (
            f"# {title}\n\nMedian and range of {options.repeats} runs, peers in turn; in none did other processes take "
            f"more than {max(peer.disturbance for peer in peers):.0%} of the CPUs. Peak memory is above the inputs and "
            "their gradients. Errors are relative, of norms, against float64.\n\n"
        ) + table(peers, options)
        print(text)
        path = options.output / f"loss_{re.sub('[^a-z0-9]+', '_', machine.lower())}_{dtype}.md"
        path.write_text(text)
        try:
            plot(peers, options, title, path.with_suffix(".png"))
        except ImportError:
            print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
