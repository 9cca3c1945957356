"""PyTorch's own operators: one entry each, with everything that the compiler knows of it.

To add one: an `OpSpec` in the table below, with a rule of partitions.py for how it may be partitioned. What is left
out takes the conservative default (written as a call of the ATen overload, everything saved, memory of its own). An
operator that has no entry is computed whole by every rank, which is always right, and compile names it.

Sources: `saves` is what torch's derivatives.yaml keeps of each operator, and tests compare it with autograd's own
hooks; everything else is proved against PyTorch's operators, run rank by rank (tests/test_operators.py).
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch

from longctx.compiler.ir import DEVICE, Op, Tensor
from longctx.compiler.ops import partitions as p
from longctx.compiler.ops import python as py
from longctx.compiler.ops import writes as w
from longctx.compiler.ops.spec import (
    FLOAT32_BYTES,
    Flops,
    OpSpec,
    Shares,
    View,
    always,
    always_strided,
    keeps_strides,
    never_strided,
    saves_inputs,
    saves_nothing,
)

# --- rules of single operators ---------------------------------------------------------------------------------------


def saves_input(op: Op) -> list[Tensor]:
    return op.inputs[:1]


def saves_output(op: Op) -> list[Tensor]:
    return list(op.outputs)


def saves_factors(op: Op, first: int = 0) -> list[Tensor]:
    """Of a product the gradient of each factor is made of the other one. `first`: the place of the left factor."""
    factors = op.inputs[first : first + 2]
    return [t for t, other in zip(factors, reversed(factors), strict=True) if len(factors) > 1 and other.requires_grad]


def saves_quotient(op: Op) -> list[Tensor]:
    """The divisor; and the dividend, if the divisor wants a gradient."""
    return op.inputs if op.inputs[-1].requires_grad else op.inputs[1:]


def saves_indices(op: Op) -> list[Tensor]:
    """Whatever is no number with a gradient: indices, a condition."""
    return [t for t in op.inputs if not t.dtype.is_floating_point]


def saves_indices_of_top(op: Op) -> list[Tensor]:
    """Where the largest values came from, the second output."""
    return list(op.outputs[1:])


def product_flops(op: Op, first: int = 0) -> Flops:
    """Two FLOPs for each output and each term of its sum; a product has two gradients, each as large as itself."""
    forward = 2.0 * prod(op.outputs[0].shape) * op.inputs[first].shape[-1]
    return Flops(forward, 2 * forward)


def statistics_of_rows(op: Op) -> Shares:
    """The mean and the inverse deviation of each row that layer_norm normalizes, float32."""
    x = op.inputs[0]
    return {x: 2 * FLOAT32_BYTES / (x.dtype.itemsize * x.shape[-1])}


def dropped_elements(op: Op) -> Shares:
    """dropout's mask, a byte an element."""
    return {op.inputs[0]: 1 / op.inputs[0].dtype.itemsize}


def temporaries(n_tensors: float):
    """Unnamed values in the formula of a gradient, as many bytes as so many inputs."""

    def workspace(op: Op, phase: str) -> Shares:
        return {op.inputs[0]: n_tensors} if phase == "backward" else {}

    return workspace


def rows_looked_up(op: Op, phase: str) -> Shares:
    """An embedding reads the rows that it writes, and not the whole table; its gradient is a whole table of zeros."""
    table, rows = op.inputs[0], op.outputs[0]
    return {rows: 2.0} if phase == "forward" else {table: 1.0, rows: 3.0}


def padded_gradient(op: Op, phase: str) -> Shares:
    """The gradient of a part is zeros of the whole's shape, into which the part's is copied."""
    return {} if phase == "forward" else {op.inputs[0]: 1.0, op.outputs[0]: 2.0}


def same_shape(tensor: Tensor, output: Tensor) -> bool:
    return tensor.shape == output.shape


def multiplies_by_one(args: tuple) -> bool:
    return len(args) == 2 and args[1] == 1 and not isinstance(args[1], Tensor)


def adds_zero(args: tuple) -> bool:
    return len(args) == 2 and args[1] == 0 and not isinstance(args[1], Tensor)


def drops_nothing(args: tuple) -> bool:
    return len(args) > 2 and (args[1] == 0.0 or not args[2])


# --- the table -------------------------------------------------------------------------------------------------------
# Entries of one family first name what they share: `view(...)` is an OpSpec with what all views have in common.


def view(name: str, partition, python=py.overload, **rest) -> OpSpec:
    """The same memory under another shape; its gradient is the output's, under the old shape."""
    shared = {"saves": saves_nothing, "view": View.ALWAYS, "strides": keeps_strides, "shares_gradient": always}
    shared |= {"written_back": w.reshaped_back}
    return OpSpec(name, partition, python, **{**shared, **rest})


def part(name: str, partition, python=py.overload, **rest) -> OpSpec:
    """A view of a part, whose gradient is padded with zeros, in memory of its own."""
    shared = {"saves": saves_nothing, "view": View.ALWAYS, "strides": always_strided}
    return OpSpec(name, partition, python, **{**shared, **rest})


def relayout(name: str, partition, python=py.overload, **rest) -> OpSpec:
    """The same elements in the order of their dimensions: a copy only where they are not in that order already."""
    shared = {"saves": saves_nothing, "view": View.IF_CONTIGUOUS, "strides": never_strided, "shares_gradient": always}
    shared |= {"written_back": w.reshaped_back}
    return OpSpec(name, partition, python, **{**shared, **rest})


def pointwise(name: str, python=py.overload, **rest) -> OpSpec:
    return OpSpec(name, p.elementwise, python, **rest)


def product(name: str, partition, python=py.overload, **rest) -> OpSpec:
    shared = {"flops": product_flops, "saves": saves_factors, "strides": never_strided, "can_be_kept": always}
    return OpSpec(name, partition, python, **{**shared, **rest})


def constant(name: str, python=py.overload) -> OpSpec:
    """A tensor that is made of no other."""
    return OpSpec(name, p.replicated, python)


ATEN: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        # Arithmetic.
        pointwise("add", py.infix("+", py.SUM), saves=saves_nothing, shares_gradient=same_shape, is_identity=adds_zero),
        pointwise("sub", py.infix("-", py.SUM), saves=saves_nothing),
        pointwise("mul", py.infix("*", py.PRODUCT), saves=saves_factors, is_identity=multiplies_by_one),
        pointwise("div", py.infix("/", py.PRODUCT), saves=saves_quotient),
        pointwise("rsub"),
        pointwise("neg", py.negative, saves=saves_nothing),
        pointwise("pow", py.method("pow"), saves=saves_input, workspace=temporaries(2)),
        pointwise("square", py.method("square"), saves=saves_input, workspace=temporaries(2)),
        pointwise("sqrt", py.method("sqrt"), saves=saves_output, workspace=temporaries(1)),
        pointwise("rsqrt", py.method("rsqrt"), saves=saves_output, workspace=temporaries(2)),
        pointwise("abs", py.method("abs"), saves=saves_input, workspace=temporaries(1)),
        pointwise("exp", py.method("exp"), saves=saves_output),
        pointwise("cos", py.method("cos"), saves=saves_input),
        pointwise("sin", py.method("sin"), saves=saves_input),
        pointwise("reciprocal"),
        pointwise("log"),
        pointwise("maximum"),
        pointwise("minimum"),
        pointwise("clamp", py.method("clamp"), saves=saves_input),
        pointwise("clamp_min", py.method("clamp_min")),
        # Activations.
        pointwise("silu", py.function("F.silu"), saves=saves_input),
        pointwise("gelu", py.function("F.gelu"), saves=saves_input),
        pointwise("leaky_relu", py.function("F.leaky_relu"), saves=saves_input),
        pointwise("softplus", py.function("F.softplus"), saves=saves_input),
        pointwise("relu", py.function("F.relu"), saves=saves_output),
        pointwise("tanh", py.method("tanh"), saves=saves_output),
        pointwise("sigmoid", py.function("torch.sigmoid"), saves=saves_output),
        pointwise("erf"),
        pointwise(
            "dropout",
            py.function("F.dropout", n_args=2),  # tracing has dropped those that are off
            saves=saves_indices,
            saves_besides=dropped_elements,
            is_identity=drops_nothing,
        ),
        # Comparisons and choices.
        *(pointwise(name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "bitwise_and", "bitwise_or")),
        pointwise("logical_not", py.method("logical_not")),
        pointwise("bitwise_not", py.method("bitwise_not")),
        pointwise("where", py.function("torch.where"), saves=saves_indices),
        pointwise("masked_fill", py.method("masked_fill"), saves=saves_nothing),
        # Casts and copies.
        pointwise("to", py.cast, saves=saves_nothing, is_identity=always, keeps_name=True),
        OpSpec("type_as", p.like_first, py.method("type_as"), saves=saves_nothing, is_identity=always, keeps_name=True),
        pointwise("clone", py.method("clone"), saves=saves_nothing, strides=never_strided),
        pointwise("lift_fresh_copy", saves=saves_nothing, is_identity=always),
        relayout("contiguous", p.elementwise, py.method("contiguous"), keeps_name=True),
        pointwise("ones_like", py.function("torch.ones_like"), saves=saves_nothing),
        pointwise("zeros_like", py.function("torch.zeros_like"), saves=saves_nothing),
        pointwise("full_like", py.function("torch.full_like"), saves=saves_nothing),
        # Views.
        view("view", p.reshaped, py.method("view", spread=True), sizes=1, is_identity=always),
        view("unsqueeze", p.reshaped, py.method("unsqueeze")),
        view("squeeze", p.squeeze, py.method("squeeze")),
        view("unflatten", p.unflatten),
        view("transpose", p.transpose, py.method("transpose"), strides=always_strided, written_back=w.transposed_back),
        view("t", p.transpose, py.method("t"), strides=always_strided, written_back=w.transposed_back),
        view(
            "permute",
            p.permute,
            py.method("permute", spread=True),
            strides=always_strided,
            written_back=w.permuted_back,
        ),
        view("alias", p.elementwise, is_identity=always),
        part(
            "detach",
            p.elementwise,
            py.method("detach"),
            strides=keeps_strides,
            cuts_gradient=True,
            written_back=w.reshaped_back,
        ),
        part(
            "expand",
            p.elementwise,
            py.method("expand", spread=True),
            sizes=1,
            is_identity=always,
            written_back=w.into_all,
        ),
        part(
            "slice",
            p.resized_along(1),
            py.subscript_range,
            traffic=padded_gradient,
            is_identity=always,
            written_back=w.into_range,
        ),
        part(
            "select", p.resized_along(1, removed=True), py.subscript, traffic=padded_gradient, written_back=w.into_place
        ),
        part("narrow", p.resized_along(1), traffic=padded_gradient, written_back=w.into_narrow),
        part("chunk", p.resized_along(2), py.method("chunk", "", "dim"), written_back=w.into_piece),
        part("split", p.resized_along(2), py.method("split", "", "dim"), written_back=w.into_piece),
        part("split_with_sizes", p.resized_along(2), py.method("split", "", "dim"), written_back=w.into_piece),
        part("unbind", p.resized_along(1, removed=True), written_back=w.into_unbound),
        relayout("reshape", p.reshaped, py.method("reshape", spread=True), sizes=1, is_identity=always),
        relayout("flatten", p.reshaped, py.method("flatten")),
        # Joining and repeating.
        OpSpec(
            "cat",
            p.resized_along(1),
            py.function("torch.cat", "", "dim"),
            saves=saves_nothing,
            strides=never_strided,
            shares_gradient=always,
        ),
        OpSpec("stack", p.stack, py.function("torch.stack", "", "dim"), saves=saves_nothing, shares_gradient=always),
        OpSpec(
            "slice_scatter",
            p.resized_along(2),
            py.function("torch.slice_scatter", "", "", "dim", "start", "end", "step"),
            saves=saves_nothing,
            strides=never_strided,
        ),
        OpSpec(
            "select_scatter",
            p.one_index_of(2),
            py.function("torch.select_scatter", "", "", "dim", "index"),
            saves=saves_nothing,
            strides=never_strided,
        ),
        OpSpec("index_put", p.replicated, saves=saves_indices),
        OpSpec(
            "repeat_interleave", p.repeat_interleave, py.method("repeat_interleave", "", "dim"), saves=saves_nothing
        ),
        # Products.
        product("linear", p.linear, py.function("F.linear")),
        product("matmul", p.matmul, py.function("torch.matmul")),
        product("mm", p.matmul),
        product("bmm", p.matmul, py.function("torch.bmm")),
        product(
            "baddbmm",
            p.baddbmm,
            py.function("torch.baddbmm"),
            flops=partial(product_flops, first=1),
            saves=partial(saves_factors, first=1),
        ),
        OpSpec("outer", p.outer, py.function("torch.outer")),
        OpSpec("embedding", p.embedding, py.embedding, saves=saves_indices, traffic=rows_looked_up, lookup=True),
        # Reductions and what looks along a dimension.
        OpSpec("sum", p.reduced("+"), py.reduction("sum"), saves=saves_nothing),
        OpSpec("mean", p.reduced("^"), py.reduction("mean"), saves=saves_nothing),
        OpSpec("amax", p.reduced("^")),
        OpSpec("amin", p.reduced("^")),
        OpSpec("softmax", p.never_along(1), py.function("F.softmax", "", "dim", "dtype"), saves=saves_output),
        OpSpec("log_softmax", p.never_along(1)),
        OpSpec("cumsum", p.never_along(1), py.method("cumsum", "dim"), saves=saves_nothing),
        OpSpec(
            "layer_norm",
            p.layer_norm,
            py.function("F.layer_norm", n_args=5),  # without ATen's cudnn_enable
            saves=saves_inputs,
            saves_besides=statistics_of_rows,
        ),
        OpSpec(
            "topk",
            p.resized_along(2, default=-1),
            py.method("topk", "", "dim", "largest", "sorted"),
            saves=saves_indices_of_top,
        ),
        OpSpec("gather", p.at_indices, py.method("gather"), saves=saves_indices),
        OpSpec("scatter", p.at_indices, py.method("scatter"), saves=saves_indices),
        OpSpec("tril", p.matrices, py.function("torch.tril")),
        OpSpec("triu", p.matrices, py.function("torch.triu")),
        # Constants.
        constant("arange", py.function("torch.arange")),
        constant("ones", py.function("torch.ones")),
        constant("zeros", py.function("torch.zeros")),
        constant("full", py.function("torch.full")),
        constant("scalar_tensor"),
    )
}

CASTS = ("to", "type_as", "_to_copy")  # change the dtype of elements and nothing else
UNKNOWN = OpSpec("unknown", p.replicated, py.overload)  # computed whole by every rank, and everything saved


def is_operator(target: str) -> bool:
    """Whether a traced call is one of PyTorch's operators."""
    return target.startswith("aten.")


def is_aten(op: Op) -> bool:
    return is_operator(op.target)


def spec_of_aten(op: Op) -> OpSpec:
    """The operator's entry, whichever its overload; one that has none is known by its name alone."""
    name = op.target.split(".")[1]
    return ATEN.get(name) or replace(UNKNOWN, name=name)


def compute(op: Op, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What PyTorch's operator returns for these arguments, on the CPU."""
    return w.run_on("cpu", op.target, args, kwargs)


def base_name(op: Op) -> str:
    """The operator's name, whichever its overload; empty for one that is not PyTorch's."""
    return op.target.split(".")[1] if is_aten(op) else ""


# --- what tracing and localizing make themselves ---------------------------------------------------------------------


def is_check(target: str) -> bool:
    """Whether a traced operator only asserts what is known already."""
    return target.startswith("aten._assert_tensor_metadata")


def without_device(target: str, args: tuple, kwargs: dict[str, Any]) -> tuple[str, tuple, dict[str, Any]]:
    """A traced call with the traced device taken out of it.

    Moves between devices become casts, and tensors that are made in the graph are made on DEVICE.
    """
    args = tuple(DEVICE if isinstance(a, torch.device) else a for a in args)
    kwargs = {k: DEVICE if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "layout")}
    if target == "aten.to.device":  # to(tensor, device, dtype, ...)
        return "aten.to.dtype", (args[0], args[2]), {}
    if target == "aten.to.dtype_layout":
        return "aten.to.dtype", (args[0], kwargs["dtype"]), {}
    return target, args, kwargs


def transpose(tensor: Tensor, first: int, second: int, output: Tensor) -> Op:
    """output = tensor.transpose(first, second)"""
    return Op("aten.transpose.int", (tensor, first, second), {}, (output,), "", None)


def unsqueeze(tensor: Tensor, dim: int, output: Tensor) -> Op:
    """output = tensor.unsqueeze(dim)"""
    return Op("aten.unsqueeze.default", (tensor, dim), {}, (output,), "", None)


def squeeze(tensor: Tensor, dim: int, output: Tensor) -> Op:
    """output = tensor.squeeze(dim)"""
    return Op("aten.squeeze.dim", (tensor, dim), {}, (output,), "", None)


def cast(tensor: Tensor, output: Tensor) -> Op:
    """output = tensor.to(its dtype)"""
    return Op(CAST, (tensor, output.dtype), {}, (output,), "", None)


CAST = "aten.to.dtype"  # (tensor, dtype)
EXPAND = "aten.expand.default"  # (tensor, sizes)
DETACH = "aten.detach.default"  # (tensor)
