"""Layers that are equal but for their parameters become one kind, so that planning has one layer of each.

What a layer's modules ran is told apart by the paths of the modules. Two layers are equal if numbering their values in
the order in which they are made gives the same operators, arguments, shapes and constants. Layers that a model runs
more than once, or that share weights, are not told apart: all operators are then the root's, and none is recomputed.
"""

import re
from dataclasses import replace
from typing import Any

from longctx.compiler.ir import FlatGraph, Graph, LayerCall, LayerKind, Op, Tensor, map_tensors


def fold_layers(flat: FlatGraph, class_name: str, layers_path: str, class_names: dict[int, str]) -> Graph:
    """Gathers the ops of each layer, and makes one kind of the layers that differ in nothing but their parameters."""
    layer_of = _layers_by_op(flat, layers_path)
    if not (_run_once(flat, layer_of) and _own_their_weights(flat, layer_of, layers_path)):
        layers_path, layer_of = "", {}
    by_layer: dict[int, list[Op]] = {}
    for op, index in layer_of.items():
        by_layer.setdefault(index, []).append(op)

    users: dict[Tensor, set[Op]] = {flat.output: set()}
    for op in flat.ops:
        for tensor in op.inputs:
            users.setdefault(tensor, set()).add(op)

    kinds: list[LayerKind] = []
    signatures: list[tuple] = []
    calls: dict[int, LayerCall] = {}
    carried: Tensor | None = None
    for index, ops in sorted(by_layer.items()):
        call, kind = _cut_layer(flat, users, ops, index, f"{layers_path}.{index}.", class_names[index], carried)
        signature = _signature(kind)
        if signature not in signatures:
            signatures.append(signature)
            kinds.append(kind)
        calls[index] = replace(call, kind=signatures.index(signature))
        carried = call.outputs[0]

    body: list[Op | LayerCall] = []
    for op in flat.ops:
        if op not in layer_of:
            body.append(op)
        elif op is by_layer[layer_of[op]][-1]:
            body.append(calls[layer_of[op]])
    in_layers = {t for kind in kinds for t in kind.constants}
    return Graph(
        class_name=class_name,
        inputs=flat.inputs,
        output=flat.output,
        parameters={n: t for n, t in flat.parameters.items() if _index_of(n, layers_path) not in by_layer},
        constants={t: v for t, v in flat.constants.items() if t not in in_layers},
        body=tuple(body),
        kinds=tuple(_numbered(kinds)),
        layers_path=layers_path,
    )


def _layers_by_op(flat: FlatGraph, layers_path: str) -> dict[Op, int]:
    """The layer of each op that a layer's modules ran."""
    indices = {op: _index_of(op.module, layers_path) for op in flat.ops}
    return {op: index for op, index in indices.items() if index is not None}


def _index_of(path: str, layers_path: str) -> int | None:
    """The layer that a module or a parameter is in, by its path; None outside the layers."""
    match = re.match(rf"{re.escape(layers_path)}\.(\d+)(\.|$)", path) if layers_path else None
    return int(match[1]) if match else None


def _run_once(flat: FlatGraph, layer_of: dict[Op, int]) -> bool:
    """Whether all that a layer computes is computed before anything outside it reads a result of it."""
    read: set[int] = set()  # the layers whose results were read
    makers: dict[Tensor, int] = {}
    for op in flat.ops:
        index = layer_of.get(op)
        if index in read:
            return False
        read |= {makers[t] for t in op.inputs if t in makers and makers[t] != index}
        makers |= {t: index for t in op.outputs if index is not None}
    return True


def _own_their_weights(flat: FlatGraph, layer_of: dict[Op, int], layers_path: str) -> bool:
    """Whether each layer uses weights of its own only, and nothing else uses those."""
    used = ((op, t) for op in flat.ops for t in op.inputs if t.kind == "parameter")
    return all(_index_of(t.name, layers_path) == layer_of.get(op) for op, t in used)


def _cut_layer(
    flat: FlatGraph,
    users: dict[Tensor, set[Op]],
    ops: list[Op],
    index: int,
    prefix: str,
    class_name: str,
    carried: Tensor | None,
) -> tuple[LayerCall, LayerKind]:
    """Cuts layer `index`, with the values that flow into and out of it, from the flat graph.

    Args:
        users: the ops that read each value, in the whole graph.
        carried: the output of the layer before it, which becomes the first input.
    """
    made = {t for op in ops for t in op.outputs}
    inside = set(ops)
    taken = list(dict.fromkeys(t for op in ops for t in op.inputs if t not in made))
    used = {t.name: t for t in taken if t.kind == "parameter"}
    # A weight that the loss does not depend on (of an attention to an encoder, say) is loaded and saved all the same.
    own = used | {name: t for name, t in flat.parameters.items() if name.startswith(prefix)}
    parameters = {name.removeprefix(prefix): t for name, t in own.items()}
    constants = {t: flat.constants[t] for t in taken if t.kind == "constant"}
    inputs = [t for t in taken if t.kind not in ("parameter", "constant")]
    inputs.sort(key=lambda t: (t is not carried, not t.requires_grad))  # stable: hidden states come first
    *others, last = (t for op in ops for t in op.outputs if t is flat.output or users.get(t, inside) - inside)
    outputs = (last, *others)  # hidden states are what a layer makes last; it may pass on keys and values too
    ops = [replace(op, module=op.module.removeprefix(prefix.removesuffix(".")).removeprefix(".")) for op in ops]
    call = LayerCall(index, -1, tuple(inputs), outputs)
    return call, LayerKind(class_name, class_name, tuple(inputs), outputs, parameters, constants, tuple(ops))


def _signature(kind: LayerKind) -> tuple:
    """A value that is equal for two layers if they compute the same from their inputs and parameters."""
    number: dict[Tensor, Any] = {t: ("parameter", name) for name, t in kind.parameters.items()}
    number |= {t: ("constant", tuple(v.flatten().tolist())) for t, v in kind.constants.items()}
    for tensor in (*kind.inputs, *(t for op in kind.ops for t in op.outputs)):
        number[tensor] = len(number)

    def local(tensor: Tensor) -> tuple:
        return number[tensor], tensor.shape, tensor.dtype, tensor.requires_grad

    ops = tuple(repr((op.target, map_tensors((op.args, op.kwargs), local), op.module)) for op in kind.ops)
    inputs, outputs = (tuple(local(t) for t in side) for side in (kind.inputs, kind.outputs))
    shapes = tuple((name, t.shape) for name, t in sorted(kind.parameters.items()))
    return kind.class_name, shapes, inputs, outputs, ops


def _numbered(kinds: list[LayerKind]) -> list[LayerKind]:
    """Gives kinds of the same class different names: Gemma2DecoderLayer0, Gemma2DecoderLayer1."""
    names = [kind.class_name for kind in kinds]
    seen: dict[str, int] = {}
    numbered = []
    for kind in kinds:
        number = seen[kind.class_name] = seen.get(kind.class_name, -1) + 1
        alone = names.count(kind.class_name) == 1
        numbered.append(kind if alone else replace(kind, class_name=f"{kind.class_name}{number}"))
    return numbered
