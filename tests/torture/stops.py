"""Runs of two ranks that are killed, signalled and started twice, at random moments, under torchrun's own agent.

    PYTHONPATH=.:tests python -m tests.torture.stops            # all parts
    PYTHONPATH=.:tests python -m tests.torture.stops 0 10 7     # 10 tries of part 0, drawn by seed 7

What counts is that the command that was given comes to its last step, by its own restarts or when it is given again,
and that every step had the loss that it has in a run that was left alone.
"""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from families import reference_model, small_config
from ranks import start_server
from saved_rows import save_rows

from tests.torture import Row

ROOT = Path(__file__).parent.parent.parent
STEPS, LIMIT_S = 8, 240.0
MOMENTS = ("start", "compile", "load", "step", "save")


@dataclass(frozen=True)
class Command:
    """A run on two ranks in a folder of its own. It can be given again and again, as a person or a cluster does."""

    shared: Path  # with model and rows
    folder: Path

    def start(self, max_restarts: int = 0) -> BaseProcess:
        """torchrun's agent, forked from a process that has imported everything, and so are its ranks."""
        agent = get_context("forkserver").Process(target=_agent, args=(self, max_restarts))
        agent.start()
        return agent

    def words(self) -> list[str]:
        paths = ["--model_id", self.shared / "model", "--dataset_path", self.shared / "rows"]
        paths += ["--compiled_dir", self.folder / "compiled", "--log_dir", self.folder / "runs"]
        paths += ["--checkpoint_dir", self.folder / "checkpoints", "--name", "two", "--hardware", "cpu"]
        steps = ["--max_train_steps", STEPS, "--checkpoint_interval", 2, "--grad_accumulation_steps", 1]
        return [*map(str, (*paths, *steps)), "--precision", "fp32", "--learning_rate", "1e-3"]

    def losses(self) -> list[float]:
        """Of the steps that are logged."""
        with suppress(FileNotFoundError):
            lines = (self.folder / "runs" / "two" / "metrics.jsonl").read_text().split("\n")[:-1]
            return [json.loads(line)["loss"] for line in lines]
        return []

    def ranks(self) -> list[int]:
        """The processes of the newest attempt."""
        named = [tuple(map(int, file.name.split("-"))) for file in (self.folder / "pids").glob("*")]
        newest = max((attempt for attempt, _, _ in named), default=0)
        return [pid for attempt, _, pid in sorted(named) if attempt == newest]

    def said(self) -> str:
        return "".join(file.read_text(errors="replace") for file in self.folder.rglob("std*.log"))

    def has_come_to(self, moment: str) -> bool:
        if moment == "start":
            return len(self.ranks()) == 2
        if moment == "save":
            return bool(list((self.folder / "checkpoints").glob(".*.writing")))
        if moment == "step":
            return len(self.losses()) > 2
        return {"compile": "engine:", "load": "run: 2 rank(s)"}[moment] in self.said()


def _agent(command: Command, max_restarts: int) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.dup2(os.open(command.folder / f"agent-{os.getpid()}", os.O_WRONLY | os.O_CREAT), 2)
    logs = command.folder / f"logs-{os.getpid()}"
    logs.mkdir()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    shutil.rmtree(command.folder / "pids", ignore_errors=True)
    (command.folder / "pids").mkdir()
    elastic_launch(config, _rank)(command)


def _rank(command: Command) -> None:
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    (command.folder / "pids" / f"{attempt}-{os.environ['RANK']}-{os.getpid()}").touch()
    torch.set_num_threads(1)
    sys.argv = ["train.py", *command.words()]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


# --- one try ---------------------------------------------------------------------------------------------------------


def wait_for(holds: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.005)


def kill(*pids: int | None, by: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid or 0, by)


def finish(command: Command, process: BaseProcess, expected: list[float]) -> str:
    """How a command ended: 'came to its last step', or what is wrong."""
    process.join(LIMIT_S)
    if process.exitcode is None:
        kill(process.pid, *command.ranks())
        return "hung"
    if process.exitcode:
        return f"ended with status {process.exitcode}"
    return "came to its last step" if command.losses() == expected else "took other steps"


def restart_after_a_kill(command: Command, moment: str, expected: list[float], drawn: random.Random) -> str:
    """One of two ranks is killed once, and torchrun restarts them."""
    process = command.start(max_restarts=3)
    wait_for(lambda: command.has_come_to(moment), process)
    time.sleep(drawn.random() * (0.02 if moment == "save" else 0.3))
    kill(*drawn.sample(command.ranks(), 1))
    return finish(command, process, expected)


def kill_all_and_start_again(command: Command, moment: str, expected: list[float], drawn: random.Random) -> str:
    """Everything is killed, and the same command given again at once: it has to find no lock that is kept."""
    process = command.start()
    wait_for(lambda: command.has_come_to(moment), process)
    time.sleep(drawn.random() * (0.02 if moment == "save" else 0.3))
    kill(process.pid, *command.ranks())
    return finish(command, command.start(), expected)


def kill_the_agent(command: Command, moment: str, expected: list[float], drawn: random.Random) -> str:
    """Only torchrun's agent is killed: its ranks end by themselves, and then the same command goes on."""
    process = command.start()
    wait_for(lambda: command.has_come_to(moment), process)
    time.sleep(drawn.random() * 0.3)
    ranks = command.ranks()
    kill(process.pid)
    deadline = time.monotonic() + 10
    while any(map(is_running, ranks)):
        if time.monotonic() > deadline:
            kill(*ranks)
            return "left ranks behind"
        time.sleep(0.05)
    return finish(command, command.start(), expected)


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def signal_the_agent(command: Command, moment: str, expected: list[float], drawn: random.Random) -> str:
    """torchrun gets a signal and passes it on; the same command then goes on, and no step is taken twice."""
    process = command.start()
    wait_for(lambda: command.has_come_to(moment), process)
    time.sleep(drawn.random() * 0.3)
    kill(process.pid, by=drawn.choice((signal.SIGTERM, signal.SIGINT)))
    process.join(LIMIT_S)
    if process.exitcode is None:
        kill(process.pid, *command.ranks())
        return "did not stop"
    taken = len(command.losses())
    again = command.start()
    outcome = finish(command, again, expected)
    if taken and taken < STEPS and f"after step {taken}\n" not in command.said():
        return "lost steps"
    return outcome


def fill_the_disk(command: Command, moment: str, expected: list[float], drawn: random.Random) -> str:
    """Checkpoints go to a small disk of their own, which is full for a while; a run that it has ended is started again.

    Mounting it takes root's rights.
    """
    disk = command.folder / "checkpoints"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=True)
    try:
        process = command.start()
        wait_for(lambda: command.has_come_to(moment), process)
        time.sleep(drawn.random() * 0.3)
        with suppress(OSError), (disk / "full").open("wb") as filler:
            while True:
                filler.write(bytes(1 << 12))
                filler.flush()
        time.sleep(drawn.random() * 2)
        (disk / "full").unlink()
        outcome = finish(command, process, expected)
        if outcome == "ended with status 1" and "could not be saved" in command.said():  # torchrun's, of ranks' 2
            outcome = finish(command, command.start(), expected)
        return outcome
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# --- counts ----------------------------------------------------------------------------------------------------------

PARTS = {
    "one of two ranks killed, `--max-restarts 3`": (restart_after_a_kill, MOMENTS, 50),
    "all killed, the same command at once": (kill_all_and_start_again, MOMENTS, 15),
    "torchrun killed, its ranks left behind": (kill_the_agent, ("load", "step", "save"), 12),
    "SIGTERM or SIGINT to torchrun": (signal_the_agent, ("load", "step", "save"), 24),
    "a full disk for a while": (fill_the_disk, ("step", "save"), 12),
}


def count(tries: dict[str, int], seed: int) -> Iterator[Row]:
    """Tries each of the parts named as often as said."""
    start_server()
    drawn = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        reference_model(small_config("llama")).save_pretrained(shared / "model")
        save_rows(shared / "rows", torch.randint(0, 256, (40, 32), generator=torch.Generator().manual_seed(1)))
        alone = _command(shared, "alone")
        assert finish(alone, alone.start(), []) == "took other steps"
        expected = alone.losses()
        assert len(expected) == STEPS
        for part, n_tries in tries.items():
            do, moments, _ = PARTS[part]
            outcomes: Counter[tuple[str, str]] = Counter()
            for number in range(n_tries):
                moment = moments[number % len(moments)]
                command = _command(shared, uuid.uuid4().hex)
                if moment != "compile":
                    shutil.copytree(alone.folder / "compiled", command.folder / "compiled")
                outcome = do(command, moment, expected, drawn)
                outcomes[moment, outcome] += 1
                print(f"{part}, at {moment}: {outcome}", file=sys.stderr, flush=True)
                if outcome != "came to its last step":
                    print(command.said(), file=sys.stderr)
                shutil.rmtree(command.folder, ignore_errors=True)
            for (moment, outcome), how_often in sorted(outcomes.items()):
                yield Row(f"{part}, at {moment}", how_often, outcome)


def _command(shared: Path, name: str) -> Command:
    (shared / name).mkdir()
    return Command(shared, shared / name)


def main(quick: bool, seed: int = 0) -> list[Row]:
    """The counts of all parts; `quick`: of two restarts."""
    if quick:
        return list(count({next(iter(PARTS)): 2}, seed))
    return list(count({part: n_tries for part, (_, _, n_tries) in PARTS.items()}, seed))


if __name__ == "__main__":
    part, n_tries, seed = sys.argv[1:] or ("", 0, 0)
    rows = count({list(PARTS)[int(part)]: int(n_tries)}, int(seed)) if part else main(quick=False)
    for row in rows:
        print(f"| {row.what} | {row.tries} | {row.outcome} |", flush=True)
