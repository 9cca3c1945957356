"""How the values of a body lie in memory, and which gradients are added up: what the cost of an op depends on besides
the op itself.

It is that of the whole graph, without reshards, so that the integer program and the prediction go by the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longctx.compiler.ir import Graph, LayerKind, Op, Tensor
from longctx.compiler.lifetimes import saved_besides, saved_tensors, strided_values, wants_gradient
from longctx.compiler.ops import View, spec_of


@dataclass(frozen=True)
class Layout:
    """Of one body.

    strided: the names of the values whose elements lie in another order than their dimensions; the values of a rank's
    graph have the same names. added_gradients: for an op the places of those inputs that a later op reads too, so that
    the gradient which the op makes is added to that op's. not_repeated: the ops at the end that a recomputation does
    not come to.
    """

    strided: frozenset[str]
    added_gradients: dict[Op, tuple[int, ...]]
    not_repeated: frozenset[Op] = frozenset()

    def is_strided(self, op: Op) -> bool:
        """Whether an op reads or writes a strided value, which takes far longer than one in order."""
        return any(t.name in self.strided for t in (*op.inputs, *op.outputs) if t.kind != "parameter")

    def is_view(self, op: Op) -> bool:
        """Whether an op's output is its input's memory, so that nothing is read or written."""
        view = spec_of(op).view
        return view is View.ALWAYS or (view is View.IF_CONTIGUOUS and not self.is_strided(op))


def layout_of(owner: Graph | LayerKind) -> Layout:
    """The layout of the root's body, or of a layer kind's."""
    items, results = (owner.body, (owner.output,)) if isinstance(owner, Graph) else (owner.ops, owner.outputs)
    has_gradient: set[Tensor] = set(results)
    added: dict[Op, tuple[int, ...]] = {}
    for item in reversed(items):
        if isinstance(item, Op) and not wants_gradient(item):
            continue
        for place, tensor in enumerate(item.inputs):
            if isinstance(item, Op) and tensor.requires_grad and tensor in has_gradient:
                added[item] = (*added.get(item, ()), place)
            has_gradient.add(tensor)
    strided = frozenset(t.name for t in strided_values(items))
    return Layout(strided, added, frozenset(_not_repeated([item for item in items if isinstance(item, Op)])))


def _not_repeated(ops: Sequence[Op]) -> Iterator[Op]:
    """The ops after the last tensor that the backward needs: PyTorch's checkpoint stops recomputing when it has that.

    An op that saves only inputs is stopped before it computes, so that a layer's last product is not made again.
    """
    for op in reversed(ops):
        saved = saved_tensors(op)
        if saved_besides(op) or any(t in op.outputs for t in saved):
            return
        yield op
        if saved:
            return
