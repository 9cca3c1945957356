"""Gives a Hugging Face model this program's attention, by way of transformers' registry of attention functions.

A model takes any function of that registry by name, so no module of it has to be replaced or patched, whatever its
family. transformers makes the mask for it that the model would have with its own attention, and what that mask says
decides; each family passes keyword arguments too (a soft-cap, sinks), and whatever ours doesn't know of these is an
error. Older families don't ask the registry. They are built with their own attention, which tracing then recognizes.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.errors import ModelError
from longctx.kernels.attention import attention
from longctx.kernels.fused import check_masks
from longctx.kernels.written_attention import masked_attention

REGISTERED_NAME = "annotated"  # what models are told as attn_implementation


def attention_options(implementation: str, deterministic: bool = False) -> dict[str, Any]:
    """What generated code tells the kernel besides what the model does: nothing where that is the default."""
    options = {"implementation": None if implementation == "auto" else implementation, "deterministic": deterministic}
    return {name: value for name, value in options.items() if value}


def register_attention(options: dict[str, Any]) -> None:
    """Makes `attention`, with these options, the attention function that transformers has by REGISTERED_NAME."""
    ALL_ATTENTION_FUNCTIONS.register(REGISTERED_NAME, partial(attention_function, options))


def make_masks() -> None:
    """Lets transformers make the masks that a model has with its own attention. It can't on meta, but while tracing."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(REGISTERED_NAME, eager_mask)


def make_no_masks() -> None:
    """Lets transformers make no masks: attention is then causal by itself, with the window that it is told."""
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(REGISTERED_NAME, None)


def refuse_own_attention(model: PreTrainedModel) -> None:
    """Raises a ModelError for a model that asks for no attention function: without masks it would see the future."""
    if not model._can_set_attn_implementation():  # transformers' own rule, which reads the model's source
        raise ModelError(
            f"{type(model).__name__} has an attention of its own, which this engine can't replace; choose the torch "
            "engine"
        )


def attention_function(
    options: dict[str, Any],
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
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,  # the rotary embedding has used them already
    logits_to_keep: int | torch.Tensor = 0,  # is for the head
    output_router_logits: bool | None = None,  # is for the routers
    **others,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers: [b, heads, l, d], twice [b, kv_heads, l, d] -> [b, l, heads, d].

    Where there is a mask, a token sees what it says, as with the model's own attention; without one attention is
    causal, with `sliding_window`. `s_aux` are sinks. The second result would be the attention weights, which no loss
    needs.

    Raises:
        ModelError: the model asks for what `attention` doesn't do.
        KernelError: it asks for what the kernel that was asked for doesn't do.
    """
    unknown = [name for name, given in others.items() if given is not None and given is not False]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and not causal:
        unknown.append("is_causal=False")
    if attention_mask is None and s_aux is not None:
        unknown.append("s_aux")
    if unknown:
        raise ModelError(
            f"the attention of {type(module).__name__} takes {', '.join(unknown)}, which this program's attention "
            "does not have; choose a model without it"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if attention_mask is not None else sliding_window
    told: dict[str, Any] = {"window": window, "softcap": softcap, "dropout": dropout}
    given = {name: value for name, value in told.items() if value} | options
    if attention_mask is not None:
        return masked_attention(query, key, value, attention_mask, scale, **given, sinks=s_aux), None
    masks_more = bool(softcap or 0 < (window or 0) < query.shape[2])
    check_masks(options.get("implementation", "auto"), type(module).__name__, masks_more)
    return attention(query, key, value, scale, **given), None
