"""JSON that is checked whole, against the types of a dataclass, before anything of it is used.

    @dataclass(frozen=True)
    class Position:
        step: Annotated[int, Range(at_least=0)]

    decode(Position, read_json(file))  # ValueError: "step: -3, where a whole number of 0 or more belongs"

A type may be bool, int, float, str, None, Any, an Enum or Literal, a list, a tuple, a dict, a union or a dataclass of
such types, and a number `Annotated` with its Range. Every number has to be finite. A key may be missing only where the
field's default is None, which is what an older version leaves out; keys that are no fields are somebody else's.
"""

import dataclasses
import enum
import json
import stat
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

QUOTED = 40  # characters of a value at most
INT_BITS = 64  # of tensors' own integers; a longer number fits no tensor, size or seed


@dataclass(frozen=True)
class Range:
    """The numbers that are allowed, all of them finite."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            -inf < value < inf  # NaN is not
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        """The range as it stands behind 'a number', such as 'of 1 or more'; '' for that of all numbers."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        texts = {"of {} or more": self.at_least, "above {}": self.above, "of {} or less": self.at_most}
        return " and ".join(text.format(bound) for text, bound in texts.items() if bound is not None)


Count = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]


def read_json(file: Path) -> Any:
    """What a file holds that is JSON in UTF-8.

    Raises:
        ValueError: it can't be read or is something else; the message says why and leaves it to others to name it.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # to read a pipe would wait for whoever writes to it
            raise ValueError("it is no file")
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def decode(kind: type[T], value: Any, path: str = "") -> T:
    """`value`, as json.loads returns it, as an object of the type `kind`.

    Args:
        path: the keys that lead to the value from the whole, such as `decisions.ops[0]`.

    Raises:
        ValueError: it is of another type or out of range; the message names the path.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _decode_number(arguments[0], value, path, arguments[1])
    if kind in (int, float):
        return _decode_number(kind, value, path, Range())
    if origin in (types.UnionType, typing.Union):
        return _decode_union(kind, value, path)
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, path)
    if origin is dict:
        return _decode_dict(kind, value, path)
    if origin in (list, tuple):
        return _decode_list(kind, value, path)
    return _decode_constant(kind, value, path)


def _decode_number(kind: Any, value: Any, path: str, allowed: Range) -> Any:
    kinds = (int, float) if kind is float else (int,)
    if type(value) not in kinds or value not in allowed or (kind is float and abs(value) > sys.float_info.max):
        raise _wrong(Annotated[kind, allowed], value, path)
    if kind is int and value.bit_length() >= INT_BITS:
        raise ValueError(f"{_before(path)}{quote(value)}, where a number of at most {INT_BITS} bits belongs")
    return kind(value)


def _decode_union(kind: Any, value: Any, path: str) -> Any:
    kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
    if value is None and len(kinds) < len(typing.get_args(kind)):
        return None
    if len(kinds) == 1:
        return decode(kinds[0], value, path)  # whose error may lie deeper
    for each in kinds:
        try:
            return decode(each, value, path)
        except ValueError:
            continue
    raise _wrong(kind, value, path)


def _decode_object(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(kind, value, path)
    fields = {}
    for field in dataclasses.fields(kind):
        key = f"{path}.{field.name}" if path else field.name
        if field.name in value:
            fields[field.name] = decode(_hints(kind)[field.name], value[field.name], key)
        elif field.default is not None:
            raise ValueError(f"{key} is missing")
    return kind(**fields)


def _decode_dict(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(kind, value, path)
    of_keys, of_values = typing.get_args(kind)
    return {
        decode(of_keys, key, path): decode(of_values, each, f"{path}.{key}" if path else str(key))
        for key, each in value.items()
    }


def _decode_list(kind: Any, value: Any, path: str) -> Any:
    """A list, a tuple[X, ...] of any length, or a tuple[X, Y] of as many."""
    kinds = typing.get_args(kind)
    if not isinstance(value, list):
        raise _wrong(kind, value, path)
    origin: Any = typing.get_origin(kind)
    if origin is list or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{_before(path)}a list of {len(value)}, where one of {len(kinds)} belongs")
    return origin(decode(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True)))


def _decode_constant(kind: Any, value: Any, path: str) -> Any:
    """A string, a truth value, None, or one of an Enum's or a Literal's values."""
    choices = _choices(kind)
    for choice in choices:
        plain = choice.value if isinstance(choice, enum.Enum) else choice
        if type(plain) is type(value) and plain == value:
            return choice
    if choices or type(value) is not kind:
        raise _wrong(kind, value, path)
    return value


def _choices(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(kind) if isinstance(kind, enum.EnumMeta) else ()


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


# --- words -----------------------------------------------------------------------------------------------------------

_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}


def describe(kind: Any) -> str:
    """What belongs where a value of this type does: 'a whole number of 1 or more'."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}".rstrip()
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(describe, arguments))
    if choices := _choices(kind):
        return " or ".join(quote(each.value if isinstance(each, enum.Enum) else each) for each in choices)
    if origin in (list, tuple):
        return "a list"
    return _NAMES.get(kind, "an object")


def quote(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    if isinstance(value, (list, Mapping)):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, default=repr) if type(value) is not int or value.bit_length() < 1000 else hex(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def _wrong(kind: Any, value: Any, path: str) -> ValueError:
    return ValueError(f"{_before(path)}{quote(value)}, where {describe(kind)} belongs")


def _before(path: str) -> str:
    return f"{path}: " if path else ""
