"""Plan -> what a person reads."""

from collections import Counter
from math import prod

from compiler.planner import Plan, Setting
from compiler.trace import Graph, Op


def count_parameters(graph: Graph) -> int:
    return sum(prod(t.shape) for t in graph.all_parameters().values())


def forward_flops(n_parameters: int, n_layers: int, hidden_size: int, sequence_length: int) -> tuple[float, float]:
    """FLOPs of one row's forward pass: with attention counted whole, and by half as causal attention needs.

    The first is the reference's count, 2 * (parameters * l + 2 * layers * hidden * l ** 2); a step is three times that.
    """
    dense = 2.0 * n_parameters * sequence_length
    attention = 4.0 * n_layers * hidden_size * sequence_length**2
    return dense + attention, dense + attention / 2


def report(graph: Graph, plan: Plan, setting: Setting, facts: dict) -> str:
    """The text of report.md. `facts` is what plan.json holds."""
    n_parameters = count_parameters(graph)
    ranks = facts["runtime_ngpus"]
    master_bytes = 16 * n_parameters / ranks  # float32 weights, gradients and AdamW's two moments
    rows = [
        ("model", f"{graph.class_name}, {n_parameters:,} parameters, {len(graph.layer_calls)} layers"),
        ("sequence length", f"{facts['sequence_length']:,} tokens"),
        (
            "ranks",
            f"plan_ngpus {setting.plan_ngpus}, runtime_ngpus {ranks}: {ranks // setting.plan_ngpus} rows at a time",
        ),
        ("weights, gradients, optimizer", f"FSDP over {ranks} ranks: {master_bytes / 1e9:.2f} GB a rank, in float32"),
        ("recompute", "every layer keeps its input only" if "layer" in plan.recompute else "none"),
        ("forward FLOPs a row", f"{facts['forward_flops'] / 1e12:,.2f} TFLOPs, attention counted whole"),
        ("", f"{facts['forward_flops_causal'] / 1e12:,.2f} TFLOPs, attention counted by half (causal)"),
    ]
    kinds = []
    for number, kind in enumerate(graph.kinds):
        layers = sum(call.kind == number for call in graph.layer_calls)
        kinds.append(f"\n## {kind.class_name}: {layers} of the {len(graph.layer_calls)} layers\n")
        kinds.append("| operator | times | |\n| --- | --- | --- |")
        names = Counter(op.target.removeprefix("aten.") for op in kind.ops if isinstance(op, Op))
        kinds += [f"| {name} | {count} | computed whole by every rank |" for name, count in names.most_common()]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    return f"# Plan\n\n| | |\n| --- | --- |\n{table}\n" + "\n".join(kinds) + "\n"
