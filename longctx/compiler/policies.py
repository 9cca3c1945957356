"""The chain of recompute policies among which the planner chooses for each layer of a kind.

A layer that keeps more computes less again. In a linear program only some policies can be worth their bytes: those on
the lower convex hull of seconds against bytes. Of sets of kept outputs these are found greedily, by the seconds that
each output saves for a byte, since what outputs save and take adds up. Attention comes first at long sequences, then
products; outputs of elementwise work are kept only by layers that keep everything.
"""

from itertools import accumulate
from typing import NamedTuple

from longctx.compiler.cost import op_seconds
from longctx.compiler.hardware import Hardware
from longctx.compiler.ir import LayerKind, Op, nbytes
from longctx.compiler.layout import layout_of
from longctx.compiler.lifetimes import kept_of, saved_by_op
from longctx.compiler.ops import Shares, legal_partitions
from longctx.compiler.recompute import Recompute, names_of_keepable

WORTH = 0.01  # of a layer's forward: a policy that saves less, against its neighbours together, is left out


class _Point(NamedTuple):
    """What a layer keeps, in bytes, and computes again, in seconds, under a policy."""

    n_bytes: float
    seconds: float
    policy: Recompute


def chain_of(kind: LayerKind, hardware: Hardware) -> list[Recompute]:
    """The policies of a kind's layers: from nothing, by keeping ever less, to everything that is computed again.

    Seconds and bytes are those of ops that are computed whole. A partition divides both by the number of ranks, so that
    the order is the same for every plan.
    """
    layout = layout_of(kind)
    again = {
        op: op_seconds(op, legal_partitions(op, 1)[0], layout, 1, hardware).forward
        for op in kind.ops
        if op not in layout.not_repeated
    }
    names = {op: name for op, name in names_of_keepable(kind.ops).items() if op in again}
    dearest_first = sorted(names, key=lambda op: again[op] / _size(kept_of(op)), reverse=True)
    everything = _Point(0.0, sum(again.values()), Recompute.EVERYTHING)
    points = accumulate(dearest_first, lambda point, op: _keeping(point, op, names, again[op]), initial=everything)
    nothing = _Point(sum(map(_size, saved_by_op(kind.ops, Recompute.NOTHING).values())), 0.0, Recompute.NOTHING)
    hull = _lower_hull([*(p for p in points if p.n_bytes < nothing.n_bytes or p is everything), nothing])
    return [point.policy for point in reversed(hull)]


def _keeping(point: _Point, op: Op, names: dict[Op, str], seconds: float) -> _Point:
    """A point's policy with the output of one more op kept."""
    assert point.policy.kept is not None
    kept = {*point.policy.kept, names[op]}
    in_order = tuple(name for name in names.values() if name in kept)
    return _Point(point.n_bytes + _size(kept_of(op)), point.seconds - seconds, Recompute(in_order))


def _size(shares: Shares) -> float:
    return sum(share * nbytes(tensor) for tensor, share in shares.items())


def _lower_hull(points: list[_Point]) -> list[_Point]:
    """The first, the last, and those between that lie below the line through their neighbours by what is worth it."""
    least = WORTH * points[0].seconds
    while len(points) > 2:
        below = [_below(*three) for three in zip(points, points[1:], points[2:], strict=False)]
        if min(below) >= least:
            break
        del points[below.index(min(below)) + 1]
    return points


def _below(before: _Point, point: _Point, after: _Point) -> float:
    """By how many seconds a point lies below the line through two others."""
    share = (point.n_bytes - before.n_bytes) / (after.n_bytes - before.n_bytes)
    return before.seconds + share * (after.seconds - before.seconds) - point.seconds
