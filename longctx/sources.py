"""Hashes of source files, by which an engine knows that what it has generated is up to date."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longctx.compiler.ops import REGISTERED_OPS

PACKAGE = Path(__file__).parent


def hash_files(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def files_in(*rooms: str) -> list[Path]:
    """Every Python file of these folders of the package, in an order of their own names."""
    return [file for room in rooms for file in sorted((PACKAGE / room).rglob("*.py"))]


def hash_registered_ops() -> dict[str, list[Any]]:
    """What is known of every registered op: its annotation, its function and its rules; functions by their files.

    Generated code leaves out arguments that have their default value: with another default it would do something else.
    """
    return {op.name: [op.fingerprint(), _describe(op.fn), _describe(op.spec)] for op in REGISTERED_OPS.values()}


def _describe(value: Any) -> Any:
    """A value as JSON, the same in every process, which differs if the value does; of a function, if its file does."""
    if isinstance(value, functools.partial):
        return [_describe(part) for part in (value.func, *value.args, *value.keywords.items())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _describe(part) for name, part in vars(value).items()}
    if isinstance(value, (tuple, list)):
        return [_describe(part) for part in value]
    if not callable(value):
        return repr(value)
    code = inspect.unwrap(value)
    code = code if hasattr(code, "__qualname__") else type(code)  # of an object that can be called
    try:
        file = Path(inspect.getsourcefile(code) or "")
    except (TypeError, OSError):  # it is built into Python, or was typed into an interpreter
        file = Path()
    return [getattr(code, "__module__", ""), code.__qualname__, hash_files([file]) if file.is_file() else ""]
