"""What the compiler has to know of chunk_linear_cross_entropy, a file that people lift out and that needs only PyTorch.

`RULES` are the fields of its OpSpec; train.py registers the loss with them and with its annotation.
"""

from math import prod
from typing import Any

from chunk_linear_cross_entropy import CHUNK_SIZE
from longctx.compiler.ir import Op, Tensor, nbytes
from longctx.compiler.ops.spec import FLOAT32_BYTES, Flops, Shares, draws_nothing


def flops(op: Op) -> Flops:
    """Three products of equal size: the logits, and both gradients, which are made along with the losses.

    The gradients count as backward, where any other operator has them.
    """
    hidden_states, weight = op.inputs[:2]
    forward = 2.0 * prod(hidden_states.shape) * weight.shape[0]
    return Flops(forward, 2 * forward)


def saves(op: Op) -> list[Tensor]:
    return op.inputs


def saves_besides(op: Op) -> Shares:
    """The gradients that the forward makes: the hidden states' in their dtype, the weight's in float32."""
    hidden_states, weight = op.inputs[:2]
    gradients = {hidden_states: 1.0, weight: FLOAT32_BYTES / weight.dtype.itemsize}
    return {tensor: share for tensor, share in gradients.items() if tensor.requires_grad}


def workspace(op: Op, phase: str) -> Shares:
    """Forward: one chunk's logits [chunk, n] and gradient of hidden states [chunk, d], float32.

    Backward: less than nothing, for gradients that were made in the forward and are handed on as they are.
    """
    hidden_states, weight, labels = op.inputs[:3]
    if phase == "backward":
        handed_on = [hidden_states, *([weight] if weight.dtype.itemsize == FLOAT32_BYTES else [])]
        return {tensor: -1.0 for tensor in handed_on if tensor.requires_grad}
    chunk = min(CHUNK_SIZE, prod(labels.shape))
    return {weight: chunk * sum(weight.shape) * FLOAT32_BYTES / nbytes(weight)}


RULES: dict[str, Any] = {
    "flops": flops,
    "saves": saves,
    "saves_besides": saves_besides,
    "workspace": workspace,
    "memory_kind": "loss",
    "draws_random": draws_nothing,
}
