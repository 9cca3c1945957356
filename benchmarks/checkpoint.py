"""What a checkpoint costs: training's stall, and the rates of saving, verifying, loading and merging, beside a copy's.

    python benchmarks/checkpoint.py                      # 100 million parameters: 1.2 GB a checkpoint
    python benchmarks/checkpoint.py --millions 1000 --folder /mnt/disk --output record.md

Everything runs on one rank, on a CPU, each measurement in a process of its own, in turns: the median of all turns is
shown. The copy is one file of as many bytes as a checkpoint has, read from the page cache and synced to the disk, as
every checkpoint is. Memory is what a process takes beside what it had before, without the pages of files that it maps.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from longctx.atomic import sync
from longctx.data.order import Position
from longctx.engines.checkpoints import FORMATS
from longctx.job import Job
from longctx.runtime import checkpoint, merge, parallel, trainer
from longctx.runtime.saving import Saver
from longctx.runtime.storage import ClosedReader

WIDTH = 1000  # a layer has as many inputs, and as many outputs: a million parameters


@dataclass(frozen=True)
class Measured:
    """A measurement: seconds, and the bytes of memory that it took at its peak."""

    seconds: float
    memory: int


# --- measuring -------------------------------------------------------------------------------------------------------


def own_memory() -> int:
    """Bytes of memory that are this process's own: no pages of files."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon", "RssShmem")))


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that returns by how many bytes `own_memory` has grown at most, as a thread sees it."""
    before, peak, ended = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, own_memory() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(peak, own_memory() - before)
    finally:
        ended.set()
        thread.join()


def measure(function: Callable[[], None]) -> Measured:
    with peak_memory() as peak:
        began = time.perf_counter()
        function()
        return Measured(time.perf_counter() - began, peak())


def in_a_process(function: Callable[..., list[Measured]], *args) -> list[Measured]:
    """What a function measures, in a process that has imported all that it needs and done nothing yet."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(writer, function, args))
    process.start()
    writer.close()
    try:
        return reader.recv()
    except EOFError:
        raise SystemExit("checkpoint.py: error: a measurement has failed; its traceback is above") from None
    finally:
        process.join()


def _send(writer, function: Callable[..., list[Measured]], args: tuple) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    writer.send(function(*args))


# --- what is measured ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training(millions: int, folder: Path) -> Iterator[tuple[Job, parallel.ParallelModel, torch.optim.Optimizer]]:
    """A model of so many million parameters, and its optimizer, whose values are random."""
    names = {"model_id": "none", "sequence_length": 1, "runtime_ngpus": 1, "name": "none"}
    job = Job(**names, checkpoint_dir=folder)
    with parallel.process_group("cpu") as device:
        with torch.device("meta"):
            layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(millions)))
        model = parallel.parallelize(layers, "", device, torch.float32)
        optimizer = trainer.make_optimizer(model, job)
        for tensor in checkpoint.tensors_of(model, optimizer).values():
            if tensor.is_floating_point():
                parallel.local(tensor).uniform_()
        yield job, model, optimizer


def state_of(model: parallel.ParallelModel, step: int) -> checkpoint.State:
    return checkpoint.State(Position(step, 0, 0), 0, 8, 1, 1, checkpoint.parameter_shapes(model))


def write_no_files(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def save_and_wait(millions: int, folder: Path) -> list[Measured]:
    with training(millions, folder) as (job, model, optimizer):
        saver = Saver(job, model, optimizer, write_no_files)

        def save() -> None:
            saver.save(state_of(model, 1))
            saver.finish()

        return [measure(save)]


def save_while_training(millions: int, folder: Path) -> list[Measured]:
    """Two saves: the first makes the copies, the second finds them there. The stall of each, and the second in all."""
    with training(millions, folder) as (job, model, optimizer):
        saver = Saver(job, model, optimizer, write_no_files)
        with peak_memory() as peak:
            first = measure(lambda: saver.save(state_of(model, 1)))
            saver.wait()
            began = time.perf_counter()
            second = measure(lambda: saver.save(state_of(model, 2)))
            saver.wait()
            return [first, second, Measured(time.perf_counter() - began, peak())]


def verify(folder: Path) -> list[Measured]:
    return [measure(lambda: checkpoint.check(folder / checkpoint.LAST, compare_digests=True))]


def load(millions: int, folder: Path) -> list[Measured]:
    with training(millions, folder) as (_, model, optimizer):
        stored = checkpoint.read(folder / checkpoint.LAST, FORMATS)
        return [measure(lambda: checkpoint.load(stored, model, optimizer))]


def merge_by_slices(folder: Path, output: Path) -> list[Measured]:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return [measure(lambda: merge.merge(checkpoint.read(folder / checkpoint.LAST, FORMATS), output))]


def load_all_and_save(folder: Path, output: Path) -> list[Measured]:
    """What merging is without a bound of memory: all tensors are read, and torch.save writes them."""

    def merge_all() -> None:
        reader = ClosedReader(folder / checkpoint.LAST)
        stored = dict(merge.stored_tensors(reader))
        tensors = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in stored.items()}
        checkpoint.read_shards(reader, tensors, no_dist=True)
        torch.save(tensors, output)
        sync(output)

    return [measure(merge_all)]


def copy(source: Path, target: Path) -> list[Measured]:
    def copy_and_sync() -> None:
        shutil.copyfile(source, target)
        sync(target)

    return [measure(copy_and_sync)]


def measure_all(millions: int, place: Path) -> dict[str, Measured]:
    """One turn: every measurement once, on files that are removed after it."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        folder = Path(folder)
        [saved] = in_a_process(save_and_wait, millions, folder / "waited")
        [first, again, sealed] = in_a_process(save_while_training, millions, folder / "asynchronous")
        shutil.rmtree(folder / "asynchronous")
        shard = folder / "waited" / checkpoint.LAST / "__0_0.distcp"
        [copied] = in_a_process(copy, shard, folder / "copy")
        (folder / "copy").unlink()
        [verified] = in_a_process(verify, folder / "waited")
        [loaded] = in_a_process(load, millions, folder / "waited")
        [merged] = in_a_process(merge_by_slices, folder / "waited", folder / "merged")
        (folder / "merged").unlink()
        [all_saved] = in_a_process(load_all_and_save, folder / "waited", folder / "all")
    return {
        "a plain copy": copied,
        "a save that training waits for": saved,
        "the stall of an asynchronous save, the first": first,
        "the stall of the next, whose copies are there": again,
        "an asynchronous save until it is sealed": sealed,
        "verifying": verified,
        "loading": loaded,
        "merging": merged,
        "loading all and torch.save": all_saved,
    }


# --- the record ------------------------------------------------------------------------------------------------------


def table(turns: list[dict[str, Measured]], n_bytes: float) -> str:
    lines = ["| | s | MB/s | times a copy | memory, GB |", "| --- | ---: | ---: | ---: | ---: |"]
    seconds = {name: statistics.median(turn[name].seconds for turn in turns) for name in turns[0]}
    for name, median in seconds.items():
        memory = statistics.median(turn[name].memory for turn in turns) / 1e9
        ratio = median / seconds["a plain copy"]
        lines.append(f"| {name} | {median:.2f} | {n_bytes / median / 1e6:,.0f} | {ratio:.2f} | {memory:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=100, help="of parameters, 12 bytes each with AdamW's moments")
    parser.add_argument("--runs", type=int, default=5, help="turns, of which the median is taken")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of the disk to measure")
    parser.add_argument("--output", type=Path, help="a Markdown file to write the table to, too")
    args = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    turns = [measure_all(args.millions, args.folder) for _ in range(args.runs)]
    n_bytes = 12e6 * args.millions
    text = (
        f"A checkpoint of {n_bytes / 1e9:.3g} GB on one rank, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"PyTorch {torch.__version__}; medians of {args.runs} turns, with a load of {load_before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after.\n\n{table(turns, n_bytes)}\n"
    )
    print(text)
    if args.output:
        command = shlex.join(["python", "benchmarks/checkpoint.py", *(sys.argv[1:] if argv is None else argv)])
        args.output.write_text(f"# What a checkpoint costs\n\n    {command}\n\n{text}")


if __name__ == "__main__":
    main()
