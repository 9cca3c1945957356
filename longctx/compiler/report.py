"""Plan -> what a person reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from longctx.compiler.cost import (
    ATTENTION_EFFICIENCY,
    ATTENTION_KERNEL,
    Seconds,
    fsdp_seconds,
    local_move_seconds,
    op_seconds,
    resident_seconds,
)
from longctx.compiler.memory import MemoryPrediction, nbytes, say_bytes
from longctx.compiler.operators import is_known
from longctx.compiler.partition import Assignment, localize
from longctx.compiler.planner import (
    ATTENTION,
    GB,
    KEEP_ALL,
    KEEP_ATTENTION,
    KEEP_INPUT,
    Fixed,
    Plan,
    Setting,
    alternative,
    predict_memory,
    unsplittable_attention,
)
from longctx.compiler.trace import Graph, LayerCall, LayerKind, Op, Tensor, map_tensors
from longctx.errors import UserError


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch on one rank: what its wall clock is made of, and what is hidden behind it."""

    compute: float
    recompute: float
    moves: float  # of activations between the plan's ranks, waited for
    fsdp_exposed: float  # of weights and gradients, beyond the computing that hides it
    fsdp_hidden: float
    resident_gradients: float  # all-reduces over the data-parallel ranks, waited for

    @property
    def computing(self) -> float:
        return self.compute + self.recompute

    @property
    def communication(self) -> float:
        return self.moves + self.fsdp_exposed + self.resident_gradients

    @property
    def total(self) -> float:
        return self.computing + self.communication


@dataclass(frozen=True)
class Facts:
    """What plan.json and the report tell of a plan."""

    n_parameters: int
    forward_flops: float  # of one row, attention counted whole, as the reference counts it
    forward_flops_causal: float  # attention counted by half, as causal attention needs
    time: StepTime
    memory: MemoryPrediction


def plan_facts(
    graph: Graph, plan: Plan, setting: Setting, n_parameters: int, forward_flops: tuple[float, float]
) -> Facts:
    memory = predict_memory(graph, plan.assignment, plan.recompute, setting)
    return Facts(n_parameters, *forward_flops, step_time(graph, plan, setting), memory)


def step_time(graph: Graph, plan: Plan, setting: Setting) -> StepTime:
    """The time of a micro-batch under a plan, from the ops and moves of one rank's graph."""
    local = localize(graph, plan.assignment)
    parts = [_scope_time(graph, graph.body, local.body, 1, 0, 0, plan.assignment, setting)]
    for number, (kind, own) in enumerate(zip(graph.kinds, local.kinds, strict=True)):
        policies = [plan.recompute[call.index] for call in graph.layer_calls if call.kind == number]
        m, a = sum(p != KEEP_ALL for p in policies), policies.count(KEEP_INPUT)
        parts.append(_scope_time(kind, kind.ops, own.ops, len(policies), m, a, plan.assignment, setting))
    return StepTime(*(sum(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def _scope_time(
    owner: Graph | LayerKind,
    ops: Sequence[Op | LayerCall],
    local_ops: Sequence[Op | LayerCall],
    times: int,
    m: int,
    a: int,
    assignment: Assignment,
    setting: Setting,
) -> StepTime:
    """The root's time, or that of `times` layers of a kind, of which m recompute and a attention too."""
    n, device = setting.plan_ngpus, setting.hardware
    compute = recompute = moves = 0.0
    for op in ops:
        if isinstance(op, Op):
            seconds = op_seconds(op, assignment.partitions[op], n, device)
            compute += times * (seconds.forward + seconds.backward)
            recompute += (a if op.target == ATTENTION else m) * seconds.forward
    for op in local_ops:
        seconds = local_move_seconds(op, n, device) if isinstance(op, Op) else Seconds()
        moves += times * (seconds.forward + seconds.backward) + m * seconds.forward
    sharded = [t for t in owner.parameters.values() if t not in assignment.resident]
    fsdp = fsdp_seconds(sum(prod(t.shape) for t in sharded), _dtype(owner), setting.runtime_ngpus, device)
    traffic = times * (fsdp.forward + fsdp.backward)
    exposed = max(0.0, traffic - compute - recompute)
    reduced = times * sum(
        resident_seconds(prod(t.shape), n, setting.runtime_ngpus, device, setting.grad_accumulation_steps)
        for t in owner.parameters.values()
        if t in assignment.resident
    )
    return StepTime(compute, recompute, moves, exposed, traffic - exposed, reduced)


def _dtype(owner: Graph | LayerKind):
    return next(t.dtype for t in owner.parameters.values())


# --- report.md -----------------------------------------------------------------------------------------------------


def report(graph: Graph, plan: Plan, setting: Setting, facts: Facts, sequence_length: int) -> str:
    """The text of report.md."""
    sections = [
        f"# {graph.class_name} at {sequence_length:,} tokens on {setting.runtime_ngpus} x {setting.hardware.name}",
        "\n".join(f"- {line}" for line in summary(graph, plan, setting, facts, sequence_length)),
        "All times and bytes are predictions, of one micro-batch (one row) on one rank. Attention counts at "
        f"{ATTENTION_EFFICIENCY:.0%} of the rate of large products, which {ATTENTION_KERNEL} reaches on an H100, "
        "whichever kernel runs: with a slower one, FlashAttention-2 say, it takes longer.",
        _time_section(facts.time),
        _memory_section(facts.memory, setting),
        *_operator_sections(graph, plan, setting),
        _alternatives_section(graph, plan, setting),
        _lengths_section(graph, plan, setting, sequence_length),
    ]
    return "\n\n".join(sections) + "\n"


def summary(graph: Graph, plan: Plan, setting: Setting, facts: Facts, sequence_length: int) -> list[str]:
    """The plan in a few lines, as compile prints it."""
    n, ranks, time = setting.plan_ngpus, setting.runtime_ngpus, facts.time
    peak = setting.hardware.peak_rate(_dtype(graph)) * n * time.total
    policies = {
        KEEP_INPUT: "recompute all",
        KEEP_ATTENTION: "recompute all but attention",
        KEEP_ALL: "recompute nothing",
    }
    counts = ", ".join(f"{plan.recompute.count(p)} {text}" for p, text in policies.items() if p in plan.recompute)
    why = unsplittable_attention(graph, n)
    return [
        f"{facts.n_parameters:,} parameters, {len(graph.layer_calls)} layers; plan_ngpus {n}, runtime_ngpus {ranks}: "
        f"{ranks // n} row(s) at a time",
        f"{time.total:.3g} s a row: {sequence_length / time.total / n:,.0f} tokens/s/GPU, MFU "
        f"{3 * facts.forward_flops / peak:.1%}, counting causal attention by half "
        f"{3 * facts.forward_flops_causal / peak:.1%}",
        f"{facts.memory.peak / GB:.1f} GB a GPU at its peak, of {setting.memory_limit / GB:g}: {facts.memory.moment}",
        f"between layers hidden states are {_say(plan.assignment.boundary)}; {_say_weights(graph, plan)}",
        f"layers: {counts}",
        f"bound by {_bound(facts.time)}",
        *([f"attention is computed whole by every rank: {why}"] if why else []),
        *(f"warning: {target} is not known: every rank computes it whole" for target in unknown_operators(graph)),
    ]


def unknown_operators(graph: Graph) -> list[str]:
    return sorted({op.target for op in _all_ops(graph) if not is_known(op)})


def _say(placement: str) -> str:
    return "the same on every rank" if placement == "R" else f"split along dimension {placement[1:]} ({placement})"


def _say_weights(graph: Graph, plan: Plan) -> str:
    own = graph.named(plan.assignment.resident)
    if not own:
        return "all weights are FSDP's"
    return f"{len(own)} of {len(graph.all_parameters())} weights are split between the plan's ranks, the others FSDP's"


def _bound(time: StepTime) -> str:
    if time.computing >= time.communication:
        return f"computing, {time.computing / time.total:.0%} of the time"
    parts = {
        "moves of activations": time.moves,
        "FSDP's traffic": time.fsdp_exposed,
        "all-reduces of resident weights' gradients": time.resident_gradients,
    }
    most = max(parts, key=parts.get)
    return f"communication, {time.communication / time.total:.0%} of the time, most of it {most}"


def _time_section(time: StepTime) -> str:
    rows = [
        ("computing, forward and backward", time.compute),
        ("recomputing", time.recompute),
        ("moves of activations, waited for", time.moves),
        ("FSDP's traffic, exposed", time.fsdp_exposed),
        ("all-reduces of resident weights' gradients (a row's share of one a step)", time.resident_gradients),
        ("**total**", time.total),
        ("FSDP's traffic, hidden behind computing", time.fsdp_hidden),
    ]
    table = "\n".join(f"| {name} | {1e3 * seconds:,.1f} | {seconds / time.total:.1%} |" for name, seconds in rows)
    return f"## Time\n\n| | ms | of the total |\n| --- | ---: | ---: |\n{table}"


def _memory_section(memory: MemoryPrediction, setting: Setting) -> str:
    rows = [(name.replace("_", " "), value) for name, value in vars(memory).items() if not isinstance(value, str)]
    rows.append(("**peak**", memory.peak))
    table = "\n".join(f"| {name} | {value / GB:.2f} |" for name, value in rows)
    limit = f"At its peak, in the {memory.moment}; the limit is {setting.memory_limit / GB:g} GB."
    return f"## Memory\n\n{limit}\n\n| | GB |\n| --- | ---: |\n{table}"


def _operator_sections(graph: Graph, plan: Plan, setting: Setting) -> list[str]:
    """The operators of the root and of each layer kind: partition, time, and what is moved before each."""
    own = localize(graph, plan.assignment)
    sections = [_operator_table(f"{graph.class_name}, once", graph.body, own.body, plan, setting)]
    for number, (kind, own_kind) in enumerate(zip(graph.kinds, own.kinds, strict=True)):
        layers = sum(call.kind == number for call in graph.layer_calls)
        sections.append(_operator_table(f"{kind.class_name}, {layers} layers", kind.ops, own_kind.ops, plan, setting))
    legend = (
        "R: the same on every rank; S1: split along dimension 1; P: partial sums. Bytes are a rank's; a move takes "
    )
    legend += "the milliseconds behind it, forward + backward."
    return [f"## Operators\n\n{legend}", *sections]


def _operator_table(
    title: str, ops: Sequence[Op | LayerCall], own: Sequence[Op | LayerCall], plan: Plan, setting: Setting
) -> str:
    """`ops` are the model's, `own` the same on one rank, with moves between them and slices and casts of weights."""
    rows: list[str] = []
    moves: list[str] = []
    coming, last = iter(ops), None
    item = next(coming)
    for local in own:
        if isinstance(local, Op) and local.note:
            moves.append(_say_move(local, setting))
        elif item is not None and local.outputs[0].name == item.outputs[0].name and type(local) is type(item):
            if isinstance(item, Op) or isinstance(last, Op) or moves:
                rows.append(f"| {_say_item(item, plan, setting)} | {', '.join(moves)} |")
            moves, last, item = [], item, next(coming, None)
    if moves:
        rows.append(f"| | the result | | | | {', '.join(moves)} |")
    head = "| module | operator | inputs -> outputs | forward ms | backward ms | moved before |"
    rule = "| --- | --- | --- | ---: | ---: | --- |"
    return "\n".join([f"### {title}\n", head, rule, *rows])


def _say_item(item: Op | LayerCall, plan: Plan, setting: Setting) -> str:
    """An op's module, operator, partition and times; layers have tables of their own."""
    if isinstance(item, LayerCall):
        return "| the layers | | |"
    partition = plan.assignment.partitions[item]
    seconds = op_seconds(item, partition, setting.plan_ngpus, setting.hardware)
    placements = f"{', '.join(partition.inputs)} -> {', '.join(partition.outputs)}"
    name = item.target.split(".", 1)[-1].removesuffix(".default")
    how = "whole" if partition.dim is None else placements
    return f"{item.module} | {name} | {how} | {1e3 * seconds.forward:.3f} | {1e3 * seconds.backward:.3f}"


def _say_move(move: Op, setting: Setting) -> str:
    size = max(nbytes(move.inputs[0]), nbytes(move.outputs[0]))
    seconds = local_move_seconds(move, setting.plan_ngpus, setting.hardware)
    times = f"{1e3 * seconds.forward:.3f} + {1e3 * seconds.backward:.3f} ms"
    return f"{move.target.rsplit('.', 1)[-1]} {say_bytes(size)} {times}"


def _alternatives_section(graph: Graph, plan: Plan, setting: Setting) -> str:
    """The best plans that differ in one decision."""
    chosen = plan.assignment.partitions
    asked: list[tuple[str, Fixed]] = []
    for kind in graph.kinds[:1]:
        attention = next((op for op in kind.ops if op.target == ATTENTION), None)
        if attention:
            asked.append(("attention split otherwise", Fixed(not_partitions={attention: chosen[attention].dim})))
        linear = [op for op in kind.ops if op.target.startswith("aten.linear")]
        if linear:
            widest = max(linear, key=lambda op: prod(op.inputs[1].shape))
            name = f"{widest.module or 'the widest linear layer'} split otherwise"
            asked.append((name, Fixed(not_partitions={widest: chosen[widest].dim})))
    if setting.plan_ngpus == 1:
        asked = []
    same = {op: partition.dim for op, partition in chosen.items()}
    for policy, text in ((KEEP_INPUT, "every layer recomputed"), (KEEP_ALL, "no layer recomputed")):
        if set(plan.recompute) != {policy}:
            asked.append((text, Fixed(same, boundary=plan.assignment.boundary, policy=policy)))
    rows = []
    best = step_time(graph, plan, setting).total
    for text, fixed in asked:
        other = alternative(graph, setting, fixed)
        if other is None:
            rows.append(f"| {text} | does not fit, or is not legal |")
        else:
            rows.append(f"| {text} | {step_time(graph, other, setting).total / best - 1:+.1%} |")
    return "\n".join(["## Other plans\n", "| the best plan with | time |", "| --- | --- |", *rows])


def _lengths_section(graph: Graph, plan: Plan, setting: Setting, sequence_length: int) -> str:
    """What the same partitions need at half and at twice the length, each layer keeping what fits there."""
    rows = []
    for length in (sequence_length // 2, sequence_length * 2):
        text = "the length is also another size of the model: compile at that length to know"
        if other := resize(graph, sequence_length, length):
            ops = {op.outputs[0].name: partition.dim for op, partition in plan.assignment.partitions.items()}
            fixed = Fixed({op: ops[op.outputs[0].name] for op in _all_ops(other)}, boundary=plan.assignment.boundary)
            try:
                found = alternative(other, setting, fixed)
            except UserError:
                found = None
            text = "does not fit"
            if found:
                text = f"{step_time(other, found, setting).total:.3g} s a row, {found.memory / GB:.1f} GB"
        rows.append(f"| {length:,} | {text} |")
    return "\n".join(["## The same partitions at other lengths\n", "| tokens | |", "| ---: | --- |", *rows])


def _all_ops(graph: Graph) -> list[Op]:
    return [op for ops in (graph.body, *(kind.ops for kind in graph.kinds)) for op in ops if isinstance(op, Op)]


def resize(graph: Graph, old: int, new: int) -> Graph | None:
    """The graph at another sequence length; None where the model has another size, of a weight or a head, like it."""
    if any(old in tensor.shape for tensor in graph.all_parameters().values()):
        return None
    for op in _all_ops(graph):
        shapes = [[new if size == old else size for size in t.shape] for t in (*op.inputs[:1], op.outputs[0])]
        if op.target.startswith(("aten.view", "aten.reshape")) and prod(shapes[0]) != prod(shapes[-1]):
            return None
    made: dict[Tensor, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if tensor not in made:
            made[tensor] = replace(tensor, shape=tuple(new if size == old else size for size in tensor.shape))
        return made[tensor]

    def sizes(value):
        return [new if size == old else size for size in value] if isinstance(value, list) else value

    def change_item(item: Op | LayerCall) -> Op | LayerCall:
        if isinstance(item, LayerCall):
            return replace(item, inputs=tuple(map(change, item.inputs)), outputs=tuple(map(change, item.outputs)))
        args = tuple(
            sizes(arg) if item.target.startswith(("aten.view", "aten.reshape", "aten.expand")) else arg
            for arg in item.args
        )
        args, kwargs = map_tensors((args, item.kwargs), change)
        return replace(item, args=args, kwargs=kwargs, outputs=tuple(map(change, item.outputs)))

    kinds = tuple(
        replace(
            kind,
            inputs=tuple(map(change, kind.inputs)),
            outputs=tuple(map(change, kind.outputs)),
            parameters={name: change(t) for name, t in kind.parameters.items()},
            constants={change(t): value for t, value in kind.constants.items()},
            ops=tuple(map(change_item, kind.ops)),
        )
        for kind in graph.kinds
    )
    return replace(
        graph,
        inputs=tuple(map(change, graph.inputs)),
        output=change(graph.output),
        parameters={name: change(t) for name, t in graph.parameters.items()},
        constants={change(t): value for t, value in graph.constants.items()},
        body=tuple(map(change_item, graph.body)),
        kinds=kinds,
    )
