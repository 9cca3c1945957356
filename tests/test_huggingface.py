"""A model is built, or one sentence says what this program can't do with it."""

import json

import pytest
import torch
from families import small_config

from longctx.errors import ModelError
from longctx.huggingface.build import build_model
from longctx.huggingface.configuration import load_config
from longctx.huggingface.weights import load_tokenizer, random_weights


def test_a_folder_without_a_configuration_or_of_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="^no config.json there; name a Hugging Face model folder or a hub model$"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="^a 'vit' model is no causal language model$"):
        load_config(str(tmp_path))


def test_a_model_that_can_not_be_built_is_refused_as_one_that_transformers_can_not_build():
    config = small_config("llama")
    config.hidden_act = "no such function"
    with pytest.raises(ModelError, match="^transformers can't build a llama model from its configuration .*no such"):
        build_model(config, torch.float32)


def test_random_weights_depend_on_the_seed_alone():
    config = small_config("llama")
    first, again, other = (dict(random_weights(config, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_model_that_is_python_of_its_own_is_refused_and_nobody_is_asked_whether_to_run_it(tmp_path, monkeypatch):
    facts = {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    with pytest.raises(ModelError, match="^it is made of Python files of its own, which this program does not run"):
        load_config(str(tmp_path))
    facts = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()
