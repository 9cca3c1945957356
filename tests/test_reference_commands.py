"""The reference program's command lines, word for word, with local folders in place of the hub's names.

What a CPU can't bear is smaller: the model, the length of a row (given after the command's own, so that it counts), and
the number of steps.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import reference_model, small_config
from scripts import run_script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
BOOKCORPUS = (
    "python bookcorpus.py --data_path_or_name bookcorpus/bookcorpus --tokenizer_path_or_name "
    "meta-llama/Meta-Llama-3-8B-Instruct --save_path {rows} --sequence_length {length}"
)
COMPILE = (
    "python train.py --run_mode compile --model_id meta-llama/Meta-Llama-3-8B-Instruct --dataset_path "
    "./bookcorpus_llama3_128K --plan_ngpus=8 --runtime_ngpus=8"
)
RUN = (
    "torchrun --nproc_per_node=8 train.py --model_id meta-llama/Meta-Llama-3-8B-Instruct --dataset_path "
    "./bookcorpus_llama3_128K --plan_ngpus=8 --runtime_ngpus=8"
)
MERGE = "python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt"
MINI = "python create_mini_model.py --model_id meta-llama/Meta-Llama-3-8B-Instruct --output_id ./llama3_mini"
DEBUG = (
    "torchrun --nproc_per_node=2 train.py --plan_ngpus 1 --runtime_ngpus 2 --name llama3_debug --model_id "
    "./llama3_mini --dataset_path ./bookcorpus_llama3_4K"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The scripts, a text, and a model of 6 layers and 8 heads with a tokenizer of letters."""
    pytest.importorskip("datasets", reason="bookcorpus.py saves rows with the package datasets")
    folder = tmp_path_factory.mktemp("reference")
    for script in ROOT.glob("*.py"):
        (folder / script.name).symlink_to(script)
    (folder / "bookcorpus" / "bookcorpus").mkdir(parents=True)
    (folder / "bookcorpus" / "bookcorpus" / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    config = small_config("llama", num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8)
    reference_model(config).save_pretrained(folder / MODEL)
    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz,. "]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / MODEL)
    return folder


def run(folder: Path, command: str, *more: str) -> str:
    """What a command prints, in new interpreters."""
    words = shlex.split(command)
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    command = [*program[words[0]], *words[1:], *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run_on_eight_ranks(folder: Path, command: str, *more: str) -> str:
    """What a torchrun command prints, with ranks that don't take a minute of a CPU to import what they need."""
    torchrun, ranks, script, *words = shlex.split(command)
    assert (torchrun, ranks) == ("torchrun", "--nproc_per_node=8")
    result = run_script(script, *words, *more, n_ranks=8, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_reference_programs_commands_train_and_merge_on_eight_ranks(folder):
    run(folder, BOOKCORPUS.format(rows="./bookcorpus_llama3_128K", length=128))
    assert "wrote compiled/" in run(folder, COMPILE)
    assert "is up to date, reusing it" in run_on_eight_ranks(folder, RUN, "--max_train_steps", "2")
    run(folder, MERGE)
    merged = torch.load(folder / "merged.ckpt", weights_only=True)
    assert json.loads(merged["state"])["position"]["step"] == 2


def test_the_reference_programs_commands_for_a_small_model_train_on_two_ranks(folder):
    run(folder, BOOKCORPUS.format(rows="./bookcorpus_llama3_4K", length=64))
    assert "num_hidden_layers 4" in run(folder, MINI)
    run(folder, DEBUG, "--max_train_steps", "2", "--checkpoint_dir", "./debug_checkpoints")
    steps = (folder / "runs" / "llama3_debug" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
