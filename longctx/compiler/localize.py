"""Turns a graph and a plan into the graph that one rank computes, with local shapes and with reshards as operators.

Code generation, the prediction of memory and the report all read this graph. So the code that is written, the bytes
that are counted and the figures that are reported belong to the same plan. placement.py has the algebra of placements,
and docs/design.md explains it.
"""

from dataclasses import dataclass, field, replace

import torch

from longctx.compiler.ir import Graph, LayerCall, Op, Tensor, map_tensors
from longctx.compiler.ops import spec_of, told_arguments
from longctx.compiler.ops.aten import CAST
from longctx.compiler.ops.reshards import target_of_reshard
from longctx.compiler.placement import REPLICATE, Grid, Partition, Placement, Shard, local_shape, reshard_steps


@dataclass(frozen=True)
class Assignment:
    """How the ranks of a plan share a graph.

    Every op has one of its legal partitions. `boundary` is the placement of the hidden states between layers, and
    `inputs` has the placements of the other values that layers take; both are Replicate or Shard. The parameters in
    `plan_sharded` are sharded over the ranks of the plan, along the dimension given there, and each rank has its own
    shard throughout. FSDP shards all other parameters over all ranks.
    """

    plan_size: int
    partitions: dict[Op, Partition]
    boundary: Placement = REPLICATE
    inputs: dict[Tensor, Placement] = field(default_factory=dict)
    plan_sharded: dict[Tensor, int] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        """Whether a row's tokens are split in balanced order."""
        of_ops = (p for partition in self.partitions.values() for p in (*partition.inputs, *partition.outputs))
        outer = (p.outer if isinstance(p, Grid) else p for p in (*of_ops, self.boundary, *self.inputs.values()))
        return any(isinstance(p, Shard) and p.balanced for p in outer)


def localize(graph: Graph, assignment: Assignment) -> Graph:
    """The graph that one rank of the plan computes. It is the same for every rank."""
    boundary_values = {call.outputs[0] for call in graph.layer_calls}
    if graph.layer_calls:
        boundary_values.add(graph.layer_calls[0].inputs[0])
    wanted = {t: assignment.inputs.get(t, REPLICATE) for call in graph.layer_calls for t in call.inputs}
    wanted |= dict.fromkeys(boundary_values, assignment.boundary)

    kinds = []
    for kind in graph.kinds:
        first = next(call for call in graph.layer_calls if graph.kinds[call.kind] is kind)
        placements = [wanted[t] for t in first.inputs]
        body = _Localizer(assignment, kind.parameters)
        inputs = tuple(body.add_input(t, p) for t, p in zip(kind.inputs, placements, strict=True))
        for op in kind.ops:
            body.add_op(op)
        ends = [assignment.boundary, *[REPLICATE] * (len(kind.outputs) - 1)]
        outputs = tuple(body.pass_on(t, end) for t, end in zip(kind.outputs, ends, strict=True))
        kinds.append(replace(kind, inputs=inputs, outputs=outputs, parameters=body.parameters, ops=tuple(body.ops)))

    body = _Localizer(assignment, graph.parameters)
    inputs = tuple(body.add_input(t, REPLICATE) for t in graph.inputs)
    for item in graph.body:
        if isinstance(item, Op):
            body.add_op(item)
        else:
            body.add_layer(item, wanted, assignment.boundary)
    output = body.reshard(graph.output, REPLICATE, consumer_partitioned=False, why="the loss is every rank's")
    return replace(
        graph, inputs=inputs, output=output, parameters=body.parameters, body=tuple(body.ops), kinds=tuple(kinds)
    )


@dataclass
class _Localizer:
    """Rewrites the ops of one function, the root's or a layer kind's, for a rank.

    Where several ops need the same reshard of a value, it is made once and they share the result.
    """

    assignment: Assignment
    whole_parameters: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op | LayerCall] = field(default_factory=list)
    placements: dict[Tensor, Placement] = field(default_factory=dict)  # of the graph's tensors
    local: dict[Tensor, Tensor] = field(default_factory=dict)  # tensor of the graph -> tensor of this rank
    resharded: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.whole_parameters.items():
            dim = self.assignment.plan_sharded.get(tensor)
            local = replace(tensor)
            if dim is not None:
                shape = local_shape(tensor.shape, Shard(dim), self.assignment.plan_size)
                local = replace(tensor, shape=shape, dtype=torch.float32)  # a master; only the generated code casts it
            self.parameters[name] = self.local[tensor] = local

    def add_input(self, tensor: Tensor, placement: Placement) -> Tensor:
        """This rank's part of a value that comes in with this placement, or that an op or a layer leaves in it."""
        shape = local_shape(tensor.shape, placement, self.assignment.plan_size)
        self.local[tensor] = replace(tensor, shape=shape)
        self.placements[tensor] = placement
        return self.local[tensor]

    def add_op(self, op: Op) -> None:
        """Appends an op, after the reshards that its partition needs."""
        partition = self.assignment.partitions[op]
        wanted = iter(partition.inputs)
        args, kwargs = map_tensors((op.args, op.kwargs), lambda t: self.fetch(t, next(wanted), partition, op))
        outputs = []
        for tensor, placement in zip(op.outputs, partition.outputs, strict=True):
            outputs.append(self.add_input(tensor, placement))
        draws_own = partition.dim is not None and spec_of(op).draws_random(op)
        kwargs = {**kwargs, **told_arguments(op, partition)}
        local = replace(op, args=args, kwargs=kwargs, outputs=tuple(outputs), draws_own=draws_own)
        self.ops.append(replace(local, args=_local_sizes(local)))

    def add_layer(self, call: LayerCall, wanted: dict[Tensor, Placement], boundary: Placement) -> None:
        """Appends the call of a layer, after the reshards to the placements that layers take their inputs in."""
        inputs = tuple(self.pass_on(t, wanted[t]) for t in call.inputs)
        ends = [boundary, *[REPLICATE] * (len(call.outputs) - 1)]
        outputs = tuple(self.add_input(t, end) for t, end in zip(call.outputs, ends, strict=True))
        self.ops.append(replace(call, inputs=inputs, outputs=outputs))

    def pass_on(self, tensor: Tensor, placement: Placement) -> Tensor:
        """The tensor in the placement that it has between layers."""
        if isinstance(placement, Shard):
            return self.reshard(tensor, placement, True, f"layers take it split along dimension {placement.dim}")
        return self.reshard(tensor, placement, False, "layers take it whole on every rank")

    def fetch(self, tensor: Tensor, target: Placement, partition: Partition, op: Op) -> Tensor:
        """The tensor in the placement that an op takes it in under its partition."""
        if tensor.kind == "constant":
            self.local[tensor], self.placements[tensor] = tensor, REPLICATE
        if tensor.kind == "parameter":
            return self.fetch_parameter(tensor, target, partition, op)
        return self.reshard(tensor, target, partition.dim is not None, _why(op, partition), op.module)

    def fetch_parameter(self, tensor: Tensor, target: Placement, partition: Partition, op: Op) -> Tensor:
        """The weight as an op takes it under its partition.

        A plan-sharded weight is a float32 master, and is cast where it is used. FSDP sums the gradient of every other
        weight over all ranks. That sum is right if each rank's gradient is a partial sum; the gradient of a slice,
        which is zero outside the slice, is one too. If every rank computes the whole gradient, the sum counts it
        plan_size times, so it is scaled by 1 / plan_size.
        """
        local = self.local[tensor]
        if tensor in self.assignment.plan_sharded:
            if local.dtype == tensor.dtype:
                return local
            return self._insert(CAST, (local, tensor.dtype), {}, local.shape, tensor, op)
        part, over = (target.inner, {"within": target.size}) if isinstance(target, Grid) else (target, {})
        if isinstance(part, Shard):
            shape = local_shape(tensor.shape, target, self.assignment.plan_size)
            which = {"dim": part.dim} | ({"copies": part.copies} if part.copies > 1 else {}) | over
            return self._insert(target_of_reshard("own_slice"), (local,), which, shape, tensor, op)
        if partition.dim is not None or not tensor.requires_grad or self.assignment.plan_size == 1:
            return local
        arguments = (local, 1 / self.assignment.plan_size)
        return self._insert(target_of_reshard("scale_gradient"), arguments, {}, local.shape, tensor, op)

    def reshard(
        self, tensor: Tensor, target: Placement, consumer_partitioned: bool, why: str, module: str = ""
    ) -> Tensor:
        """The tensor in another placement.

        Args:
            consumer_partitioned: whether the op that takes the result is partitioned, on which the gradient depends.
            why: how that op is computed, for the comment in generated code.
            module: the module of that op.
        """
        if self.assignment.plan_size == 1:
            return self.local[tensor]
        made, done = self.local[tensor], ()
        for reshard, after in reshard_steps(
            self.placements[tensor], target, consumer_partitioned, tensor.requires_grad
        ):
            done = (*done, reshard)
            if (tensor, done) not in self.resharded:
                shape = local_shape(tensor.shape, after, self.assignment.plan_size)
                function, arguments = target_of_reshard(reshard.function), dict(reshard.arguments)
                self.resharded[tensor, done] = self._insert(
                    function, (made,), arguments, shape, tensor, None, module, why
                )
            made = self.resharded[tensor, done]
        return made

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
        """Appends an op that the model does not have, and returns its output, which is a Tensor like `like`.

        With `within`, generated code writes it inside the statement of that op.
        """
        made = replace(like, shape=shape, kind="activation")
        statement, module = (within.statement, within.module) if within else (None, module)
        self.ops.append(Op(target, args, kwargs, (made,), module, statement, note))
        return made


def _why(op: Op, partition: Partition) -> str:
    """How an op is computed, in words: the reason that generated code gives for a reshard before it."""
    name = spec_of(op).name
    name = f"{op.module.rsplit('.', 1)[-1]}'s {name}" if op.module else name
    if partition.dim is None:
        return f"every rank computes {name} whole"
    output = partition.outputs[0]
    if isinstance(output, Grid) and isinstance(output.outer, Shard) and isinstance(output.inner, Shard):
        return f"{name} is split along dimensions {output.outer.dim} and {output.inner.dim} of its output"
    if isinstance(output, Shard):
        return f"{name} is split along dimension {output.dim} of its output"
    return f"each rank computes a part of {name}'s sum"


def _local_sizes(op: Op) -> tuple:
    """The arguments of an op, with this rank's sizes where the sizes of the output are an argument."""
    place = spec_of(op).sizes
    if place is None:
        return op.args
    sizes = [-1 if asked == -1 else size for asked, size in zip(op.args[place], op.outputs[0].shape, strict=True)]
    return (*op.args[:place], sizes, *op.args[place + 1 :])
