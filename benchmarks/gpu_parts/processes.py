"""Ends a process with all that it has started."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def end_family(process: subprocess.Popen) -> None:
    """Kills a process and all its descendants. torchrun's workers are in sessions of their own, so no group has all."""
    for pid in family_of(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def family_of(pid: int) -> list[int]:
    """A process that has not been waited for, and its descendants."""
    with suppress(FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(descendant for child in children for descendant in family_of(int(child)))]
    return []
