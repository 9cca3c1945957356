"""Documents of a row that do not see each other: what is computed of them is what each alone would be."""

from functools import partial
from itertools import pairwise

import pyarrow as pa
import pytest
import torch
from families import config_of, random_documents, reference_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Case, check_cases, draw_cases
from test_attention_kernels import skip_unless_there, tensors

from longctx.compiler.ir import Op, Tensor
from longctx.compiler.ops.registered import target_of
from longctx.compiler.trace import sample_row, trace
from longctx.data.packing import find_boundaries
from longctx.data.rows import apart
from longctx.errors import KernelError, ModelError
from longctx.huggingface.build import build_model
from longctx.kernels import attention as attention_module
from longctx.kernels import documents, fused, pieces
from longctx.kernels.attention import (
    alibi_attention,
    attention,
    flops,
    flops_of_queries,
    sink_attention,
    takes_blocks,
    unmasked_flops,
)
from longctx.kernels.documents import attend_packed, flash_packed
from longctx.proof import _generated_module

SCALE = 0.3


def formula(query, key, value, document_starts, window=0, softcap=0.0, slopes=None, sinks=None) -> torch.Tensor:
    """Attention by its definition over the whole row, with a mask that has all pairs; [b, l, heads, e]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    length, heads = query.shape[2], query.shape[1]
    place = torch.arange(length)
    document = torch.bucketize(place, torch.tensor(document_starts), right=True)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or length)) & (document[:, None] == document)
    scores = query @ key.transpose(-1, -2) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.view(-1, 1, 1) * distance
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, heads, 1, 1).expand(len(query), heads, length, 1)), -1)
    return (scores.softmax(-1)[..., :length] @ value).transpose(1, 2)


def taken(whole: torch.Tensor, starts: tuple[int, ...], n: int, dim: int) -> torch.Tensor:
    return torch.cat([whole.narrow(dim, start, n) for start in starts], dim)


KINDS = {"attention": attention, "alibi": alibi_attention, "sinks": sink_attention}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    st.sampled_from([8, 16, 24, 40]),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([0, 1, 3, 9, 100]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from(["auto", "eager"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_attention_of_any_rank_within_documents_is_the_formula_with_a_mask(
    heads, length, kind, window, softcap, implementation, n_ranks, balanced, seed
):
    generator = torch.Generator().manual_seed(seed)
    document_starts = random_documents(length, seed)
    shapes = [(1, n, length, 4) for n in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    numbers = torch.rand(heads[0], generator=generator).double()
    extra = {"attention": {}, "alibi": {"slopes": numbers}, "sinks": {"sinks": numbers}}[kind]
    mask = {"window": window, "softcap": softcap}
    expected = formula(*inputs, document_starts, **mask, **extra)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)

    n = length // n_ranks // (1 + balanced)
    of_keys = [torch.zeros_like(x) for x in inputs[1:]]
    exact = implementation == "auto" and kind == "attention" and not softcap  # elsewhere scores are in float32
    close = {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 1e-5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERY_BLOCK", 5)
        patch.setattr(pieces, "KEYS", 3)
        for rank in range(n_ranks):
            starts = (rank * n, length - (rank + 1) * n) if balanced else (rank * n,)
            query = taken(inputs[0], starts, n, 2).detach().requires_grad_()
            given = {"starts": starts} if n_ranks > 1 or balanced else {}
            options = {**mask, "implementation": implementation, "document_starts": document_starts, **given}
            output = KINDS[kind](query, *inputs[1:], *extra.values(), SCALE, **options)
            torch.testing.assert_close(output, taken(expected, starts, n, 1), **close)
            of_query, *terms = torch.autograd.grad(output, (query, *inputs[1:]), taken(upstream, starts, n, 1))
            torch.testing.assert_close(of_query, taken(expected_gradients[0], starts, n, 2), **close)
            of_keys = [total + term for total, term in zip(of_keys, terms, strict=True)]
    torch.testing.assert_close(of_keys, list(expected_gradients[1:]), **close)


def varlen_by_its_definition(
    query, key, value, of_queries, of_keys, most_queries, most_keys, *, scale, window_size, **_
):
    """What torch.nn.attention.varlen computes: of each part, the last query and the last key are of one token."""
    queries, keys = ([end - start for start, end in pairwise(x.tolist())] for x in (of_queries, of_keys))
    assert (most_queries, most_keys) == (max(queries), max(keys))
    assert (of_queries[-1], of_keys[-1]) == (len(query), len(key)) and of_queries.dtype == torch.int32
    outputs = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        left = window_size[0] if window_size[0] >= 0 else len(k)
        unseen = (distance < 0) | (distance > left)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([8, 24, 40]), st.sampled_from([0, 1, 5]), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_flashattention_is_given_every_document_of_a_block_in_one_call(length, window, n_ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, n, length, 4, generator=generator) for n in (4, 2, 2))
    document_starts = random_documents(length, seed)
    expected = formula(query, key, value, document_starts, window)
    n = length // (2 * n_ranks)
    calls = []

    def varlen(*args, **kwargs):
        calls.append(args)
        return varlen_by_its_definition(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_varlen_attn", varlen)
        attend = partial(flash_packed, scale=SCALE, window=window, kernel="auto")
        for rank in range(n_ranks):
            starts = (rank * n, length - (rank + 1) * n)
            output = attend_packed(attend, taken(query, starts, n, 2), key, value, document_starts, starts)
            torch.testing.assert_close(output, taken(expected, starts, n, 1), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * n_ranks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", [*(n for n, kernel in fused.KERNELS.items() if kernel.documents), "auto", "sdpa"])
@pytest.mark.parametrize(("window", "starts"), [(0, ()), (100, ()), (0, (128, 768)), (100, (128, 768))])
def test_a_gpus_kernel_within_documents_computes_the_formula(name, window, starts):
    skip_unless_there(name)
    document_starts = (0, 150, 151, 700, 800)
    places = [*range(128, 256), *range(768, 896)] if starts else [*range(1024)]
    *inputs, gradient = tensors([(1, 4, 1024, 128), (1, 2, 1024, 128), (1, 2, 1024, 128)])
    query = inputs[0].detach()[:, :, places].requires_grad_()
    options = {"window": window, "starts": starts, "document_starts": document_starts}
    result = attention(query, *inputs[1:], SCALE, implementation=name, **options)
    found = [result, *torch.autograd.grad(result, (query, *inputs[1:]), gradient[:, places])]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    whole = formula(*exact, document_starts, window)[:, places]
    of_query, *others = torch.autograd.grad(whole, exact, gradient[:, places].double().cpu())
    for tensor, reference in zip(found, [whole, of_query[:, :, places], *others], strict=True):
        error = (tensor.double().cpu() - reference).norm() / reference.norm()
        assert error < 0.01  # bfloat16 rounds to 2 ** -9


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_ranks", "n_cases"), [(1, 2), (2, 8), (4, 9)])
def test_rows_of_documents_are_the_documents_run_one_by_one_through_hugging_face_under_drawn_plans(n_ranks, n_cases):
    first_seed = 19_000 + {1: 0, 2: 2, 4: 10}[n_ranks]  # so that each of FAMILIES comes once
    cases = draw_cases(n_cases, n_ranks, first_seed, apart=True)
    cases += [Case(family, 5, n_ranks, n_ranks, apart=True) for family in ("bloom", "gpt_oss") if n_ranks == 2]
    for case, (loss_error, gradient_error, worst) in check_cases(cases).items():
        assert loss_error < 1e-6, case
        assert gradient_error < 1e-4, (case, worst)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
def test_no_gradient_crosses_from_one_document_to_another(family):
    length, starts = 24, (0, 7, 8, 15)
    config = small_config(family, tie_word_embeddings=False) if family != "bloom" else config_of(family)
    config.tie_word_embeddings = False
    graph = trace(build_model(config, torch.float32, documents_apart=True), sample_row(length, 4))
    weights = dict(reference_model(config).named_parameters())
    module = _generated_module(graph, {name: weight.detach() for name, weight in weights.items()})
    (table,) = (
        p for name, p in module.named_parameters() if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))
    )
    tokens = torch.arange(1, length + 1).unsqueeze(0)  # each token is of one document alone
    for start, end in pairwise((*starts, length)):
        labels = torch.full_like(tokens, -100)
        labels[:, start : end - 1] = tokens[:, start + 1 : end]
        (gradient,) = torch.autograd.grad(module(*apart(tokens, labels, starts)), table)
        own = tokens[0, start:end]
        of_others = gradient.index_fill(0, own, 0.0)
        assert not of_others.any()  # to the last bit
        assert gradient.any() == (end - start > 1)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (
            "mamba",
            {},
            r"layers\.0.* of MambaForCausalLM has a recurrence or a convolution .* from one document",
        ),
        ("recurrent_gemma", {}, "has a recurrence or a convolution .*, which goes from one document of a row"),
        ("bart", {}, r"BartForCausalLM has learned positions \(.*\) and its forward takes none"),
        ("mixtral", {}, "MixtralForCausalLM has a loss of its routers that is of a whole text"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "its rotary tables"),
    ],
)
def test_what_goes_from_one_document_into_the_next_is_refused(family, changes, sentence):
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=rf"{sentence}.* choose another model"):
        length = 128 if family == "bart" else 512
        trace(build_model(config, torch.float32, "auto", length, documents_apart=True), sample_row(length, 4))


def test_rotary_tables_that_are_the_same_for_every_document_of_a_row_are_taken():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = small_config("llama", rope_parameters=rope, max_position_embeddings=512)
    trace(build_model(config, torch.float32, "auto", 512, documents_apart=True), sample_row(512, 4))


def test_a_kernel_that_does_not_keep_documents_apart_is_refused():
    model = build_model(small_config("llama"), torch.bfloat16, "cudnn", documents_apart=True)
    with pytest.raises(KernelError, match="it can't keep the documents of a row apart; choose auto or one of flash,"):
        trace(model, sample_row(32, 2))


# --- the price -------------------------------------------------------------------------------------------------------


def attention_op(length: int, n_documents: int = 0, **options) -> Op:
    shapes = {"query": (1, 4, length, 128), "key": (1, 2, length, 128), "value": (1, 2, length, 128)}
    inputs = tuple(Tensor(name, shape, torch.bfloat16, True) for name, shape in shapes.items())
    starts = Tensor("document_starts", (n_documents,), torch.int64, False, "host")
    apart = {"document_starts": starts} if n_documents else {}
    return Op(target_of(attention), inputs, {"scale": 1.0, **options, **apart}, (), "", None)


@pytest.mark.parametrize("window", [0, 100])
def test_attention_within_documents_is_priced_as_that_many_short_rows(window):
    """And each rank has as much of it, wherever its queries are: documents begin elsewhere in every row."""
    row, document = attention_op(4096, 8, window=window), attention_op(512, window=window)
    assert flops(row).forward == pytest.approx(8 * flops(document).forward)
    assert unmasked_flops(row) == pytest.approx(8 * unmasked_flops(document))
    for starts in ((0,), (3072,), (512, 3072)):
        part = flops_of_queries(row, starts, 1024 // len(starts))
        assert part.forward == pytest.approx(flops(row).forward / 4)
    assert not takes_blocks(row)  # FlashAttention has windows, where it is given the documents' lengths
    assert takes_blocks(attention_op(4096, 8, softcap=1.0))


def test_the_price_of_rows_is_that_of_documents_of_equal_length(tmp_path):
    """What attention computes of rows, pair by pair, against what the planner takes it to compute."""
    begins = [list(random_documents(512, seed)) for seed in range(40)]
    rows = pa.table({"input_ids": torch.zeros(40, 512).int().tolist(), "document_starts": begins})
    length = find_boundaries(str(tmp_path), rows, 512, None).length
    pairs = [sum(n * (n + 1) / 2 for n in torch.tensor([*own, 512]).diff().tolist()) for own in begins]
    assert 512 * (length + 1) / 2 == pytest.approx(sum(pairs) / 40)
