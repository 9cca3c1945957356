"""create_mini_model.py writes a smaller model of the same architecture, or nothing, and then it says why."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scripts import run_script
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import create_mini_model
from longctx.errors import UserError

ROOT = Path(__file__).parent.parent
LLAMA3 = ROOT / "examples" / "llama3_8b_128k"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Runs create_mini_model.main in this process; returns the folder written."""

    def run_main(model_id, **options):
        given = {"model_id": model_id, "output_id": tmp_path / "mini"} | options
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["create_mini_model.py", *words])
        create_mini_model.main()
        return Path(given["output_id"])

    return run_main


@pytest.fixture
def source(tmp_path):
    """Writes a folder with a config.json: an architecture's defaults but for a small vocabulary and `values`."""

    def write(model_type, folder="source", **values):
        small = {"vocab_size": 300, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
        CONFIG_MAPPING[model_type](**(small | values)).save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return write


def shapes(folder) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def refused(make, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        make(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is made


def test_the_configuration_differs_from_the_sources_only_in_the_sizes_asked_for():
    full = create_mini_model.causal_lm_config(LLAMA3)
    mini = create_mini_model.mini_config(full, {"num_hidden_layers": 4})
    assert mini.to_dict() == full.to_dict() | {"num_hidden_layers": 4}


def test_the_weights_have_the_names_of_the_sources_and_the_sizes_asked_for(make):
    mini = make(LLAMA3, num_key_value_heads=2, num_hidden_layers=3, **SMALL)
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(LLAMA3)).state_dict()
    sizes = {4096: 64, 14336: 96, 128256: 128256, 1024: 2 * 16}
    expected = {name: [sizes[size] for size in tensor.shape] for name, tensor in full.items()}
    assert shapes(mini) == {name: shape for name, shape in expected.items() if layer_of(name) < 3}


def layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_the_mini_model_loads_in_transformers_in_the_dtype_asked_for(make, source, dtype):
    mini = make(source("llama", num_hidden_layers=8), dtype=dtype, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(mini)
    assert isinstance(model, PreTrainedModel)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert len(model.model.layers) == 4
    assert model(torch.arange(6).view(1, 6)).logits.isfinite().all()


def test_the_same_seed_gives_the_same_weights_byte_for_byte_and_another_seed_others(make, source, tmp_path):
    small = source("llama")
    seeds = {"a": 0, "b": 0, "c": 1}
    weights = [
        (make(small, output_id=tmp_path / name, seed=seed, **SMALL) / "model.safetensors").read_bytes()
        for name, seed in seeds.items()
    ]
    assert weights[0] == weights[1] != weights[2]


def test_tokenizer_and_generation_configuration_are_copied_and_weights_are_not_read(
    make, source, tmp_path, llama3_tokenizer_path, capsys
):
    folder = source("llama", vocab_size=128256)
    for file in llama3_tokenizer_path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": [128001, 128009]}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_text("not weights")
    mini = make(folder, **SMALL)
    copied = (file.name for file in llama3_tokenizer_path.iterdir())
    for name in (*copied, "generation_config.json", "additional_chat_templates/tool_use.jinja"):
        assert (mini / name).read_bytes() == (folder / name).read_bytes()
    text = "To be, or not to be"
    assert AutoTokenizer.from_pretrained(mini)(text) == AutoTokenizer.from_pretrained(llama3_tokenizer_path)(text)
    assert "with a tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "values", "layers"),
    [
        ("gemma2", {"num_hidden_layers": 6}, ["sliding_attention", "full_attention"] * 2),
        ("qwen3", {"num_hidden_layers": 6}, ["full_attention"] * 4),
        ("gemma3_text", {"num_hidden_layers": 12}, ["sliding_attention"] * 4),
    ],
)
def test_lists_with_an_entry_for_each_layer_are_cut_to_the_first_layers(
    make, source, capsys, model_type, values, layers
):
    mini = AutoConfig.from_pretrained(make(source(model_type, **values), num_key_value_heads=2, **SMALL))
    assert mini.layer_types == layers
    lost = "the source has full_attention layers too: to have them, ask for 6 layers or more"
    assert (lost in capsys.readouterr().out) == ("full_attention" not in layers)


@pytest.mark.parametrize(
    ("model_type", "head_dim", "expected"),
    [
        ("llama", None, 16),  # hidden_size / heads, though transformers writes it to config.json
        ("mistral", 200, 200),  # of its own, as Mistral Nemo's
        ("qwen3", 128, 128),  # of its own, though it happens to be hidden_size / heads
    ],
)
def test_head_dim_follows_hidden_size_unless_the_architecture_sets_it_apart(source, model_type, head_dim, expected):
    folder = source(model_type, head_dim=head_dim, hidden_size=4096, num_attention_heads=32)
    full = create_mini_model.causal_lm_config(folder)
    assert full.head_dim == (head_dim or 128)
    mini = create_mini_model.mini_config(full, {"num_hidden_layers": 4} | SMALL)
    assert mini.head_dim == expected


def test_key_value_heads_keep_their_share_of_the_heads_unless_asked_for():
    full = create_mini_model.causal_lm_config(LLAMA3)  # 32 heads, 8 of them key-value heads

    def key_value_heads(**sizes):
        return create_mini_model.mini_config(full, {"num_hidden_layers": 4} | sizes).num_key_value_heads

    assert key_value_heads(num_attention_heads=16) == 4
    assert key_value_heads(num_attention_heads=4) == 1
    assert key_value_heads(num_attention_heads=4, num_key_value_heads=2) == 2
    with pytest.raises(UserError, match="can't keep the source's 4 heads to a key-value head"):
        key_value_heads(num_attention_heads=2)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "phi", "mixtral", "gemma3"])
def test_sizes_are_set_in_architectures_that_have_other_names_for_them(make, source, model_type):
    inner = {"text_config": {"vocab_size": 300, "pad_token_id": 0}} if model_type == "gemma3" else {}
    mini = AutoConfig.from_pretrained(make(source(model_type, **inner), num_hidden_layers=2, **SMALL))
    found = (mini.num_hidden_layers, mini.hidden_size, mini.num_attention_heads)
    assert found == (2, 64, 4)
    assert 96 in mini.to_dict().values()


def test_the_mini_model_of_a_quantized_source_is_not_quantized(make, source):
    folder = source("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    written = json.loads((make(folder, **SMALL) / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & written.keys()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {"num_hidden_layers": st.integers(1, 3)},
        optional={
            "hidden_size": st.integers(1, 48),
            "intermediate_size": st.integers(1, 48),
            "num_attention_heads": st.integers(1, 8),
            "num_key_value_heads": st.integers(1, 8),
        },
    )
)
def test_sizes_are_refused_exactly_where_no_model_can_have_them(sizes):
    full = LlamaConfig(
        vocab_size=50, hidden_size=48, num_attention_heads=8, num_key_value_heads=4, intermediate_size=48
    )
    heads, hidden = sizes.get("num_attention_heads", 8), sizes.get("hidden_size", 48)
    kv_heads = sizes.get("num_key_value_heads", heads / 2)
    possible = hidden % heads == 0 and hidden // heads % 2 == 0 and kv_heads % 1 == 0 and heads % kv_heads == 0
    try:
        config = create_mini_model.mini_config(full, sizes)
        model = create_mini_model.random_model(config, 0, torch.float32)
    except UserError:
        assert not possible
        return
    assert possible
    assert {name: getattr(model.config, name) for name in sizes} == sizes


# What is refused


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"hidden_size": 250}, "hidden_size 250 is not a multiple of num_attention_heads 32"),
        ({"num_key_value_heads": 3}, "num_attention_heads 32 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 96}, "each head has 3 dimensions to turn, an odd number"),
        ({"num_hidden_layers": 0}, "--num_hidden_layers 0: it has to be a whole number from 1 to 1000"),
        ({"intermediate_size": -1}, "--intermediate_size -1: it has to be a whole number from 1 to 1048576"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused_with_the_reason(make, tmp_path, sizes, reason):
    assert reason in refused(make, LLAMA3, **sizes)
    assert not list(tmp_path.iterdir())


def test_sizes_that_an_architecture_cannot_have_are_refused_with_the_reason(make, source):
    assert "gpt2 has no such size" in refused(make, source("gpt2"), num_key_value_heads=2)
    more = refused(make, source("gemma2", num_hidden_layers=6), num_hidden_layers=7)
    assert more == "--num_hidden_layers 7: the source's layer_types names only 6 layers"
    assert "gptj doesn't run with these sizes" in refused(make, source("gptj", "turns"), **SMALL)  # its rotary_dim


def test_a_source_that_cannot_be_used_is_refused_with_the_reason(make, source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    encoder = source("bert", "encoder", architectures=["BertForMaskedLM"])
    t5 = tmp_path / "t5"
    CONFIG_MAPPING["t5"]().save_pretrained(t5)
    (tmp_path / "own_code").mkdir()
    own_code = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "own_code" / "config.json").write_text(json.dumps(own_code))
    assert "./absent: there is no such folder" in refused(make, "./absent")
    assert "empty: there is no config.json in it" in refused(make, tmp_path / "empty")
    assert "broken: its config.json can't be read" in refused(make, tmp_path / "broken")
    assert "own_code: its config.json can't be used" in refused(make, tmp_path / "own_code")
    assert "encoder: BertForMaskedLM is not a causal language model" in refused(make, encoder)
    assert "t5: t5 is not a causal language model" in refused(make, t5)
    assert "empty: it is there already" in refused(make, LLAMA3, output_id=tmp_path / "empty")
    in_a_file = tmp_path / "broken" / "config.json" / "mini"
    assert f"--output_id {in_a_file}: {in_a_file.parent} is no folder" in refused(make, LLAMA3, output_id=in_a_file)

    def no_network(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(create_mini_model.huggingface_hub, "snapshot_download", no_network)
    assert "no such folder, and no model from the hub: no route to host" in refused(make, "someone/some")


def test_a_model_of_the_hub_is_made_from_its_files_without_its_weights(make, source, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(source("llama"))

    monkeypatch.setattr(create_mini_model.huggingface_hub, "snapshot_download", snapshot_download)
    make("someone/some", **SMALL)
    [(name, patterns)] = asked
    assert name == "someone/some"
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in patterns)


def test_a_run_that_is_interrupted_leaves_no_files(make, source, monkeypatch, tmp_path):
    folder = source("llama")
    save = PreTrainedModel.save_pretrained

    def cut_short(model, output, **options):
        save(model, output, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make(folder, **SMALL)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_wrong_command_line_ends_with_status_2_and_one_line(tmp_path):
    options = ["--model_id", LLAMA3, "--output_id", tmp_path / "mini"]
    done = run_script("create_mini_model.py", *options, "--hidden_size", "64", "--num_attention_heads", "5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("create_mini_model.py: error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
