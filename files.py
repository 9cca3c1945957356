"""Files and folders that appear whole or not at all: written aside, synced to disk, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it replaces `path`, on any exception it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder beside `path` to fill; on success it replaces `path`, on any exception it is removed."""
    path = Path(path)
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        publish_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish_folder(aside: Path, path: Path) -> None:
    """Syncs every file of `aside`, then renames it to `path`, in place of the folder that may be there."""
    for folder, _, names in os.walk(aside):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    if path.exists():  # a folder can't be renamed over a folder that holds files
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
        os.rename(aside, path)
        shutil.rmtree(old)
    else:
        os.rename(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's contents, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path) -> Path:
    """Where `path` is written first. What processes that are gone have left of earlier tries is removed."""
    if path.parent.is_dir():
        for left in path.parent.glob(f".{path.name}.writing-*"):
            if not _is_running(left.name.rsplit("-", 1)[-1]):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.writing-{os.getpid()}")


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
