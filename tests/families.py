"""Small models of the decoder families in transformers, with weights under which every operator changes the loss."""

import dataclasses
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longctx.data.rows import IGNORE_INDEX
from longctx.proof import gradient_errors

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "olmo": {"num_key_value_heads": 2, "clip_qkv": 0.5},
    "olmo2": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 6.0, "residual_multiplier": 0.5},
    "stablelm": {"num_key_value_heads": 2, "use_parallel_residual": True},
    "gpt_neox": {"use_parallel_residual": True},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "starcoder2": {"num_key_value_heads": 2, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "nemotron": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "phi": {"num_key_value_heads": 2},
    "exaone4": {"num_key_value_heads": 2, "num_hidden_layers": 4},
    "smollm3": {"num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
}

_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)]}
_PRETRAINED = {"original_max_position_embeddings": 32}
# Kinds of rotary tables: a family that has them, and their parameters. Two kinds depend on the sequence length.
ROTARY = {
    "longrope": ("phi3", {**_FACTORS, **_PRETRAINED}),
    "dynamic": ("llama", {"factor": 4.0}),
    "yarn": ("llama", {"factor": 4.0, **_PRETRAINED}),
    "llama3": ("llama", {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_PRETRAINED}),
    "linear": ("llama", {"factor": 4.0}),
}


def rotary_config(kind: str) -> PreTrainedConfig:
    """The configuration of a small model with one kind of rotary tables, pretrained on 32 positions."""
    family, parameters = ROTARY[kind]
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **parameters}
    positions = {"max_position_embeddings": 32 if kind == "dynamic" else 256}
    if kind == "longrope":  # Phi-3's configuration has it here too
        positions |= _PRETRAINED
    return small_config(family, rope_parameters=parameters, **positions)


def small_config(family: str, **changes) -> PreTrainedConfig:
    """A configuration with 2 layers, hidden size 64, 4 heads and a vocabulary of 256, unless changed."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    return CONFIG_MAPPING[family](**{**sizes, **FAMILIES[family], **changes})


# --- a tiny model of every family of transformers' causal mapping -----------------------------------------------------

ALL_FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Whatever a family calls its sizes, they become this small. A field that is None by default stays so, except for
# SET_WHERE_NONE: None means a default that the class derives from its other sizes.
TINY_SIZES = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers first_k_dense_replace n_group "
    "topk_group prompt_mid_dim num_codebooks mamba_n_groups n_groups o_groups",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_experts_per_tok moe_topk moe_k num_key_value_heads swa_num_key_value_heads "
    "linear_num_key_heads num_experts_per_token n_mamba_heads",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads "
    "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num index_n_heads "
    "laurel_rank chunk_size mamba_chunk_size",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim index_head_dim index_topk state_size mamba_d_state "
    "ssm_state_size mamba_n_heads mamba_num_heads adapter_rank num_centroids num_mel_bins hidden_size_per_layer_input",
    16: "head_dim kv_channels swa_head_dim v_head_dim q_lora_rank kv_lora_rank o_lora_rank sliding_window "
    "sliding_window_size attention_window_size window_size local_attention keep_window_size attention_chunk_size "
    "mamba_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim dim_head d_rel rel_extent "
    "attention_head_size hc_lowrank dim_model_base",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size image_size",
    64: "hidden_size d_model n_embd emb_dim embedding_size input_embedding_size output_embedding_size "
    "backbone_hidden_size word_embed_proj_dim",
    128: "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
    "feed_forward_size ffn_hidden_size shared_intermediate_size dense_intermediate_size mamba_d_ssm n_inner",
    256: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size",
}
SIZE_OF = {name: size for size, names in TINY_SIZES.items() for name in names.split()}
SET_WHERE_NONE = {"num_key_value_heads", "num_experts_per_tok"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}


def config_of(family: str) -> PreTrainedConfig:
    """The small configuration with which drawn plans of a family are proved; every second one ties its embeddings."""
    if family in FAMILIES:
        return small_config(family, tie_word_embeddings=list(FAMILIES).index(family) % 2 == 1)
    return tiny_config(family)


def tiny_config(family: str) -> PreTrainedConfig:
    """A small configuration of any family that transformers has a causal language model for, with no dropout."""
    config_class = CONFIG_MAPPING[family]
    settings = tiny_settings(config_class)
    for name, value in EXCEPTIONS.get(family, {}).items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    return config_class(**settings)


def tiny_settings(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Small sizes for the fields that a class of configurations has, those of configurations within it included."""
    settings: dict[str, Any] = {}
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, default in fields.items():
        if name in SIZE_OF and (isinstance(default, int) or name in SET_WHERE_NONE):
            settings[name] = SIZE_OF[name]
        elif isinstance(default, float) and ("drop" in name or "jitter" in name):
            settings[name] = 0.0
        elif name in TOKENS and isinstance(default, int) and default >= SIZE_OF["vocab_size"]:
            settings[name] = TOKENS[name]
    if "is_decoder" in fields:  # BERT and its kin are causal only then
        settings["is_decoder"] = True
    if "layer_types" in fields and "num_hidden_layers" in settings:  # so that there are layers of each type
        settings["num_hidden_layers"] = 4
    for name, inner in config_class.sub_configs.items():
        if inner is AutoConfig:
            model_type = config_class.sub_configs_defaults[name].model_type
            settings[name] = {"model_type": model_type, **tiny_settings(CONFIG_MAPPING[model_type])}
        elif dataclasses.is_dataclass(inner):
            settings[name] = tiny_settings(inner)
    return settings


_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention"] * 2
_INDEXER = {"indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2}
# What a family needs besides; of a configuration within it, what is to be changed there.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "cpmant": {"init_std": 0.02},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _FULL_AND_SLIDING},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 16, "layer_types": _FULL_AND_SLIDING},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": {"layer_types": _FULL_AND_SLIDING}},
    "gemma4_unified_text": {"num_kv_shared_layers": 2, "layer_types": _FULL_AND_SLIDING},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gpt_oss": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "minicpm3": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 16},
    "moshi": {"audio_vocab_size": 256},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, **_INDEXER},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, **_INDEXER}},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (6, 8), "attn_layers": ("local", "lsh")},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def reference_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The Hugging Face model in float32 with its own eager attention and experts, and no weight at 0 or 1."""
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # which experts a token has depends on it
                buffer.uniform_()
    return model


def random_rows(n_rows: int, length: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and shifted labels, [n_rows, length] each; a tenth of the labels is IGNORE_INDEX."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (n_rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels


def random_documents(length: int, seed: int) -> tuple[int, ...]:
    """Where the documents of a row begin: from one to six of them, of any length from a single token on."""
    draw = random.Random(seed)
    return (0, *sorted(draw.sample(range(1, length), draw.randint(0, 5))))


def reference_loss(
    model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor, documents: Sequence[tuple[int, ...]] = ()
) -> torch.Tensor:
    """The summed cross entropy of the Hugging Face model's own logits.

    Where its configuration asks for its routers' auxiliary loss, it is the loss that the model returns of each row.

    Args:
        documents: where each row's begin, if the model is to run these one by one.
    """
    if documents:
        losses = []
        for row, starts in enumerate(documents):
            for start, end in pairwise((*starts, tokens.shape[1])):
                own = labels[row : row + 1, start:end].clone()
                if end < tokens.shape[1]:
                    own[:, -1] = IGNORE_INDEX  # there is no token after a document's last
                losses.append(reference_loss(model, tokens[row : row + 1, start:end], own))
        return torch.stack(losses).sum()
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        rows = [(row.unsqueeze(0), own.unsqueeze(0)) for row, own in zip(tokens, labels, strict=True)]
        losses = [model(input_ids=row, labels=own, shift_labels=own, use_cache=False).loss for row, own in rows]
        return sum((own != IGNORE_INDEX).sum() * loss for (_, own), loss in zip(rows, losses, strict=True))
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def worst_gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest of the gradients' errors, and its parameter."""
    errors = gradient_errors(found, expected)
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst
