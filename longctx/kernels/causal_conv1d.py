"""The short causal convolution before a recurrence, as generated code calls it.

Where the package causal-conv1d is installed, its kernel takes over on a GPU; the tests have not run that.
"""

from typing import Any

import torch
import torch.nn.functional as F

from longctx.compiler.ops.registered import register_op
from longctx.compiler.ops.spec import draws_nothing, never_strided, no_flops

try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn: Any = None


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, silu: bool = False
) -> torch.Tensor:
    """Each channel's sum over its last k tokens, weighted: [b, channels, l], [channels, k], [channels] -> as x.

    Args:
        bias: is added to each sum.
        silu: whether SiLU follows.
    """
    if causal_conv1d_fn is not None and x.is_cuda:
        return causal_conv1d_fn(x, weight, bias, activation="silu" if silu else None)
    channels, k = weight.shape
    output = F.conv1d(x, weight.unsqueeze(1), bias, padding=k - 1, groups=channels)[..., : x.shape[2]]
    return F.silu(output) if silu else output


# --- what the compiler knows of it -----------------------------------------------------------------------------------

# Its few products per element are done while the elements are read and written, so no FLOPs are counted.
register_op(
    "b d l^, d k^, d -> b d l^",
    flops=no_flops,
    strides=never_strided,
    draws_random=draws_nothing,
    crosses_documents=True,
)(causal_conv1d)
