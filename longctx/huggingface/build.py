"""The causal language model as it is trained: wrapped to return its loss, its attention and RMSNorm our own.

Hugging Face's model stays the source of truth. What is put in its place is proved equal or refused: an RMSNorm is
routed to `rms_norm` only where both give the same numbers, a head that changes its logits is read from its own
operators, and an argument that our attention doesn't know is an error, never ignored.
"""

import copy
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.data.rows import IGNORE_INDEX
from longctx.errors import UserError, one_line
from longctx.huggingface.head import read_head
from longctx.kernels.attention import attention, flash_attn_func
from longctx.kernels.rms_norm import rms_norm

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of compute, by --precision
ATTN_IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa", "eager")


class CausalLMLoss(nn.Module):
    """A Hugging Face causal language model whose forward gives the loss summed over tokens.

    forward(tokens, labels): [b, l] int64 each -> scalar float32. `labels` are shifted already: labels[:, i] is the
    token after tokens[:, i], or IGNORE_INDEX.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = read_head(model)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden_states = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        lm_head = self.model.get_output_embeddings()
        weight = lm_head.weight
        if self.head.scale != 1.0:
            hidden_states = hidden_states * self.head.scale
        if getattr(lm_head, "bias", None) is not None:  # one more input dimension that is always 1
            hidden_states = torch.cat((hidden_states, torch.ones_like(hidden_states[..., :1])), dim=-1)
            weight = torch.cat((weight, lm_head.bias.unsqueeze(1)), dim=1)
        losses = chunk_linear_cross_entropy(
            hidden_states, weight, labels, IGNORE_INDEX, logit_softcap=self.head.logit_softcap
        )
        return losses.sum()


def load_config(model_id: str):
    """The configuration of a local folder's or a hub's model.

    Raises:
        UserError: there is none, or it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if _looks_local(model_id) and not (Path(model_id) / "config.json").is_file():
        raise UserError(f"--model_id {model_id}: no config.json there; name a Hugging Face model folder or a hub model")
    try:
        config = AutoConfig.from_pretrained(model_id)
    except Exception as error:  # not JSON, no model type, values of wrong types or that don't fit each other
        raise UserError(f"--model_id {model_id}: its configuration can't be loaded: {one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"--model_id {model_id}: a {config.model_type!r} model is no causal language model")
    return config


def _looks_local(model_id: str) -> bool:
    return os.path.exists(model_id) or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1


def build_model(
    config, dtype: torch.dtype, attn_implementation: str = "auto", sequence_length: int | None = None
) -> CausalLMLoss:
    """The wrapped model in train mode, parameters on meta (nothing is read or allocated), buffers real and on the CPU.

    Args:
        sequence_length: of the rows; where the model's rotary tables depend on it, they are made for it.

    Raises:
        UserError: `attn_implementation` can't be had here, transformers can't build the model of its configuration, or
            its head does what the chunked loss can't.
    """
    from transformers import AutoModelForCausalLM

    _register_attention(attn_implementation)
    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="annotated")
    except Exception as error:  # whatever a value that makes no sense leads to, deep in the model
        raise UserError(
            f"--model_id: transformers can't build a {config.model_type} model of its configuration "
            f"({type(error).__name__}: {one_line(error)}); correct its config.json"
        ) from error
    route_rms_norms(model)
    if sequence_length is not None:
        settle_rotary_tables(model, sequence_length)
    return CausalLMLoss(model).train()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on meta; their buffers are computed as ever."""
    register_parameter = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is stays itself: it may be a tied weight
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register_parameter(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter


def _register_attention(implementation: str) -> None:
    """Makes `attention` the transformers attention function 'annotated'."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "flash_attention_2" and flash_attn_func is None:
        raise UserError(
            "--attn_implementation flash_attention_2: the package flash-attn is not installed; "
            "install it (pip install flash-attn --no-build-isolation) or choose sdpa"
        )

    def annotated_attention(module, query, key, value, attention_mask, **kwargs):
        known = {name: kwargs.pop(name, None) for name in ("scaling", "dropout", "sliding_window", "softcap")}
        kwargs.pop("position_ids", None)  # rotary embedding has used them
        changes = [name for name, given in kwargs.items() if given is not None and given is not False]
        if kwargs.get("is_causal", getattr(module, "is_causal", True)):
            changes = [name for name in changes if name != "is_causal"]
        else:
            changes.append("is_causal=False")
        if attention_mask is not None:
            changes.append("attention_mask")
        if changes:
            raise UserError(
                f"--model_id: the attention of {type(module).__name__} takes {', '.join(changes)}, "
                "which this program's attention does not have; train a model without it"
            )
        optional = {"window": known["sliding_window"], "softcap": known["softcap"], "dropout": known["dropout"]}
        optional["implementation"] = None if implementation == "auto" else implementation
        scale = known["scaling"] if known["scaling"] is not None else query.shape[-1] ** -0.5
        return attention(query, key, value, scale, **{name: v for name, v in optional.items() if v}), None

    ALL_ATTENTION_FUNCTIONS.register("annotated", annotated_attention)


def settle_rotary_tables(model: nn.Module, sequence_length: int) -> None:
    """Gives rotary embeddings whose frequencies depend on the rows' length those of this length, once and for all.

    transformers chooses them in the forward, by the largest position it is given, which torch.export can't follow.
    """
    last = torch.tensor([[sequence_length - 1]])
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {(): kinds}
        settled = dict(by_layer)
        for layer_type, kind in by_layer.items():
            if kind is not None and ("dynamic" in kind or kind == "longrope"):
                module(torch.empty(0), last, *([layer_type] if layer_type else []))
                settled[layer_type] = "default"  # of which transformers changes nothing in the forward
        if settled != by_layer:
            module.rope_type = settled if isinstance(kinds, dict) else settled[()]


def route_rms_norms(model: nn.Module) -> None:
    """Gives every module that computes an RMSNorm, tried on numbers, a forward that calls `rms_norm`."""

    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, *self.rms_norm_arguments)

    tried: dict[tuple, tuple | None] = {}
    for module in model.modules():
        parameters = dict(module.named_parameters())
        if "norm" not in type(module).__name__.lower() or list(parameters) != ["weight"] or module.weight.ndim != 1:
            continue
        settings = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float))))
        key = (type(module), module.weight.shape, settings)
        if key not in tried:
            tried[key] = _rms_norm_arguments(module)
        if tried[key] is not None:
            module.rms_norm_arguments = tried[key]
            module.forward = types.MethodType(forward, module)


def _rms_norm_arguments(module: nn.Module) -> tuple | None:
    """The (eps,) or (eps, offset) with which `rms_norm` computes what `module` does, or None."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=generator)
    x = 1e-2 * torch.randn(4, *module.weight.shape, generator=generator)  # so small that eps shows
    real = copy.copy(module)
    real.__dict__ = {**vars(module), "_parameters": {"weight": nn.Parameter(weight)}}
    for eps in {v for v in vars(module).values() if isinstance(v, float) and v < 1e-2}:
        for arguments in ((eps,), (eps, 1.0)):
            try:
                if torch.allclose(real(x), rms_norm(x, weight, *arguments), rtol=1e-5, atol=1e-6):
                    return arguments
            except (RuntimeError, TypeError, AttributeError):  # it isn't one of these at all
                return None
    return None
