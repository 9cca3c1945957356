"""The ATen operators a decoder is made of: how generated code writes each one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compiler.trace import Device, Op, Tensor

# How tightly an expression binds, for parentheses: a name or a call, a unary minus, a product, a sum.
ATOM, UNARY, PRODUCT, SUM = 3, 2, 1, 0


@dataclass(frozen=True)
class Expression:
    text: str
    binding: int = ATOM

    def within(self, binding: int) -> str:
        """The text, in parentheses where an operator of `binding` would tear it apart."""
        return self.text if self.binding >= binding else f"({self.text})"


Refer = Callable[[Tensor], Expression]

_INFIX = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT)}
_METHODS = {
    **dict.fromkeys(
        ["cos", "sin", "tanh", "exp", "sqrt", "rsqrt", "square", "abs", "contiguous", "detach", "clone"], ()
    ),
    **dict.fromkeys(
        ["view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "flatten", "pow"], ()
    ),
    **dict.fromkeys(["type_as", "masked_fill", "t", "bitwise_not", "logical_not"], ()),
    "sum": ("dim", "keepdim"),
    "mean": ("dim", "keepdim"),
    "chunk": ("", "dim"),
    "split": ("", "dim"),
    "cumsum": ("dim",),
    "repeat_interleave": ("", "dim"),
}
_TORCH = {"cat": ("", "dim"), "stack": ("", "dim"), "arange": (), "where": (), "outer": (), "matmul": (), "sigmoid": ()}
_TORCH |= dict.fromkeys(["ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "bmm", "tril", "triu"], ())
_FUNCTIONAL = {
    **dict.fromkeys(["linear", "silu", "relu", "leaky_relu", "gelu", "softplus"], ()),
    "softmax": ("", "dim", "dtype"),
}
_SPREAD = {"view", "reshape", "expand", "permute"}  # x.view(1, 8), not x.view([1, 8])
_OPEN_END = 2**63 - 1  # how ATen writes the end of x[1:]


def expression(op: Op, refer: Refer, device: str) -> Expression:
    """The Python expression that computes `op`.

    Args:
        refer: the expression for a tensor among its arguments.
        device: the expression that stands for the device.
    """
    values = _Values(refer, device)
    if not op.target.startswith("aten."):  # a registered function, called by its name
        return _call(op.target.rsplit(".", 1)[-1], op.args, op.kwargs, values)
    name = op.target.split(".")[1]
    if writer := _WRITERS.get(name):
        written = writer(op, values)
        if written is not None:
            return written
    if name in _INFIX and not op.kwargs and len(op.args) == 2:
        symbol, binding = _INFIX[name]
        left, right = values.bind(op.args[0], binding), values.bind(op.args[1], binding + 1)
        return Expression(f"{left} {symbol} {right}", binding)
    if name in _METHODS and isinstance(op.args[0], Tensor):
        head, *rest = op.args
        if name in _SPREAD:
            rest = rest[0]
        return _call(f"{values.bind(head, ATOM)}.{name}", rest, op.kwargs, values, _METHODS[name])
    if name in _TORCH:
        return _call(f"torch.{name}", op.args, op.kwargs, values, _TORCH[name])
    if name in _FUNCTIONAL:
        return _call(f"F.{name}", op.args, op.kwargs, values, _FUNCTIONAL[name])
    return _call(f"torch.ops.{op.target}", op.args, op.kwargs, values)  # always right, if not what one would write


@dataclass(frozen=True)
class _Values:
    """Writes arguments: tensors by `refer`, everything else as Python literals."""

    refer: Refer
    device: str

    def bind(self, value: Any, binding: int) -> str:
        if isinstance(value, Tensor):
            return self.refer(value).within(binding)
        return self.write(value) if binding < ATOM or not isinstance(value, (int, float)) else f"({value})"

    def write(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self.refer(value).text
        if isinstance(value, Device):
            return self.device
        if isinstance(value, (tuple, list)):
            items = ", ".join(self.write(item) for item in value)
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return f'float("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, bool, int, float, type(None))):
            return repr(value)
        if isinstance(value, str):
            return repr(value).replace("'", '"')
        raise TypeError(f"generated code can't hold a {type(value).__name__}: {value!r}")


def _call(function: str, args: Sequence, kwargs: dict, values: _Values, keywords: Sequence[str] = ()) -> Expression:
    """function(args, kwargs), the arguments whose place has a name in `keywords` written with it."""
    parts = [values.write(arg) for arg in args]
    parts = [f"{k}={part}" if k else part for k, part in zip([*keywords, *[""] * len(parts)], parts, strict=False)]
    return Expression(f"{function}({', '.join([*parts, *(f'{k}={values.write(v)}' for k, v in kwargs.items())])})")


# Operators whose Python differs from their ATen form. A writer gives None where the general rule serves.


def _write_neg(op: Op, values: _Values) -> Expression:
    return Expression(f"-{values.bind(op.args[0], UNARY)}", UNARY)


def _write_to(op: Op, values: _Values) -> Expression:
    return Expression(f"{values.bind(op.args[0], ATOM)}.to({values.write(op.args[1])})")


def _write_slice(op: Op, values: _Values) -> Expression:
    tensor, dim, start, end, step = (*op.args, *(0, None, None, 1)[len(op.args) - 1 :])
    bounds = f"{start or ''}:{'' if end in (None, _OPEN_END) else end}" + (f":{step}" if step != 1 else "")
    return Expression(f"{values.bind(tensor, ATOM)}[{_at_dim(tensor, dim, bounds)}]")


def _write_select(op: Op, values: _Values) -> Expression:
    tensor, dim, index = op.args
    return Expression(f"{values.bind(tensor, ATOM)}[{_at_dim(tensor, dim, str(index))}]")


def _at_dim(tensor: Tensor, dim: int, index: str) -> str:
    """`index` at dimension `dim` of a subscript: '..., 1:' at the last, ':, 1:' at the second."""
    dim %= len(tensor.shape)
    return f"..., {index}" if 0 < dim == len(tensor.shape) - 1 else ":, " * dim + index


def _write_embedding(op: Op, values: _Values) -> Expression:
    weight, indices, padding_idx = (*op.args[:3], -1)[:3]
    kwargs = {"padding_idx": padding_idx} if padding_idx >= 0 else {}
    return _call("F.embedding", (indices, weight), kwargs, values)


def _write_dropout(op: Op, values: _Values) -> Expression:
    return _call("F.dropout", op.args[:2], {}, values)  # tracing has dropped those that are off


def _write_layer_norm(op: Op, values: _Values) -> Expression:
    return _call("F.layer_norm", op.args[:5], {}, values)  # without ATen's cudnn_enable


def _write_dim_list(op: Op, values: _Values) -> Expression | None:
    """sum and mean take a list of dimensions in ATen; one is written as a number."""
    if len(op.args) < 2 or not isinstance(op.args[1], (list, tuple)) or len(op.args[1]) != 1:
        return None
    tensor, (dim,), *keepdim = op.args
    name = op.target.split(".")[1]
    return _call(f"{values.bind(tensor, ATOM)}.{name}", (dim, *keepdim), op.kwargs, values, _METHODS[name])


_WRITERS: dict[str, Callable[[Op, _Values], Expression | None]] = {
    "neg": _write_neg,
    "to": _write_to,
    "slice": _write_slice,
    "select": _write_select,
    "embedding": _write_embedding,
    "dropout": _write_dropout,
    "layer_norm": _write_layer_norm,
    "sum": _write_dim_list,
    "mean": _write_dim_list,
}
