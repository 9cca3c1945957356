"""How the values of a body lie in memory, and which gradients are added up: what the cost of an op depends on besides
the op itself.

It is that of the whole graph, without reshards, so that the integer program and the prediction go by the same.
"""

from dataclasses import dataclass

from longctx.compiler.ir import Graph, LayerKind, Op, Tensor
from longctx.compiler.lifetimes import strided_values, wants_gradient


@dataclass(frozen=True)
class Layout:
    """Of one body.

    strided: the names of the values whose elements lie in another order than their dimensions; the values of a rank's
    graph have the same names. added_gradients: for an op the places of those inputs that a later op reads too, so that
    the gradient which the op makes is added to that op's.
    """

    strided: frozenset[str]
    added_gradients: dict[Op, tuple[int, ...]]

    def is_strided(self, op: Op) -> bool:
        """Whether an op reads or writes a strided value, which takes far longer than one in order."""
        return any(t.name in self.strided for t in (*op.inputs, *op.outputs) if t.kind != "parameter")


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
    return Layout(frozenset(t.name for t in strided_values(items)), added)
