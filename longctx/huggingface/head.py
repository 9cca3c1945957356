"""What a model's own head does to its logits, read from its operators, so that the chunked loss does the same.

Configurations name it differently in every family (final_logit_softcapping, logits_scaling, logit_scale), and a name
that is not known would silently be ignored. So the head is run once, on meta tensors, and its operators are recorded.
"""

from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longctx.errors import ModelError

# Operators that move, rename or convert numbers and compute none.
LAYOUT_OPS = {"t", "view", "_unsafe_view", "slice", "alias", "_to_copy", "detach", "expand", "reshape", "unsqueeze"}


@dataclass(frozen=True)
class Head:
    """What happens to the logits after the projection: logits * scale, then softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    logit_softcap: float = 0.0


@dataclass(frozen=True)
class HeadOp:
    """An operator of the head by its name, and the first number among its arguments, if it has one."""

    name: str
    number: float | None = None


def read_head(model: PreTrainedModel) -> Head:
    """Reads what a model on meta does between its decoder and its logits.

    Raises:
        ModelError: that is something else than a linear layer, a scale and a soft-cap.
    """
    ops = _head_ops(model)
    names = [op.name for op in ops]
    if names.count("linear") != 1 or names[0] != "linear":
        raise _head_error(model, names)
    scale, rest = 1.0, ops[1:]
    while rest and rest[0].name in ("mul", "div") and (number := rest[0].number) and not _is_softcap(rest):
        scale = scale * number if rest[0].name == "mul" else scale / number
        rest = rest[1:]
    if not rest:
        return Head(scale)
    if len(rest) == 3 and _is_softcap(rest) and (number := rest[0].number) and number == rest[2].number:
        return Head(scale, logit_softcap=number)
    raise _head_error(model, names)


def _is_softcap(ops: list[HeadOp]) -> bool:
    """Whether the operators begin as softcap * tanh(logits / softcap) does."""
    return [op.name for op in ops[:3]] == ["div", "tanh", "mul"]


def _head_error(model: PreTrainedModel, names: list[str]) -> ModelError:
    return ModelError(
        f"the head of {type(model).__name__} computes {' -> '.join(names)}, and this program's loss can only do a "
        "linear layer, then a scale, then a soft-cap; choose a model with such a head"
    )


def _head_ops(model: PreTrainedModel) -> list[HeadOp]:
    """The operators of the model's forward outside its decoder, in order."""
    decoder, lm_head = model.get_decoder(), model.get_output_embeddings()
    if lm_head is None or decoder is model:
        raise ModelError(
            f"this program needs a model whose decoder and output embeddings are modules of their own, and those of "
            f"{type(model).__name__} are not; choose another model"
        )
    hidden_states = torch.empty(1, 2, lm_head.weight.shape[1], device="meta", dtype=lm_head.weight.dtype)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    output = BaseModelOutputWithPast(last_hidden_state=hidden_states)
    # The decoder is made to return these hidden states at once, so that only the head's operators are recorded.
    decoder.forward = lambda *args, **kwargs: output
    try:
        with torch.no_grad(), _RecordedOps() as recorded:
            model(input_ids=tokens, use_cache=False)
    finally:
        del decoder.forward
    return recorded.ops


class _RecordedOps(TorchDispatchMode):
    """Records in `ops` every operator that runs inside, but for those that only change the layout."""

    def __init__(self):
        super().__init__()
        self.ops: list[HeadOp] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "linear"):
            self.ops.append(HeadOp("linear"))
        elif name not in LAYOUT_OPS:
            self.ops.append(HeadOp(name, next((float(a) for a in args if isinstance(a, (int, float))), None)))
        return func(*args, **(kwargs or {}))
