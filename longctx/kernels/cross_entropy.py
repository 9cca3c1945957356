"""What the compiler has to know of the loss, chunk_linear_cross_entropy.

The loss itself is in a file that needs nothing but PyTorch, so that people can use it elsewhere. `RULES` are the fields
of its OpSpec. train.py registers the loss with them and with its annotation.
"""

from math import prod
from typing import Any

from chunk_linear_cross_entropy import CHUNK_SIZE
from longctx.compiler.ir import Op, Tensor, nbytes
from longctx.compiler.ops.spec import FLOAT32_BYTES, Flops, Shares, draws_nothing


def flops(op: Op) -> Flops:
    """Three products of equal size: the logits and both gradients.

    The gradients are made along with the losses, in the forward, but they count as the backward, as those of every
    other operator do.
    """
    hidden_states, weight = op.inputs[:2]
    forward = 2.0 * prod(hidden_states.shape) * weight.shape[0]
    return Flops(forward, 2 * forward)


def passes(op: Op, phase: str) -> Shares:
    """What the kernels between the products read and write, chunk by chunk.

    In the forward, a product writes a chunk's logits in float32, the softmax reads them twice and writes their gradient
    in the weight's dtype, and the weight's gradient is read and written in float32, to be added to. In the backward,
    both gradients are scaled, and the weight's is cast.
    """
    hidden_states, weight = op.inputs[:2]
    itemsize, width = weight.dtype.itemsize, hidden_states.shape[-1]
    if phase == "backward":
        return {hidden_states: 2.0, weight: FLOAT32_BYTES / itemsize + 1}
    logits = (3 * FLOAT32_BYTES + itemsize) * weight.shape[0]  # bytes a row of hidden states
    sums = 2 * FLOAT32_BYTES * prod(weight.shape) / CHUNK_SIZE
    return {hidden_states: (logits + sums) / (width * itemsize)}


def saves(op: Op) -> list[Tensor]:
    """All inputs: backward makes the gradient of the weight again where incoming gradients differ between tokens."""
    return op.inputs


def saves_besides(op: Op) -> Shares:
    """The gradients that the forward makes: that of the hidden states in their dtype, that of the weight in float32."""
    hidden_states, weight = op.inputs[:2]
    gradients = {hidden_states: 1.0, weight: FLOAT32_BYTES / weight.dtype.itemsize}
    return {tensor: share for tensor, share in gradients.items() if tensor.requires_grad}


def workspace(op: Op, phase: str) -> Shares:
    """The forward holds one chunk's logits [chunk, n], in float32, and the gradient of its hidden states [chunk, d].

    The backward needs less than no workspace. The gradients that the forward made are returned as they are, in memory
    that is counted as saved, so the memory that is counted for new gradients is subtracted.
    """
    hidden_states, weight, labels = op.inputs[:3]
    if phase == "backward":
        handed_on = [hidden_states, *([weight] if weight.dtype.itemsize == FLOAT32_BYTES else [])]
        return {tensor: -1.0 for tensor in handed_on if tensor.requires_grad}
    chunk = min(CHUNK_SIZE, prod(labels.shape))
    n, d = weight.shape
    return {weight: chunk * (n * FLOAT32_BYTES + d * hidden_states.dtype.itemsize) / nbytes(weight)}


RULES: dict[str, Any] = {
    "flops": flops,
    "passes": passes,
    "saves": saves,
    "saves_besides": saves_besides,
    "workspace": workspace,
    "memory_kind": "loss",
    "draws_random": draws_nothing,
}
