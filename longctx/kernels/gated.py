"""Gated activations, as generated code calls them: activation(gate) * up, as in SwiGLU and GeGLU (arXiv:2002.05202).

Written as two operators, autograd saves the activation's result for the gradient of `up`, besides `gate` and `up`: a
third tensor as wide as the MLP. Here it is computed again, which takes two passes over memory. `replace_gated` puts the
function in the place of the two operators wherever a model has them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from longctx.compiler.ir import FlatGraph, Op, Tensor
from longctx.compiler.ops import aten
from longctx.compiler.ops.partitions import elementwise
from longctx.compiler.ops.registered import register_op, target_of
from longctx.compiler.ops.spec import Shares, draws_nothing, no_flops, saves_inputs


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str, *options: Any, **named: Any) -> torch.Tensor:
    """activation(gate, *options, **named) * up, with a function of torch.nn.functional: twice [*, d] -> [*, d]."""
    return _Gated.apply(gate, up, partial(_activate, getattr(F, activation), options, named))


def _activate(function: Callable, options: tuple, named: dict[str, Any], gate: torch.Tensor) -> torch.Tensor:
    return function(gate, *options, **named)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, activate: Callable) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activate = activate
        return activate(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            activated = ctx.activate(gate)
        edge = get_gradient_edge(activated)  # so that `activated` can be freed before the next tensor is made
        of_up = gradient * activated.detach()
        del activated
        (of_gate,) = torch.autograd.grad(edge, gate, gradient * up)
        return of_gate, of_up, None


# --- what the compiler knows of them ---------------------------------------------------------------------------------


def replace_gated(flat: FlatGraph, options: dict[str, Any]) -> FlatGraph:
    """The graph with `gated` wherever an activation is multiplied by another value, and is read by nothing else."""
    makers = {tensor: op for op in flat.ops for tensor in op.outputs}
    n_readers = Counter(tensor for op in flat.ops for tensor in op.inputs)
    ops = []
    for op in flat.ops:
        for gate, up in (op.args, op.args[::-1]) if _multiplies(op) else ():
            activation = makers.get(gate)
            if activation and n_readers[gate] == 1 and _saves_its_input(activation):
                op = _gated_call(activation, up, op)
                break
        ops.append(op)
    return replace(flat, ops=ops)


def _multiplies(op: Op) -> bool:
    """Whether an op is the product of two values of the same shape, each of which wants a gradient."""
    if aten.base_name(op) != "mul" or len(op.inputs) != 2:
        return False
    return op.inputs[0].shape == op.inputs[1].shape and all(t.requires_grad for t in op.inputs)


def _saves_its_input(op: Op) -> bool:
    """Whether an op is an activation that autograd saves the input of.

    Of one that it saves the output of, as of ReLU, the product and the activation save the same tensor, so that nothing
    is gained by computing it again.
    """
    if not aten.is_aten(op) or not hasattr(F, aten.base_name(op)):
        return False
    spec = aten.spec_of_aten(op)
    return spec.partition is elementwise and len(op.inputs) == 1 and spec.saves(op) == op.inputs


def _gated_call(activation: Op, up: Tensor, product: Op) -> Op:
    """The call that takes the place of a product; the activation's operator is left for nobody to read."""
    gate, *options = activation.args
    args = (gate, up, aten.base_name(activation), *options)
    return replace(product, target=target_of(gated), args=args, kwargs=activation.kwargs)


def traffic(op: Op, phase: str) -> Shares:
    """The activation and the product read three tensors and write two. The backward computes the activation again, and
    makes three products of tensors or gradients, each of which reads two tensors and writes one."""
    return {op.inputs[0]: 5.0 if phase == "forward" else 11.0}


def workspace(op: Op, phase: str) -> Shares:
    """The activation's result; in the backward its gradient, the result being freed by then."""
    return {op.inputs[0]: 1.0}


register_op(
    "* d, * d -> * d",
    flops=no_flops,
    saves=saves_inputs,
    traffic=traffic,
    workspace=workspace,
    draws_random=draws_nothing,
    rewrite=replace_gated,
)(gated)
