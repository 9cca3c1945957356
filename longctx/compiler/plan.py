"""What a plan is for, what it decides, and how plan.json holds its decisions."""

from dataclasses import dataclass, field
from typing import Any

from longctx.compiler.hardware import Hardware
from longctx.compiler.ir import Graph, Op
from longctx.compiler.localize import Assignment
from longctx.compiler.ops import spec_of
from longctx.compiler.placement import Placement, parse_placement
from longctx.compiler.recompute import Recompute
from longctx.errors import DecisionsError

GB = 1e9  # bytes


@dataclass(frozen=True)
class Setting:
    """What a plan is for."""

    plan_size: int  # ranks of one copy of the plan
    world_size: int  # all ranks; a multiple of plan_size
    hardware: Hardware
    memory_limit: float  # bytes
    recompute_modules: tuple[str, ...] | None = None  # class names; None leaves it to the planner
    grad_accumulation_steps: int = 1

    @property
    def group_size(self) -> int:
        """The ranks of a plan that are neighbours in a node, if the plan is over several; else 1."""
        in_node = self.hardware.devices_per_node
        return in_node if self.plan_size > in_node and self.plan_size % in_node == 0 else 1


@dataclass(frozen=True)
class Plan:
    """What codegen writes."""

    assignment: Assignment
    recompute: tuple[Recompute, ...]  # of each layer
    seconds: float  # predicted, of a micro-batch
    memory: float  # predicted peak, bytes
    # How much faster than this another plan may be, at most: 0.05 for 5%, 0 if this is the fastest; None if unknown.
    gap: float | None = 0.0


@dataclass(frozen=True)
class Fixed:
    """Decisions taken beforehand: a forced plan, or what an alternative to the best one differs in."""

    partitions: dict[Op, str | None] = field(default_factory=dict)  # op -> the identifier it is split along
    not_partitions: dict[Op, str | None] = field(default_factory=dict)
    boundary: Placement | None = None
    policy: Recompute | None = None  # of every layer
    balanced: bool | None = None  # whether a row's tokens are split in balanced order; None if that is open


def describe(graph: Graph, plan: Plan) -> dict:
    """A plan's decisions as plan.json holds them; `fix` reads them back."""
    partitions = plan.assignment.partitions
    return {
        "boundary": str(plan.assignment.boundary),
        "balanced": plan.assignment.balanced,
        "ops": {name: [[spec_of(op).name, partitions[op].dim] for op in ops] for name, ops in graph.bodies()},
    }


def fix(graph: Graph, decisions: Any) -> Fixed:
    """The decisions of a plan.json, to be taken again for a graph of the same model, at whatever length.

    Raises:
        DecisionsError: they are none that compile wrote, or of another model.
    """
    partitions: dict[Op, str | None] = {}
    try:
        boundary = parse_placement(decisions["boundary"])
        balanced = decisions.get("balanced") or False  # None: an earlier version's
        if not isinstance(balanced, bool):
            raise TypeError("it is true or false")
        stored = {name: [(operator, dim) for operator, dim in ops] for name, ops in decisions["ops"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DecisionsError(
            "its decisions are not as compile writes them; give a plan.json as compile wrote it"
        ) from error
    for name, ops in graph.bodies():
        decided = stored.get(name, [])
        if [spec_of(op).name for op in ops] != [operator for operator, _ in decided]:
            raise DecisionsError(
                f"it is a plan of another model, or of an earlier version (its {name} has other operators); give a "
                "plan of this one"
            )
        for op, (_, dim) in zip(ops, decided, strict=True):
            partitions[op] = dim
    return Fixed(partitions, boundary=boundary, balanced=balanced)
