"""Training as anybody would write it: one process, the Hugging Face model, and PyTorch's own optimizer and clipping."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from families import reference_loss
from transformers import PreTrainedModel

from longctx.data import order


def train_plainly(
    model: PreTrainedModel,
    rows: torch.Tensor,
    rows_per_step: Iterable[int],
    rates: Iterable[float],
    documents: Sequence[tuple[int, ...]] = (),
) -> Iterator[tuple[float, float]]:
    """(loss per token, gradient norm before clipping) of each step, by the optimizer that the tests train with.

    Args:
        rows: int64 [n, l], taken in the order of seed 0.
        rows_per_step, rates: how many rows each step takes, and its learning rate.
        documents: where those of each row begin, if they are to be run one by one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, (0.9, 0.95), weight_decay=0.1)
    position = order.Position()
    for per_step, rate in zip(rows_per_step, rates, strict=True):
        chosen = order.step_rows(order.epoch_order(len(rows), 0, position.epoch), position, per_step)
        tokens = rows[chosen]
        labels = torch.cat((tokens[:, 1:], torch.full((len(chosen), 1), -100)), dim=1)
        of_rows = [documents[row] for row in chosen] if documents else []
        for own, starts in zip(labels, of_rows, strict=False):
            own[[start - 1 for start in starts[1:]]] = -100
        loss = reference_loss(model, tokens, labels, of_rows) / (labels != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        yield loss.item(), norm.item()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        position = order.advance(position, chosen, len(rows))
