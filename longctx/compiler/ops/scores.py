"""Attention that a model writes out in PyTorch's operators: which ones it is made of, and what it does to the scores.

    scores = query @ key.transpose(-1, -2)
    scores = scores / 8 + mask                # any steps that leave the scores factor * scores + bias, or soft-cap them
    output = softmax(scores, dim=-1) @ value  # casts, dropout and views may stand between

The steps are not matched against a list of ways to write them. They are run, on a factor and a bias instead of scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from longctx.compiler.ir import Op, Tensor
from longctx.compiler.ops import aten
from longctx.compiler.ops.aten import base_name
from longctx.compiler.ops.positions import Positions, broadcast
from longctx.compiler.ops.python import with_defaults

_PRODUCTS = ("matmul", "bmm", "baddbmm")
_LAYOUTS = ("view", "_unsafe_view", "reshape", "flatten", "unsqueeze", "squeeze", "contiguous", "clone", "alias")
_NO_BOUND = -1e30  # a bound below this bounds no score


@dataclass(frozen=True)
class WrittenAttention:
    """Attention in the operators of a model.

    Attributes:
        query: [*, l, d].
        key_transposed: [*, d, l]. Its leading dimensions are as many as query's or are broadcast.
        value: [*, l, e], likewise.
        steps: what makes the softmax's input, the product of query and key first.
        dropout: the probability that an attention weight is dropped.
        result: the product of the weights and value, [*, l, e].
    """

    query: Tensor
    key_transposed: Tensor
    value: Tensor
    steps: tuple[Op, ...]
    dropout: float
    result: Op

    @property
    def heads(self) -> int:
        """How many heads there are; the leading dimensions before them, a batch's, have length 1 in a trace."""
        return prod(self.steps[0].outputs[0].shape[:-2])


@dataclass(frozen=True)
class Scores:
    """Scores as the softmax takes them, at chosen queries and keys: factor * (query . key) + bias, float64 each.

    Where there is a soft-cap they are factor * tanh(inner * (query . key)) + bias. `factor` and `bias` are
    [heads, queries, keys].
    """

    factor: torch.Tensor
    bias: torch.Tensor
    inner: torch.Tensor | None = None


class UnknownStepError(Exception):
    """Something happens to the scores that leaves no factor and bias."""


def find_attention(
    softmax: Op, makers: Mapping[Tensor, Op], users: Mapping[Tensor, Sequence[Op]]
) -> WrittenAttention | None:
    """The attention of which an operator is the softmax; None if it is no softmax, or that of something else.

    Args:
        makers: the operator that makes each tensor.
        users: the operators that read each tensor, of those on which the loss depends.
    """
    if base_name(softmax) not in ("softmax", "_softmax"):
        return None
    shape = softmax.outputs[0].shape
    if len(shape) < 3 or shape[-1] != shape[-2] or softmax.args[1] not in (-1, len(shape) - 1):
        return None
    steps = _steps_before(softmax.args[0], makers)
    after = _steps_after(softmax.outputs[0], users)
    if not steps or not after:
        return None
    *between, result = after
    dropped = [op.args[1] for op in between if base_name(op) == "dropout"]
    if len(dropped) > 1:
        return None
    query, key_transposed = steps[0].args[-2:]
    return WrittenAttention(query, key_transposed, result.args[1], steps, sum(dropped), result)


def _steps_before(tensor: Tensor, makers: Mapping[Tensor, Op]) -> tuple[Op, ...]:
    """What makes the softmax's input, the product first; empty if that is no chain of operators on scores."""
    steps: list[Op] = []
    while (op := makers.get(tensor)) is not None:
        steps.append(op)
        if base_name(op) in _PRODUCTS:
            return tuple(reversed(steps))
        scores = [t for t in op.inputs if t.requires_grad]  # a mask and a bias of positions want no gradient
        if len(scores) != 1 or scores[0].shape[-2:] != tensor.shape[-2:]:
            break
        tensor = scores[0]
    return ()


def _steps_after(tensor: Tensor, users: Mapping[Tensor, Sequence[Op]]) -> list[Op]:
    """What becomes of the softmax's output up to its product with the values; empty if that is anything more."""
    steps: list[Op] = []
    while len(readers := users.get(tensor, ())) == 1:
        (op,) = readers
        steps.append(op)
        if base_name(op) in ("matmul", "bmm"):
            return steps if op.args[0] is tensor and op.args[1] is not tensor else []
        if base_name(op) not in (*aten.CASTS, *_LAYOUTS, "dropout", "expand"):
            break
        tensor = op.outputs[0]
        if tensor.shape[-2:] != op.inputs[0].shape[-2:]:
            break
    return []


# --- what the steps do -----------------------------------------------------------------------------------------------


def scores_at(attention: WrittenAttention, positions: Positions, queries: torch.Tensor, keys: torch.Tensor) -> Scores:
    """What the softmax takes, at the crossings of some queries and keys, int64 each.

    Raises:
        UnknownStepError: a step leaves no factor and bias.
        UnknownValueError: a step takes something that depends on tokens or weights.
    """
    shape = (attention.heads, len(queries), len(keys))
    scores = Scores(torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
    product, *steps = attention.steps

    def value(operand: Tensor | float, op: Op) -> torch.Tensor:
        """An operand at these queries and keys, [heads, queries, keys] or without dimensions."""
        if not isinstance(operand, Tensor):
            return torch.tensor(operand, dtype=torch.float64)
        return values_at(operand, op.outputs[0].shape, positions, queries, keys).reshape(shape)

    if base_name(product) == "baddbmm":
        alpha, beta = product.kwargs.get("alpha", 1), product.kwargs.get("beta", 1)
        scores = Scores(scores.factor * alpha, value(product.args[0], product) * beta)
    tensor = product.outputs[0]
    for op in steps:
        scores = _after_step(scores, op, tensor, value)
        tensor = op.outputs[0]
    return scores


def values_at(
    operand: Tensor, shape: Sequence[int], positions: Positions, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """A tensor that is broadcast to scores of `shape`, [*, l, l], at some queries and keys; [*, queries, keys].

    Raises:
        UnknownValueError: it depends on tokens or weights, or can't be broadcast.
    """
    mesh = (*(torch.arange(size) for size in shape[:-2]), queries, keys)
    return positions.at(operand, broadcast(mesh, operand, shape)).expand([len(index) for index in mesh])


def _after_step(scores: Scores, op: Op, tensor: Tensor, value) -> Scores:
    """The scores behind one step, which takes them as `tensor`."""
    name, args = base_name(op), op.args
    if name in _LAYOUTS or name in aten.CASTS:
        return scores
    if name == "tanh":
        return _capped(scores)
    if name == "masked_fill":
        return _filled(scores, value(args[1], op) != 0, value(args[2], op))
    if name == "where":
        chosen = value(args[0], op) != 0
        if args[1] is tensor:
            return _filled(scores, ~chosen, value(args[2], op))
        return _filled(scores, chosen, value(args[1], op))
    if len(args) != 2 or set(op.kwargs) - {"alpha"}:
        raise UnknownStepError(name)
    operand = value(args[1] if args[0] is tensor else args[0], op)
    if name == "mul":
        return replace(scores, factor=scores.factor * operand, bias=scores.bias * operand)
    if name == "div" and args[0] is tensor:
        return replace(scores, factor=scores.factor / operand, bias=scores.bias / operand)
    if name == "add" and (args[0] is tensor or not op.kwargs):
        return replace(scores, bias=scores.bias + op.kwargs.get("alpha", 1) * operand)
    if name == "sub" and args[0] is tensor:
        return replace(scores, bias=scores.bias - op.kwargs.get("alpha", 1) * operand)
    if name in ("maximum", "max") and operand.max() < _NO_BOUND:
        return scores
    raise UnknownStepError(name)


def _filled(scores: Scores, where: torch.Tensor, filling: torch.Tensor) -> Scores:
    """Scores that are replaced by numbers at some places."""
    factor = torch.where(where, torch.zeros((), dtype=torch.float64), scores.factor)
    return replace(scores, factor=factor, bias=torch.where(where, filling.double(), scores.bias))


def _capped(scores: Scores) -> Scores:
    """tanh(scores), if they are a multiple of the product."""
    if scores.inner is not None or scores.bias.any():
        raise UnknownStepError("tanh")
    return Scores(torch.ones_like(scores.factor), scores.bias, scores.factor)


# --- what stands around it -------------------------------------------------------------------------------------------


def direct_result(attention: WrittenAttention, users: Mapping[Tensor, Sequence[Op]]) -> tuple[Op, bool]:
    """The operator whose output the result becomes, through views alone, and whether it is [b, l, heads, e] by then.

    A model writes [b, heads, l, e] or [b * heads, l, e], and most transpose that at once, which the kernel has done.
    """
    op = attention.result
    while len(readers := users.get(op.outputs[0], ())) == 1:
        (reader,) = readers
        if _swaps_heads_and_rows(reader):
            return reader, True
        if base_name(reader) not in _LAYOUTS or len(reader.inputs) != 1 or not _keeps_rows(reader):
            break
        op = reader
    return op, False


def by_heads(result: Tensor, output: Tensor) -> list[Op]:
    """The operators that make `output`, [1, heads, l, e] or [heads, l, e], of a kernel's result, [1, l, heads, e]."""
    if len(output.shape) == 4:
        return [aten.transpose(result, 1, 2, output)]
    b, rows, heads, e = result.shape
    transposed = replace(output, name=f"{output.name}_heads", shape=(b, heads, rows, e))
    return [aten.transpose(result, 1, 2, transposed), aten.squeeze(transposed, 0, output)]


def _keeps_rows(op: Op) -> bool:
    """Whether an operator leaves [*, l, d] its last two dimensions, and no more than four."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    return len(after) in (3, 4) and before[-2:] == after[-2:]


def _swaps_heads_and_rows(op: Op) -> bool:
    """Whether an operator makes [b, l, heads, e] of [b, heads, l, e]."""
    if len(op.outputs[0].shape) != 4:
        return False
    if base_name(op) == "permute":
        return [dim % 4 for dim in op.args[1]] == [0, 2, 1, 3]
    return base_name(op) == "transpose" and {dim % 4 for dim in op.args[1:3]} == {1, 2}


def key_of(attention: WrittenAttention, makers: Mapping[Tensor, Op]) -> tuple[list[Op], Tensor]:
    """The key, [*, l, d], and the operators that are still to be run for it."""
    tensor = _source(attention.key_transposed, makers)
    op, last = makers.get(tensor), len(tensor.shape) - 1
    if op is not None and base_name(op) == "transpose" and {d % (last + 1) for d in op.args[1:3]} == {last - 1, last}:
        return [], op.inputs[0]
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    output = replace(tensor, name=f"{tensor.name}_rows", shape=shape, kind="activation")
    return [aten.transpose(tensor, -2, -1, output)], output


def with_heads(tensor: Tensor, makers: Mapping[Tensor, Op]) -> tuple[list[Op], Tensor]:
    """A query, key or value as [1, heads, l, d], and the operators that are still to be run for it."""
    tensor = _source(tensor, makers)
    ops: list[Op] = []
    while len(tensor.shape) < 4:
        output = replace(tensor, name=f"{tensor.name}_{len(tensor.shape)}", shape=(1, *tensor.shape), kind="activation")
        ops.append(aten.unsqueeze(tensor, 0, output))
        tensor = output
    return ops, tensor


def _source(tensor: Tensor, makers: Mapping[Tensor, Op]) -> Tensor:
    """The tensor before casts to float32, and before views of [1, heads, l, d] as something else."""
    found = tensor
    while (op := makers.get(tensor)) is not None and len(op.inputs) == 1:
        (before,) = op.inputs
        if not (
            _is_cast(op) or base_name(op) in _LAYOUTS and _keeps_rows(op) and prod(before.shape) == prod(tensor.shape)
        ):
            break
        tensor = before
        if len(tensor.shape) == 4 and tensor.shape[0] == 1 or len(tensor.shape) == len(found.shape):
            found = tensor
    return found


def without_repeats(tensor: Tensor, makers: Mapping[Tensor, Op]) -> Tensor:
    """[1, kv_heads, l, d] where a key or a value is that, each repeated for a group of query heads; else the tensor."""
    op = _maker(tensor, makers)
    if op is not None and base_name(op) == "repeat_interleave":
        _, repeats, dim, *_ = with_defaults(op, None, None)
        by_heads = isinstance(repeats, int) and dim in (1, -3) and len(tensor.shape) == 4
        return _source(op.inputs[0], makers) if by_heads else tensor
    flat = op is not None and base_name(op) in _LAYOUTS
    repeated = _maker(op.inputs[0], makers) if op is not None and flat else None
    if repeated is None or base_name(repeated) != "expand" or len(repeated.outputs[0].shape) != 5:
        return tensor
    single = _maker(repeated.inputs[0], makers)
    if single is None or base_name(single) != "unsqueeze" or single.args[1] != 2:
        return tensor
    return _source(single.inputs[0], makers)


def _maker(tensor: Tensor, makers: Mapping[Tensor, Op]) -> Op | None:
    """The operator that makes a tensor, casts of it to float32 aside."""
    op = makers.get(tensor)
    while op is not None and _is_cast(op):
        op = makers.get(op.inputs[0])
    return op


def _is_cast(op: Op) -> bool:
    """Whether an operator casts floating-point numbers."""
    return base_name(op) in aten.CASTS and op.inputs[0].dtype.is_floating_point
