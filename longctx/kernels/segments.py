"""Recurrences over the tokens of a row, computed segment by segment so that their memory is bounded.

A layer that carries a state along the sequence needs, for its gradients, the state before every token. All of these
together are many times larger than the layer's input. Hence the forward keeps only the state before each segment of
tokens, and the backward goes through the segments from last to first and computes each one again.
"""

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

# step(state, *pieces, *whole) -> (output [b, n, ...], next state), n being the number of tokens of the pieces
Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def in_segments(
    step: Step, size: int, state: torch.Tensor, cut: Sequence[torch.Tensor], whole: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Calls `step` on one segment after another, and joins their outputs: [b, l, ...].

    Args:
        step: computes one segment, in operators that autograd knows; `state` is what it takes from the one before.
        size: the number of tokens of a segment; the last one may have fewer.
        state: the state before the first token, which has no gradient.
        cut: tensors [b, l, ...], of which `step` takes a segment's part.
        whole: tensors that `step` takes as they are.
    """
    return _InSegments.apply(step, size, len(cut), state, *cut, *whole)


class _InSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: Step, size: int, n_cut: int, state: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        cut, whole = tensors[:n_cut], tensors[n_cut:]
        ctx.step, ctx.size, ctx.n_cut = step, size, n_cut
        if state.is_meta:  # only the shape is wanted, which one segment tells
            output, _ = step(state, *(tensor[:, :size] for tensor in cut), *whole)
            ctx.save_for_backward(*tensors)
            return output.new_empty(*cut[0].shape[:2], *output.shape[2:])
        states, outputs = [], []
        for pieces in zip(*(tensor.split(size, dim=1) for tensor in cut), strict=True):
            states.append(state)
            output, state = step(state, *pieces, *whole)
            outputs.append(output)
        ctx.save_for_backward(*tensors, *states)
        return torch.cat(outputs, dim=1)

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
        segments = list(zip(*(tensor.split(ctx.size, dim=1) for tensor in (gradient, *of_cut, *cut)), strict=True))
        for state, (of_output, *parts) in zip(reversed(states), reversed(segments), strict=True):
            inputs = [tensor.detach().requires_grad_() for tensor in (state, *parts[ctx.n_cut :], *whole)]
            with torch.enable_grad():
                results = ctx.step(*inputs)
            of_state, *of_inputs = torch.autograd.grad(results, inputs, (of_output, of_state))
            for total, found in zip(parts[: ctx.n_cut], of_inputs, strict=False):
                total.copy_(found)
            for total, found in zip(of_whole, of_inputs[ctx.n_cut :], strict=True):
                total.add_(found)
        return None, None, None, None, *of_cut, *of_whole
