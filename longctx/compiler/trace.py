"""Traces a model to a dataflow graph: runs torch.export on meta tensors, then folds equal layers into one.

torch.export is used rather than torch.fx, Dynamo alone, or a tracer of our own, because it gives ATen's operators with
the module and the source line of each, needs neither weights nor a GPU, and follows whatever code transformers has. Its
graph is flat, with every layer written out, and full of devices and assertions. This file turns it into the graph that
a person would have drawn.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from io import StringIO
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.overrides import TorchFunctionMode

from longctx.compiler.annotation import output_shapes
from longctx.compiler.functional import Memory, Place, Variable, View, apply, overwrite, read, variables_of
from longctx.compiler.ir import DOCUMENT_STARTS, POSITION_IDS, FlatGraph, Graph, Op, Tensor, storage_of
from longctx.compiler.layers import fold_layers
from longctx.compiler.ops import REGISTERED_OPS, RegisteredOp, aten, spec_of
from longctx.compiler.ops.positions import Positions, UnknownValueError, known_values
from longctx.compiler.ops.writes import writes
from longctx.compiler.statements import statement_of
from longctx.errors import AnnotationError, ModelError, UserError, one_line

# --- export ----------------------------------------------------------------------------------------------------------


def trace(module: nn.Module, sample: dict[str, torch.Tensor]) -> Graph:
    """Traces module(**sample) to a Graph.

    Args:
        module: has the traced model as its attribute `model`; parameters on meta, buffers real.
        sample: inputs on meta, by the names of forward's parameters. No tensor may be passed twice.

    Raises:
        ModelError: torch.export can't trace the model, or its graph lacks something that the model does.
    """
    model = module.get_submodule("model")
    class_name = type(model).__name__
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to("meta")  # so that everything is on one device; the values of the buffers are in `buffers`
    with torch.library._scoped_library("annotated", "FRAGMENT") as library, _opaque_ops(library) as opaque:
        try:
            # Of each module that torch.export makes of its graph, Python is compiled only if it is called: none is.
            with _without_logs(), _use_lazy_graph_module(True), _AsTraced():
                exported = torch.export.export(module, (), kwargs=sample, strict=False)
        except UserError:
            raise
        except Exception as error:
            raise ModelError(
                f"torch.export can't trace {class_name}, so this program can't train it ({one_line(error)})"
            ) from error
    flat = _without_dead_ops(_rewritten(_flatten(module, exported, buffers, opaque), module))
    if not flat.output.requires_grad:
        raise ModelError(f"{class_name} writes its own backward pass, which tracing loses; choose another model")
    _check_learned_positions(flat, class_name)
    if any(tensor.name == DOCUMENT_STARTS for tensor in flat.inputs):
        _check_documents_apart(flat, class_name)
    return fold_layers(flat, class_name, *_decoder_layers(model, flat))


def sample_row(sequence_length: int, n_documents: int = 0) -> dict[str, torch.Tensor]:
    """What a model is traced with: [1, l] int64 each, on meta, each a tensor of its own.

    Where documents do not see each other there are positions too, and where each document begins, [n_documents]: so
    many documents of equal length stand for those of the rows, of which each has its own.
    """
    names = ["tokens", "labels"] + ([POSITION_IDS] if n_documents else [])
    sample = {name: torch.empty(1, sequence_length, dtype=torch.long, device="meta") for name in names}
    if n_documents:
        sample[DOCUMENT_STARTS] = torch.empty(n_documents, dtype=torch.long, device="meta")
    return sample


@contextmanager
def _without_logs() -> Iterator[None]:
    """Inside, nothing is logged or printed to stderr: torch.export writes pages about an error of one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled)


class _AsTraced(TorchFunctionMode):
    """Inside, what torch.export would lose or refuse is written as it traces it.

    - Tensors that are made of Python's numbers become operators that make them. It would keep each as a constant, and
      one that a model makes on meta has no values.
    - Whether a number that is drawn from [0, 1) is below 0 is known. Before transformers 5.23, models draw whether to
      leave out a layer also where their configuration says never, and torch.export can't branch on what was drawn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and len(args) == 1 and _are_numbers(args[0]):
            return _full(args[0], **kwargs)
        if func is torch.Tensor.__getitem__ and _is_one_of_a_list(args[1]):
            return args[0][tuple(slice(i[0], i[0] + 1 or None) if isinstance(i, list) else i for i in args[1])]
        if func in (torch.Tensor.__lt__, torch.Tensor.lt) and self._compares_a_drawn_number_with_zero(*args):
            return False
        result = func(*args, **kwargs)
        if func is torch.rand and result.dim() == 0:
            self.drawn.append(result)
        return result

    def _compares_a_drawn_number_with_zero(self, tensor: torch.Tensor, other: Any) -> bool:
        return type(other) in (int, float) and other == 0 and any(tensor is drawn for drawn in self.drawn)


def _is_one_of_a_list(index: Any) -> bool:
    """Whether an index is like [..., [-1]], which is [..., -1:]."""
    if not isinstance(index, tuple) or any(isinstance(i, torch.Tensor) for i in index):
        return False
    lists = [i for i in index if isinstance(i, list)]
    return len(lists) == 1 and len(lists[0]) == 1 and type(lists[0][0]) is int


def _are_numbers(data: Any) -> bool:
    """Whether it is a number, or a nested list of numbers."""
    if isinstance(data, (list, tuple)):
        return bool(data) and all(map(_are_numbers, data))
    return type(data) in (bool, int, float)


def _full(data: Any, **kwargs) -> torch.Tensor:
    """The tensor of numbers that torch.tensor makes."""
    if isinstance(data, (list, tuple)):
        return torch.stack([_full(item, **kwargs) for item in data])
    return torch.full((), data, **kwargs)


@dataclass
class _Opaque:
    """The call of a registered op that a torch operator stands in for."""

    op: RegisteredOp
    values: dict[str, Any]  # the arguments that are not tensors, by name
    tensors: tuple[str, ...]  # the names of the arguments that are tensors


@contextmanager
def _opaque_ops(library: torch.library.Library) -> Iterator[dict[str, _Opaque]]:
    """Inside, every registered function records itself as a single node, wherever a module refers to it.

    Yields a table, from the target of such a node to the call that the node stands for.
    """
    table: dict[str, _Opaque] = {}
    stand_ins = {op.fn: _stand_in(library, op, table) for op in REGISTERED_OPS.values()}
    replaced = []
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if type(value) is FunctionType and value in stand_ins:
                replaced.append((module.__dict__, name, value))
                module.__dict__[name] = stand_ins[value]
    try:
        yield table
    finally:
        for namespace, name, value in replaced:
            namespace[name] = value


def _stand_in(library: torch.library.Library, op: RegisteredOp, table: dict[str, _Opaque]) -> Callable:
    """What is called instead of a registered function. For each set of plain arguments it calls a torch operator."""
    signature = inspect.signature(op.fn)
    overloads: dict[str, Callable] = {}

    def stand_in(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        annotation = op.annotate(args, kwargs)
        shapes = [tuple(v.shape) if isinstance(v, torch.Tensor) else None for v in bound.arguments.values()]
        promised = output_shapes(annotation, shapes[: len(annotation.inputs)])
        given = {name: v for name, v in bound.arguments.items() if isinstance(v, torch.Tensor)}
        values = {name: v for name, v in bound.arguments.items() if name not in given}
        key = repr((values, tuple(given)))
        if key not in overloads:
            name = f"{op.fn.__name__}_{len(table)}"
            schema = ", ".join(f"Tensor {name}" for name in given)
            library.define(f"{name}({schema}) -> Tensor")

            def fake(*tensors):
                return op.fn(**dict(zip(given, tensors, strict=True)), **values)

            torch.library.register_fake(f"annotated::{name}", fake, lib=library)
            overloads[key] = getattr(torch.ops.annotated, name).default
            table[str(overloads[key])] = _Opaque(op, values, tuple(given))
        result = overloads[key](*given.values())
        if promised[0] is not None and tuple(result.shape) != promised[0]:
            raise AnnotationError(
                f"annotation {annotation.text!r} of {op.name} promises an output of shape {list(promised[0])}, "
                f"but it gives {list(result.shape)}; mend the annotation"
            )
        return result

    return stand_in


def _decoder_layers(model: nn.Module, flat: FlatGraph) -> tuple[str, dict[int, str]]:
    """The path of the decoder's list of layers, and each layer's class name.

    It is the list most of whose parameters the graph uses: a model may have larger layers that a loss of tokens never
    meets, as those of a vision tower.
    """
    used = {t.name: prod(t.shape) for op in flat.ops for t in op.inputs if t.kind == "parameter"}
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return "", {}

    def size(path: str) -> int:
        return sum(n for name, n in used.items() if name.startswith(f"{path}."))

    path, layers = max(lists, key=lambda item: size(item[0]))
    return path, {index: type(layer).__name__ for index, layer in enumerate(layers)}


# --- ATen nodes -> ops -----------------------------------------------------------------------------------------------


def _flatten(module: nn.Module, exported, buffers: dict[str, torch.Tensor], opaque: dict[str, _Opaque]) -> FlatGraph:
    """The exported graph as one list of ops.

    Nested graphs are inlined, devices replaced by DEVICE, parameters and constants found, ops that change nothing
    dropped, and ops that write into a tensor replaced (functional.py).
    """
    env: dict[fx.Node, Any] = {}
    inputs: list[Tensor] = []
    parameters: dict[str, Tensor] = {}
    constants: dict[Tensor, torch.Tensor] = {}
    canonical = {id(p): name for name, p in module.named_parameters()}  # a tied weight goes by its first name
    by_name = dict(module.named_parameters(remove_duplicate=False))
    values = {**exported.constants, **buffers}
    for spec, node in zip(
        exported.graph_signature.input_specs, exported.graph.find_nodes(op="placeholder"), strict=True
    ):
        value, path = node.meta["val"], spec.target
        storage = storage_of(value)
        if spec.kind.name == "PARAMETER":
            parameter = by_name[path]
            name = canonical[id(parameter)].removeprefix("model.")
            if name not in parameters:
                parameters[name] = _tensor(name, value, parameter.requires_grad, "parameter")
            env[node] = Variable(parameters[name], Memory(storage, state=name))
        elif spec.kind.name == "USER_INPUT":
            inputs.append(_tensor(node.name, value, False, "host" if node.name == DOCUMENT_STARTS else "input"))
            env[node] = Variable(inputs[-1], Memory(storage))
        else:
            constant = _tensor(path.rsplit(".", 1)[-1], value, False, "constant")
            constants[constant] = values[path]
            env[node] = Variable(constant, Memory(storage, state=path.removeprefix("model.")))
    ops: list[Op] = []
    (output,) = _convert(exported.graph_module, env, ops, opaque)
    return FlatGraph(tuple(inputs), read(output, Place("", None, "loss"), ops), parameters, constants, ops)


def _tensor(name: str, value: torch.Tensor, requires_grad: bool, kind: str) -> Tensor:
    return Tensor(name, tuple(value.shape), value.dtype, requires_grad, kind)


def _convert(module: fx.GraphModule, env: dict[fx.Node, Any], ops: list[Op], opaque: dict[str, _Opaque]) -> tuple:
    """Appends a graph's nodes to `ops`, and returns the variables of its outputs.

    Args:
        env: the variables of placeholders, to which those of the other nodes are added.
    """
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            env[node] = getattr(module, node.target)
            continue
        target = str(node.target)
        if node.op == "output":
            return tuple(fx.map_arg(node.args[0], env.__getitem__))
        if target == "wrap_with_set_grad_enabled":
            env[node] = _inline(fx.map_arg(node.args, env.__getitem__), ops, opaque)
        elif target == "<built-in function getitem>":
            env[node] = env[node.args[0]][node.args[1]]
        elif aten.is_check(target):
            continue
        elif target in opaque or aten.is_operator(target):
            env[node] = _append_op(target, node, env, ops, opaque)
        else:
            raise ModelError(f"it uses {target}, which the compiler does not know how to generate")
    raise AssertionError("a graph has an output")


def _check_static(node: fx.Node) -> None:
    """Raises a ModelError if what a node returns is no tensor, or one whose shape depends on the tokens."""
    values = node.meta["val"]
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if not isinstance(value, torch.Tensor) or not all(type(size) is int for size in value.shape):
            statement = statement_of(node.meta.get("stack_trace") or "")
            where = f" ({statement.where})" if statement else ""
            raise ModelError(
                f"its forward takes numbers or shapes from the tokens{where}, and a compiled plan has one shape for "
                "all rows; choose another model"
            )


def _inline(args: tuple, ops: list[Op], opaque: dict[str, _Opaque]) -> tuple:
    """Inlines a region with autograd switched on or off. Where it is off, detached inputs have the same effect."""
    grad_enabled, module, *given = args
    if not grad_enabled:
        given = [_detach(variable, ops) for variable in given]
    return _convert(module, dict(zip(module.graph.find_nodes(op="placeholder"), given, strict=True)), ops, opaque)


def _detach(variable: Variable, ops: list[Op]) -> Variable:
    tensor = read(variable, Place("", None, variable.value.name), ops)
    if not tensor.requires_grad:
        return variable
    op = apply(ops, aten.DETACH, (tensor,), {}, Place("", None, f"{tensor.name}_detached"), tensor)
    return Variable(op.outputs[0], variable.memory, View(variable, tensor, op, 0))


def _append_op(target: str, node: fx.Node, env: dict[fx.Node, Any], ops: list[Op], opaque: dict[str, _Opaque]) -> Any:
    """Appends what a node computes, and returns the variables of its outputs."""
    path = list(node.meta.get("nn_module_stack", {"": ("", "")}).values())[-1][0]
    path = path.removeprefix("model").removeprefix(".")
    place = Place(path, statement_of(node.meta.get("stack_trace") or ""), node.name)
    variables: list[Variable] = []

    def value_of(argument: fx.Node) -> Any:
        variables.append(env[argument])
        return read(env[argument], place, ops)

    args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(dict(node.kwargs), value_of)
    if target in opaque:
        target, args, kwargs = _registered_call(opaque[target], args)
    else:
        target, args, kwargs = aten.without_device(target, args, kwargs)
        if writes(target):
            overwrite(variables[0], target, args, kwargs, place, ops)
            return variables[0]
    _check_static(node)
    made = node.meta["val"]
    several = isinstance(made, (tuple, list))
    op = apply(ops, target, args, kwargs, place, made)
    outputs = variables_of(op, made if several else [made], variables)
    return tuple(outputs) if several else outputs[0]


def _registered_call(stands_for: _Opaque, args: tuple) -> tuple[str, tuple, dict[str, Any]]:
    """The call of a registered function that a torch operator stood in for while tracing."""
    parameters = inspect.signature(stands_for.op.fn).parameters
    kwargs = {name: v for name, v in stands_for.values.items() if v != parameters[name].default}
    if list(stands_for.tensors) != list(parameters)[: len(args)]:  # a tensor after a plain value is passed by name
        return stands_for.op.name, (), kwargs | dict(zip(stands_for.tensors, args, strict=True))
    return stands_for.op.name, args, kwargs


def _rewritten(flat: FlatGraph, module: nn.Module) -> FlatGraph:
    """The graph in which registered ops have taken the place of what they were found to be written out as."""
    options = getattr(module, "attention_options", {})
    for op in REGISTERED_OPS.values():
        if op.spec.rewrite is not None:
            flat = op.spec.rewrite(replace(flat, ops=_live_ops(flat)), options)
    return flat


def _live_ops(flat: FlatGraph) -> list[Op]:
    """The ops on which the graph's output depends."""
    used = {flat.output}
    live = []
    for op in reversed(flat.ops):
        if used & set(op.outputs):
            live.append(op)
            used.update(op.inputs)
    return live[::-1]


def _without_dead_ops(flat: FlatGraph) -> FlatGraph:
    """The graph without the ops and constants that its output does not depend on.

    Raises:
        ModelError: a constant that is left has no value.
    """
    live = _live_ops(flat)
    used = {tensor for op in live for tensor in op.inputs}
    constants = {t: value for t, value in flat.constants.items() if t in used}
    if lost := [t.name for t, value in constants.items() if value.is_meta]:
        raise ModelError(
            f"its forward makes a tensor of numbers ({lost[0]}), whose values tracing loses; train "
            "a model that keeps them in a buffer"
        )
    return replace(flat, ops=live, constants=constants)


def _check_learned_positions(flat: FlatGraph, class_name: str) -> None:
    """Raises a ModelError if the model has learned positions for fewer tokens than a row has.

    Running the model would fail there, but tracing reads no entry of the table of positions.
    """
    length = flat.inputs[0].shape[-1]
    for table, positions in _learned_positions(flat):
        if (missing := positions.max().item() + 1 - table.shape[0]) > 0:
            raise ModelError(
                f"{class_name} has learned positions ({table.name}) for {length - missing} tokens and "
                f"the rows have {length}; take rows of at most {length - missing}, or another model"
            )


def _check_documents_apart(flat: FlatGraph, class_name: str) -> None:
    """Raises a ModelError for a state that is carried along the row, or for positions that can't begin anew."""
    if crossing := next((op for op in flat.ops if spec_of(op).crosses_documents), None):
        raise ModelError(
            f"{crossing.module} of {class_name} has a recurrence or a convolution ({spec_of(crossing).name}), which "
            "goes from one document of a row into the next; choose another model"
        )
    if any(tensor.name == POSITION_IDS for op in flat.ops for tensor in op.inputs):
        return
    for table, _ in _learned_positions(flat):
        raise ModelError(
            f"{class_name} has learned positions ({table.name}) and its forward takes none, so that they can't begin "
            "anew with each document of a row; choose another model"
        )


def _learned_positions(flat: FlatGraph) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """The tables of which rows are looked up by positions, and the numbers of these rows."""
    makers = {t: op for op in flat.ops for t in op.outputs}
    positions_in = Positions(makers, known_values(flat))
    for op in flat.ops:
        if spec_of(op).lookup:
            table, indices = op.inputs[:2]
            with suppress(UnknownValueError):  # the others are tokens
                yield table, positions_in.whole(indices)
