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
    saved         for each layer whose backward is still to come: all that autograd saves of its ops if it recomputes
                  nothing; else its inputs, and the outputs of the ops that it keeps, with attention's logsumexp
    transient     in the running layer: all that its ops save, if it recomputes them; values that will be used again;
                  gradients; the workspace of an op
    loss          the gradient of the hidden states, that of the head's weight in float32, and one chunk of logits in
                  float32

The tensors that autograd saves are those of torch 2.13 on a GPU with fused attention and RMSNorm. benchmarks/memory.py
counts the bytes that are predicted here.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from longctx.compiler.ir import Graph, LayerCall, LayerKind, Tensor, nbytes
from longctx.compiler.lifetimes import Live, SavedByLayer, saved_by_op, saved_inputs, steps
from longctx.compiler.ops import Shares, spec_of
from longctx.compiler.ops.spec import FLOAT32_BYTES
from longctx.compiler.recompute import Recompute

# What a GPU has in use besides the peak: the allocator's gaps, with expandable segments, and CUDA's context. An H200
# had 71.72 GB allocated at the peak of Llama-3-8B at 131,072 tokens on 8 ranks, 73.85 reserved, 74.73 in use. NCCL's
# buffers were not among them, since one GPU needs none.
RESERVED_SHARE = 1.03
CONTEXT_BYTES = 0.9e9
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


def in_use(peak: float) -> float:
    """An estimate of the bytes of a GPU that are taken where this many are allocated at the peak, without NCCL's."""
    return RESERVED_SHARE * peak + CONTEXT_BYTES


def say_bytes(size: float) -> str:
    """'134.2 MB', '16.4 KB', '4 bytes'."""
    for unit, name in ((1e6, "MB"), (1e3, "KB")):
        if size >= 0.1 * unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} bytes"


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
            phase = "both" if backward and recompute[i].kept is not None else step.phase
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
    for held, share in live.items():
        total[held.kind] += share * nbytes(held.tensor)
    return total
