"""Writes of a plan what a person reads: the lines that compile prints, and report.md."""

from collections import Counter
from collections.abc import Sequence

from longctx.compiler.alternatives import at_other_lengths, other_plans
from longctx.compiler.cost import (
    collective_bytes,
    collective_time,
    even_flops,
    flops_of_busiest,
    op_seconds,
    packing_time,
)
from longctx.compiler.hardware import Hardware
from longctx.compiler.ir import DOCUMENT_STARTS, Graph, LayerCall, LayerKind, Op, nbytes
from longctx.compiler.layout import Layout, layout_of
from longctx.compiler.localize import localize
from longctx.compiler.memory import MemoryPrediction, in_use, say_bytes
from longctx.compiler.ops import is_known, spec_of, splits_queries, told_split
from longctx.compiler.placement import Placement, Shard
from longctx.compiler.plan import GB, Plan, Setting
from longctx.compiler.planner import unsplittable_attention
from longctx.compiler.prediction import Prediction, StepTime, count_met_parameters, sent_by_link, step_time
from longctx.compiler.recompute import names_of_keepable
from longctx.compiler.work import PRODUCT_KINDS
from longctx.flops import step_flops

# A forward of Llama-3-8B on 8 ranks at 8,192 tokens took the host of an H200 81 ms, for 1,392 operators of the graph.
HOST_SECONDS_AN_OP = 58e-6

# --- report.md -------------------------------------------------------------------------------------------------------


def report(graph: Graph, plan: Plan, setting: Setting, prediction: Prediction) -> str:
    """The text of report.md."""
    sequence_length = graph.inputs[0].shape[-1]
    sections = [
        f"# {graph.class_name} at {sequence_length:,} tokens on {setting.world_size} x {setting.hardware.name}",
        "\n".join(f"- {line}" for line in summary(graph, plan, setting, prediction)),
        "All times and bytes are predictions, of one micro-batch (one row) on one rank.",
        _time_section(prediction.time),
        _prices_section(setting.hardware),
        _memory_section(prediction.memory, setting),
        *_operator_sections(graph, plan, setting),
        _alternatives_section(graph, plan, setting),
        _lengths_section(graph, plan, setting),
    ]
    return "\n\n".join(sections) + "\n"


def summary(graph: Graph, plan: Plan, setting: Setting, prediction: Prediction) -> list[str]:
    """The plan in a few lines, as compile prints it."""
    sequence_length = graph.inputs[0].shape[-1]
    plan_size, world_size, time = setting.plan_size, setting.world_size, prediction.time
    return [
        *_say_whole_attention(graph, plan_size, prediction),
        *_say_documents(graph),
        f"{graph.class_name} at {sequence_length:,} tokens on {setting.world_size} x {setting.hardware.name}: "
        f"{prediction.n_parameters:,} parameters, {len(graph.layer_calls)} layers",
        f"plan_ngpus {plan_size}, runtime_ngpus {world_size}: {world_size // plan_size} row(s) at a time",
        f"{time.total:.3g} s a row: {sequence_length / time.total / plan_size:,.0f} tokens/s/GPU, "
        f"{_say_mfu(graph, prediction, setting)}",
        f"{prediction.memory.peak / GB:.1f} GB a GPU at its peak, of {setting.memory_limit / GB:g}: "
        f"{prediction.memory.moment}",
        f"between layers hidden states are {_say(plan.assignment.boundary)}; {_say_weights(graph, plan)}",
        f"layers: {_say_policies(plan)}",
        *_say_not_kept(graph, plan),
        *_say_imbalance(plan),
        *_say_experts(graph, plan, setting),
        *_say_links(graph, plan, setting),
        f"bound by {_bound(prediction.time)}",
        _say_prices(setting.hardware),
        *_say_host_bound(graph, prediction.time),
        *_say_gap(plan),
        *(f"warning: {target} is not known: every rank computes it whole" for target in unknown_operators(graph)),
    ]


def _say_documents(graph: Graph) -> list[str]:
    """What attention is priced as, where the documents of a row do not see each other."""
    (n_documents,) = next((tensor.shape for tensor in graph.inputs if tensor.name == DOCUMENT_STARTS), (0,))
    if not n_documents:
        return []
    length = graph.inputs[0].shape[-1] / n_documents
    priced = (
        f"{n_documents:,} a row of {length:,.0f} tokens each: the length of the document that a token is in on average"
    )
    return [f"attention stays within documents; it is priced for {priced if n_documents > 1 else 'one a row'}"]


def _say_imbalance(plan: Plan) -> list[str]:
    """By how much the ranks differ in what they have of attention to compute, where they share out its queries."""
    assignment = plan.assignment
    more = [
        flops_of_busiest(op, partition, assignment.plan_size).forward
        / even_flops(op, partition, assignment.plan_size).forward
        for op, partition in assignment.partitions.items()
        if splits_queries(op, partition)
    ]
    if not more:
        return []
    order = "in balanced order" if assignment.balanced else "from first to last"
    return [
        f"ranks share out attention's queries, {order}: the busiest computes {max(more) - 1:.1%} more than the average"
    ]


def _say_experts(graph: Graph, plan: Plan, setting: Setting) -> list[str]:
    """Of a mixture, what a token meets of its parameters; and for each way in which ranks share a layer's experts, the
    balance that is assumed and what a rank sends."""
    lines: dict[str, None] = {}
    for (_, ops), (_, own) in zip(graph.bodies(), localize(graph, plan.assignment).bodies(), strict=True):
        for op, there in zip(_experts_in(ops), _experts_in(own), strict=True):
            around = [r for r in own if set(r.outputs) & set(there.inputs) or set(r.inputs) & set(there.outputs)]
            sent = sum(sum(sides) for r in around for sides in collective_bytes(r, setting.plan_size, setting.hardware))
            lines[f"{_say_shared_experts(op, plan)}; a rank sends {say_bytes(sent)} for them in a layer"] = None
    met = f"a token meets {count_met_parameters(graph):,.0f} of the parameters, by which MFU is counted"
    return [met, *lines] if lines else []


def _experts_in(ops: Sequence[Op]) -> list[Op]:
    return [op for op in ops if spec_of(op).chooses_weights]


def _say_shared_experts(op: Op, plan: Plan) -> str:
    """How ranks share out the experts of a layer, and what balance of them that assumes."""
    partition, plan_size = plan.assignment.partitions[op], plan.assignment.plan_size
    if partition.dim is None:
        return "a rank computes all experts" + (" of its rows" if plan_size == 1 else ", as every other one does")
    if told_split(op, partition) is None:
        return "ranks share out the tokens of the experts, whose balance makes no difference"
    times = flops_of_busiest(op, partition, plan_size).forward / even_flops(op, partition, plan_size).forward
    return f"ranks share out the experts, of which the busiest rank's take {times:.3g} times the mean of the tokens"


def _say_links(graph: Graph, plan: Plan, setting: Setting) -> list[str]:
    """What reshards send over which kind of link, of a plan over several nodes."""
    if setting.plan_size <= setting.hardware.devices_per_node:
        return []
    in_node, network = sent_by_link(graph, plan, setting)
    return [
        f"of activations a GPU sends {in_node / GB:.1f} GB a row in its node, and {network / GB:.1f} to other nodes"
    ]


def _say_gap(plan: Plan) -> list[str]:
    """How far the plan may be from the fastest."""
    if plan.gap is None:
        return ["it is the leanest plan that was found, and how much faster another may be is not known"]
    return [f"another plan may be faster, by {plan.gap:.1%} at most"] if plan.gap >= 0.0005 else []


def _say_whole_attention(graph: Graph, plan_size: int, prediction: Prediction) -> list[str]:
    """What it costs that every rank computes all of attention, if they have to."""
    whole = unsplittable_attention(graph, plan_size)
    if whole is None:
        return []
    seconds = sum(seconds for part, seconds in prediction.parts.items() if part.startswith("attention"))
    instead = f"; {whole.would_share} ranks would share it out" if whole.would_share > 1 else ""
    return [
        f"attention is computed whole by every rank, which takes {seconds:.3g} s of {prediction.time.total:.3g} s a row"
        f": {whole.why}{instead}"
    ]


def _say_mfu(graph: Graph, prediction: Prediction, setting: Setting) -> str:
    """Model FLOPs utilization, of the peak that the device's maker publishes."""
    peak = setting.hardware.peak_rate(next(iter(graph.all_parameters().values())).dtype)
    if peak is None:
        return f"no MFU: {setting.hardware.name} has no published peak rate for this precision"
    available = peak * setting.plan_size * prediction.time.total
    forward = (prediction.forward_flops_causal, prediction.forward_flops)
    causal, whole = (step_flops(flops) / available for flops in forward)
    return (
        f"MFU {causal:.1%}, counting attention as causal ({whole:.1%} as the reference program counts: all of "
        "attention, though half is computed)"
    )


def _say_policies(plan: Plan) -> str:
    return "; ".join(f"{n} recompute {policy}" for policy, n in Counter(plan.recompute).items())


def _say_not_kept(graph: Graph, plan: Plan) -> list[str]:
    """The packages which, where they are installed, compute again what layers would keep."""
    kept = {name for policy in plan.recompute for name in policy.kept or ()}
    ops = [op for kind in graph.kinds for op, name in names_of_keepable(kind.ops).items() if name in kept]
    packages = sorted({spec_of(op).not_kept_by for op in ops} - {""})
    return [f"where {package} is installed, the recurrence that it computes is computed again" for package in packages]


def _say_prices(hardware: Hardware) -> str:
    """How many of the rates that times are predicted by were measured."""
    n_measured = sum(rate.is_measured for rate in hardware.rates.values())
    return f"prices: {n_measured} of {len(hardware.rates)} rates of {hardware.name} are measured; report.md has each"


def unknown_operators(graph: Graph) -> list[str]:
    """The targets of the operators that have no OpSpec, and that every rank therefore computes whole."""
    return sorted({op.target for op in graph.all_ops() if not is_known(op)})


def _say(placement: Placement) -> str:
    if isinstance(placement, Shard):
        return f"split along dimension {placement.dim} ({placement})"
    return "the same on every rank"


def _say_weights(graph: Graph, plan: Plan) -> str:
    own = graph.named(plan.assignment.plan_sharded)
    if not own:
        return "all weights are FSDP's"
    return f"{len(own)} of {len(graph.all_parameters())} weights are split between the plan's ranks, the others FSDP's"


def _bound(time: StepTime) -> str:
    if time.computing >= time.communication:
        return f"computing, {time.computing / time.total:.0%} of the time"
    parts = {
        "reshards of activations": time.reshards,
        "FSDP's traffic": time.fsdp_exposed,
        "all-reduces of plan-sharded weights' gradients": time.plan_sharded_gradients,
    }
    most = max(parts, key=lambda part: parts[part])
    return f"communication, {time.communication / time.total:.0%} of the time, most of it {most}"


def _say_host_bound(graph: Graph, time: StepTime) -> list[str]:
    """A warning if the device is so fast that the host, which issues its work, may not keep up."""
    n_ops = sum(isinstance(item, Op) for item in graph.body)
    n_ops += sum(len(graph.kinds[call.kind].ops) for call in graph.layer_calls)
    an_op = time.total / (2 * n_ops)  # each is issued forward and backward
    if an_op > HOST_SECONDS_AN_OP:
        return []
    return [
        f"warning: an operator takes {1e6 * an_op:.0f} us on average, and a host takes some "
        f"{1e6 * HOST_SECONDS_AN_OP:.0f} to issue one: the host may set the pace, and a row take longer"
    ]


def _time_section(time: StepTime) -> str:
    rows = [
        ("computing, forward and backward", time.compute),
        ("recomputing", time.recompute),
        ("packing and unpacking what reshards send", time.packing),
        ("copies of weights and gradients, most of them FSDP's", time.weight_copies),
        ("norm and optimizer (a row's share of one a step)", time.optimizer),
        ("reshards of activations, waited for", time.reshards),
        ("FSDP's traffic, exposed", time.fsdp_exposed),
        ("all-reduces of plan-sharded weights' gradients (a row's share of one a step)", time.plan_sharded_gradients),
        ("**total**", time.total),
        ("FSDP's traffic, hidden behind computing", time.fsdp_hidden),
    ]
    table = "\n".join(f"| {name} | {1e3 * seconds:,.1f} | {seconds / time.total:.1%} |" for name, seconds in rows)
    return f"## Time\n\n| | ms | of the total |\n| --- | ---: | ---: |\n{table}"


def _prices_section(hardware: Hardware) -> str:
    """The rates that times are predicted by, and where each is from."""
    rows = [
        f"| {work} | {rate.a_second / 1e12:.3g} {'TFLOP/s' if work in PRODUCT_KINDS else 'TB/s'} | {rate.source} |"
        for work, rate in hardware.rates.items()
    ]
    collectives = "measured, by longctx.measure" if hardware.timings else "published; hardware.py has the sources"
    rows.append(f"| collectives | a model of links | {collectives} |")
    return "\n".join(
        [
            "## Prices\n",
            f"What {hardware.name} is taken to reach.\n",
            "| | rate | source |",
            "| --- | ---: | --- |",
            *rows,
        ]
    )


def _memory_section(memory: MemoryPrediction, setting: Setting) -> str:
    rows = [(name.replace("_", " "), value) for name, value in vars(memory).items() if not isinstance(value, str)]
    rows.append(("**peak**", memory.peak))
    rows.append(("an estimate of what is taken then, with CUDA's context and gaps, without NCCL", in_use(memory.peak)))
    table = "\n".join(f"| {name} | {value / GB:.2f} |" for name, value in rows)
    limit = f"At its peak, in the {memory.moment}; the limit is {setting.memory_limit / GB:g} GB."
    return f"## Memory\n\n{limit}\n\n| | GB |\n| --- | ---: |\n{table}"


def _operator_sections(graph: Graph, plan: Plan, setting: Setting) -> list[str]:
    """A table of operators for the root and for each layer kind: partition, time, and the reshards before each."""
    own = localize(graph, plan.assignment)
    sections = [_operator_table(f"{graph.class_name}, once", graph, own.body, plan, setting)]
    for number, (kind, own_kind) in enumerate(zip(graph.kinds, own.kinds, strict=True)):
        layers = len(graph.calls_of(number))
        sections.append(_operator_table(f"{kind.class_name}, {layers} layers", kind, own_kind.ops, plan, setting))
    legend = (
        "R: the same on every rank; S1: split along dimension 1; P: partial sums. Bytes are a rank's; a reshard "
        "takes the milliseconds behind it, forward + backward, with its copies."
    )
    return [f"## Operators\n\n{legend}", *sections]


def _operator_table(
    title: str, owner: Graph | LayerKind, own: Sequence[Op | LayerCall], plan: Plan, setting: Setting
) -> str:
    """A table of the operators of the model's root or of a layer kind. `own` are those of one rank.

    `own` has the same operators in the same order, with reshards, and slices and casts of weights, between them.
    """
    rows: list[str] = []
    reshards: list[str] = []
    layout = layout_of(owner)
    coming, last = iter(owner.body if isinstance(owner, Graph) else owner.ops), None
    item = next(coming)
    for local in own:
        if isinstance(local, Op) and local.note:
            reshards.append(_say_reshard(local, layout, setting))
        elif item is not None and local.outputs[0].name == item.outputs[0].name and type(local) is type(item):
            if isinstance(item, Op) or isinstance(last, Op) or reshards:
                rows.append(f"| {_say_item(item, layout, plan, setting)} | {', '.join(reshards)} |")
            reshards, last, item = [], item, next(coming, None)
    if reshards:
        rows.append(f"| | the result | | | | {', '.join(reshards)} |")
    head = "| module | operator | inputs -> outputs | forward ms | backward ms | resharded before |"
    rule = "| --- | --- | --- | ---: | ---: | --- |"
    return "\n".join([f"### {title}\n", head, rule, *rows])


def _say_item(item: Op | LayerCall, layout: Layout, plan: Plan, setting: Setting) -> str:
    """The module, operator, partition and times of an op. A call of a layer has none, since its kind has a table."""
    if isinstance(item, LayerCall):
        return "| the layers | | |"
    partition = plan.assignment.partitions[item]
    seconds = op_seconds(item, partition, layout, setting.plan_size, setting.hardware)
    placements = f"{', '.join(map(str, partition.inputs))} -> {', '.join(map(str, partition.outputs))}"
    name = spec_of(item).name
    how = "whole" if partition.dim is None else placements
    return f"{item.module} | {name} | {how} | {1e3 * seconds.forward:.3f} | {1e3 * seconds.backward:.3f}"


def _say_reshard(reshard: Op, layout: Layout, setting: Setting) -> str:
    size = max(nbytes(reshard.inputs[0]), nbytes(reshard.outputs[0]))
    sent = collective_time(reshard, setting.plan_size, setting.hardware)
    copied = packing_time(reshard, layout, setting.hardware)
    times = f"{1e3 * (sent.forward + copied.forward):.3f} + {1e3 * (sent.backward + copied.backward):.3f} ms"
    return f"{spec_of(reshard).name} {say_bytes(size)} {times}"


def _alternatives_section(graph: Graph, plan: Plan, setting: Setting) -> str:
    """How much longer a micro-batch takes under plans that differ from this one in one decision."""
    best = step_time(graph, plan, setting).total
    rows = [
        f"| {other.name} | {f'{other.seconds / best - 1:+.1%}' if other.plan else other.why_not} |"
        for other in other_plans(graph, plan, setting)
    ]
    how = (
        "Where an operator is split otherwise, the part of the layer that it is in is planned anew, as is what layers "
        "recompute, and all else is as it is here: a plan that differs in more may be faster than is said."
    )
    return "\n".join(["## Other plans\n", f"{how}\n", "| the plan with | time |", "| --- | --- |", *rows])


def _lengths_section(graph: Graph, plan: Plan, setting: Setting) -> str:
    """What the same partitions need at half and at twice the length."""
    rows = []
    for other in at_other_lengths(graph, plan, setting):
        text = other.why_not
        if other.plan:
            gigabytes, policies = other.plan.memory / GB, _say_policies(other.plan)
            text = f"{other.seconds:.3g} s a row, {gigabytes:.1f} GB; layers: {policies}"
        rows.append(f"| {other.name} | {text} |")
    why = "What layers recompute is chosen anew for each length, and that is why twice the tokens may need less memory."
    return "\n".join(["## The same partitions at other lengths\n", f"{why}\n", "| tokens | |", "| ---: | --- |", *rows])
