"""Seals: the size and digest of files, recorded when they are written and compared before anything in them is used.

A digest is text that names its algorithm: `xxh3_128:<hexadecimal>`, or `blake2b:` where the library xxhash is not
installed. XXH3 (https://xxhash.com) is faster than memory and notices whatever happens to bytes by accident. It does
not prove who wrote them: whoever can write a file can write its digest too.

Files that record seals are sealed themselves. A JSON file ends in the digest of all that comes before it
(`sealed_json`), and so does a file that other libraries read as it is and that may have something after its end
(`append_seal`). These few bytes decide alone, so JSON's are blake2b, which is part of Python.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from longctx import torchrun
from longctx.errors import one_line
from longctx.schema import Count

try:
    import xxhash
except ImportError:  # a machine that can't install it
    xxhash = None

BLOCK = 1 << 23  # bytes that are read and hashed at a time
THREADS = 16  # files that are read at the same time; more than a disk needs to be busy


class Hasher(Protocol):
    def update(self, data: Any, /) -> Any: ...
    def hexdigest(self) -> str: ...


_BLAKE2B = "blake2b"
_XXH3 = "xxh3_128"
_KNOWN = (_XXH3, _BLAKE2B)
HASHERS: dict[str, Callable[[], Hasher]] = {_BLAKE2B: partial(hashlib.blake2b, digest_size=16)}
if xxhash is not None:
    HASHERS[_XXH3] = xxhash.xxh3_128


def fastest() -> str:
    """The algorithm that new digests are made by."""
    return _XXH3 if _XXH3 in HASHERS else _BLAKE2B


@dataclass(frozen=True)
class Seal:
    """What is recorded of a file. `digest` is None of files that were written before digests were."""

    bytes: Count
    digest: str | None = None


# --- making --------------------------------------------------------------------------------------------------------


class Hashing:
    """A stream of bytes that hashes what is written to it on the way; for the rest it is the stream that it wraps.

    What is hashed is what was to be written, so that the digest also tells what the disk has changed.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._algorithm = fastest()
        self._hasher = HASHERS[self._algorithm]()
        self._size = 0

    def write(self, data: Any) -> int:
        self._hasher.update(data)
        self._size += memoryview(data).nbytes
        return self._stream.write(data)

    def seal(self) -> Seal:
        """Of all that has been written so far."""
        return Seal(self._size, f"{self._algorithm}:{self._hasher.hexdigest()}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def digest(file: Path, algorithm: str | None = None, size: int | None = None, advance: Any = None) -> str:
    """The digest of a file, or of its first `size` bytes. `advance`: is called with the number of bytes of each read.

    Raises:
        OSError: it can't be read.
    """
    algorithm = algorithm or fastest()
    hasher, buffer = HASHERS[algorithm](), memoryview(bytearray(BLOCK))
    left = file.stat().st_size if size is None else size
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer[: min(left, BLOCK)]):
            hasher.update(buffer[:count])
            left -= count
            if advance:
                advance(count)
    return f"{algorithm}:{hasher.hexdigest()}"


def seal(folder: Path, names: Iterable[str]) -> dict[str, Seal]:
    """The seals of files that are there, read in parallel, by their names in the folder."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(digest, [folder / name for name in names])
        return {name: Seal((folder / name).stat().st_size, found) for name, found in zip(names, digests, strict=True)}


def files_in(folder: Path) -> list[str]:
    """The names of all files of a folder and of its subfolders, by their paths in it."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


# --- comparing -----------------------------------------------------------------------------------------------------


def check_sizes(folder: Path, seals: Mapping[str, Seal]) -> None:
    """Raises a ValueError, which begins with the file's name, for the first file that is missing or of another size."""
    for name, expected in seals.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            raise ValueError(f"its file {name} is missing")
        if size != expected.bytes:
            raise ValueError(f"its file {name} has {size} bytes instead of {expected.bytes}")


def verify(folder: Path, seals: Mapping[str, Seal]) -> None:
    """Reads files, in parallel, and compares their digests; a bar shows how far it is if that takes long.

    Sizes are check_sizes' part. What has no digest, or one of a library that is not installed here, is not compared,
    which a line says.

    Raises:
        ValueError: a file can't be read, or differs; the message begins with the name of the first.
    """
    can = {name: expected for name, expected in seals.items() if _algorithm(expected) in HASHERS}
    what = folder / next(iter(seals)) if len(seals) == 1 else folder
    for algorithm in sorted({_algorithm(expected) for expected in seals.values()} - HASHERS.keys()):
        why = f"they are {algorithm}'s; pip install xxhash" if algorithm else "it was written before there were any"
        torchrun.say(f"verify: {what} is used without comparing digests: {why}")
    total = sum(expected.bytes for expected in can.values())
    with _progress(total, f"verifying {folder.name}") as bar, ThreadPoolExecutor(THREADS) as threads:
        waiting = {name: threads.submit(_problem, folder / name, known, bar.update) for name, known in can.items()}
        for name, answer in waiting.items():
            if problem := answer.result():
                threads.shutdown(cancel_futures=True)
                raise ValueError(f"its file {name} {problem}")


def _algorithm(seal: Seal) -> str:
    """The name of the algorithm that a digest is made by; "" where there is none."""
    return (seal.digest or "").partition(":")[0]


def _problem(file: Path, expected: Seal, advance: Callable[[int], Any]) -> str | None:
    try:
        found = digest(file, _algorithm(expected), expected.bytes, advance)
    except OSError as error:
        return f"can't be read ({one_line(error)})"
    return None if found == expected.digest else "is damaged: its bytes are not those that were written"


def _progress(total: int, what: str) -> tqdm:
    """A bar of bytes, which appears where it takes longer than two seconds; one process of a node shows it."""
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, delay=2, leave=False, disable=torchrun.local_rank() != 0
    )


# --- files that are sealed in themselves ----------------------------------------------------------------------------

_JSON_SEAL = b',\n"digest": "'  # before the digest of a JSON file, its last value
_TAIL = re.compile(rb"\nsealed ([a-z0-9_]+:[0-9a-f]{32})\n\Z")  # the end of another file
_TAIL_BYTES = 64  # it is shorter


def sealed_json(facts: Mapping[str, Any], indent: int | None = None) -> bytes:
    """`facts`, of which there is at least one, as JSON, whose last value is the digest of all before it."""
    body = json.dumps(facts, indent=indent).encode()[:-1].rstrip()
    return body + _json_seal(body)


def _json_seal(body: bytes) -> bytes:
    hasher = HASHERS[_BLAKE2B]()
    hasher.update(body)
    return _JSON_SEAL + f'{_BLAKE2B}:{hasher.hexdigest()}"}}\n'.encode()


def read_sealed_json(content: bytes) -> tuple[dict[str, Any], bool]:
    """What sealed_json was given, and whether it is sealed; other JSON than that function's is not.

    Raises:
        ValueError: it is sealed, and differs from what was written; or it is no JSON of an object.
    """
    body, mark, _ = content.rpartition(_JSON_SEAL)
    if mark and content != body + _json_seal(body):
        raise ValueError("its bytes are not those that were written")
    try:
        facts = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(facts, dict):
        raise ValueError("it is no object of JSON")
    if mark:
        del facts["digest"]
    return facts, bool(mark)


def append_seal(file: Path) -> None:
    """Appends to a file the digest of what it holds."""
    with _progress(file.stat().st_size, "sealing") as bar:
        tail = f"\nsealed {digest(file, advance=bar.update)}\n".encode()
    with open(file, "ab") as opened:
        opened.write(tail)


def appended_seal(file: Path) -> Seal | None:
    """The seal at a file's end, of all that comes before it; None if there is none. `verify` takes it."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        opened.seek(max(0, size - _TAIL_BYTES))
        end = _TAIL.search(opened.read())
    if end is None or (found := end[1].decode()).partition(":")[0] not in _KNOWN:
        return None
    return Seal(size - len(end[0]), found)
