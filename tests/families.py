"""Small models of the decoder families in transformers, with weights under which every operator changes the loss."""

import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longctx.data.rows import IGNORE_INDEX

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
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


def reference_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The Hugging Face model in float32 with its own eager attention, and no weight at 0 or 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_rows(n_rows: int, length: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and shifted labels, [n_rows, length] each; a tenth of the labels is IGNORE_INDEX."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (n_rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels


def reference_loss(model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross entropy of the Hugging Face model's own logits."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest |found - expected| / |expected| over parameters, and the parameter's name.

    |expected| counts as at least 1e-4 of the norm of all gradients together: the bias of keys, for one, doesn't change
    the softmax, and its gradient is nothing but rounding.
    """
    floor = 1e-4 * torch.stack([g.norm() for g in expected.values()]).norm()
    errors = {n: ((found[n] - g).norm() / g.norm().clamp_min(floor)).item() for n, g in expected.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst
