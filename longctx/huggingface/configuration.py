"""A model's configuration, read and checked: what transformers takes of it and no model can have is refused."""

import copy
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from longctx.errors import ModelError, one_line
from longctx.schema import INT_BITS, Range, decode, quote, read_json

LAYERS = re.compile(r"(layers|n_layer|depth|experts)$")
MOST_LAYERS = 10_000  # far more than any model has


def load_config(model_id: str) -> PreTrainedConfig:
    """The configuration of a model, which is a local folder or a name on the Hugging Face hub.

    Raises:
        ModelError: there is no configuration, or it is not of a causal language model.
    """
    if not _looks_local(model_id):
        return copy.deepcopy(_hub_config(model_id))  # whoever asks may change what it is given
    file = Path(model_id) / "config.json"
    if not file.is_file():
        raise ModelError("no config.json there; name a Hugging Face model folder or a hub model")
    check_file(file)
    return _read_config(model_id)


def vocab_size(config: PreTrainedConfig) -> int:
    """How many tokens a model knows; one of several parts has the number in the configuration of its text part."""
    return config.get_text_config().vocab_size


def bos_token(config: PreTrainedConfig) -> int | None:
    """The token that a text begins with, as the model was trained; None if it has none."""
    token = getattr(config.get_text_config(), "bos_token_id", None)
    return token if type(token) is int else None


@functools.cache  # each look at the hub is a request; a folder's file may change, and is read each time
def _hub_config(model_id: str) -> PreTrainedConfig:
    return _read_config(model_id)


def _read_config(model_id: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
    except Exception as error:  # not JSON, no model type, values of a wrong type or that contradict each other
        if "trust_remote_code" in str(error):
            raise ModelError(
                "it is made of Python files of its own, which this program does not run; choose a model that "
                "transformers has the code of"
            ) from error
        raise ModelError(f"its configuration can't be loaded: {one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"a {config.model_type!r} model is no causal language model")
    check_numbers(config)
    return config


@dataclass(frozen=True)
class Quantization:
    quant_method: str | None = None
    weight_block_size: list[Annotated[int, Range(at_least=1)]] | None = None


@dataclass(frozen=True)
class ConfigFile:
    """What this program itself makes use of in a config.json. The rest is for transformers to check."""

    architectures: list[str] | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: Quantization | None = None


def check_file(file: Path) -> None:
    """Raises a ModelError for what transformers would fail on without a sentence, or never come to an end with.

    It makes lists of as many entries as there are layers, before it looks at anything.
    """
    try:
        facts = read_json(file)
        decode(ConfigFile, facts)
    except ValueError as error:
        raise ModelError(f"its config.json can't be read ({error}); mend it, or download it again") from error
    for name, number in named_numbers(facts):
        if LAYERS.search(name) and number > MOST_LAYERS:
            raise unusable(named(name, number, f"no model has more than {MOST_LAYERS:,}"))
        if isinstance(number, int) and number.bit_length() >= INT_BITS:
            raise unusable(named(name, number, f"PyTorch's integers have {INT_BITS} bits"))


def check_numbers(config: PreTrainedConfig) -> None:
    """Raises a ModelError for numbers that transformers takes and no model can have."""
    if problem := why_no_numbers(config):
        raise unusable(problem)


def why_no_numbers(config: PreTrainedConfig) -> str | None:
    """Which number no model can have, and why: no layers, NaN, a dropout of 2. None if all are well."""
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    layers, heads, key_heads = (getattr(config.get_text_config(), name, None) for name in sizes)
    if isinstance(layers, int) and layers < 1:
        return named(sizes[0], layers, "a model has 1 or more")
    if isinstance(heads, int) and isinstance(key_heads, int) and key_heads > 0 and heads % key_heads:
        return named(sizes[2], key_heads, f"it has to divide the {heads} heads of queries")
    for name, number in named_numbers(config.to_dict()):
        is_finite = isinstance(number, int) or isfinite(number)
        if not is_finite and (name, number) not in usual_numbers(config):
            return named(name, number, "it has to be finite")
        if "drop" in name and not 0 <= number <= 1:
            return named(name, number, "a probability is between 0 and 1")
    return None


def usual_numbers(config: PreTrainedConfig) -> Iterator[tuple[str, float]]:
    """The numbers of a configuration of this kind by default, some of which are infinite: a limit of Mamba 2's."""
    return named_numbers(type(config)().to_dict())


def named(name: str, number: float, reason: str) -> str:
    """A number that can't be, as a part of a sentence."""
    return f"{name} {quote(number)}, and {reason}"


def unusable(problem: str) -> ModelError:
    return ModelError(f"its config.json has {problem}; mend it, or download it again")


def named_numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number within a JSON value, by the keys that lead to it: `text_config.num_hidden_layers`."""
    if type(value) in (int, float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from named_numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from named_numbers(inner, name)


def _looks_local(model_id: str) -> bool:
    return os.path.exists(model_id) or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1
