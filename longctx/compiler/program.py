"""Planning as an integer program: a partition for every operator, a recompute policy for every layer.

Layers of one kind take the same partitions, so the program has one layer of each kind, the embedding and the head,
however many layers there are. What flows between layers has one placement throughout.

Variables, all of one micro-batch of one rank:

    x[op, p]       op is computed under its legal partition p; one of an op's is 1                  add_op
    z[t, s, d]     value t, left in placement s by its producer, is resharded as consumers d want   add_reshards
    r[w, j]        weight w is plan-sharded along dimension j                                       add_weights
    c[k, i]        of kind k's layers, how many have a policy that is as far as i down its chain     build_kind
    wx, wz         c where x (or z) is 1, else 0: what recomputation repeats                        product

minimize

    seconds of operators, forward + backward, and of what is recomputed                             add_op
    + seconds of reshards, and of those that recomputation repeats                                  add_reshards
    + what FSDP's traffic takes beyond the computing that hides it                                  add_weights
    + copies of weights and gradients, the optimizer, and all-reduces of plan-sharded gradients     add_weights

subject to

    every operator has one partition; a fixed plan has its own                                      add_op
    whatever a consumer wants of a value is resharded from where its producer leaves it             add_reshards
    a weight is plan-sharded along j only if all that read it want it so                            add_weights
    persistent + whatever a rank holds besides, at any moment <= memory limit                       add_memory
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

import numpy as np

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
    reshard_ops,
    ring_seconds,
)
from longctx.compiler.ir import Graph, LayerKind, Op, Tensor
from longctx.compiler.layout import Layout, layout_of
from longctx.compiler.linear_program import CONSTANT, Expression, LinearProgram, Solution, scaled, total, value_of
from longctx.compiler.localize import Assignment
from longctx.compiler.memory import PERSISTENT_BYTES
from longctx.compiler.memory_bound import Choices, largest_moment, placements_of
from longctx.compiler.ops import Row, legal_partitions, spec_of
from longctx.compiler.placement import REPLICATE, Partition, Placement, Shard
from longctx.compiler.plan import GB, Fixed, Plan, Setting
from longctx.compiler.policies import chain_of
from longctx.compiler.recompute import Recompute, names_of_keepable
from longctx.errors import DecisionsError, SolverError

# Memory is in GB within the program: HiGHS takes coefficients of 1e-9 and less for zeros.
LEANEST_TOLERANCE = 1e-4  # of the least memory: the solver's own
TIE_BREAK_SECONDS = 1e-9  # a GB: of plans as fast, the leanest; and the peak is no larger than it has to be

Demand = tuple[Placement, bool]  # a placement, and whether the consumer that wants it is partitioned
ALWAYS: Expression = {CONSTANT: 1.0}


@dataclass
class _Flow:
    """A value on its way: where its producer leaves it, and what its consumers want."""

    sources: dict[Placement, Expression]
    demands: list[dict[Demand, Expression]] = field(default_factory=list)  # one a consumer
    passed_by: set[Placement] = field(default_factory=set)  # those in which a relayout may take it as it is

    def by_demand(self) -> dict[Demand, list[Expression]]:
        """For each thing that is wanted of the value, whether each consumer that may want it does."""
        wanted: dict[Demand, list[Expression]] = {}
        for demands in self.demands:
            for demand, expression in demands.items():
                wanted.setdefault(demand, []).append(expression)
        return wanted

    def is_resharded_later(self, source: Placement, target: Placement) -> bool:
        """Whether the value is resharded after the view that reads it, and not before.

        If only a view reads a value, resharding costs the same on either side of the view. Of such equal plans the one
        is taken that reshards as late as possible, right before the operator that needs it. A value that is gathered
        before a view may be sliced behind it, for which there is no such equal.
        """
        return len(self.demands) == 1 and target != REPLICATE and source in self.passed_by - {REPLICATE, target}

    def tie_break(self, source: Placement, target: Placement) -> float:
        """Seconds that count against gathering a value before a view that could be gathered behind it."""
        gathered_early = target == REPLICATE != source and source in self.passed_by
        return TIE_BREAK_SECONDS if gathered_early else 0.0


@dataclass(frozen=True)
class _Scope:
    """One function of the generated code: the root, or a layer kind of which there are `times` layers."""

    owner: Graph | LayerKind
    times: int
    layout: Layout
    again: tuple[int, ...] = ()  # the variables c
    repeats: dict[Op, int] = field(default_factory=dict)  # of an op: the c of the layers that compute it again
    flows: dict[Tensor, _Flow] = field(default_factory=dict)
    compute: Expression = field(default_factory=dict)  # seconds of its ops, all layers
    readers: list[tuple[Tensor, dict[Placement, Expression]]] = field(default_factory=list)  # who wants weights how


class Program(LinearProgram):
    """The program of a model, built once and solved for any memory limit. Costs are in seconds, memory in GB.

    Where the order of a row's tokens is open, it is as if they were split from first to last, and all ranks had as much
    of attention to compute: a bound from below for either order, and right for plans that don't split attention so.
    """

    def __init__(self, graph: Graph, setting: Setting, fixed: Fixed):
        super().__init__()
        self.graph, self.setting, self.fixed = graph, setting, fixed
        self.plan_size = setting.plan_size
        self.tokens = Row(graph.inputs[0].shape[-1], bool(fixed.balanced), setting.group_size)
        self.x: dict[Op, list[tuple[Partition, int]]] = {}
        self.plan_sharded: dict[Tensor, list[tuple[int, int]]] = {}  # weight -> (dimension, r)
        self.chains: list[tuple[list[Recompute], tuple[int, ...]]] = []  # a kind's policies, and c of all but the first
        self.fixed_seconds = 0.0  # that every plan takes
        self.reshards: dict[Tensor, list[tuple[Placement, Placement, int]]] = {}  # of values with one reader: s, d, z
        self.persistent: Expression = {}
        self.build()

    def build(self) -> None:
        calls = self.graph.layer_calls
        if calls:
            self.boundary = self.choice(self.placements(calls[0].inputs[0], self.fixed.boundary))
        alike = self.graph.placed_alike()
        choices = {t: self.choice(self.placements(t)) for t in dict.fromkeys(alike.values())}
        self.extra = {t: choices[leader] for t, leader in alike.items()}
        self.scopes = [self.build_root(), *(self.build_kind(number) for number in range(len(self.graph.kinds)))]
        for scope in self.scopes:
            for tensor, flow in scope.flows.items():
                self.add_reshards(tensor, flow, scope)
        self.add_memory()

    def choice(self, placements: Iterable[Placement]) -> dict[Placement, Expression]:
        """One of several placements."""
        chosen: dict[Placement, Expression] = {p: {self.variable(integer=True): 1.0} for p in placements}
        self.row(total(*chosen.values()), 1, 1)
        return chosen

    def placements(self, tensor: Tensor, fixed: Placement | None = None) -> list[Placement]:
        """Those that a value may have between layers."""
        splittable = self.plan_size > 1 and tensor.kind != "host"
        orders = [self.tokens.balanced and size == self.tokens.length for size in tensor.shape]
        shards = [
            Shard(d, balanced=in_order)
            for d, (size, in_order) in enumerate(zip(tensor.shape, orders, strict=True))
            if splittable and size % (self.plan_size * (1 + in_order)) == 0
        ]
        return [p for p in (REPLICATE, *shards) if fixed in (None, p)]

    # --- the root and the layer kinds

    def build_root(self) -> _Scope:
        scope = _Scope(self.graph, 1, layout_of(self.graph))
        scope.flows.update({t: _Flow({REPLICATE: ALWAYS}) for t in self.graph.inputs})
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
                scope.flows[tensor] = _Flow(self.boundary if tensor is item.outputs[0] else {REPLICATE: ALWAYS})
            handed_on.add(item.outputs[0])
        scope.flows[self.graph.output].demands.append({(REPLICATE, False): ALWAYS})
        self.add_weights(scope)
        return scope

    def build_kind(self, number: int) -> _Scope:
        """c[k, i], and one layer of the kind."""
        kind = self.graph.kinds[number]
        calls = self.graph.calls_of(number)
        chain = chain_of(kind, self.setting.hardware)
        again = tuple(self.variable(upper=len(calls), integer=True) for _ in chain[1:])
        self.chains.append((chain, again))
        for more, less in pairwise(again):
            self.row({more: 1.0, less: -1.0}, lower=0)
        self.fix_policy(kind, again, len(calls))
        scope = _Scope(kind, len(calls), layout_of(kind), again, _repeats(kind, chain, again))
        for place, tensor in enumerate(kind.inputs):
            scope.flows[tensor] = _Flow(self.boundary if place == 0 else self.extra[calls[0].inputs[place]])
        for op in kind.ops:
            self.add_op(op, scope)
        for place, tensor in enumerate(kind.outputs):
            chosen: dict[Placement, Expression] = self.boundary if place == 0 else {REPLICATE: ALWAYS}
            scope.flows[tensor].demands.append(_demands_of(chosen, tensor))
        self.add_weights(scope)
        return scope

    def fix_policy(self, kind: LayerKind, again: tuple[int, ...], n_layers: int) -> None:
        """Holds c where the policy is given: nothing or everything."""
        policy = self.fixed.policy
        if self.setting.recompute_modules is not None:
            named = kind.source_class in self.setting.recompute_modules
            policy = Recompute.EVERYTHING if named else Recompute.NOTHING
        if policy is not None:
            n = n_layers if policy == Recompute.EVERYTHING else 0
            for variable in again:
                self.row({variable: 1.0}, n, n)

    # --- operators

    def add_op(self, op: Op, scope: _Scope) -> None:
        """x[op, p] with its seconds, what it saves, what it wants of its inputs, and where it leaves its outputs."""
        self.x[op] = [(p, self.variable(integer=True)) for p in self.allowed_partitions(op)]
        self.row({x: 1.0 for _, x in self.x[op]}, 1, 1)
        recomputed = scope.repeats.get(op)
        for partition, x in self.x[op]:
            evenly = self.fixed.balanced is None
            seconds = op_seconds(op, partition, scope.layout, self.plan_size, self.setting.hardware, evenly)
            waited = ring_seconds(op, partition, seconds, self.plan_size, self.setting.hardware)
            scope.compute[x] = scope.times * (seconds.forward + seconds.backward)
            self.costs[x] = scope.compute[x] + scope.times * (waited.forward + waited.backward)
            if recomputed is not None and seconds.forward and op not in scope.layout.not_repeated:
                repeated = self.product(x, recomputed, scope.times)
                scope.compute[repeated] = seconds.forward
                self.costs[repeated] = seconds.forward + waited.forward
        self.tie_products(op, scope)
        self.add_demands(op, scope)
        for place, tensor in enumerate(op.outputs, len(op.inputs)):
            scope.flows[tensor] = _Flow(placements_of(self.x[op], place))

    def allowed_partitions(self, op: Op) -> list[Partition]:
        """The legal partitions, less those that a fixed plan rules out.

        Raises:
            DecisionsError: the fixed one is not legal here.
        """
        legal = legal_partitions(op, self.plan_size, self.tokens)
        if op in self.fixed.partitions:
            dim = self.fixed.partitions[op]
            legal = [p for p in legal if p.dim == dim]
            if not legal:
                raise DecisionsError(
                    f"it splits {op.module or 'the model'}'s {spec_of(op).name} along {dim!r}, which {self.plan_size} "
                    "ranks can't share evenly here; compile without it"
                )
        if op in self.fixed.not_partitions:
            legal = [p for p in legal if p.dim != self.fixed.not_partitions[op]]
        return legal

    def tie_products(self, op: Op, scope: _Scope) -> None:
        """The products of an op's x with a c add up to it. The rows imply it, and said aloud it brings the relaxation
        that the solver starts from far closer."""
        for layers in scope.again:
            products = [self.products[x, layers] for _, x in self.x[op] if (x, layers) in self.products]
            if len(products) == len(self.x[op]):
                self.row({layers: -1.0, **dict.fromkeys(products, 1.0)}, 0, 0)

    def add_demands(self, op: Op, scope: _Scope) -> None:
        """What each partition of an op wants of its inputs."""
        for place, tensor in enumerate(op.inputs):
            wanted: dict[Demand, Expression] = {}
            for partition, x in self.x[op]:
                demand = (partition.inputs[place], partition.dim is not None and tensor.requires_grad)
                wanted[demand] = total(wanted.get(demand, {}), {x: 1.0})
            if tensor.kind == "parameter":
                by_placement = {d: total(*(e for other, e in wanted.items() if other[0] == d)) for d, _ in wanted}
                scope.readers.append((tensor, by_placement))
            elif tensor.kind != "constant":
                scope.flows[tensor].demands.append(wanted)
                if is_relayout(op, scope.layout) and op not in self.fixed.partitions:
                    scope.flows[tensor].passed_by.update(p.inputs[0] for p, _ in self.x[op])

    # --- reshards

    def add_reshards(self, tensor: Tensor, flow: _Flow, scope: _Scope) -> None:
        """z[t, s, d]: for each thing wanted of a value, the one source that it is resharded from."""
        has_one_reader = len(flow.demands) == 1
        from_source: dict[Placement, Expression] = {source: {} for source in flow.sources}
        for (target, partitioned), expressions in flow.by_demand().items():
            sources = [s for s in flow.sources if not flow.is_resharded_later(s, target)]
            seconds = {s: self.reshard_seconds(tensor, s, target, partitioned, scope.layout) for s in sources}
            if len(sources) == len(flow.sources) and all(cost == Seconds() for cost in seconds.values()):
                continue
            z = {
                s: self.variable(scope.times * (cost.forward + cost.backward + flow.tie_break(s, target)))
                for s, cost in seconds.items()
            }
            for expression in expressions:  # equal reshards of a value are made once and shared
                self.row(total(dict.fromkeys(z.values(), 1.0), scaled(expression, -1)), lower=0)
            for source, variable in z.items():
                if has_one_reader and seconds[source] != Seconds():
                    self.reshards.setdefault(tensor, []).append((source, target, variable))
                from_source[source][variable] = 1.0
                if scope.again and seconds[source].forward:
                    repeated = self.product(variable, scope.again[0], scope.times)
                    self.costs[repeated] = seconds[source].forward
        for source, reshards in from_source.items():
            # One reader wants one thing, which said aloud brings the relaxation closer; several may want several.
            for some in [reshards] if has_one_reader else [{variable: 1.0} for variable in reshards]:
                self.row(total(some, scaled(flow.sources[source], -1)), upper=0)

    def reshard_seconds(
        self, tensor: Tensor, source: Placement, target: Placement, partitioned: bool, layout: Layout
    ) -> Seconds:
        """The time of a reshard and of its copies."""
        forward = backward = 0.0
        for op in reshard_ops(tensor, source, target, partitioned, self.plan_size):
            sent = collective_time(op, self.plan_size, self.setting.hardware)
            copied = packing_time(op, layout, self.setting.hardware)
            forward, backward = forward + sent.forward + copied.forward, backward + sent.backward + copied.backward
        return Seconds(forward, backward)

    # --- weights

    def add_weights(self, scope: _Scope) -> None:
        """r[w, j], what reducing those weights' gradients takes, and FSDP's traffic for the others, as far as computing
        does not hide it."""
        world_size = self.setting.world_size
        parameters = list(scope.owner.parameters.values())
        sharded: Expression = {CONSTANT: 0.0}  # parameters that FSDP gathers for one layer
        for tensor in parameters:
            size = prod(tensor.shape)
            bytes_of_all = scope.times * size * PERSISTENT_BYTES / GB
            self.persistent = total(self.persistent, {CONSTANT: bytes_of_all / world_size})
            sharded = total(sharded, {CONSTANT: size})
            by_fsdp, plan_sharded = self.weight_seconds(tensor, gathers_of(scope.owner))
            self.fixed_seconds += scope.times * by_fsdp
            for _, r in self.add_plan_sharded(tensor, scope):
                self.costs[r] = scope.times * (plan_sharded - by_fsdp)
                more = bytes_of_all * (1 / self.plan_size - 1 / world_size)
                self.persistent = total(self.persistent, {r: more})
                sharded = total(sharded, {r: -float(size)})
        size = sum(prod(t.shape) for t in parameters)
        if size and world_size > 1:
            self.add_fsdp_traffic(size, sharded, scope)

    def weight_seconds(self, tensor: Tensor, n_gathers: int) -> tuple[float, float]:
        """What a weight costs in copies and in the optimizer if FSDP shards it; and if it is plan-sharded, with what
        reduces its gradient."""
        size, accumulated = prod(tensor.shape), self.setting.grad_accumulation_steps
        plan_size, world_size, hardware = self.plan_size, self.setting.world_size, self.setting.hardware
        by_fsdp = fsdp_copy_seconds(size, tensor.dtype, world_size, hardware, n_gathers)
        by_fsdp += optimizer_seconds(size, world_size, hardware, accumulated)
        own = plan_sharded_copy_seconds(size, tensor.dtype, plan_size, hardware)
        own += optimizer_seconds(size, plan_size, hardware, accumulated)
        return by_fsdp, own + plan_sharded_seconds(size, plan_size, world_size, hardware, accumulated)

    def add_plan_sharded(self, tensor: Tensor, scope: _Scope) -> list[tuple[int, int]]:
        """The dimensions along which a weight may be plan-sharded, each with its r: all readers have to want it so."""
        wants = [wanted for t, wanted in scope.readers if t is tensor]
        dims = [d for d in range(len(tensor.shape)) if wants and all(Shard(d) in wanted for wanted in wants)]
        self.plan_sharded[tensor] = [(d, self.variable(integer=True)) for d in dims]
        self.row({CONSTANT: 0.0, **{r: 1.0 for _, r in self.plan_sharded[tensor]}}, upper=1)
        for dim, r in self.plan_sharded[tensor]:
            for wanted in wants:
                self.row(total({r: 1.0}, scaled(wanted[Shard(dim)], -1)), upper=0)
        return self.plan_sharded[tensor]

    def add_fsdp_traffic(self, size: int, sharded: Expression, scope: _Scope) -> None:
        """FSDP's seconds beyond those of the computing that hides them; `sharded` of `size` parameters are FSDP's."""
        dtype = next(iter(scope.owner.parameters.values())).dtype
        seconds = fsdp_seconds(size, dtype, self.setting.world_size, self.setting.hardware)
        whole = scope.times * (seconds.forward + seconds.backward)
        # As a share of the whole traffic: the solver's tolerance of 1e-6 would be a microsecond otherwise.
        exposed = self.largest(total(scaled(sharded, 1 / size), scaled(scope.compute, -1 / whole)))
        self.costs[exposed] = whole

    # --- memory

    def add_memory(self) -> None:
        """peak >= whatever a rank holds at any moment, besides what is persistent."""
        choices = Choices(
            self.plan_size,
            self.setting.world_size,
            self.x,
            self.plan_sharded,
            {tensor: flow.sources for scope in self.scopes for tensor, flow in scope.flows.items()},
            {t: self.extra.get(t, self.boundary) for call in self.graph.layer_calls for t in call.inputs},
            self.reshards,
            [again[0] for _, again in self.chains],
            {op: variable for scope in self.scopes for op, variable in scope.repeats.items()},
            self.fixed.balanced is None,
        )
        peak = largest_moment(self, self.graph, choices)
        self.costs[peak] = TIE_BREAK_SECONDS
        self.memory = total(self.persistent, {peak: 1.0})

    # --- solving

    def solve(self, memory_limit: float, like: Assignment | None = None) -> Plan | None:
        """The fastest plan within `memory_limit` bytes, or None; of those with the partitions of `like`, if given."""
        held = (
            {x: float(p == like.partitions[op]) for op, choices in self.x.items() for p, x in choices} if like else {}
        )
        solution = self.minimize(np.array(self.costs), [(self.memory, memory_limit / GB)], held)
        return None if solution is None else self.read_plan(solution)

    def leanest(self) -> Plan | None:
        """The fastest plan of those that need the least memory, or None if no plan is legal. Its gap is of memory."""
        costs = np.zeros(len(self.costs))
        for variable, coefficient in self.memory.items():
            if variable != CONSTANT:
                costs[variable] += coefficient
        solution = self.minimize(costs)
        if solution is None:
            return None
        least = value_of(self.memory, solution.values) * GB
        plan = None
        with suppress(SolverError):  # what was found already is a plan
            plan = self.solve(least * (1 + LEANEST_TOLERANCE))
        plan = plan or self.read_plan(solution)
        return replace(plan, memory=least, gap=solution.gap)

    def read_plan(self, solution: Solution) -> Plan:
        values = solution.values
        partitions = {op: next(p for p, x in choices if values[x] > 0.5) for op, choices in self.x.items()}
        boundary = _chosen(self.boundary, values) if self.graph.kinds else REPLICATE
        inputs = {tensor: _chosen(choice, values) for tensor, choice in self.extra.items()}
        plan_sharded = {t: d for t, choices in self.plan_sharded.items() for d, r in choices if values[r] > 0.5}
        assignment = Assignment(self.plan_size, partitions, boundary, inputs, plan_sharded)
        seconds = self.fixed_seconds + float(np.dot(self.costs, values))
        return Plan(assignment, self.policies(values), seconds, value_of(self.memory, values) * GB, solution.gap)

    def policies(self, values: np.ndarray) -> tuple[Recompute, ...]:
        """Each layer's: of a kind, the first ones compute most again."""
        policies: dict[int, Recompute] = {}
        for number, (chain, again) in enumerate(self.chains):
            counts = [round(values[variable]) for variable in again]
            for place, call in enumerate(self.graph.calls_of(number)):
                policies[call.index] = chain[sum(place < count for count in counts)]
        return tuple(policies[index] for index in sorted(policies))


def _repeats(kind: LayerKind, chain: list[Recompute], again: tuple[int, ...]) -> dict[Op, int]:
    """For each op the variable that counts the layers which compute it again: those down the chain from where they do.

    A policy keeps what the one behind it in the chain does, and more.
    """
    names = names_of_keepable(kind.ops)
    first = {op: next(i for i, p in enumerate(chain[1:]) if p.computes_again(names.get(op))) for op in kind.ops}
    return {op: again[i] for op, i in first.items()}


def is_relayout(op: Op, layout: Layout) -> bool:
    """Whether an op gives the same elements, in the same order, in other dimensions, so that resharding costs the same
    before and after it. A transpose does not: a strided value has to be copied before it is sent."""
    if not layout.is_view(op) or spec_of(op).strides(op, False):
        return False
    return len(op.inputs) == len(op.outputs) == 1 and prod(op.inputs[0].shape) == prod(op.outputs[0].shape)


def _demands_of(chosen: dict[Placement, Expression], tensor: Tensor) -> dict[Demand, Expression]:
    """What layers want of a value that flows between them: a sharded placement is a partitioned consumer's."""
    return {(p, p != REPLICATE and tensor.requires_grad): e for p, e in chosen.items()}


def _chosen(choice: dict[Placement, Expression], values: np.ndarray) -> Placement:
    return next(p for p, expression in choice.items() if value_of(expression, values) > 0.5)
