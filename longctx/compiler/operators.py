"""The ATen operators a decoder is made of: how each may be partitioned, and how generated code writes it."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch

from longctx.compiler.annotation import REGISTERED_OPS, Annotation, Entry, parse
from longctx.compiler.trace import Device, Op, Tensor

# --- annotations ---------------------------------------------------------------------------------------------------


def annotate(op: Op) -> Annotation:
    """The annotation of an op; its inputs are op.inputs, the tensors among its arguments in order.

    An operator that is not known may only be computed whole.
    """
    if op.target in REGISTERED_OPS:
        return _annotate_registered(op)
    write = _ANNOTATIONS.get(op.target.split(".")[1], unknown)
    if not op.inputs:
        return Annotation("-> ?", (), (Entry(replicated=True),) * len(op.outputs))
    return parse(write(op))


def is_known(op: Op) -> bool:
    return op.target in REGISTERED_OPS or op.target.split(".")[1] in _ANNOTATIONS


# Registered functions that draw random numbers only for an argument `dropout`; of any other one nothing is known.
_RANDOM_BY_DROPOUT_ONLY = {
    "longctx.kernels.attention.attention",
    "longctx.kernels.rms_norm.rms_norm",
    "chunk_linear_cross_entropy.chunk_linear_cross_entropy",
}


def draws_random_numbers(op: Op) -> bool:
    """Whether an op may draw random numbers, which have to be the same when it is computed again."""
    if op.target.startswith("aten."):
        _, name, overload = op.target.split(".")
        return torch.Tag.nondeterministic_seeded in getattr(getattr(torch.ops.aten, name), overload).tags
    if op.target in _RANDOM_BY_DROPOUT_ONLY:
        return bool(op.kwargs.get("dropout"))
    return op.target in REGISTERED_OPS  # else a move of runtime.collectives


def _annotate_registered(op: Op) -> Annotation:
    registered = REGISTERED_OPS[op.target]
    annotation = registered.annotate(op.args, op.kwargs)
    arguments = inspect.signature(registered.fn).bind(*op.args, **op.kwargs).arguments.values()
    entries = [*annotation.inputs, *[Entry(replicated=True)] * len(arguments)]
    inputs = tuple(entry for entry, value in zip(entries, arguments, strict=False) if isinstance(value, Tensor))
    return Annotation(annotation.text, inputs, annotation.outputs)


def _names(shape: Sequence[int], mark: str = "") -> list[str]:
    """A name for every dimension, by its place counted from the last, so that broadcast dimensions agree."""
    return [f"{_LETTERS[len(shape) - 1 - i]}{mark}" for i in range(len(shape))]


_LETTERS = "zyxwvutsrqponm"


def _join(*entries: Sequence[str]) -> str:
    return ", ".join(" ".join(entry) if entry else "?" for entry in entries)


def _elementwise(op: Op) -> str:
    """Dimensions agree from the last on; one of length 1 that another tensor stretches stays as it is."""
    out = op.outputs[0].shape
    names = _names(out)

    def entry(shape: Sequence[int]) -> list[str]:
        aligned = list(zip(shape, out[len(out) - len(shape) :], names[len(out) - len(shape) :], strict=True))
        return [name if size == full else "1" for size, full, name in aligned]

    return f"{_join(*(entry(t.shape) for t in op.inputs))} -> {_join(_only_read(names, op))}"


def _only_read(names: list[str], op: Op) -> list[str]:
    """The output's names; a dimension that no input has in full has its length instead."""
    out = op.outputs[0].shape
    read = set()
    for tensor in op.inputs:
        offset = len(out) - len(tensor.shape)
        read |= {offset + i for i, size in enumerate(tensor.shape) if size == out[offset + i]}
    return [name if i in read else str(out[i]) for i, name in enumerate(names)]


def _linear(op: Op) -> str:
    """x @ weight.T + bias: the inner dimension may be summed over ranks only where no bias would be added by each."""
    x = op.inputs[0].shape
    rows = _names(x)[:-1]
    if len(op.inputs) == 3:
        return f"{_join([*rows, 'k^'], ['n', 'k^'], ['n'])} -> {_join([*rows, 'n'])}"
    return f"{_join([*rows, 'k+'], ['n', 'k+'])} -> {_join([*rows, 'n'])}"


def _matmul(op: Op) -> str:
    left, right = op.inputs[0].shape, op.inputs[1].shape
    if len(left) != len(right) or len(left) < 2 or left[:-2] != right[:-2]:
        return unknown(op)
    batch = [f"b{i}" for i in range(len(left) - 2)]
    return f"{_join([*batch, 'm', 'k+'], [*batch, 'k+', 'n'])} -> {_join([*batch, 'm', 'n'])}"


def _embedding(op: Op) -> str:
    rows = _names(op.inputs[1].shape)
    return f"n^ d, {_join(rows)} -> {_join([*rows, 'd'])}"


def _layer_norm(op: Op) -> str:
    x = op.inputs[0].shape
    n_normalized = len(op.args[1])
    rows, features = _names(x)[: len(x) - n_normalized], [f"{n}^" for n in _names(x)[len(x) - n_normalized :]]
    return f"{_join([*rows, *features], *[features] * (len(op.inputs) - 1))} -> {_join([*rows, *features])}"


def _whole_along(*arguments: int) -> Callable[[Op], str]:
    """The output has the input's dimensions, and the one named by an argument is never split (softmax, cumsum)."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        dim = op.kwargs.get("dim", next(op.args[i] for i in arguments if len(op.args) > i))
        names = _names(shape)
        names[dim % len(shape)] += "^"
        return f"{_join(*[names] * len(op.inputs))} -> {_join(*[names] * len(op.outputs))}"

    return write


def _sliced_along(argument: int, *, removed: bool = False) -> Callable[[Op], str]:
    """The output has another length along the dimension named by an argument, or not that dimension."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        dim = op.kwargs.get("dim", op.args[argument] if len(op.args) > argument else 0) % len(shape)
        names = _names(shape)

        def entry(length: int) -> list[str]:
            return [*names[:dim], str(length), *names[dim + 1 :]]

        befores = [entry(tensor.shape[dim]) for tensor in op.inputs]
        afters = [names[:dim] + names[dim + 1 :] if removed else entry(t.shape[dim]) for t in op.outputs]
        return f"{_join(*befores)} -> {_join(*afters)}"

    return write


def _stack(op: Op) -> str:
    out = op.outputs[0].shape
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(out)
    names = _names(op.inputs[0].shape)
    return f"{_join(*[names] * len(op.inputs))} -> {_join([*names[:dim], str(out[dim]), *names[dim:]])}"


def _reduce(mark: str) -> Callable[[Op], str]:
    """Dimensions that are reduced are summed over ranks (mark '+') or never split (mark '^': a mean, a maximum)."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        given = op.args[1] if len(op.args) > 1 else None
        dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given or range(len(shape)))}
        keepdim = len(op.args) > 2 and op.args[2]
        names = [f"{name}{mark if i in dims else ''}" for i, name in enumerate(_names(shape))]
        after = ["1" if i in dims else name for i, name in enumerate(names) if i not in dims or keepdim]
        return f"{_join(names)} -> {_join(after or ['1'])}"

    return write


def _permuted(op: Op) -> str:
    """transpose, permute, t: the dimensions in another order."""
    shape = op.inputs[0].shape
    order = list(range(len(shape)))
    if op.target.startswith("aten.permute"):
        order = [d % len(shape) for d in op.args[1]]
    elif len(shape) > 1:
        first, second = op.args[1:3] if op.target.startswith("aten.transpose") else (0, 1)
        order[first], order[second] = order[second], order[first]
    names = _names(shape)
    return f"{_join(names)} -> {_join([names[d] for d in order])}"


def _reshaped(op: Op) -> str:
    """view, reshape, flatten, unsqueeze: dimensions merged or cut, found from the two shapes.

    A group of dimensions that becomes one, or one that becomes a group, may be split by its outermost; where several
    become several, none may.
    """
    before, after = op.inputs[0].shape, op.outputs[0].shape
    left: list[str] = ["1"] * len(before)
    right: list[str] = ["1"] * len(after)
    for number, (i, j) in enumerate(_reshape_groups(before, after)):
        name = f"g{number}x"
        if len(i) == 1 and len(j) == 1:
            left[i[0]] = right[j[0]] = name
        elif len(j) == 1:
            _fill_group(left, before, i, right, j[0], name)
        elif len(i) == 1:
            _fill_group(right, after, j, left, i[0], name)
        else:
            for d in i:
                left[d] = str(before[d])
            for d in j:
                right[d] = str(after[d])
    return f"{_join(left)} -> {_join(right)}"


def _fill_group(parts: list[str], shape: Sequence[int], dims: list[int], whole: list[str], dim: int, name: str) -> None:
    """`parts[dims]` are the factors of `whole[dim]`: the outermost has a name, the others their lengths."""
    names = [name, *(str(shape[d]) for d in dims[1:])]
    for d, part in zip(dims, names, strict=True):
        parts[d] = part
    whole[dim] = f"({' '.join(names)})"


def _reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions, those of length 1 left out, that have equal products before and after."""
    left = [i for i, size in enumerate(before) if size != 1]
    right = [j for j, size in enumerate(after) if size != 1]
    groups = []
    while left and right:
        i, j = [left.pop(0)], [right.pop(0)]
        while (a := prod(before[d] for d in i)) != (b := prod(after[d] for d in j)):
            (i if a < b else j).append((left if a < b else right).pop(0))
        groups.append((i, j))
    return groups


def _squeeze(op: Op) -> str:
    """A dimension that would go if it had length 1 stays whole otherwise: a rank's part of it may have length 1."""
    shape = op.inputs[0].shape
    given = op.args[1] if len(op.args) > 1 else range(len(shape))
    dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
    names = [str(shape[i]) if i in dims else name for i, name in enumerate(_names(shape))]
    return f"{_join(names)} -> {_join([name for i, name in enumerate(names) if i not in dims or shape[i] != 1])}"


def _unflatten(op: Op) -> str:
    """A dimension that is cut into pieces may be split by the outermost if its size is left open (-1): the others are
    the same on every rank."""
    shape, (dim, sizes) = op.inputs[0].shape, op.args[1:]
    dim %= len(shape)
    pieces = [str(size) for size in op.outputs[0].shape[dim : dim + len(sizes)]]
    whole, names = str(shape[dim]), _names(shape)
    if sizes[0] == -1:
        pieces[0] = names[dim]
        whole = f"({' '.join(pieces)})"
    return f"{_join([*names[:dim], whole, *names[dim + 1 :]])} -> {_join([*names[:dim], *pieces, *names[dim + 1 :]])}"


def _repeat_interleave(op: Op) -> str:
    """Element i becomes elements i * n to i * n + n - 1, so a split of the input is one of the output."""
    shape = op.inputs[0].shape
    if len(op.args) < 3 or op.args[2] is None or not isinstance(op.args[1], int) or op.kwargs:
        return unknown(op)
    dim = op.args[2] % len(shape)
    names = _names(shape)
    return f"{_join(names)} -> {_join([*names[:dim], f'({names[dim]} {op.args[1]})', *names[dim + 1 :]])}"


def _like_first(op: Op) -> str:
    """type_as: of the second tensor only the dtype matters."""
    names = _names(op.inputs[0].shape)
    return f"{_join(names, *[[]] * (len(op.inputs) - 1))} -> {_join(names)}"


def unknown(op: Op) -> str:
    """Whatever it is, it is right if every rank computes it whole."""
    return f"{_join(*[[]] * len(op.inputs))} -> {_join(*[[]] * len(op.outputs))}"


_ANNOTATIONS: dict[str, Callable[[Op], str]] = {
    **dict.fromkeys(
        ["add", "sub", "mul", "div", "rsub", "pow", "maximum", "minimum", "where", "masked_fill"], _elementwise
    ),
    **dict.fromkeys(["eq", "ne", "lt", "le", "gt", "ge", "logical_and", "bitwise_and", "bitwise_or"], _elementwise),
    **dict.fromkeys(["neg", "cos", "sin", "exp", "sqrt", "rsqrt", "square", "abs", "reciprocal", "log"], _elementwise),
    **dict.fromkeys(
        ["tanh", "sigmoid", "silu", "relu", "gelu", "leaky_relu", "softplus", "erf", "dropout"], _elementwise
    ),
    **dict.fromkeys(["to", "contiguous", "clone", "detach", "alias", "clamp", "clamp_min"], _elementwise),
    **dict.fromkeys(["ones_like", "zeros_like", "full_like", "logical_not", "bitwise_not"], _elementwise),
    **dict.fromkeys(["view", "reshape", "flatten", "unsqueeze"], _reshaped),
    "squeeze": _squeeze,
    "unflatten": _unflatten,
    **dict.fromkeys(["transpose", "permute", "t"], _permuted),
    **dict.fromkeys(["matmul", "bmm", "mm"], _matmul),
    **dict.fromkeys(["softmax", "log_softmax", "cumsum"], _whole_along(1)),
    "expand": _elementwise,
    "type_as": _like_first,
    "linear": _linear,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "sum": _reduce("+"),
    "mean": _reduce("^"),
    "amax": _reduce("^"),
    "amin": _reduce("^"),
    "cat": _sliced_along(1),
    "slice": _sliced_along(1),
    "select": _sliced_along(1, removed=True),
    "chunk": _sliced_along(2),
    "split": _sliced_along(2),
    "split_with_sizes": _sliced_along(2),
    "stack": _stack,
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(["arange", "ones", "zeros", "full", "scalar_tensor"], unknown),
}


# --- Python --------------------------------------------------------------------------------------------------------

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
        if name in _SPREAD and rest[0]:  # x.view(()) for no dimension
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
        if isinstance(value, float) and not isfinite(value):
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
