"""What is predicted of a plan: seconds of a micro-batch and bytes at the peak, by kind.

The integer program minimizes these seconds; here they are added up again from the plan's own graph, reshard by reshard,
for people to read and for tests to hold the program to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from longctx.compiler.cost import (
    Seconds,
    collective_time,
    fsdp_copy_seconds,
    fsdp_seconds,
    gathers_of,
    op_seconds,
    optimizer_seconds,
    packing_time,
    plan_sharded_copy_seconds,
    plan_sharded_seconds,
)
from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op
from longctx.compiler.layout import layout_of
from longctx.compiler.localize import localize
from longctx.compiler.memory import MemoryPrediction
from longctx.compiler.ops import spec_of
from longctx.compiler.plan import Plan, Setting
from longctx.compiler.planner import predict_memory
from longctx.compiler.recompute import Recompute

ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
LINEAR, REST, LOSS = "linear layers", "the rest of the layers", "loss"
FSDP, PACKING = "FSDP's copies", "packing for reshards"


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch on one rank: what its wall clock is made of, and what is hidden behind it."""

    compute: float  # of the model's operators, forward and backward
    recompute: float
    packing: float  # reshards' copies into and out of what they send
    weight_copies: float  # FSDP's own, and casts of plan-sharded weights
    optimizer: float  # a micro-batch's share of the norm and AdamW at the end of a step
    reshards: float  # of activations between the plan's ranks, waited for
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
    forward_flops_causal: float  # attention counted by half, as causal attention needs
    time: StepTime
    memory: MemoryPrediction
    parts: dict[str, float]  # seconds of computing, by the parts that a rehearsal tells apart


def predict(
    graph: Graph, plan: Plan, setting: Setting, n_parameters: int, forward_flops: tuple[float, float]
) -> Prediction:
    """Seconds and bytes of a plan; `forward_flops` of one row are given, counted whole and counted causal."""
    memory = predict_memory(graph, plan.assignment, plan.recompute, setting)
    time = step_time(graph, plan, setting)
    return Prediction(n_parameters, *forward_flops, time, memory, computing_by_part(graph, plan, setting, time))


def step_time(graph: Graph, plan: Plan, setting: Setting) -> StepTime:
    """The time of a micro-batch under a plan, from the ops and reshards of one rank's graph."""
    local = localize(graph, plan.assignment)
    bodies = [(graph, local.body), *((kind, own.ops) for kind, own in zip(graph.kinds, local.kinds, strict=True))]
    parts = [_body_time(owner, ops, _policies(owner, graph, plan), plan, setting) for owner, ops in bodies]
    return StepTime(*(sum(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def computing_by_part(graph: Graph, plan: Plan, setting: Setting, time: StepTime) -> dict[str, float]:
    """Seconds of a micro-batch's computing, by the parts that a rehearsal tells apart (runtime/parts.py).

    What a layer recomputes counts with its own part. `time` has the parts that are no operators'.
    """
    seconds = dict.fromkeys((ATTENTION_FORWARD, ATTENTION_BACKWARD, LINEAR, REST, LOSS), 0.0)
    for owner in (graph, *graph.kinds):
        policies = _policies(owner, graph, plan)
        for op, once, repeated in _op_times(owner, policies, plan, setting):
            forward, backward = _parts_of(op, in_layer=isinstance(owner, LayerKind))
            seconds[forward] += (len(policies) + repeated) * once.forward
            seconds[backward] += len(policies) * once.backward
    return {**seconds, FSDP: time.weight_copies, PACKING: time.packing}


def _parts_of(op: Op, in_layer: bool) -> tuple[str, str]:
    """The parts that an op's forward and backward belong to."""
    spec = spec_of(op)
    if spec.selective_recompute:
        return ATTENTION_FORWARD, ATTENTION_BACKWARD
    part = LOSS if spec.memory_kind == "loss" else LINEAR if in_layer and spec.flops(op).forward else REST
    return part, part


def _policies(owner: Graph | LayerKind, graph: Graph, plan: Plan) -> tuple[Recompute, ...]:
    """The policies of all layers of a kind; of the root, which runs once, the one that recomputes nothing."""
    if isinstance(owner, Graph):
        return (Recompute.NOTHING,)
    return tuple(plan.recompute[call.index] for call in graph.layer_calls if graph.kinds[call.kind] is owner)


def _op_times(
    owner: Graph | LayerKind, policies: tuple[Recompute, ...], plan: Plan, setting: Setting
) -> Iterator[tuple[Op, Seconds, int]]:
    """Each op of the root or of a layer kind, the seconds of one execution, and in how many layers it is recomputed."""
    layout = layout_of(owner)
    recomputed = len(policies) - policies.count(Recompute.NOTHING)
    for op in owner.body if isinstance(owner, Graph) else owner.ops:
        if isinstance(op, Op):
            once = op_seconds(op, plan.assignment.partitions[op], layout, setting.plan_size, setting.hardware)
            repeated = policies.count(Recompute.EVERYTHING) if spec_of(op).selective_recompute else recomputed
            yield op, once, 0 if op in layout.not_repeated else repeated


def _body_time(
    owner: Graph | LayerKind,
    local_ops: Sequence[Op | LayerCall],
    policies: tuple[Recompute, ...],
    plan: Plan,
    setting: Setting,
) -> StepTime:
    """The time of the root, or of all layers of a kind, which have these policies."""
    times, layout = len(policies), layout_of(owner)
    recomputed = times - policies.count(Recompute.NOTHING)
    compute = recompute = reshards = packing = 0.0
    for _, once, repeated in _op_times(owner, policies, plan, setting):
        compute += times * (once.forward + once.backward)
        recompute += repeated * once.forward
    for op in local_ops:
        if isinstance(op, Op):
            sent = collective_time(op, setting.plan_size, setting.hardware)
            copied = packing_time(op, layout, setting.hardware)
            reshards += times * (sent.forward + sent.backward) + recomputed * sent.forward
            packing += times * (copied.forward + copied.backward) + recomputed * copied.forward
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
