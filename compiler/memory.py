"""The memory of one rank at its peak, from the graph: what is live at each step of a forward and a backward pass.

What is live is the same whatever the partition, only the sizes differ. So every step is first a multiset of tensors,
then a sum of their bytes on this rank, which a planner may also write as a linear constraint.

The peak is the largest, over the steps of a micro-batch, of

    persistent    16 bytes a parameter this rank holds: float32 master, gradient and AdamW's two moments
                  (ZeRO-3, arXiv:1910.02054; FSDP2 shards dimension 0, rounded up)
    gathered      compute dtype: the root's weights from first to last, the running layer's, and the next one's
                  all-gather buffer, which FSDP2 prefetches
    reduced       float32: the input of the previous layer's reduce-scatter, which FSDP2 frees one layer later
    live tensors  what autograd has saved, the gradients under way, and what is made and not yet dropped

Autograd's saved tensors are those of torch 2.13's derivatives.yaml on a GPU with fused attention and RMSNorm.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from compiler.trace import Graph, LayerCall, Op, Tensor

LocalBytes = Callable[[Tensor], float]  # a tensor's bytes on this rank
Live = Counter  # (kind of memory, tensor) -> how many times its bytes; fractions for what is smaller than the tensor

MASTER_BYTES = 4  # float32: the weights, gradients and both moments
LOSS_CHUNK = 1024  # chunk_linear_cross_entropy's chunk_size
QUERY_BLOCK = 1024  # model.QUERY_BLOCK: queries that attention takes at a time where no fused kernel does the job


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of one rank at its peak, by kind; `moment` says when that is."""

    masters: float
    gradients: float  # of the masters: this rank's shards, float32
    optimizer: float
    gathered: float  # FSDP's gathered weights and all-gather buffers, in the compute dtype
    weight_gradients: float  # of the gathered weights, in the compute dtype, before they are reduced
    reduce_scatter: float  # float32 inputs of reduce-scatters
    saved: float  # what layers keep from forward to backward
    transient: float  # what the running layer or operator holds besides
    loss: float
    moment: str

    @property
    def peak(self) -> float:
        return sum(value for value in vars(self).values() if not isinstance(value, str))


def nbytes(tensor: Tensor) -> int:
    """A whole tensor's bytes: the `local_bytes` of a graph that holds this rank's shapes already."""
    return prod(tensor.shape) * tensor.dtype.itemsize


# --- what each operator keeps --------------------------------------------------------------------------------------

_VIEWS = {"view", "transpose", "permute", "t", "unsqueeze", "squeeze", "alias", "detach", "expand"}
_PARTS = {"slice", "select", "chunk", "split", "split_with_sizes", "narrow", "unbind"}  # views of less than the whole
_VIEWS_IF_CONTIGUOUS = {"reshape", "flatten", "contiguous"}
_STRIDED = {"transpose", "permute", "t", "expand", "slice", "select", "chunk", "split", "split_with_sizes", "narrow"}
_SAVE_NOTHING = {"add", "sub", "neg", "cat", "stack", "to", "type_as", "clone", "sum", "mean", "cumsum"}
_SAVE_NOTHING |= {"repeat_interleave", "masked_fill", "all_to_all", "all_gather", "all_gather_reduce", "take_slice"}
_SAVE_NOTHING |= {"replicate", "all_reduce", "all_reduce_both", "reduce_scatter", "scale_gradient", "own_slice"}
_SAVE_INPUT = {"silu", "gelu", "pow", "square", "cos", "sin", "abs", "leaky_relu", "softplus"}
_SAVE_OUTPUT = {"relu", "tanh", "sigmoid", "exp", "sqrt", "rsqrt", "softmax", "_softmax"}
_SAME_GRADIENT = {"add", "cat", "stack", "alias", "replicate"}  # the input's gradient is the output's, or a view of it


def _name(op: Op) -> str:
    """'linear' of 'aten.linear.default', 'all_gather' of 'runtime.collectives.all_gather', 'model.attention' itself."""
    parts = op.target.split(".")
    return parts[1] if parts[0] == "aten" else parts[-1] if "collectives" in parts else op.target


def saved_tensors(op: Op) -> list[Tensor]:
    """The tensors that autograd keeps from an op's forward for its backward; an unknown op keeps all it sees."""
    if not any(t.requires_grad for t in op.outputs):
        return []
    name, inputs = _name(op), op.inputs
    if name in _VIEWS | _PARTS | _VIEWS_IF_CONTIGUOUS | _SAVE_NOTHING:
        return []
    if name in _SAVE_INPUT:
        return inputs[:1]
    if name in _SAVE_OUTPUT:
        return list(op.outputs)
    if name in ("mul", "matmul", "bmm", "mm", "linear"):  # each factor is what the other's gradient is made of
        first, *rest = inputs[:2]
        return [t for t, other in zip((first, *rest), (*rest, first), strict=True) if rest and other.requires_grad]
    if name == "div":
        return inputs if inputs[-1].requires_grad else inputs[1:]
    if name in ("embedding", "where", "dropout"):
        return [t for t in inputs if not t.dtype.is_floating_point]
    if name == "layer_norm":
        return inputs[:2]
    if name == "model.rms_norm":  # with an offset it works on float32 copies, which _extra_saved counts
        return inputs[1:] if _option(op, "offset", 3) else inputs
    if name == "model.attention":
        return inputs if _by_blocks(op) else [*inputs, *op.outputs]
    if _is_loss(op):
        return inputs
    return [*inputs, *op.outputs]


def extra_saved(op: Op) -> dict[Tensor, float]:
    """What an op keeps besides tensors of the graph, in shares of the bytes of a tensor that it is as long as."""
    if not any(t.requires_grad for t in op.outputs):
        return {}
    name, first = _name(op), op.inputs[0]
    per_row = 4 / (first.shape[-1] * first.dtype.itemsize) if first.shape else 0.0  # a float32 number a row
    if name == "model.rms_norm":
        float32_copy = 4 / first.dtype.itemsize if _option(op, "offset", 3) else 0.0
        return {first: per_row + float32_copy}
    if name == "layer_norm":
        return {first: 2 * per_row}  # mean and reciprocal deviation
    if name == "dropout":
        return {first: 1 / first.dtype.itemsize}  # a mask of bytes
    if name == "model.attention" and not _by_blocks(op):
        return {first: per_row}  # the logarithm of each row's sum of exponentials (arXiv:2307.08691)
    if _is_loss(op):  # gradients made in the forward; the weight's is float32
        weight = op.inputs[1]
        hidden = {first: 1.0} if first.requires_grad else {}
        return hidden | ({weight: 4 / weight.dtype.itemsize} if weight.requires_grad else {})
    return {}


def workspace(op: Op, phase: str) -> dict[Tensor, float]:
    """What an op holds only while it runs, in shares of tensors' bytes; `phase` is 'forward' or 'backward'."""
    name, inputs = _name(op), op.inputs
    if name == "model.attention":
        return _attention_workspace(op, phase)
    if name == "model.rms_norm" and _option(op, "offset", 3):
        return {inputs[0]: 4 / inputs[0].dtype.itemsize}  # its float32 output, or that one's gradient
    if _is_loss(op) and phase == "forward":
        weight, tokens = inputs[1], prod(inputs[2].shape)
        chunk = min(LOSS_CHUNK, tokens)  # float32 logits [chunk, n] and hidden states' gradient [chunk, d]
        return {weight: chunk * (1 + weight.shape[1] / weight.shape[0]) * 4 / (weight.shape[1] * weight.dtype.itemsize)}
    if name in ("all_to_all", "reduce_scatter"):
        return {inputs[0]: 1.0}  # the input, cut into parts for each rank
    return {}


def _attention_workspace(op: Op, phase: str) -> dict[Tensor, float]:
    """FlashAttention-2's backward (arXiv:2307.08691): a float32 query gradient, and the gradients of each query head's
    keys and values before those of a group are summed. Where queries are taken by blocks, their float32 scores."""
    query, key, value = op.inputs[:3]
    size = query.dtype.itemsize
    if _by_blocks(op):
        length, window = query.shape[2], _option(op, "window", 4)
        keys = min(length, QUERY_BLOCK + window) if window else length
        copies = 3 if phase == "forward" else 5
        return {query: copies * min(QUERY_BLOCK, length) * keys * 4 / (length * query.shape[-1] * size)}
    if phase == "forward":
        return {}
    grouped = 2.0 if key.shape[1] != query.shape[1] else 0.0
    return {query: 4 / size + grouped + 4 / (query.shape[-1] * size)}


def _option(op: Op, name: str, place: int):
    """A plain argument of a registered op, by name or by place; 0 where it is not given."""
    return op.kwargs.get(name, op.args[place] if len(op.args) > place else 0) or 0


def _by_blocks(op: Op) -> bool:
    """Whether attention goes by blocks of queries, in Python: a soft-cap or a window, which PyTorch's kernels lack."""
    window = _option(op, "window", 4)
    eager = _option(op, "implementation", 7) == "eager"
    return bool(eager or _option(op, "softcap", 5) or (window and window < op.inputs[0].shape[2]))


def _is_loss(op: Op) -> bool:
    return _name(op).endswith("chunk_linear_cross_entropy")


# --- storages ------------------------------------------------------------------------------------------------------


def storages(ops: Iterable[Op | LayerCall]) -> dict[Tensor, Tensor]:
    """Value -> the first value of its storage, for the outputs of `ops`; views share one."""
    storage: dict[Tensor, Tensor] = {}
    strided: set[Tensor] = set()
    for op in ops:
        name = _name(op) if isinstance(op, Op) else ""
        source = next(iter(op.inputs), None)
        is_view = name in _VIEWS | _PARTS | {"replicate", "scale_gradient", "own_slice"}
        is_view |= name in _VIEWS_IF_CONTIGUOUS and source not in strided
        for out in op.outputs:
            storage[out] = storage.get(source, source) if is_view else out
            if name in _STRIDED or (source in strided and out.shape == source.shape and name != "contiguous"):
                strided.add(out)
    return storage


def kept_by_op(ops: Sequence[Op], policy: str) -> dict[Op, Live]:
    """What a layer under a recompute policy keeps besides its input, by the op that makes it.

    Bytes follow from each op's own partition: sum over ops of sum of share * local_bytes(tensor). Where a value is
    moved to another placement before an op that saves it, it is the move's result that is kept: in a graph of one
    rank's ops (partition.localize) moves are ops like others.
    """
    kept: dict[Op, Live] = {}
    if policy == "layer":
        return kept
    storage = storages(ops)
    saved = {storage.get(t) for op in ops for t in saved_tensors(op)}
    for op in ops:
        attention = _name(op) == "model.attention"
        if policy == "attention" and not attention:
            continue
        own = Counter({("saved", t): 1.0 for t in op.outputs if storage[t] is t and (attention or t in saved)})
        own.update({("saved", t): share for t, share in extra_saved(op).items()})
        if own:
            kept[op] = own
    return kept


# --- steps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What is live while `item` runs in a phase; the body's inputs, weights and constants are not in it.

    Of a layer called, only what lives across it: what lives inside it is its own steps' matter.
    """

    item: Op | LayerCall
    phase: str  # 'forward' or 'backward'
    live: Live


def steps(
    items: Sequence[Op | LayerCall],
    results: Sequence[Tensor],
    kept: Mapping[LayerCall, Live] | None = None,
    resident: Collection[Tensor] = (),
) -> list[Step]:
    """The steps of a body's forward pass, then those of its backward pass.

    Args:
        results: the body's outputs; their gradients are the caller's.
        kept: for each layer called, what it keeps beyond its inputs.
        resident: weights whose gradients are added at once to those of the micro-batches before.
    """
    storage = storages(items)
    saves = {
        item: {storage.get(t, t) for t in (saved_tensors(item) if isinstance(item, Op) else item.inputs)}
        for item in items
    }
    extras = {item: _extras(item) if isinstance(item, Op) else kept[item] for item in items}
    live: Live = Counter()
    forward = list(_forward_steps(items, results, storage, saves, extras, live))
    return forward + list(_backward_steps(items, results, storage, saves, extras, live, resident))


def _extras(op: Op) -> Live:
    return Counter({(_kind(op), t): share for t, share in extra_saved(op).items()})


def _kind(op: Op) -> str:
    return "loss" if _is_loss(op) else "transient"


def _working(item: Op | LayerCall, phase: str) -> Live:
    if isinstance(item, LayerCall):
        return Counter()
    return Counter({(_kind(item), t): share for t, share in workspace(item, phase).items()})


def _forward_steps(items, results, storage, saves, extras, live: Live) -> Iterator[Step]:
    """Values live until their last use; those saved stay in `live`."""
    last_use = {storage.get(t, t): i for i, item in enumerate(items) for t in (*item.inputs, *item.outputs)}
    stay = {t for tensors in saves.values() for t in tensors} | {storage.get(t, t) for t in results}
    layers_keep = {t for item in items if isinstance(item, LayerCall) for t in saves[item]}
    for index, item in enumerate(items):
        for tensor in item.outputs:
            if storage[tensor] is tensor:
                live["saved" if tensor in layers_keep else "transient", tensor] += 1
        yield Step(
            item, "forward", live + _working(item, "forward") + (extras[item] if isinstance(item, Op) else _NONE)
        )
        live.update(extras[item])
        for tensor in {storage.get(t, t) for t in (*item.inputs, *item.outputs)}:
            if last_use[tensor] == index and tensor not in stay:
                _drop(live, tensor)


_NONE: Live = Counter()


def _drop(live: Live, tensor: Tensor) -> None:
    for kind in ("saved", "transient"):
        live.pop((kind, tensor), None)


def _backward_steps(items, results, storage, saves, extras, live: Live, resident) -> Iterator[Step]:
    """Each op makes its inputs' gradients, then drops its outputs' and what no op before it has saved."""
    first_saver = {tensor: item for item in reversed(items) for tensor in saves[item]}
    for tensor in {storage.get(t, t) for t in results} - set(first_saver):
        _drop(live, tensor)
    # Value -> what its gradient's memory was made as: an op and that op's input; None if it is the caller's. A view of
    # a gradient is made as that gradient.
    gradients: dict[Tensor, tuple | None] = dict.fromkeys(results)
    weights: set[Tensor] = set()
    for item in reversed(items):
        if isinstance(item, LayerCall):
            yield Step(item, "backward", live - extras[item] + _gradients_live(gradients.values(), weights))
        if any(t in gradients for t in item.outputs):
            made = _made_gradients(item, gradients)
            weights |= {t for t in made if t.kind == "parameter" and t not in resident}
            made = {t: owner for t, owner in made.items() if t not in weights}
            both = [*gradients.values(), *made.values()]  # a second gradient of a value, until it is added to the first
            if isinstance(item, Op):
                yield Step(item, "backward", live + _gradients_live(both, weights) + _working(item, "backward"))
            gradients = {**{t: owner for t, owner in made.items() if t not in resident}, **gradients}
        live.subtract(extras[item])
        for tensor in saves[item]:
            if first_saver[tensor] is item:
                _drop(live, tensor)
        for tensor in item.outputs:
            gradients.pop(tensor, None)


def _made_gradients(item: Op | LayerCall, gradients: Mapping[Tensor, tuple | None]) -> dict[Tensor, tuple | None]:
    """Each input that has a gradient -> what that gradient's memory is made as."""
    name = _name(item) if isinstance(item, Op) else ""
    passed_on = name in _SAME_GRADIENT | _VIEWS_IF_CONTIGUOUS | _VIEWS - {"expand"}
    incoming = next(t for t in item.outputs if t in gradients)
    made = {}
    for tensor in item.inputs:
        if tensor.requires_grad:
            same = passed_on and tensor.dtype == incoming.dtype and tensor.kind != "parameter"
            made[tensor] = gradients[incoming] if same else (item, tensor)
    return made


def _gradients_live(owners: Iterable[tuple | None], weights: Iterable[Tensor]) -> Live:
    live = Counter(("transient", tensor) for _, tensor in {owner for owner in owners if owner is not None})
    live.update(("weight_gradients", tensor) for tensor in weights)
    return live


# --- the prediction ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """Bytes of a group of weights under FSDP over `n_ranks` ranks."""

    gathered: float  # compute dtype
    buffer: float  # the same, padded for the all-gather
    reduced: float  # float32, padded for the reduce-scatter
    shard: float  # float32, this rank's part


def _fsdp_weights(parameters: Iterable[Tensor], n_ranks: int) -> _Weights:
    gathered = buffer = reduced = shard = 0.0
    for tensor in parameters:
        part = ceil(tensor.shape[0] / n_ranks) * prod(tensor.shape[1:])
        gathered += nbytes(tensor)
        buffer += part * n_ranks * tensor.dtype.itemsize
        reduced += part * n_ranks * MASTER_BYTES
        shard += part * MASTER_BYTES
    return _Weights(gathered, buffer, reduced, shard)


def predict(
    graph: Graph,
    recompute: Sequence[str],
    local_bytes: LocalBytes,
    n_ranks: int,
    resident: Collection[Tensor] = (),
) -> MemoryPrediction:
    """The peak of one rank in a micro-batch that is not the first, which finds gradients of those before it.

    Args:
        recompute: each layer's policy: 'layer', 'attention' or 'none'.
        local_bytes: a tensor's bytes on this rank; `nbytes` for a graph of one rank's ops.
        n_ranks: all ranks, over which FSDP shards.
        resident: the weights that each rank of a plan keeps its own part of, in float32; all others are FSDP's.
    """
    calls = graph.layer_calls
    root = _fsdp_weights((t for t in graph.parameters.values() if t not in resident), n_ranks)
    by_kind = [_fsdp_weights((t for t in k.parameters.values() if t not in resident), n_ranks) for k in graph.kinds]
    layers = [by_kind[call.kind] for call in calls]
    shard = root.shard + sum(weights.shard for weights in layers)
    for owner, times in [(graph, 1), *((k, sum(c.kind == i for c in calls)) for i, k in enumerate(graph.kinds))]:
        own = (local_bytes(t) / t.dtype.itemsize * MASTER_BYTES for t in owner.parameters.values() if t in resident)
        shard += times * sum(own)

    moments = list(_moments(graph, recompute, local_bytes, root, layers, resident))
    end = Counter(weight_gradients=root.gathered, reduce_scatter=root.reduced, transient=root.shard)
    moments.append(("the reduce-scatter of embedding and head", end))
    moment, live = max(moments, key=lambda item: sum(item[1].values()))
    kinds = {k: live[k] for k in ("gathered", "weight_gradients", "reduce_scatter", "saved", "transient", "loss")}
    return MemoryPrediction(masters=shard, gradients=shard, optimizer=2 * shard, moment=moment, **kinds)


def _moments(
    graph: Graph,
    recompute: Sequence[str],
    local_bytes: LocalBytes,
    root: _Weights,
    layers: Sequence[_Weights],
    resident: Collection[Tensor],
) -> Iterator[tuple[str, Counter]]:
    """What each step of a micro-batch is, and its bytes by kind, persistent ones apart."""
    kept, inside = {}, {}
    for number, kind in enumerate(graph.kinds):
        own_steps = steps(kind.ops, kind.outputs, resident=resident)
        for policy in {recompute[call.index] for call in graph.layer_calls if call.kind == number}:
            kept[number, policy] = sum(kept_by_op(kind.ops, policy).values(), Counter())
            inside[number, policy, "forward"] = _largest(own_steps, ("forward",), local_bytes)
            phases = ("backward",) if policy == "none" else ("forward", "backward")
            inside[number, policy, "backward"] = _largest(own_steps, phases, local_bytes)

    last, backward_begun = len(layers) - 1, False
    kept_by_call = {call: kept[call.kind, recompute[call.index]] for call in graph.layer_calls}
    for step in steps(graph.body, [graph.output], kept_by_call, resident):
        live = _bytes(step.live, local_bytes)
        live["gathered"] += root.gathered
        if isinstance(step.item, Op):
            if layers and (step.phase == "forward" or not backward_begun):  # FSDP frees it late, and gathers it early
                live["gathered"] += layers[last].buffer
            yield f"{step.phase} of {step.item.target}", live
            continue
        backward_begun = step.phase == "backward"
        i = step.item.index
        live.update(inside[step.item.kind, recompute[i], step.phase])
        live["gathered"] += layers[i].gathered + layers[i - 1 if step.phase == "backward" and i else i].buffer
        if step.phase == "backward" and i < last:
            live["reduce_scatter"] += layers[i + 1].reduced
        yield f"{step.phase} of layer {i}", live


def _largest(own_steps: Iterable[Step], phases: Collection[str], local_bytes: LocalBytes) -> Counter:
    sizes = (_bytes(step.live, local_bytes) for step in own_steps if step.phase in phases)
    return max(sizes, key=lambda live: sum(live.values()), default=Counter())


def _bytes(live: Live, local_bytes: LocalBytes) -> Counter:
    """Bytes by kind."""
    total: Counter = Counter()
    for (kind, tensor), copies in live.items():
        total[kind] += copies * local_bytes(tensor)
    return total
