"""Plan + graph -> the graph that one rank computes: local shapes, and the moves between ops as ops.

The algebra is DESIGN.md's. A value has the placement its producer gives it (R, S0, S1, ..., P); a consumer wants one; a
move leads from the one to the other, forward and, for the gradient, back. An input that is R under a split op receives
a gradient that is P, which is why a move depends on whether its consumer is split.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from longctx.compiler.annotation import (
    PARTIAL,
    REPLICATED,
    Annotation,
    Partition,
    Placement,
    partitions,
    split_dim,
)
from longctx.compiler.operators import annotate
from longctx.compiler.trace import Graph, LayerCall, Op, Tensor, map_tensors

COLLECTIVES = "longctx.runtime.collectives"


@dataclass(frozen=True)
class Assignment:
    """How the plan's ranks share a graph.

    Every op has one of its legal partitions. `boundary` is the placement of what flows between layers, `inputs` that of
    the other values that layers take; both R or S. A parameter in `resident` is kept split along that dimension, each
    rank its own part; all others are FSDP's, over all ranks.
    """

    n_ranks: int
    partitions: dict[Op, Partition]
    boundary: Placement = REPLICATED
    inputs: dict[Tensor, Placement] = field(default_factory=dict)
    resident: dict[Tensor, int] = field(default_factory=dict)


def legal_partitions(op: Op, n_ranks: int) -> list[Partition]:
    """The legal partitions of an op, the whole one first."""
    annotation: Annotation = annotate(op)
    return partitions(annotation, [t.shape for t in op.inputs], n_ranks)


@dataclass(frozen=True)
class Move:
    """A function of runtime.collectives and its arguments behind the tensor."""

    function: str
    arguments: tuple[tuple[str, int], ...] = ()


def find_move(source: Placement, target: Placement, consumer_split: bool, requires_grad: bool) -> Move | None:
    """The move that takes a value from one placement to another; None where none is needed."""
    i, j = split_dim(source), split_dim(target)
    if source == target and i is not None:
        return None
    if i is not None and j is not None:
        return Move("all_to_all", (("split", j), ("gather", i)))
    if i is not None:
        return Move("all_gather_reduce" if consumer_split and requires_grad else "all_gather", (("dim", i),))
    if source == PARTIAL:
        if j is not None:
            return Move("reduce_scatter", (("dim", j),))
        return Move("all_reduce_both" if consumer_split else "all_reduce")
    if j is not None:
        return Move("take_slice", (("dim", j),))
    return Move("replicate") if consumer_split and requires_grad else None


def local_shape(shape: tuple[int, ...], placement: Placement, n_ranks: int) -> tuple[int, ...]:
    dim = split_dim(placement)
    return tuple(size // n_ranks if d == dim else size for d, size in enumerate(shape))


# --- the graph of one rank -----------------------------------------------------------------------------------------


def localize(graph: Graph, assignment: Assignment) -> Graph:
    """The graph that one rank of the plan computes."""
    boundary_values = {call.outputs[0] for call in graph.layer_calls}
    if graph.layer_calls:
        boundary_values.add(graph.layer_calls[0].inputs[0])
    wanted = {t: assignment.inputs.get(t, REPLICATED) for call in graph.layer_calls for t in call.inputs}
    wanted |= dict.fromkeys(boundary_values, assignment.boundary)

    kinds, local_of_kind = [], []
    for kind in graph.kinds:
        first = next(call for call in graph.layer_calls if graph.kinds[call.kind] is kind)
        placements = [wanted[t] for t in first.inputs]
        body = _Localizer(assignment, kind.parameters)
        inputs = tuple(body.add_input(t, p) for t, p in zip(kind.inputs, placements, strict=True))
        for op in kind.ops:
            body.add_op(op)
        ends = [assignment.boundary, *[REPLICATED] * (len(kind.outputs) - 1)]
        outputs = tuple(body.pass_on(t, end) for t, end in zip(kind.outputs, ends, strict=True))
        kinds.append(replace(kind, inputs=inputs, outputs=outputs, parameters=body.parameters, ops=tuple(body.ops)))
        local_of_kind.append((inputs, outputs))

    body = _Localizer(assignment, graph.parameters)
    inputs = tuple(body.add_input(t, REPLICATED) for t in graph.inputs)
    for item in graph.body:
        if isinstance(item, Op):
            body.add_op(item)
        else:
            body.add_layer(item, wanted, assignment.boundary)
    output = body.move_to(graph.output, REPLICATED, consumer_split=False, why="the loss is every rank's")
    return replace(
        graph, inputs=inputs, output=output, parameters=body.parameters, body=tuple(body.ops), kinds=tuple(kinds)
    )


@dataclass
class _Localizer:
    """Rewrites one function's ops for a rank; equal moves of a value are made once and shared."""

    assignment: Assignment
    names: dict[str, Tensor]  # parameters, by name
    parameters: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op | LayerCall] = field(default_factory=list)
    placements: dict[Tensor, Placement] = field(default_factory=dict)  # of the graph's tensors
    local: dict[Tensor, Tensor] = field(default_factory=dict)  # the graph's tensor -> this rank's
    moved: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.names.items():
            dim = self.assignment.resident.get(tensor)
            local = replace(tensor)
            if dim is not None:
                shape = local_shape(tensor.shape, f"S{dim}", self.assignment.n_ranks)
                local = replace(tensor, shape=shape, dtype=torch.float32)  # a master: nothing casts it but the code
            self.parameters[name] = self.local[tensor] = local

    def add_input(self, tensor: Tensor, placement: Placement) -> Tensor:
        shape = local_shape(tensor.shape, placement, self.assignment.n_ranks)
        self.local[tensor] = replace(tensor, shape=shape)
        self.placements[tensor] = placement
        return self.local[tensor]

    def add_op(self, op: Op) -> None:
        partition = self.assignment.partitions[op]
        wanted = iter(partition.inputs)
        args, kwargs = map_tensors((op.args, op.kwargs), lambda t: self.fetch(t, next(wanted), partition, op))
        outputs = []
        for tensor, placement in zip(op.outputs, partition.outputs, strict=True):
            outputs.append(self.add_input(tensor, placement))
        local = replace(op, args=args, kwargs=kwargs, outputs=tuple(outputs))
        self.ops.append(replace(local, args=_local_sizes(local, op)))

    def add_layer(self, call: LayerCall, wanted: dict[Tensor, Placement], boundary: Placement) -> None:
        inputs = tuple(self.pass_on(t, wanted[t]) for t in call.inputs)
        ends = [boundary, *[REPLICATED] * (len(call.outputs) - 1)]
        outputs = tuple(self.add_input(t, end) for t, end in zip(call.outputs, ends, strict=True))
        self.ops.append(replace(call, inputs=inputs, outputs=outputs))

    def pass_on(self, tensor: Tensor, placement: Placement) -> Tensor:
        """The tensor as it flows between layers."""
        split = placement != REPLICATED
        how = f"split along dimension {split_dim(placement)}" if split else "whole on every rank"
        return self.move_to(tensor, placement, split, f"layers take it {how}")

    def fetch(self, tensor: Tensor, target: Placement, partition: Partition, op: Op) -> Tensor:
        """The tensor as an op wants it."""
        if tensor.kind == "constant":
            self.local[tensor], self.placements[tensor] = tensor, REPLICATED
        if tensor.kind == "parameter":
            return self.fetch_parameter(tensor, target, partition, op)
        return self.move_to(tensor, target, partition.dim is not None, _why(op, partition), op.module)

    def fetch_parameter(self, tensor: Tensor, target: Placement, partition: Partition, op: Op) -> Tensor:
        """FSDP sums a weight's gradient over all ranks: right for a partial sum, a slice's zeros included; where every
        rank computes all of it, it is counted n_ranks times. A resident weight is a float32 master, cast where used."""
        local = self.local[tensor]
        if tensor in self.assignment.resident:
            if local.dtype == tensor.dtype:
                return local
            return self._insert("aten.to.dtype", (local, tensor.dtype), {}, local.shape, tensor, op)
        if target != REPLICATED:
            dim = split_dim(target)
            shape = local_shape(tensor.shape, target, self.assignment.n_ranks)
            return self._insert(f"{COLLECTIVES}.own_slice", (local,), {"dim": dim}, shape, tensor, op)
        if partition.dim is not None or not tensor.requires_grad or self.assignment.n_ranks == 1:
            return local
        arguments = (local, 1 / self.assignment.n_ranks)
        return self._insert(f"{COLLECTIVES}.scale_gradient", arguments, {}, local.shape, tensor, op)

    def move_to(self, tensor: Tensor, target: Placement, consumer_split: bool, why: str, module: str = "") -> Tensor:
        """The tensor in another placement; `why` and `module` are of the consumer."""
        source = self.placements[tensor]
        move = find_move(source, target, consumer_split, tensor.requires_grad)
        if move is None or self.assignment.n_ranks == 1:
            return self.local[tensor]
        if (tensor, move) not in self.moved:
            shape = local_shape(tensor.shape, target, self.assignment.n_ranks)
            target_name = f"{COLLECTIVES}.{move.function}"
            made = self._insert(
                target_name, (self.local[tensor],), dict(move.arguments), shape, tensor, None, module, why
            )
            self.moved[tensor, move] = made
        return self.moved[tensor, move]

    def _insert(
        self,
        target: str,
        args: tuple,
        kwargs: dict,
        shape: tuple[int, ...],
        like: Tensor,
        within: Op | None,
        module: str = "",
        note: str = "",
    ) -> Tensor:
        """Appends an op made here; with `within`, one that is written inside that op's statement."""
        made = replace(like, shape=shape, kind="activation")
        statement, module = (within.statement, within.module) if within else (None, module)
        self.ops.append(Op(target, args, kwargs, (made,), module, statement, note))
        return made


def _why(op: Op, partition: Partition) -> str:
    """What a person is told of a move to an op: how that op is computed."""
    name = op.target.split(".")[1] if op.target.startswith("aten.") else op.target.rsplit(".", 1)[-1]
    name = f"{op.module.rsplit('.', 1)[-1]}'s {name}" if op.module else name
    if partition.dim is None:
        return f"every rank computes {name} whole"
    dim = split_dim(partition.outputs[0])
    if dim is None:
        return f"each rank computes a part of {name}'s sum"
    return f"{name} is split along dimension {dim} of its output"


def _local_sizes(op: Op, whole: Op) -> tuple:
    """The arguments of an op that names its output's sizes, with this rank's sizes."""
    name = op.target.split(".")[1]
    if name not in ("view", "reshape", "expand"):
        return op.args
    sizes = [-1 if asked == -1 else size for asked, size in zip(op.args[1], op.outputs[0].shape, strict=True)]
    return (op.args[0], sizes, *op.args[2:])


def resident_choices(parameter: Tensor, users: Iterable[tuple[Op, Partition]]) -> int | None:
    """The dimension that a parameter can be kept split along, given its users' partitions; None if they differ."""
    wanted = {p.inputs[i] for op, p in users for i, t in enumerate(op.inputs) if t is parameter}
    return split_dim(next(iter(wanted))) if len(wanted) == 1 else None
