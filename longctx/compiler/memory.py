"""Predicts the memory of one rank at its peak, from what is live at each step of a forward and a backward pass.

Which tensors are live does not depend on the partition; only their sizes do. So each step is first described by the
tensors that are live in it, and their bytes on this rank are added up afterwards. The peak is the largest of these sums
over the steps of a micro-batch. A sum has these parts:

    persistent    16 n bytes for the n parameters of this rank: the float32 master, its gradient and AdamW's two
                  moments. Of a weight [d0, d1, ...] FSDP gives a rank ceil(d0 / ranks) * d1 * ... elements (ZeRO-3,
                  arXiv:1910.02054); of a plan-sharded weight each rank has its own shard
    gathered      in the compute dtype: the root's weights, throughout; those of the running layer; and the buffer of
                  one all-gather, for the running layer in the forward, and in the backward for the next layer, whose
                  weights FSDP2 prefetches
    weight        in the compute dtype: those of the root, from when they are made to the last step; those of the
    gradients     running layer, until they are reduced
    reduced       in float32: the input of the last reduce-scatter, which FSDP2 frees one layer later
    saved         for each layer whose backward is still to come: its inputs; under ALL_BUT_ATTENTION also attention's
                  output and logsumexp; under NOTHING all that autograd saves of its ops
    transient     in the running layer: all that its ops save, if it recomputes them; values that will be used again;
                  gradients; the workspace of an op
    loss          the gradient of the hidden states, that of the head's weight in float32, and one chunk of logits in
                  float32

The tensors that autograd saves are those of torch 2.13 on a GPU with fused attention and RMSNorm. benchmarks/memory.py
counts the bytes that are predicted here.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op, Tensor, nbytes
from longctx.compiler.ops import Shares, View, spec_of
from longctx.compiler.ops.spec import FLOAT32_BYTES
from longctx.compiler.recompute import Recompute

Live = Counter  # (kind of memory, tensor) -> share of its bytes

PERSISTENT_BYTES = 4 * FLOAT32_BYTES  # of a parameter: its master, its gradient, and AdamW's two moments


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of one rank at its peak, by kind. `moment` says in words when the peak is."""

    masters: float
    gradients: float  # of the masters
    optimizer: float
    gathered: float
    weight_gradients: float
    reduce_scatter: float
    saved: float
    transient: float
    loss: float
    moment: str

    @property
    def peak(self) -> float:
        return sum(value for value in vars(self).values() if not isinstance(value, str))


def say_bytes(size: float) -> str:
    """'134.2 MB', '16.4 KB', '4 bytes'."""
    for unit, name in ((1e6, "MB"), (1e3, "KB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} bytes"


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


def storages(items: Iterable[Op | LayerCall]) -> dict[Tensor, Tensor]:
    """For each output of `items`, the first value that has the same storage: a view shares the storage of its input.

    A value is strided if its elements lie in another order than its dimensions. The outputs of elementwise ops are then
    strided too, and a reshape copies the value.
    """
    storage: dict[Tensor, Tensor] = {}
    strided: set[Tensor] = set()
    for item in items:
        if isinstance(item, LayerCall):
            storage.update({out: out for out in item.outputs})
            continue
        spec, source = spec_of(item), next(iter(item.inputs), None)
        from_strided = source in strided
        is_view = spec.view is View.ALWAYS or (spec.view is View.IF_CONTIGUOUS and not from_strided)
        for out in item.outputs:
            storage[out] = storage.get(source, source) if is_view and source is not None else out
        if source is not None and spec.strides(item, from_strided):
            strided.update(item.outputs)
    return storage


def saved_by_op(ops: Sequence[Op], policy: Recompute) -> dict[Op, Shares]:
    """What a layer under a recompute policy saves for its backward besides its inputs, by the op that makes it.

    The bytes of the layer are a sum over its ops, and each term depends only on the partition of that op. If a value is
    resharded before an op that saves it, the result of the reshard is what is saved; reshards are ops too in the graph
    of one rank.
    """
    storage = storages(ops)
    saved = {storage.get(t) for op in ops for t in saved_tensors(op)}
    by_op: dict[Op, Shares] = {}
    for op in ops:
        selected = policy is Recompute.ALL_BUT_ATTENTION and spec_of(op).selective_recompute is not None
        if policy is Recompute.NOTHING or selected:
            own = Counter({t: 1.0 for t in op.outputs if storage[t] is t and t in saved})
            own.update(saved_besides(op))
            by_op[op] = dict(own)
    return by_op


def saved_inputs(kind: LayerKind, policy: Recompute) -> list[int]:
    """The places of the inputs that a layer saves: all of them if it recomputes anything, else those its ops save."""
    storage = storages(kind.ops)
    saved = {storage.get(t, t) for op in kind.ops for t in saved_tensors(op)}
    return [place for place, tensor in enumerate(kind.inputs) if policy is not Recompute.NOTHING or tensor in saved]


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
    kind = "saved" if isinstance(item, LayerCall) else spec_of(item).memory_kind
    return Counter({(kind, tensor): share for tensor, share in shares.items()})


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
                live["saved" if tensor in saved_by_layers else "transient", tensor] += 1
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
    """Takes a value itself out of what is live, and leaves shares of its bytes, which stand for other memory."""
    key = next(key for key in (("saved", tensor), ("transient", tensor)) if live[key] > 1 - 1e-9)  # shares are rounded
    live[key] -= 1


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
    live = Counter(("transient", tensor) for _, tensor in {owner for owner in owners if owner is not None})
    live.update(("weight_gradients", tensor) for tensor in weights)
    return live


# --- the prediction --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """Bytes of the weights that FSDP gathers together: those of one layer, or of the root."""

    gathered: float  # in the compute dtype
    buffer: float  # of the all-gather, in the compute dtype, padded to a multiple of the ranks
    reduced: float  # the input of the reduce-scatter, in float32, padded
    shard: float  # this rank's masters, in float32


def _fsdp_weights(owner: Graph | LayerKind, plan_sharded: Collection[Tensor], world_size: int) -> _Weights:
    sharded = [t for t in owner.parameters.values() if t not in plan_sharded]
    parts = [(ceil(t.shape[0] / world_size) * prod(t.shape[1:]), t.dtype.itemsize) for t in sharded]
    return _Weights(
        gathered=sum(map(nbytes, sharded)),
        buffer=sum(part * itemsize for part, itemsize in parts) * (world_size if world_size > 1 else 0),
        reduced=sum(part for part, _ in parts) * world_size * FLOAT32_BYTES,
        shard=sum(part for part, _ in parts) * FLOAT32_BYTES,
    )


def gathered_bytes(owner: Graph | LayerKind) -> int:
    """The most bytes that a parameter takes while FSDP has it gathered, as the integer program counts them.

    For a layer these are the weights in use, those prefetched for the next layer, and the gradients, each in the
    compute dtype, and the input of the reduce-scatter in float32. The weights of the root stay gathered, so none are
    prefetched.
    """
    itemsize = next((t.dtype.itemsize for t in owner.parameters.values()), 0)
    return (3 if isinstance(owner, LayerKind) else 2) * itemsize + FLOAT32_BYTES


def predict(
    graph: Graph,
    recompute: Sequence[Recompute],
    world_size: int,
    plan_sharded: Collection[Tensor] = (),
) -> MemoryPrediction:
    """The peak of one rank in any micro-batch but the first of a step, so that there are gradients already.

    Args:
        graph: that of one rank.
        recompute: the policy of each layer.
        world_size: the number of all ranks, over which FSDP shards.
        plan_sharded: the plan-sharded weights, which are float32 and of which each rank has its own shard; FSDP shards
            all others.
    """
    root = _fsdp_weights(graph, plan_sharded, world_size)
    kinds = [_fsdp_weights(kind, plan_sharded, world_size) for kind in graph.kinds]
    masters = root.shard
    for owner in (graph, *(graph.kinds[call.kind] for call in graph.layer_calls)):
        own = [t for t in owner.parameters.values() if t in plan_sharded]
        masters += sum(nbytes(t) / t.dtype.itemsize * FLOAT32_BYTES for t in own)
    masters += sum(kinds[call.kind].shard for call in graph.layer_calls)

    moments = list(_moments(graph, recompute, plan_sharded, root, kinds))
    moment, live = max(moments, key=lambda moment: sum(moment[1].values()))
    fields = ("gathered", "weight_gradients", "reduce_scatter", "saved", "transient", "loss")
    by_kind = {name: live.get(name, 0.0) for name in fields}
    return MemoryPrediction(masters=masters, gradients=masters, optimizer=2 * masters, moment=moment, **by_kind)


def _moments(
    graph: Graph,
    recompute: Sequence[Recompute],
    plan_sharded: Collection[Tensor],
    root: _Weights,
    kinds: Sequence[_Weights],
) -> Iterator[tuple[str, dict[str, float]]]:
    """The steps of a micro-batch in words, each with its bytes by kind, without the persistent ones."""
    calls = graph.layer_calls
    by_policy = {(call.kind, recompute[call.index]): graph.kinds[call.kind] for call in calls}
    places = {key: saved_inputs(kind, key[1]) for key, kind in by_policy.items()}
    made = {key: _made_inside(kind, key[1]) for key, kind in by_policy.items()}
    saved = {}
    for call in calls:
        key = call.kind, recompute[call.index]
        saved[call] = SavedByLayer(tuple(call.inputs[place] for place in places[key]), made[key])
    inside = [_largest_steps(kind, plan_sharded) for kind in graph.kinds]
    layers = [kinds[call.kind] for call in calls]
    below_layers = False
    for step in steps(graph.body, [graph.output], saved, plan_sharded):
        live = _bytes(step.live)
        live["gathered"] += root.gathered
        backward = step.phase == "backward"
        if isinstance(step.item, LayerCall):
            i, below_layers = step.item.index, backward
            phase = "both" if backward and recompute[i] is not Recompute.NOTHING else step.phase
            for kind, size in inside[step.item.kind][phase].items():
                live[kind] += size
            live["gathered"] += layers[i].gathered + layers[i - 1 if backward and i else i].buffer
            live["reduce_scatter"] += layers[i + 1].reduced if backward and i + 1 < len(layers) else 0.0
            yield f"{step.phase} of layer {i}", live
        else:
            if layers and not below_layers:  # the last layer's buffer is freed late and filled again early
                live["gathered"] += layers[-1].buffer
            yield f"{step.phase} of {spec_of(step.item).name}", live
    end = {"weight_gradients": root.gathered, "reduce_scatter": root.reduced, "transient": root.shard}
    yield "reduce-scatter of embedding and head", end


def _made_inside(kind: LayerKind, policy: Recompute) -> Shares:
    """All that a layer saves besides its inputs."""
    total: defaultdict[Tensor, float] = defaultdict(float)
    for shares in saved_by_op(kind.ops, policy).values():
        for tensor, share in shares.items():
            total[tensor] += share
    return total


def _largest_steps(kind: LayerKind, plan_sharded: Collection[Tensor]) -> dict[str, dict[str, float]]:
    """Bytes by kind in a layer's largest step of the forward, of the backward, and of a backward that recomputes."""
    sizes = [(step.phase, _bytes(step.live)) for step in steps(kind.ops, kind.outputs, {}, plan_sharded)]
    return {
        phase: max((live for p, live in sizes if phase in (p, "both")), key=lambda live: sum(live.values()))
        for phase in ("forward", "backward", "both")
    }


def _bytes(live: Live) -> defaultdict[str, float]:
    """The bytes of what is live, by kind of memory."""
    total: defaultdict[str, float] = defaultdict(float)
    for (kind, tensor), share in live.items():
        total[kind] += share * nbytes(tensor)
    return total
