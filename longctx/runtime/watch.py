"""A thread that ends this process where the main thread can't: told to stop, hanging, or left behind by torchrun.

The main thread may wait for other ranks inside a library for as long as a collective takes, and until it is back no
signal handler of Python's runs. The thread sees signals at once, as bytes in a pipe that Python's C code writes.

The first SIGTERM or SIGINT ends the process, within END_S seconds if the main thread can't clean up after itself; but
while training takes steps, it only asks for an end after the step. A second one ends the process at once. A process
that makes no progress for too long writes the stacks of its threads and ends, so that torchrun restarts all ranks. One
whose torchrun has died ends too: nothing would restart it, and it would still write to the run's folders.
"""

import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from longctx import torchrun
from longctx.atomic import HOST

SIGNALS = (signal.SIGTERM, signal.SIGINT)
END_S = 5.0  # that the main thread has, after a signal, to remove what it has half written
SAME_S = 2.0  # in which a signal of one kind is taken for one that came both directly and by torchrun
STACKS_S = 10.0  # that other ranks, which wait for the one that hangs, have to write their stacks too
MARGIN = timedelta(minutes=1)  # in which a process that hangs is sure to be ended
LOOK_S = 1.0  # between two looks at the clock


@dataclass
class _Process:
    """What the main thread and the one that watches it know of each other."""

    takes_steps: bool = False
    asked: list[str] = field(default_factory=list)  # by what, to end after the step
    progress: float = 0.0  # when there was the last, in seconds of time.monotonic
    patience: timedelta | None = None  # how long there may be none; None: for ever
    stacks: Path = Path()  # where they are written


_process = _Process()


# --- what the main thread calls --------------------------------------------------------------------------------------


def start() -> None:
    """Starts to watch this process. The main thread has to call it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    threading.Thread(target=_watch, args=(reader, os.getppid()), name="watch", daemon=True).start()


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Within, the first signal doesn't end the process: it is for `stop_asked`."""
    _process.takes_steps = True
    try:
        yield
    finally:
        _process.takes_steps = False


def stop_asked() -> str | None:
    """The name of the signal, or else what has asked this process to end after the step; None if nothing has."""
    return _process.asked[0] if _process.asked else None


def ask_to_stop(by: str) -> None:
    """Asks for an end after the step, as the first signal does."""
    _process.asked.append(by)


def expect_progress(patience: timedelta, folder: Path) -> None:
    """From now on the process ends where `progress` is not called for that long, and its stacks go to a file there."""
    progress()
    _process.stacks, _process.patience = folder / f"stacks-rank{torchrun.rank()}.txt", patience


def progress() -> None:
    """Tells that the process doesn't hang: that it has loaded a weight, or that ranks have done a step or a save."""
    _process.progress = time.monotonic()


def _on_signal(number: int, _: FrameType | None) -> None:
    if not _process.takes_steps:
        raise KeyboardInterrupt(number)
    ask_to_stop(signal.Signals(number).name)


# --- the thread ------------------------------------------------------------------------------------------------------


def _watch(reader: int, parent: int) -> None:
    first: tuple[int, float] | None = None  # signal, and when it came
    deadline = math.inf
    armed = 0.0
    while True:
        for number in _signals_in(reader):
            now = time.monotonic()
            if first is None:
                first, deadline = (number, now), math.inf if _process.takes_steps else now + END_S
            elif not _is_the_same(first, number, now):
                _end(128 + number)
        if first and time.monotonic() > deadline:
            _end(128 + first[0])
        if torchrun.started_this() and os.getppid() != parent:
            print(f"rank {torchrun.rank()} ends, since its torchrun has died", file=sys.stderr, flush=True)
            _end(1)
        if _process.patience is not None:
            armed = _arm(armed, _process.patience)
            if time.monotonic() - _process.progress > _process.patience.total_seconds():
                _write_stacks_and_end(_process.patience)


def _signals_in(reader: int) -> list[int]:
    """The signals that have come, of those that mean to end; waits for one, LOOK_S seconds at most."""
    ready, _, _ = select.select([reader], [], [], LOOK_S)
    return [number for number in os.read(reader, 512) if number in SIGNALS] if ready else []


def _is_the_same(first: tuple[int, float], number: int, now: float) -> bool:
    """Whether a signal that came to torchrun and to this rank has come a second time, passed on by torchrun."""
    return torchrun.started_this() and number == first[0] and now - first[1] < SAME_S


def _arm(armed: float, patience: timedelta) -> float:
    """Has faulthandler, which needs no turn of Python's, end the process should this thread never get its own.

    Args:
        armed: the progress since which it has been told to.
    """
    if _process.progress == armed:
        return armed
    faulthandler.dump_traceback_later((patience + MARGIN).total_seconds() - STACKS_S, exit=True)
    return _process.progress


def _write_stacks_and_end(patience: timedelta) -> NoReturn:
    said = (
        f"rank {torchrun.rank()} (process {os.getpid()} on {HOST}) ends, since it has made no progress for "
        f"{patience.total_seconds() / 60:g} minutes; the stacks of its threads are in {_process.stacks}"
    )
    threading.Timer(STACKS_S, _end, (1,)).start()  # whatever becomes of what follows: the folder may be what hangs
    print(said, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    with suppress(OSError):
        _process.stacks.parent.mkdir(parents=True, exist_ok=True)
        with _process.stacks.open("a") as file:
            print(datetime.now().isoformat(timespec="seconds"), said, file=file, flush=True)
            faulthandler.dump_traceback(file)
    threading.Event().wait()
    raise AssertionError("the timer ends the process")


def _end(status: int) -> NoReturn:
    """Ends the process as it is; to flush could wait for the main thread."""
    os._exit(status)
