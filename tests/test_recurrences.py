"""Recurrences compute their definitions, token by token, and take the place of none of transformers' but equals."""

import inspect

import pytest
import torch
from families import config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Case, check_cases
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.models.mamba import modeling_mamba
from transformers.models.qwen3_5 import modeling_qwen3_5

from longctx.errors import ModelError
from longctx.huggingface import recurrences
from longctx.huggingface.build import build_model
from longctx.kernels import linear_attention, selective_scan
from longctx.kernels.linear_attention import CHUNK, decaying_linear_attention, gated_delta_rule

FLOAT = torch.float64
LENGTHS = st.one_of(st.sampled_from([1, 2, CHUNK, CHUNK + 1, 2 * CHUNK]), st.integers(1, 200))


def random(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.randn(shape, dtype=FLOAT).to(dtype).requires_grad_()


def between(low: float, high: float, *shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return (low + (high - low) * torch.rand(shape, dtype=FLOAT)).to(dtype).requires_grad_()


# --- the definitions -------------------------------------------------------------------------------------------------


def delta_rule_by_token(query, key, value, decay, beta, scale, normalized=False):
    """The state of each head is changed by one token after another."""
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], 2) for x in (query, key))
    if normalized:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    state, outputs = 0.0, []
    for q, k, v, a, rate in zip(*(x.unbind(1) for x in (query, key, value, decay, beta)), strict=True):
        state = a.exp()[..., None, None] * state
        found = (k.unsqueeze(-1) * state).sum(-2)
        state = state + k.unsqueeze(-1) * (rate.unsqueeze(-1) * (v - found)).unsqueeze(-2)
        outputs.append(scale * (q.unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, 1)


def linear_attention_by_token(query, key, value, decay):
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], 2) for x in (query, key))
    state, outputs = 0.0, []
    for q, k, v, a in zip(*(x.unbind(1) for x in (query, key, value, decay)), strict=True):
        state = a.exp()[..., None, None] * state + k.unsqueeze(-1) * v.unsqueeze(-2)
        outputs.append((q.unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, 1)


def selective_scan_by_token(x, step, A, B, C):
    state, outputs = 0.0, []
    for x_t, step_t, b, c in zip(*(tensor.unbind(2) for tensor in (x, step, B, C)), strict=True):
        state = (step_t.unsqueeze(-1) * A).exp() * state + (step_t * x_t).unsqueeze(-1) * b.unsqueeze(1)
        outputs.append((state * c.unsqueeze(1)).sum(-1))
    return torch.stack(outputs, 2)


def recurrence_by_token(decay, x):
    states = [torch.zeros_like(x[:, 0])]
    for a, x_t in zip(decay.unbind(1), x.unbind(1), strict=True):
        states.append(a * states[-1] + x_t)
    return torch.stack(states[1:], 1)


def check(function, definition, inputs, *options, tolerance=1e-9):
    """Outputs and gradients are those of the definition in float64."""
    found, expected = function(*inputs, *options), definition(*(x.double() for x in inputs), *options)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, upstream)
    references = torch.autograd.grad(expected, inputs, upstream.double())
    assert found.dtype == inputs[0].dtype
    floor = 1e-2 * expected.norm()  # a vector of one number has no direction, and its gradient is nothing but rounding
    for ours, theirs in zip((found, *gradients), (expected, *references), strict=True):
        assert (ours - theirs).norm() < tolerance * max(theirs.norm(), floor)


# --- the kernels -----------------------------------------------------------------------------------------------------

SMALL_SEGMENTS = st.sampled_from([CHUNK, 2 * CHUNK])
EXACT = st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])


def heads_of(draw_heads, b, length, d, e, dtype):
    key_heads, groups = draw_heads
    query, key = (random(b, length, key_heads, d, dtype=dtype) for _ in range(2))
    value = random(b, length, key_heads * groups, e, dtype=dtype)
    decay = between(-3.0, 0.0, b, length, key_heads * groups, dtype=dtype)
    return query, key, value, decay


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]), st.integers(1, 2), SMALL_SEGMENTS, st.data())
def test_linear_attention_and_the_delta_rule_compute_their_definitions(length, heads, b, segment, data):
    dtype, tolerance = data.draw(EXACT)
    torch.manual_seed(length)
    d, e = data.draw(st.sampled_from([(4, 4), (3, 5), (1, 2)]))
    query, key, value, decay = heads_of(heads, b, length, d, e, dtype)
    beta = between(0.0, 1.0, *decay.shape, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "SEGMENT", segment)
        check(decaying_linear_attention, linear_attention_by_token, (query, key, value, decay), tolerance=tolerance)
        inputs = (query, key, value, decay, beta)
        check(gated_delta_rule, delta_rule_by_token, inputs, d**-0.5, True, tolerance=tolerance)


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 7, 64, 256]), EXACT)
def test_the_selective_scan_and_linear_recurrences_compute_their_definitions(length, b, channels, n, segment, exact):
    dtype, tolerance = exact
    torch.manual_seed(length)
    x, step = random(b, channels, length, dtype=dtype), between(0.0, 1.0, b, channels, length, dtype=dtype)
    B, C = (random(b, n, length, dtype=dtype) for _ in range(2))
    A = between(-3.0, 0.0, channels, n, dtype=dtype)
    decay = between(0.0, 1.0, b, length, channels, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "SEGMENT", segment)
        patch.setattr(selective_scan, "RECURRENCE_SEGMENT", segment)
        check(selective_scan.selective_scan, selective_scan_by_token, (x, step, A, B, C), tolerance=tolerance)
        tokens_second = random(b, length, channels, dtype=dtype)
        check(selective_scan.linear_recurrence, recurrence_by_token, (decay, tokens_second), tolerance=tolerance)


def test_the_slope_of_the_bounded_square_root_is_at_most_a_thousand():
    x = torch.tensor([0.0, 1e-10, 0.25], dtype=FLOAT, requires_grad=True)
    (slope,) = torch.autograd.grad(selective_scan.bounded_sqrt(x).sum(), x)
    assert slope.tolist() == pytest.approx([1000.0, 1000.0, 1.0])


def peak_besides_inputs(length: int) -> int:
    """The peak of a forward and backward of the delta rule on 2 heads of 16, less its inputs and all gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in heads_of((2, 1), 1, length, 16, 16, torch.float32)]
    inputs.append(torch.rand(1, length, 2).requires_grad_())
    tracker = MemTracker()
    tracker.track_external(*inputs)
    with tracker:
        output = gated_delta_rule(*inputs, scale=0.25)
        output.backward(torch.ones_like(output))
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - 2 * sum(x.nbytes for x in inputs) - 2 * output.nbytes


def test_the_memory_of_the_delta_rule_hardly_grows_with_the_length_of_the_row(monkeypatch):
    monkeypatch.setattr(linear_attention, "SEGMENT", 2 * CHUNK)
    n_segments, state = 6, 2 * 16 * 16 * 4  # of bytes
    one_segment, long = (peak_besides_inputs(n * 2 * CHUNK) for n in (1, n_segments))
    assert long - one_segment < 0.2 * one_segment + 2 * n_segments * state


def test_a_row_of_a_million_tokens_takes_no_longer_to_trace_than_a_short_one():
    inputs = [torch.empty(1, 1_048_576, heads, *rest, device="meta") for heads, *rest in ((2, 8), (2, 8), (4, 8), (4,))]
    assert decaying_linear_attention(*inputs).shape == (1, 1_048_576, 4, 8)


# --- what is replaced ------------------------------------------------------------------------------------------------


def test_a_function_that_only_looks_like_a_recurrence_is_refused_in_a_sentence():
    def twice_as_much(query, key, value, g, beta, chunk_size=64, **options):
        theirs = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
        return 2 * theirs(query, key, value, g, beta, **options)[0], None

    with pytest.raises(ModelError, match="twice_as_much has the parameters of a function .* computes something else"):
        recurrences._ours_for(twice_as_much)


@pytest.mark.parametrize("recurrence", recurrences.RECURRENCES[1:-1], ids=lambda r: r.ours.__name__)
def test_an_argument_that_ours_lacks_is_refused_unless_no_result_depends_on_it(recurrence):
    arguments = recurrence.samples[0](torch.Generator().manual_seed(0))
    same = recurrence.ours(**arguments, seq_idx=None, use_associative_scan=True)
    assert torch.equal(recurrences._output(same), recurrences._output(recurrence.ours(**arguments)))
    with pytest.raises(ModelError, match="^it gives a recurrence or a convolution the argument seq_idx, which"):
        recurrence.ours(**arguments, seq_idx=torch.zeros(2, 9, dtype=torch.int32))


def test_transformers_keeps_its_functions_outside_the_forward_of_our_model():
    before = vars(modeling_qwen3_5)["torch_chunk_gated_delta_rule"], vars(modeling_mamba)["mamba_selective_scan"]
    config = config_of("qwen3_5_text")
    build_model(config, torch.float32)
    assert before == (
        vars(modeling_qwen3_5)["torch_chunk_gated_delta_rule"],
        vars(modeling_mamba)["mamba_selective_scan"],
    )


# --- models ----------------------------------------------------------------------------------------------------------


def test_drawn_plans_of_models_with_recurrences_compute_their_loss_and_gradients():
    cases = [Case(family, seed, 2, 2) for seed, family in enumerate(["qwen3_5_text", "mamba2", "recurrent_gemma"])]
    for case, (loss_error, gradient_error, worst) in check_cases(cases).items():
        assert loss_error < 1e-6, case
        assert gradient_error < 1e-4, (case, worst)
