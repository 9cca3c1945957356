"""Registered functions: what the compiler assumes of one of which it is told nothing but its annotation."""

import torch
import torch.nn.functional as F

from longctx.compiler.cost import op_seconds
from longctx.compiler.hardware import HARDWARE
from longctx.compiler.ir import Op, Tensor
from longctx.compiler.memory import saved_besides, saved_tensors
from longctx.compiler.ops import REGISTERED_OPS, legal_partitions, register_op, spec_of, target_of

T, D, N = 4096, 1024, 2048
X = Tensor("x", (1, T, D), torch.bfloat16, True)
WEIGHT = Tensor("weight", (N, D), torch.bfloat16, True, "parameter")
UP = Tensor("up", (N, D), torch.bfloat16, True, "parameter")


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A user's own linear layer: [b, l, k], [n, k] -> [b, l, n]."""
    return x @ weight.t()


def gated_product(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's first half: [b, l, k], [n, k], [n, k] -> [b, l, n]."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def priced_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same as `product`, registered with a rule that says it reaches half the rate of large products."""
    return x @ weight.t()


def called(function, *inputs: Tensor) -> Op:
    output = Tensor("output", (1, T, N), torch.bfloat16, True)
    return Op(target_of(function), inputs, {}, (output,), "", None)


def linear() -> Op:
    output = Tensor("output", (1, T, N), torch.bfloat16, True)
    return Op("aten.linear.default", (X, WEIGHT), {}, (output,), "", None)


def seconds(op: Op) -> tuple[float, float]:
    whole, *_ = legal_partitions(op, 1)
    found = op_seconds(op, whole, 1, HARDWARE["h100"])
    return found.forward, found.backward


def registered(monkeypatch, function, annotation: str, **rules) -> None:
    monkeypatch.setitem(REGISTERED_OPS, target_of(function), None)  # so that the test leaves the table as it was
    register_op(annotation, **rules)(function)


def test_a_registered_matrix_product_is_priced_as_pytorchs_own_is(monkeypatch):
    registered(monkeypatch, product, "b l k+, n k+ -> b l n")
    op = called(product, X, WEIGHT)
    assert spec_of(op).flops(op).forward == 2 * T * D * N
    assert seconds(op) == seconds(linear())
    assert {p.dim for p in legal_partitions(op, 2)} == {None, "l", "k", "n"}


def test_a_registered_function_is_said_to_save_what_autograd_saves_of_it(monkeypatch):
    registered(monkeypatch, gated_product, "b l k^, n k^, n k^ -> b l n")
    op = called(gated_product, X, WEIGHT, UP)
    assert saved_tensors(op) == [X, WEIGHT, UP]
    # The product before silu, silu's result, and the other product: none is an input or the output.
    (share,) = saved_besides(op).values()
    assert share == 3
    assert spec_of(op).flops(op).forward == 2 * (2 * T * D * N)
    assert spec_of(op).flops(op).backward == 4 * (2 * T * D * N)


def test_the_flops_and_bytes_counted_of_a_registered_function_follow_the_shapes_of_each_call(monkeypatch):
    registered(monkeypatch, product, "b l k+, n k+ -> b l n")
    half = Tensor("x", (1, T // 2, D), torch.bfloat16, True)
    assert spec_of(called(product, half, WEIGHT)).flops(called(product, half, WEIGHT)).forward == T * D * N


def test_a_rule_given_to_register_op_takes_the_place_of_the_default(monkeypatch):
    registered(monkeypatch, priced_product, "b l k+, n k+ -> b l n", efficiency=0.5)
    forward, backward = seconds(called(priced_product, X, WEIGHT))
    as_linear = seconds(linear())
    assert (forward, backward) == (2 * as_linear[0], 2 * as_linear[1])
