"""Gives a Hugging Face model this program's attention, by way of transformers' registry of attention functions.

A model takes any function of that registry by name, so no module of it has to be replaced or patched, whatever its
family. For a name that has no mask function, transformers builds no mask, which at long context would be the largest
tensor of all; ours is causal by itself. Each family passes its own keyword arguments (a window, a soft-cap, sinks). An
argument that went unnoticed would make another model of it, so whatever ours doesn't know is an error.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.errors import KernelError, ModelError
from longctx.kernels.attention import attention
from longctx.kernels.fused import KERNELS

REGISTERED_NAME = "annotated"  # what models are told as attn_implementation


def register_attention(implementation: str, deterministic: bool = False) -> None:
    """Makes `attention`, with these options, the attention function that transformers has by REGISTERED_NAME."""
    function = partial(attention_function, implementation, deterministic)
    ALL_ATTENTION_FUNCTIONS.register(REGISTERED_NAME, function)


def attention_function(
    implementation: str,
    deterministic: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,  # the rotary embedding has used them already
    logits_to_keep: Any = None,  # the head is asked for all
    **others,
) -> tuple[torch.Tensor, None]:
    """`attention` with the signature of transformers: [b, heads, l, d], twice [b, kv_heads, l, d] -> [b, l, heads, d].

    The second result would be the attention weights, which no loss needs.

    Raises:
        ModelError: the model asks for what `attention` doesn't do.
        KernelError: it asks for what the kernel that was asked for doesn't do.
    """
    unknown = [name for name, given in others.items() if given is not None and given is not False]
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unknown.append("is_causal=False")
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise ModelError(
            f"the attention of {type(module).__name__} takes {', '.join(unknown)}, which this program's attention "
            "does not have; choose a model without it"
        )
    kernel = KERNELS.get(implementation)
    if kernel and not kernel.masks_more and (softcap or 0 < (sliding_window or 0) < query.shape[2]):
        raise KernelError(
            f"the attention of {type(module).__name__} has a window or a soft-cap, which this kernel does not have; "
            "choose auto or flash_attention_2"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"window": sliding_window, "softcap": softcap, "dropout": dropout, "deterministic": deterministic}
    options["implementation"] = None if implementation == "auto" else implementation
    given = {name: value for name, value in options.items() if value}  # what is off is left out of the generated code
    return attention(query, key, value, scale, **given), None
