"""Files and folders that appear whole or not at all: written aside, synced to disk, then renamed into place."""

import errno
import glob
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HOST = socket.gethostname()  # several may share a file system, and a process id says nothing on another


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it replaces `path`, on any exception it is removed."""
    path = Path(path)
    aside = _aside(path)
    with parents(path):
        try:
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: str | os.PathLike, ours: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `path` to fill; on success it replaces `path`, on any exception it is removed.

    A folder that is at `path` already is replaced only if this program wrote all of it, as why_not_replaceable says.
    Where another process has put a folder at `path` in the meantime, that one stays: both made the same, and the other
    may be in use.

    Raises:
        FileExistsError: something else is at `path`; it is left as it is.
    """
    path = Path(path)
    if problem := why_not_replaceable(path, ours):
        raise FileExistsError(errno.EEXIST, problem, str(path))
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    before = _inode(path)
    with parents(path):
        aside.mkdir()
        try:
            yield aside
            if _inode(path) == before:
                with suppress(FileExistsError):
                    publish_folder(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def parents(path: Path) -> Iterator[None]:
    """Makes the folders that lead to `path`; on any exception removes again those that were not there before."""
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise


def publish_folder(aside: Path, path: Path) -> None:
    """Syncs every file of `aside`, then renames it to `path`, in place of the folder that may be there.

    A folder can't be renamed over one that holds files, so for a moment `path` is not there. Whoever is killed in it
    leaves what was at `path` as `.<name>.old-*`, which is removed by the first to have `path` in place again.

    Raises:
        FileExistsError: another process was faster.
    """
    for folder, _, names in os.walk(aside):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    old = path.with_name(f".{_short(path.name)}.old-{HOST}-{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(path, old)
    try:
        os.rename(aside, path)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:  # the same as EEXIST, by another name
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        raise
    sync(path.parent)
    for left in path.parent.glob(f".{glob.escape(_short(path.name))}.old-*"):
        shutil.rmtree(left, ignore_errors=True)


def why_not_writable(path: str | os.PathLike) -> str | None:
    """What keeps a file or folder from being made at `path`, or in the folder there; None if nothing does."""
    path = Path(path)
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        return f"{nearest} is no folder"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"the folder {nearest} can't be written to"


def why_not_new(path: str | os.PathLike) -> str | None:
    """What keeps something new from being made at `path`; None if nothing does."""
    return "it is there already" if os.path.lexists(path) else why_not_writable(path)


def why_not_replaceable(path: str | os.PathLike, ours: Sequence[str]) -> str | None:
    """What at `path` this program did not write; None if nothing is there, or a folder of its own.

    A folder of its own has the first name of `ours` in it, the mark, and nothing but names of `ours`.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_dir():
        return "it is there already, and is no folder that this program wrote"
    names = {entry.name for entry in path.iterdir()}
    if foreign := sorted(names - set(ours)):
        return f"it is there already, and holds {foreign[0]!r}, which this program did not write"
    return None if not names or ours[0] in names else "it is there already, and is no folder that this program wrote"


def sync(path: Path) -> None:
    """Makes a file's contents, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path) -> Path:
    """Where `path` is written first. What this host's processes that are gone have left of earlier tries is removed."""
    prefix = f".{_short(path.name)}.writing-{HOST}-"
    if path.parent.is_dir():
        for left in path.parent.glob(f"{glob.escape(prefix)}*"):
            if not _is_running(left.name.removeprefix(prefix)):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f"{prefix}{os.getpid()}")


def _short(name: str) -> str:
    """A name that leaves room for what is added to it: a name has 255 bytes at most, and a host's 64."""
    whole = os.fsencode(name)
    return name if len(whole) <= 128 else f"{os.fsdecode(whole[:100])}-{zlib.crc32(whole):08x}"


def _inode(path: Path) -> int | None:
    """What tells a folder from one that took its place; None where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
