"""Makes a small model of another one's architecture, with seeded random weights, to debug with on any machine.

    python create_mini_model.py --model_id meta-llama/Meta-Llama-3-8B-Instruct --output_id ./llama3_mini

The source is a model of the Hugging Face hub or a local folder. It must have a config.json; its tokenizer and
generation_config.json are copied if it has them, and its weights are never read.
"""

import argparse
import shutil
from pathlib import Path

import huggingface_hub
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from longctx.atomic import whole_folder, why_not_writable
from longctx.errors import UserError, one_line, run_script

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# What the width of the MLP may be called: transformers' attribute_map knows the other names of every size but this.
MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)


def main() -> None:
    args = parse_args()
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    check(args, sizes)
    huggingface_hub.logging.set_verbosity_error()  # it would print a line for each retry without a network
    source = source_folder(args.model_id)
    full_config = causal_lm_config(source, args.model_id)
    config = mini_config(full_config, sizes)
    with whole_folder(args.output_id) as folder:
        model = random_model(config, args.seed, getattr(torch, args.dtype))
        model.save_pretrained(folder, max_shard_size="5GB")
        has_tokenizer = copy_files(source, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(file.stat().st_size for file in args.output_id.iterdir() if file.suffix == ".safetensors")
    shape = ", ".join(f"{name} {getattr(config, name)}" for name in SIZES if hasattr(config, name))
    print(f"{type(model).__name__} with {parameters:,} random parameters: {shape}")
    print(f"{stored:,} bytes of {args.dtype} {'with' if has_tokenizer else 'without'} a tokenizer in {args.output_id}")
    if hint := lost_layer_types(full_config, config):
        print(hint)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a small model of the same architecture with random weights.")
    parser.add_argument("--model_id", required=True, help="model of the hub, or local folder with a config.json")
    parser.add_argument("--output_id", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="decoder layers (default: 4)")
    for name in SIZES[1:]:
        parser.add_argument(f"--{name}", type=int, help="default: the source's")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    return parser.parse_args()


def check(args: argparse.Namespace, sizes: dict[str, int]) -> None:
    """Raises UserError for what can be seen to be wrong before anything is loaded."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"--{name} {size}: it must be 1 or more")
    if args.output_id.exists():
        raise UserError(f"--output_id {args.output_id} exists already: remove it or name another folder")
    if problem := why_not_writable(args.output_id):
        raise UserError(f"--output_id {args.output_id}: {problem}; name another folder")


# The source


def source_folder(model_id: str) -> Path:
    """The folder with the source's config.json: `model_id` itself, or the hub's files, downloaded without weights."""
    folder = Path(model_id)
    if not folder.exists():
        try:
            folder = Path(huggingface_hub.snapshot_download(model_id, allow_patterns=["*.json", *TOKENIZER_FILES]))
        except huggingface_hub.errors.HFValidationError as error:
            raise UserError(f"--model_id {model_id}: there is no such folder") from error
        except Exception as error:  # the network, the hub and the disk each have their own
            raise UserError(
                f"--model_id {model_id}: no such folder, and no model from the hub: {one_line(error)}"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"--model_id {model_id}: there is no config.json in it")
    return folder


def causal_lm_config(source: Path, model_id: str) -> PreTrainedConfig:
    """The source's configuration, or of its text part; raises UserError if it is of no causal language model."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # not JSON, no model type, values of wrong types, code of its own
        raise UserError(f"--model_id {model_id}: its config.json can't be used: {one_line(error)}") from error
    text_config = config.get_text_config()
    made_for = [] if text_config is not config else config.architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in made_for) or not made_for
    if config.is_encoder_decoder or not causal or type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = ", ".join(made_for) or config.model_type
        raise UserError(f"--model_id {model_id}: {kind} is not a causal language model")
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
    """Returns `config` with other `sizes` (keys of SIZES); raises UserError where no model can have them.

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
        raise UserError(f"{config.model_type} can't have these sizes: {one_line(error)}") from error
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
            raise UserError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
        values["head_dim"] = hidden_size // heads


def check_heads(config: PreTrainedConfig) -> None:
    """Raises UserError if heads don't share the hidden size or the key-value heads evenly, or can't be rotated."""
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise UserError(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    rope = getattr(config, "rope_parameters", None) or {}
    rotated = int(head_dim * (rope.get("partial_rotary_factor") or 1))
    if rope and rotated % 2:
        raise UserError(f"rotary embeddings turn pairs, and each head has {rotated} dimensions to turn, an odd number")


def random_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model and runs it on two tokens, so that sizes that don't fit each other raise UserError here."""
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
        with torch.no_grad():
            model(torch.arange(2).unsqueeze(0), use_cache=False)
    except Exception as error:  # shapes that don't fit each other, or a package or kernel that is missing
        raise UserError(f"{config.model_type} doesn't run with these sizes: {one_line(error)}") from error
    return model


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
