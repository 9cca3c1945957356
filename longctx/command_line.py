"""A script's options, declared as the fields of a dataclass; and errors that name the option that they are about.

    @dataclass(frozen=True, kw_only=True)
    class Job:
        model_id: str = option(help="a model's folder")
        max_epochs: int = option(2, "passes over the rows", at_least=1)

    job = parse(Job, argv, "Trains a model.")
    with naming_options(job, {ModelError: Cause("model_id")}):
        load_config(job.model_id)  # ModelError("no config.json there") -> "--model_id ./llama: no config.json there"

`naming_options` takes an argparse.Namespace as well.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import UserError

# --- options -------------------------------------------------------------------------------------------------------

_FROM_TEXT = {
    tuple[str, ...]: lambda text: tuple(name for name in text.split(",") if name),  # names separated by commas
    **{kind: kind for kind in (int, float, str, Path)},
}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
) -> Any:
    """A field that is an option of the same name, required if it has no default; its annotation says its type.

    Args:
        at_least: the least number that is allowed.
        above: the number that it has to be greater than.
    """
    facts = {"help": help, "choices": choices, "at_least": at_least, "above": above}
    return dataclasses.field(default=default, metadata=facts)


def parse(job_type: type, argv: list[str] | None, description: str) -> Any:
    """A `job_type` with the values that `argv` (sys.argv's if None) gives its options.

    A field whose type is such a dataclass too is a group of options. Fields that are no options keep their defaults.

    Raises:
        UserError: a number is out of its range.
        SystemExit: argparse refuses the arguments.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    _add_options(parser, job_type)
    return _build(job_type, parser.parse_args(argv))


def _add_options(parser: Any, job_type: type) -> None:
    for field, kind in _fields(job_type):
        if dataclasses.is_dataclass(kind):
            _add_options(parser.add_argument_group((kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")), kind)
        elif kind is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=field.metadata["help"])
        elif field.metadata:
            parser.add_argument(
                f"--{field.name}",
                type=_FROM_TEXT[kind],
                choices=field.metadata["choices"],
                help=_help(field),
                **({"required": True} if field.default is dataclasses.MISSING else {"default": field.default}),
            )


def _help(field: dataclasses.Field) -> str:
    if field.default in (None, dataclasses.MISSING):
        return field.metadata["help"]
    return f"{field.metadata['help']} (default: {field.default})".strip()


def _build(job_type: type, values: argparse.Namespace) -> Any:
    given = {}
    for field, kind in _fields(job_type):
        if dataclasses.is_dataclass(kind):
            given[field.name] = _build(kind, values)
        elif field.metadata:
            given[field.name] = getattr(values, field.name)
            _check_range(field, given[field.name])
    return job_type(**given)


def _check_range(field: dataclasses.Field, value: Any) -> None:
    at_least, above = field.metadata["at_least"], field.metadata["above"]
    if value is None:
        return
    if at_least is not None and not value >= at_least:  # NaN is neither
        raise UserError(f"--{field.name} {value}: it has to be {at_least} or more")
    if above is not None and not value > above:
        raise UserError(f"--{field.name} {value}: it has to be above {above}")


def _fields(job_type: type) -> list[tuple[dataclasses.Field, type]]:
    """The fields of a dataclass, and their types: of `X | None` it is X."""
    hints = typing.get_type_hints(job_type)
    return [(field, _without_none(hints[field.name])) for field in dataclasses.fields(job_type)]


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


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
        options: an object whose attributes are the options' values.
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
    return ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)


def _value(options: Any, name: str) -> Any:
    """The option's value, which may be in a group of options."""
    for holder in (options, *filter(dataclasses.is_dataclass, vars(options).values())):
        if hasattr(holder, name):
            return getattr(holder, name)
    raise AttributeError(f"no option {name}")
