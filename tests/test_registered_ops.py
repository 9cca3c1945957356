"""Registered functions: what the compiler assumes of one of which it is told nothing but its annotation."""

import pytest
import torch
import torch.nn.functional as F

from longctx.compiler.alternatives import other_plans
from longctx.compiler.cost import op_seconds
from longctx.compiler.hardware import HARDWARE
from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op, Tensor
from longctx.compiler.layout import Layout
from longctx.compiler.lifetimes import saved_besides, saved_tensors
from longctx.compiler.ops import REGISTERED_OPS, legal_partitions, register_op, spec_of, target_of
from longctx.compiler.ops.spec import no_flops, saves_nothing
from longctx.compiler.plan import Setting
from longctx.compiler.planner import make_plan
from longctx.errors import AnnotationError

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
    found = op_seconds(op, whole, Layout(frozenset(), {}), 1, HARDWARE["h100"])
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


def in_place(x: torch.Tensor) -> torch.Tensor:
    """Writes to a copy of its input that it was handed: [b, l, n] -> [b, l, n]."""
    return x.mul_(2)


def one_operand(x: torch.Tensor) -> torch.Tensor:
    """A product of a tensor with itself: [b, l, d] -> [b, l, l]."""
    return x @ x.transpose(1, 2)


class ForwardKernel(torch.autograd.Function):
    """A forward that no FLOP counter sees, as a fused kernel's, and a backward of PyTorch's products."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, 1).t() @ x.flatten(0, 1)


class NoMetaBackward(torch.autograd.Function):
    """A backward that only runs on a real device."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no kernel for meta tensors")


def forward_kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ForwardKernel.apply(x, weight)


def no_meta_backward(x: torch.Tensor) -> torch.Tensor:
    return NoMetaBackward.apply(x)


def test_a_function_that_writes_to_its_input_in_place_is_counted_too(monkeypatch):
    registered(monkeypatch, in_place, "b l n -> b l n")
    assert spec_of(called(in_place, X)).flops(called(in_place, X)).forward == 0


def test_a_kernel_whose_forward_counts_no_flops_has_a_backward_in_seconds_that_can_be(monkeypatch):
    registered(monkeypatch, forward_kernel, "b l k^, n k^ -> b l n")
    forward, backward = seconds(called(forward_kernel, X, WEIGHT))
    assert forward < backward < 1


def test_a_function_that_can_not_be_counted_is_refused_with_the_rules_to_give(monkeypatch):
    registered(monkeypatch, no_meta_backward, "b l n -> b l n")
    with pytest.raises(AnnotationError, match="no kernel for meta tensors.*; give register_op its flops, saves and"):
        spec_of(called(no_meta_backward, X)).flops(called(no_meta_backward, X))
    registered(monkeypatch, no_meta_backward, "b l n -> b l n", flops=no_flops, saves=saves_nothing)
    assert seconds(called(no_meta_backward, X)) > (0, 0)


def test_what_the_function_and_the_annotation_tell_is_no_rule():
    for rule in ("name", "partition"):
        with pytest.raises(AnnotationError, match=f"{rule} is told by the function and its annotation"):
            register_op("b l n -> b l n", **{rule: "mine"})


def test_the_report_of_a_model_with_a_product_of_one_operand_names_the_alternatives(monkeypatch):
    registered(monkeypatch, one_operand, "b l^ d^ -> b l^ l^")
    hidden = Tensor("hidden", (2, 64, 64), torch.bfloat16, True)
    scores = Tensor("scores", (2, 64, 64), torch.bfloat16, True)
    op = Op(target_of(one_operand), (hidden,), {}, (scores,), "", None)
    kind = LayerKind("Layer", "Layer", (hidden,), (scores,), {}, {}, (op,))
    tokens = Tensor("tokens", (2, 64, 64), torch.bfloat16, True, "input")
    after = Tensor("after", (2, 64, 64), torch.bfloat16, True)
    graph = Graph("Model", (tokens,), after, {}, {}, (LayerCall(0, 0, (tokens,), (after,)),), (kind,), "layers")
    setting = Setting(2, 2, HARDWARE["h100"], 1e12)
    names = [other.name for other in other_plans(graph, make_plan(graph, setting), setting)]
    assert "the widest product split otherwise" in names
