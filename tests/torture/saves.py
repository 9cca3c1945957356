"""Saves that are killed at every call that reaches the file system, at random times, and on a disk that is full.

    PYTHONPATH=.:tests python -m tests.torture.saves

After each, the newest checkpoint is found, is what was written, byte for byte, and is the old one or the new one.
"""

import contextlib
import errno
import functools
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from ranks import environment_of_rank, free_port
from test_saving import training

from longctx import seal
from longctx.engines.checkpoints import FORMATS
from longctx.runtime import checkpoint, resume
from longctx.runtime.storage import ClosedReader
from tests.torture import Row

KILLED = 9
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}  # Python's audit events

# --- what reaches the file system ------------------------------------------------------------------------------------

_before_call: Callable[[], None] | None = None


def _audit(event: str, _: tuple) -> None:
    if _before_call and event in CALLS:
        _before_call()


@functools.cache
def hear_of_calls() -> None:
    """For as long as the process lives, which is why only those that are started here do so."""
    sys.addaudithook(_audit)


@contextlib.contextmanager
def at_call(number: int, do: Callable[[], None], with_writes: bool = True):
    """Within, `do` is called before the call of that number that reaches the file system, whichever thread makes it.

    Writes to the shards may be left out, of which there are many more than of all others. Yields a function that says
    whether there was a call of that number.
    """
    global _before_call
    hear_of_calls()
    made = 0
    fsync, write = os.fsync, seal.Hashing.write

    def count() -> None:
        nonlocal made
        made += 1
        if made == number:
            do()

    def counted(function: Callable) -> Callable:
        def call(*args):
            count()
            return function(*args)

        return call

    _before_call = count
    counted_write = counted(write) if with_writes else write
    with patch.object(os, "fsync", counted(fsync)), patch.object(seal.Hashing, "write", counted_write):
        try:
            yield lambda: made >= number
        finally:
            _before_call = None


# --- one try ---------------------------------------------------------------------------------------------------------


def start(function: Callable, *args, environment: dict[str, str] | None = None, **options) -> int:
    """Starts a process that calls a function and ends with status 0, 1 after an error; returns its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.environ.update(environment or {})
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        function(*args, **options)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def save_steps(folder: Path, steps: list[int], killed_at: int = 0, with_writes: bool = True, **options) -> None:
    """Saves these steps; if `killed_at` is one of its calls that reach the file system, the process ends there."""
    with training(folder, **options) as run, at_call(killed_at, lambda: os._exit(KILLED), with_writes):
        for step in steps:
            run.save(step)
        run.saver.finish()


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, found and compared with its digests as a run does that goes on from it."""
    with contextlib.redirect_stdout(io.StringIO()):
        path = resume.find(folder, None, "torch", FORMATS)
    assert path is not None, "there is no checkpoint"
    state = checkpoint.read(path, FORMATS).state
    sizes = {f"model/{name}": shape for name, shape in state.parameters.items()}
    sizes |= {f"optimizer/{name}/exp_avg": shape for name, shape in state.parameters.items()}
    tensors = {name: torch.zeros(shape) for name, shape in sizes.items()}
    checkpoint.read_shards(ClosedReader(path), tensors, no_dist=True)
    step = state.position.step
    assert all((tensor == step).all() for tensor in tensors.values()), f"{path} holds something else"
    return step


# --- the parts -------------------------------------------------------------------------------------------------------


def kill_at_every_call(what: str, base: Path, step: int, quick: bool, **options) -> Row:
    """Saves `step` beside what is in `base`, again and again, ended one call later each time until it ends by itself.

    Every time it is then saved once more, which leaves nothing of the save before. Quick: at every tenth call that is
    no write.
    """
    old, found, number, status = newest_step(base), Counter(), 1, KILLED
    while status == KILLED:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(base, Path(folder) / "checkpoints", symlinks=True)
            status = status_of(start(save_steps, copy, [step], number, not quick, **options))
            assert status in (0, KILLED), status
            newest = newest_step(copy)
            assert newest in ((step,) if status == 0 else (old, step)), newest
            found["the new" if newest == step else "the old"] += 1
            assert status_of(start(save_steps, copy, [step + 1], **options)) == 0
            assert newest_step(copy) == step + 1
            assert not [name for name in os.listdir(copy) if name.startswith(".")]
        number += 10 if quick else 1
    outcome = ", ".join(f"{n} times {which} checkpoint was the newest" for which, n in sorted(found.items()))
    return Row(f"killed at each call of a save {what}", sum(found.values()), outcome)


def fill_the_disk_at_every_call(base: Path, every: int) -> Row:
    """One process saves again and again, and each time another call finds no space left on the disk."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_all() -> None:
        with training(copy) as run:
            newest, tries, failed, was_full = 1, 0, 0, True
            while was_full:
                step = 2 + tries
                with at_call(1 + tries * every, full) as is_past:
                    run.save(step)
                    outcome = run.saver.wait()
                    was_full = is_past()
                before, newest = newest, newest_step(copy)
                # One that fails may have been whole already, with `last` still to be moved.
                assert newest == step or (newest == before and outcome.problem)
                tries, failed = tries + 1, failed + bool(outcome.problem)
            assert not outcome.problem
            Path(folder, "counts").write_text(f"{tries} {failed}")

    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(base, Path(folder) / "checkpoints", symlinks=True)
        assert status_of(start(save_all)) == 0
        tries, failed = map(int, Path(folder, "counts").read_text().split())
    return Row("a full disk at each call of a save", tries, f"{failed} saves failed, training went on after each")


def save_on_and_on(folder: Path, said: Path) -> None:
    """Saves one step after another; `said` has a file for each that is sealed."""
    with training(folder) as run:
        for step in range(1, 10_000):
            run.save(step)
            run.saver.wait()
            (said / str(step)).touch()


def kill_at_random_times(n: int, draw: random.Random) -> Row:
    """Two ranks save one step after another, until both are killed at once."""
    lost, sealed = 0, 0
    for _ in range(n):
        with tempfile.TemporaryDirectory() as place:
            folder, said = Path(place) / "checkpoints", Path(place) / "said"
            said.mkdir()
            port = free_port()
            ranks = [
                start(save_on_and_on, folder, said, environment=environment_of_rank(rank, 2, port)) for rank in range(2)
            ]
            while not any(said.iterdir()):
                time.sleep(0.01)
            time.sleep(draw.random() * 0.3)
            for process in ranks:
                os.kill(process, signal.SIGKILL)
            assert [status_of(process) for process in ranks] == [-signal.SIGKILL] * 2
            last_said = max(int(name) for name in os.listdir(said))
            newest = newest_step(folder)
            lost += newest < last_said
            sealed += newest
    assert lost == 0
    return Row("two ranks killed by SIGKILL at a random time", n, f"{sealed} checkpoints sealed before, none lost")


def main(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        assert status_of(start(save_steps, base, [1])) == 0
        rows = [
            kill_at_every_call(f"{what}, round {number + 1}", base, step, quick, **options)
            for number in range(1 if quick else 10)
            for what, step, options in (
                ("of a new step", 2, {}),
                ("of a step that is there", 1, {}),
                ("that removes an older one", 2, {"keep_last_n": 1}),
            )
        ]
        rows.append(fill_the_disk_at_every_call(base, every=25 if quick else 1))
    rows.append(kill_at_random_times(2 if quick else 1000, random.Random(0)))
    return rows


if __name__ == "__main__":
    for row in main(quick="--quick" in sys.argv):
        print(row)
