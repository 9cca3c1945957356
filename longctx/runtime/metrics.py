"""What a run says of itself: a progress bar, TensorBoard, one JSON line a step; throughput, MFU and memory."""

import errno
import itertools
import json
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longctx.atomic import whole_file
from longctx.data.order import Position
from longctx.errors import LogError, one_line
from longctx.flops import step_flops
from longctx.job import Job


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken."""

    start: Position  # from which it was taken
    rows: list[int]
    learning_rate: float
    loss: float  # per token whose label counts
    grad_norm: float  # before clipping
    seconds: float


@dataclass(frozen=True)
class StepMetrics:
    """What is logged of a step, over all ranks."""

    step: int
    epoch: int
    loss: float  # per token whose label counts
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    seconds: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    mfu: float | None  # attention counted whole, as the reference counts it; None where the peak is not known
    mfu_causal: float | None  # of attention what its mask leaves
    peak_memory_gb: float  # this rank's, 1e9 bytes: of tensors on a GPU, of the process on a CPU
    peak_reserved_gb: float | None  # what a GPU's allocator took for those tensors; None on a CPU
    save_stalled_s: float | None = None  # that training stood still for a checkpoint, between this step and the last
    save_sealed_s: float | None = None  # that one took to be written whole, if it was done since the step before


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one row's forward pass, and what the device can do in a second."""

    whole: float
    causal: float
    peak_per_s: float | None


def step_metrics(step: Step, job: Job, flops: FlopCount) -> StepMetrics:
    """Throughput and MFU of a step."""
    n_rows, n_ranks = len(step.rows), job.runtime_ngpus
    tokens_per_s = n_rows * job.sequence_length / step.seconds
    peak = flops.peak_per_s and flops.peak_per_s * n_ranks * step.seconds
    return StepMetrics(
        step=step.start.step + 1,
        epoch=step.start.epoch,
        loss=step.loss,
        grad_norm=step.grad_norm,
        learning_rate=step.learning_rate,
        tokens=n_rows * job.sequence_length,
        seconds=step.seconds,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / n_ranks,
        mfu=n_rows * step_flops(flops.whole) / peak if peak else None,
        mfu_causal=n_rows * step_flops(flops.causal) / peak if peak else None,
        peak_memory_gb=peak_memory_bytes(job.device) / 1e9,
        peak_reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if job.device == "cuda" else None,
    )


def peak_memory_bytes(device: str) -> int:
    """The most this process has held: in tensors on the GPU, if it runs on one, else in memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class MetricsLog:
    """Where rank 0 reports; `write` takes one step's metrics. What can't be written is said once, and left out."""

    bar: tqdm
    board: Any  # a SummaryWriter, which is slow to import
    lines: FileIO
    failed: set[str] = field(default_factory=set)  # what has been said

    def write_skipped(self, position: Position, rows: list[int]) -> None:
        """Reports rows of the step from `position` that are left out."""
        number = position.step + 1
        with self.leaving_out(METRICS):
            append_line(self.lines, json.dumps({"step": number, "epoch": position.epoch, "skipped_rows": rows}))
        self.bar.write(f"step {number}: rows {', '.join(map(str, rows))} of the dataset are left out")
        self.bar.update(number - self.bar.n)

    def write(self, metrics: StepMetrics) -> None:
        with self.leaving_out(METRICS):
            append_line(self.lines, json.dumps(asdict(metrics)))
        with self.leaving_out("TensorBoard's file"):
            for name, value in asdict(metrics).items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"train/{name}", value, metrics.step)
        mfu = {} if metrics.mfu is None else {"mfu": f"{metrics.mfu:.1%}", "causal": f"{metrics.mfu_causal:.1%}"}
        shown = {
            "loss": f"{metrics.loss:.4f}",
            "grad_norm": f"{metrics.grad_norm:.3g}",
            "tok_s": f"{metrics.tokens_per_s:,.0f}",
            **mfu,
            "mem": f"{metrics.peak_memory_gb:.1f}GB",
        }
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(metrics.step - self.bar.n)

    @contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name not in self.failed:
                self.bar.write(f"run: {name} can't be written ({one_line(error)}); training goes on without it")
            self.failed.add(name)


def append_line(file: FileIO, line: str) -> None:
    """Appends a whole line, or nothing.

    Raises:
        OSError: it can't be written, or the file is in no folder any more.
    """
    if os.fstat(file.fileno()).st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, "it has been removed")
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(f"{line}\n".encode())
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


METRICS = "metrics.jsonl"


def check_log(folder: Path, resuming: bool) -> None:
    """Raises a LogError if a run that is resumed could not go on with the metrics that are there without losing any.

    Resuming rewrites the file without the steps that are to be taken again, and without a last line that a kill cut
    short. A line that describes no step was written by somebody else, and then the file is left alone.
    """
    file = folder / METRICS
    if file.exists() and not file.is_file():
        raise LogError(f"{file} is no file")
    if not (resuming and file.is_file()):
        return  # a run that starts anew renames the file
    for number, line in enumerate(_whole_lines(file), start=1):
        if _step_of(line) is None:
            raise LogError(
                f"line {number} of {file} is not one that a run wrote, and resuming would lose it; move the file"
            )


@contextmanager
def metrics_log(folder: Path, first_step: int, total_steps: int) -> Iterator[MetricsLog]:
    """Opens the bar, TensorBoard events and metrics.jsonl in `folder`.

    Steps after `first_step`, of a run that this one takes over from, are dropped from both. A run that starts from step
    0 takes over from none: the file of the one before it stays, as metrics.<number>.jsonl.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / METRICS
    if file.is_file() and first_step == 0:
        numbered = (folder / f"metrics.{number}.jsonl" for number in itertools.count(1))
        kept_as = next(name for name in numbered if not name.exists())
        file.rename(kept_as)
        print(f"run: the metrics of the run before are in {kept_as}", flush=True)
    elif file.is_file():
        drop_steps_after(first_step, file)
    bar = tqdm(initial=first_step, total=total_steps, unit="step", desc="training", dynamic_ncols=True)
    board = SummaryWriter(str(folder), purge_step=first_step + 1)
    with bar, file.open("ab", buffering=0) as lines, _without_tensorboards_tracebacks():
        try:
            yield MetricsLog(bar, board, lines)
        finally:
            with suppress(OSError):
                board.close()


@contextmanager
def _without_tensorboards_tracebacks() -> Iterator[None]:
    """TensorBoard's thread hands its errors to whoever writes next, which is enough: they are no traceback's matter."""
    before = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not (type(error.thread).__module__.startswith("tensorboard.") and isinstance(error.exc_value, OSError)):
            before(error)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def drop_steps_after(last_step: int, file: Path) -> None:
    """Rewrites a metrics.jsonl without its later steps, and without a last line that a kill cut short."""
    kept = [line for line in _whole_lines(file) if (step := _step_of(line)) is None or step <= last_step]
    with whole_file(file) as aside:
        aside.write_text("".join(f"{line}\n" for line in kept))


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file that end in a newline."""
    return file.read_text(errors="replace").split("\n")[:-1]


def _step_of(line: str) -> int | None:
    """The step of a line of metrics.jsonl; None of a line of something else."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
