"""The one place that says what is known of an operator: an `OpSpec`, all of whose rules stand side by side.

Every stage of the compiler asks the spec and nothing else: planning how the operator may be partitioned, what it costs
and what its backward keeps; code generation how it is written in Python; memory what lies where. No stage compares
names of operators, so a new operator is one entry in one table (`aten.py` for PyTorch's own, `register_op` for a
function of the user's, `reshards.py` for the collectives between placements). docs/adding_an_op.md walks through an
example.

JAX (all rules of a primitive beside it) and tinygrad (gradient rules in one table) are the models for this. The other
way, a table for each stage with a row for each operator, spreads one operator over as many files as there are stages,
and a forgotten row is silently taken for the default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from longctx.compiler.ir import FlatGraph, Op, Tensor
from longctx.compiler.ops.python import Expression, Values
from longctx.compiler.ops.writes import overload_of
from longctx.compiler.work import Work

FLOAT32_BYTES = 4

Shares = dict[Tensor, float]  # bytes told as shares of tensors' bytes, so that they follow these under any partition


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products in one execution of an operator that is computed whole."""

    forward: float = 0.0
    backward: float = 0.0


class View(Enum):
    """Whether an operator's output shares its first input's memory."""

    NEVER = "it makes memory of its own"
    ALWAYS = "it is the same memory under another shape"
    IF_CONTIGUOUS = "it is the same memory where the input's elements lie in order, else a copy"


@dataclass(frozen=True)
class Resharding:
    """Of a reshard: the collective that it runs forward, the one of its gradient, and how a comment describes it.

    `comment` may name {before} and {after}, the bytes that a rank holds, and {gradient}, what its gradient does.
    """

    forward: str | None
    backward: str | None
    comment: str


@dataclass(frozen=True)
class Ring:
    """Of an op that is split along a dimension of which it needs all of another, as attention needs all keys: how the
    ranks may keep their parts of the other, of the same places in a row, and send them to each other while they run.

    Attributes:
        dim: the identifier of the other dimension.
        argument: the op's argument that takes the ranks.
        fits: whether this call can be computed so.
        reach: how much of the other dimension a block needs of what is before its own part; None if all of it.
        passes: bytes that are read and written beside the products for each rank's part, in a phase.
    """

    dim: str
    argument: str
    fits: Callable[[Op], bool]
    reach: Callable[[Op], int | None]
    passes: Callable[[Op, str], Shares]


@dataclass(frozen=True)
class Told:
    """A dimension of which a rank has to know where its part begins, as attention does of its queries.

    Attributes:
        dim: the identifier of the annotation. Whoever doesn't tell the op must not split it along this.
        argument: the op's argument that takes where the blocks begin that a rank's part is made of, a tuple of ints.
        flops: of the products of blocks of n that begin there, given the op, the starts and n. Ranks may differ.
        share: of bytes that are told as shares of inputs, what a rank has if it has one of so many parts, given the op
            and their number; None where they are split as the inputs are. Only a dimension of a row's tokens, which has
            none, may be in balanced order.
        ring: how what every rank needs whole otherwise may be passed round; None if it can't be.
    """

    dim: str
    argument: str
    flops: Callable[[Op, Sequence[int], int], Flops]
    share: Callable[[Op, int], float] | None = None
    ring: Ring | None = None


# --- rules that many operators share, the defaults among them --------------------------------------------------------


def not_partitioned(op: Op) -> str:
    """Of operators whose annotation is not for the spec to give: a reshard has none, a registered function its own."""
    raise AssertionError(f"{op.target} has no annotation in its spec")


def saves_all(op: Op) -> list[Tensor]:
    """The conservative rule: every input and output."""
    return [*op.inputs, *op.outputs]


def saves_inputs(op: Op) -> list[Tensor]:
    return op.inputs


def saves_nothing(op: Op) -> list[Tensor]:
    return []


def no_shares(op: Op, phase: str = "forward") -> Shares:
    return {}


def no_flops(op: Op) -> Flops:
    return Flops()


def always(*_: Any) -> bool:
    return True


def passes_strides_on(op: Op, strided: bool) -> bool:
    """An elementwise operator writes its output in the order of its input's elements."""
    return strided and op.outputs[0].shape == op.inputs[0].shape


def always_strided(op: Op, strided: bool) -> bool:
    return True


def never_strided(op: Op, strided: bool) -> bool:
    return False


def keeps_strides(op: Op, strided: bool) -> bool:
    """A view of a strided tensor is strided too, whatever its shape."""
    return strided


def draws_by_tag(op: Op) -> bool:
    """PyTorch tags its own operators that draw random numbers."""
    return torch.Tag.nondeterministic_seeded in overload_of(op.target).tags


def draws_nothing(op: Op) -> bool:
    return False


def may_draw(op: Op) -> bool:
    """The conservative rule for a function of which nothing is known."""
    return True


@dataclass(frozen=True)
class OpSpec:
    """All that the compiler knows of one operator.

    Each rule takes the `Op`, that is, one call with its shapes and arguments. Bytes are told for whole tensors or as
    shares of them; a partition scales them. In the order in which the stages of the compiler ask:

    Attributes:
        name: what reports and variables call it.
        partition: its annotation, in the notation of annotation.py: which dimensions may be partitioned.
        python: the expression that generated code has for it; None where the general form of a call serves.
        flops: of its matrix products, forward and backward, computed whole.
        unmasked_flops: of a masked product's forward, what they would be if every query saw what the last one does;
            None where nothing is masked.
        rates: the kinds of work that its products are, forward and backward, by which they are priced.
        efficiency: the fraction of that rate that its products reach.
        traffic: bytes that it reads and writes in the phase 'forward' or 'backward'; None where cost.py's general rule
            holds. They pass while products run, and count where they take longer.
        passes: bytes that kernels before and after the products read and write, whose time comes on top.
        saves: which of its inputs and outputs autograd keeps for the backward, given that a gradient is wanted.
        saves_besides: what autograd keeps that is no input or output, given that a gradient is wanted.
        workspace: what it holds while it runs, in the phase 'forward' or 'backward', besides inputs, outputs and their
            gradients.
        memory_kind: the kind of memory that what it keeps and holds is reported as.
        view: whether its output shares its first input's memory.
        written_back: how the whole is made anew after a write into output `index`, a view of it; see writes.py. None if
            the outputs are no views, or can't be written to.
        strides: whether its output's elements lie in another order than its dimensions, given whether its input's do.
        shares_gradient: whether an input's gradient is the output's gradient, the same memory or a view of it, given
            that input and that output.
        cuts_gradient: whether no gradient flows through it.
        draws_random: whether this call draws random numbers, which have to be the same when it is recomputed.
        sizes: the place among its arguments of the sizes of its output, which differ on a rank that has a part.
        is_identity: whether a call with these arguments returns its input, provided that shape and dtype are the same.
        keeps_name: whether a person would go on calling the value by its old name, as after a cast.
        chooses_weights: whether a token meets only some of its weights, as one does of a mixture of experts.
        lookup: whether its second input holds indices into the rows of its first.
        can_be_kept: whether its output is worth keeping where the rest of a layer is recomputed, being dear to compute,
            and can be kept: see longctx/kernels/kept.py.
        not_kept_by: the package whose function takes its place where it is installed, of which nothing can be kept.
        shared_out: of attention: what the ranks of a plan can share of it, for a report; None for all else.
        told: of which dimension a rank has to know where its part begins, if it is split along that; None if of none.
        crosses_documents: whether it carries something along a row, from the tokens of one document to the next's.
        resharding: of a collective between placements; None for all else.
        rewrite: what finds, in a traced graph, operators whose place this one takes; None if it takes none's.
    """

    name: str
    partition: Callable[[Op], str]
    python: Callable[[Op, Values], Expression | None] = lambda op, values: None
    flops: Callable[[Op], Flops] = no_flops
    unmasked_flops: Callable[[Op], float] | None = None
    rates: tuple[Work, Work] = (Work.PRODUCTS, Work.PRODUCTS)
    efficiency: float = 1.0
    traffic: Callable[[Op, str], Shares] | None = None
    passes: Callable[[Op, str], Shares] = no_shares
    saves: Callable[[Op], list[Tensor]] = saves_all
    saves_besides: Callable[[Op], Shares] = no_shares
    workspace: Callable[[Op, str], Shares] = no_shares
    memory_kind: str = "transient"
    view: View = View.NEVER
    written_back: Callable[[Op, int, Tensor, Tensor], tuple[str, tuple] | None] | None = None
    strides: Callable[[Op, bool], bool] = passes_strides_on
    shares_gradient: Callable[[Tensor, Tensor], bool] = lambda tensor, output: False
    cuts_gradient: bool = False
    draws_random: Callable[[Op], bool] = draws_by_tag
    sizes: int | None = None
    is_identity: Callable[[tuple], bool] = lambda args: False
    keeps_name: bool = False
    chooses_weights: bool = False
    lookup: bool = False
    can_be_kept: Callable[[Op], bool] = lambda op: False
    not_kept_by: str = ""
    shared_out: Callable[[Op], str] | None = None
    told: Told | None = None
    crosses_documents: bool = False
    resharding: Resharding | None = None
    rewrite: Callable[[FlatGraph, dict[str, Any]], FlatGraph] | None = None
