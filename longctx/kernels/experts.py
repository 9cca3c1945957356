"""The experts of a mixture, as generated code calls them: each token goes through the few that a router chose for it.

An expert is an MLP. The pairs of a token and an expert that it chose are the rows of three products: rows are sorted by
their expert, so that each product is one of groups of rows, each with a matrix of its own (MegaBlocks,
arXiv:2211.15841, section 5). No pair is dropped, whatever the balance. How many rows an expert has is known only to the
device, and the host does not wait for it, unless a rank has some of the experts only, whose rows it has to count.

The second half of the file is what the compiler has to know: FLOPs, what is saved, and what a rank has of either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from longctx.compiler.ir import FlatGraph, Op, OwnStarts, Tensor
from longctx.compiler.ops.registered import arguments_of, register_op, target_of
from longctx.compiler.ops.spec import Flops, Shares, Told, always, draws_nothing
from longctx.kernels.kept import computed_once

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of PyTorch's grouped product
PLACE_BYTES = 8  # of an int64
ALIGNMENT = 16  # bytes of which its rows have to be a multiple


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    slope: float = 1.0,
    limit: float = 0.0,
    offset: float = 0.0,
    transposed: bool = False,
    imbalance: float = 1.0,
    starts: Sequence[int] = (),
) -> torch.Tensor:
    """The weighted sum of what a token's experts return: [n, d], [n, k] int64, [n, k] -> [n, d].

    Args:
        top_k_index: the experts that each token chose, of all there are; `top_k_weights` are those of the sum.
        gate_up_proj: [experts, 2 f, d], the rows of the gate before those that it gates; [experts, f, d] without gate.
        down_proj: [experts, d, f].
        gate_up_bias: [experts, 2 f] or [experts, f]; `down_bias` is [experts, d].
        activation: one of ACTIVATIONS; 'relu2' is the square of relu.
        gated: whether the activation of one half multiplies the other one.
        interleaved: whether gate and gated take turns, where otherwise one half comes before the other.
        slope: the activation is of slope * x, and is divided by the slope (GPT-OSS has 1.702).
        limit: if not 0, the gate is at most that before its activation, and what it gates between -limit and limit.
        offset: is added to what is gated.
        transposed: whether the weights are [experts, d, 2 f] and [experts, f, d].
        imbalance: how many times the mean the busiest rank's rows are taken to be, where ranks share out the experts.
            No result depends on it.
        starts: the first of the experts whose weights these are, if they are not all. The sum is then over those only.
    """
    gate = Gate(activation, gated, interleaved, slope, limit, offset)
    tensors = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
    return _Experts.apply(*tensors, gate, transposed, starts[0] if starts else None)


@dataclass(frozen=True)
class Gate:
    """What is computed between an expert's two products; the fields are arguments of `experts`."""

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    slope: float = 1.0
    limit: float = 0.0
    offset: float = 0.0

    def __call__(self, product: torch.Tensor) -> torch.Tensor:
        """[rows, 2 f] -> [rows, f]; without gate, [rows, f] -> [rows, f]."""
        if not self.gated:
            return self.activate(product)
        gate, up = (product[..., ::2], product[..., 1::2]) if self.interleaved else product.chunk(2, -1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.activate(gate) * (up + self.offset if self.offset else up)

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.slope != 1.0:
            return _activate(self.activation, self.slope * x) / self.slope
        return _activate(self.activation, x)


def _activate(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu2":
        return F.relu(x).square()
    return getattr(F, name)(x)


@dataclass(frozen=True)
class _Rows:
    """The pairs of a token and an expert that it chose, sorted by expert.

    Attributes:
        pairs: of each row, [rows] int64: token * k + the place of the choice among the token's.
        ends: behind the last row of each expert, [experts] int32.
        tokens: of each row, [rows] int64.
    """

    pairs: torch.Tensor
    ends: torch.Tensor
    tokens: torch.Tensor

    @property
    def experts(self) -> torch.Tensor:
        """Of each row, [rows] int64, counted from the first whose weights are there."""
        places = torch.arange(self.pairs.shape[0], dtype=self.ends.dtype, device=self.ends.device)
        return torch.searchsorted(self.ends, places, right=True)


def _sorted_pairs(top_k_index: torch.Tensor, n_experts: int, first: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs and ends of the rows of all experts; with `first`, of the n_experts from there on, for whose number the
    host waits."""
    chosen = top_k_index.flatten()
    if first is not None:
        chosen = chosen - first
        chosen = chosen.where((chosen >= 0) & (chosen < n_experts), n_experts)
    chosen, pairs = chosen.sort(stable=True)
    behind = torch.arange(1, n_experts + 1, device=chosen.device)
    ends = torch.searchsorted(chosen, behind, out_int32=True)
    if first is not None:
        n_rows = int(ends[-1])
        for observe in observers:
            observe(n_rows / top_k_index.numel())
        pairs = pairs[:n_rows].clone()  # so that those of other ranks' experts are not saved with them
    return pairs, ends


observers: list[Callable[[float], None]] = []  # are told which share of all rows those of a part of the experts are


class _Experts(torch.autograd.Function):
    """Saves the inputs, the rows' order and the first product; all else is computed again from these, at the cost of no
    product.

    The order is saved with the product that it is the order of: where a layer is computed again, its router may give
    another expert to a token for which two are nearly as likely.
    """

    @staticmethod
    def forward(ctx, x, index, weights, gate_up, down, gate_up_bias, down_bias, gate, transposed, first):
        ctx.gate, ctx.transposed = gate, transposed

        def compute() -> tuple[torch.Tensor, ...]:
            pairs, ends = _sorted_pairs(index, gate_up.shape[0], first)
            rows = _Rows(pairs, ends, pairs // index.shape[1])
            product = _products(x[rows.tokens], _inner_first(gate_up, transposed), ends)
            product = _with_bias(product, gate_up_bias, rows)
            result = _products(gate(product), _inner_first(down, transposed), ends)
            result = _with_bias(result, down_bias, rows).mul_(_weights_of(rows, weights))
            return _sum_of_tokens(result, rows, x), product, pairs, ends

        output, product, pairs, ends = computed_once(compute)
        ctx.save_for_backward(x, weights, gate_up, down, gate_up_bias, down_bias, product, pairs, ends)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weights, gate_up, down, gate_up_bias, down_bias, product, pairs, ends = ctx.saved_tensors
        rows = _Rows(pairs, ends, pairs // weights.shape[1])
        scale = _weights_of(rows, weights)
        product = product.detach().requires_grad_()
        with torch.enable_grad():
            hidden = ctx.gate(product)

        gradient = gradient[rows.tokens]  # of each row, before it is multiplied by the row's weight
        of_hidden = _products(gradient, _inner_first(down, ctx.transposed).mT, ends)
        of_scale = (of_hidden * hidden.detach()).sum(-1, dtype=_accumulator(x))
        if down_bias is not None:
            of_scale += (gradient * down_bias[rows.experts]).sum(-1, dtype=_accumulator(x))
        of_weights = torch.zeros_like(weights)
        of_weights.view(-1)[pairs] = of_scale.to(weights.dtype)

        gradient.mul_(scale)
        of_hidden.mul_(scale)
        of_down = _weight_gradients(gradient, hidden.detach(), ends, ctx.transposed)
        of_down_bias = _bias_gradients(gradient, down_bias, rows)
        del gradient
        (of_product,) = torch.autograd.grad(hidden, product, of_hidden)
        del hidden, of_hidden
        of_gate_up = _weight_gradients(of_product, x[rows.tokens], ends, ctx.transposed)
        of_gate_up_bias = _bias_gradients(of_product, gate_up_bias, rows)
        of_x = _sum_of_tokens(_products(of_product, _inner_first(gate_up, ctx.transposed).mT, ends), rows, x)
        return of_x, None, of_weights, of_gate_up, of_down, of_gate_up_bias, of_down_bias, None, None, None


def _weights_of(rows: _Rows, weights: torch.Tensor) -> torch.Tensor:
    """Of each row the weight that it has in its token's sum: [n, k] -> [rows, 1]."""
    return weights.flatten()[rows.pairs].unsqueeze(1)


def _inner_first(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The weights as [experts, features in, features out], a view."""
    return weight if transposed else weight.mT


def _accumulator(x: torch.Tensor) -> torch.dtype:
    """The dtype of sums over rows."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum_of_tokens(values: torch.Tensor, rows: _Rows, like: torch.Tensor) -> torch.Tensor:
    """For each token the sum of its rows: [rows, d] -> the shape of `like`, [n, d].

    Its rows are brought together and added up in float32, always in one order, where adding each row to its token's sum
    would have the order that a GPU happens to run in.
    """
    if not values.shape[0]:
        return torch.zeros_like(like)
    tokens, order = rows.tokens.sort(stable=True)
    starts = torch.searchsorted(tokens, torch.arange(like.shape[0], device=tokens.device))
    return F.embedding_bag(order, values, starts, mode="sum")


def _with_bias(values: torch.Tensor, bias: torch.Tensor | None, rows: _Rows) -> torch.Tensor:
    return values if bias is None else values.add_(bias[rows.experts])


def _bias_gradients(gradient: torch.Tensor, bias: torch.Tensor | None, rows: _Rows) -> torch.Tensor | None:
    """For each expert the sum of its rows' gradients, added up as `_sum_of_tokens` does: [rows, f] -> [experts, f]."""
    if bias is None or not gradient.shape[0]:
        return None if bias is None else torch.zeros_like(bias)
    starts = F.pad(rows.ends[:-1].long(), (1, 0))
    return F.embedding_bag(torch.arange(gradient.shape[0], device=gradient.device), gradient, starts, mode="sum")


# --- products of groups of rows --------------------------------------------------------------------------------------


def _products(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each row by the matrix of its expert: [rows, in], [experts, in, out] -> [rows, out]."""
    if _has_kernel(rows, *weights.shape[1:]):
        return F.grouped_mm(rows, weights, offs=ends)
    output = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, own in _groups(ends):
        torch.mm(rows[own], weights[expert], out=output[own])
    return output


def _weight_gradients(gradient: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The gradient of each expert's matrix: [rows, out], [rows, in] -> [experts, out, in]; [experts, in, out] if
    transposed. That of an expert with no row is zero."""
    left, right = (rows, gradient) if transposed else (gradient, rows)
    if _has_kernel(rows, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.T, right, offs=ends)
    output = rows.new_empty(ends.shape[0], left.shape[1], right.shape[1])
    for expert, own in _groups(ends):
        torch.mm(left[own].T, right[own], out=output[expert])
    return output


def _has_kernel(rows: torch.Tensor, *widths: int) -> bool:
    """Whether PyTorch's grouped product takes these rows, and matrices of these widths."""
    aligned = all(width * rows.dtype.itemsize % ALIGNMENT == 0 for width in widths)
    return aligned and rows.dtype in KERNEL_DTYPES and not rows.is_meta and rows.shape[0] > 0


def _groups(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert with its rows; none on meta, where nothing is computed."""
    if not ends.is_meta:
        for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            yield expert, slice(start, end)


# --- routers ---------------------------------------------------------------------------------------------------------


def balance(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How many tokens have each expert among their `top_k` likeliest, and the sum of its probabilities.

    [n, experts] -> [2, experts] in float32. Only the probabilities have a gradient.
    """
    probabilities = logits.softmax(-1)
    likeliest = probabilities.topk(top_k).indices.flatten()
    dtype = _accumulator(logits)
    counts = torch.zeros(logits.shape[1], dtype=dtype, device=logits.device)
    counts.scatter_add_(0, likeliest, torch.ones_like(likeliest, dtype=dtype))
    return torch.stack((counts, probabilities.sum(0, dtype=dtype)))


# --- what the compiler knows of them ---------------------------------------------------------------------------------


def beside_their_routers(flat: FlatGraph, options: dict[str, Any]) -> FlatGraph:
    """The graph in which each layer computes its own `balance`, which a model does behind all layers: a layer then
    hands on two numbers for each expert, and not the logits of all tokens."""
    moved: dict[Tensor, list[Op]] = {}
    for op in flat.ops:
        if op.target == target_of(balance):
            moved.setdefault(op.inputs[0], []).append(op)
    ops = []
    for op in flat.ops:
        if op.target != target_of(balance):
            ops.append(op)
            ops += [replace(other, module=op.module) for tensor in op.outputs for other in moved.get(tensor, ())]
    return replace(flat, ops=ops)


def flops(op: Op) -> Flops:
    """The products of the rows: two forward and four backward, of the experts that the tokens chose and no others."""
    _, index, _, gate_up, down = op.inputs[:5]
    forward = 2.0 * prod(index.shape) * (prod(gate_up.shape[1:]) + prod(down.shape[1:]))
    return Flops(forward, 2 * forward)


def flops_of_experts(op: Op, starts: Sequence[int], n: int) -> Flops:
    """Those of the busiest rank, where each has n of the experts."""
    whole, share = flops(op), _share_of_busiest(op, op.inputs[3].shape[0] // n)
    return Flops(whole.forward * share, whole.backward * share)


def _share_of_busiest(op: Op, n_parts: int) -> float:
    """The busiest rank's share of the rows, where so many ranks share out the experts."""
    return min(1.0, arguments_of(op)["imbalance"] / n_parts)


def _of_rows(op: Op, numbers: float, itemsize: float) -> Shares:
    """So many numbers of so many bytes for each row, as a share of the hidden states, [n, d]."""
    x, index, gate_up = op.inputs[0], op.inputs[1], op.inputs[3]
    starts = arguments_of(op)["starts"]
    share = _share_of_busiest(op, starts.length // gate_up.shape[0]) if isinstance(starts, OwnStarts) else 1.0
    return {x: share * numbers * index.shape[1] * itemsize / (x.shape[1] * x.dtype.itemsize)}


def _widths(op: Op) -> tuple[int, int, int]:
    """Of a row: what comes in and goes out, what the first product makes, and what the second one takes."""
    d = op.inputs[0].shape[1]
    return d, prod(op.inputs[3].shape[1:]) // d, prod(op.inputs[4].shape[1:]) // d


def saves(op: Op) -> list[Tensor]:
    """All but what the tokens chose, which the rows' order tells."""
    return [tensor for place, tensor in enumerate(op.inputs) if place != 1]


def saves_besides(op: Op) -> Shares:
    """The first product, and the order of its rows. Where the rows of each expert end is too little to count."""
    _, product, _ = _widths(op)
    itemsize = op.inputs[0].dtype.itemsize
    return _of_rows(op, product + PLACE_BYTES / itemsize, itemsize)


def workspace(op: Op, phase: str) -> Shares:
    """What is held of each row at most, with five int64 for places while they are sorted.

    In the forward that is what the gate makes, or what the second product takes and gives. In the backward it is the
    largest of: the gradient of the output, of what the second product takes, and their product with what was taken; the
    same with the second bias and its product; what the gate and its gradient make; and the gradients of the first
    product and of what that takes.
    """
    d, product, hidden = _widths(op)
    told = arguments_of(op)
    is_plain = told["slope"] == 1.0 and not told["limit"] and not told["offset"]
    of_gate = 2 if is_plain else 4  # that autograd keeps, each as large as what the second product takes
    has_bias = len(op.inputs) > 5
    if phase == "forward":
        numbers = max((of_gate if is_plain else of_gate + 1) * hidden, hidden + (2 if has_bias else 1) * d)
    else:
        weighting = max((of_gate + 2) * hidden + d, (of_gate + 1) * hidden + (3 if has_bias else 1) * d)
        numbers = max(weighting, (of_gate + 4) * hidden, product + d)
    itemsize = op.inputs[0].dtype.itemsize
    return _of_rows(op, numbers + 5 * PLACE_BYTES / itemsize, itemsize)


def passes(op: Op, phase: str) -> Shares:
    """What is read and written around the products: rows are gathered, weighted, brought together and added up.

    The backward gathers gradients and rows, weights them, and computes the gate again, with its gradient.
    """
    d, product, hidden = _widths(op)
    of_gate = product + hidden if phase == "forward" else 3 * product + 6 * hidden
    gathered_and_weighted = 4 * d if phase == "forward" else 6 * d
    return _of_rows(op, of_gate + gathered_and_weighted + d, op.inputs[0].dtype.itemsize) | {op.outputs[0]: 1.0}


register_op(
    "n d^, n k^, n k^, e+ p^ q^, e+ r^ s^, e+ t^, e+ u^ -> n d^",
    flops=flops,
    passes=passes,
    saves=saves,
    saves_besides=saves_besides,
    workspace=workspace,
    draws_random=draws_nothing,
    can_be_kept=always,
    chooses_weights=True,
    told=Told("e", "starts", flops_of_experts, share=_share_of_busiest),
)(experts)
register_op("n+ e^ -> 2 e^", draws_random=draws_nothing, rewrite=beside_their_routers)(balance)
