"""Runs scripts in processes that are forked from one that has imported what they need (see ranks.py).

What a script says and how it ends are as in a new interpreter. Only an import that it forgot would not be missed:
test_reference_commands.py starts every script in interpreters of their own, and by the real torchrun.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, context, get_context
from pathlib import Path

from ranks import environment_of_rank, free_port, start_server

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300


def run_script(script: str, *words: object, n_ranks: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a script, or a module by its dotted name, with the options `words`; returns once it has ended.

    Args:
        n_ranks: the script is run by as many processes, set up as torchrun does; 0 runs it alone, as Python does. The
            status is that of the first process to fail, which ends the others; what is said is what all of them said.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_script(Path(folder), script, *words, n_ranks=n_ranks, cwd=cwd)
        try:
            status = wait_for(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = ["".join(file.read_text() for file in sorted(Path(folder).glob(f"{name}-*"))) for name in ("out", "err")]
    return subprocess.CompletedProcess([script, *words], status, *said)


def start_script(
    folder: Path, script: str, *words: object, n_ranks: int = 0, cwd: Path = ROOT
) -> list[context.ForkServerProcess]:
    """The processes of a script that runs; what each says goes to the files out-RANK and err-RANK in `folder`."""
    start_server()
    port = free_port()
    processes = []
    for rank in range(max(n_ranks, 1)):
        environment = dict(os.environ) | (environment_of_rank(rank, n_ranks, port) if n_ranks else {})
        said = (folder / f"out-{rank}", folder / f"err-{rank}")
        arguments = (script, [str(word) for word in words], cwd, environment, *said)
        processes.append(get_context("forkserver").Process(target=_run, args=arguments))
        processes[-1].start()
    return processes


def wait_for(processes: list[context.ForkServerProcess]) -> int:
    """Waits until all have ended or one has failed; the status of that one, or 0."""
    deadline = time.monotonic() + TIMEOUT_S
    while running := [process for process in processes if process.exitcode is None]:
        if not connection.wait([process.sentinel for process in running], deadline - time.monotonic()):
            raise subprocess.TimeoutExpired(str(running), TIMEOUT_S)
        if failed := [process.exitcode for process in processes if process.exitcode]:
            return failed[0]
    return 0


def _run(script: str, words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for descriptor, file in ((1, out), (2, err)):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), descriptor)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    sys.argv = [script, *words]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
