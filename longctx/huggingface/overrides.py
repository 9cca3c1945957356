"""What a command line changes of a model's configuration: its positions, for longer rows, and whatever else it asks.

    changes = Changes(rope_parameters={"rope_type": "yarn", "factor": 16.0}, sequence_length=131_072)
    config = changed_config("meta-llama/Meta-Llama-3-8B", changes)

The keys are transformers' own, and transformers judges them: the changed configuration is read anew as from_pretrained
reads a config.json. So what is trained is what from_pretrained makes of the configuration that is saved with it.

Saved with it is also the length that was trained, as max_position_embeddings. transformers uses that number for three
more things, and what they come to has to stay:

- 'dynamic' frequencies are scaled by a row's length over max_position_embeddings, which therefore stays as it was;
- 'yarn' and 'longrope' without a factor take max_position_embeddings over the original length for it, which becomes an
  explicit factor;
- without rotary embeddings it is the size of a table of learned positions, or of nothing, and stays as well.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx.errors import ConfigurationError, one_line
from longctx.huggingface.changes import Changes
from longctx.huggingface.configuration import load_config, why_no_numbers
from longctx.schema import quote

Rope = dict[str, Any]  # rope_parameters of a configuration: keys of transformers, or such for each type of layer

FULL = "full_attention"  # the type of layer whose attention reaches as far as a row is long
STRETCHED = ("linear", "yarn")  # they reach as far as the factor times the original length, and no further
WITH_ORIGINAL = ("yarn", "llama3", "longrope")  # whose parameters have the original length


def changed_config(model_id: str, changes: Changes) -> PreTrainedConfig:
    """The configuration of a model with the changes made.

    Raises:
        ModelError: there is no configuration, or it is not of a causal language model.
        ConfigurationError: a change can't be made.
    """
    return change(load_config(model_id), changes)


def change(config: PreTrainedConfig, changes: Changes) -> PreTrainedConfig:
    """A copy of a configuration with the changes made.

    Raises:
        ConfigurationError: a change can't be made.
    """
    config = copy.deepcopy(config)
    if changes.overrides:
        config = override(config, changes.overrides)
    if changes.rope_parameters is not None or changes.rope_theta is not None:
        config = change_rope(config, changes)
    elif changes.sequence_length:
        extend(config.get_text_config(), changes.sequence_length)
    return config


def override(config: PreTrainedConfig, overrides: tuple[str, ...]) -> PreTrainedConfig:
    """The configuration with other values of keys that it has; transformers reads them by the type of the old ones."""
    text = config.get_text_config()
    for pair in overrides:
        key, equals, _ = pair.partition("=")
        if not equals or key not in text.to_dict():
            reason = f"{text.model_type} has no such key" if equals else "it has to be key=value"
            raise ConfigurationError("config_overrides", f"{pair!r}: {reason}")
        try:
            text.update_from_string(pair)
        except (ValueError, TypeError) as error:
            raise ConfigurationError("config_overrides", f"{pair!r}: {one_line(error)}") from error
    config = read_anew(config, "config_overrides")
    if problem := why_no_numbers(config):
        raise ConfigurationError("config_overrides", f"that gives {problem}")
    return config


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def change_rope(config: PreTrainedConfig, changes: Changes) -> PreTrainedConfig:
    """The configuration with other rotary embeddings.

    Raises:
        ConfigurationError: it has none, or transformers does not take these, or they don't reach the rows' length.
    """
    option = "rope_theta" if changes.rope_parameters is None else "rope_parameters"
    text = config.get_text_config()
    old: Rope | None = getattr(text, "rope_parameters", None)
    if not old:
        raise ConfigurationError(option, f"a {text.model_type} model has no rotary embeddings; leave it out")
    made_for = text.max_position_embeddings
    given = dict(changes.rope_parameters or {})
    new = copy.deepcopy(old)
    for layer_type, wanted in by_layer_type(given, old).items():
        if is_by_layer(old):
            new[layer_type] = joined(wanted, old[layer_type], changes.rope_theta, made_for)
        else:
            new = joined(wanted, old, changes.rope_theta, made_for)
    text.rope_parameters = new
    extend(text, changes.sequence_length or longest_by_factor(text, made_for))
    config = read_anew(config, option)
    if changes.rope_parameters is not None and changes.sequence_length:
        check_reach(config.get_text_config(), changes.sequence_length, made_for)
    return config


def is_by_layer(rope: Mapping[str, Any]) -> bool:
    return bool(rope) and all(value is None or isinstance(value, Mapping) for value in rope.values())


def by_layer_type(given: Rope, old: Rope) -> dict[str, Rope]:
    """What is wanted, by the types of layers that it is for; by '' where a model has one kind of positions for all.

    What names no type is for layers whose attention reaches over the whole row: those with windows see no further in a
    longer one.

    Raises:
        ConfigurationError: the model has no layers of a type.
    """
    if not is_by_layer(old):
        if is_by_layer(given):
            raise ConfigurationError("rope_parameters", "all layers of this model have one kind; leave the types out")
        return {"": given}
    wanted = given if is_by_layer(given) else {FULL: given}
    for layer_type in wanted:
        if not old.get(layer_type):
            known = ", ".join(name for name, rope in old.items() if rope)
            raise ConfigurationError(
                "rope_parameters", f"no layers of {layer_type!r} have rotary embeddings; give those of {known}"
            )
    return wanted


def joined(wanted: Rope, old: Rope, theta: float | None, made_for: int) -> Rope:
    """The parameters that are wanted, with what they leave open as it was.

    Raises:
        ConfigurationError: theta is given twice, or there is no such type.
    """
    if theta is not None and wanted.get("rope_theta", theta) != theta:
        raise ConfigurationError("rope_theta", f"rope_parameters have {wanted['rope_theta']}; leave one of them out")
    by_theta = {} if theta is None else {"rope_theta": theta}
    if not wanted:  # the type stays
        return old | by_theta
    kind = wanted.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
        raise ConfigurationError("rope_parameters", f"transformers has no rope_type {quote(kind)}; it has {known}")
    kept = {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if name in old}
    original = {"original_max_position_embeddings": made_for} if kind in WITH_ORIGINAL else {}
    return {"rope_type": kind, **kept, **original, **wanted, **by_theta}


def each_rope(text: PreTrainedConfig) -> Iterator[Rope]:
    """The rotary parameters of a configuration, once for each kind of layer that has some."""
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in rope.values() if is_by_layer(rope) else [rope]:
        if parameters:
            yield parameters


def extend(text: PreTrainedConfig, length: int) -> None:
    """Makes a length the one that a configuration is for, where that is shorter and leaves the frequencies as they are.

    It writes to the configuration.
    """
    ropes, made_for = list(each_rope(text)), getattr(text, "max_position_embeddings", None)
    if not ropes or not made_for or length <= made_for or any(kind_of(rope) == "dynamic" for rope in ropes):
        return
    for rope in ropes:
        if kind_of(rope) in ("yarn", "longrope") and rope.get("factor") is None:
            rope["factor"] = made_for / original_length(text, rope)
    text.max_position_embeddings = length


def kind_of(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def original_length(text: PreTrainedConfig, rope: Mapping[str, Any]) -> int:
    """The length before any stretching; some families have it beside the rotary parameters, which then counts."""
    beside = getattr(text, "original_max_position_embeddings", None)
    return beside or rope.get("original_max_position_embeddings") or text.max_position_embeddings


def longest_by_factor(text: PreTrainedConfig, made_for: int) -> int:
    """How far rotary parameters reach where no rows say how far they have to."""
    reaches = [reach(rope, made_for) for rope in each_rope(text)]
    return max([made_for, *(int(length) for length in reaches if length)])


def reach(rope: Mapping[str, Any], made_for: int) -> float | None:
    """The longest row that stretched frequencies are made for; None if they have no such end."""
    factor = rope.get("factor")
    if kind_of(rope) not in STRETCHED or not isinstance(factor, (int, float)):
        return None
    return factor * rope.get("original_max_position_embeddings", made_for)


def check_reach(text: PreTrainedConfig, length: int, made_for: int) -> None:
    """Raises a ConfigurationError for a factor that does not stretch to the length of the rows."""
    for rope in each_rope(text):
        longest = reach(rope, made_for)
        if longest is not None and longest < length:
            needed = length / (longest / rope["factor"])
            raise ConfigurationError(
                "rope_parameters",
                f"a factor of {rope['factor']:g} reaches {int(longest):,} tokens, and the rows have {length:,}; give "
                f"{needed:g} or more",
            )


# --- what transformers says ------------------------------------------------------------------------------------------


def read_anew(config: PreTrainedConfig, option: str) -> PreTrainedConfig:
    """The configuration as from_pretrained would read it once it is saved.

    Raises:
        ConfigurationError: transformers refuses it, or warns that its rotary parameters make no sense.
    """
    with collecting_warnings() as warnings:
        try:
            again = type(config).from_dict(config.to_dict())
        except Exception as error:  # each architecture checks its values itself, and raises exceptions of several kinds
            raise ConfigurationError(option, f"transformers refuses it: {one_line(error)}") from error
    wrong = [text for text in warnings if text.startswith(("`rope_parameters`'s", "Unrecognized keys"))]
    if wrong:
        raise ConfigurationError(option, f"transformers warns of it: {one_line(ValueError(wrong[0]))}")
    return again


@contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """Inside, what transformers would log of rotary parameters goes to the list instead."""
    logger, texts = logging.getLogger("transformers.modeling_rope_utils"), []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


# --- what a person should know ---------------------------------------------------------------------------------------


def remark(model_id: str, changes: Changes) -> str | None:
    """A line where rows are longer than the model was made for, or its positions are changed; None otherwise.

    Raises:
        ModelError, ConfigurationError: as changed_config.
    """
    config = load_config(model_id)
    before, after = config.get_text_config(), change(config, changes).get_text_config()
    made_for, length = getattr(before, "max_position_embeddings", None), changes.sequence_length
    if not list(each_rope(before)) or not made_for or not length:
        return None
    old, new = before.rope_parameters, after.rope_parameters
    if old != new and changes != Changes(sequence_length=length):
        return (
            f"positions: {json.dumps(new)} where the model has {json.dumps(old)}; it was made for {made_for:,} tokens"
        )
    if length > made_for:
        return (
            f"positions: rows have {length:,} tokens, the model was made for {made_for:,}, and nothing extends its "
            "positions"
        )
    return None
