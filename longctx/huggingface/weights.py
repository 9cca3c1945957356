"""A model's weights: found where transformers finds them and checked before training starts, or drawn at random."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from longctx.errors import ModelError, NoWeights, one_line
from longctx.huggingface.build import parameters_on_meta


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter is stored: a safetensors file, and the tensor's name in it."""

    file: Path
    name: str


def find_weights(model_id: str, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Where each parameter of a model is stored, by its name. Downloads the weights of a hub model.

    Raises:
        NoWeights: the model has no weights.
        ModelError: they are no safetensors files, or can't be downloaded or read.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        folder = _download(model_id)
    index = folder / "model.safetensors.index.json"
    file = folder / "model.safetensors"
    if not index.is_file() and not file.is_file():
        if any(folder.glob("*.bin")):
            raise ModelError("it has no model.safetensors; save it as safetensors first")
        raise NoWeights("it has no model.safetensors")
    try:
        if index.is_file():
            file = index
            files = {name: folder / part for name, part in json.loads(index.read_text())["weight_map"].items()}
        else:
            with safe_open(file, "pt") as tensors:
                files = dict.fromkeys(tensors.keys(), file)
    except Exception as error:  # cut short, or another kind of file under that name
        raise _unreadable(file, error) from error
    return {_parameter_name(name, config): StoredTensor(file, name) for name, file in files.items()}


def _parameter_name(stored: str, config: PreTrainedConfig) -> str:
    """The parameter's name in transformers; files may have an older one, as GPT-NeoX's have embed_out for lm_head."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    for key in (model_class.__name__, config.model_type):
        for transform in get_checkpoint_conversion_mapping(key) or ():
            if type(transform).__name__ == "WeightRenaming":
                stored, _ = transform.rename_source_key(stored)
    return stored


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file.name} can't be read ({one_line(error)}); save or download the model again")


def _download(model_id: str) -> Path:
    try:  # every rank of a node calls this; the hub's client lets one of them download while the others wait
        return Path(snapshot_download(model_id, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client raises many kinds: not found, gated, offline, no space
        raise ModelError(f"its weights can't be downloaded: {one_line(error)}") from error


def check_weights(weights: dict[str, StoredTensor], parameters: dict[str, list[int]]) -> None:
    """Raises ModelError unless every parameter is stored in its shape. `parameters`: the shapes, by name."""
    if missing := [name for name in parameters if name not in weights]:
        raise ModelError(
            f"its weights have no tensor {missing[0]!r} ({len(missing)} are missing of {len(parameters)}); save the "
            "model again with transformers' save_pretrained"
        )
    for file in sorted({stored.file for stored in weights.values()}):
        stored_names = {name: weights[name].name for name in parameters if weights[name].file == file}
        try:
            with safe_open(file, "pt") as tensors:
                shapes = {name: tensors.get_slice(stored).get_shape() for name, stored in stored_names.items()}
        except Exception as error:  # missing, cut short, or no safetensors file
            raise _unreadable(file, error) from error
        for name, shape in shapes.items():
            if shape != parameters[name]:
                raise ModelError(
                    f"{name!r} has shape {shape} in {file.name}, and {parameters[name]} by config.json; the two are "
                    "not of one model"
                )


def save_hf_files(model_id: str, config: PreTrainedConfig, folder: Path) -> None:
    """Writes what from_pretrained reads beside the weights: the configuration and, where the model has them, its
    tokenizer and generation configuration."""
    config.save_pretrained(folder)
    for kind in (AutoTokenizer, GenerationConfig):
        try:
            kind.from_pretrained(model_id).save_pretrained(folder)
        except Exception:  # the model has none, and can be trained without
            continue


def random_weights(config: PreTrainedConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter as transformers initializes it, float32, on the CPU; one module's are in memory at a time.

    Each module's seed is made of `seed` and the module's name, so that the weights depend on neither the order in which
    modules are initialized nor the number of ranks.
    """
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
