"""The dataflow graph that every stage of the compiler reads: tensors, operators, kinds of layers, and the model.

Operators are ATen's; names are those that a person knows: parameters have their Hugging Face names, and values remember
the variables of the model's own source. Equal layers are one `LayerKind`, however many of them there are, which is why
planning a model of 80 layers takes no longer than planning one of 8.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

# Inputs of a model whose documents do not see each other: positions, which begin anew with each document, and where the
# documents of the row begin. The second is a tuple of ints that stays on the host, where kernels are told of lengths.
POSITION_IDS, DOCUMENT_STARTS = "position_ids", "document_starts"


class Device:
    """Stands for the device that the generated code runs on, among the arguments of an op."""

    def __repr__(self) -> str:
        return "DEVICE"


DEVICE = Device()


@dataclass(frozen=True)
class OwnStarts:
    """Stands, among the arguments of an op, for where a rank's blocks of a dimension of this length begin."""

    length: int
    balanced: bool = False
    across: int = 1  # so many neighbours have the same blocks


@dataclass(frozen=True)
class OwnRing(OwnStarts):
    """Stands for the ranks that have a dimension of this length in parts, which they pass round."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value of the graph. Two are equal only if they are the same object."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    kind: str = "activation"  # or 'input', 'host' (an input that no device has), 'parameter', 'constant'


@dataclass(frozen=True)
class Statement:
    """The statement of the model's source that an op came from. Statements with the same `place` are the same one."""

    place: tuple[str, int]  # file and line
    targets: tuple[str, ...]  # the variables that it assigns
    callers: tuple["Statement", ...] = ()  # the statements that called it, outermost first

    @property
    def where(self) -> str:
        """modeling_llama.py, line 12"""
        file, line = self.place
        return f"{Path(file).name}, line {line}"


@dataclass(frozen=True, eq=False)
class Op:
    """One operator of the graph.

    `target` is an ATen overload ('aten.linear.default'), a registered function ('my_ops.attention'), or a reshard of
    longctx.runtime.collectives. Its rules are in longctx/compiler/ops, where `spec_of` finds them. `args` and `kwargs`
    hold Tensors, lists of Tensors and plain values, as the target takes them.
    """

    target: str
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str  # dotted path of the module that ran it; within its layer, for an op of a layer
    statement: Statement | None
    note: str = ""  # why a reshard is needed, in words; empty for every other op
    draws_own: bool = False  # in the graph of one rank: whether it draws random numbers for a part that is its own

    @cached_property
    def inputs(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))


@dataclass(frozen=True, eq=False)
class LayerKind:
    """All layers that compute the same function; they differ only in the values of their parameters.

    Parameters are named within the layer. `class_name` is the name of the generated class, and `source_class` that of
    the model's own. The two differ where layers of one class are of several kinds, as in Gemma 2, whose layers have
    windowed and full attention in turn: `class_name` then ends in a number.
    """

    class_name: str
    source_class: str
    inputs: tuple[Tensor, ...]  # the previous layer's output first
    outputs: tuple[Tensor, ...]  # what the next layer takes first
    parameters: dict[str, Tensor]
    constants: dict[Tensor, torch.Tensor]
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A call of layer `index`, with the values that it takes and returns in the model's graph."""

    index: int
    kind: int  # the layer's place in Graph.kinds
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    module: str = ""


@dataclass(frozen=True, eq=False)
class Graph:
    """A model. `body` is run in order.

    `parameters` and `constants` are those of the root; those of the layers are in `kinds`.
    """

    class_name: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    parameters: dict[str, Tensor]
    constants: dict[Tensor, torch.Tensor]
    body: tuple[Op | LayerCall, ...]
    kinds: tuple[LayerKind, ...]
    layers_path: str  # 'model.layers'

    @property
    def layer_calls(self) -> list[LayerCall]:
        return [item for item in self.body if isinstance(item, LayerCall)]

    def calls_of(self, kind: int) -> list[LayerCall]:
        """The calls of the layers of one kind, in order."""
        return [call for call in self.layer_calls if call.kind == kind]

    def placed_alike(self) -> dict[Tensor, Tensor]:
        """Each value that layers take besides the carried one, with the value that has to be placed as it is.

        Layers of one kind are one function, so what they take in the same place has one placement.
        """
        leaders: dict[Tensor, Tensor] = {}
        taken: dict[tuple[int, int], Tensor] = {}

        def leader(tensor: Tensor) -> Tensor:
            while leaders.setdefault(tensor, tensor) is not tensor:
                tensor = leaders[tensor]
            return tensor

        for call in self.layer_calls:
            for place, tensor in enumerate(call.inputs[1:]):
                leaders[leader(tensor)] = leader(taken.setdefault((call.kind, place), tensor))
        return {tensor: leader(tensor) for tensor in leaders}

    def all_parameters(self) -> dict[str, Tensor]:
        """Every parameter by its Hugging Face name."""
        named = dict(self.parameters)
        for call in self.layer_calls:
            for name, tensor in self.kinds[call.kind].parameters.items():
                named[f"{self.layers_path}.{call.index}.{name}"] = tensor
        return named

    def named(self, values: dict[Tensor, Any]) -> dict[str, Any]:
        """The values by Hugging Face name; what is known of a layer kind's parameter holds for each of its layers."""
        return {name: values[tensor] for name, tensor in self.all_parameters().items() if tensor in values}

    def bodies(self) -> list[tuple[str, list[Op]]]:
        """The class name and the ops of the root, without its calls of layers, then those of each layer kind."""
        root = [item for item in self.body if isinstance(item, Op)]
        return [(self.class_name, root), *((kind.class_name, list(kind.ops)) for kind in self.kinds)]

    def all_ops(self) -> list[Op]:
        """Every op of the root and of the layer kinds; an op of a kind is there once, however many layers run it."""
        return [op for _, ops in self.bodies() for op in ops]


@dataclass(frozen=True, eq=False)
class FlatGraph:
    """The traced graph before its layers are folded. An op's `module` is the full path of the module here."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    parameters: dict[str, Tensor]
    constants: dict[Tensor, torch.Tensor]
    ops: list[Op]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The Tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every Tensor in it replaced by change(tensor)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def storage_of(tensor: torch.Tensor) -> int:
    """The memory that a tensor of PyTorch's lies in, or would lie in; the same for views of one another."""
    return tensor.untyped_storage()._cdata


def nbytes(tensor: Tensor) -> int:
    """The size of a tensor in bytes."""
    return prod(tensor.shape) * tensor.dtype.itemsize
