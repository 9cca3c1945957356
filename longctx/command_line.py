"""A script's options, declared as the fields of a dataclass; and errors that name the option that they are about.

@dataclass(frozen=True, kw_only=True)
class Job:
    model_id: str = option(help="a model's folder")
    max_epochs: int = option(2, "passes over the rows", at_least=1)

job = parse(Job, argv, "Trains a model.")
with naming_options(job, {ModelError: Cause("model_id")}):
    load_config(job.model_id)  # ModelError("no config.json there") -> "--model_id ./llama: no config.json there"
"""

import argparse
import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from longctx.errors import UserError
from longctx.schema import Range, describe

QUOTED = 300  # characters of an option's value at most
# What Linux takes, in bytes: of one name, which is what stands between two slashes, and of a whole path.
LONGEST_NAME, LONGEST_PATH = 255, 4095
LARGEST_INT = 2**31 - 1  # far more than anything is counted to, and within what PyTorch, NumPy and Arrow take
LARGEST_SEED = 2**32 - 1  # that NumPy takes; PyTorch takes more
MOST_TOKENS = 2**27  # of a row: PyTorch counts the bytes of a mask over all pairs of tokens in 64 bits

# --- options -------------------------------------------------------------------------------------------------------


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field that is an option of the same name, required if it has no default; its annotation says its type.

    Args:
        at_least, above, at_most: the range of a number. Every number has to be finite, and a whole one has to be
            LARGEST_INT or less where nothing else is said.
    """
    facts = {"help": help, "choices": choices, "range": Range(at_least, above, at_most)}
    return dataclasses.field(default=default, metadata=facts)


def parse(job_type: type, argv: list[str] | None, description: str) -> Any:
    """A `job_type` with the values that `argv` (sys.argv's if None) gives its options.

    A field whose type is such a dataclass too is a group of options. Fields that are no options keep their defaults.

    Raises:
        UserError: an option is unknown, missing, or has a value that it can't have.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    _add_options(parser, job_type)
    return _build(job_type, parser.parse_args(argv))


class _Parser(argparse.ArgumentParser):
    """Takes a command line apart. What it refuses is one sentence, as all other refusals are, and not its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{on_one_line(message)}; --help lists the options")


def _add_options(parser: Any, job_type: type) -> None:
    for field, kind in fields_of(job_type):
        if dataclasses.is_dataclass(kind):
            _add_options(parser.add_argument_group((kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")), kind)
        elif kind is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])
        elif field.metadata:
            choices = field.metadata["choices"]
            parser.add_argument(
                f"--{field.name}",
                metavar=f"{{{','.join(choices)}}}" if choices else None,
                help=_help(field, kind),
                required=field.default is dataclasses.MISSING,
            )


def _help(field: dataclasses.Field, kind: Any) -> str:
    """What an option is, its range, and its default."""
    facts = [str(range_of(field, kind))] if kind in (int, float) else []
    if field.default not in (None, dataclasses.MISSING):
        facts.append(f"default: {field.default}")
    return f"{field.metadata['help']} ({'; '.join(facts)})".strip() if facts else field.metadata["help"]


def _build(job_type: type, texts: argparse.Namespace) -> Any:
    given = {}
    for field, kind in fields_of(job_type):
        if dataclasses.is_dataclass(kind):
            given[field.name] = _build(kind, texts)
        elif field.metadata:
            text = getattr(texts, field.name)
            given[field.name] = field.default if text is None else _read(field, kind, text)
    return job_type(**given)


def fields_of(job_type: type) -> list[tuple[dataclasses.Field, type]]:
    """The fields of a dataclass, and their types: of `X | None` it is X."""
    hints = typing.get_type_hints(job_type)
    return [(field, _without_none(hints[field.name])) for field in dataclasses.fields(job_type)]


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


# --- values --------------------------------------------------------------------------------------------------------


def _read(field: dataclasses.Field, kind: Any, text: Any) -> Any:
    """An option's value. Empty text, as of a shell variable that is not set, counts as not given.

    A tuple of no names is another thing than none given.

    Raises:
        UserError: the text is no such value.
    """
    if kind is bool:
        return text
    text = "--" if text == [] else text  # of --name=-- argparse takes the dashes away
    if kind in (int, float):
        return _read_number(field, kind, text)
    if kind == dict[str, Any]:
        return _read_object(field, text)
    if problem := _why_no_text(text):
        raise UserError(f"--{field.name} {on_one_line(text)}: {problem}")
    if kind == tuple[str, ...]:
        return tuple(name for name in text.split(",") if name)
    if not text and field.default is dataclasses.MISSING:
        raise UserError(f"--{field.name}: it is empty")
    if not text:
        return field.default
    choices = field.metadata["choices"]
    if choices and text not in choices:
        raise UserError(f"--{field.name} {on_one_line(text)}: it has to be one of {', '.join(choices)}")
    return kind(text)


def _read_number(field: dataclasses.Field, kind: Any, text: str) -> Any:
    allowed = range_of(field, kind)
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value not in allowed:
        belongs = describe(Annotated[kind, allowed])
        raise UserError(f"--{field.name} {on_one_line(text)}: it has to be {belongs}")
    return value


def _read_object(field: dataclasses.Field, text: str) -> Any:
    if not text:
        return field.default
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"--{field.name} {on_one_line(text)}: it has to be a JSON object")
    return value


def range_of(field: dataclasses.Field, kind: Any) -> Range:
    allowed = field.metadata["range"]
    if kind is int and allowed.at_most is None:
        return dataclasses.replace(allowed, at_most=LARGEST_INT)
    return allowed


def _why_no_text(text: str) -> str | None:
    """What keeps a text from being a path or a name; None if nothing does."""
    if any(character < " " or character == "\x7f" for character in text):
        return "it has a control character in it"
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:
        return "it has a character in it that no name of a file can have"
    if len(path) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in path.split(b"/")):
        return f"it is too long: {LONGEST_NAME} bytes are the most for a name, and {LONGEST_PATH} for a path"
    return None


def on_one_line(text: str) -> str:
    """A value as it can stand within a sentence: what can't be printed is escaped, and what is long is cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= QUOTED else f"{shown[:QUOTED]}..."


# --- errors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cause:
    """What a kind of error is about: the option that named it, if one did, and advice that takes an option.

    Both may use what the error knows: `Cause("{error.field}", "raise it by {error.missing_gb:.1f}")`.
    """

    option: str | None
    advice: str = ""


@contextmanager
def naming_options(options: Any, causes: Mapping[type[UserError], Cause]) -> Iterator[None]:
    """An error raised inside whose kind (or nearest base) is in `causes` comes out as a UserError that says its option.

    Args:
        options: the object that `parse` made of them.
    """
    try:
        yield
    except UserError as error:
        cause = next((causes[kind] for kind in type(error).__mro__ if kind in causes), None)
        if cause is None:
            raise
        raise UserError(_sentence(error, cause, options)) from error


def _sentence(error: UserError, cause: Cause, options: Any) -> str:
    advice = f"; {cause.advice.format(error=error)}" if cause.advice else ""
    if cause.option is None:
        return f"{error}{advice}"
    name = cause.option.format(error=error)
    value = value_as_text(options, name)
    return f"--{name}{f' {value}' if value else ''}: {error}{advice}"


def value_as_text(options: Any, name: str) -> str:
    """An option's value as a person types it; '' if it was not given."""
    value = _value(options, name)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return on_one_line(json.dumps(value))
    return on_one_line(",".join(value) if isinstance(value, tuple) else "" if value is None else str(value))


def _value(options: Any, name: str) -> Any:
    """The option's value, which may be in a group of options."""
    for holder in (options, *filter(dataclasses.is_dataclass, vars(options).values())):
        if hasattr(holder, name):
            return getattr(holder, name)
    raise AttributeError(f"no option {name}")
