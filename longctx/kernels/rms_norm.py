"""RMSNorm, as generated code calls it: the fused kernel of NVIDIA's apex where that is installed, else PyTorch's."""

import torch
import torch.nn.functional as F

from longctx.compiler.ir import Op, Tensor
from longctx.compiler.ops.registered import arguments_of, register_op
from longctx.compiler.ops.spec import FLOAT32_BYTES, Shares, draws_nothing

try:  # PyPI's `apex` is another project: only NVIDIA's has this module
    from apex.normalization.fused_layer_norm import mixed_dtype_fused_rms_norm_affine as apex_rms_norm
except Exception:  # that other project raises all sorts of things when imported
    apex_rms_norm = None


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x ** 2) + eps) * (weight + offset), computed in float32 (arXiv:1910.07467): [*, d], [d] -> [*, d].

    Gemma's weights are offsets from 1, so `offset` is 1 for it; the sum is in float32 too.
    """
    if offset:
        return F.rms_norm(hidden_states.float(), weight.shape, weight.float() + offset, eps).type_as(hidden_states)
    if apex_rms_norm is not None and hidden_states.is_cuda:
        return apex_rms_norm(hidden_states, weight, weight.shape, eps).type_as(hidden_states)
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


# --- what the compiler knows of RMSNorm ------------------------------------------------------------------------------


def saves(op: Op) -> list[Tensor]:
    """With an offset, the kernel's input is a float32 copy of x, which is saved instead; saves_besides counts it."""
    return op.inputs[1:] if arguments_of(op)["offset"] else op.inputs


def saves_besides(op: Op) -> Shares:
    """The inverse root mean square of each row, in float32; with an offset, the float32 copy of x as well."""
    x = op.inputs[0]
    float32 = FLOAT32_BYTES / x.dtype.itemsize
    return {x: float32 / x.shape[-1] + (float32 if arguments_of(op)["offset"] else 0.0)}


def workspace(op: Op, phase: str) -> Shares:
    """With an offset, the output in float32; in the backward, its gradient and that of x, before they are cast."""
    if not arguments_of(op)["offset"]:
        return {}
    float32 = FLOAT32_BYTES / op.inputs[0].dtype.itemsize
    return {op.inputs[0]: float32 if phase == "forward" else 2 * float32 - 1}


register_op(
    "* d^, d^ -> * d^", saves=saves, saves_besides=saves_besides, workspace=workspace, draws_random=draws_nothing
)(rms_norm)
