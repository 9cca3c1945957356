"""Attention that models write out in operators, and masks that are tensors, become calls of this program's kernels."""

from typing import Any

import pytest
import torch
from families import small_config
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longctx.compiler.ir import Graph
from longctx.compiler.ops import arguments_of, positions
from longctx.compiler.ops.registered import target_of
from longctx.compiler.ops.scores import Scores
from longctx.compiler.trace import sample_row, trace
from longctx.errors import KernelError, ModelError
from longctx.huggingface.attention import REGISTERED_NAME, attention_function, make_no_masks, refuse_own_attention
from longctx.huggingface.build import build_model
from longctx.kernels import written_attention
from longctx.kernels.attention import alibi_attention, attention, sink_attention
from longctx.kernels.written_attention import meaning_of

LENGTH = 56


# --- what a mask and a bias mean -------------------------------------------------------------------------------------


def scores_of(visible, bias=lambda i, j: 0.0 * j, scale=0.5, masked=-3.4e38):
    """The scores of 3 heads where visible(i, j) says which keys j the queries i see, and bias(i, j) is added."""

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> Scores:
        i, j = torch.broadcast_tensors(queries.unsqueeze(1), keys)
        total = torch.where(visible(i, j), 0.0, masked) + bias(i, j) * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
        return Scores(torch.full_like(total.double(), scale), total.double())

    return scores


LENGTHS = [1, 2, 56, 4096, 131_072]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("masked", [-3.4e38, float("-inf"), -1e4])
def test_a_causal_mask_is_known(length, masked):
    found = meaning_of(scores_of(lambda i, j: j <= i, masked=masked), length, "attn")
    assert (found.scale, found.window, found.softcap, found.slopes) == (0.5, 0, 0.0, None)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 31, 1024])
def test_a_window_is_known_by_its_length(length, window):
    found = meaning_of(scores_of(lambda i, j: (j <= i) & (i - j < window)), length, "attn")
    assert found.window == (window if window < length else 0)


@pytest.mark.parametrize("length", LENGTHS[1:])
@pytest.mark.parametrize("window", [2**20, 40])
def test_linear_biases_are_known_by_their_slopes_whatever_is_added_to_all_keys_of_a_query(length, window):
    visible = lambda i, j: (j <= i) & (i - j < window)  # noqa: E731
    for bias in (lambda i, j: 0.25 * j, lambda i, j: 0.25 * (j - i), lambda i, j: 0.25 * (j - i) + torch.sin(i)):
        found = meaning_of(scores_of(visible, bias), length, "attn")
        torch.testing.assert_close(found.slopes, torch.tensor([0.25, 0.5, 1.0]))
        assert found.window == (window if window < length else 0)


@pytest.mark.parametrize(
    ("visible", "bias"),
    [
        (lambda i, j: j <= i + 1, lambda i, j: 0.0 * j),  # sees the next token
        (lambda i, j: j >= 0, lambda i, j: 0.0 * j),  # sees all
        (lambda i, j: (j <= i) | (j < 7), lambda i, j: 0.0 * j),  # sees a prefix
        (lambda i, j: (j <= i) & (j // 16 == i // 16), lambda i, j: 0.0 * j),  # chunks
        (lambda i, j: (j <= i) & (i - j != 3), lambda i, j: 0.0 * j),  # a gap
        (lambda i, j: j < i, lambda i, j: 0.0 * j),  # does not see itself
        (lambda i, j: j <= i, lambda i, j: 0.01 * (j - i).double() ** 2),
        (lambda i, j: j <= i, lambda i, j: 0.3 * (j % 2)),
    ],
)
@pytest.mark.parametrize("length", [56, 4096, 131_072])
def test_every_other_mask_and_bias_is_refused(visible, bias, length):
    with pytest.raises(ModelError, match=r"^the model has an attention \(attn\) .*; choose another model$"):
        meaning_of(scores_of(visible, bias), length, "attn")


# --- in models -------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHER_SIZES: dict[str, Any] = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
BLOOM: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4}
DROPPED: dict[str, Any] = {"scale": 0.25, "dropout": 0.1}
WRITTEN = {  # families that write their attention out: their sizes, and the calls that take its place
    "bloom": (BLOOM, [("alibi_attention", {"scale": 0.25})]),
    "codegen": ({**OTHER_SIZES, "rotary_dim": 8, "attn_pdrop": 0.1}, [("attention", DROPPED)]),
    "ctrl": ({**OTHER_SIZES, "dff": 128}, [("attention", {"scale": 0.25})]),
    "gpt_neox_japanese": (SIZES, [("attention", DROPPED)] * 2),  # the last layer has a bias, and is a kind of its own
    "mpt": (
        {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": LENGTH},
        [("alibi_attention", {"scale": 0.25})],
    ),
    "openai-gpt": ({**OTHER_SIZES, "attn_pdrop": 0.0}, [("attention", {"scale": 0.25})]),
}


def trace_model(config, length: int = LENGTH, **options) -> Graph:
    sample = sample_row(length)
    return trace(build_model(config, torch.float32, **options), sample)


def attention_calls(graph: Graph) -> list[tuple[str, dict]]:
    """Each call of a kernel in the graph: its name, and its arguments that are no tensors."""
    kernels = {target_of(function): function.__name__ for function in (attention, alibi_attention)}
    return [(kernels[op.target], op.kwargs) for op in graph.all_ops() if op.target in kernels]


def squares(graph: Graph, length: int) -> list[str]:
    """The values of the graph that have two dimensions of the sequence's length."""
    return [tensor.name for op in graph.all_ops() for tensor in op.outputs if tensor.shape.count(length) > 1]


@pytest.mark.parametrize("family", WRITTEN)
def test_attention_that_is_written_out_becomes_a_call_of_a_kernel(family, monkeypatch):
    sizes, calls = WRITTEN[family]
    monkeypatch.setattr(positions, "WHOLE", 4 * LENGTH)  # no mask is computed whole, as in long rows
    graph = trace_model(CONFIG_MAPPING[family](**sizes))
    assert attention_calls(graph) == calls
    assert not squares(graph, LENGTH)


def test_alibis_slopes_are_a_constant_of_the_layer():
    graph = trace_model(CONFIG_MAPPING["bloom"](**{**BLOOM, "hidden_size": 96, "n_head": 6}))
    (op,) = [op for op in graph.all_ops() if op.target == target_of(alibi_attention)]
    value = graph.kinds[0].constants[arguments_of(op)["slopes"]]
    assert value.tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])  # arXiv:2108.12409, section 3


def test_a_row_of_131072_tokens_is_traced_without_a_square():
    length = 131_072
    graph = trace_model(CONFIG_MAPPING["bloom"](**BLOOM), length)
    assert [name for name, _ in attention_calls(graph)] == ["alibi_attention"]
    assert not squares(graph, length)


def test_the_kernel_of_written_attention_is_the_one_that_was_asked_for():
    config = CONFIG_MAPPING["codegen"](**WRITTEN["codegen"][0])
    ((_, arguments),) = attention_calls(trace_model(config, attn_implementation="flash", deterministic=True))
    assert arguments == {**DROPPED, "implementation": "flash", "deterministic": True}
    bloom = CONFIG_MAPPING["bloom"](**BLOOM)
    with pytest.raises(KernelError, match="^the attention of .* has a window, a soft-cap or a bias, which this kernel"):
        trace_model(bloom, attn_implementation="flash")


class Writes(nn.Module):
    """Attention with 4 heads of 8 features; the softmax takes scores(q, k, later, far), of query and transposed key.

    `later` are the keys behind a query, and `far` those that are 9 or more before it; [l, l], bool.
    """

    def __init__(self, scores):
        super().__init__()
        self.model = nn.Linear(32, 96)
        self.scores = scores

    def forward(self, x):
        query, key, value = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.model(x).chunk(3, -1))
        return self.attend(query, key, value).flatten(2).sum()

    def attend(self, query, key, value):
        all_pairs = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
        scores = self.scores(query, key.transpose(-1, -2), all_pairs.triu(1), all_pairs.tril(-9))
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


WAYS = {
    "fills in a number": lambda q, k, later, far: (q @ k).masked_fill(later, float("-inf")),
    "scales and adds": lambda q, k, later, far: (q @ k) * 0.5 + later * -1e9,
    "adds and scales": lambda q, k, later, far: (q @ k + later * -1e9) / 4,
    "multiplies by the mask": lambda q, k, later, far: q @ k * ~later - 1e4 * later,
    "chooses": lambda q, k, later, far: torch.where(later, torch.full((), -1e9, device=q.device), q @ k),
    "bounds": lambda q, k, later, far: torch.maximum(q @ k - later * 1e38, torch.full((), -3e38, device=q.device)),
    "caps": lambda q, k, later, far: 5 * ((q @ k) / 10).tanh() + later * -1e9,
    "has a window": lambda q, k, later, far: (q @ k).masked_fill(later | far, -1e9),
    "casts": lambda q, k, later, far: (q.float() @ k.float()).masked_fill(later, -1e9).to(torch.float64),
    "flattens": lambda q, k, later, far: (
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1)).view(1, 4, *later.shape) + later * -1e9
    ),
    "adds first": lambda q, k, later, far: (
        torch.baddbmm(later * torch.full((4, 1, 1), -1e9, device=q.device), q[0], k[0], beta=2, alpha=0.3)
    ).unsqueeze(0),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_write_attention_gives_what_the_kernel_gives_that_takes_its_place(way):
    module = Writes(WAYS[way])
    tensors = torch.randn(3, 1, 4, LENGTH, 8, generator=torch.Generator().manual_seed(0))
    expected = module.attend(*tensors)
    graph = trace(module, {"x": torch.empty(1, LENGTH, 32, device="meta")})
    ((name, arguments),) = attention_calls(graph)
    assert name == "attention"
    torch.testing.assert_close(attention(*tensors, **arguments), expected, rtol=1e-5, atol=1e-5, check_dtype=False)


class WritesGrouped(nn.Module):
    """Attention with 4 query heads and 2 heads of keys and values, which are repeated as `repeat` says."""

    def __init__(self, repeat):
        super().__init__()
        self.model = nn.Linear(32, 64)
        self.repeat = repeat

    def forward(self, x):
        query, *others = self.model(x).split((32, 16, 16), -1)
        query, key, value = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (query, *others))
        return self.attend(query, key, value).flatten(2).sum()

    def attend(self, query, key, value):
        later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
        key, value = self.repeat(key), self.repeat(value)
        scores = (query.to(key.dtype) @ key.transpose(-1, -2)).masked_fill(later, -1e9)
        return (scores.softmax(-1).to(value.dtype) @ value).to(query.dtype).transpose(1, 2)


REPEATS = {
    "expands": (2, lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)),
    "casts first": (2, lambda x: x.double().unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)),
    "casts between": (2, lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).double().flatten(1, 2)),
    "casts last": (2, lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2).double()),
    "interleaves": (2, lambda x: x.repeat_interleave(2, dim=1)),
    "interleaves and casts": (2, lambda x: x.double().repeat_interleave(2, -3)),
    "repeats the heads in turn": (4, lambda x: x.repeat(1, 2, 1, 1)),  # which the kernel does not: they stay 4
}


@pytest.mark.parametrize("way", REPEATS)
def test_keys_that_query_heads_share_are_given_to_the_kernel_once_however_they_are_repeated(way):
    heads, repeat = REPEATS[way]
    module = WritesGrouped(repeat)
    generator = torch.Generator().manual_seed(0)
    query, *others = (torch.randn(1, n, LENGTH, 8, generator=generator) for n in (4, 2, 2))
    graph = trace(module, {"x": torch.empty(1, LENGTH, 32, device="meta")})
    (op,) = [op for op in graph.all_ops() if op.target == target_of(attention)]
    assert [t.shape[1] for t in op.inputs] == [4, heads, heads]
    given = others if heads == 2 else map(repeat, others)
    found = attention(query, *given, **op.kwargs)
    torch.testing.assert_close(found, module.attend(query, *others), rtol=1e-5, atol=1e-5)


NOT_ATTENTION = {
    "a bias of the weights": lambda q, k, later, far: (q @ k + q.sum(-1, keepdim=True) ** 2 * far).masked_fill(
        later, -1e9
    ),
    "no power": lambda q, k, later, far: ((q @ k) ** 3).masked_fill(later, -1e9),
    "two products": lambda q, k, later, far: (q @ k + k.transpose(-1, -2) @ k).masked_fill(later, -1e9),
}


@pytest.mark.parametrize("scores", NOT_ATTENTION.values(), ids=NOT_ATTENTION)
def test_what_is_no_attention_stays_as_it_is(scores):
    graph = trace(Writes(scores), {"x": torch.empty(1, LENGTH, 32, device="meta")})
    assert attention_calls(graph) == []


def test_written_attention_that_sees_the_future_is_refused():
    with pytest.raises(ModelError, match="in which a token sees others than those before it"):
        trace(Writes(lambda q, k, later, far: q @ k), {"x": torch.empty(1, LENGTH, 32, device="meta")})


# --- by the registry of transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "windows"), [("llama", [0]), ("mistral", [16]), ("gemma3_text", [16])])
def test_a_mask_that_transformers_makes_becomes_the_kernels_window(family, windows):
    graph = trace_model(small_config(family))
    assert [arguments.get("window", 0) for _, arguments in attention_calls(graph)] == windows
    assert not squares(graph, LENGTH)


def call(options, mask, **given):
    tensors = torch.randn(3, 1, 2, 16, 4)
    return attention_function(options, nn.Linear(1, 1), *tensors, mask, **given)


def test_what_our_attention_does_not_have_is_refused_by_its_name():
    with pytest.raises(
        ModelError, match="the attention of Linear takes s_aux, which this program's attention does not"
    ):
        call({}, None, s_aux=torch.ones(2))
    with pytest.raises(ModelError, match="takes is_causal=False"):
        call({}, None, is_causal=False)


def test_sinks_are_known_and_no_fused_kernel_is_taken_for_them():
    if "granite_swa" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no dense model with sinks")
    config = CONFIG_MAPPING["granite_swa"](**SIZES, intermediate_size=128, num_key_value_heads=2)
    (op,) = [op for op in trace_model(config).all_ops() if op.target == target_of(sink_attention)]
    assert arguments_of(op)["sinks"].name.endswith("self_attn.sinks")
    with pytest.raises(KernelError, match="^the attention of .* has sinks, which no fused kernel has here"):
        trace_model(config, attn_implementation="flash")


class Masked(nn.Module):
    """An attention whose mask transformers would have made of the tokens."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(8, 8)

    def forward(self, x):
        mask = x.detach()[..., :1] * torch.ones(x.shape[2], device=x.device)
        return written_attention.masked_attention(x, self.model(x), x, mask, 1.0).sum()


def test_a_mask_that_depends_on_the_tokens_is_refused():
    with pytest.raises(ModelError, match="has a mask that depends on more than the positions of its tokens"):
        trace(Masked(), {"x": torch.empty(1, 4, LENGTH, 8, device="meta")})


def test_an_engine_that_would_keep_masks_has_none_made_and_no_model_that_needs_one():
    wrapped = build_model(small_config("llama"), torch.float32)
    make_no_masks()
    masks = []
    ALL_ATTENTION_FUNCTIONS.register(REGISTERED_NAME, lambda *args, **_: masks.append(args[4]) or (args[1], None))
    wrapped.model.get_decoder()(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)
    assert masks == [None, None]
    refuse_own_attention(wrapped.model)
    with pytest.raises(ModelError, match="^BloomForCausalLM has an attention of its own, which this engine can't"):
        refuse_own_attention(build_model(CONFIG_MAPPING["bloom"](**BLOOM), torch.float32).model)


def test_a_model_whose_tokens_see_what_comes_after_them_is_refused():
    config = small_config("llama")
    config.is_causal = False
    with pytest.raises(
        ModelError, match=r"an attention \(model.layers.0.self_attn\) in which a token sees others than"
    ):
        trace_model(config)
