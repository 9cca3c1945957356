"""Cross entropy of a linear layer's logits that never holds more than one chunk of them."""

import torch
from torch.autograd.function import once_differentiable


class _ChunkLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, padding_idx, chunk_size, logit_softcap):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.padding_idx, ctx.chunk_size, ctx.logit_softcap = padding_idx, chunk_size, logit_softcap
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        for rows in range(0, labels.shape[0], chunk_size):
            chunk = slice(rows, rows + chunk_size)
            logits = _logits(hidden[chunk], weight, logit_softcap)
            losses[chunk] = torch.nn.functional.cross_entropy(
                logits, labels[chunk], ignore_index=padding_idx, reduction="none"
            )
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        counts = labels != ctx.padding_idx
        for rows in range(0, labels.shape[0], ctx.chunk_size):
            chunk = slice(rows, rows + ctx.chunk_size)
            logits = _logits(hidden[chunk], weight, ctx.logit_softcap)
            grad = logits.softmax(-1)
            index = torch.where(counts[chunk], labels[chunk], 0)
            grad.scatter_add_(1, index[:, None], -torch.ones_like(grad[:, :1]))
            if ctx.logit_softcap > 0:
                grad.mul_(1 - (logits / ctx.logit_softcap) ** 2)
            grad.mul_(torch.where(counts[chunk], grad_losses[chunk], 0.0)[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[chunk] = grad @ weight
            grad_weight += (grad.t() @ hidden[chunk]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, softcap: float) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def chunk_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    padding_idx: int = -100,
    chunk_size: int = 1024,
    logit_softcap: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of the logits hidden_states @ weight.T, per token.

    Args:
        hidden_states: [b, l, d].
        weight: [n, d], of the same dtype.
        labels: [b, l], int64, each in [0, n) or padding_idx.
        padding_idx: the label of tokens that don't count.
        chunk_size: how many tokens' logits are held at once.
        logit_softcap: c > 0 caps the logits first, to c * tanh(logits / c), as Gemma 2 does.

    Returns:
        [b, l] float32 losses, 0 where the label is padding_idx.
    """
    b, l, d = hidden_states.shape
    if hidden_states.device.type == "meta":
        return torch.empty(b, l, dtype=torch.float32, device="meta")
    losses = _ChunkLinearCrossEntropy.apply(
        hidden_states.reshape(b * l, d), weight, labels.reshape(b * l), padding_idx, chunk_size, logit_softcap
    )
    return losses.view(b, l)
