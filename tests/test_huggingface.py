"""A model is built, or one sentence says what this program can't do with it."""

import json

import pytest
import torch
from families import small_config

from longctx.errors import ModelError
from longctx.huggingface.build import build_model
from longctx.huggingface.configuration import load_config
from longctx.huggingface.weights import random_weights


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
