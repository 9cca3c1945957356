"""Operators that write into a tensor: what computes the same without, and how a whole is made anew from a written part.

A traced graph of values, in which nothing is ever overwritten, is what the rest of the compiler reads; functional.py
makes it, by these rules.
"""

from math import prod
from typing import Any

import torch

from longctx.compiler.ir import Device, Op, Tensor, map_tensors
from longctx.compiler.ops.partitions import dim_of

Call = tuple[str, tuple]  # a target and its arguments

# Their schemas don't tell that they write, to the running statistics.
WRITE_SILENTLY = {"batch_norm", "native_batch_norm", "instance_norm"}


def writes(target: str) -> bool:
    """Whether one of PyTorch's operators writes into one of its arguments."""
    return overload_of(target)._schema.is_mutable or target.split(".")[1] in WRITE_SILENTLY


def without_write(target: str, args: tuple, kwargs: dict[str, Any]) -> tuple[str, tuple, dict[str, Any]] | None:
    """The call that returns what a call leaves in its first argument; None if none does, or if it writes elsewhere.

    The result may have another dtype than the first argument, and may have to be expanded to its shape.
    """
    _, name, overload = target.split(".")
    operator = overload_of(target)
    written = [argument.name for argument in operator._schema.arguments if _is_written(argument)]
    if written != [operator._schema.arguments[0].name] or not isinstance(args[0], Tensor):
        return None
    if name == "copy_":
        return "aten.to.dtype", (args[1], args[0].dtype), {}
    if name == "zero_":
        return "aten.zeros_like.default", args[:1], {}
    if (name, overload) == ("fill_", "Scalar"):
        return "aten.full_like.default", args[:2], {}
    functional = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if torch.Tag.inplace_view in operator.tags or overload not in getattr(functional, "overloads", list)():
        return None  # it changes the tensor's shape rather than its elements, or there is no such operator
    return f"aten.{name.removesuffix('_')}.{overload}", args, kwargs


def _is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def overload_of(target: str) -> Any:
    """PyTorch's function for the target of one of its operators."""
    _, name, overload = target.split(".")
    return getattr(getattr(torch.ops.aten, name), overload)


def run_on(device: str, target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What one of PyTorch's operators returns, with `device` for DEVICE."""
    args = tuple(device if isinstance(value, Device) else value for value in args)
    kwargs = {name: device if isinstance(value, Device) else value for name, value in kwargs.items()}
    return overload_of(target)(*args, **kwargs)


def on_meta(target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What one of PyTorch's operators returns, without values: the shapes and dtypes of its outputs."""
    args, kwargs = map_tensors((args, kwargs), lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
    return run_on("meta", target, args, kwargs)


# --- the whole that a view is of, after a write into the view --------------------------------------------------------
# A rule takes the op that made the view, which of the op's outputs it is, the whole, and the view's new value.


def reshaped_back(op: Op, index: int, whole: Tensor, part: Tensor) -> Call | None:
    """None for a view of the same bytes as another dtype, whose elements are no elements of the whole."""
    if whole.dtype != part.dtype:
        return None
    return "aten.reshape.default", (part, list(whole.shape))


def transposed_back(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    return op.target, (part, *op.args[1:])


def permuted_back(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    order = [dim % len(whole.shape) for dim in op.args[1]]
    return op.target, (part, [order.index(dim) for dim in range(len(order))])


def into_range(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    """Of slice: x with `part` where it was taken from."""
    return "aten.slice_scatter.default", (whole, part, *op.args[1:])


def into_narrow(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    _, dim, start, length = op.args
    return "aten.slice_scatter.default", (whole, part, dim, start, start + length)


def into_place(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    """Of select: x with `part` at the index where it was taken from."""
    return "aten.select_scatter.default", (whole, part, *op.args[1:])


def into_piece(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    """Of chunk and split: x with `part` as its piece number `index`."""
    dim = dim_of(op, 2)
    start = sum(piece.shape[dim] for piece in op.outputs[:index])
    return "aten.slice_scatter.default", (whole, part, dim, start, start + part.shape[dim])


def into_unbound(op: Op, index: int, whole: Tensor, part: Tensor) -> Call:
    return "aten.select_scatter.default", (whole, part, dim_of(op, 1), index)


def into_all(op: Op, index: int, whole: Tensor, part: Tensor) -> Call | None:
    """Of expand: what stands in one place of memory for many elements can't be written to."""
    return reshaped_back(op, index, whole, part) if prod(whole.shape) == prod(part.shape) else None
