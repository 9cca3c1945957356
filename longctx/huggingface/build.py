"""The causal language model as it is trained: built without memory for its weights, and wrapped to return its loss."""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import longctx.kernels.gated  # noqa: F401  (registers what takes the place of gated activations in traced graphs)
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.data.rows import IGNORE_INDEX
from longctx.errors import ModelError, one_line
from longctx.huggingface import experts
from longctx.huggingface.attention import (
    REGISTERED_NAME,
    attention_options,
    make_masks,
    make_no_masks,
    register_attention,
)
from longctx.huggingface.head import input_of_output_embeddings, read_head
from longctx.huggingface.norms import route_rms_norms
from longctx.huggingface.recurrences import route_recurrences
from longctx.huggingface.rotary import settle_rotary_tables


class CausalLMLoss(nn.Module):
    """A Hugging Face causal language model whose forward returns the loss, summed over tokens.

    forward(tokens, labels): [b, l] int64 each -> scalar float32. `labels` are shifted already: labels[:, i] is the
    token after tokens[:, i], or IGNORE_INDEX. Where the documents of a row do not see each other, forward is given
    `position_ids` too, which begin anew with each of them, and `document_starts`, which tracing hands to attention.
    """

    def __init__(self, model: PreTrainedModel, attention_options: dict[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.attention_options = attention_options or {}
        self.head = read_head(model)

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states, of_routers = input_of_output_embeddings(self.model, tokens, position_ids)
        lm_head = self.model.get_output_embeddings()
        assert lm_head is not None, "read_head refuses a model without"
        weight = lm_head.weight
        if self.head.scale != 1.0:
            hidden_states = hidden_states * self.head.scale
        if getattr(lm_head, "bias", None) is not None:  # becomes the weights of one more input, which is always 1
            hidden_states = torch.cat((hidden_states, torch.ones_like(hidden_states[..., :1])), dim=-1)
            weight = torch.cat((weight, lm_head.bias.unsqueeze(1)), dim=1)
        losses = chunk_linear_cross_entropy(
            hidden_states, weight, labels, IGNORE_INDEX, logit_softcap=self.head.logit_softcap
        )
        if of_routers is None:
            return losses.sum()
        # transformers adds it to a mean over the tokens whose label counts, which is a sum over them here.
        n_tokens = (labels != IGNORE_INDEX).sum()
        coefficient: Any = self.model.router_aux_loss_coef
        return losses.sum() + n_tokens * coefficient * of_routers


def build_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    sequence_length: int | None = None,
    deterministic: bool = False,
    documents_apart: bool = False,
    expert_imbalance: float = 1.0,
) -> CausalLMLoss:
    """The model in train mode, its parameters on meta (no memory is allocated), its buffers real and on the CPU.

    Args:
        dtype: of parameters and compute.
        attn_implementation: as kernels.attention takes it.
        sequence_length: tokens of a row; rotary tables that depend on it are made for it.
        deterministic: whether attention's backward is to give the same bits each time.
        documents_apart: whether the documents of a row are not to see each other.
        expert_imbalance: the `imbalance` of kernels.experts.

    Raises:
        ModelError: the model can't be built from its configuration, or its head does what the chunked loss can't, or
            its rotary tables are not the same for documents of every length, or transformers trains some of its weights
            in float32 whatever the dtype of the others.
    """
    options = attention_options(attn_implementation, deterministic)
    register_attention(options)
    make_no_masks()  # the head is read on meta tensors, on which transformers can make none
    model = _build_on_meta(config, dtype)
    _refuse_trained_in_float32(model, dtype)
    _refuse_empty_weights(model)
    experts.route_experts(model, expert_imbalance)
    route_rms_norms(model)
    route_recurrences(model)
    if documents_apart:
        _refuse_routers_loss(model)
    if sequence_length is not None:
        settle_rotary_tables(model, sequence_length, documents_apart)
    wrapped = CausalLMLoss(model, options).train()
    make_masks()
    return wrapped


def _build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of transformers with its parameters on meta, and with our attention and experts if it takes any but its
    own."""
    chosen = {"attn_implementation": REGISTERED_NAME, "experts_implementation": experts.REGISTERED_NAME}
    with building(config):
        try:
            return from_config(config, dtype, **chosen)
        except KeyError as error:
            if error.args != (REGISTERED_NAME,):
                raise
            chosen["attn_implementation"] = "eager"  # it has a table of attention classes of its own
            return from_config(config, dtype, **chosen)


def from_config(config: PreTrainedConfig, dtype: torch.dtype, **implementations: str) -> PreTrainedModel:
    """transformers' model of a configuration, of which it gets a copy, since it writes to what it builds from.

    Args:
        implementations: of attention and experts, by their names; transformers chooses those that are left out.
    """
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **implementations)
    _make_weights_of_buffers(model)
    return model


def _make_weights_of_buffers(model: PreTrainedModel) -> None:
    """Makes weights, not trained and float32, of the stored buffers that transformers keeps in float32 whatever the
    dtype, as what corrects a router's scores: they are numbers of a model, and not of its code."""
    stored = model.state_dict()
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(path, recurse=False)):
            if name in stored and _is_kept_in_float32(model, name):
                own = name.rsplit(".", 1)[-1]
                delattr(module, own)
                module.register_parameter(own, nn.Parameter(buffer.float(), requires_grad=False))


def _is_kept_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether from_pretrained keeps a weight in float32 where the others are bfloat16."""
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in model._get_dtype_plan(torch.bfloat16))


@contextmanager
def building(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, models have their parameters on meta, and what transformers can't build is a ModelError."""
    try:
        with parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, at a size of 0
            yield
    except Exception as error:  # values that make no sense fail anywhere in the model's code
        raise ModelError(
            f"transformers can't build a {config.model_type} model from its configuration "
            f"({type(error).__name__}: {one_line(error)}); check its config.json, or choose another model"
        ) from error


def _refuse_trained_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises a ModelError for weights that are trained in float32 where `dtype` is that of the others: FSDP would
    hand them over in `dtype`, and a router that is rounded in each step may choose other experts."""
    for name, parameter in model.named_parameters():
        if dtype != torch.float32 and parameter.requires_grad and _is_kept_in_float32(model, name):
            raise ModelError(
                f"transformers keeps {name!r} of {type(model).__name__} in float32 where others are "
                f"{str(dtype).removeprefix('torch.')}, and this program has one precision for all weights that are "
                "trained; train it in float32, or choose another model"
            )


def _refuse_empty_weights(model: PreTrainedModel) -> None:
    """Raises a ModelError for a size of 0, which transformers takes."""
    if empty := next((name for name, weight in model.named_parameters() if not weight.numel()), None):
        shape = list(model.get_parameter(empty).shape)
        raise ModelError(f"its config.json gives the weight {empty} the shape {shape}, which is empty; mend it")


def _refuse_routers_loss(model: PreTrainedModel) -> None:
    """Raises a ModelError for a mixture of experts whose loss tells how evenly a text goes to its experts."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ModelError(
            f"{type(model).__name__} has a loss of its routers that is of a whole text, and the documents of a row are "
            "several; set output_router_logits to false in its configuration, or choose another model"
        )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on meta, and their buffers where they would have them.

    torch.device("meta") would put the buffers on meta as well, and with them rotary tables that are computed only here.
    """
    register_parameter = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one on meta stays the same object: it may be tied
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register_parameter(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter
