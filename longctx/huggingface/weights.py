"""A model's weights: those that transformers' from_pretrained takes from the same files, or drawn at random.

Which files hold them, which parameter a stored tensor belongs to and what is tied is decided by transformers' own
functions, or as they do. What can't be trained as transformers would load it is refused, before any rank has started.
"""

import copy
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils.hub import cached_file

from longctx.errors import ModelError, NoWeights, one_line, some_of
from longctx.huggingface.build import building, from_config
from longctx.huggingface.changes import UNCHANGED, Changes
from longctx.huggingface.configuration import load_config
from longctx.huggingface.overrides import changed_config

PLAIN = (torch.float32, torch.bfloat16, torch.float16)  # what a stored number may be, and mean itself
UNTIED = (
    "weights: config.json ties the head to the embeddings, but both are stored and differ, so each is trained by "
    "itself, as transformers does it"
)
SCALE = "_scale_inv"  # what the name of a quantized tensor's scales adds to its own


@dataclass(frozen=True)
class StoredWeight:
    """A tensor in a file, which is mapped to memory: only what is used of it is read.

    `scale` is None unless the tensor is float8 quantized by blocks: then [rows / block rows, columns / block columns],
    what each block is to be multiplied by.
    """

    file: Path
    tensor: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    @property
    def pieces(self) -> list["StoredWeight"]:
        """The tensors that it is made of."""
        return [self]

    def read(self, place: tuple[slice, ...] = ()) -> torch.Tensor:
        """The part of the tensor that the slices select, or all of it; float32 if it was quantized.

        The products are those of transformers' integrations.finegrained_fp8.Fp8Dequantize, to the bit.
        """
        if self.scale is None:
            return self.tensor[place]
        rows, columns = (
            torch.arange(length)[selected] // (length // blocks)
            for length, blocks, selected in zip(
                self.tensor.shape, self.scale.shape, place or (slice(None), slice(None)), strict=True
            )
        )
        return self.tensor[place].float() * self.scale[rows][:, columns].float()


@dataclass(frozen=True)
class StoredExperts:
    """The experts of a layer, which are stored one by one, as the tensor that transformers makes of them.

    `parts` are the matrices of each expert: one, or two of which the second follows the first along their rows, as what
    is gated follows the gate.
    """

    parts: list[list[StoredWeight]]

    @property
    def file(self) -> Path:
        return self.pieces[0].file

    @property
    def pieces(self) -> list[StoredWeight]:
        return [piece for matrices in self.parts for piece in matrices]

    @property
    def shape(self) -> list[int]:
        """[experts, rows, columns]"""
        rows, columns = zip(*(piece.shape for piece in self.parts[0]), strict=True)
        return [len(self.parts), sum(rows), columns[0]]

    def read(self, place: tuple[slice, ...] = ()) -> torch.Tensor:
        """The part of the tensor that the slices select, or all of it: only the experts in it are read."""
        experts, *rest = place or (slice(None),)
        chosen = (torch.cat([piece.read() for piece in matrices]) for matrices in self.parts[experts])
        return torch.stack([matrix[tuple(rest)] for matrix in chosen])


Stored = StoredWeight | StoredExperts


@dataclass(frozen=True)
class Weights:
    """A model's stored weights.

    Attributes:
        config: of the model as it is trained.
        files: all that were opened, in the order in which transformers takes them.
        by_parameter: what each parameter is filled from, by its name; of tied parameters only the first has one.
        left_out: names of stored tensors that no parameter takes, though the model's class expects none such.
        untied: whether they have the embeddings and the head apart, against what config.json says.
    """

    config: PreTrainedConfig
    files: list[Path]
    by_parameter: dict[str, Stored]
    left_out: list[str]
    untied: bool


# --- what is loaded --------------------------------------------------------------------------------------------------


def find_weights(model_id: str, changes: Changes = UNCHANGED) -> Weights:
    """The stored weights of a model, whose every parameter has one. Downloads those of a hub model.

    Args:
        changes: of its configuration.

    Raises:
        NoWeights: the model has no weights.
        ModelError: they can't be downloaded or read, or are not what from_pretrained would fill the model with.
    """
    folder = _folder(model_id)
    config = changed_config(model_id, changes)
    block = _block_of(config)
    files = _weight_files(folder, config)
    model, opened = _model_on_meta(config), _open_all(files)
    stored, left_out = _by_name(model, opened)
    if untied := _is_tied(config) and _are_apart(model, stored):
        config.tie_word_embeddings = False
        model = _model_on_meta(config)
        stored, left_out = _by_name(model, opened)
    weights = _by_parameter(model, stored)
    for name, weight in weights.items():
        _check_shape(name, weight, list(model.get_parameter(name).shape))
        for piece in weight.pieces:
            _check_dtype(name, piece, block)
    _check_buffers(model, stored)
    return Weights(config, files, weights, left_out, untied)


def remarks(weights: Weights) -> list[str]:
    """A line each on what a person may not expect of the weights."""
    lines = [UNTIED] if weights.untied else []
    if names := weights.left_out:
        lines.append(
            f"weights: {len(names)} stored tensor(s) belong to no parameter and are left out: {some_of(names)}"
        )
    return lines


def is_untied(model_id: str, config: PreTrainedConfig) -> bool:
    """Whether `config`, of the model as it is trained, has its head apart from its embeddings against config.json."""
    return _is_tied(load_config(model_id)) and not _is_tied(config)


def trained_config(model_id: str, random_init: bool, changes: Changes = UNCHANGED) -> PreTrainedConfig:
    """The configuration of the model as it is trained: its head is not tied to its embeddings if the weights to start
    from have both, and they differ. So does from_pretrained, whatever config.json says.

    Of a hub model, weights that are not downloaded yet are not looked at.

    Raises:
        ModelError: there is no configuration, or it is not of a causal language model that can be built.
    """
    config = changed_config(model_id, changes)
    if random_init or not _is_tied(config):
        return config
    model = _model_on_meta(config)
    try:
        stored, _ = _by_name(model, _open_all(_weight_files(_folder(model_id, local_files_only=True), config)))
    except ModelError:  # find_weights raises it, where there have to be weights
        return config
    config.tie_word_embeddings = not _are_apart(model, stored)
    return config


def _are_apart(model: PreTrainedModel, stored: dict[str, Stored]) -> bool:
    """Whether the names of one parameter are stored with values that differ."""
    return any(_differ(_present(names, stored)) for names in _tied_names(model))


def _is_tied(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _model_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with building(config):
        return from_config(config, torch.float32)


def parameter_shapes(config: PreTrainedConfig) -> dict[str, list[int]]:
    """The shape of every parameter of a model, by its name; of tied ones, by the first."""
    return {name: list(parameter.shape) for name, parameter in _model_on_meta(config).named_parameters()}


# --- files -----------------------------------------------------------------------------------------------------------


def _folder(model_id: str, local_files_only: bool = False) -> Path:
    """The folder of a model; of a hub model it is downloaded, unless only what is here already is asked for."""
    if Path(model_id).is_dir():
        return Path(model_id)
    try:  # every rank of a node calls this; the hub's client lets one of them download while the others wait
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = Path(
                snapshot_download(model_id, allow_patterns=[weights, "*.json"], local_files_only=local_files_only)
            )
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:  # the hub's client raises many kinds: not found, gated, offline, no space
        raise ModelError(f"its weights can't be downloaded: {one_line(error)}") from error


def _weight_files(folder: Path, config: PreTrainedConfig) -> list[Path]:
    """The files that from_pretrained would open: one of safetensors before several with an index, these before .bin."""
    explicit = getattr(config, "transformers_weights", None)
    try:
        files, _ = _get_resolved_checkpoint_files(
            str(folder), None, None, None, None, is_remote_code=False, transformers_explicit_filename=explicit
        )
    except OSError as error:
        raise NoWeights("it has no model.safetensors or pytorch_model.bin") from error
    except Exception as error:  # an index that is cut short, or no index
        raise _unreadable(min(folder.glob("*.index.json"), default=folder), error) from error
    return [Path(file) for file in files or ()]


def _open_all(files: list[Path]) -> dict[str, StoredWeight]:
    """Every tensor of the files by its stored name; the last file's, if several have one of that name."""
    return {name: StoredWeight(file, tensor) for file in files for name, tensor in _open(file).items()}


def _open(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118, it is no dict
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # missing, cut short, of another kind, or with more in it than weights
        raise _unreadable(file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ModelError(f"{file.name} holds something else than tensors by name; save the model again")
    return tensors


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file.name} can't be read ({one_line(error)}); save or download the model again")


# --- names -----------------------------------------------------------------------------------------------------------


def _by_name(model: PreTrainedModel, stored: dict[str, StoredWeight]) -> tuple[dict[str, Stored], list[str]]:
    """What is stored by the names that transformers has for it today; and the stored names that it has no use for.

    Raises:
        ModelError: transformers would make the model's tensors of other ones, or has two for one name.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Stored] = {}
    experts: dict[str, dict[str, list[StoredWeight]]] = {}  # by the tensor's name today, and by converters' patterns
    left_out: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        today, converter = rename_source_key(name, renamings, converters, prefix, known)
        if today not in known and name in known:
            today, converter = rename_source_key(name, [], [], prefix, known)
        scale = stored.get(name + SCALE)
        weight = StoredWeight(stored[name].file, stored[name].tensor, scale and scale.tensor)
        if today not in known:
            left_out.add(today)
        elif converter is not None:
            experts.setdefault(today, {}).setdefault(converter, []).append(weight)
        elif today in found:
            raise _several(today, weight)
        else:
            found[today] = weight
    for name, by_pattern in experts.items():
        found[name] = _merged(name, by_pattern, converters, name in found)
    loading: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=left_out)
    model._adjust_missing_and_unexpected_keys(loading)  # takes away what the model's class says that it may leave out
    return found, sorted(loading.unexpected_keys, key=dot_natural_key)


def _merged(
    name: str, by_pattern: dict[str, list[StoredWeight]], converters: list[WeightConverter], is_there: bool
) -> StoredExperts:
    """What is made of tensors of single experts, found by the patterns of one of transformers' converters.

    Raises:
        ModelError: it is stored as one tensor too, or the converter does more than to stack the experts, and to join
            their gate and up.
    """
    converter = next(one for one in converters if set(by_pattern) <= set(one.source_patterns))
    columns = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
    does = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    joins = [("Concatenate", 1)] if len(columns) == 2 else []
    is_known = does == [("MergeModulelist", 0), *joins] and len(converter.target_patterns) == 1 and len(columns) <= 2
    is_whole = len({len(column) for column in columns}) == 1
    if is_there or not is_known or not is_whole or any(not _are_matrices_of_one_shape(column) for column in columns):
        raise _several(name, next(iter(by_pattern.values()))[0])
    return StoredExperts([list(matrices) for matrices in zip(*columns, strict=True)])


def _are_matrices_of_one_shape(weights: list[StoredWeight]) -> bool:
    return len({tuple(weight.shape) for weight in weights}) == 1 and len(weights[0].shape) == 2


def _several(name: str, weight: StoredWeight) -> ModelError:
    return ModelError(
        f"{name!r} is made of several tensors in {weight.file.name}, which this program can't do; open the model with "
        "transformers and save it by save_pretrained(..., save_original_format=False)"
    )


def _tied_names(model: PreTrainedModel) -> Iterable[list[str]]:
    """For each parameter all its names, the one of named_parameters() first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names.values()


def _present(names: list[str], stored: dict[str, Stored]) -> list[Stored]:
    return [stored[name] for name in names if name in stored]


def _differ(weights: list[Stored]) -> bool:
    """Whether what is stored for one parameter under several names is not the same for all."""
    return any(not torch.equal(*_in_one_dtype(weights[0].read(), other.read())) for other in weights[1:])


def _in_one_dtype(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (a, b) if a.dtype == b.dtype else (a.float(), b.float())


def _by_parameter(model: PreTrainedModel, stored: dict[str, Stored]) -> dict[str, Stored]:
    """What each parameter is filled from, whichever of its names it is stored under.

    Raises:
        ModelError: there is nothing for one, or there are different values under its names.
    """
    present = {names[0]: _present(names, stored) for names in _tied_names(model)}
    if missing := [name for name, weights in present.items() if not weights]:
        raise ModelError(
            f"its weights have no tensor {missing[0]!r} ({len(missing)} are missing of {len(present)}); save the "
            "model again with transformers' save_pretrained"
        )
    if apart := [name for name, weights in present.items() if _differ(weights)]:
        raise ModelError(
            f"{apart[0]!r} is one parameter under several names, and its weights have other values under each; save "
            "the model again with those that are meant"
        )
    return {name: weights[0] for name, weights in present.items()}


# --- what they are ---------------------------------------------------------------------------------------------------


def _block_of(config: PreTrainedConfig) -> list[int] | None:
    """[rows, columns] of the blocks by which weights are quantized to float8; None if they are plain numbers.

    Raises:
        ModelError: they are quantized in another way.
    """
    facts = getattr(config, "quantization_config", None)
    if facts is None:
        return None
    facts = facts if isinstance(facts, dict) else facts.to_dict()
    if facts.get("quant_method") == "fp8" and facts.get("weight_block_size"):
        return facts["weight_block_size"]
    raise ModelError(
        f"its weights are quantized by {facts.get('quant_method', 'an unknown method')}, and this program reads fp8 by "
        "blocks and no other; choose the model that they were made of, or dequantize them with transformers and save "
        "the result"
    )


def _check_shape(name: str, weight: Stored, shape: list[int]) -> None:
    if weight.shape != shape:
        raise ModelError(
            f"{name!r} has shape {weight.shape} in {weight.file.name}, and {shape} by config.json; the "
            "two are not of one model"
        )


def _check_dtype(name: str, weight: StoredWeight, block: list[int] | None) -> None:
    """Raises a ModelError unless the stored numbers mean themselves, or themselves times the scale of their block."""
    if block and weight.scale is not None and weight.tensor.dtype == torch.float8_e4m3fn:
        _check_scale(name, weight.tensor, weight.scale, block)
    elif weight.scale is not None or weight.tensor.dtype not in PLAIN:
        raise ModelError(
            f"{name!r} is stored as {_short(weight.tensor.dtype)} in {weight.file.name}, and this program reads "
            "float32, bfloat16, float16, and fp8 that quantization_config describes; save it as one of these"
        )


def _check_scale(name: str, tensor: torch.Tensor, scale: torch.Tensor, block: list[int]) -> None:
    """Raises a ModelError unless there is a scale for each block, and none is cut off at the edge but where it is all
    there is: transformers takes all blocks to be equal, whatever their size is said to be."""
    whole = tensor.dim() == scale.dim() == len(block) == 2 and all(
        n == blocks * size or (blocks == 1 and n < size)
        for n, blocks, size in zip(tensor.shape, scale.shape, block, strict=True)
    )
    if not whole or scale.dtype not in PLAIN:
        raise ModelError(
            f"{name!r} of shape {list(tensor.shape)} has {list(scale.shape)} scales of {_short(scale.dtype)}, and this "
            f"program reads float scales of whole blocks of {block}; dequantize the model with transformers and save it"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_buffers(model: PreTrainedModel, stored: dict[str, Stored]) -> None:
    """Raises a ModelError for a stored buffer: from_pretrained loads it, and generated code has what is built."""
    for name, buffer in model.named_buffers():
        if name in stored and not torch.equal(*_in_one_dtype(stored[name].read(), buffer)):
            raise ModelError(
                f"the buffer {name!r} is stored with other values than {type(model).__name__} starts with, and this "
                "program reads no buffers but those that transformers keeps in float32; choose another model"
            )


# --- without stored weights ------------------------------------------------------------------------------------------


def random_weights(config: PreTrainedConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter as transformers initializes it, float32, on the CPU; one module's are in memory at a time.

    Each module's seed is made of `seed` and the module's name, so that the weights depend on neither the order in which
    modules are initialized nor the number of ranks.
    """
    model = _model_on_meta(config)
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
            yield f"{path}.{name}" if path else name, module.get_parameter(name).detach()
            module._parameters[name] = parameter


# --- beside the weights ---------------------------------------------------------------------------------------------


GENERATION = "generation_config.json"
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


def check_hf_files(model_id: str) -> None:
    """Raises a ModelError if a folder's tokenizer or generation configuration can't be read, and so not be saved."""
    folder = Path(model_id)
    files = (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if folder.is_dir() else ()
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    for load, patterns in ((load_tokenizer, TOKENIZER_FILES), (GenerationConfig.from_pretrained, (GENERATION,))):
        found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
        what = f"its {' and '.join(found[:2])} can't be read"
        advice = "download the model again, or remove what is damaged to train without"
        if lost := [name for name in found if not os.path.isfile(os.path.join(model_id, name))]:
            raise ModelError(f"its {lost[0]} is no file; {advice}")
        try:
            if found:
                load(model_id)
        except Exception as error:  # of whichever library reads it
            raise ModelError(f"{what} ({one_line(error)}); {advice}") from error


def load_tokenizer(model_id: str) -> Any:
    """A model's tokenizer. One that is Python of its own, which transformers would ask to run, is refused."""
    return AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)


def save_hf_files(model_id: str, config: PreTrainedConfig, folder: Path) -> None:
    """Writes what from_pretrained reads beside the weights: the configuration and, where the model has them, its
    tokenizer and generation configuration. Weights are saved as plain numbers, however they were quantized."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    config.save_pretrained(folder)
    with suppress(Exception):  # the model has none, and can be trained without; check_hf_files refuses a damaged one
        load_tokenizer(model_id).save_pretrained(folder)
    with suppress(Exception):  # copied: transformers reads some that it refuses to write
        if file := cached_file(model_id, GENERATION, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(file, folder / GENERATION)
