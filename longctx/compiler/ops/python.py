"""How an operator is written in Python: expressions, their precedence, and the forms that calls take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from longctx.compiler.ir import Device, Op, OwnRing, OwnStarts, Tensor

# How tightly an expression binds, for parentheses: a name or a call, a unary minus, a product, a sum.
ATOM, UNARY, PRODUCT, SUM = 3, 2, 1, 0
OWN_STARTS = "own_starts"  # of collectives: where this rank's parts of a dimension begin
OWN_RING = "ring_of"  # of collectives: the ranks round which the parts of a dimension are passed
OPEN_END = 2**63 - 1  # how ATen writes the end of x[1:]


@dataclass(frozen=True)
class Expression:
    """A Python expression, how tightly its outermost operator binds, and the function, if it is the call of one."""

    text: str
    binding: int = ATOM
    function: str = ""

    def within(self, binding: int) -> str:
        """The text, in parentheses where an operator of `binding` would tear it apart."""
        return self.text if self.binding >= binding else f"({self.text})"

    def called_by(self, function: str, argument: str) -> "Expression":
        """function(argument, f, x) of the call f(x)."""
        assert self.function, f"{self.text} calls no function"
        arguments = self.text.removeprefix(f"{self.function}(")
        return Expression(f"{function}({argument}, {self.function}, {arguments}", function=function)


@dataclass(frozen=True)
class Values:
    """Writes arguments: tensors as `refer` says, the device as `device`, everything else as a Python literal."""

    refer: Callable[[Tensor], Expression]
    device: str

    def bind(self, value: Any, binding: int) -> str:
        """A value as an operand of an operator of `binding`."""
        if isinstance(value, Tensor):
            return self.refer(value).within(binding)
        return self.write(value) if binding < ATOM or not isinstance(value, (int, float)) else f"({value})"

    def write(self, value: Any) -> str:
        """A value as an argument of a call."""
        if isinstance(value, Tensor):
            return self.refer(value).text
        if isinstance(value, Device):
            return self.device
        if isinstance(value, OwnStarts):
            options = {"balanced": value.balanced, "across": value.across if value.across > 1 else 0}
            said = [f"{name}={option}" for name, option in options.items() if option]
            return f"{own_function(value)}({', '.join([str(value.length), *said])})"
        if isinstance(value, (tuple, list)):
            items = ", ".join(self.write(item) for item in value)
            return f"({items},)" if len(value) == 1 else f"({items})"
        if isinstance(value, float) and not isfinite(value):
            return f'float("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, bool, int, float, type(None))):
            return repr(value)
        if isinstance(value, str):
            return repr(value).replace("'", '"')
        raise TypeError(f"generated code can't hold a {type(value).__name__}: {value!r}")


def own_function(value: OwnStarts) -> str:
    """The function of collectives that gives a rank this argument."""
    return OWN_RING if isinstance(value, OwnRing) else OWN_STARTS


Writer = Callable[[Op, Values], Expression | None]  # None where the form does not fit this call


def call(function: str, args: Sequence, kwargs: dict, values: Values, keywords: Sequence[str] = ()) -> Expression:
    """function(args, kwargs); an argument whose place has a name in `keywords` is written with that name."""
    parts = [values.write(arg) for arg in args]
    parts = [f"{k}={part}" if k else part for k, part in zip([*keywords, *[""] * len(parts)], parts, strict=False)]
    parts += [f"{k}={values.write(v)}" for k, v in kwargs.items()]
    return Expression(f"{function}({', '.join(parts)})", function=function)


def overload(op: Op, values: Values) -> Expression:
    """torch.ops.aten.linear.default(x, weight): always right, if not what a person would write."""
    return call(f"torch.ops.{op.target}", op.args, op.kwargs, values)


def by_name(op: Op, values: Values) -> Expression:
    """attention(query, key, value): a registered function or a reshard, which generated code imports."""
    return call(op.target.rsplit(".", 1)[-1], op.args, op.kwargs, values)


def infix(symbol: str, binding: int) -> Writer:
    """x + y, where there is nothing but the two operands."""

    def write(op: Op, values: Values) -> Expression | None:
        if op.kwargs or len(op.args) != 2:
            return None
        left, right = values.bind(op.args[0], binding), values.bind(op.args[1], binding + 1)
        return Expression(f"{left} {symbol} {right}", binding)

    return write


def method(name: str, *keywords: str, spread: bool = False) -> Writer:
    """x.name(...); with `spread` a list of sizes is written as so many arguments, x.view(1, 8)."""

    def write(op: Op, values: Values) -> Expression | None:
        head, *rest = op.args
        if not isinstance(head, Tensor):
            return None
        if spread and rest[0]:  # x.view(()) for no dimension
            rest = rest[0]
        return call(f"{values.bind(head, ATOM)}.{name}", rest, op.kwargs, values, keywords)

    return write


def reduction(name: str) -> Writer:
    """x.sum(-1, keepdim=True): ATen takes a list of dimensions, and one is written as a number."""

    def write(op: Op, values: Values) -> Expression | None:
        if len(op.args) < 2 or not isinstance(op.args[1], (list, tuple)) or len(op.args[1]) != 1:
            return method(name, "dim", "keepdim")(op, values)
        tensor, (dim,), *keepdim = op.args
        return call(f"{values.bind(tensor, ATOM)}.{name}", (dim, *keepdim), op.kwargs, values, ("dim", "keepdim"))

    return write


def function(name: str, *keywords: str, n_args: int | None = None) -> Writer:
    """torch.cat(...) or F.silu(...), as `name` has it; with `n_args` ATen's further arguments are left out."""

    def write(op: Op, values: Values) -> Expression:
        kwargs = op.kwargs if n_args is None else {}
        return call(name, op.args[:n_args], kwargs, values, keywords)

    return write


def negative(op: Op, values: Values) -> Expression:
    return Expression(f"-{values.bind(op.args[0], UNARY)}", UNARY)


def cast(op: Op, values: Values) -> Expression:
    return Expression(f"{values.bind(op.args[0], ATOM)}.to({values.write(op.args[1])})")


def subscript_range(op: Op, values: Values) -> Expression:
    """x[..., 1:8:2]"""
    tensor, dim, start, end, step = with_defaults(op, 0, None, None, 1)
    bounds = f"{start or ''}:{'' if end in (None, OPEN_END) else end}" + (f":{step}" if step != 1 else "")
    return Expression(f"{values.bind(tensor, ATOM)}[{_at_dim(tensor, dim, bounds)}]")


def subscript(op: Op, values: Values) -> Expression:
    """x[:, 3]"""
    tensor, dim, index = op.args
    return Expression(f"{values.bind(tensor, ATOM)}[{_at_dim(tensor, dim, str(index))}]")


def with_defaults(op: Op, *defaults: Any) -> tuple[Any, ...]:
    """An op's arguments; those behind the first one that a call leaves out have their defaults."""
    return (*op.args, *defaults[len(op.args) - 1 :])


def _at_dim(tensor: Tensor, dim: int, index: str) -> str:
    """`index` at dimension `dim` of a subscript: '..., 1:' at the last, ':, 1:' at the second."""
    dim %= len(tensor.shape)
    return f"..., {index}" if 0 < dim == len(tensor.shape) - 1 else ":, " * dim + index


def embedding(op: Op, values: Values) -> Expression:
    """F.embedding has indices and table in the other order than ATen."""
    weight, indices, padding_idx = with_defaults(op, None, -1)[:3]
    kwargs = {"padding_idx": padding_idx} if padding_idx >= 0 else {}
    return call("F.embedding", (indices, weight), kwargs, values)
