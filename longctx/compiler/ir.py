"""The dataflow graph that every stage of the compiler reads: tensors, operators, kinds of layers, and the model.

It keeps ATen's operators and names what a person knows: parameters by their Hugging Face names, values by the variables
of the model's own source. Equal layers are one `LayerKind`, however many of them there are, and that is why planning a
model of 80 layers takes no longer than planning one of 8.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch


class Device:
    """Stands, among an op's arguments, for the device that the generated code runs on."""

    def __repr__(self) -> str:
        return "DEVICE"


DEVICE = Device()


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value of the graph; two are the same only if they are the same object."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    kind: str = "activation"  # or 'input', 'parameter', 'constant'


@dataclass(frozen=True)
class Statement:
    """The source statement an op came from; `targets` are the variables it assigns, and ops share it by `place`."""

    place: tuple[str, int]
    targets: tuple[str, ...]
    callers: tuple["Statement", ...] = ()  # the statements that called it, outermost first


@dataclass(frozen=True, eq=False)
class Op:
    """One operator of the graph.

    `target` is an ATen overload ('aten.linear.default'), a registered function ('my_ops.attention'), or a reshard of
    longctx.runtime.collectives. What is known of it is in longctx/compiler/ops, and `ops.spec_of` finds it. `args` and
    `kwargs` hold Tensors, lists of them, and plain values, as the target takes them.
    """

    target: str
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str  # dotted path of the module that ran it, within its layer if it is in one
    statement: Statement | None
    note: str = ""  # of a reshard: the consumer that it is for

    @property
    def inputs(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))


@dataclass(frozen=True, eq=False)
class LayerKind:
    """The ops of every layer that is equal to this one; parameters are named within the layer.

    Layers of one class may be of several kinds (Gemma 2 has windowed and full attention in turn): `class_name`, which
    the generated class takes, then ends in a number, and `source_class` is the model's own.
    """

    class_name: str
    source_class: str
    inputs: tuple[Tensor, ...]  # the previous layer's output first
    outputs: tuple[Tensor, ...]
    parameters: dict[str, Tensor]
    constants: dict[Tensor, torch.Tensor]
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """Layer `index` of kind `kinds[kind]`, with the values it takes and gives in the model's graph."""

    index: int
    kind: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    module: str = ""


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: `body` runs in order. Parameters of layers are in their kinds, all others here."""

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

    def all_parameters(self) -> dict[str, Tensor]:
        """Every parameter by its Hugging Face name."""
        named = dict(self.parameters)
        for call in self.layer_calls:
            for name, tensor in self.kinds[call.kind].parameters.items():
                named[f"{self.layers_path}.{call.index}.{name}"] = tensor
        return named

    def named(self, values: dict[Tensor, Any]) -> dict[str, Any]:
        """What is known of some parameters, by Hugging Face name; a layer kind's are those of all its layers."""
        return {name: values[tensor] for name, tensor in self.all_parameters().items() if tensor in values}

    def bodies(self) -> list[tuple[str, list[Op]]]:
        """The ops of the root, then those of each layer kind, with the class's name; calls of layers left out."""
        root = [item for item in self.body if isinstance(item, Op)]
        return [(self.class_name, root), *((kind.class_name, list(kind.ops)) for kind in self.kinds)]

    def all_ops(self) -> list[Op]:
        """Every op once, however many layers run it."""
        return [op for _, ops in self.bodies() for op in ops]


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


def nbytes(tensor: Tensor) -> int:
    """A whole tensor's bytes."""
    return prod(tensor.shape) * tensor.dtype.itemsize
