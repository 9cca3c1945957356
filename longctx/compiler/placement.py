"""Where a tensor's elements are over the ranks of a plan, how an operator may be partitioned, and what leads from one
placement to another. docs/design.md has the algebra.

Placements are those of PyTorch's DTensor, for one dimension of ranks. Partitioning an operator along one identifier of
its annotation places its inputs and outputs; between the placement that a producer leaves and the one that a consumer
wants stands a reshard. Gradients have placements of their own, and this is where wrong results would hide: an input
that is replicated under a partitioned operator receives a gradient that is partial, and under an operator that every
rank computes whole one that is replicated. So a reshard depends on whether its consumer is partitioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longctx.compiler.annotation import Annotation, Dim, expand_leading, lengths


@dataclass(frozen=True)
class Replicate:
    """Every rank has the whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Partial:
    """Every rank has a tensor of the whole shape, and the sum of them is the value."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True)
class Shard:
    """Rank r of P has the r-th of P equal parts along `dim`."""

    dim: int

    def __str__(self) -> str:
        return f"S{self.dim}"


Placement = Replicate | Partial | Shard
REPLICATE, PARTIAL = Replicate(), Partial()


def parse_placement(text: str) -> Placement:
    """The placement that str() wrote.

    Raises:
        ValueError: the text is none.
    """
    if text in ("R", "P"):
        return REPLICATE if text == "R" else PARTIAL
    if text[:1] == "S" and text[1:].isdigit():
        return Shard(int(text[1:]))
    raise ValueError(f"{text!r} is no placement")


def local_shape(shape: tuple[int, ...], placement: Placement, plan_size: int) -> tuple[int, ...]:
    """The shape of a rank's part of a tensor."""
    dim = placement.dim if isinstance(placement, Shard) else None
    return tuple(size // plan_size if d == dim else size for d, size in enumerate(shape))


# --- partitions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """One way for a plan's ranks to compute an operator: along the identifier `dim`, or, if None, whole on each rank.

    An input that is replicated receives a gradient that is partial if the operator is partitioned, and replicated if it
    is not. A gradient has otherwise its tensor's placement; an output that is partial receives one that is replicated.
    """

    dim: str | None
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]


def partitions(annotation: Annotation, shapes: Sequence[tuple[int, ...] | None], plan_size: int) -> list[Partition]:
    """Every legal partition of an operator over `plan_size` ranks, the whole one first.

    An identifier may be partitioned if its length divides evenly and it is the outermost factor of its dimension
    wherever it is, once a tensor at most.
    """
    whole = Partition(None, (REPLICATE,) * len(annotation.inputs), (REPLICATE,) * len(annotation.outputs))
    known = lengths(annotation, shapes)
    n_leading = sum(name.startswith("*") for name in known)
    entries = [
        () if entry.replicated or shape is None else expand_leading(entry, len(shape))
        for entry, shape in zip(annotation.inputs, shapes, strict=True)
    ]
    outputs = [expand_leading(entry, n_leading + len(entry.dims)) for entry in annotation.outputs]
    marks = {dim.name: dim.reduce for dims in entries for factors in dims for dim in factors}
    legal = [whole]
    for name, mark in marks.items():
        if mark == "^" or name not in known or known[name] % plan_size or plan_size == 1:
            continue
        if all(_can_be_sharded(name, dims) for dims in (*entries, *outputs)):
            elsewhere = PARTIAL if mark == "+" else REPLICATE
            inputs = tuple(_placement(name, dims, REPLICATE) for dims in entries)
            results = tuple(_placement(name, dims, elsewhere) for dims in outputs)
            legal.append(Partition(name, inputs, results))
    return legal


def _dims_with(name: str, dims: tuple[tuple[Dim, ...], ...]) -> list[int]:
    """The dimensions of a tensor that have `name` among their factors."""
    return [place for place, factors in enumerate(dims) if name in {dim.name for dim in factors}]


def _can_be_sharded(name: str, dims: tuple[tuple[Dim, ...], ...]) -> bool:
    """Whether a tensor has `name` in one dimension at most, and there as the outermost factor."""
    found = _dims_with(name, dims)
    return len(found) <= 1 and all(dims[place][0].name == name for place in found)


def _placement(name: str, dims: tuple[tuple[Dim, ...], ...], elsewhere: Placement) -> Placement:
    """A tensor's placement under a partition along `name`; `elsewhere` if no dimension of the tensor has that name."""
    found = _dims_with(name, dims)
    return Shard(found[0]) if found else elsewhere


# --- reshards --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reshard:
    """A function of longctx.runtime.collectives, and its arguments behind the tensor."""

    function: str
    arguments: tuple[tuple[str, int], ...] = ()


def find_reshard(
    source: Placement, target: Placement, consumer_partitioned: bool, requires_grad: bool
) -> Reshard | None:
    """What takes a value from one placement to another, and its gradient back; None where nothing is to be done."""
    partial_gradient = consumer_partitioned and requires_grad  # of a target that is replicated
    match source, target:
        case Shard(i), Shard(j):
            return None if i == j else Reshard("all_to_all", (("split", j), ("gather", i)))
        case Shard(i), Replicate():
            return Reshard("all_gather_reduce" if partial_gradient else "all_gather", (("dim", i),))
        case Partial(), Shard(j):
            return Reshard("reduce_scatter", (("dim", j),))
        case Partial(), Replicate():
            return Reshard("all_reduce_both" if consumer_partitioned else "all_reduce")
        case Replicate(), Shard(j):
            return Reshard("take_slice", (("dim", j),))
        case Replicate(), Replicate():
            return Reshard("replicate") if partial_gradient else None
    raise AssertionError(f"no consumer takes a value that is {target}")
