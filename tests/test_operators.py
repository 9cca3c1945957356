"""The operators' annotations and their Python, held to what PyTorch's own operators compute, in float64.

Every partition that an operator is offered is carried out rank by rank on the parts of its inputs, and its outputs and
gradients are put together again. Two tables name what is offered and what must never be.
"""

import operator as python_operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from placed import part_of
from torch.fx.node import map_aggregate

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.compiler.ir import DEVICE, Device, Graph, Op, OwnStarts, Tensor, map_tensors
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.ops import (
    REGISTERED_OPS,
    Row,
    aten,
    is_known,
    legal_partitions,
    register_op,
    ring_of,
    spec_of,
    target_of,
)
from longctx.compiler.ops import expression as write_expression
from longctx.compiler.ops.python import ATOM, PRODUCT, SUM, UNARY, Expression, Values
from longctx.compiler.placement import REPLICATE, Partition, Placement, Shard
from longctx.kernels.attention import alibi_attention, attention, sink_attention
from longctx.kernels.causal_conv1d import causal_conv1d
from longctx.kernels.experts import ACTIVATIONS, balance, experts
from longctx.kernels.linear_attention import decaying_linear_attention, gated_delta_rule
from longctx.kernels.rms_norm import rms_norm
from longctx.kernels.selective_scan import bounded_sqrt, linear_recurrence, selective_scan

ATTENTION, ALIBI, SINKS = map(target_of, (attention, alibi_attention, sink_attention))
RMS_NORM, LOSS, EXPERTS, BALANCE = map(target_of, (rms_norm, chunk_linear_cross_entropy, experts, balance))
CONVOLUTION, SCAN, RECURRENCE, ROOT = map(target_of, (causal_conv1d, selective_scan, linear_recurrence, bounded_sqrt))
DELTA_RULE, LINEAR_ATTENTION = map(target_of, (gated_delta_rule, decaying_linear_attention))
FLOAT, INT, BOOL, CONTIGUOUS = torch.float64, torch.int64, torch.bool, torch.contiguous_format


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, tensors among them. `tolerance` is more where it computes in float32 inside."""

    target: str
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-9


def as_op(call: Call) -> tuple[Op, list[torch.Tensor]]:
    """The op that tracing makes of a call, and the values of its inputs."""
    values: list[torch.Tensor] = []

    def tensor_of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        values.append(value)
        return Tensor(f"x{len(values)}", tuple(value.shape), value.dtype, value.is_floating_point())

    args, kwargs = map_aggregate((call.args, call.kwargs), tensor_of)
    op = Op(call.target, tuple(args), dict(kwargs), (), "", None)
    trained = any(value.is_floating_point() for value in values)
    outputs = compute(op, values)
    made = [Tensor(f"y{i}", tuple(y.shape), y.dtype, trained and y.is_floating_point()) for i, y in enumerate(outputs)]
    return replace(op, outputs=tuple(made)), values


def compute(op: Op, values: Sequence[torch.Tensor], rank: int = 0, n_ranks: int = 1) -> list[torch.Tensor]:
    """The real operator's outputs for these values of op.inputs on a rank; dropout drops the same every time."""
    remaining = iter(values)
    args, kwargs = map_tensors((op.args, op.kwargs), lambda _: next(remaining))
    stands_for = {Device: lambda _: "cpu", OwnStarts: lambda own: starts_of(own, rank, n_ranks)}
    kwargs = {name: stands_for.get(type(value), lambda given: given)(value) for name, value in kwargs.items()}
    registered = REGISTERED_OPS.get(op.target)
    function = registered.fn if registered else python_operator.attrgetter(op.target)(torch.ops)
    torch.manual_seed(0)
    return as_list(function(*args, **kwargs))


def starts_of(own: OwnStarts, rank: int, n_ranks: int) -> tuple[int, ...]:
    starts, _ = Shard(0, balanced=own.balanced).blocks(own.length, n_ranks // own.across)
    return starts[rank // own.across]


def as_list(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


# --- drawing calls -------------------------------------------------------------------------------------------------


class Draw:
    """What calls are made of: small shapes, values without ties, choices."""

    def __init__(self, data: st.DataObject):
        self.draw = data.draw
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def shape(self, least: int = 1, most: int = 3) -> list[int]:
        return self.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=least, max_size=most))

    def dim(self, shape: Sequence[int]) -> int:
        return self.draw(st.integers(-len(shape), len(shape) - 1))

    def values(self, shape: Sequence[int], low: float = -2.0, dtype: torch.dtype = FLOAT) -> torch.Tensor:
        """From `low` to 2 if floating, else 0, 1 and 2, or booleans."""
        uniform = torch.rand(shape, generator=self.generator, dtype=FLOAT)
        if dtype.is_floating_point:
            return (low + (2 - low) * uniform).to(dtype)
        return uniform > 0.5 if dtype == BOOL else (3 * uniform).to(dtype)

    def stretched(self, shape: Sequence[int]) -> list[int]:
        """A shape that stretches to `shape`: some leading dimensions are left out, some others 1."""
        return [self.one_of(size, 1) for size in shape[self.draw(st.integers(0, len(shape))) :]]


MakeCall = Callable[[Draw], Call]


def unary(target: str, *rests: tuple, low: float = -2.0, of: torch.dtype = FLOAT, **options: tuple) -> MakeCall:
    """Of one tensor, and one of `rests` behind it; an option has one of its values, None leaving it out."""

    def make(draw: Draw) -> Call:
        kwargs = {name: draw.one_of(*choices) for name, choices in options.items()}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return Call(f"aten.{target}", (draw.values(draw.shape(), low, of), *draw.one_of(*rests or [()])), kwargs)

    return make


def broadcast(target: str, *rest: Any, low: float = -2.0, of: Sequence[torch.dtype] = (FLOAT, FLOAT), **kwargs):
    """Of tensors of the dtypes `of`, whose shapes broadcast to that of one of them; `rest` behind them."""

    def make(draw: Draw) -> Call:
        shape, whole = draw.shape(), draw.draw(st.integers(0, len(of) - 1))
        shapes = [shape if i == whole else draw.stretched(shape) for i in range(len(of))]
        tensors = [draw.values(shape, low, dtype) for shape, dtype in zip(shapes, of, strict=True)]
        return Call(f"aten.{target}", (*tensors, *rest), kwargs)

    return make


def alternatives(*makes: MakeCall) -> MakeCall:
    return lambda draw: draw.one_of(*makes)(draw)


def comparison(name: str) -> MakeCall:
    return alternatives(broadcast(f"{name}.Tensor", of=(INT, INT)), unary(f"{name}.Scalar", (0.5,), (float("-inf"),)))


def out_of_nothing(target: str, *args: tuple) -> MakeCall:
    return lambda draw: Call(f"aten.{target}", draw.one_of(*args), {"device": DEVICE})


def along_dim(target: str, *rests: tuple) -> MakeCall:
    """f(x, dim), and one of `rests` behind it."""

    def make(draw: Draw) -> Call:
        shape, rest = draw.shape(), draw.one_of(*rests or [()])
        tolerance = 1e-5 if torch.float32 in rest else 1e-9
        return Call(f"aten.{target}", (draw.values(shape), draw.dim(shape), *rest), tolerance=tolerance)

    return make


def reduction(name: str, over_dims: str, *wholes: str) -> MakeCall:
    """f(x, dims), f(x, dims, keepdim) or, by the overloads `wholes`, f(x)."""

    def make(draw: Draw) -> Call:
        shape = draw.shape()
        dims = draw.one_of([draw.dim(shape)], [0, -1] if len(shape) > 1 else [0])
        choices = [(over_dims, (dims,)), (over_dims, (dims, True)), *((whole, ()) for whole in wholes)]
        overload, rest = draw.one_of(*choices)
        return Call(f"aten.{name}.{overload}", (draw.values(shape), *rest))

    return make


def draw_masked_fill(draw: Draw) -> Call:
    shape = draw.shape()
    mask = draw.values(draw.stretched(shape), dtype=BOOL)
    return Call("aten.masked_fill.Scalar", (draw.values(shape), mask, draw.one_of(0.5, float("-inf"))))


def draw_view(target: str, draw: Draw) -> Call:
    """The same factors, multiplied to dimensions in two ways."""
    if draw.one_of(*[False] * 9, True):
        return Call(f"aten.{target}.default", (draw.values(draw.one_of([], [1])), draw.one_of([], [1])))
    factors = draw.shape(2, 4)
    shapes = []
    for _ in range(2):
        cuts = [0, *sorted(draw.draw(st.sets(st.integers(1, len(factors) - 1)))), len(factors)]
        shapes.append([prod(factors[start:stop]) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)])
    before, after = shapes
    if draw.one_of(True, False):
        after[draw.dim(after)] = -1
    return Call(f"aten.{target}.default", (draw.values(before), after))


def draw_flatten(draw: Draw) -> Call:
    shape = draw.shape(1, 4)
    first, last = sorted(draw.dim(shape) % len(shape) for _ in range(2))
    return Call("aten.flatten.using_ints", (draw.values(shape), first, last - draw.one_of(0, len(shape))))


def draw_unflatten(draw: Draw) -> Call:
    shape, sizes = draw.shape(), draw.shape(2, 2)
    dim = draw.dim(shape)
    shape[dim] = prod(sizes)
    asked = draw.one_of(sizes, [-1, sizes[1]], [sizes[0], -1])
    return Call("aten.unflatten.int", (draw.values(shape), dim, asked))


def draw_unsqueeze(draw: Draw) -> Call:
    shape = draw.shape()
    return Call("aten.unsqueeze.default", (draw.values(shape), draw.dim([1, *shape])))


def draw_squeeze(draw: Draw) -> Call:
    shape = draw.shape()
    overload, rest = draw.one_of(("default", ()), ("dim", (draw.dim(shape),)), ("dims", ([draw.dim(shape)],)))
    return Call(f"aten.squeeze.{overload}", (draw.values(shape), *rest))


def draw_transpose(draw: Draw) -> Call:
    shape = draw.shape()
    return Call("aten.transpose.int", (draw.values(shape), draw.dim(shape), draw.dim(shape)))


def draw_permute(draw: Draw) -> Call:
    shape = draw.shape()
    order = draw.draw(st.permutations(range(len(shape))))
    return Call("aten.permute.default", (draw.values(shape), [d - draw.one_of(0, len(shape)) for d in order]))


def draw_expand(draw: Draw) -> Call:
    shape = draw.shape()
    before = draw.stretched(shape)
    added = len(shape) - len(before)
    kept = [i >= added and before[i - added] == size for i, size in enumerate(shape)]
    sizes = [draw.one_of(size, -1) if keep else size for size, keep in zip(shape, kept, strict=True)]
    return Call("aten.expand.default", (draw.values(before), sizes))


def draw_type_as(draw: Draw) -> Call:
    other = draw.values(draw.shape(), dtype=draw.one_of(torch.float32, INT))
    return Call("aten.type_as.default", (draw.values(draw.shape()), other))


def draw_linear(draw: Draw) -> Call:
    n, k = draw.shape(2, 2)
    x, weight, bias = draw.values([*draw.shape(0, 2), k]), draw.values([n, k]), draw.values([n])
    return Call("aten.linear.default", (x, weight, *draw.one_of((), (bias,), (None,))))


def draw_matmul(draw: Draw) -> Call:
    m, k, n = draw.shape(3, 3)
    batch = draw.shape(0, 2)
    other = draw.one_of(batch, batch, draw.stretched(batch))
    return Call("aten.matmul.default", (draw.values([*batch, m, k]), draw.values([*other, k, n])))


def draw_product(target: str, draw: Draw) -> Call:
    m, k, n = draw.shape(3, 3)
    batch = draw.shape(1, 1) if target == "bmm" else []
    return Call(f"aten.{target}.default", (draw.values([*batch, m, k]), draw.values([*batch, k, n])))


def draw_embedding(draw: Draw) -> Call:
    weight = draw.values([draw.one_of(3, 4, 6), *draw.shape(1, 1)])
    tokens = draw.values(draw.shape(0, 2), dtype=INT)
    return Call("aten.embedding.default", (weight, tokens, *draw.one_of((), (2,))))


def draw_layer_norm(draw: Draw) -> Call:
    shape = draw.shape()
    normalized = shape[draw.dim(shape) % len(shape) :]
    weight, bias = draw.values(normalized), draw.values(normalized)
    affine = draw.one_of((weight, bias), (weight, None), (None, None))
    return Call("aten.layer_norm.default", (draw.values(shape), normalized, *affine, 1e-5, False))


def draw_cat(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    shapes = [[length if i == dim % len(shape) else size for i, size in enumerate(shape)] for length in draw.shape()]
    return Call("aten.cat.default", ([draw.values(s) for s in shapes], dim))


def draw_stack(draw: Draw) -> Call:
    shape = draw.shape()
    tensors = [draw.values(shape) for _ in range(draw.one_of(1, 2, 3))]
    return Call("aten.stack.default", (tensors, *draw.one_of((), (draw.dim([1, *shape]),))))


def draw_slice(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    start = draw.draw(st.integers(-shape[dim], shape[dim] - 1))
    end = draw.one_of(2**63 - 1, start % shape[dim] + 1)
    bounds = draw.one_of((), (dim,), (dim, start), (dim, start, end), (dim, None, None, 2), (dim, start, end, 2))
    return Call("aten.slice.Tensor", (draw.values(shape), *bounds))


def draw_select(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    return Call("aten.select.int", (draw.values(shape), dim, draw.draw(st.integers(-shape[dim], shape[dim] - 1))))


def draw_slice_scatter(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    start = draw.draw(st.integers(0, shape[dim] - 1))
    bounds = draw.one_of((start,), (start, start + 1), (start, 2**63 - 1, 2))
    x = draw.values(shape)
    part = torch.ops.aten.slice.Tensor(x, dim, *bounds)
    return Call("aten.slice_scatter.default", (x, draw.values(part.shape), dim, *bounds))


def draw_select_scatter(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    x, index = draw.values(shape), draw.draw(st.integers(-shape[dim], shape[dim] - 1))
    return Call("aten.select_scatter.default", (x, draw.values(x.select(dim, index).shape), dim, index))


def draw_index_put(draw: Draw) -> Call:
    shape = draw.shape(2, 3)
    x, index = draw.values(shape), torch.tensor(draw.one_of([0], [0, shape[1] - 1], [0, 0]))
    if draw.one_of(True, False):  # where an index comes twice, values are added rather than one of them taken
        return Call("aten.index_put.default", (x, [None, index], draw.values(x[:, index].shape), True))
    return Call("aten.index_put.default", (x, [index[:1]], draw.values(x[index[:1]].shape)))


def draw_split(target: str, draw: Draw) -> Call:
    shape = draw.shape()
    return Call(f"aten.{target}", (draw.values(shape), draw.one_of(1, 2, 3), *draw.one_of((), (draw.dim(shape),))))


def draw_split_with_sizes(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    first = draw.draw(st.integers(0, shape[dim]))
    return Call("aten.split_with_sizes.default", (draw.values(shape), [first, shape[dim] - first], dim))


def draw_narrow(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    start = draw.draw(st.integers(0, shape[dim] - 1))
    return Call("aten.narrow.default", (draw.values(shape), dim, start, shape[dim] - start))


def draw_unbind(draw: Draw) -> Call:
    shape = draw.shape()
    return Call("aten.unbind.int", (draw.values(shape), *draw.one_of((), (draw.dim(shape),))))


def draw_repeat_interleave(draw: Draw) -> Call:
    shape = draw.shape()
    x, times, dim = draw.values(shape), draw.one_of(1, 2, 3), draw.dim(shape)
    rest, kwargs = draw.one_of(((), {}), ((dim,), {}), ((dim,), {"output_size": times * shape[dim]}))
    return Call("aten.repeat_interleave.self_int", (x, times, *rest), kwargs)


def draw_attention(target: str, draw: Draw) -> Call:
    (b, kv_heads, groups), (length, d, e) = draw.shape(3, 3), draw.shape(3, 3)
    query, key = draw.values([b, kv_heads * groups, length, d]), draw.values([b, kv_heads, length, d])
    options = draw.one_of({}, {"window": 2}, {"softcap": 3.0}, {"implementation": "eager"})
    exact = target == ATTENTION and set(options) <= {"window"}
    value = draw.values([b, kv_heads, length, e])
    per_head = [] if target == ATTENTION else [draw.values([kv_heads * groups], dtype=torch.float32)]
    tolerance = 1e-9 if exact else 1e-5  # the others have their scores in float32
    return Call(target, (query, key, value, *per_head), {"scale": 0.5, **options}, tolerance)


def draw_topk(draw: Draw) -> Call:
    shape = draw.shape()
    dim = draw.dim(shape)
    options = draw.one_of((), (dim,), (dim, False), (dim, True, False))
    most = shape[dim] if options else shape[-1]
    return Call("aten.topk.default", (draw.values(shape), draw.draw(st.integers(1, most)), *options))


def draw_at_indices(target: str, draw: Draw) -> Call:
    """Of gather, and of scatter, whose indices are taken once each: where two meet, either value may be left."""
    shape = draw.shape()
    dim = draw.dim(shape) % len(shape)
    x, taken = draw.values(shape), draw.draw(st.integers(1, shape[dim]))
    indices = torch.rand(shape, generator=draw.generator).argsort(dim).narrow(dim, 0, taken)
    other = dim - 1
    if len(shape) > 1 and draw.one_of(False, True):  # there may be fewer indices than places
        indices = indices.narrow(other, 0, draw.draw(st.integers(1, indices.shape[other])))
    rest = {"gather.default": (), "scatter.value": (0.5,), "scatter.src": (draw.values(indices.shape),)}[target]
    return Call(f"aten.{target}", (x, dim, indices, *rest))


def draw_experts(draw: Draw) -> Call:
    (n, d, f), n_experts = draw.shape(3, 3), draw.one_of(1, 2, 4, 6)
    k, transposed, gated = draw.draw(st.integers(1, n_experts)), draw.one_of(False, True), draw.one_of(False, True)
    product = 2 * f if gated else f
    chosen = torch.rand(n, n_experts, generator=draw.generator).argsort(1)[:, :k]
    shapes = (
        [[n_experts, d, product], [n_experts, f, d]] if transposed else [[n_experts, product, d], [n_experts, d, f]]
    )
    shapes += draw.one_of([], [[n_experts, product], [n_experts, d]])
    tensors = (draw.values([n, d]), chosen, draw.values([n, k], low=0.0), *map(draw.values, shapes))
    options = {"activation": draw.one_of(*ACTIVATIONS), "gated": gated, "transposed": transposed}
    of_gate = draw.one_of({}, {"interleaved": True, "slope": 1.7, "limit": 1.0, "offset": 1.0}) if gated else {}
    return Call(EXPERTS, tensors, {**options, **of_gate})


def draw_balance(draw: Draw) -> Call:
    n, n_experts = draw.shape(2, 2)
    return Call(BALANCE, (draw.values([n, n_experts]), draw.draw(st.integers(1, n_experts))))


def draw_rms_norm(draw: Draw) -> Call:
    shape = draw.shape()
    options, tolerance = draw.one_of(({}, 1e-9), ({"offset": 1.0}, 1e-5))
    return Call(RMS_NORM, (draw.values(shape), draw.values(shape[-1:])), {"eps": 1e-5, **options}, tolerance)


def draw_loss(draw: Draw) -> Call:
    (b, length, d), (n,) = draw.shape(3, 3), draw.shape(1, 1)
    labels = draw.values([b, length], dtype=INT).clamp(max=n - 1)
    labels[draw.values([b, length], dtype=BOOL)] = -100
    args = (draw.values([b, length, d]), draw.values([n, d]), labels, -100)
    return Call(LOSS, args, draw.one_of({}, {"logit_softcap": 2.0}))


def draw_convolution(draw: Draw) -> Call:
    (b, channels, length), (k,) = draw.shape(3, 3), draw.shape(1, 1)
    bias = draw.one_of((), (draw.values([channels]),))
    x, weight = draw.values([b, channels, length]), draw.values([channels, k])
    return Call(CONVOLUTION, (x, weight, *bias), draw.one_of({}, {"silu": True}))


def draw_linear_attention(target: str, draw: Draw) -> Call:
    (b, length, key_heads), (groups, d, e) = draw.shape(3, 3), draw.shape(3, 3)
    query, key = (draw.values([b, length, key_heads, d]) for _ in range(2))
    value = draw.values([b, length, key_heads * groups, e])
    per_head = [draw.values([b, length, key_heads * groups]) for _ in range(2)]
    args = (query, key, value, -per_head[0].abs())
    if target == LINEAR_ATTENTION:
        return Call(target, args)
    return Call(target, (*args, per_head[1].sigmoid()), {"scale": 0.5, "normalized": draw.one_of(False, True)})


def draw_scan(draw: Draw) -> Call:
    (b, channels, length), (n,) = draw.shape(3, 3), draw.shape(1, 1)
    x, step = draw.values([b, channels, length]), draw.values([b, channels, length], low=0.1)
    B, C = (draw.values([b, n, length]) for _ in range(2))
    return Call(SCAN, (x, step, -draw.values([channels, n], low=0.1), B, C))


def draw_recurrence(draw: Draw) -> Call:
    shape = draw.shape(3, 3)
    return Call(RECURRENCE, (draw.values(shape).sigmoid(), draw.values(shape)))


def draw_baddbmm(draw: Draw) -> Call:
    (b, m, n), (k,) = draw.shape(3, 3), draw.shape(1, 1)
    bias = [draw.one_of(size, 1) for size in (b, m, n)]
    return Call("aten.baddbmm.default", (draw.values(bias), draw.values([b, m, k]), draw.values([b, k, n])))


CALLS: dict[str, MakeCall] = {
    **{name: unary(f"{name}.default") for name in ("neg", "cos", "sin", "exp", "square", "abs", "reciprocal", "tanh")},
    **{name: unary(f"{name}.default") for name in ("sigmoid", "silu", "relu", "erf", "detach", "alias")},
    **{name: unary(f"{name}.default", low=0.1) for name in ("sqrt", "rsqrt", "log")},
    **{name: unary(f"{name}.default", memory_format=(None, CONTIGUOUS)) for name in ("clone", "contiguous")},
    **{name: unary(f"{name}.default", dtype=(None, torch.float32)) for name in ("ones_like", "zeros_like")},
    **{name: unary(f"{name}.default", of=BOOL) for name in ("logical_not", "bitwise_not")},
    **{name: broadcast(f"{name}.default") for name in ("maximum", "minimum")},
    **{name: broadcast(f"{name}.Tensor", of=(BOOL, BOOL)) for name in ("bitwise_and", "bitwise_or")},
    **{name: comparison(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: partial(draw_view, name) for name in ("view", "reshape")},
    **{name: along_dim(f"{name}.int", (), (torch.float32,)) for name in ("softmax", "log_softmax")},
    **{name: reduction(name, "default") for name in ("amax", "amin")},
    **{name: partial(draw_product, name) for name in ("mm", "bmm")},
    "logical_and": broadcast("logical_and.default", of=(BOOL, BOOL)),
    "full_like": unary("full_like.default", (0.1,), (float("inf"),), (float("nan"),)),
    "gelu": unary("gelu.default", approximate=(None, "none", "tanh")),
    "leaky_relu": unary("leaky_relu.default", (), (0.3,)),
    "softplus": unary("softplus.default", (), (2,), (0.5, 1.5)),
    "dropout": unary("dropout.default", (0.0, True), (1.0, True)),
    "to": unary("to.dtype", (torch.float32,), (INT,), (torch.float16, False, True)),
    "clamp": unary("clamp.default", (0.1,), (None, 1), (-0.5, 0.5)),
    "clamp_min": unary("clamp_min.default", (0.1,), (float("-inf"),)),
    "add": alternatives(broadcast("add.Tensor"), broadcast("add.Tensor", alpha=2), unary("add.Tensor", (-1.5,), (2,))),
    "sub": alternatives(broadcast("sub.Tensor"), unary("sub.Tensor", (-1.5,), (2,))),
    "rsub": unary("rsub.Scalar", (2,), (-0.5,)),
    "mul": alternatives(broadcast("mul.Tensor"), unary("mul.Tensor", (-1.5,), (2,))),
    "div": alternatives(
        broadcast("div.Tensor", low=0.5),
        unary("div.Tensor", (-1.5,), (3,)),
        unary("div.Tensor_mode", (0.7,), rounding_mode=("floor", "trunc")),
    ),
    "pow": alternatives(
        unary("pow.Tensor_Scalar", (2,), (0.5,), (-1,), low=0.1),
        lambda draw: Call("aten.pow.Scalar", (2, draw.values(draw.shape()))),
        broadcast("pow.Tensor_Tensor", low=0.1),
    ),
    "where": alternatives(
        broadcast("where.self", of=(BOOL, FLOAT, FLOAT)),
        broadcast("where.ScalarOther", -1.5, of=(BOOL, FLOAT)),
        unary("where.Scalar", (1.0, float("-inf")), of=BOOL),
    ),
    "masked_fill": draw_masked_fill,
    "topk": draw_topk,
    "gather": partial(draw_at_indices, "gather.default"),
    "scatter": alternatives(*(partial(draw_at_indices, f"scatter.{name}") for name in ("value", "src"))),
    EXPERTS: draw_experts,
    BALANCE: draw_balance,
    "flatten": draw_flatten,
    "unflatten": draw_unflatten,
    "unsqueeze": draw_unsqueeze,
    "squeeze": draw_squeeze,
    "transpose": draw_transpose,
    "permute": draw_permute,
    "t": lambda draw: Call("aten.t.default", (draw.values(draw.shape(1, 2)),)),
    "expand": draw_expand,
    "type_as": draw_type_as,
    "linear": draw_linear,
    "matmul": draw_matmul,
    "baddbmm": draw_baddbmm,
    "embedding": draw_embedding,
    "layer_norm": draw_layer_norm,
    "cumsum": along_dim("cumsum.default"),
    "sum": reduction("sum", "dim_IntList", "default"),
    "mean": reduction("mean", "dim", "default"),
    "cat": draw_cat,
    "stack": draw_stack,
    "slice": draw_slice,
    "select": draw_select,
    "slice_scatter": draw_slice_scatter,
    "select_scatter": draw_select_scatter,
    "index_put": draw_index_put,
    "chunk": partial(draw_split, "chunk.default"),
    "split": partial(draw_split, "split.Tensor"),
    "split_with_sizes": draw_split_with_sizes,
    "narrow": draw_narrow,
    "unbind": draw_unbind,
    "outer": lambda draw: Call("aten.outer.default", (draw.values(draw.shape(1, 1)), draw.values(draw.shape(1, 1)))),
    "tril": lambda draw: Call("aten.tril.default", (draw.values(draw.shape(2, 3)), *draw.one_of((), (-1,)))),
    "triu": lambda draw: Call("aten.triu.default", (draw.values(draw.shape(2, 3)), *draw.one_of((), (1,)))),
    "lift_fresh_copy": unary("lift_fresh_copy.default"),
    "repeat_interleave": draw_repeat_interleave,
    "arange": alternatives(out_of_nothing("arange.default", (5,)), out_of_nothing("arange.start", (2, 7))),
    "ones": out_of_nothing("ones.default", ([2, 3],), ([4],)),
    "zeros": out_of_nothing("zeros.default", ([2, 3],), ([4],)),
    "full": out_of_nothing("full.default", ([2, 3], 0.1), ([4], float("-inf")), ([4], 2)),
    "scalar_tensor": out_of_nothing("scalar_tensor.default", (0.1,), (float("nan"),)),
    **{name: partial(draw_attention, name) for name in (ATTENTION, ALIBI, SINKS)},
    RMS_NORM: draw_rms_norm,
    LOSS: draw_loss,
    CONVOLUTION: draw_convolution,
    **{name: partial(draw_linear_attention, name) for name in (DELTA_RULE, LINEAR_ATTENTION)},
    SCAN: draw_scan,
    RECURRENCE: draw_recurrence,
    ROOT: lambda draw: Call(ROOT, (draw.values(draw.shape(3, 3), low=0.1),)),
}
UNKNOWN: dict[str, MakeCall] = {  # operators that have no entry at all
    "roll": lambda draw: Call("aten.roll.default", (draw.values(draw.shape()), [1], [0])),
    "cummax": lambda draw: Call("aten.cummax.default", (draw.values(draw.shape()), -1)),
}


# --- partitions are right ------------------------------------------------------------------------------------------


def put_together(parts: list[torch.Tensor], placement: Placement, like: torch.Tensor) -> torch.Tensor:
    """What the ranks of a split operator have together: what several have in one place is a sum."""
    total, places = torch.zeros_like(like).flatten(), torch.arange(like.numel()).view(like.shape)
    for rank, found in enumerate(parts):
        total.index_add_(0, part_of(places, placement, rank, len(parts)).flatten(), found.to(like.dtype).flatten())
    return total.view(like.shape)


def rank_op(op: Op, partition: Partition, n_ranks: int) -> Op:
    """The op as generated code has it, its arguments in one rank's sizes."""
    graph = Graph("Model", tuple(op.inputs), op.outputs[0], {}, {}, (op,), (), "")
    local = localize(graph, Assignment(n_ranks, {op: partition}))
    return next(item for item in local.body if item.target == op.target)


def with_gradients(
    op: Op, values: list[torch.Tensor], arriving: list[torch.Tensor], rank: int = 0, n_ranks: int = 1
) -> tuple[list, list]:
    """The op's outputs, and its inputs' gradients when `arriving` are its outputs'; None for what has none."""
    leaves = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in values]
    outputs = compute(op, leaves, rank, n_ranks)
    trained = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not trained:
        return outputs, [None] * len(values)
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    roots, seeds = [outputs[i] for i in trained], [arriving[i] for i in trained]
    found = iter(torch.autograd.grad(roots, floating, seeds, allow_unused=True, materialize_grads=True))
    return [y.detach() for y in outputs], [next(found) if leaf.requires_grad else None for leaf in leaves]


def check_partition(op: Op, values: list[torch.Tensor], partition: Partition, n_ranks: int, tolerance: float) -> None:
    """Every rank computes its part; together they have the whole outputs and the whole gradients."""
    same = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, equal_nan=True)
    generator = torch.Generator().manual_seed(0)
    arriving = [torch.randn(t.shape, generator=generator, dtype=FLOAT).to(t.dtype) for t in op.outputs]
    outputs, gradients = with_gradients(op, values, arriving)

    local = rank_op(op, partition, n_ranks)
    assert [t.shape for t in local.inputs] == [
        part_of(v, p, 0, n_ranks).shape for v, p in zip(values, partition.inputs, strict=True)
    ]
    ranks = []
    for rank in range(n_ranks):
        parts = [part_of(v, p, rank, n_ranks) for v, p in zip(values, partition.inputs, strict=True)]
        seeds = [part_of(g, p, rank, n_ranks) for g, p in zip(arriving, partition.outputs, strict=True)]
        ranks.append(with_gradients(local, parts, seeds, rank, n_ranks))

    sides = [(partition.outputs, outputs, [found for found, _ in ranks])]
    sides.append((partition.inputs, gradients, [found for _, found in ranks]))
    for placements, expected, found in sides:
        for i, placement in enumerate(placements):
            of_ranks = [values[i] for values in found]
            if expected[i] is None:
                continue
            if partition.dim is None:
                for value in of_ranks:
                    same(value, expected[i])
            elif expected[i].dtype is BOOL:
                for rank, value in enumerate(of_ranks):
                    same(value, part_of(expected[i], placement, rank, n_ranks))
            else:
                same(put_together(of_ranks, placement, expected[i]), expected[i])


@pytest.mark.parametrize("name", [*CALLS, *UNKNOWN])
@settings(deadline=None, max_examples=20)
@given(data=st.data(), n_ranks=st.sampled_from([2, 3, 4]))
def test_ranks_compute_the_whole_and_its_gradients_together_under_every_partition_offered(name, data, n_ranks):
    draw = Draw(data)
    call = (CALLS | UNKNOWN)[name](draw)
    op, values = as_op(call)
    lengths = {size for tensor in op.inputs for size in tensor.shape} or {1}
    row = Row(draw.one_of(*sorted(lengths)), draw.one_of(False, True), draw.one_of(1, 2) if n_ranks == 4 else 1)
    for partition in legal_partitions(op, n_ranks, row):
        if ring_of(op, partition) is None:  # ranks pass parts round in test_ring.py, each in a thread of its own
            check_partition(op, values, partition, n_ranks, call.tolerance)


# --- what is offered, and what never is ----------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def offered(target: str, *args: Any, n_ranks: int = 2, **kwargs: Any) -> list[str]:
    """The split partitions that an op is offered, written 'S0 R -> S0'; the whole one is offered always."""
    op, _ = as_op(Call(target, args, kwargs))
    whole, *split = legal_partitions(op, n_ranks)
    assert whole == Partition(None, (REPLICATE,) * len(op.inputs), (REPLICATE,) * len(op.outputs))
    return sorted(f"{' '.join(map(str, p.inputs))} -> {' '.join(map(str, p.outputs))}" for p in split)


X, Y, MASK = zeros(2, 4, 6), zeros(2, 4, 6), zeros(2, 4, 6, dtype=BOOL)  # shapes that 2 ranks share in every dimension
TOKENS = zeros(2, 4, dtype=INT)
UNARY_NAMES = (
    "neg cos sin exp sqrt rsqrt square abs reciprocal log tanh sigmoid silu relu gelu leaky_relu softplus erf "
)
UNARY_NAMES += "contiguous clone detach alias ones_like zeros_like logical_not"
EVERY_DIM, IN_BOTH = "S0 -> S0, S1 -> S1, S2 -> S2", "S0 S0 -> S0, S1 S1 -> S1, S2 S2 -> S2"
HEADS = (zeros(2, 6, 2, 8), zeros(2, 6, 2, 8), zeros(2, 6, 4, 2))  # 4 value heads for 2 key heads
ONE_KEY_HEAD = (zeros(2, 6, 1, 8), zeros(2, 6, 1, 8), zeros(2, 6, 4, 2))
QUERY, KEY, GROUPED = zeros(2, 4, 6, 8), zeros(2, 4, 6, 8), zeros(2, 2, 6, 8)
OFFERED = [
    *((f"aten.{name}.default", (X,), EVERY_DIM) for name in UNARY_NAMES.split()),
    ("aten.bitwise_not.default", (MASK,), EVERY_DIM),
    ("aten.clamp.default", (X, 0.0), EVERY_DIM),
    ("aten.clamp_min.default", (X, 0.0), EVERY_DIM),
    ("aten.full_like.default", (X, 0.5), EVERY_DIM),
    ("aten.to.dtype", (X, torch.float32), EVERY_DIM),
    ("aten.dropout.default", (X, 0.5, True), EVERY_DIM),
    ("aten.rsub.Scalar", (X, 2), EVERY_DIM),
    ("aten.pow.Tensor_Scalar", (X, 2), EVERY_DIM),
    *((f"aten.{name}.Tensor", (X, Y), IN_BOTH) for name in ("add", "sub", "mul", "div")),
    *((f"aten.{name}.Scalar", (X, 1), EVERY_DIM) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    ("aten.maximum.default", (X, zeros(4, 1)), "S0 R -> S0, S1 S0 -> S1, S2 R -> S2"),
    ("aten.minimum.default", (zeros(6), X), "R S0 -> S0, R S1 -> S1, S0 S2 -> S2"),
    ("aten.bitwise_and.Tensor", (MASK, MASK[:, :1]), "S0 S0 -> S0, S1 R -> S1, S2 S2 -> S2"),
    ("aten.bitwise_or.Tensor", (MASK, MASK[0]), "S0 R -> S0, S1 S0 -> S1, S2 S1 -> S2"),
    ("aten.logical_and.default", (MASK, MASK[0, 0]), "S0 R -> S0, S1 R -> S1, S2 S0 -> S2"),
    ("aten.where.self", (MASK, X[:1], zeros()), "S0 R R -> S0, S1 S1 R -> S1, S2 S2 R -> S2"),
    ("aten.masked_fill.Scalar", (X, MASK[0], 0.0), "S0 R -> S0, S1 S0 -> S1, S2 S1 -> S2"),
    ("aten.expand.default", (zeros(4, 1), [2, 4, 6]), "S0 -> S1"),
    ("aten.type_as.default", (X, zeros(2)), "S0 R -> S0, S1 R -> S1, S2 R -> S2"),
    ("aten.view.default", (X, [2, 4, 2, 3]), EVERY_DIM),
    ("aten.view.default", (X, [8, 6]), "S0 -> S0, S2 -> S1"),
    ("aten.reshape.default", (zeros(2, 4, 2, 3), [2, 4, -1]), EVERY_DIM),
    ("aten.reshape.default", (zeros(4, 6), [6, 4]), ""),
    ("aten.flatten.using_ints", (X, 1), "S0 -> S0, S1 -> S1"),
    ("aten.unflatten.int", (X, -1, [-1, 3]), EVERY_DIM),
    ("aten.unflatten.int", (X, -1, [2, 3]), "S0 -> S0, S1 -> S1"),
    ("aten.unsqueeze.default", (X, 1), "S0 -> S0, S1 -> S2, S2 -> S3"),
    ("aten.squeeze.dim", (zeros(2, 1, 4), 1), "S0 -> S0, S2 -> S1"),
    ("aten.transpose.int", (X, 1, 2), "S0 -> S0, S1 -> S2, S2 -> S1"),
    ("aten.permute.default", (X, [2, 0, 1]), "S0 -> S1, S1 -> S2, S2 -> S0"),
    ("aten.t.default", (zeros(2, 4),), "S0 -> S1, S1 -> S0"),
    ("aten.linear.default", (X, zeros(8, 6)), "R S0 -> S2, S0 R -> S0, S1 R -> S1, S2 S1 -> P"),
    ("aten.linear.default", (X, zeros(8, 6), zeros(8)), "R S0 S0 -> S2, S0 R R -> S0, S1 R R -> S1"),
    ("aten.matmul.default", (X, zeros(2, 6, 8)), "R S2 -> S2, S0 S0 -> S0, S1 R -> S1, S2 S1 -> P"),
    ("aten.bmm.default", (X, zeros(2, 6, 8)), "R S2 -> S2, S0 S0 -> S0, S1 R -> S1, S2 S1 -> P"),
    ("aten.mm.default", (zeros(4, 6), zeros(6, 8)), "R S1 -> S1, S0 R -> S0, S1 S0 -> P"),
    ("aten.embedding.default", (zeros(8, 6), TOKENS), "R S0 -> S0, R S1 -> S1, S1 R -> S2"),
    ("aten.layer_norm.default", (X, [6], zeros(6), zeros(6), 1e-5), "S0 R R -> S0, S1 R R -> S1"),
    ("aten.softmax.int", (X, -1), "S0 -> S0, S1 -> S1"),
    ("aten.log_softmax.int", (X, 1), "S0 -> S0, S2 -> S2"),
    ("aten.cumsum.default", (X, 0), "S1 -> S1, S2 -> S2"),
    ("aten.sum.default", (X,), "S0 -> P, S1 -> P, S2 -> P"),
    ("aten.sum.dim_IntList", (X, [1]), "S0 -> S0, S1 -> P, S2 -> S1"),
    ("aten.mean.dim", (X, [-1], True), "S0 -> S0, S1 -> S1"),
    ("aten.amax.default", (X, [1]), "S0 -> S0, S2 -> S1"),
    ("aten.amin.default", (X, [0, 1]), "S2 -> S0"),
    ("aten.cat.default", ([X, Y], 1), "S0 S0 -> S0, S2 S2 -> S2"),
    ("aten.stack.default", ([X, Y], 1), "S0 S0 -> S0, S1 S1 -> S2, S2 S2 -> S3"),
    ("aten.slice.Tensor", (X, 1, 0, 2), "S0 -> S0, S2 -> S2"),
    ("aten.select.int", (X, 1, 0), "S0 -> S0, S2 -> S1"),
    ("aten.slice_scatter.default", (X, zeros(2, 2, 6), 1, 0, 2), "S0 S0 -> S0, S2 S2 -> S2"),
    ("aten.select_scatter.default", (X, zeros(2, 6), 1, 0), "S0 S0 -> S0, S2 S1 -> S2"),
    ("aten.index_put.default", (X, [TOKENS[0]], zeros(4, 4, 6)), ""),
    ("aten.narrow.default", (X, 1, 0, 2), "S0 -> S0, S2 -> S2"),
    ("aten.unbind.int", (zeros(4, 2), 1), "S0 -> S0 S0"),
    ("aten.outer.default", (zeros(4), zeros(6)), "R S0 -> S1, S0 R -> S0"),
    ("aten.tril.default", (X,), "S0 -> S0"),
    ("aten.topk.default", (X, 2), "S0 -> S0 S0, S1 -> S1 S1"),
    ("aten.gather.default", (X, 2, zeros(2, 4, 4, dtype=INT)), "S0 S0 -> S0, S1 S1 -> S1"),
    ("aten.gather.default", (X, 2, zeros(1, 4, 6, dtype=INT)), "S1 S1 -> S1"),
    ("aten.scatter.value", (X, 1, zeros(2, 2, 6, dtype=INT), 0.5), "S0 S0 -> S0, S2 S2 -> S2"),
    ("aten.scatter.src", (X, 1, zeros(2, 2, 6, dtype=INT), Y), "S0 S0 S0 -> S0, S2 S2 S2 -> S2"),
    ("aten.triu.default", (X,), "S0 -> S0"),
    ("aten.lift_fresh_copy.default", (X,), EVERY_DIM),
    ("aten.chunk.default", (X, 2, -1), "S0 -> S0 S0, S1 -> S1 S1"),
    ("aten.split.Tensor", (X, 4, -1), "S0 -> S0 S0, S1 -> S1 S1"),
    ("aten.split_with_sizes.default", (X, [1, 1], 0), "S1 -> S1 S1, S2 -> S2 S2"),
    ("aten.repeat_interleave.self_int", (X, 3, 1), EVERY_DIM),
    ("aten.arange.default", (4,), ""),
    ("aten.ones.default", ([4, 4],), ""),
    ("aten.zeros.default", ([4, 4],), ""),
    ("aten.full.default", ([4, 4], 1.0), ""),
    ("aten.scalar_tensor.default", (1.0,), ""),
    (
        ATTENTION,
        (zeros(2, 4, 6, 8), zeros(2, 4, 6, 8), zeros(2, 4, 6, 2), 1.0),
        "S0 S0 S0 -> S0, S1 S1 S1 -> S2, S2 R R -> S1",
    ),
    (ALIBI, (QUERY, KEY, KEY, zeros(4), 1.0), "S0 S0 S0 R -> S0, S1 S1 S1 S0 -> S2, S2 R R R -> S1"),
    (SINKS, (QUERY, KEY, KEY, zeros(4), 1.0), "S0 S0 S0 R -> S0, S1 S1 S1 S0 -> S2, S2 R R R -> S1"),
    (RMS_NORM, (X, zeros(6), 1e-5), "S0 R -> S0, S1 R -> S1"),
    (LOSS, (X, zeros(8, 6), TOKENS), "S0 R S0 -> S0, S1 R S1 -> S1"),
    (
        EXPERTS,
        (zeros(4, 6), zeros(4, 2, dtype=INT), zeros(4, 2), zeros(2, 8, 6), zeros(2, 6, 4)),
        "R R R S0 S0 -> P, S0 S0 S0 R R -> S0",
    ),
    (BALANCE, (zeros(4, 6), 2), "S0 -> P"),
    ("aten.baddbmm.default", (zeros(2, 1, 8), X, zeros(2, 6, 8)), "R S1 R -> S1, S0 S0 S0 -> S0, S2 R S2 -> S2"),
    (CONVOLUTION, (X, zeros(4, 2), zeros(4)), "S0 R R -> S0, S1 S0 S0 -> S1"),
    (DELTA_RULE, (*HEADS, zeros(2, 6, 4), zeros(2, 6, 4), 1.0), "S0 S0 S0 S0 S0 -> S0, S2 S2 S2 S2 S2 -> S2"),
    (LINEAR_ATTENTION, (*HEADS, zeros(2, 6, 4)), "S0 S0 S0 S0 -> S0, S2 S2 S2 S2 -> S2"),
    (LINEAR_ATTENTION, (*ONE_KEY_HEAD, zeros(2, 6, 4)), "R R S2 S2 -> S2, S0 S0 S0 S0 -> S0"),
    (SCAN, (X, X, zeros(4, 2), zeros(2, 2, 6), zeros(2, 2, 6)), "S0 S0 R S0 S0 -> S0, S1 S1 S0 R R -> S1"),
    (RECURRENCE, (X, Y), "S0 S0 -> S0, S2 S2 -> S2"),
    (ROOT, (X,), EVERY_DIM),
]


def name_of(target: str) -> str:
    return target.split(".")[1] if target.startswith("aten.") else target


@pytest.mark.parametrize(("target", "args", "expected"), OFFERED, ids=[target for target, _, _ in OFFERED])
def test_an_operator_is_offered_the_partitions_that_are_right_and_no_other(target, args, expected):
    assert offered(target, *args) == [text for text in expected.split(", ") if text]


def test_every_operator_of_the_tables_is_tested():
    ours = {ATTENTION, ALIBI, SINKS, RMS_NORM, LOSS, CONVOLUTION, DELTA_RULE, LINEAR_ATTENTION, SCAN, RECURRENCE, ROOT}
    known = {*aten.ATEN, *ours, EXPERTS, BALANCE}
    assert set(CALLS) == known
    assert {name_of(target) for target, _, _ in OFFERED} == known


NEVER = {  # what an operator works across: input i is never split along dimension d
    "softmax over its dimension": ("aten.softmax.int", (X, 1), 0, 1),
    "log_softmax over its dimension": ("aten.log_softmax.int", (X, -1), 0, 2),
    "a cumulative sum along its dimension": ("aten.cumsum.default", (X, 1), 0, 1),
    "a mean over its dimension": ("aten.mean.dim", (X, [-1], True), 0, 2),
    "a mean over all": ("aten.mean.default", (X,), 0, 0),
    "a maximum over its dimension": ("aten.amax.default", (X, [1]), 0, 1),
    "a minimum over its dimension": ("aten.amin.default", (X, [-2]), 0, 1),
    "layer norm over what it normalizes": ("aten.layer_norm.default", (X, [4, 6]), 0, 1),
    "layer norm's weight": ("aten.layer_norm.default", (X, [6], zeros(6)), 1, 0),
    "RMSNorm over what it normalizes": (RMS_NORM, (X, zeros(6), 1e-5), 0, 2),
    "RMSNorm's weight": (RMS_NORM, (X, zeros(6), 1e-5), 1, 0),
    "attention along the keys": (ATTENTION, (QUERY, KEY, KEY, 1.0), 1, 2),
    "attention inside a head": (ATTENTION, (QUERY, KEY, KEY, 1.0), 0, 3),
    "attention inside a value's head": (ATTENTION, (QUERY, KEY, KEY, 1.0), 2, 3),
    "a slice along its dimension": ("aten.slice.Tensor", (X, 1, 0, 2), 0, 1),
    "a step along its dimension": ("aten.slice.Tensor", (X, 1, None, None, 2), 0, 1),
    "the choice of an index along its dimension": ("aten.select.int", (X, 1, 0), 0, 1),
    "a concatenation along its dimension": ("aten.cat.default", ([X, Y], 1), 0, 1),
    "chunks along their dimension": ("aten.chunk.default", (X, 2, 1), 0, 1),
    "parts along their dimension": ("aten.split.Tensor", (X, 2, 1), 0, 1),
    "parts of given sizes along their dimension": ("aten.split_with_sizes.default", (X, [2, 2], 1), 0, 1),
    "the inner dimension of a product with a bias": ("aten.linear.default", (X, zeros(8, 6), zeros(8)), 0, 2),
    "an embedding along the vocabulary": ("aten.embedding.default", (zeros(8, 6), TOKENS), 0, 0),
    "the loss along the vocabulary": (LOSS, (X, zeros(8, 6), TOKENS), 1, 0),
    "the loss along the hidden size": (LOSS, (X, zeros(8, 6), TOKENS), 0, 2),
    "an inner factor of what a reshape merges": ("aten.view.default", (X, [2, 24]), 0, 2),
    "an inner factor of what flatten merges": ("aten.flatten.using_ints", (X, 0, 1), 0, 1),
    "dimensions that a reshape mixes": ("aten.reshape.default", (zeros(4, 6), [6, 4]), 0, 0),
    "what squeezing would drop if it had length 1": ("aten.squeeze.default", (X,), 0, 0),
    "what repeat_interleave flattens": ("aten.repeat_interleave.self_int", (X, 2), 0, 0),
}


@pytest.mark.parametrize(("target", "args", "i", "dim"), NEVER.values(), ids=NEVER)
def test_a_dimension_that_an_operator_works_across_is_never_split(target, args, i, dim):
    op, _ = as_op(Call(target, args))
    assert op.inputs[i].shape[dim] % 2 == 0
    assert all(partition.inputs[i] != Shard(dim) for partition in legal_partitions(op, 2))


def test_grouped_queries_are_split_with_the_keys_that_they_share_and_by_neighbours_where_ranks_are_more_than_keys():
    grouped = (QUERY, GROUPED, GROUPED, 1.0)  # 4 heads, 2 key-value heads
    assert offered(ATTENTION, *grouped, n_ranks=2) == ["S0 S0 S0 -> S0", "S1 S1 S1 -> S2", "S2 R R -> S1"]
    assert offered(ATTENTION, *grouped, n_ranks=4) == ["S1 S1 x2 S1 x2 -> S2"]
    one_key = (QUERY, zeros(2, 1, 6, 8), zeros(2, 1, 6, 8), 1.0)
    assert offered(ATTENTION, *one_key, n_ranks=4) == ["S1 R R -> S2"]
    odd = (zeros(1, 6, 5, 8), zeros(1, 3, 5, 8), zeros(1, 3, 5, 8), 1.0)  # half of a key's queries are no whole head
    assert offered(ATTENTION, *odd, n_ranks=12) == offered(ATTENTION, *odd, n_ranks=2) == []
    assert offered(ATTENTION, *odd, n_ranks=5) == ["S2 R R -> S1"]


def test_a_dimension_that_the_ranks_can_not_share_evenly_is_not_split():
    x = zeros(3, 4, 6)
    assert offered("aten.neg.default", x, n_ranks=2) == ["S1 -> S1", "S2 -> S2"]
    assert offered("aten.neg.default", x, n_ranks=3) == ["S0 -> S0", "S2 -> S2"]
    assert offered("aten.neg.default", x, n_ranks=4) == ["S1 -> S1"]
    assert offered("aten.neg.default", x, n_ranks=5) == []
    assert offered("aten.neg.default", x, n_ranks=1) == []


@pytest.mark.parametrize(
    ("target", "args"),
    [("aten.roll.default", (X, [1], [0])), ("aten.cummax.default", (X, 2)), ("aten.flip.default", (X, [0]))],
)
def test_an_unknown_operator_is_computed_by_every_rank(target, args):
    op, _ = as_op(Call(target, args))
    assert not is_known(op)
    assert offered(target, *args) == []


def test_products_of_shapes_that_broadcast_are_computed_by_every_rank():
    assert offered("aten.matmul.default", X, zeros(6, 8)) == []
    assert offered("aten.matmul.default", zeros(2, 2, 4, 6), zeros(1, 2, 6, 8)) == []


# --- Python --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALLS, *UNKNOWN])
@settings(deadline=None, max_examples=20)
@given(data=st.data(), binding=st.sampled_from([ATOM, UNARY, PRODUCT, SUM]))
def test_the_python_of_an_operator_computes_it_bit_for_bit(name, data, binding):
    """Whatever its tensors are written as: a name, or an expression that stands in for one."""
    call = (CALLS | UNKNOWN)[name](Draw(data))
    op, values = as_op(call)
    namespace = {"torch": torch, "F": F, "device": torch.device("cpu")}
    namespace |= {registered.fn.__name__: registered.fn for registered in REGISTERED_OPS.values()}
    names: dict[Tensor, Expression] = {}
    for tensor, value in zip(op.inputs, values, strict=True):
        names[tensor] = Expression(tensor.name)
        namespace[tensor.name] = value
        if tensor.requires_grad and binding != ATOM:
            texts = {UNARY: f"-{tensor.name}", PRODUCT: f"{tensor.name} * 2", SUM: f"{tensor.name} + {tensor.name}"}
            names[tensor] = Expression(texts[binding], binding)
            namespace[tensor.name] = -value if binding == UNARY else value / 2

    written = write_expression(op, Values(names.__getitem__, "device"))
    torch.manual_seed(0)
    found = as_list(eval(written.text, namespace))

    torch.testing.assert_close(found, compute(op, values), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("binding", [ATOM, UNARY, PRODUCT, SUM])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "neg", "tanh", "slice", "to"])
def test_the_python_of_an_operator_can_stand_within_any_other(name, binding):
    """What is written for an op says how tightly it binds, so that parentheses go where they must."""
    x, y = torch.tensor([3.0, -5.0], dtype=FLOAT), torch.tensor([7.0, 0.5], dtype=FLOAT)
    rests = {"add": (y,), "sub": (y,), "mul": (y,), "div": (y,), "slice": (0, 0, 1), "to": (torch.float32,)}
    overloads = {"neg": "default", "tanh": "default", "to": "dtype"}
    call = Call(f"aten.{name}.{overloads.get(name, 'Tensor')}", (x, *rests.get(name, ())))
    op, values = as_op(call)
    namespace = {t.name: value for t, value in zip(op.inputs, values, strict=True)}
    namespace["torch"] = torch
    (result,) = compute(op, values)
    written = write_expression(op, Values(lambda tensor: Expression(tensor.name), "device"))
    around = {ATOM: "{}.abs()", UNARY: "-{}", PRODUCT: "3 / {}", SUM: "3 - {}"}[binding]
    within = {ATOM: ATOM, UNARY: UNARY, PRODUCT: PRODUCT + 1, SUM: SUM + 1}[binding]
    found = eval(around.format(written.within(within)), namespace)
    torch.testing.assert_close(found, eval(around.format("result"), {"result": result}), rtol=0, atol=0)


def test_a_registered_op_is_called_by_its_name_with_its_own_arguments():
    op, _ = as_op(Call(ATTENTION, (QUERY, KEY, KEY), {"scale": 0.5, "window": 3}))
    written = write_expression(op, Values(lambda tensor: Expression(tensor.name), "device"))
    assert written.text == "attention(x1, x2, x3, scale=0.5, window=3)"
    assert attention is REGISTERED_OPS[ATTENTION].fn


# --- random numbers ------------------------------------------------------------------------------------------------


def noisy(x: torch.Tensor) -> torch.Tensor:
    """A function of a user's, of which nothing is known."""
    return x + torch.rand_like(x)


def test_an_op_that_may_draw_random_numbers_is_recognized(monkeypatch):
    monkeypatch.setitem(REGISTERED_OPS, target_of(noisy), REGISTERED_OPS[LOSS])
    register_op("* -> *")(noisy)
    drawing = [
        ("aten.dropout.default", {}),
        ("aten.bernoulli.p", {}),
        (target_of(noisy), {}),
        (ATTENTION, {"dropout": 0.1}),
    ]
    others = [("aten.linear.default", {}), (ATTENTION, {"scale": 1.0}), (ATTENTION, {"dropout": 0.0}), (RMS_NORM, {})]
    others += [(LOSS, {}), ("longctx.runtime.collectives.all_gather", {"dim": 0})]
    for target, kwargs in drawing + others:
        found = spec_of(op := Op(target, (), kwargs, (), "", None)).draws_random(op)
        assert found == ((target, kwargs) in drawing), target
