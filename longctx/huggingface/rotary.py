"""Settles the rotary tables whose frequencies depend on the sequence length: dynamic scaling, and Phi-3's LongRoPE.

In every forward pass transformers chooses the frequencies by the largest position it is given. That is a branch on
data, which torch.export can't trace. But all rows have one length, so the choice can be made once, before tracing.
"""

import torch
from torch import nn

from longctx.errors import ModelError


def settle_rotary_tables(model: nn.Module, sequence_length: int, documents_apart: bool = False) -> None:
    """Gives rotary embeddings whose frequencies depend on the sequence length those of this length, for good.

    Raises:
        ModelError: documents are to be apart, which are of all lengths, and the frequencies differ between these.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # one for all layers, or one for each type of layer
        by_layer = kinds if isinstance(kinds, dict) else {(): kinds}
        settled = dict(by_layer)
        for layer_type, kind in by_layer.items():
            if kind is not None and ("dynamic" in kind or kind == "longrope"):
                of_one_token, of_row = (_choose(module, layer_type, length) for length in (1, sequence_length))
                differ = any(not torch.equal(of_row[name], table) for name, table in of_one_token.items())
                if documents_apart and differ:
                    raise ModelError(
                        f"its rotary tables are of the kind {kind}, which are others for a text of {sequence_length:,} "
                        "tokens than for a short one, so that one row can't have documents of several lengths; choose "
                        "another model, or rows as short as its tables were pretrained for"
                    )
                settled[layer_type] = "default"  # whose frequencies transformers never changes
        if settled != by_layer:
            rope_type = settled if isinstance(kinds, dict) else settled[()]
            module.rope_type = rope_type  # pyright: ignore[reportArgumentType]  (a module takes any attribute)


def _choose(module: nn.Module, layer_type: str | tuple[()], length: int) -> dict[str, torch.Tensor]:
    """Lets a module choose its frequencies for a text of this length, and store its choice; a copy of its tables."""
    module(torch.empty(0), torch.tensor([[length - 1]]), *([layer_type] if layer_type else []))
    return {name: buffer.clone() for name, buffer in module.named_buffers()}
