"""Saves, retention, resumption and merging, ended at any of their calls that reach the file system.

    PYTHONPATH=.:tests python -m tests.torture.saves            # 10,000 kills and a full disk at every call
    PYTHONPATH=.:tests python -m tests.torture.saves 500 7      # 500 kills, drawn by seed 7

Processes that have imported everything fork one for each try, which goes on in a folder where others were ended before.
It does what was drawn, and ends itself at a call that was drawn, or is ended from outside. What is left has to hold
every checkpoint that was said to be saved, each of them what was written, byte for byte, and none with a name that is
not whole. Then the next try has to save, which leaves nothing of the one before.
"""

import contextlib
import errno
import faulthandler
import functools
import gc
import io
import json
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch._dynamo  # which FSDP imports when it is first used
import torch.distributed as dist
from ranks import environment_of_rank, free_port
from test_saving import Training, training
from tqdm import tqdm

from longctx import seal
from longctx.data.order import Position
from longctx.engines.checkpoints import FORMATS
from longctx.runtime import checkpoint, merge, resume
from longctx.runtime.storage import ClosedReader
from tests.torture import Row

KILLED = 9  # the status of a process that has ended itself
LIMIT_S = 60  # for all ranks to end
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}  # Python's audit events
MEMORY = Path("/dev/shm")  # a file system in memory, on Linux

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
def at_call(number: int, do: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Within, `do` is called before the call of that number that reaches the file system, whichever thread makes it.

    Yields a function that says how many there have been.
    """
    global _before_call
    hear_of_calls()
    made = 0

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
    with (
        patch.object(os, "fsync", counted(os.fsync)),
        patch.object(seal.Hashing, "write", counted(seal.Hashing.write)),
        patch.object(merge, "_write", counted(merge._write)),
    ):
        try:
            yield lambda: made
        finally:
            _before_call = None


# --- processes -------------------------------------------------------------------------------------------------------


def start(function: Callable, *args, environment: dict[str, str] | None = None, errors: Path | None = None) -> int:
    """Starts a process that calls a function and ends with status 0, 1 after an error; returns its id.

    Args:
        errors: the file that gets what it says of errors, in place of this process's stderr.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.environ.update(environment or {})
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if errors:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        function(*args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


# --- what one try does -----------------------------------------------------------------------------------------------

SAVES = ("save", "save and wait")  # with the number of the step
OTHERS = ("resume", "merge")


@dataclass(frozen=True)
class Try:
    """What one or two ranks do to a folder of checkpoints, and when one of them is ended.

    All values of model and optimizer are the number of their save, which counts those of all tries.

    Attributes:
        actions: in this order; each is one of SAVES, with a step, or of OTHERS.
        first: a save before them, in which no call ends a rank; None for none.
        victim: the rank that is ended, before its call of the number `at_call`, unless it makes fewer, or else, if
            `after_s` is not None, from outside, so many seconds after all ranks have met.
        newest: the number of the newest save that is there.
        begun: how many saves have been begun before.
    """

    first: str | None
    actions: tuple[str, ...]
    n_ranks: int
    victim: int
    at_call: int
    after_s: float | None
    keep_last_n: int | None
    newest: int
    begun: int

    def act(self, folder: Path, said: int) -> None:
        """What each rank's process does; rank 0 writes to `said` what it is about to do and has done, as JSON."""
        torch.set_num_threads(1)
        faulthandler.enable()
        with training(folder, keep_last_n=self.keep_last_n) as run:
            rank = dist.get_rank()
            tell = said if rank == 0 else os.open(os.devnull, os.O_WRONLY)
            acting = Acting(run, folder, tell, self.newest, self.begun)
            if self.first:
                acting.do(self.first)
                assert not list(folder.glob(".*")), "a save has left something of one that was ended before"
            ends_itself = rank == self.victim and self.after_s is None
            with at_call(self.at_call if ends_itself else 0, lambda: os._exit(KILLED)) as made:
                for action in self.actions:
                    acting.do(action)
                acting.wait()
            os.write(said, json.dumps({"rank": rank, "calls": made() / len(self.actions)}).encode() + b"\n")


@dataclass
class Acting:
    """A rank that saves, resumes and merges, and says so."""

    run: Training
    folder: Path
    said: int
    newest: int
    begun: int
    is_waited_for: bool = False

    def do(self, action: str) -> None:
        kind, _, step = action.rpartition(" ") if action not in OTHERS else (action, "", "")
        self.say(does=kind)
        if kind in SAVES:
            self.save(int(step))
        if kind != "save":
            self.wait()
        if kind == "resume":
            self.run.go_to(-1)
            found = checkpoint.read(resume.find(self.folder, None, "torch", FORMATS), FORMATS)
            checkpoint.load(found, self.run.model, self.run.optimizer)
            assert all((tensor == self.newest).all() for tensor in self.run.tensors().values()), "others were loaded"
        if kind == "merge" and dist.get_rank() == 0:
            merged = merged_beside(self.folder)
            merge.merge(checkpoint.read(resume.find_stored(self.folder, FORMATS), FORMATS), merged)
            assert os.listdir(merged.parent) == [merged.name], "merging has left something of one that was ended before"

    def save(self, step: int) -> None:
        """Begins to save, once the save before is there, and goes on to other values at once."""
        self.say(begun=self.begun + 1, name=checkpoint.folder_name(Position(step)))
        self.run.save(step, number=self.begun + 1)
        self.run.go_to(-2)
        self.say_if_sealed()
        self.begun, self.is_waited_for = self.begun + 1, True

    def wait(self) -> None:
        outcome = self.run.saver.wait()
        assert not (outcome and outcome.problem), outcome
        self.say_if_sealed()

    def say_if_sealed(self) -> None:
        if self.is_waited_for:
            self.newest, self.is_waited_for = self.begun, False
            self.say(sealed=self.newest)

    def say(self, **facts) -> None:
        os.write(self.said, json.dumps(facts).encode() + b"\n")


def merged_beside(folder: Path) -> Path:
    return folder.parent / "merged" / "merged.ckpt"


# --- what is left of it ----------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """The saves that there are to be, as far as tries have said, and as was found after the last one.

    Attributes:
        whole: the names of their folders -> their numbers.
        maybe: number -> name, of those begun of which nobody has said that they are whole.
        replaced: the numbers of those that have no name, since they were to be replaced: the next save removes them.
    """

    whole: dict[str, int] = field(default_factory=dict)
    maybe: dict[int, str] = field(default_factory=dict)
    replaced: set[int] = field(default_factory=set)

    def newest(self) -> int:
        return max(self.whole.values(), default=0)

    def hear(self, facts: dict) -> None:
        if "begun" in facts:
            self.maybe[facts["begun"]] = facts["name"]
        if "sealed" in facts:
            self.whole[self.maybe.pop(facts["sealed"])] = facts["sealed"]

    def check(self, folder: Path, keep_last_n: int | None) -> None:
        """Asserts that what is in the folder is what is to be there; from now on, what is there is what is known."""
        before = self.newest()
        named, unnamed = read_all(folder)
        found = {*named.values(), *unnamed.values()}
        for number in sorted(found & self.maybe.keys()):
            self.whole[self.maybe[number]] = number
        wanted = set(sorted(self.whole.values())[-(keep_last_n or 0) :])
        if max(found, default=0) > before or self.newest() > before:
            wanted -= self.replaced
        assert wanted <= found, f"saves are lost of {self}: there are {named}, and without a name {unnamed}"
        assert newest_number(folder) == max(found, default=0), f"another was taken, of {named} and {unnamed}"
        self.whole, self.maybe, self.replaced = unnamed | named, {}, set(unnamed.values()) - set(named.values())
        if merged_beside(folder).exists():
            checkpoint.check_merged(merged_beside(folder), FORMATS, compare_digest=True)


def read_all(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The numbers of all saves, each of which is whole: by the names that they have, and by those that they had before
    they were to be replaced."""
    named, unnamed = {}, {}
    for path in folder.iterdir() if folder.exists() else ():
        name = checkpoint.name_when_saved(path.name)
        if name and not path.is_symlink():
            checkpoint.check(path, compare_digests=True)
            (named if name == path.name else unnamed)[name] = checkpoint.read_state(path).seed
    return named, unnamed


def newest_number(folder: Path) -> int:
    """The number of the newest save, found as a run does that goes on from it, and in all of its tensors; 0: none."""
    with contextlib.redirect_stdout(io.StringIO()):
        path = resume.find(folder, None, "torch", FORMATS)
    if path is None:
        return 0
    state = checkpoint.read(path, FORMATS).state
    sizes = {f"model/{name}": shape for name, shape in state.parameters.items()}
    sizes |= {f"optimizer/{name}/exp_avg": shape for name, shape in state.parameters.items()}
    tensors = {name: torch.zeros(shape) for name, shape in sizes.items()}
    checkpoint.read_shards(ClosedReader(path), tensors, no_dist=True)
    assert all((tensor == state.seed).all() for tensor in tensors.values()), f"{path} holds something else"
    return state.seed


# --- tries one after another -----------------------------------------------------------------------------------------


@dataclass
class Walk:
    """Tries in one folder, each of which goes on from what the one before has left.

    Attributes:
        begun: how many saves.
        calls: how many a rank makes for an action, by its number; learned from tries that came to their end.
    """

    place: Path
    drawn: random.Random
    saved: Saved = field(default_factory=Saved)
    begun: int = 0
    calls: dict[int, float] = field(default_factory=lambda: {0: 60.0, 1: 20.0})

    def go_on(self) -> str | None:
        """Makes a try; returns what was ended in it, None if it came to its end before."""
        this, folder, errors = self.draw(), self.place / "checkpoints", self.place / "errors"
        errors.write_text("")
        try:
            statuses, facts = run_ranks(this, folder, errors)
            return self.judge(this, folder, statuses, facts)
        except Exception as error:
            left = sorted(os.listdir(folder)) if folder.exists() else []
            raise AssertionError(f"{error!r}, after {this}, which leaves {left}\n{errors.read_text()}") from error

    def judge(self, this: Try, folder: Path, statuses: list[int], facts: list[dict]) -> str | None:
        """Asserts that what a try has left is what was promised."""
        for fact in facts:
            self.saved.hear(fact)
        begun = [fact["begun"] for fact in facts if "begun" in fact]
        self.begun = max([self.begun, *begun])
        is_killed = statuses[this.victim] in (KILLED, -signal.SIGKILL)
        assert is_killed or set(statuses) == {0}, statuses
        self.saved.check(folder, this.keep_last_n)
        if is_killed:
            does = [fact["does"] for fact in facts if "does" in fact]
            return f"{'one rank' if this.n_ranks == 1 else 'one of two ranks'}, {does[-1] if does else 'start'}"
        assert not begun or self.saved.newest() == begun[-1], "the last save is not there"
        self.calls |= {fact["rank"]: fact["calls"] for fact in facts if "rank" in fact}
        return None

    def draw(self) -> Try:
        drawn = self.drawn
        n_ranks = drawn.choice((1, 1, 1, 1, 1, 2))
        victim = drawn.randrange(n_ranks)
        actions = tuple(self.draw_action((*SAVES, *SAVES, *OTHERS)) for _ in range(drawn.randint(1, 3)))
        return Try(
            first=self.draw_action(SAVES[1:]) if drawn.random() < 0.8 or not self.saved.whole else None,
            actions=actions,
            n_ranks=n_ranks,
            victim=victim,
            at_call=drawn.randint(1, max(1, round(self.calls[victim] * len(actions)))),
            after_s=drawn.random() * 0.2 if drawn.random() < 0.1 else None,
            keep_last_n=drawn.choice((None, None, 1, 2)),
            newest=self.saved.newest(),
            begun=self.begun,
        )

    def draw_action(self, kinds: tuple[str, ...]) -> str:
        """A save is of one of few steps, so that it often replaces one that is there."""
        kind = self.drawn.choice(kinds)
        return f"{kind} {self.drawn.randint(1, 5)}" if kind in SAVES else kind


def run_ranks(this: Try, folder: Path, errors: Path) -> tuple[list[int], list[dict]]:
    """How each rank's process ended, and what they have said."""
    reader, writer = os.pipe()
    port = free_port() if this.n_ranks > 1 else 0
    ranks = []
    for rank in range(this.n_ranks):
        environment = environment_of_rank(rank, this.n_ranks, port) if port else None
        ranks.append(start(this.act, folder, writer, environment=environment, errors=errors))
    os.close(writer)
    if this.after_s is not None:
        select.select([reader], [], [])
        time.sleep(this.after_s)
        os.kill(ranks[this.victim], signal.SIGKILL)
    statuses = wait_for(ranks)
    with open(reader) as said:
        return statuses, [json.loads(line) for line in said]


def wait_for(ranks: list[int]) -> list[int]:
    """How they end, each by itself, also where another was ended for which it waits."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(statuses) < len(ranks):
        for process in set(ranks) - statuses.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                statuses[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGABRT)  # for which it writes its stacks
        time.sleep(0.002)
    assert -signal.SIGABRT not in statuses.values(), "a rank hangs that was not ended"
    return [statuses[process] for process in ranks]


# --- the parts -------------------------------------------------------------------------------------------------------


def kill(n: int, seed: int, n_walks: int) -> list[Row]:
    """Ends `n` processes, in walks that go on side by side, each in a folder and a process of its own."""
    share = [n // n_walks + (walk < n % n_walks) for walk in range(n_walks)]
    tqdm.set_lock(threading.RLock())  # its own is one for all that are forked, and one that is killed would keep it
    reader, writer = os.pipe()
    with folder_in_memory() as place:
        walks = [
            start(walk_on, place / str(walk), share[walk], f"{seed} {walk}", writer, errors=place / f"errors {walk}")
            for walk in range(n_walks)
        ]
        os.close(writer)
        counts: Counter[str] = Counter()
        with open(reader) as said, tqdm(total=n, desc="kills", unit="kill", smoothing=0.05) as progress:
            for line in said:
                counts[line.strip()] += 1
                progress.update()
        statuses = [status_of(walk) for walk in walks]
        told = "".join((place / f"errors {walk}").read_text() for walk in range(n_walks))
    assert set(statuses) == {0}, told
    assert counts.total() == n
    return [Row(f"killed: {what}", number, "nothing lost") for what, number in sorted(counts.items())]


def walk_on(place: Path, n_kills: int, seed: str, said: int) -> None:
    """Makes tries until so many of them were ended, and writes a line to `said` for each of these."""
    place.mkdir()
    torch.set_num_threads(1)
    with training(place / "first") as run:  # what is done once in a process is not done by each that it forks
        run.save(1)
        run.saver.finish()
    gc.freeze()  # or else each would copy what its garbage collector looks at
    walk = Walk(place, random.Random(seed))
    while n_kills:
        if ended := walk.go_on():
            os.write(said, f"{ended}\n".encode())
            n_kills -= 1


def fill_the_disk_at_every_call(every: int) -> Row:
    """One process saves again and again; every other time another call finds no space left on the disk."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_all() -> None:
        with training(checkpoints, keep_last_n=2) as run:
            run.save(1)
            run.saver.wait()
            newest, call, tries, failed, was_full = 1, 1, 0, 0, True
            while was_full:
                with at_call(call, full) as made:
                    run.save(newest + 1)
                    outcome = run.saver.wait()
                    was_full = made() >= call
                # One that fails may have been whole already, with `last` still to be moved.
                assert newest_number(checkpoints) in ((newest, newest + 1) if outcome.problem else (newest + 1,))
                tries, failed = tries + 1, failed + bool(outcome.problem)
                newest, call = newest + 2, call + every
                run.save(newest)
                assert not run.saver.wait().problem and newest_number(checkpoints) == newest
                assert len(os.listdir(checkpoints)) == 3, "there is more than two checkpoints and `last`"
            (checkpoints.parent / "counts").write_text(f"{tries} {failed}")

    with folder_in_memory() as folder:
        checkpoints = folder / "checkpoints"
        assert status_of(start(save_all)) == 0
        tries, failed = map(int, (folder / "counts").read_text().split())
    return Row("a full disk at each call of a save", tries, f"{failed} saves failed, training went on after each")


def main(quick: bool, n_kills: int = 10_000, seed: int = 0) -> list[Row]:
    n_kills, n_walks, every = (40, 1, 25) if quick else (n_kills, os.cpu_count() or 1, 1)
    return [*kill(n_kills, seed, n_walks), fill_the_disk_at_every_call(every)]


if __name__ == "__main__":
    for row in main(False, *map(int, sys.argv[1:])):
        print(f"| {row.what} | {row.tries:,} | {row.outcome} |")
