"""The chunked loss, by property, against torch.nn.functional.cross_entropy of the whole logits in float64.

All but what concerns other processes runs on a GPU where there is one, and the tests of numbers on the CPU as well. The
Triton kernel runs where Triton is, on a CPU under TRITON_INTERPRET=1.
"""

import functools
import inspect
import math
import os
import sys
import unittest.mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import chunk_linear_cross_entropy as module
from chunk_linear_cross_entropy import chunk_linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_each_device(device, monkeypatch):
    """The test makes its tensors on the CPU, and once more on a GPU where there is one."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", device.type)


def make_inputs(b, l, d, n, dtype=torch.float32, seed=0, scale=1.0):
    """Random hidden states and weight that require gradients, and labels, a third of them -100."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, l, d, generator=generator) * scale
    weight = torch.randn(n, d, generator=generator)
    labels = torch.randint(n, (b, l), generator=generator)
    labels[torch.rand(b, l, generator=generator) < 1 / 3] = -100
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, labels.to(DEVICE)


def float64_losses(hidden, weight, labels, padding_idx=-100, logit_softcap=0.0):
    """The same losses by the plain formula, and float64 leaves to take their gradients at."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    if logit_softcap:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=padding_idx, reduction="none")
    return losses.view(labels.shape), hidden, weight


def assert_close(actual, expected, tolerance):
    """Whether actual is expected to within tolerance of its largest element, or of 1."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual.double() - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


REDUCTIONS = {
    "sum": lambda losses, weights: losses.sum(),
    "mean": lambda losses, weights: losses.mean(),
    "per row": lambda losses, weights: losses.sum(1).square().sum(),
    "weights": lambda losses, weights: (losses * weights).sum(),
    "mask": lambda losses, weights: (losses * (weights > 0)).sum() / 7,
    "zeros": lambda losses, weights: (losses * 0).sum(),
    "last": lambda losses, weights: losses[:, -1:].sum(),
}


@st.composite
def problems(draw):
    """Inputs of every dtype and layout, ignored tokens, a chunk size, a cap and an incoming gradient."""
    b, l, d, n = (draw(st.integers(least, most)) for least, most in ((0, 3), (0, 7), (1, 9), (1, 40)))
    dtype = draw(st.sampled_from(list(EPS)))
    hidden, weight, labels = make_inputs(b, l, d, n, dtype, draw(st.integers(0, 99)), draw(st.sampled_from([0.1, 3.0])))
    ignored = draw(st.sampled_from(["some", "none", "all", "a word"]))
    padding_idx = -100
    if ignored == "none":
        labels = labels.clamp(min=0)
    elif ignored == "all":
        labels.fill_(-100)
    elif ignored == "a word":
        padding_idx = n - 1
        labels[labels == -100] = padding_idx
    if draw(st.booleans()):  # the same values in another order of memory
        hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        weight = weight.detach().T.contiguous().T.requires_grad_()
        labels = torch.stack((labels, labels), -1)[..., 0]
    options = {
        "padding_idx": padding_idx,
        "chunk_size": draw(st.integers(1, 25)),
        "logit_softcap": draw(st.sampled_from([0.0, 2.5])),
    }
    return hidden, weight, labels, options, draw(st.sampled_from(list(REDUCTIONS)))


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(problems(), st.booleans())
def test_losses_and_gradients_are_those_of_float64_whether_or_not_ignored_tokens_are_left_out(problem, left_out):
    with unittest.mock.patch.object(module, "_host_can_look_at", lambda tensor: left_out):
        check_against_float64(*problem)


@pytest.mark.usefixtures("on_each_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("logit_softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", ["sum", "weights"])
def test_losses_and_gradients_over_chunks_of_many_strips_are_those_of_float64(
    monkeypatch, dtype, logit_softcap, reduction
):
    monkeypatch.setattr(module, "_STRIP_NUMEL", 1 << 16)
    hidden, weight, labels = make_inputs(1, 300, 24, 5000, dtype, scale=0.5)
    options = {"chunk_size": 140, "logit_softcap": logit_softcap}
    check_against_float64(hidden, weight, labels, options, reduction)


def check_against_float64(hidden, weight, labels, options, reduction):
    weights = torch.linspace(-1, 1, labels.numel(), device=DEVICE).view(labels.shape)
    losses = chunk_linear_cross_entropy(hidden, weight, labels, **options)
    REDUCTIONS[reduction](losses, weights).backward()

    options.pop("chunk_size")
    expected, hidden64, weight64 = float64_losses(hidden, weight, labels, **options)
    REDUCTIONS[reduction](expected, weights).backward()
    sums = torch.promote_types(hidden.dtype, torch.float32)
    assert losses.dtype == sums and (hidden.grad.dtype, weight.grad.dtype) == (hidden.dtype, weight.dtype)
    assert_close(losses, expected, 64 * EPS[sums])
    assert_close(hidden.grad, hidden64.grad, 64 * EPS[sums] + 2 * EPS[hidden.dtype])
    assert_close(weight.grad, weight64.grad, 64 * EPS[sums] + 2 * EPS[hidden.dtype])


def test_gradients_of_the_loss_are_those_of_finite_differences():
    hidden, weight, labels = make_inputs(2, 5, 3, 11, torch.float64)
    loss = functools.partial(chunk_linear_cross_entropy, labels=labels, chunk_size=4, logit_softcap=3.0)
    assert torch.autograd.gradcheck(loss, (hidden, weight))


def checkpointed_loop(hidden, weight, labels, chunk_size):
    """The reference program's loss: whole chunks of logits, made again in the backward pass."""

    def chunk_losses(hidden, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    chunks = zip(hidden.flatten(0, 1).split(chunk_size), labels.flatten().split(chunk_size), strict=True)
    return torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])


def pytorchs_chunked(hidden, weight, labels, chunk_size):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size)
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


# PyTorch has a chunked loss of its own since 2.13.
PEERS = [checkpointed_loop, *([pytorchs_chunked] if hasattr(torch.nn, "LinearCrossEntropyOptions") else [])]


@pytest.mark.usefixtures("on_each_device")
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_bfloat16_losses_are_no_further_from_float64_than_those_of_the_peers(scale):
    hidden, weight, labels = make_inputs(1, 256, 128, 8192, torch.bfloat16, scale=scale)
    # Labels that the logits favor, as in a trained model.
    labels = (hidden.double() @ weight.double().T).add_(torch.randn(1, 256, 8192, device=DEVICE).double()).argmax(-1)
    expected, hidden64, weight64 = float64_losses(hidden, weight, labels)
    expected.sum().backward()
    exact = expected.detach().sum(), hidden64.grad, weight64.grad

    def errors(losses):
        loss = losses.sum()
        grads = torch.autograd.grad(loss, (hidden, weight))
        return [relative_error(a, b) for a, b in zip((loss.detach(), *grads), exact, strict=True)]

    ours = errors(chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=64))
    for peer in PEERS:
        theirs = errors(peer(hidden, weight, labels, 64))
        assert all(a <= 1.02 * b for a, b in zip(ours, theirs, strict=True)), (peer.__name__, ours, theirs)


@pytest.mark.usefixtures("on_each_device")
def test_float32_sums_over_a_large_vocabulary_are_rounded_once():
    hidden, weight, labels = make_inputs(1, 64, 32, 100_000, scale=0.5)
    expected, hidden64, weight64 = float64_losses(hidden, weight, labels)
    losses = chunk_linear_cross_entropy(hidden, weight, labels)
    (losses.sum() + expected.sum()).backward()
    assert_close(losses, expected, 2 * EPS[torch.float32])
    assert relative_error(hidden.grad, hidden64.grad) < 8 * EPS[torch.float32]
    assert relative_error(weight.grad, weight64.grad) < 8 * EPS[torch.float32]


@pytest.mark.usefixtures("on_each_device")
def test_the_weight_gradient_is_summed_in_float32():
    # Each of 1,024 tokens adds to the gradient less than half of what bfloat16 can tell from it in the end.
    hidden = torch.ones(1, 1024, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(3, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    chunk_linear_cross_entropy(hidden, weight, hidden[..., 0].long(), chunk_size=1).sum().backward()
    expected = torch.tensor([1024 / 3, -2048 / 3, 1024 / 3], device=DEVICE)
    torch.testing.assert_close(weight.grad[:, 0].float(), expected, rtol=EPS[torch.bfloat16] / 2, atol=0)


def test_tokens_predicted_with_confidence_keep_their_digits():
    # p = 1 - 1e-6: subtracting it from 1 in float32 would leave one digit.
    hidden = torch.ones(1, 1, 1, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(1e6)]], device=DEVICE, requires_grad=True)
    labels = torch.tensor([[1]], device=DEVICE)
    losses = chunk_linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    expected, _, weight64 = float64_losses(hidden, weight, labels)
    expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-5, atol=0)


def test_an_offset_that_all_logits_share_costs_no_digits():
    # Exact in float32, and the same softmax as without the 2^20.
    hidden = torch.ones(1, 4, 2, device=DEVICE, requires_grad=True)
    weight = torch.stack((torch.full((300,), 2.0**20), torch.arange(300) / 8), 1).to(DEVICE).requires_grad_()
    labels = torch.tensor([[0, 7, 200, 299]], device=DEVICE)
    losses = chunk_linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    expected, _, weight64 = float64_losses(hidden, weight, labels)
    expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-5, atol=1e-12)


@pytest.mark.usefixtures("on_each_device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_size_do_not_overflow(dtype):
    hidden, weight, labels = make_inputs(1, 6, 64, 50, dtype, scale=1000.0)
    weight = (weight.detach() * 1000).requires_grad_()
    expected, hidden64, weight64 = float64_losses(hidden, weight, labels)
    losses = chunk_linear_cross_entropy(hidden, weight, labels)
    (losses.sum() + expected.sum()).backward()
    assert expected.max() > torch.finfo(torch.float16).max
    assert_close(losses, expected, 1e-6)
    assert_close(hidden.grad, hidden64.grad, 2 * EPS[dtype])
    assert_close(weight.grad, weight64.grad, 2 * EPS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_minus_infinity_give_no_nan(dtype):
    x = torch.full((3, 4), -math.inf, dtype=dtype)
    x[0, 2] = x[1, 2] = 3
    labels = torch.tensor([2, 1, 0])
    losses = module._softmax_pass(x, x, labels, torch.ones(3, dtype=dtype), 0.0)
    assert losses.tolist() == [0, math.inf, math.inf]
    assert x.tolist() == [[0, 0, 0, 0], [0, -1, 1, 0], [-1, 0, 0, 0]]


class Allocations(TorchDispatchMode):
    """Records the bytes of every storage that an operator returns and that was not among its inputs."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in tensors}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.sizes.append(x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", ["sum", "weights", "no gradient"])
def test_one_chunk_of_logits_is_the_most_that_is_ever_held(dtype, reduction, logit_softcap):
    tokens, n, chunk_size = 2048, 4096, 512
    hidden, weight, labels = make_inputs(1, tokens, 8, n, dtype)
    labels.clamp_(min=0)
    logits = chunk_size * n * 4
    with Allocations() as allocations:
        with torch.set_grad_enabled(reduction != "no gradient"):
            losses = chunk_linear_cross_entropy(hidden, weight, labels, -100, chunk_size, logit_softcap)
        forward = list(allocations.sizes)
        if reduction != "no gradient":
            weights = torch.ones_like(losses) if reduction == "sum" else torch.rand_like(losses)
            losses.backward(weights)
    backward = allocations.sizes[len(forward) :]
    # One buffer of logits at a time; all else is smaller than half of it.
    assert [size for size in forward if size > logits / 2] == [logits]
    assert [size for size in backward if size > logits / 2] == ([logits] if reduction == "weights" else [])


@pytest.mark.skipif(DEVICE != "cpu", reason="MemTracker's figures are a CPU's here")
def test_all_temporary_memory_together_is_below_one_and_a_half_chunks_of_logits():
    hidden, weight, labels = make_inputs(1, 256, 1024, 8192)
    labels.clamp_(min=0)
    tracker = MemTracker()
    tracker.track_external(hidden, weight, labels)
    with tracker:
        chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=128).sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    inputs_and_gradients = 2 * (hidden.nbytes + weight.nbytes)
    assert 128 * 8192 * 4 < peak - inputs_and_gradients < 1.5 * 128 * 8192 * 4


def products(function):
    """How many products of one token's hidden state [d] with the weight [n, d] a function takes (d = 4, n = 6)."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * 4 * 6)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_no_product_is_made_that_the_result_does_not_need(chunk_size):
    hidden, weight, labels = make_inputs(4, 6, 4, 6)
    assert 0 < (labels != -100).sum() < labels.numel()
    counted = int((labels != -100).sum()) if DEVICE == "cpu" else labels.numel()
    loss = functools.partial(chunk_linear_cross_entropy, labels=labels, chunk_size=chunk_size)
    weights = torch.linspace(1, 2, labels.numel(), device=DEVICE).view(labels.shape)

    with torch.no_grad():
        assert products(lambda: loss(hidden, weight)) == counted
    assert products(lambda: loss(hidden.detach(), weight.detach())) == counted
    assert products(lambda: loss(hidden, weight).sum().backward()) == 3 * counted
    assert products(lambda: (loss(hidden, weight) * 0.5).sum().backward()) == 3 * counted
    assert products(lambda: loss(hidden, weight).mean().backward()) == 3 * counted
    # A mask of the tokens that count changes nothing, one of fewer tokens costs two products of each of these.
    assert products(lambda: (loss(hidden, weight) * (labels != -100)).sum().backward()) == 3 * counted
    fewer = (labels != -100) & (weights > 1.5)
    again = 2 * int(fewer.sum()) if DEVICE == "cpu" else 2 * counted
    assert products(lambda: (loss(hidden, weight) * fewer).sum().backward()) == 3 * counted + again
    assert products(lambda: (loss(hidden, weight) * weights).sum().backward()) == 5 * counted
    # What is frozen costs nothing, and the hidden states' gradient is never made again.
    assert products(lambda: (loss(hidden, weight.detach()) * weights).sum().backward()) == 2 * counted
    assert products(lambda: loss(hidden.detach(), weight).sum().backward()) == 2 * counted
    if DEVICE == "cpu":
        assert products(lambda: loss(hidden, weight, labels=torch.full_like(labels, -100)).sum().backward()) == 0


def test_gradients_that_come_in_for_ignored_tokens_change_nothing():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    losses = chunk_linear_cross_entropy(hidden, weight, labels)
    incoming = torch.where(labels == -100, math.nan, 1.0)
    for actual, expected in zip(
        torch.autograd.grad(losses, (hidden, weight), incoming, retain_graph=True),
        torch.autograd.grad(losses.sum(), (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reductions", [("sum", "mean"), ("mean", "weights"), ("weights", "sum")])
def test_a_second_backward_of_the_same_loss_gives_the_same_gradients_as_a_first(dtype, reductions):
    hidden, weight, labels = make_inputs(2, 5, 4, 6, dtype)
    weights = torch.rand(2, 5, device=DEVICE)
    losses = chunk_linear_cross_entropy(hidden, weight, labels)
    for reduction, retain_graph in zip(reductions, (True, False), strict=True):
        loss = REDUCTIONS[reduction](losses, weights)
        again = torch.autograd.grad(loss, (hidden, weight), retain_graph=retain_graph)
        fresh = REDUCTIONS[reduction](chunk_linear_cross_entropy(hidden, weight, labels), weights)
        for actual, expected in zip(again, torch.autograd.grad(fresh, (hidden, weight)), strict=True):
            assert torch.equal(actual, expected)


def test_gradients_accumulate_over_calls_that_share_the_weight():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    losses = [chunk_linear_cross_entropy(hidden, weight, labels) for _ in range(2)]
    sum(losses).sum().backward()
    chunk_linear_cross_entropy(hidden, weight, labels).sum().backward()
    expected, hidden64, weight64 = float64_losses(hidden, weight, labels)
    (3 * expected).sum().backward()
    assert_close(hidden.grad, hidden64.grad, 1e-5)
    assert_close(weight.grad, weight64.grad, 1e-5)


def test_a_second_derivative_is_refused_in_a_sentence():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(chunk_linear_cross_entropy(hidden, weight, labels).sum(), weight, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "weights"])
@pytest.mark.parametrize(("use_reentrant", "taken"), [(False, 6), (True, 4)])
def test_activation_checkpointing_changes_no_gradient_and_costs_only_the_recomputed_products(
    use_reentrant, taken, reduction
):
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    weights = torch.rand(2, 5, device=DEVICE)

    def loss(hidden, weight):
        return REDUCTIONS[reduction](chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=3), weights)

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    taken += 2 if reduction == "weights" else 0
    run = lambda: checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).backward()  # noqa: E731
    assert products(run) == taken * ((labels != -100).sum() if DEVICE == "cpu" else labels.numel())
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_every_tensor_saved_for_backward_is_visible_to_autograds_hooks():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    node = chunk_linear_cross_entropy(hidden, weight, labels).grad_fn
    assert "ChunkLinearCrossEntropy" in type(node).__name__
    assert not [value for value in vars(node).values() if isinstance(value, torch.Tensor)]


def test_gradients_are_the_same_with_saved_tensors_offloaded():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    expected = torch.autograd.grad(chunk_linear_cross_entropy(hidden, weight, labels).mean(), (hidden, weight))
    with torch.autograd.graph.save_on_cpu():
        chunk_linear_cross_entropy(hidden, weight, labels).mean().backward()
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("reduction", ["sum", "weights"])
def test_a_compiled_function_that_calls_the_loss_gives_the_same_gradients_and_leaves_the_loss_uncompiled(reduction):
    weights = torch.rand(2, 5, device=DEVICE)

    def loss(hidden, weight, labels):
        return (
            REDUCTIONS[reduction](chunk_linear_cross_entropy(hidden.sin(), weight.cos(), labels, chunk_size=3), weights)
            * 2
        )

    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=backend)
    for l in (5, 4):  # the second length makes shapes symbolic
        hidden, weight, labels = make_inputs(2, l, 4, 6)
        weights = torch.rand(2, l, device=DEVICE)
        expected = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        compiled(hidden, weight, labels).backward()
        torch.testing.assert_close((hidden.grad, weight.grad), expected)
    compiled_code = "".join(graph.code for graph in backend.graphs)
    assert "cos" in compiled_code and "argsort" not in compiled_code  # the loss itself was left alone


def test_autocast_casts_the_inputs_of_the_loss_as_it_casts_those_of_linear():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = chunk_linear_cross_entropy(hidden.bfloat16(), weight, labels)
        losses.sum().backward()
        assert F.linear(hidden.bfloat16(), weight).dtype == torch.bfloat16
    hidden16, weight16 = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    expected = chunk_linear_cross_entropy(hidden16, weight16, labels)
    expected.sum().backward()
    assert torch.equal(losses, expected) and losses.dtype == torch.float32
    assert torch.equal(hidden.grad, hidden16.grad.float()) and torch.equal(weight.grad, weight16.grad.float())


def test_meta_and_fake_tensors_give_losses_of_the_right_shape_and_dtype():
    inputs = make_inputs(2, 5, 4, 6, torch.bfloat16)
    fake = torch._subclasses.FakeTensorMode()
    for losses in (
        chunk_linear_cross_entropy(*(x.to("meta") for x in inputs)),
        chunk_linear_cross_entropy(*(fake.from_tensor(x) for x in inputs)),
    ):
        assert losses.shape == (2, 5) and losses.dtype == torch.float32


def test_the_loss_is_a_plain_function_with_plain_annotations():
    # nnScaler's tracer takes a registered operator's types from its annotations.
    parameters = inspect.signature(chunk_linear_cross_entropy).parameters
    assert inspect.isfunction(chunk_linear_cross_entropy) and not hasattr(chunk_linear_cross_entropy, "__wrapped__")
    assert [p.annotation for p in parameters.values()] == 3 * [torch.Tensor] + [int, int, float]
    assert parameters["chunk_size"].default == module.CHUNK_SIZE == 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h, w, y: (h[0], w, y),
            r"must be \[b, l, d\], \[n, d\] and \[b, l\], but are \(5, 4\), ",
        ),
        (lambda h, w, y: (h, w[:, 1:], y), r"but are \(2, 5, 4\), \(6, 3\), \(2, 5\)"),
        (lambda h, w, y: (h, w, y[:, 1:]), r"but are \(2, 5, 4\), \(6, 4\), \(2, 4\)"),
        (lambda h, w, y: (h, w.double(), y), "same floating point dtype, but have torch.float32 and torch.float64"),
        (lambda h, w, y: (h.long(), w.long(), y), "same floating point dtype, but have torch.int64"),
        (lambda h, w, y: (h[..., :0], w[:, :0], y), r"weight must have words and features, but is \(6, 0\)"),
        (lambda h, w, y: (h, w, y.float()), "labels must be integers, but are torch.float32"),
        (lambda h, w, y: (h, w.to("meta"), y), "same device, but are on .*, meta and "),
        (lambda h, w, y: (h, w, y, -100, 0), "chunk_size must be at least 1, but is 0"),
        (lambda h, w, y: (h, w, y, -100, 1, -2.0), "logit_softcap must be positive, or 0 for no cap, but is -2.0"),
        # Labels on a CPU: on a GPU an assertion would fail on the device, and end the process's use of it.
        (
            lambda h, w, y: (h.cpu(), w.cpu(), y.cpu().clamp(min=6)),
            r"in \[0, 6\) or equal padding_idx \(-100\), but 10 of 10 are not",
        ),
        (lambda h, w, y: (h.cpu(), w.cpu(), y.cpu(), -1), "but [0-9]+ of 10 are not, the first being -100"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message) as error:
        chunk_linear_cross_entropy(*change(*make_inputs(2, 5, 4, 6)))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


class Head(torch.nn.Module):
    """A language model's head alone."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden, labels):
        self.gathered = self.weight
        return chunk_linear_cross_entropy(hidden, self.weight, labels, chunk_size=3)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:FSDP2-wrapped module.*returned a view")
@pytest.mark.parametrize("reduction", ["sum", "weights"])
def test_gradients_of_a_weight_that_fsdp_gathers_and_frees_are_exact(process_group, reduction):
    hidden, weight, labels = make_inputs(2, 5, 4, 6, torch.bfloat16)
    weights = torch.linspace(1, 2, labels.numel(), device=DEVICE).view(labels.shape)
    head = Head(weight.detach().float())
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(head, mp_policy=bfloat16, reshard_after_forward=True)
    expected = 0
    for _ in range(2):  # gradients accumulate
        losses = head(hidden, labels)
        assert head.gathered.dtype == torch.bfloat16 and head.gathered.untyped_storage().nbytes() == 0
        REDUCTIONS[reduction](losses, weights).backward()
        alone = REDUCTIONS[reduction](chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=3), weights)
        expected = expected + torch.autograd.grad(alone, weight)[0].float()
    assert torch.equal(head.weight.grad.full_tensor(), expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The order of a GPU's work on any device, with plain formulas for what the kernel and cuBLAS do."""

    def softmax_pass(x, dx, labels, row_grads, logit_softcap):
        with torch.enable_grad():
            z = x.detach().double().requires_grad_()
            capped = logit_softcap * torch.tanh(z / logit_softcap) if logit_softcap else z
            losses = F.cross_entropy(capped, labels, reduction="none")
        if dx is not None:
            dx.copy_(torch.autograd.grad(losses, z, row_grads.double())[0])
        return losses.detach().to(x.dtype)

    def multiply(a, b, out, add=False):
        return out.copy_(a.float() @ b.float() + (out.float() if add else 0))

    monkeypatch.setattr(module, "_host_can_look_at", lambda tensor: False)
    monkeypatch.setattr(module, "_takes_triton", lambda weight: True)
    monkeypatch.setattr(module, "_triton_softmax_pass", softmax_pass)
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "_multiply", multiply)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit_softcap", [0.0, 3.0])
@pytest.mark.usefixtures("on_each_device", "as_on_a_gpu")
def test_losses_and_gradients_from_half_precision_operands_are_those_of_float64(dtype, logit_softcap):
    """A GPU's arithmetic: half-precision dx in the memory of float32 logits."""
    hidden, weight, labels = make_inputs(2, 5, 4, 30_000, dtype, scale=3.0)
    weights = torch.linspace(0.1, 1, 10, device=DEVICE).view(2, 5)
    for reduction in ("sum", "weights"):
        options = {"logit_softcap": logit_softcap}
        losses = chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=3, **options)
        expected, hidden64, weight64 = float64_losses(hidden, weight, labels, **options)
        scale = 4096  # of the loss, as float16 needs it
        actual = torch.autograd.grad(REDUCTIONS[reduction](losses, weights) * scale, (hidden, weight))
        exact = torch.autograd.grad(REDUCTIONS[reduction](expected, weights) * scale, (hidden64, weight64))
        assert_close(losses, expected, 1e-6)
        assert relative_error(actual[0], exact[0]) < EPS[dtype]
        assert relative_error(actual[1], exact[1]) < EPS[dtype]
        # Probabilities below the least number of float16, 6e-8, are not lost. (A cap leaves none that small.)
        small = (exact[1].abs() / scale < 6e-8) & (exact[1].abs() / scale > 1e-8)
        assert small.sum() > 100 and (logit_softcap or relative_error(actual[1][small], exact[1][small]) < 0.02)


MULTIPLY = module._multiply


@pytest.mark.usefixtures("on_each_device", "as_on_a_gpu")
def test_where_cublas_rounds_sums_to_bfloat16_errors_stay_within_its_rounding(monkeypatch):
    """As on a GPU with PyTorch 2.6 and 2.7: chunks' sums are rounded, but added in float32."""
    monkeypatch.setattr(module, "_multiply", MULTIPLY)
    monkeypatch.setattr(module, "_CUBLAS_RETURNS_FLOAT32", False)
    hidden, weight, labels = make_inputs(2, 5, 4, 30, torch.bfloat16)
    losses = chunk_linear_cross_entropy(hidden, weight, labels, chunk_size=3)
    losses.sum().backward()
    expected, hidden64, weight64 = float64_losses(hidden, weight, labels)
    expected.sum().backward()
    assert_close(losses, expected, EPS[torch.bfloat16])
    assert relative_error(hidden.grad, hidden64.grad) < 4 * EPS[torch.bfloat16]
    assert relative_error(weight.grad, weight64.grad) < 4 * EPS[torch.bfloat16]


def test_losses_in_inference_mode_are_those_of_training():
    hidden, weight, labels = make_inputs(1, 300, 24, 5000)
    expected = chunk_linear_cross_entropy(hidden, weight, labels)
    with torch.inference_mode():
        assert torch.equal(chunk_linear_cross_entropy(hidden * 1, weight * 1, labels), expected)


@pytest.mark.skipif(
    module.triton is None or not (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit_softcap", [0.0, 3.0])
@pytest.mark.parametrize("n", [1, 33, 4096, 9001])
def test_the_triton_kernels_losses_and_gradients_are_those_of_float64(dtype, logit_softcap, n):
    logits = torch.randn(5, -(-n // 16) * 16, device=DEVICE) * 4
    labels, row_grads = torch.randint(n, (5,), device=DEVICE), torch.randn(5, device=DEVICE)
    x = logits[:, :n].double().requires_grad_()
    capped = logit_softcap * torch.tanh(x / logit_softcap) if logit_softcap else x
    expected = F.cross_entropy(capped, labels, reduction="none")
    (exact,) = torch.autograd.grad(expected, x, row_grads.double())
    only_losses = module._triton_softmax_pass(logits.clone()[:, :n], None, labels, row_grads, logit_softcap)
    dx = logits.view(dtype)[:, :n]
    losses = module._triton_softmax_pass(logits[:, :n], dx, labels, row_grads, logit_softcap)
    for found in (losses, only_losses):  # the two kernels that Triton makes of one may round in other orders
        assert_close(found, expected.detach(), 32 * EPS[torch.float32])
    assert_close(dx, exact, 4 * EPS[torch.float32] + EPS[dtype])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the next test shows it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_host_asks_the_device_for_no_value(monkeypatch, dtype):
    """Fake tensors have no values: an operator that would hand one to the host raises an error."""
    hidden, weight, labels = make_inputs(2, 5, 4, 6, dtype)

    def run():
        with torch._subclasses.FakeTensorMode() as fake:
            h, w, y = (fake.from_tensor(x) for x in (hidden, weight, labels))
            y, counts = module._checked(y, -100, 6)
            module._ChunkLinearCrossEntropy.apply(h.flatten(0, 1), w, y, counts, 3, 0.0).sum().backward()
        assert (h.grad.shape, w.grad.shape) == (hidden.shape, weight.shape)

    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        run()
    monkeypatch.setattr(module, "_host_can_look_at", lambda tensor: False)
    run()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.gpu
def test_the_loss_of_a_sum_and_its_backward_do_not_wait_for_the_device():
    hidden, weight, labels = make_inputs(2, 5, 4, 6)
    chunk_linear_cross_entropy(hidden, weight, labels).sum().backward()  # Triton compiles its kernel, and waits.
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk_linear_cross_entropy(hidden, weight, labels).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE != "cpu", reason="an assertion that fails on a GPU ends the process's use of it")
def test_a_bad_label_fails_an_assertion_where_the_host_does_not_look(monkeypatch):
    monkeypatch.setattr(module, "_host_can_look_at", lambda tensor: False)
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 6\) or equal padding_idx \(-100\)"):
        module._checked(torch.tensor([[0, -100, 6]]), -100, 6)
