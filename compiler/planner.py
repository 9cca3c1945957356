"""A partition for every op, a recompute policy for every layer."""

from dataclasses import dataclass

from compiler.trace import Graph


@dataclass(frozen=True)
class Plan:
    """What codegen writes.

    `recompute[i]` is layer i's policy: 'layer' keeps its input only and runs its forward again in the backward pass,
    'none' keeps all that its backward needs.
    """

    plan_ngpus: int
    recompute: tuple[str, ...]


def make_plan(graph: Graph, plan_ngpus: int) -> Plan:
    """The plan for `plan_ngpus` ranks: each computes every op whole, and recomputes every layer."""
    return Plan(plan_ngpus, tuple("layer" for _ in graph.layer_calls))
