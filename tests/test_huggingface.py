"""A model is built, and its weights found, or one sentence says what this program can't do with it."""

import json

import pytest
import torch
from families import reference_model, small_config
from safetensors.torch import save_file

from longctx.errors import ModelError, NoWeights
from longctx.huggingface.build import build_model, load_config
from longctx.huggingface.weights import check_weights, find_weights, random_weights


def shapes_of(config) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in random_weights(config, seed=0)}


@pytest.fixture
def model_folder(tmp_path):
    """A small Llama's folder, weights included."""
    reference_model(small_config("llama")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_stored_weights_of_a_model_are_found_by_the_names_of_its_parameters(model_folder):
    config = load_config(str(model_folder))
    stored = find_weights(str(model_folder), config)
    assert set(stored) == set(shapes_of(config))
    check_weights(stored, shapes_of(config))


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


def test_a_model_without_weights_is_told_from_one_whose_weights_have_another_format(model_folder):
    config = load_config(str(model_folder))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(NoWeights, match="^it has no model.safetensors$"):
        find_weights(str(model_folder), config)
    (model_folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="^it has no model.safetensors; save it as safetensors first$") as error:
        find_weights(str(model_folder), config)
    assert error.type is ModelError  # no NoWeights: there are weights to start from


def test_a_missing_tensor_or_one_of_another_shape_is_refused_by_its_name(model_folder):
    config = load_config(str(model_folder))
    shapes = shapes_of(config)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(weights | {"model.norm.weight": torch.zeros(63)}, model_folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"^'model.norm.weight' has shape \[63\] in model.safetensors, and \[64\] by"):
        check_weights(find_weights(str(model_folder), config), shapes)
    del weights["model.norm.weight"]
    save_file(weights, model_folder / "model.safetensors")
    with pytest.raises(ModelError, match="^its weights have no tensor 'model.norm.weight' "):
        check_weights(find_weights(str(model_folder), config), shapes)


def test_random_weights_depend_on_the_seed_alone():
    config = small_config("llama")
    first, again, other = (dict(random_weights(config, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
