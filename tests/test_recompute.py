"""What a layer keeps and what it computes again: the policies, the calls that are kept, and gated activations."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import small_config
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from longctx.compiler import hardware
from longctx.compiler.cost import op_seconds
from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op, Tensor, nbytes, storage_of
from longctx.compiler.layout import layout_of
from longctx.compiler.lifetimes import saved_by_op
from longctx.compiler.ops import legal_partitions, target_of
from longctx.compiler.plan import Setting
from longctx.compiler.planner import make_plan
from longctx.compiler.policies import WORTH, chain_of
from longctx.compiler.prediction import predict
from longctx.compiler.recompute import Recompute, names_of_keepable
from longctx.compiler.report import summary
from longctx.compiler.trace import sample_row, trace
from longctx.huggingface.build import build_model
from longctx.huggingface.configuration import load_config
from longctx.kernels.attention import attention
from longctx.kernels.gated import gated
from longctx.kernels.kept import keep, kept
from longctx.kernels.linear_attention import gated_delta_rule
from longctx.kernels.segments import in_segments

H100 = hardware.load("h100")
PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkv")
MLP = ("mlp.gate_proj", "mlp.up_proj")


# --- policies --------------------------------------------------------------------------------------------------------


def llama(length: int) -> Graph:
    config = load_config("examples/llama3_8b_128k")
    config.num_hidden_layers = 1
    return trace(build_model(config, torch.bfloat16), sample_row(length))


def test_llamas_layers_keep_all_then_products_then_attention_alone_and_then_nothing():
    (kind,) = llama(131072).kinds
    attention_alone = ("self_attn.attention",)
    products = (*PROJECTIONS, *attention_alone, "self_attn.o_proj", *MLP)
    kept = [policy.kept for policy in chain_of(kind, H100)]
    assert kept == [None, products, attention_alone, ()]  # products of one width cost the same for each byte
    assert [str(Recompute(names)) for names in (None, attention_alone, ())] == [
        "nothing",
        "all but self_attn.attention",
        "everything",
    ]


@pytest.mark.parametrize("length", [2048, 131072])
def test_no_set_of_kept_outputs_is_worth_more_than_those_that_the_planner_chooses_among(length):
    (kind,) = llama(length).kinds
    layout = layout_of(kind)
    again = {op: op_seconds(op, legal_partitions(op, 1)[0], layout, 1, H100).forward for op in kind.ops}
    again = {op: seconds for op, seconds in again.items() if op not in layout.not_repeated}
    names = names_of_keepable(kind.ops)

    def point(policy: Recompute) -> tuple[float, float]:
        """Bytes that are kept, and seconds of what is computed again."""
        shares = [item for shares in saved_by_op(kind.ops, policy).values() for item in shares.items()]
        seconds = sum(seconds for op, seconds in again.items() if policy.computes_again(names.get(op)))
        return sum(share * nbytes(tensor) for tensor, share in shares), seconds

    hull = [point(policy) for policy in reversed(chain_of(kind, H100))]
    sizes, tolerance = [size for size, _ in hull], 2 * WORTH * hull[0][1]
    for n in range(len(names) + 1):
        for chosen in itertools.combinations(names.values(), n):
            size, seconds = point(Recompute(chosen))
            if size < sizes[-1]:
                place = max(i for i in range(len(hull) - 1) if sizes[i] <= size)
                (left, most), (right, least) = hull[place : place + 2]
                assert seconds >= most + (size - left) / (right - left) * (least - most) - tolerance


def test_a_report_names_the_package_that_computes_a_kept_recurrence_again():
    shape = {"tokens": (1, 64, 2, 8), "decay": (1, 64, 2), "after": (1, 64, 2, 8)}
    tokens, decay, after = (Tensor(name, size, torch.bfloat16, True) for name, size in shape.items())
    op = Op(target_of(gated_delta_rule), (tokens, tokens, tokens, decay, decay), {"scale": 1.0}, (after,), "net", None)
    kind = LayerKind("Layer", "Layer", (tokens, decay), (after,), {}, {}, (op,))
    weight = Tensor("weight", (8,), torch.bfloat16, True, "parameter")  # whose precision a report is of
    calls = (LayerCall(0, 0, (tokens, decay), (after,)),)
    graph = Graph("Model", (tokens, decay), after, {"weight": weight}, {}, calls, (kind,), "layers")
    setting = Setting(1, 1, H100, 1e12)
    plan = make_plan(graph, setting)
    said = "where flash-linear-attention is installed, the recurrence that it computes is computed again"
    for policy, is_said in ((Recompute(("net",)), True), (Recompute.EVERYTHING, False), (Recompute.NOTHING, False)):
        chosen = replace(plan, recompute=(policy,))
        assert (said in summary(graph, chosen, setting, predict(graph, chosen, setting))) == is_said


# --- kept calls ------------------------------------------------------------------------------------------------------


def gradients_and_flops(layer, x: torch.Tensor, *parameters: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    with FlopCounterMode(display=False) as counter:
        gradients = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    return [*gradients], counter.get_total_flops()


def test_a_kept_product_is_not_computed_again_and_every_gradient_is_the_same_to_the_bit():
    x, a, b, c = (torch.randn(8, 8, requires_grad=True) for _ in range(4))

    def layer(x: torch.Tensor) -> torch.Tensor:
        x = x + F.silu(kept("a", F.linear, x, a))
        return F.linear(x * torch.sigmoid(kept("b", F.linear, x, b)), c)

    plain, flops = gradients_and_flops(layer, x, a, b, c)
    product = 2 * 8**3
    for names, n_again in ((("a", "b"), 0), (("b",), 1), (("c",), 2)):  # the last product is never computed again
        context = keep(*names)
        found, with_again = gradients_and_flops(
            lambda x, c=context: checkpoint(layer, x, use_reentrant=False, context_fn=c), x, a, b, c
        )
        assert with_again - flops == n_again * product
        assert all(map(torch.equal, found, plain))


def test_a_kept_call_of_attention_is_not_computed_again():
    query, key, value = (torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))

    def layer(query: torch.Tensor) -> torch.Tensor:
        return kept("attention", attention, query.sin(), key, value, scale=0.3).cos()

    def again(query: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, query, use_reentrant=False, context_fn=keep("attention"))

    (plain, flops), (found, with_again) = (gradients_and_flops(f, query, key, value) for f in (layer, again))
    assert with_again == flops
    assert all(map(torch.equal, found, plain))


def test_a_kept_recurrence_is_not_computed_again():
    x, state, runs = torch.randn(1, 12, 4, requires_grad=True), torch.zeros(1, 4), []

    def step(state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        runs.append(len(x))
        return x.cumsum(1) @ torch.eye(4) + state.unsqueeze(1), state + x.sum(1)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return kept("recurrence", in_segments, step, 5, state, [x.sin()]).cos()

    def again(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=False, context_fn=keep("recurrence"))

    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    n_runs = len(runs)
    (found,) = torch.autograd.grad(again(x).sum(), x)
    assert len(runs) == 2 * n_runs == 2 * 6  # each segment forward, and backward
    assert torch.equal(found, plain)


# --- gated activations -----------------------------------------------------------------------------------------------

ACTIVATIONS = [("silu", (), {}), ("gelu", (), {"approximate": "tanh"}), ("leaky_relu", (0.1,), {}), ("relu", (), {})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options", "named"), ACTIVATIONS)
def test_a_gated_activation_has_pytorchs_values_and_gradients_to_the_bit_and_saves_its_inputs_alone(
    name, options, named, dtype
):
    gate, up, gradient = (torch.randn(2, 5, 16, dtype=dtype, requires_grad=i < 2) for i in range(3))
    written = getattr(F, name)(gate, *options, **named) * up
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = gated(gate, up, name, *options, **named)
    assert torch.equal(found, written)
    for mine, pytorchs in zip(*(torch.autograd.grad(y, (gate, up), gradient) for y in (found, written)), strict=True):
        assert torch.equal(mine, pytorchs)
    assert [*map(storage_of, saved)] == [storage_of(gate), storage_of(up)]


def gates_of(family: str) -> list[Op]:
    graph = trace(build_model(small_config(family), torch.float32), sample_row(32))
    return [op for op in graph.kinds[0].ops if op.target == target_of(gated)]


def test_gated_activations_are_found_whatever_the_activation_and_no_other_products():
    assert [op.args[2:] for op in gates_of("llama")] == [("silu",)]
    (gelu,) = gates_of("gemma2")
    assert (gelu.args[2:], gelu.kwargs) == (("gelu",), {"approximate": "tanh"})
    assert gates_of("opt") == []  # an MLP without a gate
