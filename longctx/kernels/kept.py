"""Outputs that a layer keeps while it computes all else again in its backward pass, as generated code asks for them.

`checkpoint(layer, x, context_fn=keep("attention"))` runs a layer and runs it again in the backward pass; what the layer
calls by `kept("attention", function, ...)` is computed the first time only. PyTorch's own selective checkpoint tells
operators apart by their kind, so that it can keep every product of a layer or none; here a call has a name. And only
calls with a name that is kept run under a dispatch mode, which takes the host some time for every operator.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from longctx.kernels.fused import fused_operators


@dataclass
class _Tape:
    """What one run of a layer keeps: recorded in the forward pass, and played back, in the same order, in the other."""

    names: tuple[str, ...]
    outputs: deque
    is_played: bool
    is_on: bool = False  # while a call runs whose output is kept

    def outputs_of(self, run: Callable[[], Any]) -> Any:
        if self.is_played:
            return self.outputs.popleft()  # so that it is freed as soon as it would be without
        outputs = run()
        self.outputs.append(tree_map_only(torch.Tensor, torch.Tensor.detach, outputs))
        return outputs


# Of the layer that runs. A module variable of all threads, since autograd runs a backward pass in threads of its own.
_tape: _Tape | None = None


def keep(*names: str) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """For torch.utils.checkpoint's context_fn: the outputs of these calls are kept, and all else is computed again."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        outputs: deque = deque()
        return _running(_Tape(names, outputs, is_played=False)), _running(_Tape(names, outputs, is_played=True))

    return contexts


@contextmanager
def _running(tape: _Tape) -> Iterator[None]:
    global _tape
    before, _tape = _tape, tape
    try:
        yield
    finally:
        _tape = before


def kept(name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), which is not computed again by a layer that runs under `keep(name)`.

    Autograd goes through the call a second time all the same, and saves for the backward pass what it saves of any
    other. Kept are the outputs of the operators that do the work: products, fused kernels of attention, and what a
    function calls by `computed_once`.
    """
    tape = _tape
    if tape is None or name not in tape.names:
        return function(*args, **kwargs)
    tape.is_on = True
    try:
        with _KeepingOutputs():
            return function(*args, **kwargs)
    finally:
        tape.is_on = False


def computed_once(run: Callable[[], Any]) -> Any:
    """run(), whose tensors, none of which needs a gradient, are kept if the call that this is a part of is."""
    tape = _tape
    if tape is None or not tape.is_on:
        return run()
    tape.is_on = False  # the operators of which it is made are not kept besides
    try:
        return tape.outputs_of(run)
    finally:
        tape.is_on = True


class _KeepingOutputs(TorchDispatchMode):
    """Sees operators below autograd, where they get and return tensors without gradients."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        run = partial(func, *args, **(kwargs or {}))
        return computed_once(run) if func in _operators() else run()


@cache
def _operators() -> frozenset[Callable]:
    """The operators that do the work of the calls that can be kept."""
    aten = torch.ops.aten
    return frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, *fused_operators()})
