"""Makes a small model of another one's architecture, with seeded random weights, to debug with on any machine.

    python create_mini_model.py --model_id meta-llama/Meta-Llama-3-8B-Instruct --output_id ./llama3_mini

The source is a model of the Hugging Face hub or a local folder. It must have a config.json; its tokenizer and
generation_config.json are copied if it has them, and its weights are never read.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from longctx.atomic import whole_folder, why_not_new
from longctx.command_line import LARGEST_SEED, Cause, naming_options, option, parse
from longctx.errors import ConfigurationError, ModelError, UserError, one_line, run_script
from longctx.huggingface.build import from_config
from longctx.huggingface.changes import Changes
from longctx.huggingface.configuration import check_file, check_numbers
from longctx.huggingface.overrides import change
from longctx.huggingface.weights import TOKENIZER_FILES, parameter_shapes

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MOST_LAYERS, LARGEST_SIZE = 1000, 2**20  # a small model has fewer, and transformers builds these in a minute
# What the width of the MLP may be called: transformers' attribute_map knows the other names of every size but this.
MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


@dataclass(frozen=True, kw_only=True)
class Mini:
    """What create_mini_model.py is asked to make. Sizes that are None are the source's."""

    model_id: str = option(help="model of the hub, or local folder with a config.json")
    output_id: Path = option(help="folder to write, which must not exist")
    num_hidden_layers: int = option(4, "decoder layers", at_least=1, at_most=MOST_LAYERS)
    hidden_size: int | None = option(None, "default: the source's", at_least=1, at_most=LARGEST_SIZE)
    intermediate_size: int | None = option(None, "default: the source's", at_least=1, at_most=LARGEST_SIZE)
    num_attention_heads: int | None = option(None, "default: the source's", at_least=1, at_most=LARGEST_SIZE)
    num_key_value_heads: int | None = option(None, "default: the source's", at_least=1, at_most=LARGEST_SIZE)
    rope_parameters: dict[str, Any] | None = option(
        None, "JSON of transformers' keys, such as rope_type and factor, in place of the source's"
    )
    rope_theta: float | None = option(None, "the base of the rotary frequencies", above=0)
    config_overrides: tuple[str, ...] | None = option(
        None, "key=value, separated by commas, in place of what the source's config.json has"
    )
    seed: int = option(0, "of the random weights", at_least=0, at_most=LARGEST_SEED)
    dtype: str = option("bfloat16", choices=("bfloat16", "float32", "float16"))


def main(argv: list[str] | None = None) -> None:
    asked = parse(Mini, argv, "Make a small model of the same architecture with random weights.")
    sizes = {name: getattr(asked, name) for name in SIZES if getattr(asked, name) is not None}
    if problem := why_not_new(asked.output_id):
        raise UserError(f"--output_id {asked.output_id}: {problem}; name another folder")
    huggingface_hub.logging.set_verbosity_error()  # it would print a line for each retry without a network
    with naming_options(asked, {ModelError: Cause("model_id"), ConfigurationError: Cause("{error.field}")}):
        source = source_folder(asked.model_id)
        full_config = causal_lm_config(source)
        changes = Changes(asked.rope_parameters, asked.rope_theta, asked.config_overrides or ())
        config = change(mini_config(full_config, sizes), changes)
        model = random_model(config, asked.seed, getattr(torch, asked.dtype))
    with whole_folder(asked.output_id) as folder:
        model.save_pretrained(folder, max_shard_size="5GB")
        has_tokenizer = copy_files(source, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(file.stat().st_size for file in asked.output_id.iterdir() if file.suffix == ".safetensors")
    shape = ", ".join(f"{name} {getattr(config, name)}" for name in SIZES if hasattr(config, name))
    print(f"{type(model).__name__} with {parameters:,} random parameters: {shape}")
    print(
        f"{stored:,} bytes of {asked.dtype} {'with' if has_tokenizer else 'without'} a tokenizer in {asked.output_id}"
    )
    if hint := lost_layer_types(full_config, config):
        print(hint)


# The source


def source_folder(model_id: str) -> Path:
    """The folder with the source's config.json: `model_id` itself, or the hub's files, downloaded without weights."""
    folder = Path(model_id)
    if not folder.exists():
        try:
            folder = Path(huggingface_hub.snapshot_download(model_id, allow_patterns=["*.json", *TOKENIZER_FILES]))
        except huggingface_hub.errors.HFValidationError as error:
            raise ModelError("there is no such folder") from error
        except Exception as error:  # the network, the hub and the disk each have their own
            raise ModelError(f"no such folder, and no model from the hub: {one_line(error)}") from error
    if not (folder / "config.json").is_file():
        raise ModelError("there is no config.json in it")
    return folder


def causal_lm_config(source: Path) -> PreTrainedConfig:
    """The source's configuration, or of its text part; raises ModelError if it is of no causal language model."""
    check_file(source / "config.json")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # not JSON, no model type, values of wrong types, code of its own
        raise ModelError(f"its config.json can't be used: {one_line(error)}") from error
    check_numbers(config)
    text_config = config.get_text_config()
    made_for = [] if text_config is not config else config.architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in made_for) or not made_for
    if config.is_encoder_decoder or not causal or type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = ", ".join(made_for) or config.model_type
        raise ModelError(f"{kind} is not a causal language model")
    return text_config


def copy_files(source: Path, folder: Path) -> bool:
    """Copies tokenizer and generation configuration unchanged, if there are any; returns whether a tokenizer is."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    files = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()]
    for file in files:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    return bool(files)


# The mini model


def mini_config(config: PreTrainedConfig, sizes: dict[str, int]) -> PreTrainedConfig:
    """Returns `config` with other `sizes` (keys of SIZES); raises ModelError where no model can have them.

    What depends on the sizes follows them: lists with an entry for each layer are cut to the first layers, the number
    of heads to a key-value head stays unless num_key_value_heads is given, and a head_dim that was hidden_size / heads
    is so again.
    """
    values = config.to_dict()
    for name in ("quantization_config", "auto_map"):  # random weights aren't quantized, and code is not copied
        values.pop(name, None)
    for name, size in sizes.items():
        values[own_name(config, name)] = size
    cut_layer_lists(values, config.num_hidden_layers, sizes["num_hidden_layers"])
    scale_heads(values, config, sizes)
    try:
        mini = type(config).from_dict(values)
        mini.validate()
    except Exception as error:  # each architecture checks its values itself, and raises exceptions of several kinds
        raise ModelError(f"{config.model_type} can't have these sizes: {one_line(error)}") from error
    check_heads(mini)
    return mini


def own_name(config: PreTrainedConfig, name: str) -> str:
    """What this architecture calls one of SIZES: n_layer for num_hidden_layers, for example."""
    for candidate in MLP_WIDTHS if name == "intermediate_size" else (name,):
        if hasattr(config, candidate):
            return config.attribute_map.get(candidate, candidate)
    raise UserError(f"--{name}: {config.model_type} has no such size")


def cut_layer_lists(values: dict, layers: int, kept: int) -> None:
    """Cuts the lists that have an entry for each layer, such as layer_types, to the layers that are kept."""
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers and ("layer" in key or "block" in key):
            if kept > layers:
                raise UserError(f"--num_hidden_layers {kept}: the source's {key} names only {layers} layers")
            values[key] = value[:kept]


def scale_heads(values: dict, config: PreTrainedConfig, sizes: dict[str, int]) -> None:
    """Makes num_key_value_heads and head_dim follow the number of heads and hidden_size, unless independent of them."""
    heads = sizes.get("num_attention_heads") or config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads and "num_key_value_heads" not in sizes:
        kv_heads, rest = divmod(heads * kv_heads, config.num_attention_heads)
        if rest or not kv_heads:
            group = config.num_attention_heads / config.num_key_value_heads
            raise UserError(
                f"--num_attention_heads {heads}: it can't keep the source's {group:g} heads to a key-value head;"
                " give --num_key_value_heads"
            )
        values[own_name(config, "num_key_value_heads")] = kv_heads
    head_dim = values.get("head_dim")
    # Where the configuration's class has a default head_dim, as for Qwen 3 and Gemma, it is a size of its own; other
    # classes only store the quotient that they have computed.
    independent = getattr(type(config), "head_dim", None) is not None
    if head_dim and not independent and head_dim * config.num_attention_heads == config.hidden_size:
        hidden_size = sizes.get("hidden_size") or config.hidden_size
        if hidden_size % heads:
            raise ModelError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
        values["head_dim"] = hidden_size // heads


def check_heads(config: PreTrainedConfig) -> None:
    """Raises ModelError if heads don't share the hidden size or the key-value heads evenly, or can't be rotated."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        raise ModelError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise ModelError(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    rope = getattr(config, "rope_parameters", None) or {}
    rotated = int(head_dim * (rope.get("partial_rotary_factor") or 1))
    if rope and rotated % 2:
        raise ModelError(f"rotary embeddings turn pairs, and each head has {rotated} dimensions to turn, an odd number")


def random_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model and runs it on two tokens, so that sizes that don't fit each other raise ModelError here."""
    torch.manual_seed(seed)
    try:
        check_memory(config, dtype)
        model = from_config(config, dtype).eval()
        with torch.no_grad():
            model(torch.arange(2).unsqueeze(0), use_cache=False)
    except ModelError:
        raise
    except Exception as error:  # shapes that don't fit each other, or a package or kernel that is missing
        raise ModelError(f"{config.model_type} doesn't run with these sizes: {one_line(error)}") from error
    return model


def check_memory(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Raises ModelError if the weights are larger than this machine's memory, in which it would be killed."""
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    needed, here = parameters * dtype.itemsize, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > here:
        raise ModelError(
            f"{config.model_type} of these sizes takes {needed / 1e9:,.1f} GB, and this machine has {here / 1e9:,.1f}; "
            "give smaller sizes"
        )


def lost_layer_types(full_config: PreTrainedConfig, config: PreTrainedConfig) -> str | None:
    """A hint for the user if the mini model has no layer of some type that the source has, with how many it takes."""
    types, kept = (getattr(of, "layer_types", None) or [] for of in (full_config, config))
    lost = sorted(set(types) - set(kept))
    if not lost:
        return None
    first = max(types.index(kind) for kind in lost) + 1
    return f"the source has {' and '.join(lost)} layers too: to have them, ask for {first} layers or more"


if __name__ == "__main__":
    run_script(main)
