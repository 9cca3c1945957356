"""Recurrences over the tokens of a row, computed segment by segment so that their memory is bounded.

A layer that carries a state along the sequence needs, for its gradients, the state before every token. All of these
together are many times larger than the layer's input. Hence the forward keeps only the state before each segment of
tokens, and the backward goes through the segments from last to first and computes each one again.
"""

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from longctx.kernels.kept import computed_once

# step(state, *pieces, *whole) -> (output, next state); the output has the shape of the first piece, [b, n, ...]
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def in_segments(
    step: Step, size: int, state: torch.Tensor, cut: Sequence[torch.Tensor], whole: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Calls `step` on one segment after another, and joins their outputs, to the shape and dtype of the first tensor.

    Tensors on meta are not computed: the loop takes as long there as with numbers, and the shape is known.

    Args:
        step: computes one segment, in operators that autograd knows; `state` is what it takes from the one before.
        size: the number of tokens of a segment; the last one may have fewer.
        state: the state before the first token, which has no gradient.
        cut: tensors [b, l, ...], of which `step` takes a segment's part.
        whole: tensors that `step` takes as they are.
    """
    return _InSegments.apply(step, size, len(cut), state, *cut, *whole)


def _run(
    step: Step, size: int, state: torch.Tensor, cut: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of all segments, and the state before each."""
    output = torch.empty_like(cut[0], memory_format=torch.contiguous_format)
    states = []
    for begin in range(0, 0 if output.is_meta else output.shape[1], size):
        tokens = slice(begin, begin + size)
        states.append(state)
        output[:, tokens], state = step(state, *(tensor[:, tokens] for tensor in cut), *whole)
    return output, states


class _InSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: Step, size: int, n_cut: int, state: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        cut, whole = tensors[:n_cut], tensors[n_cut:]
        ctx.step, ctx.size, ctx.n_cut = step, size, n_cut
        output, states = computed_once(lambda: _run(step, size, state, cut, whole))
        ctx.save_for_backward(*tensors, *states)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        n_whole = len(ctx.needs_input_grad) - 4 - ctx.n_cut
        saved = ctx.saved_tensors
        tensors, states = saved[: ctx.n_cut + n_whole], saved[ctx.n_cut + n_whole :]
        cut, whole = tensors[: ctx.n_cut], tensors[ctx.n_cut :]
        of_cut = [torch.empty_like(tensor) for tensor in cut]
        of_whole = [torch.zeros_like(tensor) for tensor in whole]
        of_state = torch.zeros_like(states[0]) if states else None  # of the state behind the segment
        for place, state in reversed(list(enumerate(states))):
            tokens = slice(place * ctx.size, (place + 1) * ctx.size)
            pieces = (tensor[:, tokens] for tensor in cut)
            inputs = [tensor.detach().requires_grad_() for tensor in (state, *pieces, *whole)]
            with torch.enable_grad():
                results = ctx.step(*inputs)
            of_state, *found = torch.autograd.grad(results, inputs, (gradient[:, tokens], of_state))
            for total, part in zip(of_cut, found, strict=False):
                total[:, tokens] = part
            for total, part in zip(of_whole, found[ctx.n_cut :], strict=True):
                total += part
        return None, None, None, None, *of_cut, *of_whole
