"""What a run starts from is what from_pretrained of transformers loads from the same folder, or the run is refused."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import config_of, random_rows, reference_loss, reference_model, small_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from saved_rows import save_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel

import ckpt_merger
import train
from longctx.errors import ModelError, NoWeights
from longctx.huggingface.configuration import load_config
from longctx.huggingface.weights import find_weights, remarks, save_hf_files, trained_config
from longctx.runtime import merge

# A family with a head of its own, one with a tied head, one with older names, and GPT-2, whose files have no prefix.
CONFIGS = {
    "llama": small_config("llama"),
    "qwen2": small_config("qwen2", tie_word_embeddings=True),
    "gpt_neox": small_config("gpt_neox"),
    "gpt2": transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4),
}
BLOCK = 32


@dataclass
class Folder:
    """How a model is stored."""

    family: str = "llama"
    tied: bool = False  # by config.json
    heads: str = "both"  # which of the embeddings and the head are stored: both, embeddings, head
    equal: bool = False  # whether they have the same values
    prefix: bool = True  # whether names have the base model's prefix
    form: str = "safetensors"  # or bin
    shards: int = 1
    stale: str | None = None  # other weights beside: an old index with its shards, or a .bin file
    dtype: torch.dtype = torch.float32
    quantized: bool = False  # to float8 by blocks
    changes: Mapping[str, torch.Tensor | None] = field(default_factory=dict)  # more tensors; None takes one away

    def write(self, path: Path) -> None:
        config = CONFIGS[self.family]
        config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": self.tied})
        if self.quantized:
            config.quantization_config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
        config.save_pretrained(path)
        if self.stale == "index":
            write_weights(path, {"model.norm.weight": torch.zeros(64)}, "safetensors", 2)
        elif self.stale == "bin":
            write_weights(path, {"model.norm.weight": torch.zeros(64)}, "bin", 1)
        write_weights(path, self.tensors(config), self.form, self.shards)

    def tensors(self, config) -> dict[str, torch.Tensor]:
        config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
        model = reference_model(config)
        embeddings, head = tied_names(model)
        tensors = {name: tensor.to(self.dtype) for name, tensor in model.state_dict().items()}
        if self.equal:
            tensors[head] = tensors[embeddings]
        if self.heads != "both":
            del tensors[head if self.heads == "embeddings" else embeddings]
        if self.quantized:
            tensors = quantized(tensors)
        tensors |= {name: tensor for name, tensor in self.changes.items() if tensor is not None}
        tensors = {name: tensor for name, tensor in tensors.items() if self.changes.get(name, tensor) is not None}
        prefix = "" if self.prefix else f"{model.base_model_prefix}."
        return {name.removeprefix(prefix): tensor.contiguous() for name, tensor in tensors.items()}


def tied_names(model: PreTrainedModel) -> tuple[str, str]:
    """The names of the weights of the embeddings and of the head."""
    modules = {module: name for name, module in model.named_modules()}
    return f"{modules[model.get_input_embeddings()]}.weight", f"{modules[model.get_output_embeddings()]}.weight"


def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers' matrices in float8, each block with a scale of its own."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            rows, columns = tensor.shape
            result[f"{name}_scale_inv"] = torch.rand(rows // BLOCK, columns // BLOCK).to(tensor.dtype)
            result[name] = tensor.to(torch.float8_e4m3fn)
    return result


def write_weights(path: Path, tensors: dict[str, torch.Tensor], form: str, shards: int) -> None:
    stem, save = {"safetensors": ("model", save_safetensors), "bin": ("pytorch_model", torch.save)}[form]
    if shards == 1:
        save(tensors, path / f"{stem}.{form}")
        return
    files = [f"{stem}-{i + 1:05}-of-{shards:05}.{form}" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, path / file)
    (path / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_safetensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def load_by_transformers(path: Path) -> Any:
    """The model in float32, and what transformers says of missing and unexpected tensors."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)


@pytest.fixture(autouse=True)
def fp8_without_accelerate(monkeypatch):
    """transformers asks for accelerate before it loads float8, and on a CPU does it without."""
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)


EXTRA = {
    "model.layers.7.mlp.up_proj.weight": torch.ones(2, 2),  # of a layer more than config.json has
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),  # which old files have
    "score.weight": torch.ones(2, 64),
}
FOLDERS = st.builds(
    Folder,
    family=st.sampled_from(list(CONFIGS)),
    tied=st.booleans(),
    heads=st.sampled_from(["both", "both", "embeddings", "head"]),
    equal=st.booleans(),
    prefix=st.booleans(),
    form=st.sampled_from(["safetensors", "bin"]),
    shards=st.sampled_from([1, 3]),
    stale=st.sampled_from([None, "index", "bin"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    quantized=st.booleans(),
    changes=st.lists(st.sampled_from(list(EXTRA))).map(lambda names: {name: EXTRA[name] for name in names}),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(folder=FOLDERS)
def test_every_parameter_is_filled_with_what_from_pretrained_fills_it_with_or_the_folder_is_refused(folder):
    assume(not (folder.form == "bin" and folder.quantized))
    with tempfile.TemporaryDirectory() as path:
        folder.write(Path(path))
        model, info = load_by_transformers(Path(path))
        if info["missing_keys"]:
            with pytest.raises(ModelError, match="^its weights have no tensor "):
                find_weights(path)
            return
        found = find_weights(path)
        expected = {name: parameter.float() for name, parameter in model.named_parameters()}
        assert set(found.by_parameter) == set(expected)
        for name, weight in found.by_parameter.items():
            assert torch.equal(weight.read().float(), expected[name]), name
        assert set(found.left_out) == set(info["unexpected_keys"])
        assert trained_config(path, random_init=False).tie_word_embeddings == model_is_tied(model)


def model_is_tied(model: PreTrainedModel) -> bool:
    embeddings, head = tied_names(model)
    return model.get_parameter(embeddings) is model.get_parameter(head)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_model_without_weights_is_told_from_one_whose_weights_can_not_be_read(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    with pytest.raises(NoWeights, match="^it has no model.safetensors or pytorch_model.bin$"):
        find_weights(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        ModelError, match="^pytorch_model.bin can't be read .*; save or download the model again$"
    ) as error:
        find_weights(str(tmp_path))
    assert error.type is ModelError  # no NoWeights: there are weights to start from


def test_a_file_of_pickled_code_is_not_run(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Path.cwd}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="^pytorch_model.bin can't be read "):
        find_weights(str(tmp_path))
    torch.save({"model.norm.weight": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="^pytorch_model.bin holds something else than tensors by name; save"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            torch.zeros(63),
            r"'model.norm.weight' has shape \[63\] in model.safetensors, and \[64\] by config.json; the two",
        ),
        (None, r"its weights have no tensor 'model.norm.weight' \(1 are missing of 21\); save the model again"),
        (
            torch.ones(64, dtype=torch.int8),
            "'model.norm.weight' is stored as int8 in model.safetensors, and this program",
        ),
        (torch.ones(64, dtype=torch.float64), "'model.norm.weight' is stored as float64 in model.safetensors"),
        (torch.ones(64).to(torch.float8_e5m2), "'model.norm.weight' is stored as float8_e5m2 in model.safetensors"),
    ],
)
def test_a_tensor_that_is_missing_or_can_not_be_the_parameter_is_refused_by_its_name(tmp_path, change, sentence):
    Folder(changes={"model.norm.weight": change}).write(tmp_path)
    with pytest.raises(ModelError, match=f"^{sentence}"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize(
    "facts",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"load_in_8bit": True},
    ],
)
def test_weights_that_are_quantized_in_other_ways_than_float8_by_blocks_are_refused(tmp_path, facts):
    Folder().write(tmp_path)
    change_config(tmp_path, quantization_config=facts)
    with pytest.raises(
        ModelError, match="^its weights are quantized by .*, and this program reads fp8 by blocks and no"
    ):
        find_weights(str(tmp_path))


def test_float8_that_no_configuration_describes_is_not_taken_for_plain_numbers(tmp_path):
    Folder(quantized=True).write(tmp_path)
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(ModelError, match="^'model.layers.0.*_proj.weight' is stored as float8_e4m3fn in"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (torch.ones(2, 3), r"\[2, 3\] scales of float32"),  # columns cut at the edge of the last block
        (torch.ones(1, 1), r"\[1, 1\] scales of float32"),  # blocks of another size than the configuration's
        (torch.ones(2, 2, dtype=torch.uint8), r"\[2, 2\] scales of uint8"),
    ],
)
def test_scales_that_transformers_and_the_configuration_take_in_two_ways_are_refused(tmp_path, scales, said):
    name = "model.layers.0.self_attn.o_proj.weight"
    Folder(quantized=True, changes={f"{name}_scale_inv": scales}).write(tmp_path)
    with pytest.raises(ModelError, match=rf"^{name!r} of shape \[64, 64\] has {said}, and this program"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_that_are_stored_one_by_one_are_read_as_transformers_joins_them(tmp_path, family):
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(tmp_path)
    weights, model = find_weights(str(tmp_path)), load_by_transformers(tmp_path)[0]
    assert not weights.left_out
    names = list(weights.by_parameter)
    assert any(name.endswith("e_score_correction_bias") for name in names) == (family == "deepseek_v3")
    for name, parameter in ((name, model.state_dict()[name]) for name in names):
        weight, place = weights.by_parameter[name], tuple(slice(n // 2, n) for n in parameter.shape)
        assert torch.equal(weight.read(), parameter) and torch.equal(weight.read(place), parameter[place]), name


def test_what_corrects_the_scores_of_a_router_is_read_trained_beside_and_exported_in_float32(tmp_path, monkeypatch):
    """Though all else is trained and exported in bfloat16."""
    monkeypatch.chdir(tmp_path)
    model = reference_model(config_of("deepseek_v3"))
    model.save_pretrained("model")
    change_config(tmp_path / "model", dtype="bfloat16")
    rows = save_rows(tmp_path / "rows", random_rows(4, 16, 256)[0])
    options = ["--model_id", "model", "--dataset_path", rows, "--hardware", "cpu", "--name", "run"]
    train.main([*options, "--run_mode", "compile"])
    train.main([*options, "--max_train_steps", "1", "--device", "cpu"])
    ckpt_merger.main(["--ckpt_dir", "checkpoints", "--output_fname", "merged.ckpt"])
    ckpt_merger.main(["--ckpt_dir", "merged.ckpt", "--hf_dir", "exported"])
    exported, info = load_by_transformers(tmp_path / "exported")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found, expected = exported.state_dict(), model.state_dict()
    corrections = [name for name in expected if name.endswith("e_score_correction_bias")]
    assert corrections and all(torch.equal(found[name], expected[name]) for name in corrections)
    with safe_open("exported/model.safetensors", "pt") as stored:
        kept = {name for name in stored.keys() if stored.get_tensor(name).dtype == torch.float32}  # noqa: SIM118
    assert kept == set(corrections)


def test_tensors_that_transformers_makes_of_several_in_another_way_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(config_of("mixtral")).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, it is no dict
    del tensors[next(name for name in tensors if name.endswith("experts.3.w1.weight"))]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="^'model.layers.* is made of several tensors in model.safetensors"):
        find_weights(str(tmp_path))


def change_config(path: Path, **changes) -> None:
    facts = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({name: fact for name, fact in facts.items() if fact is not None}))


# --- what is read, said and saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [(slice(0, 0), slice(0, 64)), (slice(5, 71), slice(31, 33)), (slice(None), slice(2, 9))]
)
def test_a_part_of_a_quantized_tensor_is_the_part_of_what_transformers_makes_of_all_of_it(tmp_path, place):
    Folder(quantized=True).write(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = find_weights(str(tmp_path)).by_parameter[name]
    assert weight.tensor.shape == (128, 64)
    assert torch.equal(weight.read(place), load_by_transformers(tmp_path)[0].get_parameter(name)[place].float())


def test_what_is_left_out_and_what_is_not_tied_is_said_in_a_line_each(tmp_path):
    Folder(tied=True, changes=EXTRA | {"score.bias": torch.ones(2), "z.weight": torch.ones(2)}).write(tmp_path)
    untied, left_out = remarks(find_weights(str(tmp_path)))
    assert untied.startswith("weights: config.json ties the head to the embeddings, but both are stored and differ")
    assert left_out == (
        "weights: 4 stored tensor(s) belong to no parameter and are left out: model.layers.7.mlp.up_proj.weight, "
        "score.bias, score.weight, ..."
    )
    Folder().write(tmp_path / "plain")
    assert remarks(find_weights(str(tmp_path / "plain"))) == []


def test_random_weights_are_drawn_for_the_model_that_the_configuration_describes(tmp_path):
    Folder(tied=True).write(tmp_path)
    assert trained_config(str(tmp_path), random_init=True).tie_word_embeddings
    assert not trained_config(str(tmp_path), random_init=False).tie_word_embeddings


def test_a_configuration_is_saved_without_the_quantization_of_the_weights_that_were_loaded(tmp_path):
    Folder(quantized=True).write(tmp_path / "model")
    config = load_config(str(tmp_path / "model"))
    save_hf_files(str(tmp_path / "model"), config, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.quantization_config["quant_method"] == "fp8"


def save_tokenizer_with_two_chat_templates(path: Path) -> dict[str, str]:
    """One of them is in a subfolder. Returns them."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(path)
    assert (path / "additional_chat_templates" / "tool_use.jinja").is_file()
    return tokenizer.chat_template


def test_files_of_subfolders_are_in_a_merged_file_by_their_paths(tmp_path):
    templates = save_tokenizer_with_two_chat_templates(tmp_path)
    CONFIGS["llama"].save_pretrained(tmp_path)
    saved = merge.hf_entry(lambda folder: save_hf_files(str(tmp_path), CONFIGS["llama"], folder))
    content = saved["additional_chat_templates/tool_use.jinja"].numpy().tobytes()
    assert content.decode() == templates["tool_use"]


def test_a_run_and_its_export_start_from_and_keep_the_head_that_config_json_says_is_tied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Folder(tied=True, quantized=True).write(tmp_path / "model")
    templates = save_tokenizer_with_two_chat_templates(tmp_path / "model")
    tokens, _ = random_rows(4, 16, 256)
    options = ["--model_id", "model", "--dataset_path", save_rows(tmp_path / "rows", tokens), "--precision", "fp32"]
    options += ["--hardware", "cpu", "--name", "run"]
    for mode in (["--run_mode", "compile"], ["--max_train_steps", "1", "--learning_rate", "1e-12"]):
        train.main([*options, *mode])
        assert capsys.readouterr().out.count("weights: config.json ties the head to the embeddings") == 1
    model, _ = load_by_transformers(tmp_path / "model")
    labels = torch.cat((tokens[:, 1:], torch.full((4, 1), -100)), dim=1)
    expected = reference_loss(model, tokens, labels) / (labels != -100).sum()
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text())
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    ckpt_merger.main(["--ckpt_dir", "checkpoints", "--output_fname", "merged.ckpt"])
    ckpt_merger.main(["--ckpt_dir", "merged.ckpt", "--hf_dir", "exported"])
    change_config(tmp_path / "exported", dtype="float32")
    exported, info = load_by_transformers(tmp_path / "exported")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not model_is_tied(exported)
    assert transformers.AutoTokenizer.from_pretrained("exported").chat_template == templates


def test_of_a_hub_model_bin_files_are_downloaded_only_if_there_are_no_safetensors(tmp_path, monkeypatch):
    asked = []

    def download(model_id: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(allow_patterns[0])
        return str(tmp_path / model_id)

    monkeypatch.setattr("longctx.huggingface.weights.snapshot_download", download)
    monkeypatch.setattr(
        "longctx.huggingface.weights.changed_config", lambda model_id, _: load_config(str(tmp_path / model_id))
    )
    for form in ("safetensors", "bin"):
        Folder(form=form).write(tmp_path / form)
        assert len(find_weights(form).by_parameter) == 21
    assert asked == ["*.safetensors", "*.safetensors", "pytorch_model*.bin"]
