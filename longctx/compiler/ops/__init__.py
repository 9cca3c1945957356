"""What the compiler knows of operators: `spec_of(op)` finds the `OpSpec` in which all of an operator's rules stand.

spec.py         OpSpec: the rules that an operator has, and their defaults
aten.py         PyTorch's own operators, one entry each
registered.py   register_op: functions as operators, the user's, and those of longctx/kernels
writes.py       operators that write into a tensor, and what computes the same without
reshards.py     the collectives between placements
partitions.py   annotations that many of PyTorch's operators share
python.py       the forms in which operators are written
positions.py    values of tensors that depend on positions alone, such as masks
scores.py       attention that is written out in PyTorch's operators
"""

from dataclasses import dataclass

from longctx.compiler import placement
from longctx.compiler.annotation import Annotation, Entry, expand_leading, parse
from longctx.compiler.ir import Op, OwnRing, OwnStarts, Tensor
from longctx.compiler.ops import aten
from longctx.compiler.ops.python import Expression, Values, overload, own_function
from longctx.compiler.ops.registered import REGISTERED_OPS, RegisteredOp, arguments_of, register_op, target_of
from longctx.compiler.ops.reshards import COLLECTIVES, RESHARDS
from longctx.compiler.ops.spec import Flops, OpSpec, Ring, Shares, View

__all__ = [
    "COLLECTIVES",
    "REGISTERED_OPS",
    "Flops",
    "OpSpec",
    "RegisteredOp",
    "Ring",
    "Row",
    "Shares",
    "View",
    "annotation_of",
    "arguments_of",
    "expression",
    "imports_of",
    "is_known",
    "legal_partitions",
    "passed_round",
    "register_op",
    "ring_of",
    "spec_of",
    "splits_queries",
    "target_of",
    "told_arguments",
    "told_share",
    "told_split",
]

RING = " ring"  # behind the identifier of a dimension that is split with a ring
DRAW_OWN = "draw_own"  # of collectives: what calls an op that draws random numbers for a part of its own


def spec_of(op: Op) -> OpSpec:
    """All that is known of an op's operator."""
    if op.target in REGISTERED_OPS:
        return REGISTERED_OPS[op.target].spec
    return RESHARDS.get(op.target) or aten.spec_of_aten(op)


def is_known(op: Op) -> bool:
    """Whether an operator has an entry; one that has none is computed whole by every rank."""
    return op.target in REGISTERED_OPS or op.target in RESHARDS or spec_of(op).name in aten.ATEN


def annotation_of(op: Op) -> Annotation:
    """The annotation of an op; its inputs are op.inputs, the tensors among its arguments in order."""
    if op.target in REGISTERED_OPS:
        return _registered_annotation(op)
    if not op.inputs:
        return Annotation("-> ?", (), (Entry(replicated=True),) * len(op.outputs))
    return parse(spec_of(op).partition(op))


def _registered_annotation(op: Op) -> Annotation:
    """Entries of arguments that are no tensors fall out; tensors that have no entry are replicated."""
    annotation = REGISTERED_OPS[op.target].annotate(op.args, op.kwargs)
    arguments = list(arguments_of(op).values())
    entries = [*annotation.inputs, *[Entry(replicated=True)] * len(arguments)]
    inputs = tuple(entry for entry, value in zip(entries, arguments, strict=False) if isinstance(value, Tensor))
    return Annotation(annotation.text, inputs, annotation.outputs)


@dataclass(frozen=True)
class Row:
    """How the ranks of a plan may share out the tokens of a row.

    balanced: whether these are split in balanced order; group_size: how many neighbours may form a group, between which
    tokens are split while a group's ranks share out something else, or 1 if none do.
    """

    length: int
    balanced: bool = False
    group_size: int = 1


def legal_partitions(op: Op, plan_size: int, row: Row | None = None) -> list[placement.Partition]:
    """The legal partitions of an op over the ranks of a plan, the one that every rank computes whole first.

    Without a row tokens are a dimension like any other.
    """
    annotation, shapes = annotation_of(op), [t.shape for t in op.inputs]
    if row is None:
        return placement.partitions(annotation, shapes, plan_size)
    of_tokens = _of_length(row.length, annotation, op)
    in_order = of_tokens if row.balanced else ()
    legal = _with_ring(op, annotation, placement.partitions(annotation, shapes, plan_size, in_order))
    if not 1 < row.group_size < plan_size:
        return legal
    n_groups, told = plan_size // row.group_size, spec_of(op).told
    for outer in _with_ring(op, annotation, placement.partitions(annotation, shapes, n_groups, in_order)):
        dim = outer.dim and outer.dim.removesuffix(RING)
        if dim in of_tokens and placement.PARTIAL not in outer.outputs:
            apart = (None, dim, told.dim if told else None)  # which a group's ranks don't share out
            parts = [placement.local_shape(s, p, n_groups) for s, p in zip(shapes, outer.inputs, strict=True)]
            within = placement.partitions(annotation, parts, row.group_size, in_order)
            legal += [placement.in_groups(outer, p, row.group_size) for p in within if p.dim not in apart]
    return legal


def _with_ring(op: Op, annotation: Annotation, legal: list[placement.Partition]) -> list[placement.Partition]:
    """The partitions, and besides that along a dimension that the op is told of, the same with a ring if it has one."""
    told = spec_of(op).told
    if told is None or told.ring is None or not told.ring.fits(op):
        return legal
    return [*legal, *(_ringed(p, told.ring, annotation, op) for p in legal if p.dim == told.dim)]


def _ringed(split: placement.Partition, ring: Ring, annotation: Annotation, op: Op) -> placement.Partition:
    """The partition with the ring's dimension split as well, in the same order."""
    (order,) = {p.balanced for p in split.inputs if isinstance(p, placement.Shard)}
    inputs = list(split.inputs)
    for number, (entry, tensor) in enumerate(zip(annotation.inputs, op.inputs, strict=True)):
        dims = () if entry.replicated else expand_leading(entry, len(tensor.shape))
        for place, factors in enumerate(dims):
            if factors[0].name == ring.dim:
                inputs[number] = placement.Shard(place, balanced=order)
    return placement.Partition(f"{split.dim}{RING}", tuple(inputs), split.outputs)


def told_arguments(op: Op, partition: placement.Partition) -> dict[str, OwnStarts]:
    """The argument that tells an op where this rank's part begins, if it is split along a dimension of which it has to
    know that; or with which ranks it passes parts round."""
    told, split = spec_of(op).told, told_split(op, partition)
    if told is None or split is None:
        return {}
    length, placed, sharing = split
    ring = ring_of(op, partition)
    if ring:
        return {ring.argument: OwnRing(length, placed.balanced, sharing)}
    return {told.argument: OwnStarts(length, placed.balanced, sharing)}


def ring_of(op: Op, partition: placement.Partition) -> Ring | None:
    """The ring of an op, if parts are passed round under this partition."""
    told = spec_of(op).told
    is_ring = told and partition.dim and partition.dim.split(" / ")[0] == f"{told.dim}{RING}"
    return told.ring if told and is_ring else None


def passed_round(op: Op, ring: Ring) -> list[Tensor]:
    """The inputs of which the ranks of a ring have parts that they pass round."""
    entries = zip(annotation_of(op).inputs, op.inputs, strict=True)
    return [t for entry, t in entries if ring.dim in {dim.name for factors in entry.dims for dim in factors}]


def told_split(op: Op, partition: placement.Partition) -> tuple[int, placement.Shard, int] | None:
    """How the dimension is split of which a rank has to know where its part begins: its length, its placement, and how
    many neighbours have the same part; None if it is not split."""
    told = spec_of(op).told
    if told is None or partition.dim is None or partition.dim.split(" / ")[0].removesuffix(RING) != told.dim:
        return None
    for tensor, placed in zip(op.inputs, partition.inputs, strict=True):
        outer, sharing = (placed.outer, placed.size) if isinstance(placed, placement.Grid) else (placed, 1)
        if isinstance(outer, placement.Shard):
            return tensor.shape[outer.dim], outer, sharing
    raise AssertionError(f"{op.target} is split along {partition.dim} and none of its inputs is")


def splits_queries(op: Op, partition: placement.Partition) -> bool:
    """Whether an op is split along tokens of which a rank has to know where its part begins, as attention's queries."""
    told = spec_of(op).told
    return told is not None and told.share is None and told_split(op, partition) is not None


def told_share(op: Op, partition: placement.Partition, plan_size: int) -> float:
    """What a rank has of bytes that are told as shares of an op's inputs, as the inputs are placed: all of them, but
    where ranks share out what no input is split along."""
    told, split = spec_of(op).told, told_split(op, partition)
    if told is None or told.share is None or split is None:
        return 1.0
    _, _, sharing = split
    return told.share(op, plan_size // sharing)


def _of_length(length: int, annotation: Annotation, op: Op) -> set[str]:
    """The identifiers of a dimension of this length, less those that weights have, or that an op is told its share of:
    these are split in one order."""
    names: set[str] = set()
    of_weights: set[str] = set()
    for entry, tensor in zip(annotation.inputs, op.inputs, strict=True):
        dims = () if entry.replicated else expand_leading(entry, len(tensor.shape))
        if tensor.kind == "parameter":
            of_weights |= {factors[0].name for factors in dims}
        names |= {factors[0].name for factors, size in zip(dims, tensor.shape, strict=False) if size == length}
    told = spec_of(op).told
    return names - of_weights - ({told.dim} if told and told.share else set())


def imports_of(op: Op) -> list[tuple[str, str]]:
    """The modules and the names that generated code imports to call an op; none for PyTorch's own operators."""
    targets = [] if aten.is_aten(op) else [op.target]
    targets += [f"{COLLECTIVES}.{DRAW_OWN}"] if op.draws_own else []
    targets += [f"{COLLECTIVES}.{own_function(value)}" for value in op.kwargs.values() if isinstance(value, OwnStarts)]
    return [(module, name) for module, _, name in (target.rpartition(".") for target in targets)]


def expression(op: Op, values: Values) -> Expression:
    """The Python expression that computes an op."""
    written = spec_of(op).python(op, values) or overload(op, values)
    return Expression(f"{DRAW_OWN}(lambda: {written.text})") if op.draws_own else written
