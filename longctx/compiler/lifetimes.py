"""What is live at each step of a body's forward pass, and then of its backward pass.

Values live until they are used for the last time, or, if autograd saves them, until the backward of the op that saved
them first. Views share a storage. Which tensors are live depends on no partition; memory.py adds up their bytes.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longctx.compiler.ir import LayerCall, LayerKind, Op, Tensor
from longctx.compiler.ops import Shares, View, spec_of
from longctx.compiler.recompute import Recompute, names_of_keepable


class Held(NamedTuple):
    """What some memory is for. Its bytes are a share of the tensor's."""

    kind: str  # of memory, as memory.py reports it
    tensor: Tensor
    op: Op | None = None  # of an op's workspace, and of what it saves besides: the op, whose part of the tensor it is
    is_gradient: bool = False


Live = Counter[Held]  # -> share of the tensor's bytes


# --- what autograd saves of an op ------------------------------------------------------------------------------------


def wants_gradient(op: Op) -> bool:
    """Whether autograd makes a gradient for any of an op's outputs."""
    return any(t.requires_grad for t in op.outputs)


def saved_tensors(op: Op) -> list[Tensor]:
    """The inputs and outputs that autograd saves in an op's forward for its backward."""
    return spec_of(op).saves(op) if wants_gradient(op) else []


def saved_besides(op: Op) -> Shares:
    """What autograd saves for an op's backward besides inputs and outputs."""
    return spec_of(op).saves_besides(op) if wants_gradient(op) else {}


# --- storages --------------------------------------------------------------------------------------------------------


def strided_values(items: Iterable[Op | LayerCall]) -> set[Tensor]:
    """The outputs of `items` whose elements lie in another order than their dimensions.

    The outputs of elementwise ops of such a value are strided too, and a reshape copies the value.
    """
    strided: set[Tensor] = set()
    for item in items:
        if isinstance(item, Op) and item.inputs and spec_of(item).strides(item, item.inputs[0] in strided):
            strided.update(item.outputs)
    return strided


def storages(items: Sequence[Op | LayerCall]) -> dict[Tensor, Tensor]:
    """For each output of `items`, the first value that has the same storage: a view shares the storage of its input."""
    storage: dict[Tensor, Tensor] = {}
    strided = strided_values(items)
    for item in items:
        if isinstance(item, LayerCall):
            storage.update({out: out for out in item.outputs})
            continue
        spec, source = spec_of(item), next(iter(item.inputs), None)
        is_view = spec.view is View.ALWAYS or (spec.view is View.IF_CONTIGUOUS and source not in strided)
        for out in item.outputs:
            storage[out] = storage.get(source, source) if is_view and source is not None else out
    return storage


def saved_by_op(ops: Sequence[Op], policy: Recompute) -> dict[Op, Shares]:
    """What a layer under a recompute policy saves for its backward besides its inputs, by the op that makes it.

    The bytes of the layer are a sum over its ops, and each term depends only on the partition of that op. If a value is
    resharded before an op that saves it, the result of the reshard is what is saved; reshards are ops too in the graph
    of one rank.
    """
    if policy.kept is not None:
        return {op: kept_of(op) for op, name in names_of_keepable(ops).items() if name in policy.kept}
    storage = storages(ops)
    saved = {storage.get(t) for op in ops for t in saved_tensors(op)}
    by_op: dict[Op, Shares] = {}
    for op in ops:
        own = Counter({t: 1.0 for t in op.outputs if storage[t] is t and t in saved})
        own.update(saved_besides(op))
        by_op[op] = dict(own)
    return by_op


def kept_of(op: Op) -> Shares:
    """What is kept of an op that is not computed again."""
    return dict(Counter(dict.fromkeys(op.outputs, 1.0)) + Counter(saved_besides(op)))


def saved_inputs(kind: LayerKind, policy: Recompute) -> list[int]:
    """The places of the inputs that a layer saves: all of them if it recomputes anything, else those its ops save."""
    storage = storages(kind.ops)
    saved = {storage.get(t, t) for op in kind.ops for t in saved_tensors(op)}
    return [place for place, tensor in enumerate(kind.inputs) if policy.kept is not None or tensor in saved]


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What is live while `item` runs in a phase, without the inputs, weights and constants of the body.

    Of a layer that is called, only what outlives the call is counted here. The steps of the layer's own body count the
    rest.
    """

    item: Op | LayerCall
    phase: str  # 'forward' or 'backward'
    live: Live


@dataclass(frozen=True)
class SavedByLayer:
    """What the call of a layer saves for its backward: some of its inputs, and what is made inside the layer."""

    inputs: tuple[Tensor, ...]
    inside: Shares


@dataclass(frozen=True)
class _Body:
    """The arguments of `steps`, and what both passes need to know of each item."""

    items: Sequence[Op | LayerCall]
    results: Sequence[Tensor]
    plan_sharded: Collection[Tensor]
    storage: dict[Tensor, Tensor]
    saves: dict[Op | LayerCall, set[Tensor]]  # the storages of the inputs and outputs that an item saves
    extras: dict[Op | LayerCall, Live]  # what an item saves besides


def steps(
    items: Sequence[Op | LayerCall],
    results: Sequence[Tensor],
    layers: Mapping[LayerCall, SavedByLayer],
    plan_sharded: Collection[Tensor],
) -> list[Step]:
    """The steps of a body's forward pass, then those of its backward pass.

    Args:
        results: the outputs of the body. Their gradients belong to the caller.
        layers: what each call of a layer saves.
        plan_sharded: weights whose gradients are added at once to those of the micro-batches before.
    """
    storage = storages(items)
    saves, extras = {}, {}
    for item in items:
        is_op = isinstance(item, Op)
        saves[item] = {storage.get(t, t) for t in (saved_tensors(item) if is_op else layers[item].inputs)}
        extras[item] = _live(item, saved_besides(item) if is_op else layers[item].inside)
    body = _Body(items, results, plan_sharded, storage, saves, extras)
    live: Live = Counter()  # the forward leaves in it what the backward starts from
    return [*_forward_steps(body, live), *_backward_steps(body, live)]


def _live(item: Op | LayerCall, shares: Shares) -> Live:
    if isinstance(item, LayerCall):
        return Counter({Held("saved", tensor): share for tensor, share in shares.items()})
    return Counter({Held(spec_of(item).memory_kind, tensor, item): share for tensor, share in shares.items()})


def _forward_steps(body: _Body, live: Live) -> Iterator[Step]:
    """Values are live until their last use; those that are saved stay live."""
    storage = body.storage
    touched = [
        {storage[t] for t in (*item.inputs, *item.outputs) if t in storage} & set(storage) for item in body.items
    ]
    last_use = {tensor: index for index, tensors in enumerate(touched) for tensor in tensors}
    stay = {t for tensors in body.saves.values() for t in tensors} | {storage.get(t, t) for t in body.results}
    saved_by_layers = {t for item in body.items if isinstance(item, LayerCall) for t in body.saves[item]}
    for index, item in enumerate(body.items):
        for tensor in item.outputs:
            if storage[tensor] is tensor:
                live[Held("saved" if tensor in saved_by_layers else "transient", tensor)] += 1
        if isinstance(item, Op):
            live.update(body.extras[item])
            yield Step(item, "forward", live + _live(item, spec_of(item).workspace(item, "forward")))
        else:
            yield Step(item, "forward", Counter(live))
            live.update(body.extras[item])
        for tensor in touched[index] - stay:
            if last_use[tensor] == index:
                _drop(live, tensor)


def _drop(live: Live, tensor: Tensor) -> None:
    """Takes a value out of what is live."""
    live[next(held for held in (Held("saved", tensor), Held("transient", tensor)) if live[held])] -= 1


def _backward_steps(body: _Body, live: Live) -> Iterator[Step]:
    """Each op makes the gradients of its inputs, then frees those of its outputs, and what it was the first to save."""
    storage = body.storage
    first_saver = {tensor: item for item in reversed(body.items) for tensor in body.saves[item]}
    for tensor in {storage[t] for t in body.results if t in storage} & set(storage) - set(first_saver):
        _drop(live, tensor)
    # Value -> the op and the input that the memory of the value's gradient was made for, or None if that memory is the
    # caller's. A gradient that is the same tensor as another, or a view of it, has the memory of that one.
    gradients: dict[Tensor, tuple | None] = dict.fromkeys(body.results)
    weights: set[Tensor] = set()
    for item in reversed(body.items):
        if isinstance(item, LayerCall):
            yield Step(item, "backward", live - body.extras[item] + _gradients_live(gradients.values(), weights))
        made = _made_gradients(item, gradients)
        weights |= {t for t in made if t.kind == "parameter" and t not in body.plan_sharded}
        made = {t: owner for t, owner in made.items() if t not in weights}
        if made and isinstance(item, Op):
            both = [
                *gradients.values(),
                *made.values(),
            ]  # with a second gradient of a value, until it is added to the first
            yield Step(
                item,
                "backward",
                live + _gradients_live(both, weights) + _live(item, spec_of(item).workspace(item, "backward")),
            )
        gradients = {**made, **gradients}
        live.subtract(body.extras[item])
        for tensor in body.saves[item]:
            if first_saver[tensor] is item and tensor in storage:
                _drop(live, tensor)
        for tensor in (*item.outputs, *body.plan_sharded):
            gradients.pop(tensor, None)


def _made_gradients(item: Op | LayerCall, gradients: Mapping[Tensor, tuple | None]) -> dict[Tensor, tuple | None]:
    """For each input that gets a gradient, the op and the input that the memory of the gradient was made for."""
    incoming = next((t for t in item.outputs if t in gradients), None)
    if incoming is None:
        return {}
    made: dict[Tensor, tuple | None] = {}
    for tensor in item.inputs:
        if tensor.requires_grad:
            same = (
                isinstance(item, Op) and tensor.kind != "parameter" and spec_of(item).shares_gradient(tensor, incoming)
            )
            made[tensor] = gradients[incoming] if same else (item, tensor)
    return made


def _gradients_live(owners: Iterable[tuple | None], weights: Iterable[Tensor]) -> Live:
    made_for = {owner for owner in owners if owner is not None}
    live = Counter(Held("transient", tensor, is_gradient=True) for _, tensor in made_for)
    live.update(Held("weight_gradients", tensor, is_gradient=True) for tensor in weights)
    return live
