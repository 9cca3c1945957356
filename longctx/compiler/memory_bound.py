"""The memory of a plan as the integer program counts it: linear in its variables, and a bound of what memory.py walks.

Which tensors are live at a step depends on no partition, so the bytes of a step are linear in the variables that choose
partitions and policies. What depends on two choices at once is left out: results of reshards that no backward needs, a
value that is there in two placements, casts of plan-sharded weights. So are padding and the steps of a layer's forward,
which its backward exceeds. So a plan needs no less than the program says, and about as much: what the program finds is
walked, to know its memory exactly. Plans that nobody would choose may need up to a twentieth less, since an op's
workspace is counted as a share of the whole op's, and since they slice values before they save them.

A moment is a step of the root, or of one layer's backward. It holds, in GB,

    live          of the root, layers' inputs above all
    kept          what the layers before have saved: what one saves, times those that don't recompute it
    at work       the largest step of the layer's backward
    FSDP's        the root's weights, the layer's, those prefetched for the next one, and the reduce-scatter before
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from longctx.compiler.cost import bytes_of
from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op, Tensor, map_tensors, nbytes
from longctx.compiler.lifetimes import (
    Held,
    Live,
    SavedByLayer,
    Step,
    saved_by_op,
    saved_inputs,
    saved_tensors,
    steps,
    storages,
)
from longctx.compiler.linear_program import CONSTANT, Expression, LinearProgram, scaled, total
from longctx.compiler.ops import spec_of, splits_queries, told_arguments, told_share
from longctx.compiler.ops.spec import FLOAT32_BYTES
from longctx.compiler.placement import PARTIAL, REPLICATE, Partition, Placement, Shard, local_shape
from longctx.compiler.plan import GB
from longctx.compiler.recompute import Recompute


@dataclass(frozen=True)
class Choices:
    """The variables that memory depends on."""

    plan_size: int
    world_size: int
    partitions: Mapping[Op, list[tuple[Partition, int]]]  # an op's legal ones, each with its binary
    plan_sharded: Mapping[Tensor, list[tuple[int, int]]]  # a weight's dimensions, each with its binary
    left: Mapping[Tensor, Mapping[Placement, Expression]]  # the placements in which a producer leaves a value
    handed_on: Mapping[Tensor, Mapping[Placement, Expression]]  # the placements in which layers take a value
    reshards: Mapping[Tensor, list[tuple[Placement, Placement, int]]]  # of a value with one reader: from, to, whether
    recomputing: Sequence[int]  # of a kind: how many layers compute anything again
    repeats: Mapping[Op, int]  # of a layer's op: how many layers compute it again
    any_order: bool  # whether the order of tokens is open: what the leaner one needs counts, which is the balanced one


def largest_moment(program: LinearProgram, graph: Graph, choices: Choices) -> int:
    """Adds a variable that is the GB of the largest moment, without what is persistent."""
    layers = [_layers_of(program, graph, number, choices) for number in range(len(graph.kinds))]
    return program.largest({CONSTANT: 0.0}, *_moments(program, graph, layers, choices))


def _moments(
    program: LinearProgram, graph: Graph, layers: Sequence["_Layers"], choices: Choices
) -> Iterator[Expression]:
    """The expressions of the moments that may be the largest: the root's, and one or two layers' of each kind."""
    calls = graph.layer_calls
    root, weights = _Body(program, choices, graph.body), _Weights.of(graph, choices)
    saved = {call: SavedByLayer(tuple(call.inputs[i] for i in layers[call.kind].saved_inputs), {}) for call in calls}
    lasts = set({call.kind: call.index for call in calls}.values())
    largest = lasts | {len(calls) - 2}  # which may be larger than the last by the last one's reduce-scatter
    before_layers, below_layers = True, False
    for step in steps(graph.body, [graph.output], saved, ()):
        live = total(root.bytes_of(step.live), weights.gathered)
        if isinstance(step.item, Op):
            if not before_layers and not below_layers:
                live = total(live, layers[calls[-1].kind].weights.buffer, *(group.kept_by_all for group in layers))
            yield live
            continue
        before_layers, below_layers, index = False, step.phase == "backward", step.item.index
        if below_layers and index in largest:
            behind = Counter(call.kind for call in calls[index:])
            yield total(
                live,
                layers[step.item.kind].weights.gathered,
                layers[calls[max(0, index - 1)].kind].weights.buffer,
                layers[calls[index + 1].kind].weights.reduced if index + 1 < len(calls) else {},
                {layers[step.item.kind].at_work: 1.0},
                *(group.kept_by_others(program, behind[kind]) for kind, group in enumerate(layers)),
            )
    yield total(weights.gathered, weights.reduced, scaled(weights.reduced, 1 / choices.world_size))


# --- the layers of a kind --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """GB of the weights that FSDP gathers together, in the compute dtype, and reduces together, in float32."""

    gathered: Expression
    buffer: Expression
    reduced: Expression

    @staticmethod
    def of(owner: Graph | LayerKind, choices: Choices) -> "_Weights":
        def size(bytes_each: Callable[[Tensor], int]) -> Expression:
            return total(*(_by_fsdp(t, bytes_each(t), choices) for t in owner.parameters.values()))

        gathered = size(lambda t: t.dtype.itemsize)
        return _Weights(gathered, gathered if choices.world_size > 1 else {}, size(lambda t: FLOAT32_BYTES))


@dataclass(frozen=True)
class _Layers:
    """What the layers of a kind hold, in GB."""

    kept: list[tuple[Expression, Expression]]  # by one layer that keeps it, and by all that do; one for each variable
    at_work: int  # a variable: the largest step of a layer's backward
    weights: _Weights
    saved_inputs: list[int]

    @property
    def kept_by_all(self) -> Expression:
        return total(*(by_all for _, by_all in self.kept))

    def kept_by_others(self, program: LinearProgram, n: int) -> Expression:
        """What is kept by all but the last n layers: those that recompute come first."""
        return {
            program.largest({CONSTANT: 0.0}, total(by_all, scaled(by_one, -n))): 1.0 for by_one, by_all in self.kept
        }


def _layers_of(program: LinearProgram, graph: Graph, number: int, choices: Choices) -> _Layers:
    calls = graph.calls_of(number)
    kind, times, kind_input = graph.kinds[number], len(calls), calls[0].inputs[0]
    body = _Body(program, choices, kind.ops)
    recomputing = choices.recomputing[number]
    kept = []
    for repeats, saved in _saved_unless(kind, body, recomputing).items():
        again = {program.product(x, repeats, times): -size for x, size in saved.items()}
        kept.append((saved, total(scaled(saved, times), again)))
    whole_input = choices.handed_on[kind_input].get(REPLICATE, {})
    recomputed = {program.product(x, recomputing, times): _unsliced(kind_input, choices) for x in whole_input}
    kept.append(({}, recomputed))
    backward_steps = [step for step in steps(kind.ops, kind.outputs, {}, ()) if step.phase == "backward"]
    backward = [step.live + _gathered_gradient(step) for step in backward_steps]
    of_parts = [
        total(body.bytes_of(step.live), _more_for_parts(step.item, choices))
        for step in backward_steps
        if isinstance(step.item, Op) and spec_of(step.item).told
    ]
    at_work = program.largest({CONSTANT: 0.0}, *map(body.bytes_of, _undominated(backward)), *of_parts)
    return _Layers(kept, at_work, _Weights.of(kind, choices), saved_inputs(kind, Recompute.NOTHING))


def _saved_unless(kind: LayerKind, body: "_Body", recomputing: int) -> dict[int, Expression]:
    """What one layer saves, by the variable that counts the layers which don't save it.

    An output that autograd saves is saved by the layers that don't compute its op again. Another output is so only by
    those of them that compute something else again; `recomputing` counts all layers that compute anything again.
    """
    unless: dict[int, Expression] = {}

    def add(variable: int, terms: Expression) -> None:
        unless[variable] = total(unless.get(variable, {}), terms)

    for op, shares in saved_by_op(kind.ops, Recompute.NOTHING).items():
        repeats = body.choices.repeats[op]
        for tensor, share in shares.items():
            if tensor not in op.outputs or tensor not in body.savers:  # or bytes besides, told as a share of an output
                add(repeats, scaled(body.of_op(op, tensor), share))
            else:
                add(repeats, scaled(body.own(tensor), share))
                add(recomputing, body.copied(tensor))
        for tensor in op.outputs if repeats != recomputing else ():
            if tensor not in shares:
                add(repeats, body.of_op(op, tensor))
                add(recomputing, scaled(body.of_op(op, tensor), -1))
    return unless


def _more_for_parts(op: Op, choices: Choices) -> Expression:
    """What the backward of an op holds more where it is told which part of a dimension is its own, than is counted as
    shares of the whole op's: its workspace is another then, and gradients of what was gathered are whole."""
    more: Expression = {}
    for partition, x in choices.partitions[op]:
        if not splits_queries(op, partition):
            continue
        placed = iter(partition.inputs)
        shapes = (local_shape(t.shape, p, choices.plan_size) for t, p in zip(op.inputs, placed, strict=True))
        args, kwargs = map_tensors((op.args, op.kwargs), lambda t, shapes=shapes: replace(t, shape=next(shapes)))
        told = told_arguments(op, partition)
        told = {name: replace(own, balanced=own.balanced or choices.any_order) for name, own in told.items()}
        local = replace(op, args=args, kwargs={**kwargs, **told})
        own = spec_of(op).workspace(local, "backward")
        whole = spec_of(op).workspace(op, "backward")
        sides = (*op.inputs, *op.outputs), (*partition.inputs, *partition.outputs)
        places = dict(reversed(list(zip(*sides, strict=True))))
        counted = sum(share * bytes_of(t, places[t], choices.plan_size) for t, share in whole.items())
        more[x] = max(0.0, sum(share * nbytes(t) for t, share in own.items()) - counted) / GB
    gathered = [
        {z: max(0.0, bytes_of(t, target, choices.plan_size) - bytes_of(t, source, choices.plan_size)) / GB}
        for t in dict.fromkeys(op.inputs)
        for source, target, z in choices.reshards.get(t, ())
        if t.requires_grad
    ]
    return total(more, *gathered)


def _gathered_gradient(step: Step) -> Live:
    """The gradient of an op's output where it shares memory with another's, unless a reduce-scatter lies between."""
    assert isinstance(step.item, Op), "no layer calls another"
    shared = [Held("transient", t, step.item, is_gradient=True) for t in step.item.outputs]
    return Counter(held for held in shared if held._replace(op=None) not in step.live)


def _undominated(lives: Sequence[Live]) -> list[Live]:
    """The steps without those that hold nothing which another does not hold too, whatever the bytes are."""
    kept: list[Live] = []
    for live in sorted(lives, key=lambda live: -sum(live.values())):
        if not any(all(other[held] >= share for held, share in live.items()) for other in kept):
            kept.append(live)
    return kept


# --- bytes -----------------------------------------------------------------------------------------------------------


class _Body:
    """The bytes of the values of one body, in GB."""

    def __init__(self, program: LinearProgram, choices: Choices, items: Sequence[Op | LayerCall]):
        self.program, self.choices = program, choices
        storage = self.storage = storages(items)
        self.producers = {out: op for op in items if isinstance(op, Op) for out in op.outputs}
        self.savers: dict[Tensor, dict[Tensor, list[Op]]] = {}  # storage -> the values in it that ops save
        for op in (item for item in items if isinstance(item, Op)):
            for tensor in saved_tensors(op):
                self.savers.setdefault(storage.get(tensor, tensor), {}).setdefault(tensor, []).append(op)
        self.own, self.copied = functools.cache(self._own), functools.cache(self._copied)
        self.bytes_held = functools.cache(self._bytes_held)  # what is held at one step is held at most others
        self.handed_on = {storage.get(t, t): (t, placements) for t, placements in choices.handed_on.items()}

    def bytes_of(self, live: Live) -> Expression:
        return total(*(scaled(self.bytes_held(held), share) for held, share in live.items()))

    def _bytes_held(self, held: Held) -> Expression:
        tensor = held.tensor
        if held.op is not None and held.is_gradient:
            return self.gathered_gradient(tensor)
        if held.op is not None:
            return self.of_op(held.op, tensor)
        if tensor.kind == "parameter":
            return _by_fsdp(tensor, tensor.dtype.itemsize, self.choices)
        if held.kind == "saved":
            return self.handed_on_at_least(tensor)
        if tensor in self.savers and not held.is_gradient:
            return self.saved(tensor)
        return self.in_placements(tensor, self.choices.left[tensor])

    def handed_on_at_least(self, storage: Tensor) -> Expression:
        """What a layer saves of its input, or of one that is the same on every rank the slice that it may take."""
        tensor, placements = self.handed_on[storage]
        whole = placements.get(REPLICATE, {})
        sliced = scaled(whole, -_unsliced(tensor, self.choices))
        return total(self.in_placements(tensor, placements), sliced)

    def in_placements(self, tensor: Tensor, placements: Mapping[Placement, Expression]) -> Expression:
        """A rank's part of a tensor in each of its placements."""
        size = {p: bytes_of(tensor, p, self.choices.plan_size) / GB for p in placements}
        return total(*(scaled(chosen, size[p]) for p, chosen in placements.items()))

    def of_op(self, op: Op, tensor: Tensor) -> Expression:
        """A rank's part of one of an op's inputs or outputs, as the op has it: what bytes are told as shares of."""
        sizes = self.in_placements(tensor, self.placements_for(op, tensor))
        if tensor not in op.inputs:
            return sizes
        shares = {x: told_share(op, p, self.choices.plan_size) for p, x in self.choices.partitions[op]}
        return {x: size * shares.get(x, 1.0) for x, size in sizes.items()}

    def placements_for(self, op: Op, tensor: Tensor) -> dict[Placement, Expression]:
        return placements_of(self.choices.partitions[op], (*op.inputs, *op.outputs).index(tensor))

    def gathered_gradient(self, tensor: Tensor) -> Expression:
        """Of partial sums of which a shard is wanted, the gradient: the whole one, less the shard that it replaces."""
        more = _unsliced(tensor, self.choices)
        reshards = self.choices.reshards.get(tensor, ())
        return {z: more for source, target, z in reshards if source == PARTIAL and isinstance(target, Shard)}

    def saved(self, storage: Tensor) -> Expression:
        """A rank's part of the values in a storage that are saved, once in each placement that an op saves it in."""
        return total(self.own(storage), self.copied(storage))

    def _own(self, storage: Tensor) -> Expression:
        """`saved`, but for copies of views."""
        views = self.savers[storage]
        if self.is_one_value(storage):
            first = next(iter(views))
            return self.in_placements(first, self.saved_in(first, views[first]))
        share = min(1.0, nbytes(storage) / sum(map(nbytes, views)))
        return scaled(total(*(self.in_placements(t, self.saved_in(t, ops)) for t, ops in views.items())), share)

    def is_one_value(self, storage: Tensor) -> bool:
        """Whether the saved views are each of all of the storage: one value, until a reshard between them copies it."""
        return all(nbytes(tensor) == nbytes(storage) for tensor in self.savers[storage])

    def _copied(self, storage: Tensor) -> Expression:
        """Copies of a value that is saved once more as a view."""
        if not self.is_one_value(storage):
            return {}
        first, *others = self.savers[storage]
        return total(*(self.copies(view, first) for view in others))

    def copies(self, view: Tensor, first: Tensor) -> Expression:
        """What reshards make of a view, and of what it is a view of, as far back as it is one with `first`.

        The variables are 1 if there is a reshard: so the products with them are exact.
        """
        sharded: list[Expression] = [{CONSTANT: 0.0}]
        whole: list[Expression] = [{CONSTANT: 0.0}]
        seen_by_first = set(self.lineage(first))
        for value in self.lineage(view):
            reshards = self.choices.reshards.get(value, ())
            sharded.append({z: 1.0 for _, target, z in reshards if target != REPLICATE})
            whole.append({z: 1.0 for _, target, z in reshards if target == REPLICATE})
            if value in seen_by_first:
                break
        size = nbytes(view) / GB
        any_of = self.program.any_of
        return {any_of(*sharded): size / self.choices.plan_size, any_of(*whole): size}

    def lineage(self, tensor: Tensor) -> Iterator[Tensor]:
        """A value, what it is a view of, and so on."""
        yield tensor
        while self.storage.get(tensor, tensor) is not tensor:
            tensor = self.producers[tensor].inputs[0]
            yield tensor

    def saved_in(self, tensor: Tensor, ops: list[Op]) -> dict[Placement, Expression]:
        """Whether any of the ops that save a tensor has it in a placement."""
        by_op = [self.placements_for(op, tensor) for op in ops]
        if len(by_op) == 1:
            return by_op[0]
        every = dict.fromkeys(placement for placements in by_op for placement in placements)
        return {p: {self.program.any_of(*(chosen[p] for chosen in by_op if p in chosen)): 1.0} for p in every}


def placements_of(partitions: Iterable[tuple[Partition, int]], place: int) -> dict[Placement, Expression]:
    """The placements in which an op has one of its inputs and outputs, by its partitions and their variables."""
    placements: dict[Placement, Expression] = {}
    for partition, x in partitions:
        placements.setdefault((*partition.inputs, *partition.outputs)[place], {})[x] = 1.0
    return placements


def _unsliced(tensor: Tensor, choices: Choices) -> float:
    """The GB that a rank has more of a whole tensor than of its slice."""
    return nbytes(tensor) * (1 - 1 / choices.plan_size) / GB


def _by_fsdp(weight: Tensor, bytes_each: int, choices: Choices) -> Expression:
    """The GB that FSDP has of a weight at so many bytes a parameter: none if it is plan-sharded."""
    size = prod(weight.shape) * bytes_each / GB
    return {CONSTANT: size, **{r: -size for _, r in choices.plan_sharded.get(weight, ())}}
