"""The causal language model as it is trained: wrapped to return its loss, its attention and RMSNorm our own.

Hugging Face's model stays the source of truth. What is put in its place is proved equal or refused: an RMSNorm is
routed to `rms_norm` only where both give the same numbers, a head that changes its logits is read from its own
operators, and an argument that our attention doesn't know is an error, never ignored.
"""

import copy
import os
import types
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.errors import UserError, one_line
from longctx.kernels.attention import attention, flash_attn_func
from longctx.kernels.rms_norm import rms_norm

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of compute, by --precision
IGNORE_INDEX = -100  # a label that does not count
ATTN_IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa", "eager")


# --- the wrapped model ---------------------------------------------------------------------------------------------


class CausalLMLoss(nn.Module):
    """A Hugging Face causal language model whose forward gives the loss summed over tokens.

    forward(tokens, labels): [b, l] int64 each -> scalar float32. `labels` are shifted already: labels[:, i] is the
    token after tokens[:, i], or IGNORE_INDEX.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.head = read_head(model)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden_states = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        lm_head = self.model.get_output_embeddings()
        weight = lm_head.weight
        if self.head.scale != 1.0:
            hidden_states = hidden_states * self.head.scale
        if getattr(lm_head, "bias", None) is not None:  # one more input dimension that is always 1
            hidden_states = torch.cat((hidden_states, torch.ones_like(hidden_states[..., :1])), dim=-1)
            weight = torch.cat((weight, lm_head.bias.unsqueeze(1)), dim=1)
        losses = chunk_linear_cross_entropy(
            hidden_states, weight, labels, IGNORE_INDEX, logit_softcap=self.head.logit_softcap
        )
        return losses.sum()


def load_config(model_id: str):
    """The configuration of a local folder's or a hub's model.

    Raises:
        UserError: there is none, or it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if _looks_local(model_id) and not (Path(model_id) / "config.json").is_file():
        raise UserError(f"--model_id {model_id}: no config.json there; name a Hugging Face model folder or a hub model")
    try:
        config = AutoConfig.from_pretrained(model_id)
    except Exception as error:  # not JSON, no model type, values of wrong types or that don't fit each other
        raise UserError(f"--model_id {model_id}: its configuration can't be loaded: {one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"--model_id {model_id}: a {config.model_type!r} model is no causal language model")
    return config


def _looks_local(model_id: str) -> bool:
    return os.path.exists(model_id) or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1


def build_model(
    config, dtype: torch.dtype, attn_implementation: str = "auto", sequence_length: int | None = None
) -> CausalLMLoss:
    """The wrapped model in train mode, parameters on meta (nothing is read or allocated), buffers real and on the CPU.

    Args:
        sequence_length: of the rows; where the model's rotary tables depend on it, they are made for it.

    Raises:
        UserError: `attn_implementation` can't be had here, transformers can't build the model of its configuration, or
            its head does what the chunked loss can't.
    """
    from transformers import AutoModelForCausalLM

    _register_attention(attn_implementation)
    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="annotated")
    except Exception as error:  # whatever a value that makes no sense leads to, deep in the model
        raise UserError(
            f"--model_id: transformers can't build a {config.model_type} model of its configuration "
            f"({type(error).__name__}: {one_line(error)}); correct its config.json"
        ) from error
    route_rms_norms(model)
    if sequence_length is not None:
        settle_rotary_tables(model, sequence_length)
    return CausalLMLoss(model).train()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on meta; their buffers are computed as ever."""
    register_parameter = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is stays itself: it may be a tied weight
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register_parameter(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter


def _register_attention(implementation: str) -> None:
    """Makes `attention` the transformers attention function 'annotated'."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "flash_attention_2" and flash_attn_func is None:
        raise UserError(
            "--attn_implementation flash_attention_2: the package flash-attn is not installed; "
            "install it (pip install flash-attn --no-build-isolation) or choose sdpa"
        )

    def annotated_attention(module, query, key, value, attention_mask, **kwargs):
        known = {name: kwargs.pop(name, None) for name in ("scaling", "dropout", "sliding_window", "softcap")}
        kwargs.pop("position_ids", None)  # rotary embedding has used them
        changes = [name for name, given in kwargs.items() if given is not None and given is not False]
        if kwargs.get("is_causal", getattr(module, "is_causal", True)):
            changes = [name for name in changes if name != "is_causal"]
        else:
            changes.append("is_causal=False")
        if attention_mask is not None:
            changes.append("attention_mask")
        if changes:
            raise UserError(
                f"--model_id: the attention of {type(module).__name__} takes {', '.join(changes)}, "
                "which this program's attention does not have; train a model without it"
            )
        optional = {"window": known["sliding_window"], "softcap": known["softcap"], "dropout": known["dropout"]}
        optional["implementation"] = None if implementation == "auto" else implementation
        scale = known["scaling"] if known["scaling"] is not None else query.shape[-1] ** -0.5
        return attention(query, key, value, scale, **{name: v for name, v in optional.items() if v}), None

    ALL_ATTENTION_FUNCTIONS.register("annotated", annotated_attention)


def settle_rotary_tables(model: nn.Module, sequence_length: int) -> None:
    """Gives rotary embeddings whose frequencies depend on the rows' length those of this length, once and for all.

    transformers chooses them in the forward, by the largest position it is given, which torch.export can't follow.
    """
    last = torch.tensor([[sequence_length - 1]])
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {(): kinds}
        settled = dict(by_layer)
        for layer_type, kind in by_layer.items():
            if kind is not None and ("dynamic" in kind or kind == "longrope"):
                module(torch.empty(0), last, *([layer_type] if layer_type else []))
                settled[layer_type] = "default"  # of which transformers changes nothing in the forward
        if settled != by_layer:
            module.rope_type = settled if isinstance(kinds, dict) else settled[()]


def route_rms_norms(model: nn.Module) -> None:
    """Gives every module that computes an RMSNorm, tried on numbers, a forward that calls `rms_norm`."""

    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, *self.rms_norm_arguments)

    tried: dict[tuple, tuple | None] = {}
    for module in model.modules():
        parameters = dict(module.named_parameters())
        if "norm" not in type(module).__name__.lower() or list(parameters) != ["weight"] or module.weight.ndim != 1:
            continue
        settings = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float))))
        key = (type(module), module.weight.shape, settings)
        if key not in tried:
            tried[key] = _rms_norm_arguments(module)
        if tried[key] is not None:
            module.rms_norm_arguments = tried[key]
            module.forward = types.MethodType(forward, module)


def _rms_norm_arguments(module: nn.Module) -> tuple | None:
    """The (eps,) or (eps, offset) with which `rms_norm` computes what `module` does, or None."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=generator)
    x = 1e-2 * torch.randn(4, *module.weight.shape, generator=generator)  # so small that eps shows
    real = copy.copy(module)
    real.__dict__ = {**vars(module), "_parameters": {"weight": nn.Parameter(weight)}}
    for eps in {v for v in vars(module).values() if isinstance(v, float) and v < 1e-2}:
        for arguments in ((eps,), (eps, 1.0)):
            try:
                if torch.allclose(real(x), rms_norm(x, weight, *arguments), rtol=1e-5, atol=1e-6):
                    return arguments
            except (RuntimeError, TypeError, AttributeError):  # it isn't one of these at all
                return None
    return None


@dataclass(frozen=True)
class Head:
    """What happens to the logits after the projection: logits * scale, then softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    logit_softcap: float = 0.0


def read_head(model: nn.Module) -> Head:
    """Reads from the model's own operators what its forward does between the decoder and the logits.

    Raises:
        UserError: it does something else than scale and soft-cap them.
    """
    ops = _head_operators(model)
    names = [name for name, _ in ops]
    if names.count("linear") != 1 or names[0] != "linear":
        raise _head_error(model, names)
    scale, at = 1.0, 1
    while at < len(ops) and names[at : at + 2] != ["div", "tanh"] and names[at] in ("mul", "div") and ops[at][1]:
        scale = scale * ops[at][1] if names[at] == "mul" else scale / ops[at][1]
        at += 1
    if at == len(ops):
        return Head(scale)
    if names[at:] == ["div", "tanh", "mul"] and ops[at][1] and ops[at][1] == ops[at + 2][1]:
        return Head(scale, logit_softcap=ops[at][1])
    raise _head_error(model, names)


def _head_error(model: nn.Module, names: list[str]) -> UserError:
    return UserError(
        f"--model_id: the head of {type(model).__name__} computes {' -> '.join(names)}, and the chunked loss knows "
        "only a linear layer, then a scale, then a soft-cap; train a model with such a head"
    )


def _head_operators(model: nn.Module) -> list[tuple[str, float | None]]:
    """The operators of the model's forward outside its decoder, in order, with the number each has as an argument."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder, lm_head = model.get_decoder(), model.get_output_embeddings()
    if lm_head is None or decoder is model:
        raise UserError(f"--model_id: {type(model).__name__} has no separate decoder and output embeddings")
    hidden_states = torch.empty(1, 2, lm_head.weight.shape[1], device="meta", dtype=lm_head.weight.dtype)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    output = BaseModelOutputWithPast(last_hidden_state=hidden_states)
    ops: list[tuple[str, float | None]] = []
    layout_only = {
        "t",
        "view",
        "_unsafe_view",
        "slice",
        "alias",
        "_to_copy",
        "detach",
        "expand",
        "reshape",
        "unsqueeze",
    }

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "linear"):
                ops.append(("linear", None))
            elif name not in layout_only:
                ops.append((name, next((float(a) for a in args if isinstance(a, (int, float))), None)))
            return func(*args, **(kwargs or {}))

    # The decoder's place is taken by one that returns ready-made hidden states, so that only the head is left to run.
    decoder.forward = lambda *args, **kwargs: output
    try:
        with torch.no_grad(), Record():
            model(input_ids=tokens, use_cache=False)
    finally:
        del decoder.forward
    return ops


def forward_flops(config, n_parameters: int, sequence_length: int) -> tuple[float, float]:
    """FLOPs of one row's forward pass: with attention counted whole, and by half as causal attention needs.

    The first is the reference's count, 2 * (parameters * l + 2 * layers * hidden * l ** 2); a step is three times that.
    """
    dense = 2.0 * n_parameters * sequence_length
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * sequence_length**2
    return dense + attention, dense + attention / 2


# --- weights -------------------------------------------------------------------------------------------------------


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
