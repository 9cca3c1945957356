"""One run at a time saves to a folder of checkpoints: a lock that a dead owner does not keep.

The lock is the kernel's (flock): it is free as soon as its owner is dead, however that died. Whether other hosts that
share the folder see it depends on the file system: NFS 4 carries it, others keep it to the host or have none. So the
file that is locked also says whose it is, and its owner writes to it every BEAT_S seconds. Where the kernel's lock says
nothing of the owner, another run waits for DEAD_S seconds whether it still does.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from longctx import torchrun
from longctx.atomic import HOST, parents
from longctx.errors import CheckpointFolderError
from longctx.runtime.rendezvous import fresh_store

LOCK = ".lock"
BEAT_S, DEAD_S, LOOK_S = 10.0, 60.0, 1.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same for all processes of one kernel, in containers too


@dataclass(frozen=True)
class Owner:
    """Whose lock it is."""

    host: str
    pid: int
    kernel: str
    since: str  # ISO 8601


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Within, no other run saves to the folder. Rank 0 has the lock for all ranks, and all have to call this.

    Raises:
        CheckpointFolderError: another run has it.
    """
    if torchrun.started_this():
        fresh_store()  # so that no rank 0 has the lock whose torchrun has died before the watch began
    if torchrun.rank() != 0:
        yield
        return
    with parents(folder / LOCK), _locked(folder / LOCK):
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = _take(path)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(handle, ended), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _is_at(handle, path):
            path.unlink()
        os.close(handle)


def _take(path: Path) -> int:
    """The open file, locked and ours."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        is_locked = _lock(handle, path)
        if _is_at(handle, path):  # else its last owner has removed it just now
            break
        os.close(handle)
    owner = _read(path)
    if owner and not (is_locked and owner.kernel == _kernel()) and _beats(path, owner):
        os.close(handle)
        raise _refusal(path, owner)
    os.ftruncate(handle, 0)
    _write(handle)
    return handle


def _lock(handle: int, path: Path) -> bool:
    """Locks an open file; False where its file system has no such locks.

    Raises:
        CheckpointFolderError: another process has it locked.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise _refusal(path, _read(path)) from None
    except OSError:
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _refusal(path: Path, owner: Owner | None) -> CheckpointFolderError:
    whose = f"process {owner.pid} on {owner.host}, since {owner.since}," if owner else "another process"
    return CheckpointFolderError(
        f"{whose} trains with its checkpoints in {path.parent}, and two runs would destroy each other's; wait for it, "
        "stop it, or name another folder"
    )


# --- what the file says ----------------------------------------------------------------------------------------------


def _kernel() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else HOST


def _write(handle: int) -> None:
    owner = Owner(HOST, os.getpid(), _kernel(), datetime.now().astimezone().isoformat(timespec="seconds"))
    os.pwrite(handle, json.dumps(asdict(owner)).encode() + b"\n", 0)
    os.fsync(handle)


def _read(path: Path) -> Owner | None:
    """The owner as the first line has it; None where there is none that can be read."""
    try:
        return Owner(**json.loads(path.read_text(errors="replace").split("\n")[0]))
    except (OSError, ValueError, TypeError):
        return None


def _beat(handle: int, ended: threading.Event) -> None:
    """Writes the time behind the owner, again and again."""
    place = os.fstat(handle).st_size
    while not ended.wait(BEAT_S):
        with suppress(OSError):  # a disk that is full, or gone for a while, ends no training
            os.pwrite(handle, f"{time.time():.3f}\n".encode(), place)
            os.fsync(handle)


def _beats(path: Path, owner: Owner) -> bool:
    """Whether the owner writes to the file within DEAD_S seconds."""
    whose = f"process {owner.pid} on {owner.host}, which {path} names"
    print(f"run: waiting {DEAD_S:.0f} seconds at most to see whether {whose}, is alive", flush=True)
    before, deadline = path.read_bytes(), time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        with suppress(FileNotFoundError):
            if path.read_bytes() != before:
                return True
    return False
