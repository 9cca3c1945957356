"""The values of tensors that depend on neither tokens nor weights, such as masks, without the tensors themselves.

At 131,072 tokens a mask has 17 billion elements. Its value at a chosen few follows from the operators that make it: an
elementwise operator needs its inputs at the same places, and a view at places that its arguments tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from longctx.compiler.ir import POSITION_IDS, FlatGraph, Op, Tensor, map_tensors
from longctx.compiler.ops import aten
from longctx.compiler.ops import partitions as p
from longctx.compiler.ops.python import with_defaults
from longctx.compiler.ops.spec import draws_by_tag
from longctx.compiler.ops.writes import overload_of

WHOLE = 2**22  # elements: a tensor of no more is computed whole, as those of one row are

_ELEMENTWISE = {"__and__", "__or__", "__xor__", "floor_divide"}  # which PyTorch doesn't tag as such
_UNDEFINED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

Mesh = tuple[torch.Tensor, ...]  # the indices of the chosen places along each dimension, int64 each


class UnknownValueError(Exception):
    """A tensor's value depends on tokens or weights, or is made by an operator that has no rule here."""


@dataclass(frozen=True)
class Positions:
    """Finds values in a graph: `makers` has the operator that makes each tensor, `constants` the known values."""

    makers: dict[Tensor, Op]
    constants: dict[Tensor, torch.Tensor]
    found: dict[Tensor, torch.Tensor] = field(default_factory=dict)

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a tensor, numbers in float32 or wider.

        Raises:
            UnknownValueError: it depends on tokens or weights, or is too large.
        """
        if tensor not in self.found:
            self.found[tensor] = self._compute_whole(tensor)
        return self.found[tensor]

    def at(self, tensor: Tensor, mesh: Mesh) -> torch.Tensor:
        """A tensor at the places where the indices of `mesh` cross. A dimension of length 1 has the index 0 alone.

        Raises:
            UnknownValueError: it depends on tokens or weights, or on an operator without a rule.
        """
        if tensor in self.constants or prod(tensor.shape) <= WHOLE:
            value = self.whole(tensor)
            for dim, index in enumerate(mesh):
                value = value.index_select(dim, index)
            return value
        return self._compute_at(self._maker(tensor), mesh)

    def _maker(self, tensor: Tensor) -> Op:
        """The operator of PyTorch that makes a tensor, and nothing else."""
        op = self.makers.get(tensor)
        if op is None or len(op.outputs) > 1 or not _is_determined(op):
            raise UnknownValueError(tensor.name)
        return op

    def _compute_whole(self, tensor: Tensor) -> torch.Tensor:
        if tensor in self.constants:
            if self.constants[tensor].is_meta:
                raise UnknownValueError(tensor.name)
            return self.constants[tensor]
        op = self._maker(tensor)
        if prod(tensor.shape) > WHOLE:
            raise UnknownValueError(tensor.name)
        if any(prod(t.shape) > WHOLE for t in op.inputs):
            return self._compute_at(op, tuple(torch.arange(size) for size in tensor.shape))
        return _compute(op, self.whole, {})

    def _compute_at(self, op: Op, mesh: Mesh) -> torch.Tensor:
        name = aten.spec_of_aten(op).name
        if name in _RULES:
            return _RULES[name](self, op, mesh)
        if not _is_elementwise(op):
            raise UnknownValueError(op.outputs[0].name)
        sizes = [len(index) for index in mesh]
        shape = op.outputs[0].shape
        return _compute(op, lambda tensor: self.at(tensor, broadcast(mesh, tensor, shape)), {}).expand(sizes)


def known_values(flat: FlatGraph) -> dict[Tensor, torch.Tensor]:
    """The values of a graph's constants, and of the positions that it may be given, for a row of one document."""
    given = [tensor for tensor in flat.inputs if tensor.name == POSITION_IDS]
    return flat.constants | {tensor: torch.arange(tensor.shape[-1]).expand(tensor.shape) for tensor in given}


def _is_determined(op: Op) -> bool:
    """Whether an operator's output follows from its inputs: it is PyTorch's, and neither drawn nor left as it was."""
    return aten.is_aten(op) and aten.spec_of_aten(op).name not in _UNDEFINED and not draws_by_tag(op)


def _is_elementwise(op: Op) -> bool:
    spec = aten.spec_of_aten(op)
    tagged = torch.Tag.pointwise in overload_of(op.target).tags
    return tagged or spec.name in _ELEMENTWISE or spec.partition is p.elementwise


def _compute(op: Op, value_of: Callable[[Tensor], torch.Tensor], sizes: dict[int, list[int]]) -> torch.Tensor:
    """The operator's result, with `sizes` in the place of the arguments of these numbers.

    Numbers are not rounded to 16 bits: the bias of a key that is far away would be off by its whole distance.
    """
    given, kwargs = map_tensors((op.args, op.kwargs), value_of)
    args: tuple[Any, ...] = tuple(sizes.get(i, x) for i, x in enumerate(given))
    if aten.spec_of_aten(op).name in aten.CASTS and op.outputs[0].dtype.is_floating_point:
        return args[0] if args[0].dtype.is_floating_point else args[0].float()
    return aten.compute(op, args, kwargs)


def broadcast(mesh: Mesh, tensor: Tensor, shape: Sequence[int]) -> Mesh:
    """The places in a tensor that is broadcast to `shape`: dimensions agree from the last on, or have length 1.

    Raises:
        UnknownValueError: it can't be broadcast to that shape.
    """
    indices, full = mesh[len(mesh) - len(tensor.shape) :], shape[len(shape) - len(tensor.shape) :]
    if any(size not in (n, 1) for size, n in zip(tensor.shape, full, strict=True)):
        raise UnknownValueError(tensor.name)
    return tuple(i if size == n else i.new_zeros(1) for i, size, n in zip(indices, tensor.shape, full, strict=True))


# --- operators whose output's elements are elsewhere in their input --------------------------------------------------


def _expanded(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    (tensor,) = op.inputs
    return positions.at(tensor, broadcast(mesh, tensor, op.outputs[0].shape)).expand([len(index) for index in mesh])


def _reshaped(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    """Only dimensions of length 1 may come and go."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        raise UnknownValueError(op.outputs[0].name)
    indices = iter([index for index, size in zip(mesh, after, strict=True) if size != 1])
    places = tuple(next(indices) if size != 1 else torch.zeros(1, dtype=torch.int64) for size in before)
    return positions.at(op.inputs[0], places).reshape([len(index) for index in mesh])


def _transposed(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    first, second = op.args[1:3] if len(op.args) > 1 else (0, 1)
    places = list(mesh)
    places[first], places[second] = places[second], places[first]
    return positions.at(op.inputs[0], tuple(places)).transpose(first, second)


def _permuted(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    order = [dim % len(mesh) for dim in op.args[1]]
    places = tuple(mesh[order.index(dim)] for dim in range(len(mesh)))
    return positions.at(op.inputs[0], places).permute(order)


def _sliced(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    tensor, dim, start, _, step = with_defaults(op, 0, None, None, 1)
    places = list(mesh)
    places[dim] = slice(start, None).indices(tensor.shape[dim])[0] + step * places[dim]
    return positions.at(tensor, tuple(places))


def _selected(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    tensor, dim, index = op.args
    dim, places = dim % len(tensor.shape), list(mesh)
    places.insert(dim, torch.tensor([index % tensor.shape[dim]]))
    return positions.at(tensor, tuple(places)).squeeze(dim)


def _passed_on(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    return positions.at(op.inputs[0], mesh)


def _filled(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
    return _compute(op, positions.whole, {0: [len(index) for index in mesh]})


def _triangle(keeps: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Positions, Op, Mesh], torch.Tensor]:
    """tril and triu: what `keeps` says of column minus row and the diagonal stays, and all else is 0."""

    def rule(positions: Positions, op: Op, mesh: Mesh) -> torch.Tensor:
        diagonal = op.kwargs.get("diagonal", op.args[1] if len(op.args) > 1 else 0)
        values = positions.at(op.inputs[0], mesh)
        return torch.where(keeps(mesh[-1] - mesh[-2].unsqueeze(1), diagonal), values, values.new_zeros(()))

    return rule


_RULES: dict[str, Callable[[Positions, Op, Mesh], torch.Tensor]] = {
    "expand": _expanded,
    "view": _reshaped,
    "reshape": _reshaped,
    "flatten": _reshaped,
    "unsqueeze": _reshaped,
    "squeeze": _reshaped,
    "transpose": _transposed,
    "t": _transposed,
    "permute": _permuted,
    "slice": _sliced,
    "select": _selected,
    "alias": _passed_on,
    "detach": _passed_on,
    "full": _filled,
    "ones": _filled,
    "zeros": _filled,
    "tril": _triangle(torch.le),
    "triu": _triangle(torch.ge),
}
