"""RMSNorm, as generated code calls it: NVIDIA apex's fused kernel where it is installed, else PyTorch's."""

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

    Gemma keeps its weights around 0 and has offset 1, added in float32.
    """
    if offset:
        return F.rms_norm(hidden_states.float(), weight.shape, weight.float() + offset, eps).type_as(hidden_states)
    if apex_rms_norm is not None and hidden_states.is_cuda:
        return apex_rms_norm(hidden_states, weight, weight.shape, eps).type_as(hidden_states)
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


# --- what the compiler knows of it -----------------------------------------------------------------------------------


def saves(op: Op) -> list[Tensor]:
    """With an offset the fused kernel's input is a float32 copy, which saves_besides counts."""
    return op.inputs[1:] if arguments_of(op)["offset"] else op.inputs


def saves_besides(op: Op) -> Shares:
    """1 / rms of each row, float32, and with an offset the input in float32."""
    x = op.inputs[0]
    float32 = FLOAT32_BYTES / x.dtype.itemsize
    return {x: float32 / x.shape[-1] + (float32 if arguments_of(op)["offset"] else 0.0)}


def workspace(op: Op, phase: str) -> Shares:
    """With an offset: the output in float32; backward, its gradient and the input's, before they are cast."""
    if not arguments_of(op)["offset"]:
        return {}
    float32 = FLOAT32_BYTES / op.inputs[0].dtype.itemsize
    return {op.inputs[0]: float32 if phase == "forward" else 2 * float32 - 1}


register_op(
    "* d^, d^ -> * d^", saves=saves, saves_besides=saves_besides, workspace=workspace, draws_random=draws_nothing
)(rms_norm)
