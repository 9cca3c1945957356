"""A model's weights: found as transformers finds them, checked before training, read by slices, or drawn at random."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from longctx.errors import UserError, one_line
from longctx.huggingface.build import parameters_on_meta


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter lies: a safetensors file, and its name there."""

    file: Path
    name: str


def find_weights(model_id: str, config) -> dict[str, StoredTensor]:
    """Where each tensor of a model lies, by the name of its parameter. Downloads a hub model's weights.

    Raises:
        UserError: it has no safetensors weights, or they can't be read.
    """
    import json

    from safetensors import safe_open

    folder = Path(model_id)
    if not folder.is_dir():
        folder = _download(model_id)
    index = folder / "model.safetensors.index.json"
    file = folder / "model.safetensors"
    if not index.is_file() and not file.is_file():
        hint = (
            "; save it as safetensors first" if any(folder.glob("*.bin")) else "; pass --random_init to start without"
        )
        raise UserError(f"--model_id {model_id}: it has no model.safetensors{hint}")
    try:
        if index.is_file():
            file = index
            files = {name: folder / part for name, part in json.loads(index.read_text())["weight_map"].items()}
        else:
            with safe_open(file, "pt") as tensors:
                files = dict.fromkeys(tensors.keys(), file)
    except Exception as error:  # cut short, or something else by that name
        raise _unreadable(model_id, file, error) from error
    return {_parameter_name(name, config): StoredTensor(file, name) for name, file in files.items()}


def _parameter_name(stored: str, config) -> str:
    """What transformers calls a tensor that files have by an older name: GPT-NeoX's embed_out is its lm_head."""
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for key in (AutoModelForCausalLM._model_mapping[type(config)].__name__, config.model_type):
        for transform in get_checkpoint_conversion_mapping(key) or ():
            if type(transform).__name__ == "WeightRenaming":
                stored, _ = transform.rename_source_key(stored)
    return stored


def _unreadable(model_id: str, file: Path, error: Exception) -> UserError:
    return UserError(
        f"--model_id {model_id}: {file.name} can't be read ({one_line(error)}); save or download the model again"
    )


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:  # every rank of a node asks; the hub's client lets one download while the others wait
        return Path(snapshot_download(model_id, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client raises many kinds: not found, gated, offline, no space
        raise UserError(f"--model_id {model_id}: its weights can't be downloaded: {one_line(error)}") from error


def check_weights(model_id: str, weights: dict[str, StoredTensor], parameters: dict[str, list[int]]) -> None:
    """Raises a UserError unless the files have every parameter, in its shape."""
    from safetensors import safe_open

    if missing := [name for name in parameters if name not in weights]:
        raise UserError(
            f"--model_id {model_id}: its weights have no tensor {missing[0]!r} ({len(missing)} are missing of "
            f"{len(parameters)}); save the model again with transformers' save_pretrained"
        )
    for file in sorted({stored.file for stored in weights.values()}):
        here = {name: weights[name].name for name in parameters if weights[name].file == file}
        try:
            with safe_open(file, "pt") as tensors:
                shapes = {name: tensors.get_slice(stored).get_shape() for name, stored in here.items()}
        except Exception as error:  # missing, cut short, or no safetensors at all
            raise _unreadable(model_id, file, error) from error
        for name, shape in shapes.items():
            if shape != parameters[name]:
                raise UserError(
                    f"--model_id {model_id}: {name!r} has shape {shape} in {file.name}, and {parameters[name]} by "
                    "config.json; the two are not of one model"
                )


def save_hf_files(model_id: str, config, folder: Path) -> None:
    """Writes what from_pretrained needs beside the weights: configuration and, if the model has one, tokenizer."""
    from transformers import AutoTokenizer, GenerationConfig

    config.save_pretrained(folder)
    for kind in (AutoTokenizer, GenerationConfig):
        try:
            kind.from_pretrained(model_id).save_pretrained(folder)
        except Exception:  # the model has none; it trains all the same
            continue


def random_weights(config, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter as transformers would initialize it, float32, on the CPU, one module at a time.

    Each module has a seed of its own, made of `seed` and its name, so the weights don't depend on what is built first
    or on how many ranks there are.
    """
    from transformers import AutoModelForCausalLM

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    yielded = set()
    for path, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p not in yielded}
        if not own:
            continue
        yielded.update(own.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed} {path}".encode()))
            for name, parameter in own.items():
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape))
            model._init_weights(module)
        for name, parameter in own.items():
            yield f"{path}.{name}" if path else name, module._parameters[name].detach()
            module._parameters[name] = parameter
