"""A wrong command line ends in one sentence that names the option, and exit status 2, before any rank starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from families import reference_model, small_config
from safetensors.torch import load_file, save_file

import ckpt_merger
import train
from errors import UserError

ROOT = Path(__file__).parent.parent


def save_rows(folder: Path, rows: int = 4, length: int = 16, high: int = 256, column: str = "input_ids") -> str:
    datasets.Dataset.from_dict({column: torch.randint(0, high, (rows, length)).int().numpy()}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A trained checkpoint, its model and its rows."""
    folder = tmp_path_factory.mktemp("job")
    reference_model(small_config("llama")).save_pretrained(folder / "model")
    save_rows(folder / "rows")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "train.py"), *arguments(folder), "--max_train_steps", "1"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
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
        ("--plan_ngpus 0: it has to be 1 or more", {"plan_ngpus": 0}),
        ("--max_train_steps 0: it has to be 1 or more", {"max_train_steps": 0}),
        ("--learning_rate -1.0: it has to be above 0", {"learning_rate": -1}),
        ("--learning_rate nan: it has to be above 0", {"learning_rate": "nan"}),
        ("--warmup_steps -1: it can't be negative", {"warmup_steps": -1}),
        ("--dataset_path: it is missing; make rows", {"dataset_path": None}),
        ("--dataset_path: it is missing; give it, or --seq", {"dataset_path": None, "run_mode": "compile"}),
        ("--dataset_path nowhere: no such folder; make it with bookcorpus.py", {"dataset_path": "nowhere"}),
        ("--dataset_path .*: it is no dataset that bookcorpus.py wrote", {"dataset_path": ROOT / "configs"}),
        ("--sequence_length 32: the rows of --dataset_path .* have 16 tokens", {"sequence_length": 32}),
        ("--model_id ./nowhere: no config.json there", {"model_id": "./nowhere"}),
        (
            "--model_id .*: it has no model.safetensors; pass --random_init",
            {"model_id": ROOT / "configs" / "llama3_8b", "checkpoint_dir": "none_yet"},
        ),
        ("--resume_path nowhere: there is no such file or folder", {"resume_path": "nowhere"}),
        ("--resume_path .*configs: it has no checkpoint in it", {"resume_path": ROOT / "configs"}),
        ("--resume_path .*: it is no merged checkpoint", {"resume_path": ROOT / "README.md"}),
        (
            "--attn_implementation flash_attention_2: the package flash-attn",
            {"attn_implementation": "flash_attention_2"},
        ),
    ],
)
def test_one_sentence_names_the_option(job, tmp_path, sentence, changes):
    refused(job, sentence, **{"compiled_dir": tmp_path, **changes})
    assert not list(tmp_path.iterdir())  # nothing half-written


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
    refused(job, "--recompute_modules MLP: MLP is no layer of LlamaForCausalLM", recompute_modules="MLP", **ask)


def test_a_plans_partitions_are_taken_again_at_another_length(job, tmp_path):
    ask = {"run_mode": "compile", "dataset_path": None, "compiled_dir": tmp_path, "plan_ngpus": 2, "runtime_ngpus": 2}
    train.main(arguments(job, sequence_length=64, name="first", **ask))
    decisions = json.loads((tmp_path / "first" / "plan.json").read_text())["decisions"]
    train.main(arguments(job, sequence_length=128, name="second", plan=tmp_path / "first" / "plan.json", **ask))
    assert json.loads((tmp_path / "second" / "plan.json").read_text())["decisions"] == decisions
    decisions["ops"]["LlamaDecoderLayer"][0][1] = "*1"  # the first norm, along the sequence
    (tmp_path / "edited.json").write_text(json.dumps({"decisions": decisions}))
    sentence = "--plan: it splits input_layernorm's model.rms_norm along '\\*1', which 2 ranks can't share evenly here"
    refused(job, sentence, sequence_length=33, name="third", plan=tmp_path / "edited.json", **ask)


def test_rows_of_something_else_are_refused(job, tmp_path):
    refused(job, "it has no rows of 'input_ids'", dataset_path=save_rows(tmp_path / "text", column="text"))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(job, tmp_path):
    path = save_rows(tmp_path / "rows")
    (tmp_path / "rows" / "corpus.json").write_text(json.dumps({"vocab_size": 300, "tokenizer": "other"}))
    refused(job, "its tokenizer other has 300 entries and the model's vocabulary 256", dataset_path=path)


def test_a_token_that_the_model_does_not_know_is_refused(job, tmp_path):
    path = save_rows(tmp_path / "rows", high=10_000)
    refused(job, "row . has token .*vocabulary has 256", dataset_path=path, checkpoint_dir=tmp_path / "checkpoints")


def test_a_row_of_another_length_is_refused(job, tmp_path):
    rows = [[1] * 16, [1] * 15]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "rows")
    sentence = "row 1 has 15 tokens and the plan is compiled for 16"
    refused(job, sentence, dataset_path=tmp_path / "rows", checkpoint_dir=tmp_path / "checkpoints")


@pytest.mark.parametrize("option", ["checkpoint_dir", "resume_path"])
def test_a_checkpoint_of_another_model_is_refused(job, tmp_path, option):
    reference_model(small_config("llama", intermediate_size=96)).save_pretrained(tmp_path / "model")
    sentence = f"--{option} .*: it is a checkpoint of another model"
    refused(job, sentence, model_id=tmp_path / "model", **{option: job / "checkpoints"})


def test_a_run_goes_on_only_with_its_own_order_of_rows(job, tmp_path):
    refused(job, "--seed 1: --checkpoint_dir .* is of a run with seed 0, .*; pass --seed 0", seed=1)
    rows = save_rows(tmp_path / "rows", rows=5)
    refused(job, "--dataset_path: it has 5 rows and the run of --checkpoint_dir .* had 4", dataset_path=rows)


def test_a_checkpoint_that_was_cut_short_is_refused(job, tmp_path):
    shutil.copytree(job / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    shard = next(tmp_path.rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(
        job, r"--checkpoint_dir .*: its file __0_0.distcp has \d+ bytes instead of", checkpoint_dir=shard.parent.parent
    )
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


def test_a_model_that_is_no_causal_language_model_is_refused(job, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(job, "a 'vit' model is no causal language model", model_id=tmp_path)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(job, tmp_path, poison):
    shutil.copytree(job / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = poison
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
    ],
)
def test_the_merger_refuses_in_one_sentence(job, sentence, options):
    options = {"ckpt_dir": "checkpoints", **options}
    with pytest.raises(UserError, match=sentence):
        ckpt_merger.main([word for k, v in options.items() for word in (f"--{k}", str(job / v))])


def test_exit_status_is_2_and_there_is_one_line_and_no_traceback(job):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(job, dataset_path="nowhere")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "train.py: error: --dataset_path nowhere: no such folder; make it with bookcorpus.py\n"
    assert result.stdout == ""


def test_under_torchrun_one_rank_says_it(job):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, str(ROOT / "train.py"), *arguments(job, plan_ngpus=3, runtime_ngpus=3)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stderr.count("train.py: error:") == 1
    assert "exitcode  : 2" in result.stderr
    assert "init_process_group" not in result.stderr
