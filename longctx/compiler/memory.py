"""The memory of one rank at its peak, from the graph: what is live at each step of a forward and a backward pass.

What is live is the same whatever the partition; only sizes differ. So a step is first a multiset of tensors, then the
sum of their bytes on this rank. The peak is the largest, over the steps of a micro-batch, of the sum of

    persistent    16 n bytes, n parameters of this rank: float32 master, gradient and AdamW's two moments. FSDP gives a
                  rank ceil(d0 / ranks) * d1 * ... of a weight [d0, d1, ...] (ZeRO-3, arXiv:1910.02054), a weight split
                  over the plan is resident on each rank in its part
    gathered      compute dtype: the root's weights from first to last; the running layer's; and one all-gather's
                  buffer: forward, the running layer's, backward, the next one's, which FSDP2 prefetches
    weight        compute dtype: the root's from when they are made to the last, the running layer's until reduced
    gradients
    reduced       float32: the input of the last reduce-scatter, which FSDP2 frees one layer later
    saved         each layer's that is still to go backward: its inputs; under 'attention' also attention's output
                  and logsumexp; under 'none' what autograd saves of its ops
    transient     in the running layer, if it recomputes: all that its ops save; values not yet used for the last time;
                  gradients; what an op needs to compute
    loss          hidden states' gradient, the head's in float32, one chunk of logits in float32

Autograd's saved tensors are those of torch 2.13 on a GPU with fused attention and RMSNorm. benchmarks/memory.py counts
what is predicted here.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from longctx.compiler.trace import Graph, LayerCall, LayerKind, Op, Tensor

LocalBytes = Callable[[Tensor], float]  # a tensor's bytes on this rank
Shares = dict[Tensor, float]  # bytes as shares of tensors' bytes, so that they follow from these under any partition
Live = Counter  # (kind of memory, tensor) -> share of its bytes

FLOAT32 = 4  # bytes: weights, gradients and moments between steps; what is reduced; logits and scores
LOSS_CHUNK = 1024  # chunk_linear_cross_entropy's chunk_size
QUERY_BLOCK = (
    1024  # kernels.attention.QUERY_BLOCK: queries that attention takes at a time where no fused kernel does the job
)
ATTENTION, RMS_NORM, LOSS = (
    "longctx.kernels.attention.attention",
    "longctx.kernels.rms_norm.rms_norm",
    "chunk_linear_cross_entropy",
)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of one rank at its peak, by kind; `moment` says when that is."""

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


def nbytes(tensor: Tensor) -> int:
    """A whole tensor's bytes: the `local_bytes` of a graph that has this rank's shapes already."""
    return prod(tensor.shape) * tensor.dtype.itemsize


def say_bytes(size: float) -> str:
    """'134.2 MB', '16.4 KB', '4 bytes'."""
    for unit, name in ((1e6, "MB"), (1e3, "KB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} bytes"


# --- what autograd keeps of an op ----------------------------------------------------------------------------------

_VIEWS = {"view", "transpose", "permute", "t", "unsqueeze", "squeeze", "alias", "detach", "expand"}
_VIEWS |= {"slice", "select", "chunk", "split", "split_with_sizes", "narrow", "unbind", "unflatten"}
_VIEWS |= {"replicate", "scale_gradient", "own_slice"}
_VIEWS_IF_CONTIGUOUS = {"reshape", "flatten", "contiguous"}
_MOVES = {"all_to_all", "all_gather", "all_gather_reduce", "take_slice", "all_reduce", "all_reduce_both"}
_MOVES |= {"reduce_scatter"}
_SAVE_NOTHING = {"add", "sub", "neg", "cat", "stack", "to", "type_as", "clone", "sum", "mean", "cumsum"}
_SAVE_NOTHING |= {"repeat_interleave", "masked_fill", "ones_like", "zeros_like", "full_like"}
_SAVE_NOTHING |= _VIEWS | _VIEWS_IF_CONTIGUOUS | _MOVES
_SAVE_INPUT = {"silu", "gelu", "pow", "square", "cos", "sin", "abs", "leaky_relu", "softplus"}
_SAVE_OUTPUT = {"relu", "tanh", "sigmoid", "exp", "sqrt", "rsqrt", "softmax"}
_PRODUCTS = {"mul", "matmul", "bmm", "mm", "linear"}


def saved_tensors(op: Op) -> list[Tensor]:
    """The tensors that autograd keeps from an op's forward for its backward; an unknown op keeps all it sees.

    Source: `saved` in torch's derivatives.yaml and the autograd functions of model.py; a test compares.
    """
    if not any(t.requires_grad for t in op.outputs):
        return []
    name, inputs = _name(op), op.inputs
    if name in _SAVE_NOTHING:
        return []
    if name in _SAVE_INPUT:
        return inputs[:1]
    if name in _SAVE_OUTPUT:
        return list(op.outputs)
    if name in _PRODUCTS:  # the gradient of each factor is made of the other
        pairs = zip(inputs[:2], reversed(inputs[:2]), strict=True)
        return [t for t, other in pairs if len(inputs) > 1 and other.requires_grad]
    if name == "div":
        return inputs if inputs[-1].requires_grad else inputs[1:]
    if name in ("embedding", "where", "dropout"):  # indices, a condition
        return [t for t in inputs if not t.dtype.is_floating_point]
    if name == RMS_NORM:  # with an offset its input is a float32 copy
        return inputs[1:] if _option(op, "offset", 3) else inputs
    if name == ATTENTION:
        return inputs if _by_blocks(op) else [*inputs, *op.outputs]
    if name in (LOSS, "layer_norm"):
        return inputs
    return [*inputs, *op.outputs]


def extra_saved(op: Op) -> Shares:
    """What an op keeps besides tensors of the graph."""
    if not any(t.requires_grad for t in op.outputs):
        return {}
    name, first = _name(op), op.inputs[0]
    size = first.dtype.itemsize
    per_row = FLOAT32 / (size * first.shape[-1]) if first.shape else 0.0  # a number for each row
    if name == RMS_NORM:  # 1 / rms
        return {first: per_row + (FLOAT32 / size if _option(op, "offset", 3) else 0.0)}
    if name == "layer_norm":  # mean, 1 / deviation
        return {first: 2 * per_row}
    if name == "dropout":  # a mask of bytes
        return {first: 1 / size}
    if name == ATTENTION and not _by_blocks(op):  # logsumexp of each row of scores
        return {first: per_row}
    if name == LOSS:  # it makes its gradients in the forward
        gradients = {first: 1.0, op.inputs[1]: FLOAT32 / size}
        return {t: share for t, share in gradients.items() if t.requires_grad}
    return {}


def _name(op: Op | LayerCall) -> str:
    """'linear' of 'aten.linear.default', 'all_gather' of 'runtime.collectives.all_gather', LOSS wherever it lives."""
    if isinstance(op, LayerCall):
        return ""
    parts = op.target.split(".")
    if parts[0] == "aten":
        return parts[1]
    return parts[-1] if "collectives" in parts or parts[-1] == LOSS else op.target


def _option(op: Op, name: str, place: int):
    """A plain argument of a registered op, by name or by place; 0 where it is not given."""
    return op.kwargs.get(name, op.args[place] if len(op.args) > place else 0) or 0


def _has_scores(op: Op) -> bool:
    """Whether attention holds blocks of scores: a soft-cap, or asked for."""
    return bool(_option(op, "softcap", 5) or _option(op, "implementation", 7) == "eager")


def _by_blocks(op: Op) -> bool:
    """Whether attention is recomputed by blocks of queries, as where PyTorch has no fused kernel for it.

    flash-attn, where it is installed, has one: what it needs is less than is predicted.
    """
    window = _option(op, "window", 4)
    return _has_scores(op) or bool(window and window < op.inputs[0].shape[2])


# --- what an op needs to run ---------------------------------------------------------------------------------------

_BACKWARD_FACTORS = {"pow": 2.0, "square": 2.0, "rsqrt": 2.0, "sqrt": 1.0, "abs": 1.0}  # unnamed values in a formula


def workspace(op: Op, phase: str) -> Shares:
    """What an op holds while it runs besides inputs, outputs and their gradients. `phase`: 'forward' or 'backward'."""
    name, first = _name(op), next(iter(op.inputs), None)
    if name == ATTENTION:
        return _blocks_workspace(op, phase) if _by_blocks(op) else _flash_workspace(op, phase)
    if name == RMS_NORM and _option(op, "offset", 3):
        float32 = FLOAT32 / first.dtype.itemsize  # the output; backward, its gradient and the input's, before a cast
        return {first: float32 if phase == "forward" else 2 * float32 - 1}
    if name == LOSS:
        return _loss_workspace(op, phase)
    if name in _MOVES:
        return _move_workspace(op, phase)
    return {first: _BACKWARD_FACTORS[name]} if phase == "backward" and name in _BACKWARD_FACTORS else {}


def _flash_workspace(op: Op, phase: str) -> Shares:
    """FlashAttention-2's backward (arXiv:2307.08691, algorithm 2; its source): the query's gradient in float32, the
    row sums of grad * out; and for grouped queries each query head's gradients of its key and value."""
    query, key = op.inputs[:2]
    if phase == "forward":
        return {}
    float32 = FLOAT32 / query.dtype.itemsize
    return {query: float32 + float32 / query.shape[-1] + (2.0 if key.shape[1] != query.shape[1] else 0.0)}


def _blocks_workspace(op: Op, phase: str) -> Shares:
    """_blockwise_attention's: blocks of output before they are joined; backward, blocks' gradients padded with
    zeros. Of one block the float32 scores (forward 3 copies; backward weights, tanh and two gradients), or, for the
    kernel that takes a mask, that mask while it is made (distances in int64, three of bytes), then keys and values for
    all heads and their gradients."""
    query, key, value = op.inputs[:3]
    length, window = query.shape[2], _option(op, "window", 4)
    rows = min(QUERY_BLOCK, length)
    keys = min(length, window + rows) if window else length
    if _has_scores(op):
        scores = rows * keys * FLOAT32 / (length * query.shape[-1] * query.dtype.itemsize)
        block = (3 if phase == "forward" else 4) * scores
    else:
        mask = rows * keys * (8 + 3) / nbytes(query)
        block = max(mask, (2 if phase == "forward" else 4) * keys / length)
    return {query: 1 + block} | ({key: 1.0, value: 1.0} if phase == "backward" else {})


def _loss_workspace(op: Op, phase: str) -> Shares:
    """Forward: logits [chunk, n] and hidden states' gradient [chunk, d], float32. Backward: less than nothing, for
    gradients that were made in the forward and are given as they are."""
    hidden_states, weight, labels = op.inputs[:3]
    if phase == "backward":
        given = [hidden_states, *([weight] if weight.dtype.itemsize == FLOAT32 else [])]
        return {t: -1.0 for t in given if t.requires_grad}
    chunk = min(LOSS_CHUNK, prod(labels.shape))
    return {weight: chunk * sum(weight.shape) * FLOAT32 / nbytes(weight)}


def _move_workspace(op: Op, phase: str) -> Shares:
    """The copies in which runtime.collectives cuts a tensor into the ranks' parts, or joins them.

    Where all dimensions before the one that is cut are 1, parts are slices of memory and need no copy.
    """
    before, after = op.inputs[0], op.outputs[0]

    def copied(option: str) -> bool:
        return prod(before.shape[: op.kwargs[option] % len(before.shape)]) > 1

    name = _name(op)
    if name == "all_to_all":
        return {t: 1.0 for option, t in (("split", before), ("gather", after)) if copied(option)}
    whole = {"all_gather": after, "all_gather_reduce": after, "take_slice": before, "reduce_scatter": before}.get(name)
    idle = {"all_gather": "backward", "take_slice": "forward"}.get(name)  # the way that takes a slice
    return {whole: 1.0} if whole and phase != idle and copied("dim") else {}


# --- storages ------------------------------------------------------------------------------------------------------

_STRIDED = {"transpose", "permute", "t", "expand", "slice", "select", "chunk", "split", "split_with_sizes", "narrow"}
_MADE_CONTIGUOUS = {"contiguous", "clone", "cat", "linear", "matmul"} | _MOVES


def storages(ops: Iterable[Op | LayerCall]) -> dict[Tensor, Tensor]:
    """Value -> the first value of its storage, for the outputs of `ops`; views share one.

    A value is strided if its elements lie in another order than its dimensions: elementwise ops pass that on, and a
    reshape copies it.
    """
    storage: dict[Tensor, Tensor] = {}
    strided: set[Tensor] = set()
    for op in ops:
        name, source = _name(op), next(iter(op.inputs), None)
        is_view = name in _VIEWS or (name in _VIEWS_IF_CONTIGUOUS and source not in strided)
        for out in op.outputs:
            storage[out] = storage.get(source, source) if is_view else out
            if name == ATTENTION:  # it lies as its query does, [b, heads, l, d], and is given as [b, l, heads, d]
                turned = source not in strided or _by_blocks(op)
            else:
                elementwise = source is not None and out.shape == source.shape and name not in _MADE_CONTIGUOUS
                turned = name in _STRIDED or (source in strided and (is_view or elementwise))
            if turned:
                strided.add(out)
    return storage


def kept_by_op(ops: Sequence[Op], policy: str) -> dict[Op, Shares]:
    """What a layer under a recompute policy keeps besides its inputs, by the op that makes it.

    A sum over ops, each term of which depends on that op's partition only: share * local_bytes(tensor). What is moved
    to another placement before an op saves it is kept as the move's result; in the graph of one rank
    (partition.localize) moves are ops like others.
    """
    storage = storages(ops)
    saved = {storage.get(t) for op in ops for t in saved_tensors(op)}
    kept: dict[Op, Shares] = {}
    for op in ops:
        if policy == "none" or (policy == "attention" and _name(op) == ATTENTION):
            own = Counter({t: 1.0 for t in op.outputs if storage[t] is t and t in saved})
            own.update(extra_saved(op))
            kept[op] = dict(own)
    return kept


def kept_inputs(kind: LayerKind, policy: str) -> list[int]:
    """Which of its inputs a layer keeps: all, to run again; or those that its ops save."""
    storage = storages(kind.ops)
    saved = {storage.get(t, t) for op in kind.ops for t in saved_tensors(op)}
    return [place for place, tensor in enumerate(kind.inputs) if policy != "none" or tensor in saved]


# --- steps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What is live while `item` runs in a phase; the body's inputs, weights and constants left out.

    Of a layer called, only what lives across it: what lives inside is its own body's steps' matter.
    """

    item: Op | LayerCall
    phase: str  # 'forward' or 'backward'
    live: Live


@dataclass(frozen=True)
class Kept:
    """What a layer called keeps for its backward: some of its inputs, and what is made inside it."""

    inputs: tuple[Tensor, ...]
    inside: Shares


@dataclass(frozen=True)
class _Body:
    items: Sequence[Op | LayerCall]
    results: Sequence[Tensor]
    resident: Collection[Tensor]
    storage: dict[Tensor, Tensor]
    saves: dict[Op | LayerCall, set[Tensor]]  # storages
    extras: dict[Op | LayerCall, Live]


def steps(
    items: Sequence[Op | LayerCall],
    results: Sequence[Tensor],
    kept: Mapping[LayerCall, Kept] | None = None,
    resident: Collection[Tensor] = (),
) -> list[Step]:
    """The steps of a body's forward pass, then those of its backward pass.

    Args:
        results: the body's outputs; their gradients are the caller's.
        kept: what each layer called keeps.
        resident: weights whose gradients are added at once to those of the micro-batches before.
    """
    storage = storages(items)
    saves, extras = {}, {}
    for item in items:
        is_op = isinstance(item, Op)
        saves[item] = {storage.get(t, t) for t in (saved_tensors(item) if is_op else kept[item].inputs)}
        extras[item] = _live(item, extra_saved(item) if is_op else kept[item].inside)
    body = _Body(items, results, resident, storage, saves, extras)
    live: Live = Counter()  # handed from the forward to the backward
    return [*_forward_steps(body, live), *_backward_steps(body, live)]


def _live(item: Op | LayerCall, shares: Shares) -> Live:
    kind = "saved" if isinstance(item, LayerCall) else "loss" if _name(item) == LOSS else "transient"
    return Counter({(kind, tensor): share for tensor, share in shares.items()})


def _forward_steps(body: _Body, live: Live) -> Iterator[Step]:
    """Values live until their last use; those that are saved stay."""
    storage = body.storage
    touched = [{storage.get(t) for t in (*item.inputs, *item.outputs)} & set(storage) for item in body.items]
    last_use = {tensor: index for index, tensors in enumerate(touched) for tensor in tensors}
    stay = {t for tensors in body.saves.values() for t in tensors} | {storage.get(t, t) for t in body.results}
    kept_by_layers = {t for item in body.items if isinstance(item, LayerCall) for t in body.saves[item]}
    for index, item in enumerate(body.items):
        for tensor in item.outputs:
            if storage[tensor] is tensor:
                live["saved" if tensor in kept_by_layers else "transient", tensor] += 1.0
        if isinstance(item, Op):
            live.update(body.extras[item])
            yield Step(item, "forward", live + _live(item, workspace(item, "forward")))
        else:
            yield Step(item, "forward", Counter(live))
            live.update(body.extras[item])
        for tensor in touched[index] - stay:
            if last_use[tensor] == index:
                _drop(live, tensor)


def _drop(live: Live, tensor: Tensor) -> None:
    """Takes a value's own bytes out; shares of them stand for something else."""
    key = next(key for key in (("saved", tensor), ("transient", tensor)) if live[key] > 1 - 1e-9)  # shares are rounded
    live[key] -= 1.0


def _backward_steps(body: _Body, live: Live) -> Iterator[Step]:
    """Each op makes its inputs' gradients, then drops its outputs', and what it was the first to save."""
    storage = body.storage
    first_saver = {tensor: item for item in reversed(body.items) for tensor in body.saves[item]}
    for tensor in {storage.get(t) for t in body.results} & set(storage) - set(first_saver):
        _drop(live, tensor)
    # Value -> what its gradient's memory was made for, an op and its input; None if it is the caller's. A gradient that
    # is a view of another, or the same, has that one's.
    gradients: dict[Tensor, tuple | None] = dict.fromkeys(body.results)
    weights: set[Tensor] = set()
    for item in reversed(body.items):
        if isinstance(item, LayerCall):
            yield Step(item, "backward", live - body.extras[item] + _gradients_live(gradients.values(), weights))
        made = _made_gradients(item, gradients)
        weights |= {t for t in made if t.kind == "parameter" and t not in body.resident}
        made = {t: owner for t, owner in made.items() if t not in weights}
        if made and isinstance(item, Op):
            both = [*gradients.values(), *made.values()]  # a value's second gradient, until it is added to the first
            yield Step(
                item, "backward", live + _gradients_live(both, weights) + _live(item, workspace(item, "backward"))
            )
        gradients = {**made, **gradients}
        live.subtract(body.extras[item])
        for tensor in body.saves[item]:
            if first_saver[tensor] is item and tensor in storage:
                _drop(live, tensor)
        for tensor in (*item.outputs, *body.resident):
            gradients.pop(tensor, None)


_SAME_GRADIENT = {"add", "cat", "stack", "all_reduce"} | _VIEWS_IF_CONTIGUOUS
_SAME_GRADIENT |= {"view", "transpose", "permute", "t", "unsqueeze", "squeeze", "alias", "unflatten"}


def _made_gradients(item: Op | LayerCall, gradients: Mapping[Tensor, tuple | None]) -> dict[Tensor, tuple | None]:
    """Each input that gets a gradient -> what that gradient's memory was made for."""
    incoming = next((t for t in item.outputs if t in gradients), None)
    if incoming is None:
        return {}
    name, made = _name(item), {}
    for tensor in item.inputs:
        if tensor.requires_grad:
            stretched = name == "add" and tensor.shape != incoming.shape
            same = name in _SAME_GRADIENT and not stretched and tensor.kind != "parameter"
            made[tensor] = gradients[incoming] if same else (item, tensor)
    return made


def _gradients_live(owners: Iterable[tuple | None], weights: Iterable[Tensor]) -> Live:
    live = Counter(("transient", tensor) for _, tensor in {owner for owner in owners if owner is not None})
    live.update(("weight_gradients", tensor) for tensor in weights)
    return live


# --- the prediction ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """Bytes of the weights that FSDP gathers together."""

    gathered: float  # compute dtype
    buffer: float  # of the all-gather: compute dtype, padded to a multiple of the ranks
    reduced: float  # the reduce-scatter's input: float32, padded
    shard: float  # float32, this rank's


def _fsdp_weights(owner: Graph | LayerKind, resident: Collection[Tensor], n_ranks: int) -> _Weights:
    sharded = [t for t in owner.parameters.values() if t not in resident]
    parts = [(ceil(t.shape[0] / n_ranks) * prod(t.shape[1:]), t.dtype.itemsize) for t in sharded]
    return _Weights(
        gathered=sum(map(nbytes, sharded)),
        buffer=sum(part * itemsize for part, itemsize in parts) * (n_ranks if n_ranks > 1 else 0),
        reduced=sum(part for part, _ in parts) * n_ranks * FLOAT32,
        shard=sum(part for part, _ in parts) * FLOAT32,
    )


def predict(
    graph: Graph,
    recompute: Sequence[str],
    local_bytes: LocalBytes,
    n_ranks: int,
    resident: Collection[Tensor] = (),
) -> MemoryPrediction:
    """The peak of one rank in a micro-batch that is not the first, and so finds gradients of those before it.

    Args:
        recompute: each layer's policy: 'layer', 'attention' or 'none'.
        local_bytes: a tensor's bytes on this rank; `nbytes` for a graph of one rank's ops.
        n_ranks: all ranks, over which FSDP shards.
        resident: weights of which each rank of a plan keeps its own part, in float32; all others are FSDP's.
    """
    root = _fsdp_weights(graph, resident, n_ranks)
    kinds = [_fsdp_weights(kind, resident, n_ranks) for kind in graph.kinds]
    masters = root.shard
    for owner in (graph, *(graph.kinds[call.kind] for call in graph.layer_calls)):
        own = [t for t in owner.parameters.values() if t in resident]
        masters += sum(local_bytes(t) / t.dtype.itemsize * FLOAT32 for t in own)
    masters += sum(kinds[call.kind].shard for call in graph.layer_calls)

    moments = list(_moments(graph, recompute, local_bytes, resident, root, kinds))
    moment, live = max(moments, key=lambda moment: sum(moment[1].values()))
    fields = ("gathered", "weight_gradients", "reduce_scatter", "saved", "transient", "loss")
    live = {name: live[name] for name in fields}
    return MemoryPrediction(masters=masters, gradients=masters, optimizer=2 * masters, moment=moment, **live)


def _moments(
    graph: Graph,
    recompute: Sequence[str],
    local_bytes: LocalBytes,
    resident: Collection[Tensor],
    root: _Weights,
    kinds: Sequence[_Weights],
) -> Iterator[tuple[str, Counter]]:
    """What each step of a micro-batch is, and its bytes by kind, persistent ones left out."""
    calls = graph.layer_calls
    by_policy = {(call.kind, recompute[call.index]): graph.kinds[call.kind] for call in calls}
    places = {key: kept_inputs(kind, key[1]) for key, kind in by_policy.items()}
    made = {key: _made_inside(kind, key[1]) for key, kind in by_policy.items()}
    kept = {}
    for call in calls:
        key = call.kind, recompute[call.index]
        kept[call] = Kept(tuple(call.inputs[place] for place in places[key]), made[key])
    inside = [_largest_steps(kind, resident, local_bytes) for kind in graph.kinds]
    layers = [kinds[call.kind] for call in calls]
    below_layers = False
    for step in steps(graph.body, [graph.output], kept, resident):
        live = _bytes(step.live, local_bytes)
        live["gathered"] += root.gathered
        backward = step.phase == "backward"
        if isinstance(step.item, LayerCall):
            i, below_layers = step.item.index, backward
            phase = "both" if backward and recompute[i] != "none" else step.phase
            live.update(inside[step.item.kind][phase])
            live["gathered"] += layers[i].gathered + layers[i - 1 if backward and i else i].buffer
            live["reduce_scatter"] += layers[i + 1].reduced if backward and i + 1 < len(layers) else 0.0
            yield f"{step.phase} of layer {i}", live
        else:
            if layers and not below_layers:  # the last layer's buffer is freed late, and filled again early
                live["gathered"] += layers[-1].buffer
            yield f"{step.phase} of {_name(step.item)}", live
    end = {"weight_gradients": root.gathered, "reduce_scatter": root.reduced, "transient": root.shard}
    yield "reduce-scatter of embedding and head", Counter(end)


def _made_inside(kind: LayerKind, policy: str) -> Shares:
    total: Counter = Counter()
    for shares in kept_by_op(kind.ops, policy).values():
        total.update(shares)
    return total


def _largest_steps(kind: LayerKind, resident: Collection[Tensor], local_bytes: LocalBytes) -> dict[str, Counter]:
    """Bytes by kind of a layer's largest step: forward, backward, and both, which is backward with recomputation."""
    sizes = [(step.phase, _bytes(step.live, local_bytes)) for step in steps(kind.ops, kind.outputs, resident=resident)]
    return {
        phase: max((live for p, live in sizes if phase in (p, "both")), key=lambda live: sum(live.values()))
        for phase in ("forward", "backward", "both")
    }


def _bytes(live: Live, local_bytes: LocalBytes) -> Counter:
    """Bytes by kind."""
    total: Counter = Counter()
    for (kind, tensor), share in live.items():
        total[kind] += share * local_bytes(tensor)
    return total
