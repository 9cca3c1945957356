"""What a model's own head does to its logits, read from its operators, so that the chunked loss does the same."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.errors import UserError


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
