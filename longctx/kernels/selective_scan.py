"""Recurrences of single numbers, as generated code calls them: the selective scan of Mamba, and linear recurrences.

Each channel carries numbers from token to token, h = a * h + x, computed in float32 whatever the dtype of the inputs.
Where the package mamba-ssm is installed, its kernel takes over the selective scan on a GPU; the tests have not run
that.
"""

from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from longctx.compiler.ir import Op, Tensor
from longctx.compiler.ops.registered import register_op, target_of
from longctx.compiler.ops.spec import (
    FLOAT32_BYTES,
    Shares,
    always,
    always_strided,
    draws_nothing,
    never_strided,
    no_flops,
    saves_inputs,
)
from longctx.kernels.segments import in_segments

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn: Any = None

SEGMENT = 256  # tokens of which every state of the selective scan is held at a time
RECURRENCE_SEGMENT = 4096  # ... of a linear recurrence, which has one number where that has a dozen
LARGEST_SLOPE = 1000.0  # of bounded_sqrt


def selective_scan(
    x: torch.Tensor, step: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> torch.Tensor:
    """The selective scan (arXiv:2312.00752, section 3.2), from a state of zeros.

    For each token and each channel, h = exp(step A) h + step x B, and the output is the sum of C h.

    Args:
        x: [b, channels, l], as is the output.
        step: [b, channels, l], the length of time that each token stands for.
        A: [channels, n], below 0.
        B: [b, n, l], and `C` likewise; all channels share them.
    """
    if selective_scan_fn is not None and x.is_cuda:
        return selective_scan_fn(x, step, A, B, C)
    b, channels, _ = x.shape
    state = x.new_zeros(b, channels, A.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    cut = [tensor.transpose(1, 2) for tensor in (x, step, B, C)]
    return in_segments(_selective_segment, SEGMENT, state, cut, [A.to(state.dtype)]).transpose(1, 2)


def _selective_segment(
    state: torch.Tensor, x: torch.Tensor, step: torch.Tensor, B: torch.Tensor, C: torch.Tensor, A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of a segment, [b, tokens, channels], and the state behind it, [b, channels, n]."""
    step = step.to(state.dtype)
    decay = (step.unsqueeze(-1) * A).exp()
    written = (step * x).unsqueeze(-1) * B.unsqueeze(-2).to(state.dtype)
    states = _Recurrence.apply(decay, written, state)
    output = (states @ C.unsqueeze(-1).to(state.dtype)).squeeze(-1)
    return output.to(x.dtype), states[:, -1].clone()


def linear_recurrence(decay: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """h = decay * h + x from token to token, from zeros: twice [b, l, channels] -> every h, [b, l, channels]."""
    state = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))
    return in_segments(_recurrence_segment, RECURRENCE_SEGMENT, state, (x, decay))


def _recurrence_segment(state: torch.Tensor, x: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states = _Recurrence.apply(decay.to(state.dtype), x.to(state.dtype), state)
    return states.to(x.dtype), states[:, -1].clone()


def bounded_sqrt(x: torch.Tensor) -> torch.Tensor:
    """The square root, with a slope of at most 1,000, as RecurrentGemma gates its recurrence; [b, l, channels]."""
    return _BoundedSqrt.apply(x)


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (4 * x).clamp(min=LARGEST_SLOPE**-2).sqrt()


class _Recurrence(torch.autograd.Function):
    """h = decay * h + x along the second dimension: twice [b, l, ...] and [b, ...] -> [b, l, ...].

    The gradient of x is the same recurrence from the last token to the first.
    """

    @staticmethod
    def forward(ctx, decay: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        states = _recur(decay, x, state)
        ctx.save_for_backward(decay, state, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        decay, state, states = ctx.saved_tensors
        following = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), dim=1)
        of_x = _recur(following.flip(1), gradient.flip(1), torch.zeros_like(state)).flip(1)
        before = torch.cat((state.unsqueeze(1), states[:, :-1]), dim=1)
        return of_x * before, of_x, decay[:, 0] * of_x[:, 0]


def _recur(decay: torch.Tensor, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """h = decay * h + x in some 2 * sqrt(l) steps: first in all chunks at once as if each began at 0.

    Then, from chunk to chunk, what the state before a chunk adds to each of its tokens.
    """
    length = x.shape[1]
    size = isqrt(length - 1) + 1
    missing = -length % size
    decay, h = (_pad(tensor, missing).unflatten(1, (-1, size)) for tensor in (decay, x))
    h = h.clone(memory_format=torch.contiguous_format)
    for token in range(1, size):
        h[:, :, token].addcmul_(decay[:, :, token], h[:, :, token - 1])
    decay = decay.cumprod(2)
    for chunk in range(h.shape[1]):
        h[:, chunk].addcmul_(decay[:, chunk], state.unsqueeze(1))
        state = h[:, chunk, -1]
    return h.flatten(1, 2)[:, :length]


def _pad(x: torch.Tensor, missing: int) -> torch.Tensor:
    """With so many zeros behind the last token; [b, l, ...]."""
    return F.pad(x, (*[0] * (2 * x.ndim - 4), 0, missing)) if missing else x


# --- what the compiler knows of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segments:
    """Of a scan: its input by which shares are told, the row's length, a segment's, and the numbers of a state."""

    x: Tensor
    length: int
    size: int
    n: int

    def share(self, states: float) -> Shares:
        """So many states of each channel, in float32, as a share of the input."""
        return {self.x: states * self.n * FLOAT32_BYTES / (self.length * self.x.dtype.itemsize)}


def _segments(op: Op) -> _Segments:
    if op.target == target_of(selective_scan):
        return _Segments(op.inputs[0], op.inputs[0].shape[2], SEGMENT, op.inputs[2].shape[1])
    return _Segments(op.inputs[0], op.inputs[0].shape[1], RECURRENCE_SEGMENT, 1)


def saves_besides(op: Op) -> Shares:
    """The state before each segment."""
    cut = _segments(op)
    return cut.share(ceil(cut.length / cut.size))


def workspace(op: Op, phase: str) -> Shares:
    """The states of a segment and what they are made of; as counted by MemTracker on a CPU."""
    cut = _segments(op)
    return cut.share(_TENSORS[phase] * min(cut.length, cut.size))


def passes(op: Op, phase: str) -> Shares:
    """Each of these is written once and read once."""
    cut = _segments(op)
    return cut.share(2 * _TENSORS[phase] * cut.length)


_TENSORS = {"forward": 4, "backward": 9}
_RULES = {"flops": no_flops, "saves": saves_inputs, "draws_random": draws_nothing}
_SCAN_RULES = {**_RULES, "passes": passes, "saves_besides": saves_besides, "workspace": workspace}
_SCAN_RULES |= {"can_be_kept": always, "crosses_documents": True}
_SELECTIVE_RULES = {**_SCAN_RULES, "strides": always_strided, "not_kept_by": "mamba-ssm"}
register_op("b d l^, b d l^, d n^, b n^ l^, b n^ l^ -> b d l^", **_SELECTIVE_RULES)(selective_scan)
register_op("b l^ d, b l^ d -> b l^ d", strides=never_strided, **_SCAN_RULES)(linear_recurrence)
register_op("b l d -> b l d", **_RULES)(bounded_sqrt)
