"""Puts `attention` in the place of attention that is written out, and of attention with a mask that is a tensor.

transformers makes masks as tensors, which at 131,072 tokens would be 34 GB each, and models of older families compute
scores, softmax and values in operators of their own. `replace_attention` looks at what these do to the scores of some
queries, and takes the kernel that does the same: causal, with a window, a soft-cap or linear biases. What does
something else is refused, or stays as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from longctx.compiler.ir import DOCUMENT_STARTS, FlatGraph, Op, Tensor
from longctx.compiler.ops import aten
from longctx.compiler.ops.positions import Positions, UnknownValueError, known_values
from longctx.compiler.ops.registered import arguments_of, register_op, target_of
from longctx.compiler.ops.scores import (
    Scores,
    UnknownStepError,
    WrittenAttention,
    by_heads,
    direct_result,
    find_attention,
    key_of,
    scores_at,
    values_at,
    with_heads,
    without_repeats,
)
from longctx.errors import ModelError
from longctx.kernels.attention import alibi_attention, attention, sink_attention
from longctx.kernels.fused import check_documents, check_masks, check_sinks

UNSEEN = -5000.0  # a key whose bias is so far below the query's own has a weight of 0: exp underflows in float32
CLOSE = 1e-6  # relative to the largest bias: what rounding in float32 explains
ALL_QUERIES = 512  # up to this length every query is looked at, and from then on some
KERNEL_CALLS = {target_of(kernel) for kernel in (attention, alibi_attention, sink_attention)}
SPREAD = 64  # keys that are looked at besides those at the edges, evenly spread


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    dropout: float = 0.0,
    implementation: str = "auto",
    deterministic: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as a model calls it while it is traced, with the mask that transformers made for it.

    [b, heads, l, d], [b, kv_heads, l, d], [b, kv_heads, l, e], a mask that is added to the scores, [b, 1, l, l], and
    sinks as sink_attention has them, [heads] -> [b, l, heads, e]. It computes nothing: `replace_attention` takes it out
    of every graph.
    """
    return attention(query, key, value, scale, 0, softcap, dropout, implementation, deterministic)


@dataclass(frozen=True)
class Meaning:
    """What is done to the scores of all heads, as the kernels take it. `slopes`, [heads], is None without biases."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    slopes: torch.Tensor | None = None


@dataclass(frozen=True)
class _Graph:
    """What is known of a graph while it is rewritten; `constants` and `meanings` grow."""

    makers: dict[Tensor, Op]
    users: dict[Tensor, list[Op]]
    constants: dict[Tensor, torch.Tensor]
    positions: Positions
    options: dict[str, Any]
    meanings: dict[Tensor, Meaning]  # of masks
    document_starts: dict[str, Tensor]  # the argument that keeps documents apart; none where they see each other


def replace_attention(flat: FlatGraph, options: dict[str, Any]) -> FlatGraph:
    """The graph with `attention`, or `alibi_attention`, wherever attention is written out or has a mask.

    The operators of a mask, and those whose place is taken, are left in the graph for nobody to read. A mask is looked
    at for a row of one document. Where the documents of a row are not to see each other, every call of a kernel is told
    where they begin.

    Args:
        flat: without operators that nobody reads.
        options: what the kernel is told besides: `implementation` and `deterministic`, unless they have their defaults.

    Raises:
        ModelError: an attention has a mask or a bias that no kernel has.
        KernelError: the kernel that was asked for doesn't have it.
    """
    makers = {tensor: op for op in flat.ops for tensor in op.outputs}
    users: dict[Tensor, list[Op]] = {flat.output: []}
    for op in flat.ops:
        for tensor in dict.fromkeys(op.inputs):
            users.setdefault(tensor, []).append(op)
    constants = dict(flat.constants)
    positions = Positions(makers, known_values(flat))
    document_starts = {tensor.name: tensor for tensor in flat.inputs if tensor.name == DOCUMENT_STARTS}
    if document_starts:
        check_documents(options.get("implementation", "auto"))
    graph = _Graph(makers, users, constants, positions, options, {}, document_starts)
    replaced: dict[Op, list[Op]] = {}
    for op in flat.ops:
        if op.target == target_of(masked_attention):
            replaced[op] = _in_place_of_masked(op, graph)
        elif op.target in KERNEL_CALLS:
            replaced[op] = [replace(op, kwargs=op.kwargs | document_starts)]
        elif written := find_attention(op, makers, users):
            replaced |= _in_place_of_written(written, op.module, graph)
    ops = [new for op in flat.ops for new in replaced.get(op, [op])]
    return replace(flat, ops=ops, constants=constants)


def _in_place_of_masked(op: Op, graph: _Graph) -> list[Op]:
    """The call of a kernel that does what a mask says."""
    arguments = arguments_of(op)
    mask, length = arguments["mask"], arguments["query"].shape[2]

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> Scores:
        """What the mask adds; the kernel multiplies by the scale and caps before that."""
        try:
            bias = values_at(mask, (*mask.shape[:-2], length, length), graph.positions, queries, keys)
        except UnknownValueError as error:
            raise ModelError(
                f"the attention {op.module} has a mask that depends on more than the positions of its tokens, which "
                "this program does not have; choose another model"
            ) from error
        bias = bias.reshape(-1, len(queries), len(keys)).double()
        return Scores(torch.ones_like(bias), bias)

    if mask not in graph.meanings:
        graph.meanings[mask] = meaning_of(scores, length, op.module)
    meaning = replace(graph.meanings[mask], scale=arguments["scale"], softcap=arguments["softcap"])
    tensors = [arguments[name] for name in ("query", "key", "value")]
    return [_call(tensors, meaning, arguments["dropout"], op, op.outputs[0], graph, arguments["sinks"])]


def _in_place_of_written(written: WrittenAttention, module: str, graph: _Graph) -> dict[Op, list[Op]]:
    """The operator whose place is taken, and what takes it; empty if what happens to the scores is not understood.

    Args:
        module: the module that runs the softmax, which all new operators are of.
    """

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> Scores:
        return scores_at(written, graph.positions, queries, keys)

    length = written.result.outputs[0].shape[-2]
    try:
        meaning = meaning_of(scores, length, module)
    except (UnknownStepError, UnknownValueError):
        return {}
    ops, tensors = _inputs(written, graph)
    place, is_kernels_layout = direct_result(written, graph.users)
    output = place.outputs[0]
    if is_kernels_layout:
        ops.append(_call(tensors, meaning, written.dropout, written.result, output, graph))
    else:
        shape = (1, output.shape[-2], written.heads, output.shape[-1])
        result = replace(output, name=f"{output.name}_rows", shape=shape)
        ops.append(_call(tensors, meaning, written.dropout, written.result, result, graph))
        ops += by_heads(result, output)
    return {place: [replace(op, module=module, statement=written.result.statement) for op in ops]}


def _inputs(written: WrittenAttention, graph: _Graph) -> tuple[list[Op], list[Tensor]]:
    """Query, key and value as the kernels take them, of one dtype, and the operators that make them so."""
    ops, key = key_of(written, graph.makers)
    more, (query, key, value) = zip(
        *(with_heads(tensor, graph.makers) for tensor in (written.query, key, written.value)), strict=True
    )
    single = [without_repeats(tensor, graph.makers) for tensor in (key, value)]
    if single[0].shape[1] == single[1].shape[1]:
        key, value = single
    tensors = []
    ops = [*ops, *(op for some in more for op in some)]
    for tensor in (query, key, value):
        if tensor.dtype != value.dtype:
            narrow = replace(tensor, name=f"{tensor.name}_cast", dtype=value.dtype, kind="activation")
            ops.append(aten.cast(tensor, narrow))
            tensor = narrow
        tensors.append(tensor)
    return ops, tensors


def _call(
    tensors: Sequence[Tensor],
    meaning: Meaning,
    dropout: float,
    place: Op,
    output: Tensor,
    graph: _Graph,
    sinks: Tensor | None = None,
) -> Op:
    """The call of a kernel; `place` is the operator after which it is named."""
    given = {"window": meaning.window, "softcap": meaning.softcap, "dropout": dropout}
    masks_more = bool(meaning.window or meaning.softcap or meaning.slopes is not None)
    check_masks(graph.options.get("implementation", "auto"), place.module, masks_more)
    given = {name: value for name, value in given.items() if value}  # what is off is left out of the generated code
    kwargs = {"scale": meaning.scale} | given | graph.options | graph.document_starts
    function, args = attention, tuple(tensors)
    if meaning.slopes is not None:
        slopes = meaning.slopes.expand(tensors[0].shape[1])
        function, args = alibi_attention, (*tensors, _constant(slopes, graph))
    if sinks is not None:
        check_sinks(graph.options.get("implementation", "auto"), place.module)
        if meaning.slopes is not None:
            raise _different(place.module, "with biases and sinks")
        function, args = sink_attention, (*tensors, sinks)
    return Op(target_of(function), args, kwargs, (output,), place.module, place.statement)


def _constant(slopes: torch.Tensor, graph: _Graph) -> Tensor:
    """The constant of the graph with these values, which all layers share."""
    for tensor, value in graph.constants.items():
        if tensor.name == "alibi_slopes" and torch.equal(value, slopes):
            return tensor
    tensor = Tensor("alibi_slopes", tuple(slopes.shape), slopes.dtype, False, "constant")
    graph.constants[tensor] = slopes
    return tensor


# --- what a mask and a bias mean -------------------------------------------------------------------------------------


def meaning_of(scores: Callable[[torch.Tensor, torch.Tensor], Scores], length: int, module: str) -> Meaning:
    """What is done to scores, looked at for some queries and keys (for all, in a row of at most ALL_QUERIES tokens).

    Args:
        scores: of the queries and the keys of these indices, int64 each.
        module: the attention, for errors.

    Raises:
        ModelError: it is not causal, has a bias that is not ALiBi's, or scales heads differently.
    """
    window = _window(scores, length)
    queries, keys = _chosen(length, window)
    seen = scores(queries, keys)
    distance = queries.unsqueeze(1) - keys
    visible = (distance >= 0) & (distance < window)
    own = torch.searchsorted(keys, queries).view(1, -1, 1).expand(len(seen.bias), -1, -1)
    relative = seen.bias - seen.bias.gather(2, own)  # the softmax does not see what is added to all keys of a query
    if not (relative[:, ~visible] <= UNSEEN).all():
        raise _different(module, "in which a token sees others than those before it, or than the last of these")
    rounding = CLOSE * (1 + seen.bias[:, visible].abs().max())
    first = int(torch.searchsorted(keys, torch.tensor(length - window)))
    slopes = -relative[:, -1, first] / max(window - 1, 1)
    if not ((relative + slopes.view(-1, 1, 1) * distance).abs()[:, visible] <= rounding).all():
        raise _different(module, "with biases that are not linear in the distance")
    factor, inner = (_one_number(values, visible, module) for values in (seen.factor, seen.inner))
    return Meaning(
        scale=factor if seen.inner is None else factor * inner,
        window=window if window < length else 0,
        softcap=0.0 if seen.inner is None else factor,
        slopes=slopes.float() if (slopes.abs() * length > rounding).any() else None,
    )


def _window(scores: Callable[[torch.Tensor, torch.Tensor], Scores], length: int) -> int:
    """How many keys, its own included, the last query of a row sees without a gap."""
    bias = scores(torch.tensor([length - 1]), torch.arange(length)).bias[0, 0]
    gaps = (bias.diff().abs() >= -UNSEEN / 2).nonzero()
    return length - (int(gaps[-1]) + 1 if len(gaps) else 0)


def _chosen(length: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries and the keys to look at: the first and the last, those at the window's edge, and some between."""
    if length <= ALL_QUERIES:
        return torch.arange(length), torch.arange(length)
    edges = [0, 1, 2, window - 1, window, window + 1, length // 3, length // 2, length - 2, length - 1]
    queries = torch.tensor(edges).clamp(0, length - 1).unique()
    beside = torch.cat([queries + step for step in (-1, 0, 1, -window, 1 - window)])
    keys = torch.cat([beside, torch.linspace(0, length - 1, SPREAD).long()])
    return queries, keys.clamp(0, length - 1).unique()


def _one_number(values: torch.Tensor | None, visible: torch.Tensor, module: str) -> float:
    """The factor of all scores that a token sees; 1 where there is none."""
    if values is None:
        return 1.0
    numbers = values[:, visible]
    if (numbers.max() - numbers.min()).abs() > CLOSE * numbers.abs().max():
        raise _different(module, "whose scores have different scales")
    return numbers.flatten()[0].item()


def _different(module: str, what: str) -> ModelError:
    return ModelError(
        f"the model has an attention ({module}) {what}, which this program does not have; choose another model"
    )


register_op("b (k g) l^ d^, b k l^ d^, b k l^ e^, ? -> b l^ (k g) e^", rewrite=replace_attention)(masked_attention)
