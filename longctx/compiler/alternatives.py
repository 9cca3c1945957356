"""What other plans would cost: those that differ in one decision, and the same partitions at other lengths.

report.py words it. Each is found as the chosen plan was, among the plans that it is asked of, so that figures compare.
"""

from dataclasses import dataclass

from longctx.compiler.ir import Graph, LayerKind, Op
from longctx.compiler.ops import spec_of
from longctx.compiler.plan import Fixed, Plan, Setting
from longctx.compiler.planner import alternative
from longctx.compiler.prediction import step_time
from longctx.compiler.recompute import Recompute
from longctx.compiler.resize import resize
from longctx.errors import DecisionsError, SolverError


@dataclass(frozen=True)
class Other:
    """Another plan, found or not."""

    name: str  # what it differs in
    plan: Plan | None = None
    seconds: float = 0.0  # of a micro-batch
    why_not: str = ""  # where there is no plan


def other_plans(graph: Graph, plan: Plan, setting: Setting) -> list[Other]:
    """The best plans with attention or the widest product split otherwise, and with every or no layer recomputed.

    What is split otherwise takes with it the part of the layer that it is in. All other operators are as they are in
    the plan: what else would change then changes little, and costs as much to find as the plan did.
    """
    chosen = plan.assignment.partitions
    same = {op: partition.dim for op, partition in chosen.items()}
    asked: list[tuple[str, Fixed]] = []
    for kind in graph.kinds[:1] if setting.plan_size > 1 else ():
        attention = next((op for op in kind.ops if spec_of(op).shared_out), None)
        if attention:
            # In one order only: that in which attention along its queries is at its best, and all else about as good.
            balanced = graph.inputs[0].shape[-1] % (2 * setting.plan_size) == 0
            asked.append(("attention split otherwise", split_otherwise(attention, kind, same, balanced)))
        products = [op for op in kind.ops if op is not attention and spec_of(op).flops(op).forward]
        if products:
            widest = max(products, key=lambda op: spec_of(op).flops(op).forward)
            name = f"{widest.module or 'the widest product'} split otherwise"
            asked.append((name, split_otherwise(widest, kind, same, plan.assignment.balanced)))
    for policy, name in ((Recompute.EVERYTHING, "every layer recomputed"), (Recompute.NOTHING, "no layer recomputed")):
        if set(plan.recompute) != {policy}:
            order = plan.assignment.balanced
            asked.append((name, Fixed(same, boundary=plan.assignment.boundary, policy=policy, balanced=order)))
    return [_planned(name, graph, setting, fixed) for name, fixed in asked]


def split_otherwise(op: Op, kind: LayerKind, same: dict[Op, str | None], balanced: bool) -> Fixed:
    """All other operators held at `same`, but for those of the layer's part that the operator is in."""
    part = [other for other in kind.ops if _part_of(other) == _part_of(op)]
    others = {other: dim for other, dim in same.items() if other not in part}
    return Fixed(others, not_partitions={op: same[op]}, balanced=balanced)


def _part_of(op: Op) -> str:
    """A layer's own submodule, as self_attn or mlp, that an operator is in."""
    return op.module.split(".")[0]


def at_other_lengths(graph: Graph, plan: Plan, setting: Setting) -> list[Other]:
    """The same partitions at half and at twice the length, with the best recompute policies for each."""
    sequence_length = graph.inputs[0].shape[-1]
    found = []
    for length in (sequence_length // 2, sequence_length * 2):
        other = resize(graph, sequence_length, length)
        if other is None:
            why = "the length is also another size of the model: compile at that length to know"
            found.append(Other(f"{length:,}", why_not=why))
            continue
        dims = {op.outputs[0].name: partition.dim for op, partition in plan.assignment.partitions.items()}
        partitions = {op: dims[op.outputs[0].name] for op in other.all_ops()}
        fixed = Fixed(partitions, boundary=plan.assignment.boundary, balanced=plan.assignment.balanced)
        found.append(_planned(f"{length:,}", other, setting, fixed))
    return found


def _planned(name: str, graph: Graph, setting: Setting, fixed: Fixed) -> Other:
    try:
        plan = alternative(graph, setting, fixed)
    except SolverError:
        return Other(name, why_not="not known: the solver ran out of time")
    except DecisionsError:
        return Other(name, why_not="not legal")
    if plan is None:
        return Other(name, why_not="does not fit, or is not legal")
    return Other(name, plan, step_time(graph, plan, setting).total)
