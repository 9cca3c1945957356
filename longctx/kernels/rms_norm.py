"""RMSNorm, as generated code calls it: NVIDIA apex's fused kernel where it is installed, else PyTorch's."""

import torch
import torch.nn.functional as F

from longctx.compiler.annotation import register_op

try:  # PyPI's `apex` is another project: only NVIDIA's has this module
    from apex.normalization.fused_layer_norm import mixed_dtype_fused_rms_norm_affine as apex_rms_norm
except Exception:  # that other project raises all sorts of things when imported
    apex_rms_norm = None


@register_op("* d^, d^ -> * d^")
def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x ** 2) + eps) * (weight + offset), computed in float32 (arXiv:1910.07467): [*, d], [d] -> [*, d].

    Gemma keeps its weights around 0 and has offset 1, added in float32.
    """
    if offset:
        return F.rms_norm(hidden_states.float(), weight.shape, weight.float() + offset, eps).type_as(hidden_states)
    if apex_rms_norm is not None and hidden_states.is_cuda:
        return apex_rms_norm(hidden_states, weight, weight.shape, eps).type_as(hidden_states)
    return F.rms_norm(hidden_states, weight.shape, weight, eps)
