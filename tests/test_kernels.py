"""`attention` and `rms_norm` compute their formulas, in every way they have of doing it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels import attention as attention_module
from longctx.kernels.attention import alibi_attention, attention, sink_attention
from longctx.kernels.rms_norm import rms_norm


def formula(query, key, value, scale, window=0, softcap=0.0, slopes=None):
    """Attention by its definition, in float64, all scores at once."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(query.shape[2], device=query.device)
    distance = i[:, None] - i
    if slopes is not None:
        scores = scores - slopes.double().view(-1, 1, 1) * distance
    seen = (distance >= 0) & (distance < (window or len(i)))
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    st.integers(1, 70),
    st.sampled_from([4, 8]),
    st.integers(0, 80),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from(["auto", "sdpa", "eager"]),
    st.integers(1, 20),
)
def test_attention_computes_its_formula(b, heads, length, d, window, softcap, implementation, block):
    torch.manual_seed(length)
    query = torch.randn(b, heads[0], length, d, requires_grad=True)
    key, value = (torch.randn(b, heads[1], length, d, requires_grad=True) for _ in range(2))
    upstream = torch.randn(b, length, heads[0], d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERY_BLOCK", block)
        result = attention(query, key, value, 0.3, window, softcap, implementation=implementation)
    gradients = torch.autograd.grad(result, (query, key, value), upstream)
    expected = formula(query, key, value, 0.3, window, softcap)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), upstream.double())

    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (70, 5.0)])
@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_attention_with_linear_biases_computes_its_formula(implementation, window, softcap, dtype, device, monkeypatch):
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 96)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 256, 64, generator=generator).to(device, dtype).requires_grad_() for heads in (4, 2, 2)
    )
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    upstream = torch.randn(2, 256, 4, 64, generator=generator).to(device, dtype)
    result = alibi_attention(query, key, value, slopes, 0.125, window, softcap, implementation=implementation)
    expected = formula(query, key, value, 0.125, window, softcap, slopes)
    found = [result, *torch.autograd.grad(result, (query, key, value), upstream)]
    exact = [expected, *torch.autograd.grad(expected, (query, key, value), upstream.double())]
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, exact, strict=True):
        assert (ours.double() - theirs).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * theirs.norm(), name


@pytest.mark.parametrize("window", [0, 70])
def test_attention_with_sinks_is_attention_with_one_more_key_whose_value_is_zero(window, device, monkeypatch):
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 96)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 256, 64, generator=generator).to(device).requires_grad_() for heads in (4, 2, 2)]
    inputs.append(torch.randn(4, generator=generator).to(device).requires_grad_())
    upstream = torch.randn(2, 256, 4, 64, generator=generator).to(device)
    found = sink_attention(*inputs, 0.125, window)

    query, key, value = (x.double().repeat_interleave(4 // x.shape[1], 1) for x in inputs[:3])
    i = torch.arange(256, device=device)
    distance = i[:, None] - i
    scores = query @ key.transpose(-1, -2) * 0.125
    scores = scores.masked_fill((distance < 0) | (distance >= (window or 256)), float("-inf"))
    scores = torch.cat((scores, inputs[3].double().view(-1, 1, 1).expand(2, 4, 256, 1)), -1)
    expected = (scores.softmax(-1) @ F.pad(value, (0, 0, 0, 1))).transpose(1, 2)

    found = [found, *torch.autograd.grad(found, inputs, upstream)]
    expected = [expected, *torch.autograd.grad(expected, inputs, upstream.double())]
    for name, ours, theirs in zip(("output", "query", "key", "value", "sinks"), found, expected, strict=True):
        assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (70, 0.0), (0, 5.0)])
@pytest.mark.parametrize("implementation", ["auto", "sdpa", "eager"])
def test_attention_computes_its_formula_in_every_precision(
    implementation, window, softcap, dtype, tolerance, device, monkeypatch
):
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 96)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 256, 64, generator=generator).to(device, dtype).requires_grad_() for heads in (4, 2, 2)
    )
    upstream = torch.randn(1, 256, 4, 64, generator=generator).to(device, dtype)
    result = attention(query, key, value, 0.125, window, softcap, implementation=implementation)
    expected = formula(query, key, value, 0.125, window, softcap)
    found = [result, *torch.autograd.grad(result, (query, key, value), upstream)]
    exact = [expected, *torch.autograd.grad(expected, (query, key, value), upstream.double())]
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, exact, strict=True):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm(), name


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 32), st.sampled_from([0.0, 1.0]))
def test_rms_norm_computes_its_formula(leading, d, offset):
    torch.manual_seed(d)
    x, weight = torch.randn(*leading, d), torch.randn(d)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + offset)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, offset).double(), expected, rtol=1e-5, atol=1e-6)
