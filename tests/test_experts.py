"""Mixtures of experts: each token's experts compute what transformers' own do, and whole models are what they are."""

import re
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Case, check_cases, random_assignment, trace_family
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from longctx.compiler.cost import even_flops, flops_of_busiest
from longctx.compiler.ir import Graph, Op, Tensor, nbytes, storage_of
from longctx.compiler.lifetimes import saved_besides, saved_tensors
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.ops import legal_partitions, spec_of, target_of, told_share
from longctx.compiler.placement import Partition
from longctx.compiler.prediction import count_met_parameters, count_parameters
from longctx.engines.builtin.run import BalanceTeller
from longctx.errors import ModelError
from longctx.huggingface.build import build_model
from longctx.huggingface.experts import arguments_of
from longctx.kernels.experts import experts
from longctx.kernels.kept import keep, kept

# --- one layer's experts ---------------------------------------------------------------------------------------------


def transformers_experts(module_class: type, n_experts: int, d: int, f: int, dtype: torch.dtype) -> torch.nn.Module:
    """A module of transformers' with its own eager forward, and random weights."""
    config = SimpleNamespace(
        num_local_experts=n_experts,
        n_routed_experts=n_experts,
        hidden_size=d,
        intermediate_size=f,
        moe_intermediate_size=f,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.702,
        swiglu_limit=1.0,
        _experts_implementation="eager",
    )
    module = module_class(config).to(dtype)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return module


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([MixtralExperts, GptOssExperts, NemotronHExperts]),
    st.integers(1, 12),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 3), (16, 2)]),
    st.sampled_from([(4, 8), (3, 5)]),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
    st.integers(0, 100),
)
def test_experts_compute_what_transformers_eager_ones_do(module_class, n_tokens, sizes, widths, exact, seed):
    """Whatever the number of tokens, and with experts that no token chose."""
    (n_experts, k), (d, f), (dtype, tolerance) = sizes, widths, exact
    torch.manual_seed(seed)
    module = transformers_experts(module_class, n_experts, d, f, dtype)
    chosen = torch.rand(n_tokens, n_experts).argsort(1)[:, :k]
    x, weights = (torch.rand(n_tokens, n, dtype=dtype, requires_grad=True) for n in (d, k))
    found = experts_of(module, x, chosen, weights)
    expected = module(x, chosen, weights)

    trained = [x, weights, *module.parameters()]
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(output, trained, upstream) for output in (found, expected))
    torch.testing.assert_close([found, *ours], [expected, *theirs], rtol=tolerance, atol=tolerance)


def experts_of(module: torch.nn.Module, *routed: torch.Tensor) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = [first, "down_proj", *([f"{first}_bias", "down_proj_bias"] if module.has_bias else [])]
    return experts(*routed, *(getattr(module, name) for name in names), **arguments_of(module))


def random_call(n: int = 6, n_experts: int = 4, k: int = 2, d: int = 4, f: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    chosen = torch.rand(n, n_experts).argsort(1)[:, :k]
    shapes = ((n, d), (n, k), (n_experts, 2 * f, d), (n_experts, d, f))
    x, *rest = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return [x, chosen, *rest]


def doubled(call: list[torch.Tensor]) -> list[torch.Tensor]:
    """In float64, in which each expert's products are calls of their own."""
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in call]


def test_ranks_with_some_of_the_experts_have_parts_of_the_sum_that_all_give():
    x, chosen, weights, gate_up, down = random_call()
    parts = [experts(x, chosen, weights, gate_up[i : i + 2], down[i : i + 2], starts=(i,)) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), experts(x, chosen, weights, gate_up, down))


def test_autograd_saves_the_inputs_and_the_first_product_as_the_compiler_counts_them():
    call = random_call()
    inputs = tuple(Tensor(f"x{i}", tuple(t.shape), t.dtype, t.requires_grad) for i, t in enumerate(call))
    op = Op(target_of(experts), inputs, {}, (Tensor("y", (6, 4), torch.float32, True),), "", None)
    saved = {}
    with saved_tensors_hooks(lambda t: saved.setdefault(storage_of(t), t), lambda t: t):
        experts(*call)
    assert {storage_of(t) for t in call if t is not call[1]} <= set(saved)
    assert saved_tensors(op) == [inputs[0], *inputs[2:]]
    ends = 4 * 4  # which are not counted
    besides = sum(t.nbytes for t in saved.values()) - sum(t.nbytes for t in call if t is not call[1]) - ends
    assert besides == sum(share * 6 * 4 * 4 for share in saved_besides(op).values()) == 12 * (16 * 4 + 8)


def test_the_flops_are_those_of_the_experts_that_tokens_chose():
    call = random_call(d=8)
    inputs = tuple(Tensor(f"x{i}", tuple(t.shape), t.dtype, t.requires_grad) for i, t in enumerate(call))
    op = Op(target_of(experts), inputs, {}, (Tensor("y", (6, 8), torch.float32, True),), "", None)
    with FlopCounterMode(display=False) as counter:
        output = experts(*doubled(call))
        forward = counter.get_total_flops()
        output.sum().backward()
    assert vars(spec_of(op).flops(op)) == {"forward": forward, "backward": counter.get_total_flops() - forward}


def test_a_layer_that_keeps_its_experts_output_computes_no_product_of_them_again():
    call = doubled(random_call())

    def layer(x: torch.Tensor) -> torch.Tensor:
        return kept("mlp.experts", experts, x, *call[1:]).tanh()

    counts, gradients = [], []
    for contexts in (None, keep("mlp.experts")):
        options = {"context_fn": contexts} if contexts else {}
        with FlopCounterMode(display=False) as counter:
            output = checkpoint(layer, call[0], use_reentrant=False, **options)
            gradients.append(torch.autograd.grad(output.sum(), [call[0], *call[2:]]))
        counts.append(counter.get_total_flops())
    torch.testing.assert_close(*gradients)
    assert counts[0] / counts[1] == pytest.approx(4 / 3)  # forward, forward again and twice that for the gradients


@pytest.mark.parametrize("starts", [(), (1,)])
def test_gradients_are_of_the_experts_that_were_chosen_when_a_layer_computed_again_would_choose_others(starts):
    x, chosen, *weights = random_call(n_experts=4)
    if starts:
        weights[1:] = [weight[1:3].detach().requires_grad_() for weight in weights[1:]]
    others = torch.cat(((chosen[:1] + 1) % 4, chosen[1:]))
    expected = torch.autograd.grad(experts(x, chosen, *weights, starts=starts).sum(), [x, *weights])

    runs = iter((chosen, others))
    output = checkpoint(
        lambda x: kept("mlp.experts", experts, x, next(runs), *weights, starts=starts),
        x,
        use_reentrant=False,
        context_fn=keep("mlp.experts"),
    )
    assert all(map(torch.equal, torch.autograd.grad(output.sum(), [x, *weights]), expected))


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside, and what they are at most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in given | self.known:
                storage, key = tensor.untyped_storage(), storage_of(tensor)
                self.known.add(key)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, key, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


GPT_OSS = {"interleaved": True, "slope": 1.702, "limit": 7.0, "offset": 1.0}


@pytest.mark.parametrize(("d", "f"), [(512, 8), (8, 512), (64, 64)])
@pytest.mark.parametrize("gate", [{}, GPT_OSS, {"gated": False, "activation": "relu2"}])
def test_the_bytes_that_experts_hold_at_most_are_those_that_the_compiler_counts(d, f, gate):
    """In bfloat16, with a router's weights in float32, less what has a price of its own: outputs and gradients."""
    x, chosen, weights, gate_up, down = random_call(256, 2, 2, d, f)
    gate_up = gate_up if gate.get("gated", True) else gate_up[:, :f]
    call = [t.detach().bfloat16().requires_grad_() for t in (x, weights, gate_up, down)]
    call = [call[0], chosen, call[1].detach().float().requires_grad_(), *call[2:]]
    inputs = tuple(Tensor(f"x{i}", tuple(t.shape), t.dtype, t.requires_grad) for i, t in enumerate(call))
    op = Op(target_of(experts), inputs, gate, (Tensor("y", tuple(x.shape), torch.bfloat16, True),), "", None)
    counted = {
        phase: sum(share * nbytes(t) for t, share in spec_of(op).workspace(op, phase).items())
        for phase in ("forward", "backward")
    }
    with Live() as forward:
        output = experts(*call, **gate)
    saved, upstream = forward.bytes - output.nbytes, torch.ones_like(output)
    with Live() as backward:
        gradients = torch.autograd.grad(output, [t for t in call if t.requires_grad], upstream)
    own = sum(gradient.nbytes for gradient in gradients)
    assert forward.peak - saved - output.nbytes <= counted["forward"]
    assert 0.8 * counted["backward"] <= backward.peak - own <= counted["backward"]


def test_the_busiest_of_ranks_with_experts_of_their_own_has_its_part_and_more_by_the_imbalance():
    """Of products, and of what is saved and held of each row: 1.5 times a quarter, of 8 experts on 4 ranks."""
    call = random_call(n_experts=8)
    inputs = tuple(Tensor(f"x{i}", tuple(t.shape), t.dtype, t.requires_grad) for i, t in enumerate(call))
    output = Tensor("y", (6, 4), torch.float32, True)
    op = Op(target_of(experts), inputs, {"imbalance": 1.5}, (output,), "", None)
    (apart,) = (partition for partition in legal_partitions(op, 4) if partition.dim == "e")
    own = localize(Graph("Model", inputs, output, {}, {}, (op,), (), ""), Assignment(4, {op: apart}))
    (local,) = (item for item in own.body if isinstance(item, Op) and item.target == op.target)

    assert flops_of_busiest(op, apart, 4).forward == 1.5 / 4 * even_flops(op, legal_partitions(op, 1)[0], 1).forward
    assert told_share(op, apart, 4) == 1.5 / 4
    for rule in (spec_of(op).saves_besides, partial(spec_of(op).workspace, phase="backward")):
        whole, part = (rule(each)[each.inputs[0]] for each in (op, local))
        assert part == 1.5 / 4 * whole


def test_a_run_says_once_that_experts_take_more_than_there_is_room_for_and_again_where_it_is_far_more(capsys):
    tell = BalanceTeller(n_ranks=4, limit=1.5)
    for share in (0.2, 0.37, 0.38, 0.4, 0.5):
        tell(share)
    assert re.findall(r"take ([\d.]+) times", capsys.readouterr().out) == ["1.52", "2.00"]


def test_of_experts_the_parameters_count_that_a_token_meets():
    graph = trace_family("qwen3_moe")  # 2 of 4 experts, each of 3 matrices of 64 x 32, in 2 layers
    assert count_parameters(graph) - count_met_parameters(graph) == 2 * 2 * 3 * 64 * 32


# --- models ----------------------------------------------------------------------------------------------------------


# Plans over 4 ranks, and two copies of plans over 2. Mixtral and GPT-OSS have their routers' auxiliary loss.
CASES = [
    *(Case(family, seed, 4, 4) for family in ("mixtral", "gpt_oss") for seed in (0, 3)),
    *(Case(family, 0, 4, 4) for family in ("olmoe", "deepseek_v3")),
    *(Case(family, 5, 2, 4) for family in ("qwen3_moe", "glm4_moe")),
]


def test_plans_of_mixtures_are_right_whether_ranks_share_out_tokens_or_experts():
    split = {p.dim for case in CASES for op, p in drawn(case).items() if op.target == target_of(experts)}
    assert {"n", "e"} <= split
    for case, (loss_error, gradient_error, worst) in check_cases(CASES).items():
        assert loss_error < 1e-6, case
        assert gradient_error < 1e-4, (case, worst)


def drawn(case: Case) -> dict[Op, Partition]:
    """The partitions of a case's plan."""
    return random_assignment(trace_family(case.family), case.plan_ngpus, case.seed, [2]).partitions


def test_experts_that_the_program_does_not_compute_are_refused_in_a_sentence():
    module = transformers_experts(MixtralExperts, 2, 4, 8, torch.float32)
    module._apply_gate = lambda product: product.chunk(2, -1)[0].sin()
    with pytest.raises(ModelError, match="^MixtralExperts has a gate or a norm of its own.*; choose another model"):
        arguments_of(module)
    with pytest.raises(ModelError, match="^the experts of JetMoeForCausalLM are computed by code of.*; choose another"):
        build_model(tiny_config("jetmoe"), torch.float32)


@pytest.mark.parametrize("limit", [0.5, 24, 100.0])
def test_a_limit_of_the_gate_is_found_however_large_it_is(limit):
    module = transformers_experts(GptOssExperts, 2, 4, 8, torch.float32)
    module.limit = limit
    assert arguments_of(module)["limit"] == limit


def test_weights_that_transformers_keeps_in_float32_are_so_if_nothing_trains_them_and_else_are_refused_in_bf16():
    model = build_model(tiny_config("deepseek_v3"), torch.bfloat16).model
    corrections = [p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")]
    assert corrections
    assert {(p.dtype, p.requires_grad) for p in corrections} == {(torch.float32, False)}
    build_model(tiny_config("ernie4_5_moe"), torch.float32)
    with pytest.raises(ModelError, match=r"^transformers keeps 'model.layers.*gate.weight' of Ernie4_5_MoeForCausalLM"):
        build_model(tiny_config("ernie4_5_moe"), torch.bfloat16)
