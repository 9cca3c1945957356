"""The fastest plan that fits in memory: which partition every operator has, and what every layer recomputes.

program.py finds it exactly, as an integer program, whose memory is linear in its variables and, to a twentieth, a bound
from below (memory_bound.py). memory.py then walks the plan's own graph step by step, which is exact but no linear
program. So the program's answers are bounds to the same degree: none of the plans that fit is faster than its fastest,
and none needs less than its leanest. Where the walk finds that a plan needs more than the program said, the program is
asked again with a lower limit, and what is found in the end says how far it may be from the bound.
"""

import math
from dataclasses import dataclass, replace

from longctx.compiler.ir import Graph
from longctx.compiler.linear_program import RELATIVE_GAP
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.memory import MemoryPrediction, predict
from longctx.compiler.ops import legal_partitions, spec_of, splits_queries
from longctx.compiler.plan import GB, Fixed, Plan, Setting
from longctx.compiler.program import Program
from longctx.compiler.recompute import Recompute
from longctx.errors import DecisionsError, DoesNotFit, LayerNameError, PlanSizeError, SolverError

SOLVES = 4  # of a search for the fastest plan, at most
LEAN_SOLVES = 3  # of a search for the leanest, which is made where nothing else is found
CLOSE = 1e-3  # to the bound, of seconds or bytes: then a plan counts as the fastest or the leanest
MOST_NAMED = 12  # of plan sizes that would work


def make_plan(graph: Graph, setting: Setting, fixed: Fixed | None = None) -> Plan:
    """The fastest plan that fits.

    Raises:
        PlanSizeError: the ranks could share no work.
        LayerNameError: a layer class to recompute is none of the model's.
        DoesNotFit: no plan fits, or none does under what is fixed; it says by how much.
        DecisionsError: what is fixed is not legal together.
        SolverError: the solver found no plan in its time.
    """
    check_splittable(graph, setting.plan_size)
    check_layer_names(graph, setting)
    fixed = fixed or Fixed()
    plan, at_least_seconds = fastest_in_any_order(graph, setting, fixed)
    if plan is None:
        fixed = replace(fixed, balanced=bool(fixed.balanced))
        plan, at_least = leanest(Program(graph, setting, fixed))
        if plan.memory > setting.memory_limit:
            missing = math.ceil(10 * (plan.memory - setting.memory_limit) / GB) / 10
            raise DoesNotFit(say_need(plan.memory, at_least), missing)
    return with_gap(plan, at_least_seconds)


def alternative(graph: Graph, setting: Setting, fixed: Fixed) -> Plan | None:
    """The fastest plan that fits under what is fixed, or None; found as the best one is, so that the two compare."""
    plan, at_least_seconds = fastest_in_any_order(graph, setting, fixed, CLOSE)
    return with_gap(plan, at_least_seconds) if plan else None


def with_gap(plan: Plan, at_least_seconds: float) -> Plan:
    """The plan with how much faster another may be, given seconds that every plan takes; 0 if none are known."""
    return replace(plan, gap=1 - at_least_seconds / plan.seconds if at_least_seconds else None)


def fastest_in_any_order(
    graph: Graph, setting: Setting, fixed: Fixed, close: float = RELATIVE_GAP
) -> tuple[Plan | None, float]:
    """`fastest`, of plans that split a row's tokens from first to last, or in balanced order.

    The order matters only to a plan that splits attention along its queries. If no such plan is the fastest although
    attention is taken to be shared out evenly, that is all; else either order is searched, unless the first gives a
    plan that is as fast as that, or as `close`.
    """
    plan, at_least = fastest(Program(graph, setting, fixed))
    splits = plan and any(splits_queries(*chosen) for chosen in plan.assignment.partitions.items())
    if fixed.balanced is not None or not splits:
        return plan, at_least
    orders = [True, False] if graph.inputs[0].shape[-1] % (2 * setting.plan_size) == 0 else [False]
    best: Plan | None = None
    bounds = []
    for balanced in orders:
        plan, bound = fastest(Program(graph, setting, replace(fixed, balanced=balanced)))
        bounds += [bound] if bound else []
        if plan and (best is None or plan.seconds < best.seconds):
            best = plan
        if best and best.seconds * (1 - close) < at_least:
            return best, at_least
    return best, min(bounds, default=0.0)


def fastest(program: Program) -> tuple[Plan | None, float]:
    """The fastest plan that was found to fit, if one was, and seconds that every plan takes that fits; 0 if none is
    known, since by the program's count none fits.

    Raises:
        SolverError: the solver found no plan in its time.
    """
    most = limit = program.setting.memory_limit
    best, at_least = None, 0.0
    for _ in range(SOLVES):
        try:
            solved = program.solve(limit)
            if solved is None:
                break
            at_least = at_least or solved.seconds * (1 - (solved.gap or 0.0))
            plan = walked(solved, program)
            found = plan if plan.memory <= most else with_less_kept(solved, plan.memory, program)
        except SolverError:
            if not at_least:
                raise
            break
        if found and (best is None or found.seconds < best.seconds):
            best = found
        if plan.memory <= most or (best and best.seconds * (1 - CLOSE) < at_least):
            break
        limit = solved.memory - (plan.memory - most)
    return best, at_least


def with_less_kept(solved: Plan, memory: float, program: Program) -> Plan | None:
    """The fastest plan that was found to fit with the partitions of one that does not, by what its layers recompute.

    Most plans need but little more than the program counts, and one layer that recomputes more makes up for that: this
    is the fastest plan but for what counts as nothing, and found in a hundredth of the time that all partitions take.

    Args:
        memory: bytes that the plan needs, by memory.py; the program says `solved.memory`.
    """
    most = program.setting.memory_limit
    for _ in range(SOLVES):
        other = program.solve(solved.memory - (memory - most), solved.assignment)
        if other is None:
            return None
        plan = walked(other, program)
        if plan.memory <= most:
            return plan
        solved, memory = other, plan.memory
    return None


def leanest(program: Program) -> tuple[Plan, float]:
    """The plan that was found to need the least memory, and bytes that every plan needs.

    The fastest plans are walked for limits between what every plan needs and what the best so far needs: none that the
    program says to need more can be better.

    Raises:
        DecisionsError: no plan is legal under what is fixed.
        SolverError: the solver found no plan in its time.
    """
    solved = program.leanest()
    if solved is None:
        raise DecisionsError("it asks for partitions that are not legal together for this model and length")
    best, at_least = walked(solved, program), solved.memory * (1 - (solved.gap or 0.0))
    share = 0.25  # of the way
    for _ in range(LEAN_SOLVES):
        if best.memory < at_least * (1 + CLOSE):
            break
        try:
            solved = program.solve(at_least + share * (best.memory - at_least))
        except SolverError:
            break
        plan = solved and walked(solved, program)
        if plan and plan.memory < best.memory:
            best = plan
        else:
            share = (1 + share) / 2
    return best, at_least


def say_need(found: float, at_least: float) -> str:
    """What the leanest plan needs, or the leanest that was found, with the bound from below."""
    found_gb, at_least_gb = math.ceil(10 * found / GB) / 10, math.floor(10 * at_least / GB) / 10
    if found < at_least * (1 + CLOSE):
        return f"the leanest plan needs {found_gb:.1f} GB a GPU"
    return (
        f"the leanest plan that was found needs {found_gb:.1f} GB a GPU, and no plan less than about {at_least_gb:.1f}"
    )


def walked(plan: Plan, program: Program) -> Plan:
    """The plan with the memory that memory.py finds."""
    return replace(plan, memory=predict_memory(program.graph, plan.assignment, plan.recompute, program.setting).peak)


def check_splittable(graph: Graph, plan_size: int) -> None:
    """Raises a PlanSizeError if ranks would share no work at all, each computing every row whole."""
    products = [op for op in graph.all_ops() if spec_of(op).flops(op).forward]
    if plan_size == 1 or any(len(legal_partitions(op, plan_size)) > 1 for op in products):
        return
    length = graph.inputs[0].shape[-1]
    sizes = {size for op in products for tensor in op.inputs for size in tensor.shape}
    divisors = [
        n for n in range(2, min(2 * plan_size, max(sizes, default=1)) + 1) if any(size % n == 0 for size in sizes)
    ]
    works = [n for n in divisors if any(len(legal_partitions(op, n)) > 1 for op in products)]
    instead = f"choose one of {', '.join(map(str, works[-MOST_NAMED:]))}" if works else "choose 1"
    raise PlanSizeError(
        f"it divides neither the rows' {length} tokens nor the heads nor any layer's width, so the ranks could share "
        f"no work; {instead}"
    )


def check_layer_names(graph: Graph, setting: Setting) -> None:
    """Raises a LayerNameError if layers to recompute are named that the model does not have."""
    known = {kind.source_class for kind in graph.kinds}
    if unknown := set(setting.recompute_modules or ()) - known:
        raise LayerNameError(
            f"{sorted(unknown)[0]} is no layer of {graph.class_name}; its layers are {', '.join(sorted(known))}"
        )


@dataclass(frozen=True)
class Unsplittable:
    """Attention that every rank of a plan has to compute whole."""

    why: str
    would_share: int  # the most ranks, fewer than the plan's and a divisor of them, that would share it out; 1 if none


def unsplittable_attention(graph: Graph, plan_size: int) -> Unsplittable | None:
    """Why attention is computed whole by every rank, if it has to be."""
    for op in graph.all_ops():
        shared_out = spec_of(op).shared_out
        if shared_out and plan_size > 1 and len(legal_partitions(op, plan_size)) == 1:
            fewer = [n for n in range(2, plan_size) if plan_size % n == 0 and len(legal_partitions(op, n)) > 1]
            why = f"{shared_out(op)} don't divide by {plan_size} ranks"
            return Unsplittable(why, max(fewer, default=1))
    return None


def predict_memory(
    graph: Graph, assignment: Assignment, recompute: tuple[Recompute, ...], setting: Setting
) -> MemoryPrediction:
    """What a rank holds at its peak under a plan."""
    local = localize(graph, assignment)
    pairs = [(graph, local), *zip(graph.kinds, local.kinds, strict=True)]
    plan_sharded = {
        mine.parameters[name]
        for whole, mine in pairs
        for name, tensor in whole.parameters.items()
        if tensor in assignment.plan_sharded
    }
    return predict(local, recompute, setting.world_size, plan_sharded)
