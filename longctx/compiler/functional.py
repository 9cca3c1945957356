"""Makes the traced operators a graph of values: what writes into a tensor becomes an operator that makes a new one.

In a traced program `x[..., 0] = v` writes into a view of x, and nobody reads what the operator returns; whoever reads x
or another view of it afterwards reads v. In a graph of values such an operator would be dead, and under a plan x may be
a part of a tensor, a copy that was sent, or computed twice. So a traced tensor is a `Variable` here: after a write it
has another value, and so have, once they are read again, all variables in the same memory.

torch.export could do this too (run_decompositions), but it writes every view anew, loses the regions without autograd,
and takes longer than tracing. Which variables share memory is known exactly: by the storages of the traced tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from longctx.compiler.ir import Op, Statement, Tensor, map_tensors, storage_of
from longctx.compiler.ops import aten, spec_of
from longctx.compiler.ops.writes import on_meta, without_write
from longctx.errors import ModelError


@dataclass(eq=False)
class Memory:
    """The memory that a variable and its views share. `version` counts the writes into it."""

    storage: int | None  # PyTorch's own identity of it; None if no traced tensor is in it
    version: int = 0
    state: str = ""  # the name of the buffer or weight that is kept in it from one forward pass to the next


@dataclass(eq=False)
class Variable:
    """A traced tensor. `value` is what it held at this `version` of its memory."""

    value: Tensor
    memory: Memory
    view: "View | None" = None  # what it is a view of, unless it is the whole of its memory
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.version = self.memory.version


@dataclass(frozen=True, eq=False)
class View:
    """How a variable was made of another one in the same memory: output `index` of an op that read `value` of it."""

    source: Variable
    value: Tensor
    op: Op
    index: int


@dataclass(frozen=True)
class Place:
    """Where in the model an op is run, and what the first value that it makes is called."""

    module: str
    statement: Statement | None
    name: str


def apply(ops: list[Op], target: str, args: tuple, kwargs: dict[str, Any], place: Place, made: Any = None) -> Op:
    """Appends an op, unless it would return its input unchanged, bit for bit: that is then the output of the result.

    Args:
        made: tensors like those that it returns; without them, they are found by running it on meta tensors.
    """
    made = on_meta(target, args, kwargs) if made is None else made
    made = made if isinstance(made, (tuple, list)) else [made]
    op = Op(target, args, kwargs, (), place.module, place.statement)
    if _is_like(args[:1], made) and spec_of(op).is_identity(args):
        return replace(op, outputs=args[:1])
    requires_grad = any(t.requires_grad for t in op.inputs) and not spec_of(op).cuts_gradient
    names = [place.name, *(f"{place.name}_{i}" for i in range(1, len(made)))]
    outputs = tuple(
        Tensor(name, tuple(like.shape), like.dtype, requires_grad and like.dtype.is_floating_point)
        for name, like in zip(names, made, strict=True)
    )
    ops.append(replace(op, outputs=outputs))
    return ops[-1]


def _is_like(given: Sequence[Any], made: Sequence[Any]) -> bool:
    """Whether one tensor was given, and one of its dtype and shape was made."""
    if len(given) != 1 or len(made) != 1 or not isinstance(given[0], Tensor):
        return False
    return given[0].dtype == made[0].dtype and given[0].shape == tuple(made[0].shape)


def variables_of(op: Op, made: Iterable[torch.Tensor], read: Iterable[Variable]) -> list[Variable]:
    """The variables for the outputs of an op, given the traced tensors that it made and the variables that it read."""
    variables = []
    for index, (value, tensor) in enumerate(zip(op.outputs, made, strict=True)):
        storage = storage_of(tensor)
        source = next((variable for variable in read if variable.memory.storage == storage), None)
        if source is None:
            variables.append(Variable(value, Memory(storage)))
        elif source.value is value:
            variables.append(source)
        else:
            variables.append(Variable(value, source.memory, View(source, source.value, op, index)))
    return variables


def read(variable: Variable, place: Place, ops: list[Op]) -> Tensor:
    """A variable's present value. A view is taken anew if its memory has been written to since."""
    if variable.version != variable.memory.version and variable.view:
        view = variable.view
        source = read(view.source, place, ops)
        args, kwargs = map_tensors((view.op.args, view.op.kwargs), lambda t: source if t is view.value else t)
        again = apply(ops, view.op.target, args, kwargs, replace(place, name=variable.value.name), view.op.outputs)
        variable.value, variable.version = again.outputs[view.index], variable.memory.version
    return variable.value


def overwrite(
    variable: Variable, target: str, args: tuple, kwargs: dict[str, Any], place: Place, ops: list[Op]
) -> None:
    """Does what an operator does that writes into its first argument, which is the variable's present value.

    Raises:
        ModelError: there is no such operator that makes a new tensor instead, or what is written outlasts the forward
            pass.
    """
    old = variable.value
    if variable.memory.state:
        raise ModelError(
            f"it writes to {variable.memory.state} in its forward, and this program keeps nothing from one step to the "
            "next but what is trained; choose a model that does not"
        )
    if (call := without_write(target, args, kwargs)) is None:
        raise _write_error(target, place, "this program knows of no operator that makes a new tensor instead")
    value = apply(ops, *call, place).outputs[0]
    value = apply(ops, aten.CAST, (value, old.dtype), {}, place).outputs[0]
    value = apply(ops, aten.EXPAND, (value, list(old.shape)), {}, place).outputs[0]
    version = variable.memory.version + 1
    variable.value, variable.version = value, version
    while view := variable.view:
        whole = read(view.source, place, ops)
        rule = spec_of(view.op).written_back
        back = rule(view.op, view.index, whole, value) if rule else None
        if back is None or spec_of(view.op).cuts_gradient and whole.requires_grad:
            raise _write_error(target, place, f"it writes into what {spec_of(view.op).name} returns")
        value = apply(ops, *back, {}, replace(place, name=whole.name)).outputs[0]
        variable = view.source
        variable.value, variable.version = value, version
    variable.memory.version = version


def _write_error(target: str, place: Place, reason: str) -> ModelError:
    where = f" in {place.module}" if place.module else ""
    if place.statement:
        where += f" ({place.statement.where})"
    return ModelError(f"it writes into a tensor{where} with {target}, and {reason}; choose another model")
