"""Hashes of source files, by which an engine knows that what it has generated is up to date."""

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path

from longctx.compiler.ops import REGISTERED_OPS

PACKAGE = Path(__file__).parent


def hash_files(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def files_in(*rooms: str) -> list[Path]:
    """Every Python file of these folders of the package, in an order of their own names."""
    return [file for room in rooms for file in sorted((PACKAGE / room).rglob("*.py"))]


def hash_registered_ops() -> dict[str, list[str]]:
    """Of every registered op, its annotation and a hash of its function's file.

    Generated code leaves out arguments that have their default value: with another default it would do something else.
    """
    return {op.name: [op.fingerprint(), hash_files([Path(inspect.getfile(op.fn))])] for op in REGISTERED_OPS.values()}
