"""What a model's own head does, so that the chunked loss does the same.

Before the output embeddings a head may do anything (BERT's has a layer of its own): that is part of the traced model.
What it does to the logits afterwards has to be known, since the loss never holds them. Configurations name it
differently in every family (final_logit_softcapping, logits_scaling, logit_scale), and a name that is not known would
silently be ignored. So the head is run once, on meta tensors, and its operators are recorded.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from longctx.errors import ModelError, one_line

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
    """Reads what a model on meta does from its output embeddings on.

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


def input_of_output_embeddings(
    model: PreTrainedModel, tokens: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs a model up to its output embeddings, and returns what it hands them: [b, l] int64 each -> [b, l, d].

    A model that takes no positions is given none. Of a mixture of experts whose configuration asks for it, the second
    result is its routers' auxiliary loss, [].
    """
    handed: list[torch.Tensor] = []
    lm_head: Any = model.get_output_embeddings()
    given = {}
    # nnScaler, which gives none, can't trace the question.
    if position_ids is not None and "position_ids" in inspect.signature(type(model).forward).parameters:
        given["position_ids"] = position_ids
    with _taken(lm_head, handed.append):
        output = model(input_ids=tokens, use_cache=False, **given)
    return handed[-1], getattr(output, "aux_loss", None)


class TakenEmbeddings(nn.Module):
    """Output embeddings that call `take` with what they are handed, and return it.

    nnScaler's tracer calls each module's forward as it was when tracing began, whatever is put in its place for a
    while. So a model that it traces has these for good.
    """

    take: Callable[[torch.Tensor], None]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.take(hidden_states)
        return hidden_states


@contextmanager
def _taken(lm_head: Any, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside, output embeddings call `take` with what they are handed, and return it: nobody reads the logits."""

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        take(hidden_states)
        return hidden_states

    if isinstance(lm_head, TakenEmbeddings):
        lm_head.take = take
        yield
        return
    with _forward_replaced(lm_head, forward):
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, calling the module calls `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _DecoderOutput(tuple):
    """What a decoder returns, whatever its family: the hidden states, and None for all else that a head asks for."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _head_ops(model: PreTrainedModel) -> list[HeadOp]:
    """The operators of the model's forward from its output embeddings on, in order.

    Raises:
        ModelError: the model has no output embeddings apart from its decoder, or never calls them.
    """
    decoder: Any = model.get_decoder()
    lm_head: Any = model.get_output_embeddings()
    if decoder in (model, lm_head):  # some models call their output embeddings the decoder
        decoder = max(model.children(), key=lambda module: sum(p.numel() for p in module.parameters()))
    if not isinstance(getattr(lm_head, "weight", None), nn.Parameter) or decoder is lm_head:
        raise ModelError(
            f"this program needs a model whose decoder and output embeddings are modules of their own, and those of "
            f"{type(model).__name__} are not; choose another model"
        )
    # A head that begins with a layer of its own may take more features than the output embeddings do.
    taken = lm_head.weight.shape[1]
    failed: Exception | None = None
    for width in dict.fromkeys((taken, getattr(model.config.get_text_config(), "hidden_size", taken))):
        try:
            return _run_head(model, decoder, lm_head, width)
        except Exception as error:
            failed = error
    assert failed is not None, "each width that fails leaves its error"
    raise ModelError(
        f"this program can't run the head of {type(model).__name__} apart from its decoder "
        f"({type(failed).__name__}: {one_line(failed)}); choose another model"
    ) from failed


def _run_head(model: PreTrainedModel, decoder: nn.Module, lm_head: Any, width: int) -> list[HeadOp]:
    """The operators from the output embeddings on, where the decoder returns hidden states with `width` features."""
    hidden_states = torch.empty(1, 2, width, device="meta", dtype=lm_head.weight.dtype)
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    run_lm_head = lm_head.forward

    def project(hidden_states: torch.Tensor) -> torch.Tensor:
        recorded.ops.clear()  # what came before is part of the traced model
        return run_lm_head(hidden_states)

    with (
        torch.no_grad(),
        _forward_replaced(decoder, lambda *args, **kwargs: _DecoderOutput((hidden_states,))),
        _forward_replaced(lm_head, project),
        _RecordedOps() as recorded,
    ):
        model(input_ids=tokens, use_cache=False)
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
