"""Every family of transformers' causal language models is trained as it is, or refused in a sentence."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from families import ALL_FAMILIES, tiny_config
from plans import Case, check_cases, trace_family
from survey import judge
from transformers.models.roformer import modeling_roformer

from longctx.errors import ModelError
from longctx.huggingface.build import build_model

ROFORMER_IS_CAUSAL = hasattr(modeling_roformer, "create_causal_mask")  # not in transformers 5.17
PAGE = Path(__file__).parent.parent / "docs" / "models.md"

# What a family has that others have not, so that each kind of trouble is met with every test.
KINDS = {
    "electra": "a head with a layer before its output embeddings, which takes another width than they do",
    "marian": "a table of positions that is not trained",
    "bart": "weights that the loss does not depend on",
    "hrm_text": "layers that are run more than once",
    "roformer": "a table of sines that is not trained, and attention that asks no registry",
    "gemma4_unified_text": "keys and values that a layer passes on, and an input of its own for each layer",
    "zamba2": "layers that share weights, and a list of modules within a layer",
    "cpmant": "tensors made of numbers in its forward",
    "gpt2": "weights that are transposed, learned positions, and an output class of its own",
}


def rows_of_the_page() -> dict[str, str]:
    """What docs/models.md says of each family."""
    return dict(re.findall(r"^\| ([\w.-]+) \| \w+ \| (\w+: .*) \|$", PAGE.read_text(), flags=re.MULTILINE))


def assert_right(cases: list[Case]) -> None:
    errors = check_cases(cases)
    for family in {case.family for case in cases}:
        row = judge(family, [error for case, error in errors.items() if case.family == family])
        assert row.result == "right", row


def test_the_page_has_every_family_of_this_transformers_and_none_is_wrong_or_without_a_sentence():
    rows = rows_of_the_page()
    if f"transformers {transformers.__version__} " in PAGE.read_text():
        assert sorted(rows) == ALL_FAMILIES
    assert {text.split(":")[0] for text in rows.values()} <= {"right", "refused"}
    assert sum(text.startswith("right:") for text in rows.values()) >= 70


def test_each_kind_of_family_is_right_on_two_ranks():
    families = [family for family in KINDS if family != "roformer" or ROFORMER_IS_CAUSAL]
    assert_right([Case(family, seed, 2, 2) for seed, family in enumerate(families)])


@pytest.mark.skipif(ROFORMER_IS_CAUSAL, reason="this transformers has a causal RoFormer")
def test_a_decoder_that_transformers_does_not_make_causal_is_refused():
    with pytest.raises(ModelError, match="an attention .* in which a token sees others than those before it"):
        trace_family("roformer")


def test_a_part_of_the_families_that_the_page_calls_right_is_right_on_four_ranks():
    right = [name for name, text in rows_of_the_page().items() if text.startswith("right:") and name in ALL_FAMILIES]
    assert_right([Case(family, seed, 4, 4) for seed, family in enumerate(right[:: len(right) // 2])])


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("xmod", "its forward takes numbers or shapes from the tokens"),
        ("reformer", "ReformerModelWithLMHead writes its own backward pass"),
    ],
)
def test_a_family_that_can_not_be_trained_is_refused_in_a_sentence(family, sentence):
    with pytest.raises(ModelError, match=f"^{sentence}.*; choose (another|a) model"):
        trace_family(family)


def test_a_family_with_a_table_of_attention_classes_of_its_own_is_built_with_its_eager_one():
    model = build_model(tiny_config("gptj"), torch.float32).model
    assert model.config._attn_implementation == "eager"
