"""A wrong command line ends in one sentence that names the option, and exit status 2, before any rank starts."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from families import config_of, reference_model, small_config
from safetensors.torch import load_file, save_file
from saved_rows import save_rows
from scripts import run_script

import ckpt_merger
import train
from longctx.data.rows import load_row, open_dataset
from longctx.engines.table import ENGINES
from longctx.errors import UserError
from longctx.options import parse_job

ROOT = Path(__file__).parent.parent


def save_random_rows(folder: Path, rows: int = 4, length: int = 16, high: int = 256) -> str:
    return save_rows(folder, torch.randint(0, high, (rows, length)))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A trained checkpoint, its model and its rows."""
    folder = tmp_path_factory.mktemp("job")
    reference_model(small_config("llama")).save_pretrained(folder / "model")
    save_random_rows(folder / "rows")
    run_script("train.py", *arguments(folder), "--max_train_steps", "1").check_returncode()
    return folder


def arguments(job: Path, **changes) -> list[str]:
    """train.py's arguments for the job, some changed, or left out if None."""
    options = {
        "model_id": job / "model",
        "dataset_path": job / "rows",
        "compiled_dir": job / "compiled",
        "checkpoint_dir": job / "checkpoints",
        "log_dir": job / "runs",
        "precision": "fp32",
        **changes,
    }
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def refused(job: Path, sentence: str, **changes) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        train.main(arguments(job, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sentence", "changes"),
    [
        ("--runtime_ngpus 3: it has to be a multiple of --plan_ngpus 2", {"plan_ngpus": 2, "runtime_ngpus": 3}),
        ("--runtime_ngpus 2: there are 1 processes; start with torchrun --nproc_per_node=2", {"runtime_ngpus": 2}),
        ("--plan_ngpus 0: it has to be a whole number from 1 to 131072", {"plan_ngpus": 0}),
        ("--plan_ngpus 1000000: it has to be a whole number from 1 to 131072", {"plan_ngpus": 1_000_000}),
        ("--max_train_steps 0: it has to be a whole number from 1", {"max_train_steps": 0}),
        ("--learning_rate -1: it has to be a number above 0", {"learning_rate": -1}),
        ("--learning_rate nan: it has to be a number above 0", {"learning_rate": "nan"}),
        ("--learning_rate inf: it has to be a number above 0", {"learning_rate": "inf"}),
        ("--warmup_steps -1: it has to be a whole number from 0", {"warmup_steps": -1}),
        ("--seed 18446744073709551616: it has to be a whole number from 0 to 4294967295", {"seed": 2**64}),
        ("--sequence_length 9223372036854775808: it has to be a whole number", {"sequence_length": 2**63}),
        ("--run_mode fly: it has to be one of compile, run, rehearse", {"run_mode": "fly"}),
        ("unrecognized arguments: --speed 9; --help lists the options", {"speed": 9}),
        ("--name x{256}: it is too long: 255 bytes", {"name": "x" * 256}),
        (r"--model_id a.x00b: it has a control character in it", {"model_id": "a\0b"}),
        ("--dataset_path: it is missing; make rows", {"dataset_path": None}),
        ("--dataset_path: it is missing; give it, or --seq", {"dataset_path": None, "run_mode": "compile"}),
        ("--dataset_path nowhere: no such folder; make it with bookcorpus.py", {"dataset_path": "nowhere"}),
        ("--dataset_path .*: it is no dataset that bookcorpus.py wrote", {"dataset_path": ROOT / "examples"}),
        ("--sequence_length 32: the rows of --dataset_path .* have 16 tokens", {"sequence_length": 32}),
        ("--model_id ./nowhere: no config.json there", {"model_id": "./nowhere"}),
        (
            "--model_id .*: it has no model.safetensors or pytorch_model.bin; pass --random_init",
            {"model_id": ROOT / "examples" / "llama3_8b_128k", "checkpoint_dir": "none_yet"},
        ),
        ("--resume_path nowhere: there is no such file or folder", {"resume_path": "nowhere"}),
        ("--resume_path .*examples: it has no checkpoint in it", {"resume_path": ROOT / "examples"}),
        ("--resume_path .*: it is no merged checkpoint", {"resume_path": ROOT / "README.md"}),
        (
            "--attn_implementation flash_attention_2: the package flash-attn",
            {"attn_implementation": "flash_attention_2"},
        ),
    ],
)
def test_an_option_that_can_not_be_used_is_refused_in_one_sentence_that_names_it(job, tmp_path, sentence, changes):
    refused(job, sentence, **{"compiled_dir": tmp_path, **changes})
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("name", ["data", "../data", ".", "..", "{absolute}/data", "data/inner"])
def test_a_folder_of_the_users_is_never_replaced_by_a_compiled_one(job, tmp_path, name):
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    kept = [tmp_path / "data" / "thesis.tex", tmp_path / "here" / "data" / "plan.json", tmp_path / "here/data/notes"]
    for file in kept:
        file.write_text("years of work")
    ask = {"run_mode": "compile", "dataset_path": None, "sequence_length": 16, "compiled_dir": tmp_path / "here"}
    sentence = "--compiled_dir .*; name another folder, or another --name|--name .*plain name"
    refused(job, sentence, name=name.format(absolute=tmp_path), **ask)
    assert [file.read_text() for file in kept] == ["years of work"] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "here"]


def test_places_of_checkpoints_are_checked_in_no_time_however_many_there_will_be(job, tmp_path):
    kept = tmp_path / "checkpoints" / "0002-000002" / "thesis.tex"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    ask = {"checkpoint_interval": 1, "max_epochs": 2_000_000_000, "checkpoint_dir": tmp_path / "checkpoints"}
    refused(job, "--checkpoint_dir .*: .*/0002-000002 has the name of a checkpoint", **ask)


def test_a_folder_of_the_users_is_never_replaced_by_a_checkpoint(job, tmp_path):
    kept = tmp_path / "checkpoints" / "0002-000002" / "thesis.tex"  # after the last of two steps, each of them an epoch
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    fresh = {"compiled_dir": tmp_path / "compiled", "checkpoint_dir": tmp_path / "checkpoints"}
    sentence = "this run would save, but this program did not write it; move it, or name another folder$"
    refused(job, f"--checkpoint_dir .*: .*/0002-000002 has the name of a checkpoint that {sentence}", **fresh)
    assert kept.read_text() == "years of work"
    assert not (tmp_path / "compiled").exists()


def test_folders_that_no_checkpoint_of_the_run_would_replace_do_not_keep_it_from_training(job, tmp_path):
    shutil.copytree(job / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    shutil.copytree(tmp_path / "checkpoints" / "0001-000001", tmp_path / "checkpoints" / "0002-000002")
    (tmp_path / "checkpoints" / "0002-000002" / "checkpoint.json").unlink()  # of this program's, and damaged
    kept = tmp_path / "checkpoints" / "0001-000500" / "thesis.tex"
    kept.parent.mkdir()
    kept.write_text("years of work")
    train.main(arguments(job, checkpoint_dir=tmp_path / "checkpoints", log_dir=tmp_path / "runs"))
    assert kept.read_text() == "years of work"
    assert (tmp_path / "checkpoints" / "last" / "checkpoint.json").is_file()
    assert os.readlink(tmp_path / "checkpoints" / "last") == "0002-000002"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_called_last_and_is_no_link_is_refused_before_the_first_checkpoint(job, tmp_path, make):
    (tmp_path / "checkpoints").mkdir()
    make(tmp_path / "checkpoints" / "last")
    fresh = {"compiled_dir": tmp_path / "compiled", "checkpoint_dir": tmp_path / "checkpoints"}
    refused(job, "--checkpoint_dir .*: .*/last is no link to a checkpoint, as this program makes it; move it", **fresh)
    assert not (tmp_path / "compiled").exists()


def test_a_resumed_run_never_drops_lines_of_the_users_from_metrics_jsonl(job, tmp_path):
    notes = tmp_path / "runs" / "mine" / "metrics.jsonl"
    notes.parent.mkdir(parents=True)
    notes.write_text("years of work\n")
    ask = {"name": "mine", "log_dir": tmp_path / "runs", "compiled_dir": tmp_path / "compiled", "max_train_steps": 2}
    refused(
        job, "--log_dir .*: line 1 of .*/metrics.jsonl is not one that a run wrote, and resuming would lose it", **ask
    )
    assert notes.read_text() == "years of work\n"
    assert not (tmp_path / "compiled").exists()


def test_ranks_that_could_share_no_work_are_refused_with_what_would_work(job, tmp_path):
    ask = {"run_mode": "compile", "dataset_path": None, "sequence_length": 31, "compiled_dir": tmp_path}
    sentence = "--plan_ngpus 7: it divides neither the rows' 31 tokens nor the heads .*; choose one of 2, 4, 8"
    refused(job, sentence, plan_ngpus=7, runtime_ngpus=7, **ask)


def test_a_plan_that_can_not_fit_is_refused_with_what_is_missing(job, tmp_path):
    ask = {"run_mode": "compile", "dataset_path": None, "sequence_length": 64, "compiled_dir": tmp_path}
    sentence = r"--gpu_mem_constraint 0.001: the leanest plan needs 0\.1 GB a GPU; raise it by 0\.1"
    refused(job, sentence, gpu_mem_constraint=0.001, **ask)
    refused(job, "--hardware abacus: it is neither a profile's file nor one of a100", hardware="abacus", **ask)
    refused(job, "--plan nowhere: it is no plan.json that compile wrote", plan="nowhere", **ask)


def test_a_memory_limit_beyond_what_the_gpu_has_is_refused(job, tmp_path):
    ask = {"run_mode": "compile", "dataset_path": None, "sequence_length": 64, "compiled_dir": tmp_path}
    sentence = r"--gpu_mem_constraint 100: the h100 that the plan is for has 80 GB; choose less"
    refused(job, sentence, gpu_mem_constraint=100, hardware="h100", **ask)


def test_layers_to_recompute_that_the_model_does_not_have_are_refused(job, tmp_path):
    ask = {"run_mode": "compile", "dataset_path": None, "sequence_length": 64, "compiled_dir": tmp_path}
    refused(job, "--recompute_modules MLP: MLP is no layer of LlamaForCausalLM", recompute_modules="MLP", **ask)


def test_a_plans_partitions_are_taken_again_at_another_length(job, tmp_path):
    ask = {"run_mode": "compile", "dataset_path": None, "compiled_dir": tmp_path, "plan_ngpus": 2, "runtime_ngpus": 2}
    train.main(arguments(job, sequence_length=64, name="first", **ask))
    decisions = json.loads((tmp_path / "first" / "plan.json").read_text())["decisions"]
    train.main(arguments(job, sequence_length=128, name="second", plan=tmp_path / "first" / "plan.json", **ask))
    again = json.loads((tmp_path / "second" / "plan.json").read_text())["decisions"]
    assert again | {"recompute": decisions["recompute"]} == decisions  # what is recomputed depends on the length
    decisions["ops"]["LlamaDecoderLayer"][0][1] = "*1"  # the first norm, along the sequence
    (tmp_path / "edited.json").write_text(json.dumps({"decisions": decisions}))
    sentence = r"--plan .*/edited.json: it splits input_layernorm's rms_norm along '\*1', which 2 ranks can't share"
    refused(job, sentence, sequence_length=33, name="third", plan=tmp_path / "edited.json", **ask)


@pytest.mark.parametrize("mode", ["run", "compile"])
@pytest.mark.parametrize("option", ["compiled_dir", "checkpoint_dir", "log_dir"])
def test_a_folder_that_can_not_be_written_to_is_refused_before_anything_is_done(
    job, tmp_path, monkeypatch, option, mode
):
    (tmp_path / "file").write_text("")
    places = {name: tmp_path / name for name in ("compiled_dir", "checkpoint_dir", "log_dir")}
    compiled = []
    engine = replace(ENGINES["torch"], ensure_compiled=lambda *args: compiled.append(args))
    monkeypatch.setitem(ENGINES, "torch", engine)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")  # root may do everything
    (tmp_path / "locked").mkdir()
    for place, problem in (
        (tmp_path / "file", "file is no folder"),
        (tmp_path / "file" / "in", "file is no folder"),
        (tmp_path / "locked" / "in", "locked can't be written to"),
    ):
        ask = {"run_mode": mode, **places, option: place}
        if mode == "compile" and option != "compiled_dir":  # it writes nothing there
            train.main(arguments(job, **ask))
            assert compiled.pop()
        else:
            refused(job, f"--{option} {place}: .*{problem}; name another folder", **ask)
            assert not compiled


def test_a_compiled_folder_that_is_up_to_date_may_hold_files_of_others(job, tmp_path, capsys):
    ask = {"run_mode": "compile", "compiled_dir": tmp_path}
    train.main(arguments(job, name="mine", **ask))
    (tmp_path / "mine" / ".nfs0001").write_text("")
    train.main(arguments(job, name="mine", **ask))
    assert "mine is up to date, reusing it" in capsys.readouterr().out
    sentence = (
        "--compiled_dir .*/mine: it is there already, and holds '.nfs0001', which this program did not write; name"
    )
    refused(job, sentence, name="mine", **{**ask, "precision": "bf16"})


def test_an_option_whose_text_is_empty_counts_as_not_given(job, tmp_path):
    ask = {"run_mode": "compile", "compiled_dir": tmp_path, "sequence_length": 16, "dataset_path": ""}
    empty = dict.fromkeys(("name", "resume_path", "hardware", "plan"), "")
    train.main(arguments(job, **ask, **empty))
    assert (tmp_path / "model-16-1of1" / "plan.json").is_file()
    refused(job, "--dataset_path: it is missing; make rows", dataset_path="")


def test_wrong_ranks_are_refused_before_the_rows_are_opened(job, tmp_path):
    refused(job, "--runtime_ngpus 2: there are 1 processes", runtime_ngpus=2, dataset_path="nowhere")


def test_a_compiled_folder_that_is_up_to_date_may_be_read_only(job, tmp_path, monkeypatch):
    ask = {"run_mode": "compile", "compiled_dir": tmp_path / "compiled"}
    train.main(arguments(job, **ask))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    train.main(arguments(job, **ask))


def test_rows_of_something_else_are_refused(job, tmp_path):
    refused(
        job,
        "it has no rows of 'input_ids'",
        dataset_path=save_rows(tmp_path / "text", torch.ones(2, 16), column="text"),
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["a b", "c d"], "its 'input_ids' are of type string, not lists of token ids; make it with bookcorpus.py"),
        ([["a"] * 16], "its 'input_ids' are of type list<.*string>, not lists of token ids"),
        ([[0.5] * 16], "its 'input_ids' are of type list<.*double>, not lists of token ids"),
        ([3, 4], "its 'input_ids' are of type int64, not lists of token ids"),
        ([[1] * 16, [1] * 16, [1] * 15], "row 2 has 15 tokens and row 0 has 16, and the plan is compiled for one"),
        ([[1] * 16, []], "row 1 has 0 tokens and row 0 has 16"),
        ([[1] * 16, None], "row 1 has 0 tokens and row 0 has 16"),
        ([[], []], "its 'input_ids' are of type list<.*null>, not lists of token ids"),
        ([[1], [2]], "its rows have 1 tokens, and it takes 2 to predict one"),
    ],
)
def test_rows_that_no_plan_fits_are_refused_before_it_is_made(job, tmp_path, rows, sentence):
    save_rows(tmp_path / "rows", rows)
    ask = {"dataset_path": tmp_path / "rows", "compiled_dir": tmp_path / "compiled"}
    refused(job, f"--dataset_path .*: {sentence}", checkpoint_dir=tmp_path / "checkpoints", **ask)
    assert os.listdir(tmp_path) == ["rows"]


@pytest.mark.parametrize("kind", [pa.large_list(pa.int64()), pa.list_(pa.int16(), 16)])
def test_rows_may_be_lists_of_any_arrow_kind_in_any_number_of_files(tmp_path, kind):
    rows = torch.randint(0, 256, (6, 16)).tolist()
    opened = open_dataset(save_rows(tmp_path / "rows", rows, kind, n_files=3))
    assert [load_row(opened, row, 16, 256)[0][0].tolist() for row in range(6)] == rows


@pytest.mark.parametrize("content", ["{", "3"])
def test_a_damaged_corpus_json_is_refused(job, tmp_path, content):
    path = save_random_rows(tmp_path / "rows")
    (tmp_path / "rows" / "corpus.json").write_text(content)
    refused(job, "--dataset_path .*: its file corpus.json is damaged .*; make it again", dataset_path=path)


def test_rows_with_a_token_that_only_their_tokenizer_has_are_refused(job, tmp_path):
    path = save_random_rows(tmp_path / "rows")
    facts = {"vocab_size": 300, "largest_token": 299, "tokenizer": "other"}
    (tmp_path / "rows" / "corpus.json").write_text(json.dumps(facts))
    refused(job, "its tokenizer other has 300 entries and the model's vocabulary 256", dataset_path=path)


def test_a_token_that_the_model_does_not_know_is_refused(job, tmp_path):
    path = save_random_rows(tmp_path / "rows", high=10_000)
    places = {name: tmp_path / name for name in ("compiled_dir", "checkpoint_dir", "log_dir")}
    refused(job, "row . has token .*vocabulary has 256", dataset_path=path, **places)
    assert os.listdir(tmp_path) == ["rows"]


@pytest.mark.parametrize("option", ["checkpoint_dir", "resume_path"])
def test_a_checkpoint_of_another_model_is_refused(job, tmp_path, option):
    reference_model(small_config("llama", intermediate_size=96)).save_pretrained(tmp_path / "model")
    sentence = f"--{option} .*: it is a checkpoint of another model"
    places = {name: tmp_path / name for name in ("compiled_dir", "checkpoint_dir", "log_dir")}
    refused(job, sentence, model_id=tmp_path / "model", **{**places, option: job / "checkpoints"})
    assert os.listdir(tmp_path) == ["model"]


def test_a_run_goes_on_only_with_its_own_order_of_rows(job, tmp_path):
    refused(job, "--seed 1: .*checkpoints/0001-000001 is of a run with seed 0, .*; take seed 0", seed=1)
    rows = save_random_rows(tmp_path / "rows", rows=5)
    refused(job, "--dataset_path .*: it has 5 rows and the run of .*/0001-000001 had 4", dataset_path=rows)


def test_a_checkpoint_that_was_cut_short_is_refused(job, tmp_path):
    shutil.copytree(job / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    shard = next(tmp_path.rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    sentence = (
        r"--checkpoint_dir .*: the checkpoint 0001-000001 is not whole: its file __0_0.distcp has \d+ bytes instead of"
    )
    refused(job, sentence, checkpoint_dir=shard.parent.parent)
    shard.unlink()
    refused(job, "its file __0_0.distcp is missing", checkpoint_dir=shard.parent.parent)


def test_weights_that_do_not_fit_the_configuration_are_refused(job, tmp_path):
    shutil.copytree(job / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    fresh = {"model_id": tmp_path / "model", "checkpoint_dir": tmp_path / "checkpoints"}
    refused(job, r"'model.norm.weight' has shape \[63\] in model.safetensors, and \[64\] by config.json", **fresh)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    refused(job, "its weights have no tensor 'model.norm.weight'", **fresh)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b"no weights"),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b'{"weight_map": {"model.norm.weight": 3}}'),
    ],
)
def test_weights_that_can_not_be_read_are_refused(job, tmp_path, name, content):
    shutil.copytree(job / "model", tmp_path / "model")
    file = tmp_path / "model" / name
    weights = tmp_path / "model" / "model.safetensors"
    if file != weights:  # a single file goes before an index
        weights.unlink()
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    fresh = {"model_id": tmp_path / "model", "checkpoint_dir": tmp_path / "checkpoints"}
    refused(job, f"--model_id .*: {name} can't be read .*; save or download the model again", **fresh)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "abc"}, "hidden_size"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "64. is not a multiple of the number of attention heads",
        ),
        ({"num_attention_heads": 0}, "by zero"),
    ],
)
def test_a_configuration_that_can_not_be_is_refused(job, tmp_path, changes, reason):
    shutil.copytree(job / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    sentence = f"--model_id .*: its configuration can't be loaded: .*{reason}"
    refused(job, sentence, model_id=tmp_path / "model")


def test_a_model_that_is_no_causal_language_model_is_refused(job, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(job, "a 'vit' model is no causal language model", model_id=tmp_path)


def test_a_run_is_named_after_its_models_folder_also_where_that_is_named_by_a_dot(job, monkeypatch):
    monkeypatch.chdir(job / "model")
    for model_id in (".", "../model", str(job / "model"), "../model/../model/"):
        options = ["--run_mode", "compile", "--model_id", model_id, "--sequence_length", "16"]
        assert parse_job(options).name == "model-16-1of1"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_training(job, tmp_path, poison):
    shutil.copytree(job / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = poison
    save_file(weights, tmp_path / "model" / "model.safetensors")
    sentence = "--model_id .*: 'model.norm.weight' has a NaN or an infinity in its stored weights; download the model"
    refused(job, sentence, model_id=tmp_path / "model", checkpoint_dir=tmp_path / "checkpoints")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(job, tmp_path):
    shutil.copytree(job / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    save_file(weights, tmp_path / "model" / "model.safetensors")
    sentence = r"step 1: the loss .* not finite, on rows (\d, ){3}\d of the dataset; the last checkpoint is kept"
    refused(job, sentence, model_id=tmp_path / "model", checkpoint_dir=tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("sentence", "options"),
    [
        ("--output_fname: it is missing", {}),
        ("--ckpt_dir .*nowhere: there is no such folder", {"ckpt_dir": "nowhere", "output_fname": "m.ckpt"}),
        ("--ckpt_dir .*model: it has no checkpoint in it", {"ckpt_dir": "model", "output_fname": "m.ckpt"}),
        ("--hf_dir .*: it is there already", {"hf_dir": "model"}),
        ("--hf_dir .*: .*config.json is no folder; choose another name", {"hf_dir": "model/config.json/hf"}),
        ("--output_fname .*: .*config.json is no folder", {"output_fname": "model/config.json/merged"}),
        ("--output_fname .*: it is there already", {"output_fname": "model/config.json"}),
        ("--output_fname .*: it is there already", {"output_fname": "link_to_nothing"}),
        ("--hf_dir .*: it is there already", {"hf_dir": "link_to_nothing"}),
    ],
)
def test_ckpt_merger_refuses_an_option_that_can_not_be_used_in_one_sentence(job, sentence, options):
    options = {"ckpt_dir": "checkpoints", **options}
    (job / "link_to_nothing").unlink(missing_ok=True)
    (job / "link_to_nothing").symlink_to("nowhere")
    with pytest.raises(UserError, match=sentence):
        ckpt_merger.main([word for k, v in options.items() for word in (f"--{k}", str(job / v))])


def test_a_refused_command_ends_with_status_2_and_one_line_on_stderr_and_no_traceback(job):
    result = run_script("train.py", *arguments(job, dataset_path="nowhere"))
    assert result.returncode == 2
    assert result.stderr == "train.py: error: --dataset_path nowhere: no such folder; make it with bookcorpus.py\n"
    assert result.stdout == ""


def test_under_torchrun_only_one_rank_prints_why_a_command_is_refused(job):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, str(ROOT / "train.py"), *arguments(job, plan_ngpus=3, runtime_ngpus=3)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stderr.count("train.py: error:") == 1
    assert "exitcode  : 2" in result.stderr
    assert "init_process_group" not in result.stderr


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_model_whose_text_part_has_the_vocabulary_is_compiled_for_rows_and_takes_a_step(family, tmp_path):
    config_of(family).save_pretrained(tmp_path / "model")
    save_random_rows(tmp_path / "rows")
    places = {"checkpoint_dir": tmp_path / "checkpoints", "log_dir": tmp_path / "runs", "name": "composite"}
    ask = {**places, "random_init": True, "hardware": "cpu", "sequence_length": 16}
    train.main(arguments(tmp_path, **ask, run_mode="compile"))
    train.main(arguments(tmp_path, **ask, max_train_steps=1))
    assert len((tmp_path / "runs" / "composite" / "metrics.jsonl").read_text().splitlines()) == 1
