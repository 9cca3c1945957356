"""The model as nnScaler's Trainer builds and calls it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from longctx.huggingface.attention import make_no_masks
from longctx.huggingface.build import build_model
from longctx.huggingface.changes import Changes
from longctx.huggingface.head import TakenEmbeddings
from longctx.huggingface.weights import Weights, find_weights, random_weights, trained_config
from longctx.job import DTYPES
from longctx.runtime.parallel import not_finite


class WrappedModel(nn.Module):
    """The causal language model with its weights, on one sample."""

    def __init__(
        self,
        model_id: str,
        precision: str,
        attn_implementation: str,
        random_init: bool,
        seed: int,
        changes: dict[str, Any],
    ):
        """`changes` are Changes of the configuration, as plain values, which nnScaler keeps in its checkpoints."""
        super().__init__()
        changed = Changes(**changes)
        found = None if random_init else find_weights(model_id, changed)
        config = found.config if found else trained_config(model_id, random_init, changed)
        self.loss = build_model(config, DTYPES[precision], attn_implementation, changed.sequence_length)
        head = self.loss.model.get_output_embeddings()
        assert head is not None, "read_head refuses a model without"
        head.__class__ = TakenEmbeddings
        make_no_masks()  # which nnScaler would keep
        fill(self.loss.model, stored_weights(found) if found else random_weights(config, seed))

    def forward(self, sample):
        """{'tokens': [1, l], 'labels': [1, l], 'n_tokens': []} -> summed loss, the same to be logged, n_tokens."""
        loss = self.loss(sample["tokens"], sample["labels"])
        return loss, loss.data, sample["n_tokens"]


def stored_weights(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's stored weight. Raises a ModelError for one that can't be trained on."""
    for name, stored in weights.by_parameter.items():
        weight = stored.read()
        if not weight.isfinite().all():
            raise not_finite(name)
        yield name, weight


def fill(module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Puts weights in the place of parameters on meta, in their dtype; tied ones stay tied."""
    named = dict(module.named_parameters())
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((part, name))
    for name, tensor in weights:
        if name in named:
            parameter = nn.Parameter(tensor.to(named[name].dtype))
            for part, attribute in places[named[name]]:
                setattr(part, attribute, parameter)
