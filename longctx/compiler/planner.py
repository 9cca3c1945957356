"""A partition for every op, a recompute policy for every layer: the fastest that fits, by an exact integer program.

Layers of one kind take the same partitions, so the program has one layer of each kind, the embedding and the head. What
flows between layers has one placement throughout. Variables, all of one micro-batch of one rank:

    x[op, p]       op is computed under its legal partition p                                   binary, one a op
    z[t, s, d]     value t, which its producer leaves in placement s, is moved as consumers d want it
    r[w, j]        weight w is resident, split along dimension j: all its consumers want it so    binary
    m[k], a[k]     of kind k's layers, m recompute all but attention, and a <= m of them attention too      integer
    wx, wz         m (or a) where x (or z) is 1, else 0: what recomputation repeats

    minimize   ops and moves, forward + backward + repeated, + what FSDP's traffic exceeds the computation it hides in,
               + all-reduces of resident weights' gradients
    subject to persistent + gathered + saved + largest layer + loss <= memory limit

Solved by HiGHS through scipy.optimize.milp.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from longctx.compiler.annotation import REPLICATED, Partition, Placement, split_along
from longctx.compiler.cost import (
    ATTENTION,
    LOSS,
    VIEWS,
    Seconds,
    bytes_of,
    forward_flops,
    fsdp_seconds,
    move_seconds,
    op_seconds,
    resident_seconds,
    saved_by,
)
from longctx.compiler.hardware import Hardware
from longctx.compiler.memory import MemoryPrediction, nbytes, predict
from longctx.compiler.partition import Assignment, find_move, legal_partitions, localize
from longctx.compiler.trace import Graph, LayerKind, Op, Tensor
from longctx.errors import UserError

# What a layer keeps of its forward for its backward; it recomputes the rest.
KEEP_INPUT, KEEP_ATTENTION, KEEP_ALL = "layer", "attention", "none"
MASTER_BYTES = 16  # of a parameter: float32 weight, gradient and AdamW's two moments
GB = 1e9  # memory is in GB within the program: HiGHS takes coefficients of 1e-9 and less for zeros
CORRECTIONS = 4  # solves at most
CLOSE_ENOUGH = 0.02  # of the memory limit
SAME_LIMIT = 1e-3  # of a limit: to correct it by less finds the same plan again
LEANEST_TOLERANCE = 1e-4  # of the least memory: the solver's own
TIE_BREAK_SECONDS = 1e-9  # a GB: of plans as fast, the leanest; and the peak is no larger than it has to be

Demand = tuple[Placement, bool]  # a placement, and whether the consumer that wants it is split
Expression = dict[int, float]  # variable -> coefficient; _CONSTANT for what has none
_CONSTANT = -1


@dataclass(frozen=True)
class Setting:
    """What a plan is for."""

    plan_ngpus: int
    runtime_ngpus: int
    hardware: Hardware
    memory_limit: float  # bytes
    recompute_modules: tuple[str, ...] | None = None  # class names; None leaves it to the planner
    grad_accumulation_steps: int = 1


@dataclass(frozen=True)
class Plan:
    """What codegen writes. `recompute[i]` is layer i's policy: KEEP_INPUT, KEEP_ATTENTION or KEEP_ALL."""

    assignment: Assignment
    recompute: tuple[str, ...]
    seconds: float  # predicted, of a micro-batch
    memory: float  # predicted peak, bytes


@dataclass(frozen=True)
class Fixed:
    """Decisions taken beforehand: a forced plan, or what an alternative to the best one differs in."""

    partitions: dict[Op, str | None] = field(default_factory=dict)  # op -> the identifier it is split along
    not_partitions: dict[Op, str | None] = field(default_factory=dict)
    boundary: Placement | None = None
    policy: str | None = None  # of every layer


def describe(graph: Graph, plan: Plan) -> dict:
    """A plan's decisions as plan.json holds them; `fix` reads them back."""
    return {
        "boundary": plan.assignment.boundary,
        "ops": {name: [[op.target, plan.assignment.partitions[op].dim] for op in ops] for name, ops in _ops(graph)},
    }


def fix(graph: Graph, decisions: dict, option: str) -> Fixed:
    """The decisions of a plan.json, to be taken again for a graph of the same model, at whatever length.

    Raises:
        UserError: they are none that compile wrote, or of another model.
    """
    partitions: dict[Op, str | None] = {}
    try:
        boundary = decisions["boundary"]
        stored = {name: [(target, dim) for target, dim in ops] for name, ops in decisions["ops"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{option}: its decisions are not as compile writes them; give a plan.json as compile wrote it"
        ) from error
    for name, ops in _ops(graph):
        decided = stored.get(name, [])
        if [op.target for op in ops] != [target for target, _ in decided]:
            raise UserError(
                f"{option}: it is a plan of another model (its {name} has other operators); give a plan of this one"
            )
        for op, (_, dim) in zip(ops, decided, strict=True):
            partitions[op] = dim
    return Fixed(partitions, boundary=boundary)


def _ops(graph: Graph) -> list[tuple[str, list[Op]]]:
    """The ops of the root and of each layer kind, by class name."""
    root = [op for op in graph.body if isinstance(op, Op)]
    return [(graph.class_name, root), *((kind.class_name, list(kind.ops)) for kind in graph.kinds)]


def make_plan(graph: Graph, setting: Setting, fixed: Fixed | None = None) -> Plan:
    """The fastest plan that fits.

    Raises:
        UserError: nothing fits, or nothing does under what is fixed; it says by how much.
    """
    check_splittable(graph, setting.plan_ngpus)
    best = _fastest_or_leanest(_Program(graph, setting, fixed or Fixed()))
    if best is None:
        raise UserError("--plan: it asks for partitions that are not legal together for this model and length")
    if best.memory > setting.memory_limit:
        more = math.ceil(10 * (best.memory - setting.memory_limit) / GB) / 10
        raise UserError(
            f"--gpu_mem_constraint {setting.memory_limit / GB:g}: the leanest plan needs "
            f"{math.ceil(10 * best.memory / GB) / 10:.1f} GB a GPU; raise it by {more:.1f}, take more GPUs "
            "(--plan_ngpus, --runtime_ngpus), or shorter rows"
        )
    return best


def alternative(graph: Graph, setting: Setting, fixed: Fixed) -> Plan | None:
    """The fastest plan that fits under what is fixed, or None; found as the best one is, so that the two compare."""
    plan = _fastest_or_leanest(_Program(graph, setting, fixed))
    return plan if plan is not None and plan.memory <= setting.memory_limit else None


def _fastest_or_leanest(program: "_Program") -> Plan | None:
    """The program's fastest plan that fits; where none does, its leanest; None if no plan is legal.

    The program's memory is linear in its variables; memory.predict walks the plan's own graph step by step. The limit
    given to the program is corrected by how far the two are apart, until the walk is within the limit too.
    """
    setting = program.setting

    def with_predicted_memory(plan: Plan) -> Plan:
        return replace(plan, memory=predict_memory(program.graph, plan.assignment, plan.recompute, setting).peak)

    limit, best = setting.memory_limit, None
    for _ in range(CORRECTIONS):
        solved = program.solve(limit)
        if solved is None:
            break
        plan = with_predicted_memory(solved)
        room = setting.memory_limit - plan.memory
        if room >= 0 and (best is None or plan.seconds < best.seconds):
            best = plan
        if room >= 0 and (set(plan.recompute) <= {KEEP_ALL} or room < CLOSE_ENOUGH * setting.memory_limit):
            break
        corrected = solved.memory + room
        if math.isclose(corrected, limit, rel_tol=SAME_LIMIT):
            break
        limit = corrected
    if best is None and (leanest := program.leanest()):
        best = with_predicted_memory(leanest)
    return best


def check_splittable(graph: Graph, n_ranks: int) -> None:
    """Raises a UserError if ranks would share no work at all, each computing every row whole."""
    products = [op for _, ops in _ops(graph) for op in ops if forward_flops(op)]
    if n_ranks == 1 or any(len(legal_partitions(op, n_ranks)) > 1 for op in products):
        return
    length = graph.inputs[0].shape[-1]
    works = [n for n in range(2, 2 * n_ranks + 1) if any(len(legal_partitions(op, n)) > 1 for op in products)]
    instead = f"choose one of {', '.join(map(str, works))}" if works else "choose 1"
    raise UserError(
        f"--plan_ngpus {n_ranks}: it divides neither the rows' {length} tokens nor the heads nor any layer's width, so "
        f"the ranks could share no work; {instead}"
    )


def unsplittable_attention(graph: Graph, n_ranks: int) -> str | None:
    """Why attention is computed whole by every rank, if it has to be."""
    attentions = [op for kind in graph.kinds for op in kind.ops if op.target == ATTENTION]
    if n_ranks == 1 or all(len(legal_partitions(op, n_ranks)) > 1 for op in attentions):
        return None
    key_value_heads = attentions[0].inputs[1].shape[1]
    return f"its {key_value_heads} key-value heads don't divide by {n_ranks} ranks"


def predict_memory(
    graph: Graph, assignment: Assignment, recompute: tuple[str, ...], setting: Setting
) -> MemoryPrediction:
    """What a rank holds at its peak under a plan."""
    local = localize(graph, assignment)
    kept = {t for owner in (graph, *graph.kinds) for t in owner.parameters.values() if t in assignment.resident}
    pairs = [(graph, local), *zip(graph.kinds, local.kinds, strict=True)]
    resident = {mine.parameters[n] for whole, mine in pairs for n, t in whole.parameters.items() if t in kept}
    return predict(local, recompute, nbytes, setting.runtime_ngpus, resident)


@dataclass
class _Flow:
    """A value on its way: where its producer leaves it, and what its consumers want."""

    sources: dict[Placement, Expression]
    demands: list[dict[Demand, Expression]] = field(default_factory=list)  # one a consumer
    passed_by: set[Placement] = field(default_factory=set)  # those in which a relayout may take it as it is

    def is_moved_later(self, source: Placement, target: Placement) -> bool:
        """Whether a move, as dear behind the relayout that alone reads the value, is left to there.

        It decides between plans that cost the same: moves come right before what needs them.
        """
        return len(self.demands) == 1 and source in self.passed_by - {REPLICATED, target}


@dataclass(frozen=True)
class _Scope:
    """One function of the generated code: the root, or a layer kind of which there are `times` layers."""

    owner: Graph | LayerKind
    times: int
    recomputed: int | None = None  # the variables m and a
    attention_recomputed: int | None = None
    flows: dict[Tensor, _Flow] = field(default_factory=dict)
    compute: Expression = field(default_factory=dict)  # seconds of its ops, all layers
    saved: Expression = field(default_factory=dict)  # bytes that one layer's backward needs, its input left out
    saved_once: set[Tensor] = field(default_factory=set)  # the tensors counted in it
    gathered: Expression = field(default_factory=dict)  # bytes of FSDP's whole weights and gradients, at their most
    weights: list[tuple[Op, Tensor, dict[Placement, Expression]]] = field(default_factory=list)  # who wants them how


class _Program:
    """The integer program, built once and solved for any memory limit. Costs are in seconds, memory in GB."""

    def __init__(self, graph: Graph, setting: Setting, fixed: Fixed):
        self.graph, self.setting, self.fixed = graph, setting, fixed
        self.n = setting.plan_ngpus
        self.costs: list[float] = []
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.rows: list[tuple[Expression, float, float]] = []
        self.x: dict[Op, list[tuple[Partition, int]]] = {}
        self.resident: dict[Tensor, list[tuple[int, int]]] = {}
        self.counts: dict[tuple[int, int], int] = {}  # (x or z, m or a) -> wx or wz
        self.maxima: dict[int, tuple[Expression, ...]] = {}  # variable -> what it is the largest of
        self.persistent: Expression = {}
        self.kept: Expression = {}  # saved from the forward to the backward, all layers
        self.build()

    # --- variables, rows and the expressions they are made of

    def variable(self, cost: float = 0.0, upper: float = 1.0, integer: bool = False) -> int:
        self.costs.append(cost)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.costs) - 1

    def row(self, terms: Expression, lower: float = -np.inf, upper: float = np.inf) -> None:
        constant = terms.get(_CONSTANT, 0.0)
        self.rows.append(({v: c for v, c in terms.items() if v != _CONSTANT}, lower - constant, upper - constant))

    def choice(self, placements: Iterable[Placement]) -> dict[Placement, Expression]:
        """One of several placements."""
        chosen = {placement: {self.variable(integer=True): 1.0} for placement in placements}
        self.row(_sum(*chosen.values()), 1, 1)
        return chosen

    def largest(self, *expressions: Expression) -> int:
        """A variable that is at least each of the expressions."""
        variable = self.variable(upper=np.inf)
        for expression in expressions:
            self.row(_sum({variable: 1.0}, _scaled(expression, -1)), lower=0)
        self.maxima[variable] = expressions
        return variable

    def count(self, chosen: int, layers: int, n_layers: int) -> int:
        """A variable that is at least `layers` where `chosen` is 1; minimizing makes it 0 where it is 0."""
        if (chosen, layers) not in self.counts:
            variable = self.counts[chosen, layers] = self.variable(upper=n_layers)
            self.row({variable: 1.0, layers: -1.0, chosen: -float(n_layers)}, lower=-n_layers)
            self.row({variable: 1.0, chosen: -float(n_layers)}, upper=0)
            self.row({variable: 1.0, layers: -1.0}, upper=0)
        return self.counts[chosen, layers]

    # --- the program

    def build(self) -> None:
        calls = self.graph.layer_calls
        if calls:
            self.boundary = self.choice(self.placements(calls[0].inputs[0], self.fixed.boundary))
        self.extra = {t: self.choice(self.placements(t)) for t in dict.fromkeys(t for c in calls for t in c.inputs[1:])}
        self.scopes = [self.build_root(), *(self.build_kind(number) for number in range(len(self.graph.kinds)))]
        for scope in self.scopes:
            for tensor, flow in scope.flows.items():
                self.add_moves(tensor, flow, scope)
        self.add_memory()

    def placements(self, tensor: Tensor, fixed: Placement | None = None) -> list[Placement]:
        split = [split_along(d) for d, size in enumerate(tensor.shape) if size % self.n == 0 and self.n > 1]
        return [p for p in (REPLICATED, *split) if fixed in (None, p)]

    def build_root(self) -> _Scope:
        scope = _Scope(self.graph, 1)
        scope.flows.update({t: _Flow({REPLICATED: {_CONSTANT: 1.0}}) for t in self.graph.inputs})
        handed_on: set[Tensor] = set()
        for item in self.graph.body:
            if isinstance(item, Op):
                self.add_op(item, scope)
                continue
            first, *others = item.inputs
            for tensor, chosen in [(first, self.boundary), *((t, self.extra[t]) for t in others)]:
                if tensor not in handed_on:  # one layer hands it to the next as it is
                    scope.flows[tensor].demands.append(_demands_of(chosen, tensor))
                    handed_on.add(tensor)
            for tensor in item.outputs:
                scope.flows[tensor] = _Flow(
                    self.boundary if tensor is item.outputs[0] else {REPLICATED: {_CONSTANT: 1.0}}
                )
            handed_on.add(item.outputs[0])
        scope.flows[self.graph.output].demands.append({(REPLICATED, False): {_CONSTANT: 1.0}})
        self.add_weights(scope)
        return scope

    def build_kind(self, number: int) -> _Scope:
        kind = self.graph.kinds[number]
        calls = [call for call in self.graph.layer_calls if call.kind == number]
        m = self.variable(upper=len(calls), integer=True)
        a = self.variable(upper=len(calls), integer=True)
        self.row({m: 1.0, a: -1.0}, lower=0)
        self.fix_policy(kind, m, a, len(calls))
        scope = _Scope(kind, len(calls), m, a)
        for place, tensor in enumerate(kind.inputs):
            sources = self.boundary if place == 0 else self.extra[calls[0].inputs[place]]
            scope.flows[tensor] = _Flow(sources)
        for op in kind.ops:
            self.add_op(op, scope)
        for place, tensor in enumerate(kind.outputs):
            chosen = self.boundary if place == 0 else {REPLICATED: {_CONSTANT: 1.0}}
            scope.flows[tensor].demands.append(_demands_of(chosen, tensor))
        self.add_weights(scope)
        return scope

    def fix_policy(self, kind: LayerKind, m: int, a: int, n_layers: int) -> None:
        policy = self.fixed.policy
        if self.setting.recompute_modules is not None:
            named = kind.class_name.rstrip("0123456789") in self.setting.recompute_modules
            policy = KEEP_INPUT if named else KEEP_ALL
        if policy is not None:
            self.row({m: 1.0}, *(2 * [0 if policy == KEEP_ALL else n_layers]))
            self.row({a: 1.0}, *(2 * [n_layers if policy == KEEP_INPUT else 0]))
        if not can_keep_attention(kind):
            self.row({m: 1.0, a: -1.0}, upper=0)

    def add_op(self, op: Op, scope: _Scope) -> None:
        legal = legal_partitions(op, self.n)
        if op in self.fixed.partitions:
            legal = [p for p in legal if p.dim == self.fixed.partitions[op]]
            if not legal:
                raise UserError(
                    f"--plan: it splits {op.module or 'the model'}'s {op.target} along {self.fixed.partitions[op]!r}, "
                    f"which {self.n} ranks can't share evenly here; compile without --plan"
                )
        if op in self.fixed.not_partitions:
            legal = [p for p in legal if p.dim != self.fixed.not_partitions[op]]
        self.x[op] = [(p, self.variable(integer=True)) for p in legal]
        self.row({x: 1.0 for _, x in self.x[op]}, 1, 1)
        recomputed = scope.attention_recomputed if op.target == ATTENTION else scope.recomputed
        for partition, x in self.x[op]:
            seconds = op_seconds(op, partition, self.n, self.setting.hardware)
            self.costs[x] = scope.times * (seconds.forward + seconds.backward)
            scope.compute[x] = self.costs[x]
            if recomputed is not None and seconds.forward:
                repeated = self.count(x, recomputed, scope.times)
                self.costs[repeated] = scope.compute[repeated] = seconds.forward
        self.add_saved(op, scope)
        for layers in {scope.recomputed, scope.attention_recomputed} - {None}:
            counts = [self.counts.get((x, layers)) for _, x in self.x[op]]
            if None not in counts:  # implied, and with it the relaxation that the solver starts from is far closer
                self.row({layers: -1.0, **dict.fromkeys(counts, 1.0)}, 0, 0)
        for place, tensor in enumerate(op.inputs):
            wanted: dict[Demand, Expression] = {}
            for partition, x in self.x[op]:
                demand = (partition.inputs[place], partition.dim is not None and tensor.requires_grad)
                wanted[demand] = _sum(wanted.get(demand, {}), {x: 1.0})
            if tensor.kind == "parameter":
                scope.weights.append(
                    (op, tensor, {d[0]: _sum(*(e for c, e in wanted.items() if c[0] == d[0])) for d in wanted})
                )
            elif tensor.kind != "constant":
                scope.flows[tensor].demands.append(wanted)
                if is_relayout(op) and op not in self.fixed.partitions:
                    scope.flows[tensor].passed_by.update(p.inputs[0] for p in legal)
        for place, tensor in enumerate(op.outputs):
            sources: dict[Placement, Expression] = {}
            for partition, x in self.x[op]:
                placement = partition.outputs[place]
                sources[placement] = _sum(sources.get(placement, {}), {x: 1.0})
            scope.flows[tensor] = _Flow(sources)

    def add_moves(self, tensor: Tensor, flow: _Flow, scope: _Scope) -> None:
        """z[t, s, d]: for each thing wanted of a value, the one source that it is moved from."""
        wanted: dict[Demand, list[Expression]] = {}
        for demands in flow.demands:
            for demand, expression in demands.items():
                wanted.setdefault(demand, []).append(expression)
        for (target, split), expressions in wanted.items():
            sources = [s for s in flow.sources if not flow.is_moved_later(s, target)]
            seconds = {s: self.move_seconds(tensor, s, target, split) for s in sources}
            if len(sources) == len(flow.sources) and all(cost == Seconds() for cost in seconds.values()):
                continue
            moves = {s: self.variable(scope.times * (cost.forward + cost.backward)) for s, cost in seconds.items()}
            for expression in expressions:  # equal moves of a value are made once and shared
                self.row(_sum(dict.fromkeys(moves.values(), 1.0), _scaled(expression, -1)), lower=0)
            for source, z in moves.items():
                self.row(_sum({z: 1.0}, _scaled(flow.sources[source], -1)), upper=0)
                if scope.recomputed is not None and seconds[source].forward:
                    self.costs[self.count(z, scope.recomputed, scope.times)] = seconds[source].forward

    def move_seconds(self, tensor: Tensor, source: Placement, target: Placement, split: bool) -> Seconds:
        move = find_move(source, target, split, tensor.requires_grad)
        return move_seconds(tensor, move, self.n, self.setting.hardware)

    def add_weights(self, scope: _Scope) -> None:
        """Which weights are resident, and what reducing their gradients takes; FSDP's traffic for the others, as far as
        computing does not hide it."""
        sharded: Expression = {_CONSTANT: 0.0}  # parameters that FSDP gathers for one layer
        for tensor in scope.owner.parameters.values():
            wants = [wanted for _, t, wanted in scope.weights if t is tensor]
            size = prod(tensor.shape)
            self.persistent = _sum(
                self.persistent, {_CONSTANT: scope.times * size * MASTER_BYTES / GB / self.setting.runtime_ngpus}
            )
            sharded = _sum(sharded, {_CONSTANT: size})
            dims = [d for d in range(len(tensor.shape)) if wants and all(split_along(d) in wanted for wanted in wants)]
            self.resident[tensor] = [(d, self.variable(integer=True)) for d in dims]
            self.row({_CONSTANT: 0.0, **{r: 1.0 for _, r in self.resident[tensor]}}, upper=1)
            ranks = (self.n, self.setting.runtime_ngpus, self.setting.hardware)
            reduced = resident_seconds(size, *ranks, self.setting.grad_accumulation_steps)
            for dim, r in self.resident[tensor]:
                self.costs[r] = scope.times * reduced
                for wanted in wants:
                    self.row(_sum({r: 1.0}, _scaled(wanted[split_along(dim)], -1)), upper=0)
                more = scope.times * size * MASTER_BYTES / GB * (1 / self.n - 1 / self.setting.runtime_ngpus)
                self.persistent = _sum(self.persistent, {r: more})
                sharded = _sum(sharded, {r: -float(size)})
        total = sum(prod(t.shape) for t in scope.owner.parameters.values())
        dtype = next((t.dtype for t in scope.owner.parameters.values()), None)
        if total and self.setting.runtime_ngpus > 1:
            seconds = fsdp_seconds(total, dtype, self.setting.runtime_ngpus, self.setting.hardware)
            whole = scope.times * (seconds.forward + seconds.backward)
            # As a share of the whole traffic: the solver's tolerance of 1e-6 would be a microsecond otherwise.
            traffic = _scaled(sharded, 1 / total)
            exposed = self.largest(_sum(traffic, _scaled(scope.compute, -1 / whole)))
            self.costs[exposed] = whole
        itemsize = dtype.itemsize if dtype else 0
        # The layer at work and the one prefetched; its gradients, and what reduces them in float32.
        gathered = 3 * itemsize + 4 if isinstance(scope.owner, LayerKind) else 2 * itemsize + 4
        scope.gathered.update(_scaled(sharded, gathered / GB))

    # --- memory

    def add_saved(self, op: Op, scope: _Scope) -> None:
        """Bytes that the op's backward keeps, unless its layer recomputes them."""
        if scope.recomputed is None:
            return
        for tensor in saved_by(op):
            if tensor in scope.saved_once or tensor in scope.owner.inputs:
                continue
            scope.saved_once.add(tensor)
            kept_by_policy = tensor in op.outputs and op.target == ATTENTION
            layers = scope.attention_recomputed if kept_by_policy else scope.recomputed
            for partition, x in self.x[op]:
                places = zip((*op.inputs, *op.outputs), (*partition.inputs, *partition.outputs), strict=True)
                size = bytes_of(tensor, next(p for t, p in places if t is tensor), self.n) / GB
                scope.saved[x] = scope.saved.get(x, 0.0) + size
                terms = {x: scope.times * size, self.count(x, layers, scope.times): -size}
                self.kept = _sum(self.kept, terms)

    def add_memory(self) -> None:
        """peak >= persistent + kept + the larger of a layer's backward and the loss."""
        moments = []
        for scope in self.scopes[1:]:
            widest = self.largest(*(self.transient(op) for op in scope.owner.ops))
            self.costs[widest] = TIE_BREAK_SECONDS
            moments.append(_sum(scope.saved, {widest: 1.0}, scope.gathered))
            for placement, chosen in self.boundary.items():
                size = bytes_of(scope.owner.inputs[0], placement, self.n) / GB
                self.kept = _sum(self.kept, _scaled(chosen, scope.times * size))
        root = self.scopes[0].gathered
        losses = [op for op in self.x if op.target == LOSS]
        moments.append(_sum({_CONSTANT: 0.0}, *(self.loss_memory(op) for op in losses)))
        peak = self.largest(*moments)
        self.costs[peak] = TIE_BREAK_SECONDS
        self.memory = _sum(self.persistent, self.kept, root, {peak: 1.0})

    def transient(self, op: Op) -> Expression:
        """Bytes of an op's inputs, outputs and their gradients at work."""
        terms: Expression = {}
        for partition, x in self.x[op]:
            read = [(t, p) for t, p in zip(op.inputs, partition.inputs, strict=True) if t.kind == "activation"]
            made = list(zip(op.outputs, partition.outputs, strict=True))
            terms[x] = sum(bytes_of(t, p, self.n) for t, p in (*read, *made)) / GB
        return terms

    def loss_memory(self, op: Op) -> Expression:
        """The hidden states and their gradient, the weight's gradient in float32, one chunk of logits."""
        hidden_states, weight = op.inputs[:2]
        chunk = 1024 * weight.shape[0] * 4
        constant = prod(weight.shape) * 4 + chunk
        return {x: (2 * bytes_of(hidden_states, p.inputs[0], self.n) + constant) / GB for p, x in self.x[op]}

    # --- solving

    def solve(self, memory_limit: float) -> Plan | None:
        """The fastest plan within `memory_limit` bytes, or None."""
        values = self.minimize(np.array(self.costs), [(self.memory, -np.inf, memory_limit / GB)])
        return None if values is None else self.read_plan(values)

    def leanest(self) -> Plan | None:
        """The fastest plan of those that need the least memory, or None if no plan is legal."""
        costs = np.zeros(len(self.costs))
        for variable, coefficient in self.memory.items():
            if variable != _CONSTANT:
                costs[variable] += coefficient
        values = self.minimize(costs, [])
        return None if values is None else self.solve(_value(self.memory, values) * GB * (1 + LEANEST_TOLERANCE))

    def minimize(self, costs: np.ndarray, more_rows: list) -> np.ndarray | None:
        rows = [
            *self.rows,
            *(
                (_without_constant(e), low - e.get(_CONSTANT, 0.0), up - e.get(_CONSTANT, 0.0))
                for e, low, up in more_rows
            ),
        ]
        at = [(i, v, c) for i, (terms, _, _) in enumerate(rows) for v, c in terms.items()]
        row, column, coefficient = (np.array(part) for part in zip(*at, strict=True))
        matrix = coo_array((coefficient, (row, column)), shape=(len(rows), len(costs)))
        constraints = LinearConstraint(matrix.tocsr(), [low for _, low, _ in rows], [up for _, _, up in rows])
        bounds = Bounds(0.0, np.array(self.upper))
        options = {"mip_rel_gap": 1e-5, "time_limit": 60}
        scale = 1e4 / max(costs.max(), 1e-30)  # HiGHS's tolerances are absolute, its gap of 1e-6 too
        result = milp(
            costs * scale,
            integrality=np.array(self.integer, int),
            bounds=bounds,
            constraints=constraints,
            options=options,
        )
        return None if result.x is None else self.tightened(result.x)

    def tightened(self, values: np.ndarray) -> np.ndarray:
        """A solution without what the solver's tolerances leave: integers round, maxima no larger than they must be."""
        values = np.where(self.integer, np.round(values), values)
        for variable, expressions in self.maxima.items():  # inner ones first, as they were made
            values[variable] = max(0.0, *(_value(expression, values) for expression in expressions))
        return values

    def read_plan(self, values: np.ndarray) -> Plan:
        chosen = {op: next(p for p, x in choices if values[x] > 0.5) for op, choices in self.x.items()}
        boundary = (
            next(p for p, e in self.boundary.items() if _value(e, values) > 0.5) if self.graph.kinds else REPLICATED
        )
        inputs = {t: next(p for p, e in choice.items() if _value(e, values) > 0.5) for t, choice in self.extra.items()}
        resident = {t: d for t, choices in self.resident.items() for d, r in choices if values[r] > 0.5}
        recompute: dict[int, str] = {}
        for number, scope in enumerate(self.scopes[1:]):
            m, a = round(values[scope.recomputed]), round(values[scope.attention_recomputed])
            policies = [KEEP_INPUT] * a + [KEEP_ATTENTION] * (m - a) + [KEEP_ALL] * (scope.times - m)
            layers = [call.index for call in self.graph.layer_calls if call.kind == number]
            recompute |= dict(zip(layers, policies, strict=True))
        assignment = Assignment(self.n, chosen, boundary, inputs, resident)
        seconds = float(np.dot(self.costs, values))
        policies = tuple(recompute[index] for index in sorted(recompute))
        return Plan(assignment, policies, seconds, _value(self.memory, values) * GB)


def can_keep_attention(kind: LayerKind) -> bool:
    """Whether a layer's attention surely is one fused kernel, whose output a recomputation can take over.

    With a window or a soft-cap it is blocks of queries, recomputed anyway, where flash-attn is not installed.
    """
    ops = [op for op in kind.ops if op.target == ATTENTION]
    return bool(ops) and all(set(op.kwargs) <= {"scale", "window"} and not _sees_less(op) for op in ops)


def _sees_less(attention: Op) -> bool:
    """Whether there is a window, and it is no window over everything."""
    return 0 < attention.kwargs.get("window", 0) < attention.inputs[0].shape[2]


def is_relayout(op: Op) -> bool:
    """Whether an op gives the same elements in other dimensions, at no cost: a view, a transpose."""
    if not op.target.startswith("aten.") or op.target.split(".")[1] not in VIEWS:
        return False
    return len(op.inputs) == len(op.outputs) == 1 and prod(op.inputs[0].shape) == prod(op.outputs[0].shape)


def _demands_of(chosen: dict[Placement, Expression], tensor: Tensor) -> dict[Demand, Expression]:
    """What layers want of a value that flows between them: a split placement is a split consumer's."""
    return {(p, p != REPLICATED and tensor.requires_grad): e for p, e in chosen.items()}


def _sum(*expressions: Expression) -> Expression:
    total: Expression = {}
    for expression in expressions:
        for variable, coefficient in expression.items():
            total[variable] = total.get(variable, 0.0) + coefficient
    return total


def _scaled(expression: Expression, factor: float) -> Expression:
    return {variable: factor * coefficient for variable, coefficient in expression.items()}


def _without_constant(expression: Expression) -> Expression:
    return {variable: c for variable, c in expression.items() if variable != _CONSTANT}


def _value(expression: Expression, values: np.ndarray) -> float:
    return sum(c * (1.0 if variable == _CONSTANT else values[variable]) for variable, c in expression.items())
