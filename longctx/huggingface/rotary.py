"""Settles the rotary tables whose frequencies depend on the sequence length: dynamic scaling, and Phi-3's LongRoPE.

In every forward pass transformers chooses the frequencies by the largest position it is given. That is a branch on
data, which torch.export can't trace. But all rows have one length, so the choice can be made once, before tracing.
"""

import torch
from torch import nn


def settle_rotary_tables(model: nn.Module, sequence_length: int) -> None:
    """Gives rotary embeddings whose frequencies depend on the sequence length those of this length, for good."""
    last = torch.tensor([[sequence_length - 1]])
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # one for all layers, or one for each type of layer
        by_layer = kinds if isinstance(kinds, dict) else {(): kinds}
        settled = dict(by_layer)
        for layer_type, kind in by_layer.items():
            if kind is not None and ("dynamic" in kind or kind == "longrope"):
                module(torch.empty(0), last, *([layer_type] if layer_type else []))  # chooses, and stores its choice
                settled[layer_type] = "default"  # whose frequencies transformers never changes
        if settled != by_layer:
            rope_type = settled if isinstance(kinds, dict) else settled[()]
            module.rope_type = rope_type  # pyright: ignore[reportArgumentType]  (a module takes any attribute)
