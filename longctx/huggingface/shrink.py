"""Small configurations of an architecture, for a model that is of the same code but fast to run.

Whatever chooses code stays as it is: flags, kinds of layers, activations, the size of attention's heads (rotary tables
depend on it). Smaller are the numbers of tokens known, of layers, of experts, of heads, and with the heads the widths
of layers.
"""

import copy
import math
from collections.abc import Iterator

from transformers import PreTrainedConfig

VOCABULARY = 256
SOFTCAP = 2.0
HEADS = ("num_attention_heads", "num_key_value_heads", "num_kv_heads")
LINEAR_HEADS = ("linear_num_value_heads", "linear_num_key_heads")
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "word_embed_proj_dim",
    "lru_width",
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
WINDOWS = ("window", "window_size", "attention_chunk_size")  # how the names of windows end


def small_configs(
    config: PreTrainedConfig, sequence_length: int, length: int, n_layers: int
) -> Iterator[PreTrainedConfig]:
    """Configurations of models that may have the kinds of layers of a model, the smallest first.

    Args:
        sequence_length: at which the model is to be trained, which some rotary tables depend on.
        length: at which the small model is to be run.
        n_layers: the first layers, in which every kind of layer comes.
    """
    n_all = config.get_text_config().num_hidden_layers
    for narrow in (True, False):
        for depth in dict.fromkeys((n_layers, n_all)):
            small = copy.deepcopy(config)
            text = small.get_text_config()
            _reduce_depth(small, depth)
            _settle(text, sequence_length, length)
            if not narrow or _reduce_width(text):
                yield small


def _reduce_depth(config: PreTrainedConfig, depth: int) -> None:
    """The first `depth` layers, and one of each other part of the model, such as a vision tower."""
    text = config.get_text_config()
    n_all = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == n_all:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and part is not text:
            for layers in {"num_hidden_layers", "depth"} & set(dir(part)):
                setattr(part, layers, 1)


def _settle(text: PreTrainedConfig, sequence_length: int, length: int) -> None:
    """A small vocabulary, no dropout, and soft-caps that the scores come near. Windows, and the lengths at which rotary
    tables were pretrained, are shorter than the rows if they are so at `sequence_length`."""
    for name, value in list(vars(text).items()):
        if "vocab_size" in name and isinstance(value, int):
            setattr(text, name, min(value, VOCABULARY))
        elif name.endswith(WINDOWS) and type(value) is int and value < sequence_length:
            setattr(text, name, min(value, max(1, length // 4)))
        elif "drop" in name and isinstance(value, float):
            setattr(text, name, 0.0)
        elif "softcap" in name and isinstance(value, float):
            setattr(text, name, min(value, SOFTCAP))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, min(value, text.vocab_size - 1))
    rotary = getattr(text, "rope_parameters", None) or {}
    if rotary.get("rope_type") in ("dynamic", "longrope"):
        for owner in (rotary, vars(text)):
            for name in ("original_max_position_embeddings", "max_position_embeddings"):
                if owner.get(name) and owner[name] < sequence_length:
                    owner[name] = length // 2


def _reduce_width(text: PreTrainedConfig) -> bool:
    """Fewer heads, of the same size, and other widths in proportion; False if that is not possible."""
    counts, linear, widths = (_numbers(text, names) for names in (HEADS, LINEAR_HEADS, WIDTHS))
    n_heads = counts.get("num_attention_heads", 0)
    few = {name: value for name, value in _fewer(counts).items() if counts[name] > value}
    if "num_attention_heads" not in few or widths.get("hidden_size", 1) % n_heads:
        return False
    ratio = few["num_attention_heads"] / n_heads
    _reduce_experts(text)
    for name, value in {**few, **_fewer(linear), **{n: math.ceil(v * ratio) for n, v in widths.items()}}.items():
        setattr(text, name, value)
    return True


def _reduce_experts(text: PreTrainedConfig) -> None:
    """As few experts as leave a choice: twice those that a token has, and in groups of them, two in each."""
    most = 2 * max(1, getattr(text, "num_experts_per_tok", None) or 1)
    groups = max(1, getattr(text, "n_group", None) or 1)
    few = groups * max(2, math.ceil(most / groups))
    for name, value in _numbers(text, EXPERTS).items():
        setattr(text, name, min(value, few))


def _numbers(text: PreTrainedConfig, names: tuple[str, ...]) -> dict[str, int]:
    """Those of the fields that are there and whole numbers."""
    return {name: value for name in names if type(value := getattr(text, name, None)) is int}


def _fewer(counts: dict[str, int]) -> dict[str, int]:
    """Numbers of heads: at most two of keys and values, and at most two queries to each of them."""
    if not counts:
        return {}
    keys = min(counts.values())
    return {name: min(keys, 2) * min(value // keys, 2) for name, value in counts.items()}
