"""What a layer computes again in its backward pass, instead of keeping it from its forward."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from longctx.compiler.ir import Op
from longctx.compiler.ops import spec_of


@dataclass(frozen=True)
class Recompute:
    """A layer's policy.

    `kept` names the operators whose outputs the layer keeps besides its inputs, in the order in which they run; all
    else is computed again from these. None says that the layer keeps whatever its backward pass needs.
    """

    kept: tuple[str, ...] | None
    NOTHING: ClassVar["Recompute"]  # is computed again
    EVERYTHING: ClassVar["Recompute"]

    def computes_again(self, name: str | None) -> bool:
        """Whether an operator runs again in the backward pass; `name` is None for one that can't be kept."""
        return self.kept is not None and name not in self.kept

    def __str__(self) -> str:
        """As plan.json and reports have it."""
        if self.kept is None:
            return "nothing"
        return f"all but {', '.join(self.kept)}" if self.kept else "everything"


Recompute.NOTHING, Recompute.EVERYTHING = Recompute(None), Recompute(())


def names_of_keepable(ops: Sequence[Op]) -> dict[Op, str]:
    """A name for each of a layer's operators whose output can be kept: its module's, if no other one is in there.

    Operators have the same names in the graph of one rank.
    """
    keepable = [op for op in ops if spec_of(op).can_be_kept(op) and any(t.requires_grad for t in op.outputs)]
    within = Counter(path for op in keepable for path in _paths(op.module))
    names: dict[Op, str] = {}
    n_called: Counter[str] = Counter()
    for op in keepable:
        name = op.module if op.module and within[op.module] == 1 else _join(op.module, spec_of(op).name)
        n_called[name] += 1
        names[op] = name if n_called[name] == 1 else f"{name}#{n_called[name]}"
    return names


def _paths(module: str) -> Iterable[str]:
    """'a.b' and 'a' of 'a.b': a module and those that it is in."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))
