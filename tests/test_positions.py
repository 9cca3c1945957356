"""Positions for rows longer than a model was made for: trained, saved, and the same again in transformers."""

import json
from typing import Any

import pytest
import torch
from families import random_rows, reference_loss, reference_model, small_config
from saved_rows import save_rows
from scripts import run_script
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import create_mini_model
from longctx.data import order
from longctx.engines.nnscaler.model import fill
from longctx.errors import ConfigurationError, UserError
from longctx.huggingface.attention import make_no_masks
from longctx.huggingface.build import build_model
from longctx.huggingface.changes import Changes
from longctx.huggingface.head import input_of_output_embeddings
from longctx.huggingface.overrides import change, remark
from longctx.huggingface.weights import random_weights, save_hf_files
from longctx.runtime.checkpoint import Checkpoint
from longctx.runtime.resume import changed_positions

MADE_FOR, LENGTH = 32, 64
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
YARN = {"rope_type": "yarn", "factor": 2.0}
CASES = {
    "llama by yarn": ("llama", {"rope_parameters": YARN}),
    "llama by a linear stretch": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "llama by dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama by llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama by theta": ("llama", {"rope_theta": 5e5}),
    "qwen3 by yarn and theta": ("qwen3", {"rope_parameters": YARN, "rope_theta": 1e6}),
    "gemma3 by theta": ("gemma3_text", {"rope_theta": 8e6}),
    "gemma3 by a linear stretch": ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}),
    "phi3 by longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "gpt_neox by yarn of a part": ("gpt_neox", {"rope_parameters": YARN}),
}


def small(family: str) -> PreTrainedConfig:
    of_family = {
        "phi3": {"original_max_position_embeddings": MADE_FOR},
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    }
    return small_config(family, max_position_embeddings=MADE_FOR, **of_family.get(family, {}))


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    head = model.get_output_embeddings()
    assert head is not None
    with torch.no_grad():
        return head(input_of_output_embeddings(model, tokens)[0])


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_from_pretrained_has_the_positions_that_were_trained_at_the_full_length(tmp_path, family, changes):
    config = change(small(family), Changes(**changes, sequence_length=LENGTH))
    trained = build_model(config, torch.float32, "eager", LENGTH).model.eval()
    fill(trained, random_weights(config, seed=0))
    make_no_masks()  # attention outside of a trace makes its own
    save_hf_files(str(tmp_path), config, tmp_path / "saved")
    again = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path / "saved"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    again.load_state_dict(trained.state_dict())
    tokens, _ = random_rows(2, LENGTH, 256)
    found, expected = logits(trained, tokens), again(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    unchanged = AutoModelForCausalLM.from_config(small(family), dtype=torch.float32, attn_implementation="eager").eval()
    unchanged.load_state_dict(trained.state_dict())
    assert (unchanged(tokens).logits - expected).abs().max() > 1e-4  # gpt_neox turns a quarter of each head


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_a_configuration_is_saved_for_the_length_that_was_trained_unless_that_would_change_its_frequencies(
    family, changes
):
    config = change(small(family), Changes(**changes, sequence_length=LENGTH))
    kinds = {config.rope_parameters.get("rope_type")}
    assert config.max_position_embeddings == (MADE_FOR if "dynamic" in kinds else LENGTH)
    if kinds & {"yarn", "llama3", "longrope"}:
        assert config.rope_parameters["original_max_position_embeddings"] == MADE_FOR


def test_rows_longer_than_a_model_was_made_for_leave_its_frequencies_as_they_are():
    config = small_config(
        "phi3",
        max_position_embeddings=MADE_FOR,
        original_max_position_embeddings=16,
        rope_parameters={**LONGROPE, "rope_theta": 1e4},
    )
    longer = change(config, Changes(sequence_length=LENGTH))
    assert longer.max_position_embeddings == LENGTH
    before, after = (build_model(each, torch.float32, "eager", LENGTH).model for each in (config, longer))
    scaling: list[Any] = [model.get_submodule("model.rotary_emb").attention_scaling for model in (before, after)]
    assert scaling[0] == scaling[1] > 1.0


def test_what_names_no_type_of_layer_is_for_the_layers_whose_attention_has_no_window():
    config = change(small("gemma3_text"), Changes(rope_theta=8e6))
    before = small("gemma3_text").rope_parameters
    assert config.rope_parameters["full_attention"]["rope_theta"] == 8e6
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    by_type = {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    config = change(small("gemma3_text"), Changes(rope_parameters=by_type))
    assert config.rope_parameters["sliding_attention"]["factor"] == 2.0
    assert config.rope_parameters["full_attention"] == before["full_attention"]


REFUSED = {
    "a type that transformers lacks": (
        {"rope_type": "nope"},
        None,
        'transformers has no rope_type "nope"; it has default',
    ),
    "no factor": ({"rope_type": "linear"}, None, "transformers refuses it: .*factor"),
    "a factor below 1": (
        {"rope_type": "dynamic", "factor": 0.5},
        None,
        "transformers warns of it: .*factor field must be",
    ),
    "a key that is none": ({**YARN, "factr": 2}, None, "transformers warns of it: Unrecognized keys .*factr"),
    "a factor that is too small": (
        {**YARN, "factor": 1.5},
        None,
        "a factor of 1.5 reaches 48 tokens, .* give 2 or more",
    ),
    "two thetas": ({**YARN, "rope_theta": 1e4}, 2e4, "rope_parameters have 10000.0; leave one of them out"),
    "types of layers": ({"full_attention": YARN}, None, "all layers of this model have one kind; leave the types out"),
}


@pytest.mark.parametrize(("parameters", "theta", "sentence"), REFUSED.values(), ids=REFUSED)
def test_positions_that_make_no_sense_are_refused(parameters, theta, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        change(small("llama"), Changes(parameters, theta, sequence_length=LENGTH))


def test_no_parameters_are_no_change():
    assert change(small("llama"), Changes({}, sequence_length=MADE_FOR)).to_dict() == small("llama").to_dict()


def test_a_model_without_rotary_embeddings_can_not_have_others():
    with pytest.raises(ConfigurationError, match="^a opt model has no rotary embeddings; leave it out$") as error:
        change(small("opt"), Changes(rope_theta=1e6))
    assert error.value.field == "rope_theta"


def test_other_values_of_a_configuration_are_read_by_the_type_of_the_old_ones():
    config = change(small("llama"), Changes(overrides=("attention_dropout=0.25", "tie_word_embeddings=true")))
    assert (config.attention_dropout, config.tie_word_embeddings) == (0.25, True)
    for pair, sentence in {
        "dropout=0.1": "'dropout=0.1': llama has no such key",
        "vocab_size": "'vocab_size': it has to be key=value",
        "vocab_size=many": "'vocab_size=many': invalid literal",
        "attention_dropout=7": "that gives attention_dropout 7.0, and a probability is between 0 and 1",
    }.items():
        with pytest.raises(ConfigurationError, match=f"^{sentence}"):
            change(small("llama"), Changes(overrides=(pair,)))


def test_one_line_says_that_rows_are_longer_than_the_model_was_made_for_or_what_extends_it(tmp_path):
    small("llama").save_pretrained(tmp_path)
    assert remark(str(tmp_path), Changes(sequence_length=MADE_FOR)) is None
    line = "positions: rows have 64 tokens, the model was made for 32, and nothing extends its positions"
    assert remark(str(tmp_path), Changes(sequence_length=LENGTH)) == line
    line = remark(str(tmp_path), Changes(YARN, sequence_length=LENGTH))
    assert line and line.startswith('positions: {"rope_type": "yarn",') and line.endswith("it was made for 32 tokens")
    small("opt").save_pretrained(tmp_path / "opt")
    assert remark(str(tmp_path / "opt"), Changes(sequence_length=MADE_FOR)) is None


def test_a_small_model_has_the_positions_that_it_is_made_with(tmp_path):
    small("llama").save_pretrained(tmp_path / "source")
    options = [
        "--model_id",
        str(tmp_path / "source"),
        "--num_hidden_layers",
        "1",
        "--rope_parameters",
        json.dumps(YARN),
    ]
    create_mini_model.main([*options, "--output_id", str(tmp_path / "mini")])
    config = AutoConfig.from_pretrained(tmp_path / "mini")
    assert config.max_position_embeddings == 64
    assert config.rope_parameters["original_max_position_embeddings"] == 32
    with pytest.raises(UserError, match="^--rope_theta 10000: rope_parameters have 5.0; leave one of them out$"):
        theta = ["--rope_parameters", json.dumps({**YARN, "rope_theta": 5.0}), "--rope_theta", "1e4"]
        create_mini_model.main([*options[:4], *theta, "--output_id", str(tmp_path / "other")])


def test_a_checkpoint_that_was_trained_with_other_positions_is_gone_on_from_with_a_line(tmp_path):
    config = small("llama")
    config.save_pretrained(tmp_path / "hf")
    checkpoint = Checkpoint(tmp_path, state=None)  # pyright: ignore[reportArgumentType]
    assert changed_positions(checkpoint, config.rope_parameters) is None
    other = change(config, Changes(rope_theta=5e5)).rope_parameters
    line = changed_positions(checkpoint, other)
    assert line and '"rope_theta": 10000.0' in line and line.endswith(f"with {json.dumps(other)} from here on")


def test_a_run_at_twice_the_length_merges_to_a_model_with_the_loss_that_it_had(tmp_path):
    reference_model(small("llama")).save_pretrained(tmp_path / "model")
    rows, _ = random_rows(8, LENGTH, 256)
    save_rows(tmp_path / "rows", rows)
    places = ["--model_id", "model", "--dataset_path", "rows", "--rope_parameters", json.dumps(YARN)]
    steps = ["--precision", "fp32", "--checkpoint_interval", "1", "--max_train_steps", "2", "--learning_rate", "1e-2"]
    result = run_script("train.py", *places, *steps, "--name", "run", "--engine", "torch", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'positions: {"rope_type": "yarn"' in result.stdout
    merge = ["--ckpt_dir", "checkpoints/0000-000001", "--hf_dir", "merged"]
    assert run_script("ckpt_merger.py", *merge, cwd=tmp_path).returncode == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    chosen = order.epoch_order(8, 0, 0)[4:8]
    tokens = rows[torch.as_tensor(chosen)]
    labels = torch.cat((tokens[:, 1:], torch.full((4, 1), -100)), dim=1)
    with torch.no_grad():
        loss = reference_loss(model, tokens, labels) / (labels != -100).sum()
    second = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert second["loss"] == pytest.approx(loss.item(), rel=1e-5)
