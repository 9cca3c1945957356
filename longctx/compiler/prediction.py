"""What is predicted of a plan: seconds of a micro-batch and bytes at the peak, by kind.

The integer program minimizes these seconds; here they are added up again from the plan's own graph, reshard by reshard,
for people to read and for tests to hold the program to.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from longctx.compiler.cost import (
    Seconds,
    collective_bytes,
    collective_time,
    fsdp_copy_seconds,
    fsdp_seconds,
    gathers_of,
    op_seconds,
    optimizer_seconds,
    packing_time,
    plan_sharded_copy_seconds,
    plan_sharded_seconds,
    ring_bytes,
    ring_seconds,
)
from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op
from longctx.compiler.layout import Layout, layout_of
from longctx.compiler.localize import localize
from longctx.compiler.memory import MemoryPrediction
from longctx.compiler.ops import spec_of
from longctx.compiler.plan import Plan, Setting
from longctx.compiler.planner import predict_memory
from longctx.compiler.recompute import Recompute, names_of_keepable


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch on one rank: what its wall clock is made of, and what is hidden behind it."""

    compute: float  # of the model's operators, forward and backward
    recompute: float
    packing: float  # reshards' copies into and out of what they send
    weight_copies: float  # FSDP's own, and casts of plan-sharded weights
    optimizer: float  # a micro-batch's share of the norm and AdamW at the end of a step
    reshards: float  # of activations between the plan's ranks, waited for; what goes round a ring too
    fsdp_exposed: float  # of weights and gradients, beyond the computing that hides it
    fsdp_hidden: float
    plan_sharded_gradients: float  # all-reduces over the data-parallel ranks, waited for

    @property
    def computing(self) -> float:
        return self.compute + self.recompute + self.packing + self.weight_copies + self.optimizer

    @property
    def communication(self) -> float:
        return self.reshards + self.fsdp_exposed + self.plan_sharded_gradients

    @property
    def total(self) -> float:
        return self.computing + self.communication


@dataclass(frozen=True)
class Prediction:
    """What plan.json and the report tell of a plan."""

    n_parameters: int
    forward_flops: float  # of one row, attention counted whole, as the reference program counts it
    forward_flops_causal: float  # of attention, what its mask leaves
    time: StepTime
    parts: dict[str, float]  # see seconds_by_part
    memory: MemoryPrediction


def forward_flops(graph: Graph) -> tuple[float, float]:
    """FLOPs of one row's forward pass: with all of attention, and with what its mask leaves of it.

    The first is the convention of the reference program, 2 * (parameters * l + 2 * layers * hidden * l ** 2), so that
    MFU figures compare; but attention, and whatever else has products without weights, is counted as each layer has
    it: with its own heads, their width, and its window. Of experts those parameters count that a token meets.
    """
    whole = causal = 2.0 * count_met_parameters(graph) * graph.inputs[0].shape[-1]
    for op, n in _ops_and_times(graph):
        if not any(t.kind == "parameter" for t in op.inputs):
            spec = spec_of(op)
            own = spec.flops(op).forward
            causal += n * own
            whole += n * (spec.unmasked_flops(op) if spec.unmasked_flops else own)
    return whole, causal


def count_parameters(graph: Graph) -> int:
    return sum(prod(t.shape) for t in graph.all_parameters().values())


def count_met_parameters(graph: Graph) -> float:
    """The parameters that a token meets, on average: all, but of experts those of the ones that it chooses."""
    met = float(count_parameters(graph))
    for op, n in _ops_and_times(graph):
        if spec_of(op).chooses_weights:
            weights = sum(prod(t.shape) for t in op.inputs if t.kind == "parameter")
            met += n * (spec_of(op).flops(op).forward / (2 * graph.inputs[0].shape[-1]) - weights)
    return met


def _ops_and_times(graph: Graph) -> list[tuple[Op, int]]:
    """Every op of the root and of the layer kinds, with how often a forward pass runs it."""
    ops = [(op, 1) for op in graph.body if isinstance(op, Op)]
    return ops + [(op, len(graph.calls_of(number))) for number, kind in enumerate(graph.kinds) for op in kind.ops]


def predict(graph: Graph, plan: Plan, setting: Setting) -> Prediction:
    """FLOPs, seconds and bytes of a plan."""
    memory = predict_memory(graph, plan.assignment, plan.recompute, setting)
    time = step_time(graph, plan, setting)
    parts = seconds_by_part(graph, plan, setting, time)
    return Prediction(count_parameters(graph), *forward_flops(graph), time, parts, memory)


@dataclass(frozen=True)
class _Body:
    """The root, or all layers of a kind: the ops of the whole model, those of one rank, and the layers' policies."""

    owner: Graph | LayerKind
    ops: Sequence[Op | LayerCall]
    local_ops: Sequence[Op | LayerCall]
    policies: tuple[Recompute, ...]

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.owner)

    @cached_property
    def names(self) -> dict[Op, str]:
        """Of the ops whose outputs layers may keep."""
        return names_of_keepable([op for op in self.ops if isinstance(op, Op)])

    def recomputed(self, op: Op) -> int:
        """How often an op runs again in the backward pass."""
        if op in self.layout.not_repeated:
            return 0
        return sum(policy.computes_again(self.names.get(op)) for policy in self.policies)


def _bodies(graph: Graph, plan: Plan) -> list[_Body]:
    local = localize(graph, plan.assignment)
    bodies = [_Body(graph, graph.body, local.body, (Recompute.NOTHING,))]
    for number, (kind, own) in enumerate(zip(graph.kinds, local.kinds, strict=True)):
        policies = tuple(plan.recompute[call.index] for call in graph.calls_of(number))
        bodies.append(_Body(kind, kind.ops, own.ops, policies))
    return bodies


def step_time(graph: Graph, plan: Plan, setting: Setting) -> StepTime:
    """The time of a micro-batch under a plan, from the ops and reshards of one rank's graph."""
    times = [_body_time(body, plan, setting) for body in _bodies(graph, plan)]
    return StepTime(*(sum(values) for values in zip(*(vars(time).values() for time in times), strict=True)))


def sent_by_link(graph: Graph, plan: Plan, setting: Setting) -> tuple[float, float]:
    """The bytes that a rank sends of activations in a micro-batch: over its node's links, and over the network."""
    total = [0.0, 0.0]

    def add(sides: list[tuple[float, float]], times: tuple[int, int]) -> None:
        for sent, n in zip(sides, times, strict=False):
            total[:] = (before + n * more for before, more in zip(total, sent, strict=True))

    for body in _bodies(graph, plan):
        times = len(body.policies)
        again = times - body.policies.count(Recompute.NOTHING)
        for op in body.local_ops:
            if isinstance(op, Op):
                add(collective_bytes(op, setting.plan_size, setting.hardware), (times + again, times))
        for op in body.ops:
            if isinstance(op, Op):
                sides = ring_bytes(op, plan.assignment.partitions[op], setting.plan_size, setting.hardware)
                add(sides, (times + body.recomputed(op), times))
    return total[0], total[1]


def seconds_by_part(graph: Graph, plan: Plan, setting: Setting, time: StepTime) -> dict[str, float]:
    """Seconds of a micro-batch's computing by what it is for, as a rehearsal measures them (runtime/parts.py).

    What is recomputed counts with the operator that it is of. `time` is the plan's, and has what is no operator's.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for body in _bodies(graph, plan):
        times = len(body.policies)
        for op in body.ops:
            if isinstance(op, Op):
                part, own = _part_of(op), _seconds_of(op, body.layout, plan, setting)
                forward, backward = (f"{part}, forward", f"{part}, backward") if part == "attention" else (part, part)
                seconds[forward] += (times + body.recomputed(op)) * own.forward
                seconds[backward] += times * own.backward
    return {**seconds, "FSDP's copies": time.weight_copies, "packing for reshards": time.packing}


def _part_of(op: Op) -> str:
    spec = spec_of(op)
    if spec.shared_out:
        return "attention"
    if spec.memory_kind == "loss":
        return "loss"
    return "linear layers" if spec.flops(op).forward else "the rest of the layers"


def _seconds_of(op: Op, layout: Layout, plan: Plan, setting: Setting) -> Seconds:
    return op_seconds(op, plan.assignment.partitions[op], layout, setting.plan_size, setting.hardware)


def _body_time(body: _Body, plan: Plan, setting: Setting) -> StepTime:
    """The time of the root, or of all layers of a kind."""
    owner, plan_size, device, times = body.owner, setting.plan_size, setting.hardware, len(body.policies)
    recomputed = times - body.policies.count(Recompute.NOTHING)
    compute = recompute = reshards = packing = 0.0
    for op in body.ops:
        if isinstance(op, Op):
            seconds = _seconds_of(op, body.layout, plan, setting)
            compute += times * (seconds.forward + seconds.backward)
            recompute += body.recomputed(op) * seconds.forward
            waited = ring_seconds(op, plan.assignment.partitions[op], seconds, plan_size, device)
            reshards += times * (waited.forward + waited.backward) + body.recomputed(op) * waited.forward
    for op in body.local_ops:
        if isinstance(op, Op):
            seconds, copies = collective_time(op, plan_size, device), packing_time(op, body.layout, device)
            reshards += times * (seconds.forward + seconds.backward) + recomputed * seconds.forward
            packing += times * (copies.forward + copies.backward) + recomputed * copies.forward
    fsdp, weight_copies, optimizer, reduced = (times * seconds for seconds in _weights_time(owner, plan, setting))
    exposed = max(0.0, fsdp - compute - recompute)
    return StepTime(
        compute=compute,
        recompute=recompute,
        packing=packing,
        weight_copies=weight_copies,
        optimizer=optimizer,
        reshards=reshards,
        fsdp_exposed=exposed,
        fsdp_hidden=fsdp - exposed,
        plan_sharded_gradients=reduced,
    )


def _weights_time(owner: Graph | LayerKind, plan: Plan, setting: Setting) -> tuple[float, float, float, float]:
    """Of the weights of one layer, or of the root: FSDP's traffic, copies, the optimizer, and what reduces the
    gradients of plan-sharded weights."""
    plan_size, world_size, device = setting.plan_size, setting.world_size, setting.hardware
    accumulated = setting.grad_accumulation_steps
    own = {t: prod(t.shape) for t in owner.parameters.values() if t in plan.assignment.plan_sharded}
    sharded = {t: prod(t.shape) for t in owner.parameters.values() if t not in own}
    copies = sum(plan_sharded_copy_seconds(n, t.dtype, plan_size, device) for t, n in own.items())
    n_gathers = gathers_of(owner)
    copies += sum(fsdp_copy_seconds(n, t.dtype, world_size, device, n_gathers) for t, n in sharded.items())
    optimizer = optimizer_seconds(sum(own.values()), plan_size, device, accumulated)
    optimizer += optimizer_seconds(sum(sharded.values()), world_size, device, accumulated)
    reduced = sum(plan_sharded_seconds(n, plan_size, world_size, device, accumulated) for n in own.values())
    fsdp = Seconds()
    if sharded:
        fsdp = fsdp_seconds(sum(sharded.values()), next(iter(sharded)).dtype, world_size, device)
    return fsdp.forward + fsdp.backward, copies, optimizer, reduced
