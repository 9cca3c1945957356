"""The fastest plan that fits in memory: which partition every operator has, and what every layer recomputes.

program.py finds it exactly, as an integer program, whose memory is linear in its variables. memory.py then walks the
plan's own graph step by step, which is exact but no linear program. The two are made to agree here.
"""

import math
from dataclasses import replace

from longctx.compiler.ir import Graph
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.memory import MemoryPrediction, predict
from longctx.compiler.ops import legal_partitions, spec_of
from longctx.compiler.plan import GB, Fixed, Plan, Setting
from longctx.compiler.program import Program
from longctx.compiler.recompute import Recompute
from longctx.errors import DecisionsError, DoesNotFit, LayerNameError, PlanSizeError, SolverError

CORRECTIONS = 4  # solves at most
CLOSE_ENOUGH = 0.02  # of the memory limit
SAME_LIMIT = 1e-3  # of a limit; a correction that is smaller than this finds the same plan again


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
    best = _fastest_or_leanest(Program(graph, setting, fixed or Fixed()))
    if best is None:
        raise DecisionsError("it asks for partitions that are not legal together for this model and length")
    if best.memory > setting.memory_limit:
        missing = math.ceil(10 * (best.memory - setting.memory_limit) / GB) / 10
        needed = math.ceil(10 * best.memory / GB) / 10
        unproved = ", unless there is a leaner one for which the solver had no time" if best.gap else ""
        raise DoesNotFit(f"the leanest plan needs {needed:.1f} GB a GPU{unproved}", missing)
    return best


def alternative(graph: Graph, setting: Setting, fixed: Fixed) -> Plan | None:
    """The fastest plan that fits under what is fixed, or None; found as the best one is, so that the two compare."""
    plan = _fastest_or_leanest(Program(graph, setting, fixed))
    return plan if plan is not None and plan.memory <= setting.memory_limit else None


def _fastest_or_leanest(program: Program) -> Plan | None:
    """The program's fastest plan that fits; where none does, its leanest; None if no plan is legal.

    The limit given to the program is corrected by how far its memory and the walked one are apart, until the walk is
    within the limit too.
    """
    setting = program.setting

    def with_predicted_memory(plan: Plan) -> Plan:
        return replace(plan, memory=predict_memory(program.graph, plan.assignment, plan.recompute, setting).peak)

    limit, best = setting.memory_limit, None
    for _ in range(CORRECTIONS):
        try:
            solved = program.solve(limit)
        except SolverError:
            if best is None:
                raise
            break  # a plan that fits is there already
        if solved is None:
            break
        plan = with_predicted_memory(solved)
        room = setting.memory_limit - plan.memory
        if room >= 0 and (best is None or plan.seconds < best.seconds):
            best = plan
        if room >= 0 and (set(plan.recompute) <= {Recompute.NOTHING} or room < CLOSE_ENOUGH * setting.memory_limit):
            break
        corrected = solved.memory + room
        if math.isclose(corrected, limit, rel_tol=SAME_LIMIT):
            break
        limit = corrected
    if best is None and (leanest := program.leanest()):
        best = with_predicted_memory(leanest)
    return best


def check_splittable(graph: Graph, plan_size: int) -> None:
    """Raises a PlanSizeError if ranks would share no work at all, each computing every row whole."""
    products = [op for op in graph.all_ops() if spec_of(op).flops(op).forward]
    if plan_size == 1 or any(len(legal_partitions(op, plan_size)) > 1 for op in products):
        return
    length = graph.inputs[0].shape[-1]
    works = [n for n in range(2, 2 * plan_size + 1) if any(len(legal_partitions(op, n)) > 1 for op in products)]
    instead = f"choose one of {', '.join(map(str, works))}" if works else "choose 1"
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


def unsplittable_attention(graph: Graph, plan_size: int) -> str | None:
    """Why attention is computed whole by every rank, if it has to be."""
    for op in graph.all_ops():
        selective = spec_of(op).selective_recompute
        if selective and plan_size > 1 and len(legal_partitions(op, plan_size)) == 1:
            return f"{selective.shared_out(op)} don't divide by {plan_size} ranks"
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
