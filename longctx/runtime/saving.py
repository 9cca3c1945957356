"""Saving while training goes on: tensors are copied to the host's memory, and a thread writes the copies to disk.

Training stands still for the copies alone, which are pinned where they come from a GPU, and kept for the next save: of
each rank's own part of weights and optimizer, the host's memory holds one. The ranks' threads talk to each other by a
process group of their own (gloo), beside training's.

A save that fails is said at once, on all ranks alike, and the next is tried when it is due.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import AsyncStager
from tqdm import tqdm

from longctx.errors import NoRoom, NotFinite, SaveError
from longctx.job import Job
from longctx.runtime import checkpoint, watch, writing
from longctx.runtime.parallel import ParallelModel, first_of_all_ranks, local
from longctx.seal import files_in

SAVE_TIMEOUT = timedelta(hours=2)  # that ranks wait for the slowest of them to write its part


@dataclass(frozen=True)
class Outcome:
    """What became of a save. `problem`: why it failed, the same on every rank; None if it is sealed."""

    state: checkpoint.State
    problem: str | None = None


class HostCopies(AsyncStager):
    """Copies tensors to the host's memory, which is kept from save to save, as DefaultStager's in PyTorch 2.11 is not.

    Args:
        device_type: of the tensors. From a GPU they are copied to pinned memory, all at once.
    """

    _synchronize_after_execute = False  # the copies are there when `stage` returns

    def __init__(self, device_type: str):
        # Not above: nnScaler's PyTorch 2.6, which has none, imports this module and makes no such object.
        from torch.distributed.checkpoint._state_dict_stager import StateDictStager

        self.is_gpu = device_type == "cuda"
        self.copies = StateDictStager(pin_memory=self.is_gpu)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        staged = self.copies.stage(state_dict, non_blocking=self.is_gpu)
        if self.is_gpu:
            torch.cuda.synchronize()
        return staged


class Saver:
    """Saves checkpoints of a model and its optimizer, one at a time. All ranks have to call the same.

    Args:
        save_hf_files: writes the model's configuration and tokenizer to a folder. It is called here and never again: in
            a thread it would hold up training, and what it reads may be gone by then.
    """

    def __init__(
        self,
        job: Job,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        save_hf_files: Callable[[Path], None],
    ):
        self.job, self.model, self.optimizer = job, model, optimizer
        self.write_hf_files = remember_files(save_hf_files) if dist.get_rank() == 0 else save_hf_files
        group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every rank is in a group of all"
        self.group = group
        self.stager = HostCopies(model.mesh.device_type)
        self.under_way: Future[Outcome] | None = None
        self.sealed: checkpoint.State | None = None  # what the newest that is whole is of
        self.stalled_s: float | None = None  # of the save that was begun since `take_seconds`
        self.sealed_s: float | None = None  # of the one that was sealed since then

    def save(self, state: checkpoint.State) -> None:
        """Begins to save what model and optimizer hold now, once the save before is done.

        Raises:
            NotFinite: a value is not finite, on some rank. All ranks raise it, and nothing is written.
            SaveError: the save before has failed, and the job is to stop then.
        """
        if self.under_way and not self.under_way.done():
            say(f"step {state.position.step}: waits for the checkpoint before, which is still being written")
        self.wait()
        began = time.perf_counter()
        tensors = checkpoint.tensors_of(self.model, self.optimizer)
        check_all_finite(tensors, state.position.step)
        upload = dcp.async_save(
            tensors,
            storage_writer=writing.CheckpointWriter(
                self.job.checkpoint_dir, state, self.write_hf_files, self.job.keep_last_n
            ),
            planner=writing.make_save_planner(),
            process_group=self.group,
            async_stager=self.stager,
        )
        assert isinstance(upload, Future), "it is another object only where staging goes on in a thread"
        self.stalled_s = stalled_s = time.perf_counter() - began
        self.under_way = after(upload, lambda done: self._conclude(done, state, began, stalled_s))

    def _conclude(self, upload: Future, state: checkpoint.State, began: float, stalled_s: float) -> Outcome:
        """What the thread does at the end of a save: says how it went."""
        seconds = time.perf_counter() - began
        error = upload.exception()
        step, name = state.position.step, checkpoint.folder_name(state.position)
        if error is None:
            self.sealed, self.sealed_s = state, seconds
            path = self.job.checkpoint_dir / name
            say(f"step {step}: saved {path} in {seconds:.1f} s, for {stalled_s:.2f} of which training stood still")
            return Outcome(state)
        if dist.get_rank() == 0:
            writing.discard(self.job.checkpoint_dir, name, error)
        problem = writing.why_not_saved(error)
        if self.job.stop_on_save_failure:
            say(f"step {step}: the checkpoint could not be saved ({problem}); the run ends")
            watch.ask_to_stop("a checkpoint that could not be saved")
        else:
            say(f"step {step}: the checkpoint could not be saved ({problem}); training goes on without it")
        return Outcome(state, problem)

    def wait(self) -> Outcome | None:
        """Waits for the save that is under way, if one is; returns what became of the last one.

        Raises:
            SaveError: it has failed, and the job is to stop then.
        """
        end = time.monotonic() + SAVE_TIMEOUT.total_seconds()
        while self.under_way and not self.under_way.done() and time.monotonic() < end:
            futures.wait([self.under_way], timeout=1.0)
            watch.progress()  # a slow disk is no process that hangs
        outcome = self.under_way.result() if self.under_way else None
        if outcome and outcome.problem and self.job.stop_on_save_failure:
            raise _save_error(outcome)
        watch.progress()
        return outcome

    def newest(self) -> checkpoint.Checkpoint | None:
        """The newest checkpoint of those that this has saved, once the one under way is; None if there is none."""
        self.wait()
        if self.sealed is None:
            return None
        path = self.job.checkpoint_dir / checkpoint.folder_name(self.sealed.position)
        return checkpoint.Checkpoint(path, self.sealed, self.job.engine, origin=self.sealed.origin)

    def finish(self) -> None:
        """Waits for the save that is under way. One that has failed is tried once more, as training ends with it.

        Raises:
            SaveError: it failed again.
        """
        outcome = self.wait()
        if outcome and outcome.problem:
            self.save(outcome.state)
            outcome = self.wait()
        if outcome and outcome.problem:
            raise _save_error(outcome)

    def take_seconds(self) -> dict[str, float | None]:
        """How long training stood still for a save, and how long one took until it was sealed; each is told once."""
        seconds = {"save_stalled_s": self.stalled_s, "save_sealed_s": self.sealed_s}
        self.stalled_s = self.sealed_s = None
        return seconds


@contextmanager
def saving(
    job: Job, model: ParallelModel, optimizer: torch.optim.Optimizer, save_hf_files: Callable[[Path], None]
) -> Iterator[Saver]:
    """Yields a Saver. Where training ends in an error, the save that is under way is not lost."""
    saver = Saver(job, model, optimizer, save_hf_files)
    try:
        yield saver
    except Exception:
        futures.wait([saver.under_way] if saver.under_way else [])
        raise


def _save_error(outcome: Outcome) -> SaveError:
    return SaveError(
        f"the checkpoint of step {outcome.state.position.step} could not be saved ({outcome.problem}); make room or "
        "mend it, and start the same command again, which goes on from the checkpoint before"
    )


def say(line: str) -> None:
    """Rank 0 prints a line, at once, above the progress bar if there is one. Threads may call it."""
    if dist.get_rank() == 0:
        tqdm.write(line)
        sys.stdout.flush()


def after(done: Future, function: Callable[[Future], Outcome]) -> Future[Outcome]:
    """The result of a function of a future that is done, by the thread that has made it so."""
    result: Future[Outcome] = Future()

    def run(done: Future) -> None:
        try:
            result.set_result(function(done))
        except BaseException as error:
            result.set_exception(error)

    done.add_done_callback(run)
    return result


def remember_files(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Writes to a folder, whenever it is called, what `write` writes now."""
    with TemporaryDirectory() as folder:
        write(Path(folder))
        contents = {name: (Path(folder) / name).read_bytes() for name in files_in(Path(folder))}

    def write_again(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return write_again


def check_all_finite(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Raises a NotFinite if any rank's part of a tensor holds a NaN or an infinity. All ranks raise the same.

    To look takes a GPU as long as to read its part of the tensors once.
    """
    parts = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    norms = torch._foreach_norm(list(parts.values()), torch.inf)
    largest = zip(parts, torch.stack(norms).tolist(), strict=True)
    bad = [name for name, norm in largest if not math.isfinite(norm)]
    if name := first_of_all_ranks(bad[0] if bad else None):
        raise NotFinite(
            f"step {step}: the update has left {name!r} with a NaN or an infinity; it is not saved, and the last "
            "checkpoint is kept"
        )


def check_room(folder: Path, parameters: Mapping[str, Sequence[int]], n_saves: int) -> None:
    """Raises a NoRoom unless the disk has room for a checkpoint that is there and the next one beside it.

    Args:
        parameters: their shapes by name. Of each, a checkpoint has the value and AdamW's two moments in float32.
        n_saves: checkpoints that the run will save.
    """
    one = sum(3 * 4 * math.prod(shape) for shape in parameters.values())
    n_there = any(folder.glob(f"*/{checkpoint.STATE}"))
    needed = one * (min(n_saves, 2 - n_there))
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise NoRoom(
            f"a checkpoint takes {one / 1e9:.3g} GB, and there have to be {needed / 1e9:.3g} free for the next beside "
            f"the last, where {free / 1e9:.3g} are; make room, or name another folder"
        )
