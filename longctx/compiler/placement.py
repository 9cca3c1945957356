"""Where a tensor's elements are over the ranks of a plan, how an operator may be partitioned, and what leads from one
placement to another. docs/design.md has the algebra.

Placements are those of PyTorch's DTensor, for one dimension of ranks. Partitioning an operator along one identifier of
its annotation places its inputs and outputs; between the placement that a producer leaves and the one that a consumer
wants stands a reshard. Gradients have placements of their own, and this is where wrong results would hide: an input
that is replicated under a partitioned operator receives a gradient that is partial, and under an operator that every
rank computes whole one that is replicated. So a reshard depends on whether its consumer is partitioned.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

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
    """Rank r of P has the r-th of P equal parts along `dim`; with `copies`, the (r / copies)-th of P / copies parts.

    What each of several neighbours has is wanted of keys and values that their query heads share. A gradient is then
    the sum of theirs.

    In balanced order rank r has the r-th of 2 P blocks and the r-th from the end. Later tokens of a row see more keys
    than earlier ones, so that ranks have as much of causal attention to compute. All else is the same in either order.
    """

    dim: int
    copies: int = 1
    balanced: bool = False

    def __str__(self) -> str:
        return f"S{self.dim}{f' x{self.copies}' if self.copies > 1 else ''}{' balanced' if self.balanced else ''}"

    def blocks(self, length: int, plan_size: int) -> tuple[list[tuple[int, ...]], int]:
        """Where each rank's blocks of a dimension of this length begin, and how long a block is."""
        if not self.balanced:
            n = length // plan_size
            return [(rank * n,) for rank in range(plan_size)], n
        n = length // (2 * plan_size)
        return [(rank * n, length - (rank + 1) * n) for rank in range(plan_size)], n


@dataclass(frozen=True)
class Grid:
    """The ranks of a plan in groups of `size` neighbours: the groups have the tensor as `outer` says, and the ranks of
    a group have what the group has as `inner` says."""

    outer: "Replicate | Partial | Shard"
    inner: "Replicate | Partial | Shard"
    size: int

    def __str__(self) -> str:
        return f"{self.outer} / {self.inner}"


Placement = Replicate | Partial | Shard | Grid
REPLICATE, PARTIAL = Replicate(), Partial()


def parse_placement(text: str) -> Placement:
    """The placement that str() wrote.

    Raises:
        ValueError: the text is none.
    """
    if text in ("R", "P"):
        return REPLICATE if text == "R" else PARTIAL
    number, _, order = text[1:].partition(" ")
    if text[:1] == "S" and number.isdigit() and order in ("", "balanced"):
        return Shard(int(number), balanced=bool(order))
    raise ValueError(f"{text!r} is no placement")


def local_shape(shape: tuple[int, ...], placement: Placement, plan_size: int) -> tuple[int, ...]:
    """The shape of a rank's part of a tensor."""
    if isinstance(placement, Grid):
        of_group = local_shape(shape, placement.outer, plan_size // placement.size)
        return local_shape(of_group, placement.inner, placement.size)
    if not isinstance(placement, Shard):
        return tuple(shape)
    return tuple(size * placement.copies // plan_size if d == placement.dim else size for d, size in enumerate(shape))


Dims = tuple[tuple[Dim, ...], ...]  # of a tensor, each with its factors


# --- partitions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """One way for a plan's ranks to compute an operator: along the identifier `dim`, or, if None, whole on each rank.

    Of two identifiers, "k g", the first is split into parts of length 1 and these along the second. By "q / k" groups
    of neighbours share out the first, and the ranks of a group the second. By "q ring" the op is split along the first,
    and what it needs whole otherwise is passed round.

    An input that is replicated receives a gradient that is partial if the operator is partitioned, and replicated if it
    is not. A gradient has otherwise its tensor's placement; an output that is partial receives one that is replicated.
    """

    dim: str | None
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]


def partitions(
    annotation: Annotation,
    shapes: Sequence[tuple[int, ...] | None],
    plan_size: int,
    balanced: Collection[str] = (),
) -> list[Partition]:
    """Every legal partition of an operator over `plan_size` ranks, the whole one first.

    An identifier may be partitioned if its length divides evenly and it is the outermost factor of its dimension
    wherever it is, once a tensor at most. If there are more ranks than its length, those that have the same part of it
    may share out the factor behind it: query heads that share keys. The identifiers in `balanced` are split in balanced
    order, for which twice as many parts have to come out even.
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
        if mark == "^" or name not in known or plan_size == 1:
            continue
        if not all(_can_be_sharded(name, dims) for dims in (*entries, *outputs)):
            continue
        in_order = name in balanced
        if known[name] % (plan_size * (1 + in_order)) == 0:
            elsewhere = PARTIAL if mark == "+" else REPLICATE
            inputs = tuple(_placement(name, dims, REPLICATE, in_order) for dims in entries)
            results = tuple(_placement(name, dims, elsewhere, in_order) for dims in outputs)
            legal.append(Partition(name, inputs, results))
        elif inner := _shared_factor(name, entries, outputs, known, plan_size):
            inputs = tuple(
                _nested_placement(name, inner, dims, plan_size // known[name], plan_size) for dims in entries
            )
            results = tuple(_placement(name, dims, REPLICATE) for dims in outputs)
            legal.append(Partition(f"{name} {inner}", inputs, results))
    return legal


def _dims_with(name: str, dims: Dims) -> list[int]:
    """The dimensions of a tensor that have `name` among their factors."""
    return [place for place, factors in enumerate(dims) if name in {dim.name for dim in factors}]


def _can_be_sharded(name: str, dims: Dims) -> bool:
    """Whether a tensor has `name` in one dimension at most, and there as the outermost factor."""
    found = _dims_with(name, dims)
    return len(found) <= 1 and all(dims[place][0].name == name for place in found)


def _placement(name: str, dims: Dims, elsewhere: Placement, balanced: bool = False) -> Placement:
    """A tensor's placement under a partition along `name`; `elsewhere` if no dimension of the tensor has that name."""
    found = _dims_with(name, dims)
    return Shard(found[0], balanced=balanced) if found else elsewhere


def _shared_factor(
    name: str, entries: Sequence[Dims], outputs: Sequence[Dims], known: dict[str, int], plan_size: int
) -> str | None:
    """The factor that ranks with the same part of `name` share out: it is behind that wherever it is, and in all
    outputs; None if there is none that comes out even."""
    behind = [factors[1:2] for dims in (*entries, *outputs) for factors in dims if factors[0].name == name]
    inner = next((factors[0] for factors in behind if factors), None)
    if inner is None or inner.reduce or inner.name not in known or plan_size % known[name]:
        return None
    of_outputs = [factors[1:2] for dims in outputs for factors in dims if factors[0].name == name]
    everywhere = [dim for dims in (*entries, *outputs) for factors in dims for dim in factors if dim.name == inner.name]
    if len(everywhere) != behind.count((inner,)) or of_outputs != [(inner,)] * len(outputs):
        return None
    return inner.name if known[inner.name] % (plan_size // known[name]) == 0 else None


def _nested_placement(name: str, inner: str, dims: Dims, copies: int, plan_size: int) -> Placement:
    """A tensor's placement where `copies` ranks with the same part of `name` share out `inner`."""
    placement = _placement(name, dims, REPLICATE)
    if not isinstance(placement, Shard) or inner in {dim.name for dim in dims[placement.dim]}:
        return placement
    return Shard(placement.dim, copies) if copies < plan_size else REPLICATE


def in_groups(outer: Partition, inner: Partition, size: int) -> Partition:
    """The partition of an operator between groups of `size` neighbours, and of a group's part between its ranks."""

    def together(pair: tuple[Placement, Placement]) -> Placement:
        assert not any(isinstance(placement, Grid) for placement in pair)
        return REPLICATE if pair == (REPLICATE, REPLICATE) else Grid(*pair, size)  # pyright: ignore[reportArgumentType]

    inputs = tuple(map(together, zip(outer.inputs, inner.inputs, strict=True)))
    outputs = tuple(map(together, zip(outer.outputs, inner.outputs, strict=True)))
    return Partition(f"{outer.dim} / {inner.dim}", inputs, outputs)


# --- reshards --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reshard:
    """A function of longctx.runtime.collectives, and its arguments behind the tensor."""

    function: str
    arguments: tuple[tuple[str, int | bool], ...] = ()


def reshard_steps(
    source: Placement, target: Placement, consumer_partitioned: bool, requires_grad: bool
) -> list[tuple[Reshard, Placement]]:
    """The reshards that lead from one placement to another, each with the placement that it leads to.

    It is one at the most, unless the ranks form groups. What groups have is then changed by a reshard between them,
    across ranks that have the same place in their groups, and what the ranks of a group have by one within it. The
    group's part is cut further within it, so that a dimension can change hands between groups only where it is not.
    """
    if not isinstance(source, Grid) and not isinstance(target, Grid):
        reshard = find_reshard(source, target, consumer_partitioned, requires_grad)
        return [(reshard, target)] if reshard else []
    size = next(p.size for p in (source, target) if isinstance(p, Grid))
    start, end = _as_grid(source, size), _as_grid(target, size)
    if start is None or end is None:
        whole = reshard_steps(source, REPLICATE, False, requires_grad)
        return [*whole, *reshard_steps(REPLICATE, target, consumer_partitioned, requires_grad)]
    moved = {p.dim for p in (start.outer, end.outer) if isinstance(p, Shard)} if start.outer != end.outer else set()
    is_cut_before, is_cut_after = (isinstance(p, Shard) and p.dim in moved for p in (start.inner, end.inner))
    moves: list[tuple[str, Placement]] = [("outer", end.outer), ("inner", end.inner)]
    if is_cut_before:
        moves = [("inner", REPLICATE), *moves] if is_cut_after else moves[::-1]
    steps, now = [], start
    for level, placement in moves:
        is_last = placement == getattr(end, level)
        before, now = getattr(now, level), replace(now, **{level: placement})
        reshard = find_reshard(before, placement, consumer_partitioned and is_last, requires_grad)
        if reshard:
            over = ("across" if level == "outer" else "within", size)
            steps.append((replace(reshard, arguments=(*reshard.arguments, over)), now))
    return steps


def _as_grid(placement: Placement, size: int) -> Grid | None:
    """A placement over all ranks as what groups of `size` neighbours have, and their ranks; None if it is none such,
    since of ranks that have the same part some are in one group and some in another."""
    if isinstance(placement, Grid):
        return placement
    if not isinstance(placement, Shard) or placement.copies == 1:
        return Grid(placement, placement, size)
    if placement.copies % size == 0:
        return Grid(replace(placement, copies=placement.copies // size), REPLICATE, size)
    return Grid(Shard(placement.dim), placement, size) if size % placement.copies == 0 else None


def find_reshard(
    source: Placement, target: Placement, consumer_partitioned: bool, requires_grad: bool
) -> Reshard | None:
    """What takes a value from one placement to another, and its gradient back; None where nothing is to be done."""
    partial_gradient = consumer_partitioned and requires_grad  # of a target that is replicated
    match source, target:
        case Shard(i), Shard(j):
            if source == target:
                return None
            if i == j:
                return Reshard("reorder", (("dim", i), ("balanced", target.balanced)))
            orders = (("balanced_split", target.balanced), ("balanced_gather", source.balanced))
            where = (("split", j), ("gather", i), *_copies(target))
            return Reshard("all_to_all", (*where, *(order for order in orders if order[1])))
        case Shard(i), Replicate():
            function = "all_gather_reduce" if partial_gradient else "all_gather"
            return Reshard(function, (("dim", i), *_order(source)))
        case Partial(), Shard(j):
            return Reshard("reduce_scatter", (("dim", j), *_copies(target), *_order(target)))
        case Partial(), Replicate():
            return Reshard("all_reduce_both" if consumer_partitioned else "all_reduce")
        case Replicate(), Shard(j):
            return Reshard("take_slice", (("dim", j), *_copies(target), *_order(target)))
        case Replicate(), Replicate():
            return Reshard("replicate") if partial_gradient else None
    raise AssertionError(f"no consumer takes a value that is {target}")


def _copies(target: Shard) -> tuple[tuple[str, int], ...]:
    """The argument of a reshard that says how many neighbours have the same part, if it is more than one."""
    return (("copies", target.copies),) if target.copies > 1 else ()


def _order(split: Shard) -> tuple[tuple[str, bool], ...]:
    """The argument of a reshard that says in which order a dimension is split, unless it is from first to last."""
    return (("balanced", True),) if split.balanced else ()
