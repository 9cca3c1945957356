"""Op annotations: nnScaler's notation for how an operator may be partitioned.

`'b l d^, n^ d^, b l -> b l'` has an entry for each tensor, and in it an identifier for each dimension. Dimensions of
the same name have the same length.

    x        may be partitioned; every output has this dimension too
    x+       may be partitioned; no output has this dimension, and the outputs become partial sums
    x^       may not be partitioned
    (h d^)   one dimension that is made of several, and is partitioned along the outermost of these
    128      a dimension of this length
    *        any number of leading dimensions
    ?        a value that is always replicated

An annotation may also be a function of the op's arguments that returns such a string.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from longctx.errors import AnnotationError

_TOKEN = re.compile(r"\s*(->|[A-Za-z_][A-Za-z_0-9]*|\d+|[,()*?^+])")


@dataclass(frozen=True)
class Dim:
    """One dimension, or one factor of a dimension: `b`, `d^`, `k+`, `128`."""

    name: str  # an identifier, or the digits of a fixed length
    reduce: str = ""  # '': partitioned together with the outputs; '+': outputs are partial sums; '^': not partitioned

    @property
    def length(self) -> int | None:
        return int(self.name) if self.name.isdigit() else None


@dataclass(frozen=True)
class Entry:
    """The dimensions of one tensor, each a tuple of factors with the outermost first; or a `?`."""

    dims: tuple[tuple[Dim, ...], ...] = ()
    leading: bool = False  # whether it starts with `*`
    replicated: bool = False  # whether it is `?`


@dataclass(frozen=True)
class Annotation:
    """A parsed annotation, with its text for errors to quote."""

    text: str
    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]


def parse(text: str) -> Annotation:
    """Parses an annotation.

    Raises:
        AnnotationError: the text breaks the grammar; the message quotes it and points at the place.
    """
    tokens = _tokenize(text)
    sides: list[list[Entry]] = [[]]
    position = 0
    while True:
        entry, position = _parse_entry(text, tokens, position)
        sides[-1].append(entry)
        kind, at = tokens[position]
        position += 1
        if kind == "->" and len(sides) == 1:
            sides.append([])
        elif kind == "" and len(sides) == 2:
            break
        elif kind != ",":
            raise _error(text, at, "expected '->' and the outputs" if kind == "" else f"unexpected {kind!r}")
    annotation = Annotation(text, tuple(sides[0]), tuple(sides[1]))
    _check_names(annotation)
    return annotation


def _tokenize(text: str) -> list[tuple[str, int]]:
    """The tokens of an annotation, each with the place where it begins; the last token is empty and marks the end."""
    tokens, at = [], 0
    stripped = text.rstrip()
    while at < len(stripped):
        match = _TOKEN.match(stripped, at)
        if not match:
            at += len(stripped[at:]) - len(stripped[at:].lstrip())
            raise _error(text, at, f"{stripped[at]!r} is not part of an annotation")
        tokens.append((match[1], match.start(1)))
        at = match.end()
    return [*tokens, ("", len(stripped))]


def _parse_entry(text: str, tokens: list[tuple[str, int]], position: int) -> tuple[Entry, int]:
    """Reads one entry, up to a `,`, a `->` or the end; returns it and the position behind it."""
    dims: list[tuple[Dim, ...]] = []
    leading = replicated = False
    first = position
    while (kind := tokens[position][0]) not in (",", "->", ""):
        at = tokens[position][1]
        if kind == "?":
            replicated = True
            position += 1
        elif kind == "*":
            if position != first:
                raise _error(text, at, "'*' stands for leading dimensions, so it comes first")
            leading = True
            position += 1
        elif kind == "(":
            factors, position = _parse_group(text, tokens, position + 1)
            dims.append(factors)
        else:
            dim, position = _parse_dim(text, tokens, position)
            dims.append((dim,))
    if replicated and position != first + 1:
        raise _error(text, tokens[first][1], "'?' stands alone in its entry")
    if position == first:
        raise _error(text, tokens[position][1], "an entry is missing (write 1 for a scalar)")
    return Entry(tuple(dims), leading, replicated), position


def _parse_group(text: str, tokens: list[tuple[str, int]], position: int) -> tuple[tuple[Dim, ...], int]:
    """Reads the factors of a dimension and the `)` behind them; returns them and the position behind it."""
    factors: list[Dim] = []
    while tokens[position][0] != ")":
        dim, position = _parse_dim(text, tokens, position)
        factors.append(dim)
    if not factors:
        raise _error(text, tokens[position][1], "a dimension needs at least one identifier between '(' and ')'")
    return tuple(factors), position + 1


def _parse_dim(text: str, tokens: list[tuple[str, int]], position: int) -> tuple[Dim, int]:
    """Reads a name or a length with its mark, if it has one; returns them and the position behind them."""
    name, at = tokens[position]
    if not re.fullmatch(r"\w+", name):
        raise _error(text, at, f"expected a dimension, found {name!r}" if name else "a dimension or ')' is missing")
    suffix = tokens[position + 1][0] if tokens[position + 1][0] in ("^", "+") else ""
    return Dim(name, suffix), position + (2 if suffix else 1)


def _check_names(annotation: Annotation) -> None:
    """Checks the rules that hold between the entries.

    Raises:
        AnnotationError: a name has two different marks, a dimension of an output is in no input, a dimension with `+`
            is in an output, or one without a mark is missing in an output.
    """
    marks: dict[str, str] = {}
    for entry in annotation.inputs:
        for dim in _named(entry):
            if marks.setdefault(dim.name, dim.reduce) != dim.reduce:
                raise _name_error(annotation, dim, "is marked differently in two places")
    leading = any(entry.leading for entry in annotation.inputs)
    for entry in annotation.outputs:
        if entry.leading and not leading:
            at = annotation.text.rindex("*")
            raise _error(annotation.text, at, "'*' is in an output but in no input")
        for dim in _named(entry):
            if dim.name not in marks:
                raise _name_error(annotation, dim, "is in an output but in no input")
            if marks[dim.name] == "+":
                raise _name_error(annotation, dim, "is summed over ('+'), so no output can have it")
    outputs = [entry for entry in annotation.outputs if not entry.replicated]
    for entry in annotation.inputs:
        for dim in _named(entry):
            everywhere = all(dim.name in {d.name for d in _named(output)} for output in outputs)
            if marks[dim.name] == "" and not everywhere:
                raise _name_error(annotation, dim, "is not in every output: mark it '+' (summed over) or '^' (whole)")


def _named(entry: Entry) -> list[Dim]:
    """The entry's dimensions and factors that have a name rather than a fixed length."""
    return [dim for factors in entry.dims for dim in factors if dim.length is None]


def _name_error(annotation: Annotation, dim: Dim, problem: str) -> AnnotationError:
    places = [match.start() for match in re.finditer(rf"\b{dim.name}\b", annotation.text)]
    return _error(annotation.text, places[-1], f"dimension {dim.name!r} {problem}")


def _error(text: str, at: int, problem: str) -> AnnotationError:
    return AnnotationError(f"annotation {text!r}, at character {at + 1} ({text[at : at + 8]!r}): {problem}")


def lengths(annotation: Annotation, shapes: Sequence[tuple[int, ...] | None]) -> dict[str, int]:
    """The length of every identifier, from the shapes of the inputs (None for an input that is not a tensor).

    Of two factors of one dimension whose lengths are both unknown, one has to be known from another input; otherwise
    both are left out. The leading dimensions that `*` stands for are named `*0`, `*1`, and so on.

    Raises:
        AnnotationError: a tensor has another number of dimensions than its entry, or a name has two lengths.
    """
    found: dict[str, int] = {}
    waiting = []
    for index, (entry, shape) in enumerate(zip(annotation.inputs, shapes, strict=False)):
        if entry.replicated or shape is None:
            continue
        dims = expand_leading(entry, len(shape))
        if len(dims) != len(shape):
            raise AnnotationError(
                f"annotation {annotation.text!r}: input {index} has {len(dims)} dimensions there, "
                f"but the tensor's shape is {list(shape)}"
            )
        waiting += zip(dims, shape, strict=True)
    for _ in range(2):  # twice, since a factor may become known only from a later input
        for factors, size in waiting:
            _solve(annotation, factors, size, found)
    return found


def _solve(annotation: Annotation, factors: tuple[Dim, ...], size: int, found: dict[str, int]) -> None:
    """Adds to `found` the length of a factor that alone is unknown in a dimension of length `size`.

    Raises:
        AnnotationError: the factors that are known can't give that size.
    """
    known = [found.get(dim.name) if dim.length is None else dim.length for dim in factors]
    unknown = [dim for dim, length in zip(factors, known, strict=True) if length is None]
    product = prod(length for length in known if length is not None)
    if len(unknown) == 1 and product and size % product == 0:
        found[unknown[0].name] = size // product
    elif product and size % product if unknown else product != size:
        raise _length_error(annotation, factors, product, size)


def _length_error(annotation: Annotation, factors: tuple[Dim, ...], expected: int, size: int) -> AnnotationError:
    name = " ".join(dim.name + dim.reduce for dim in factors)
    at = annotation.text.find(factors[-1].name)
    return _error(
        annotation.text, max(at, 0), f"dimension {name!r} has length {expected} in one tensor and {size} in another"
    )


def expand_leading(entry: Entry, ndim: int) -> tuple[tuple[Dim, ...], ...]:
    """The entry's dimensions for a tensor of `ndim` dimensions, with `*` written out as `*0`, `*1`, and so on."""
    if not entry.leading:
        return entry.dims
    return tuple((Dim(f"*{i}"),) for i in range(ndim - len(entry.dims))) + entry.dims


def output_shapes(annotation: Annotation, shapes: Sequence[tuple[int, ...] | None]) -> list[tuple[int, ...] | None]:
    """The shapes that the annotation promises for the outputs; None for an output that is `?`.

    Raises:
        AnnotationError: the length of an output's dimension follows from no input.
    """
    known = lengths(annotation, shapes)
    n_leading = sum(name.startswith("*") for name in known)
    results: list[tuple[int, ...] | None] = []
    for entry in annotation.outputs:
        dims = expand_leading(entry, n_leading + len(entry.dims))
        if unknown := [dim for factors in dims for dim in factors if dim.length is None and dim.name not in known]:
            raise _name_error(annotation, unknown[0], "has a length that no input tells")
        sizes = [prod(known[dim.name] if dim.length is None else dim.length for dim in factors) for factors in dims]
        results.append(None if entry.replicated else tuple(sizes))
    return results
