"""The collectives that take a value from one placement to another, as operators of a rank's graph.

`find_reshard` of placement.py chooses one; longctx/runtime/collectives.py runs it. Each entry says which collective
runs forward and which one its gradient takes, what a comment in generated code tells of it, and what memory it needs.
"""

from math import prod

from longctx.compiler.ir import Op
from longctx.compiler.ops.python import by_name
from longctx.compiler.ops.spec import (
    OpSpec,
    Resharding,
    Shares,
    View,
    draws_nothing,
    keeps_strides,
    never_strided,
    not_partitioned,
    saves_nothing,
)

COLLECTIVES = "longctx.runtime.collectives"


def _needs_copy(op: Op, dim: str) -> bool:
    """Whether the ranks' parts along a dimension are no slices of memory: some dimension before it is longer than 1, or
    a part is two blocks."""
    shape = op.inputs[0].shape
    if op.kwargs.get("balanced" if dim == "dim" else f"balanced_{dim}"):
        return True
    return prod(shape[: op.kwargs[dim] % len(shape)]) > 1


def _copies_both(op: Op, phase: str) -> Shares:
    """all_to_all cuts its input into the ranks' parts and joins the parts that it receives."""
    sides = (("split", op.inputs[0], _copies(op)), ("gather", op.outputs[0], 1))
    return {tensor: float(copies) for dim, tensor, copies in sides if copies > 1 or _needs_copy(op, dim)}


def _copies(op: Op) -> int:
    """How many neighbours get the same part: it is copied before it is sent."""
    return op.kwargs.get("copies", 1)


def _copies_all(op: Op, phase: str) -> Shares:
    """reorder sorts its blocks before they are sent and behind it."""
    return {op.inputs[0]: 1.0, op.outputs[0]: 1.0}


def _copies_input(*phases: str):
    """The whole tensor, which is the input, is cut into the ranks' parts."""

    def workspace(op: Op, phase: str) -> Shares:
        copies = _copies(op)
        needed = copies > 1 or (phase in phases and _needs_copy(op, "dim"))
        return {op.inputs[0]: float(copies)} if needed else {}

    return workspace


def _copies_output(*phases: str):
    """The whole tensor, which is the output, is joined from the ranks' parts."""
    return lambda op, phase: {op.outputs[0]: 1.0} if phase in phases and _needs_copy(op, "dim") else {}


def _reshard(name: str, forward: str | None, backward: str | None, comment: str, **rest) -> OpSpec:
    shared = {"saves": saves_nothing, "strides": never_strided, "draws_random": draws_nothing}
    return OpSpec(
        name, not_partitioned, by_name, resharding=Resharding(forward, backward, comment), **{**shared, **rest}
    )


def _no_traffic(name: str) -> OpSpec:
    """Of a weight: a view, for which nothing is sent."""
    return OpSpec(
        name,
        not_partitioned,
        by_name,
        saves=saves_nothing,
        view=View.ALWAYS,
        strides=keeps_strides,
        draws_random=draws_nothing,
    )


RESHARDS: dict[str, OpSpec] = {
    f"{COLLECTIVES}.{spec.name}": spec
    for spec in (
        _reshard("all_to_all", "all_to_all", "all_to_all", "all-to-all of {before}", workspace=_copies_both),
        _reshard("reorder", "all_to_all", "all_to_all", "other order of {before}", workspace=_copies_all),
        _reshard("all_gather", "all_gather", None, "all-gather to {after}", workspace=_copies_output("forward")),
        _reshard(
            "all_gather_reduce",
            "all_gather",
            "reduce_scatter",
            "all-gather to {after}, the gradient is reduce-scattered",
            workspace=_copies_output("forward", "backward"),
        ),
        _reshard(
            "take_slice",
            None,
            "all_gather",
            "own slice, nothing moves{gradient}",
            workspace=_copies_input("backward"),
        ),
        _reshard(
            "replicate",
            None,
            "all_reduce",
            "nothing moves, the gradient is all-reduced, {before}",
            view=View.ALWAYS,
            strides=keeps_strides,
        ),
        _reshard(
            "all_reduce",
            "all_reduce",
            None,
            "all-reduce of {before}",
            shares_gradient=lambda tensor, output: True,
        ),
        _reshard("all_reduce_both", "all_reduce", "all_reduce", "all-reduce of {before}, and of the gradient"),
        _reshard(
            "reduce_scatter",
            "reduce_scatter",
            "all_gather",
            "reduce-scatter of {before}, the gradient is all-gathered",
            workspace=_copies_input("forward", "backward"),
        ),
        _no_traffic("scale_gradient"),
        _no_traffic("own_slice"),
    )
}


def target_of_reshard(function: str) -> str:
    """The `target` of the ops that call a function of longctx.runtime.collectives."""
    return f"{COLLECTIVES}.{function}"
