"""Training, checkpoints and resuming, with the options that people type, in processes that are killed for real."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import config_of, reference_loss, reference_model, small_config
from plain_training import train_plainly
from saved_rows import save_rows
from scripts import run_script, start_script
from transformers import AutoModelForCausalLM

from benchmarks.gpu_parts.processes import end_family
from longctx.data import order

ROOT = Path(__file__).parent.parent
LENGTH, ROWS, STEPS = 32, 22, 10
TRAIN = ["--precision", "fp32", "--max_epochs", "4", "--max_train_steps", str(STEPS), "--learning_rate", "1e-3"]
TRAIN += ["--lr_schedule", "cosine", "--warmup_steps", "2", "--weight_decay", "0.1", "--max_grad_norm", "3.0"]
TRAIN += ["--checkpoint_interval", "4"]


def rows_to_learn() -> torch.Tensor:
    """Rows that have something to learn, int64 [ROWS, LENGTH]: each token is a function of the one before."""
    columns = [torch.randint(0, 256, (ROWS, 1), generator=torch.Generator().manual_seed(1))]
    for _ in range(LENGTH - 1):
        columns.append((columns[-1] * 5 + 17) % 256)
    return torch.cat(columns, 1)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a model and the rows that it is to learn."""
    folder = tmp_path_factory.mktemp("job")
    reference_model(small_config("llama")).save_pretrained(folder / "model")
    save_rows(folder / "rows", rows_to_learn())
    return folder


def arguments(job: Path, n_ranks: int, checkpoints: str, *more: str, plan_ngpus: int = 1) -> list[str]:
    paths = ["--model_id", str(job / "model"), "--dataset_path", str(job / "rows")]
    paths += ["--compiled_dir", str(job / "compiled"), "--log_dir", str(job / checkpoints / "runs")]
    paths += ["--checkpoint_dir", str(job / checkpoints), "--name", f"{n_ranks}ranks"]
    # A step is the same 4 rows on any number of ranks and any plan.
    accumulation = ["--grad_accumulation_steps", str(4 // (n_ranks // plan_ngpus))]
    ranks = ["--plan_ngpus", str(plan_ngpus), "--runtime_ngpus", str(n_ranks), "--hardware", "cpu"]
    return [*ranks, *paths, *accumulation, *TRAIN, *more]


def run(script: str, *words: str, n_ranks: int = 0) -> subprocess.CompletedProcess:
    result = run_script(script, *words, n_ranks=n_ranks)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def train(job: Path, n_ranks: int, checkpoints: str, *more: str, plan_ngpus: int = 1) -> subprocess.CompletedProcess:
    return run("train.py", *arguments(job, n_ranks, checkpoints, *more, plan_ngpus=plan_ngpus), n_ranks=n_ranks)


def read_steps(job: Path, n_ranks: int, checkpoints: str) -> dict[int, dict]:
    file = job / checkpoints / "runs" / f"{n_ranks}ranks" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line for line in lines}


@pytest.fixture(scope="module")
def uninterrupted(job) -> dict[int, dict]:
    train(job, 2, "uninterrupted")
    return read_steps(job, 2, "uninterrupted")


def test_training_is_adamw_on_the_token_mean_with_clipping_and_schedule(job, uninterrupted):
    """The same rows through the Hugging Face model, torch's AdamW, clip_grad_norm_ and LambdaLR, in one process."""
    import math

    model = AutoModelForCausalLM.from_pretrained(job / "model", dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.SGD([torch.zeros(1)], 1e-3)
    factors = [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / (STEPS - 2))) for i in range(STEPS - 2))]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, STEPS - 1)])
    rates = []
    for _ in range(STEPS):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    steps = train_plainly(model, rows_to_learn(), [4] * STEPS, rates)
    for step, ((loss, norm), rate) in enumerate(zip(steps, rates, strict=True), start=1):
        assert uninterrupted[step]["loss"] == pytest.approx(loss, rel=2e-5), step
        assert uninterrupted[step]["grad_norm"] == pytest.approx(norm, rel=1e-3), step
        assert uninterrupted[step]["learning_rate"] == pytest.approx(rate), step
    assert uninterrupted[STEPS]["loss"] < uninterrupted[1]["loss"]


@pytest.fixture(scope="module")
def partitioned(job) -> dict[int, dict]:
    """The same run, each row computed by both ranks together, with deterministic operators alone."""
    train(job, 2, "partitioned", "--deterministic", plan_ngpus=2)
    return read_steps(job, 2, "partitioned")


def test_a_plan_over_two_ranks_trains_as_two_ranks_apart_do(job, uninterrupted, partitioned):
    code = (job / "compiled" / "2ranks" / "gencode.py").read_text()
    assert "from longctx.runtime.collectives import" in code
    for step in range(1, STEPS + 1):
        assert partitioned[step]["loss"] == pytest.approx(uninterrupted[step]["loss"], rel=2e-5), step
        assert partitioned[step]["grad_norm"] == pytest.approx(uninterrupted[step]["grad_norm"], rel=1e-3), step


def wait_for_six_steps(job: Path, name: str, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    first = job / name / "last"  # a checkpoint of step 4, which is written while training goes on
    while len(read_steps(job, 2, name)) < 6 or not first.exists():
        assert is_running() and time.monotonic() < deadline, "it ended, or took too long, before the kill"
        time.sleep(0.01)


def assert_goes_on(job: Path, name: str, expected: dict[int, dict], *more: str, plan_ngpus: int = 1) -> None:
    """A run of 2 ranks that was killed after its first checkpoint takes the `expected` steps, as if left alone."""
    before = read_steps(job, 2, name)
    assert 6 <= len(before) < STEPS, "the kill came too late to prove anything"
    result = train(job, 2, name, *more, plan_ngpus=plan_ngpus)
    assert "after step 4" in result.stdout
    after = read_steps(job, 2, name)
    assert len(after) == STEPS
    for step in expected:
        for key in ("loss", "grad_norm", "learning_rate"):
            assert after[step][key] == expected[step][key], (step, key)


def test_a_run_that_was_killed_with_its_torchrun_goes_on_bit_for_bit(job, uninterrupted):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "train.py"), *arguments(job, 2, "killed1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wait_for_six_steps(job, "killed1", lambda: process.poll() is None)
    end_family(process)
    assert_goes_on(job, "killed1", uninterrupted)


def test_a_run_whose_ranks_were_killed_goes_on_bit_for_bit_where_they_share_a_plan(job, partitioned, tmp_path):
    more = ["--deterministic"]
    ranks = start_script(tmp_path, "train.py", *arguments(job, 2, "killed2", *more, plan_ngpus=2), n_ranks=2)
    wait_for_six_steps(job, "killed2", lambda: all(rank.is_alive() for rank in ranks))
    for rank in ranks:
        rank.kill()
        rank.join()
    assert_goes_on(job, "killed2", partitioned, *more, plan_ngpus=2)


def test_a_run_whose_last_checkpoint_is_gone_goes_on_from_the_newest_that_is_whole(job, uninterrupted):
    shutil.copytree(job / "uninterrupted", job / "gone", symlinks=True)
    shutil.rmtree(job / "gone" / "0001-000010")
    result = train(job, 2, "gone")
    found = "last names 0001-000010, which is gone; taking 0001-000008, the newest that is whole"
    assert f"checkpoint: {job}/gone/{found}" in result.stdout
    assert "0001-000008, after step 8" in result.stdout
    after = read_steps(job, 2, "gone")
    for step in range(1, STEPS + 1):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert after[step][key] == uninterrupted[step][key], (step, key)
    assert (job / "gone" / "last").resolve().name == "0001-000010"


def test_a_merged_checkpoint_resumes_on_another_number_of_ranks(job, uninterrupted):
    merged = job / "merged.ckpt"
    checkpoint = job / "uninterrupted" / "0000-000004"
    run("ckpt_merger.py", "--output_fname", str(merged), "--ckpt_dir", str(checkpoint))
    contents = torch.load(merged, weights_only=True)
    assert contents["optimizer"]["model.norm.weight/step"] == 4

    (job / "one_rank" / "runs" / "1ranks").mkdir(parents=True)
    first = [json.dumps(uninterrupted[step]) + "\n" for step in range(1, 5)]
    (job / "one_rank" / "runs" / "1ranks" / "metrics.jsonl").write_text("".join(first))
    train(job, 1, "one_rank", "--resume_path", str(merged))
    steps = read_steps(job, 1, "one_rank")
    for step in range(5, STEPS + 1):
        assert steps[step]["loss"] == pytest.approx(uninterrupted[step]["loss"], rel=2e-5)


def assert_merges(job: Path, checkpoint: Path, loss_of_next_step: float) -> None:
    """The merged model opens in transformers, and has the loss there that the step after the checkpoint had."""
    hf_dir = job / f"hf-{checkpoint.name}"
    run("ckpt_merger.py", "--hf_dir", str(hf_dir), "--ckpt_dir", str(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    position = order.Position(**json.loads((checkpoint / "checkpoint.json").read_text())["position"])
    chosen = order.step_rows(order.epoch_order(ROWS, 0, position.epoch), position, 4)
    tokens = rows_to_learn()[chosen]
    labels = torch.cat((tokens[:, 1:], torch.full((len(chosen), 1), -100)), dim=1)
    with torch.no_grad():
        loss = reference_loss(model, tokens, labels) / (labels != -100).sum()
    assert loss.item() == pytest.approx(loss_of_next_step, rel=1e-5)


def test_the_merged_model_opens_in_transformers_with_the_trained_weights(job, uninterrupted):
    for checkpoint, step in (("0000-000004", 4), ("0001-000008", 8)):
        assert_merges(job, job / "uninterrupted" / checkpoint, uninterrupted[step + 1]["loss"])


def test_a_mixture_of_experts_that_was_killed_goes_on_bit_for_bit_and_merges(tmp_path):
    reference_model(config_of("mixtral")).save_pretrained(tmp_path / "model")  # with its routers' auxiliary loss
    save_rows(tmp_path / "rows", rows_to_learn())
    ranks = start_script(tmp_path, "train.py", *arguments(tmp_path, 2, "mixture", plan_ngpus=2), n_ranks=2)
    wait_for_six_steps(tmp_path, "mixture", lambda: all(rank.is_alive() for rank in ranks))
    for rank in ranks:
        rank.kill()
        rank.join()
    assert "experts(" in (tmp_path / "compiled" / "2ranks" / "gencode.py").read_text()
    assert_goes_on(tmp_path, "mixture", read_steps(tmp_path, 2, "mixture"), plan_ngpus=2)
    assert_merges(tmp_path, tmp_path / "mixture" / "0000-000004", read_steps(tmp_path, 2, "mixture")[5]["loss"])


def test_a_checkpoint_has_a_manifest_of_its_files_and_nothing_half_written_beside_it(job, uninterrupted):
    folder = job / "uninterrupted"
    assert sorted(p.name for p in folder.iterdir()) == ["0000-000004", "0001-000008", "0001-000010", "last", "runs"]
    assert (folder / "last").resolve().name == "0001-000010"
    manifest = json.loads((folder / "last" / "checkpoint.json").read_text())
    for name, facts in manifest["files"].items():
        assert (folder / "last" / name).stat().st_size == facts["bytes"]
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "hf/config.json"} <= set(manifest["files"])


def test_tensorboard_has_what_metrics_jsonl_has(job, uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job / "uninterrupted" / "runs" / "2ranks")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({step: line["loss"] for step, line in uninterrupted.items()}, rel=1e-6)
