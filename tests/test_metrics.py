"""metrics.jsonl: one line a step, whatever a kill has left of it, and no other run's lines lost."""

import errno
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from families import random_rows, reference_model, small_config
from ranks import run_ranks
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.flop_counter import FlopCounterMode

from longctx.compiler import hardware
from longctx.compiler.plan import Setting
from longctx.compiler.planner import make_plan
from longctx.compiler.prediction import forward_flops, predict
from longctx.compiler.trace import sample_row, trace
from longctx.data.order import Position
from longctx.errors import LogError
from longctx.huggingface.build import build_model
from longctx.job import Job
from longctx.runtime.metrics import FlopCount, MetricsLog, Step, check_log, metrics_log, step_metrics


def log_steps(folder: Path, first_step: int, last_step: int) -> None:
    job = Job(model_id="any", sequence_length=8, runtime_ngpus=1, name="any")
    with metrics_log(folder, first_step, last_step) as log:
        for step in range(first_step, last_step):
            taken = Step(Position(step), rows=[0], learning_rate=1.0, loss=1.0, grad_norm=1.0, seconds=1.0)
            log.write(step_metrics(taken, job, FlopCount(1.0, 1.0, None)))


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_steps_that_are_taken_again_replace_those_of_the_run_before(tmp_path):
    log_steps(tmp_path, 0, 6)
    log_steps(tmp_path, 4, 5)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step"', "4", '{"loss": 1.0}', "\0\0"])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, torn):
    log_steps(tmp_path, 0, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    check_log(tmp_path, resuming=True)
    log_steps(tmp_path, 4, 5)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_a_run_that_starts_anew_keeps_the_metrics_of_those_before_it(tmp_path):
    for last in (3, 2, 1):
        log_steps(tmp_path, 0, last)
    assert steps_in(tmp_path / "metrics.1.jsonl") == [1, 2, 3]
    assert steps_in(tmp_path / "metrics.2.jsonl") == [1, 2]
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.parametrize("theirs", ["years of work\n", '{"loss": 1.0}\n', '{"step": "one"}\n', "[]\n", "\n"])
def test_lines_that_no_run_wrote_are_refused_before_a_run_is_resumed_and_kept_in_any_case(tmp_path, theirs):
    (tmp_path / "metrics.jsonl").write_text(theirs)
    with pytest.raises(LogError, match="line 1 of .*metrics.jsonl is not one that a run wrote, .*; move the file"):
        check_log(tmp_path, resuming=True)
    log_steps(tmp_path, 4, 5)
    assert (tmp_path / "metrics.jsonl").read_text().startswith(theirs)


def test_a_run_that_starts_anew_moves_any_file_out_of_its_way(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("years of work\n")
    check_log(tmp_path, resuming=False)
    log_steps(tmp_path, 0, 1)
    assert (tmp_path / "metrics.1.jsonl").read_text() == "years of work\n"


@pytest.mark.parametrize("resuming", [True, False])
def test_a_folder_called_metrics_jsonl_is_refused(tmp_path, resuming):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LogError, match="metrics.jsonl is no file"):
        check_log(tmp_path, resuming)


def write_step(log: MetricsLog, step: int) -> None:
    job = Job(model_id="any", sequence_length=8, runtime_ngpus=1, name="any")
    taken = Step(Position(step), rows=[0], learning_rate=1.0, loss=1.0, grad_norm=1.0, seconds=1.0)
    log.write(step_metrics(taken, job, FlopCount(1.0, 1.0, None)))


def log_on_a_full_disk_on_rank(folder: Path) -> None:
    """Files can't grow beyond the middle of the line of step 3; then they can, and then not again."""
    first = {"step": 1, "padding": "x" * 100_000}  # what else the process writes is smaller
    (folder / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with metrics_log(folder, 1, 7) as log:
        for step in range(1, 7):
            limit = 100_400 if step in (2, 3, 6) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            write_step(log, step)
    check_log(folder, resuming=True)


def test_a_full_disk_costs_lines_of_the_log_and_no_step_and_is_said_once(tmp_path, capfd):
    run_ranks(1, log_on_a_full_disk_on_rank, tmp_path, start_method="fork")
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 5, 6]
    said = capfd.readouterr().out.count(
        "run: metrics.jsonl can't be written ([Errno 27] File too large); training goes"
    )
    assert said == 1


def test_an_error_of_tensorboards_thread_ends_no_training_and_is_said_once(tmp_path, monkeypatch, capfd):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with metrics_log(tmp_path, 0, 3) as log:
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in range(3):
            write_step(log, step)
            log.board.file_writer.event_writer._async_writer._worker.join(10)  # its first write ends it
    said = capfd.readouterr()
    assert (
        said.out.count("run: TensorBoard's file can't be written ([Errno 28] No space left on device); training") == 1
    )
    assert "Traceback" not in said.err
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_log_folder_that_vanishes_ends_no_training_and_is_said_once(tmp_path, capsys):
    with metrics_log(tmp_path / "run", 0, 3) as log:
        shutil.rmtree(tmp_path / "run")
        for step in range(3):
            write_step(log, step)
    assert capsys.readouterr().out.count("run: metrics.jsonl can't be written") == 1


@pytest.mark.parametrize(("device", "reserved"), [("cpu", None), ("cuda", 3.0)])
def test_a_step_on_a_gpu_says_what_tensors_took_and_what_the_allocator_reserved(monkeypatch, device, reserved):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3_000_000_000)
    job = Job(model_id="any", sequence_length=8, runtime_ngpus=1, name="any", device=device)
    taken = Step(Position(), rows=[0], learning_rate=1.0, loss=1.0, grad_norm=1.0, seconds=1.0)
    metrics = step_metrics(taken, job, FlopCount(1.0, 1.0, None))
    assert metrics.peak_reserved_gb == reserved
    assert (metrics.peak_memory_gb == 2.0) == (device == "cuda")


def test_mfu_counts_three_forward_passes_of_every_row_against_the_peak_of_all_ranks():
    job = Job(model_id="any", sequence_length=8, runtime_ngpus=4, name="any")
    taken = Step(Position(), rows=[0, 1], learning_rate=1.0, loss=1.0, grad_norm=1.0, seconds=2.0)
    metrics = step_metrics(taken, job, FlopCount(whole=40.0, causal=30.0, peak_per_s=100.0))
    assert metrics.mfu == 3 * 2 * 40 / (4 * 2 * 100)
    assert metrics.mfu_causal == 3 * 2 * 30 / (4 * 2 * 100)
    assert metrics.tokens_per_s_per_gpu == 2 * 8 / 2 / 4


WINDOWS = {"llama": (32, 32), "qwen3": (32, 32), "mistral": (16, 16), "gemma2": (16, 32), "phi3": (32, 32)}  # a layer's


@pytest.mark.parametrize("family", WINDOWS)
def test_the_flops_of_attention_are_those_of_each_layers_own_heads_their_width_and_its_window(family):
    """PyTorch counts the products of the Hugging Face model, whose eager attention computes what it masks."""
    length, config = 32, small_config(family)
    tokens, _ = random_rows(1, length, 256)
    with FlopCounterMode(display=False) as counter:
        reference_model(config)(input_ids=tokens, use_cache=False)
    counted = counter.get_flop_counts()
    attentions = [flops for name, flops in counted.items() if name.endswith(".self_attn")]
    layers = [flops[torch.ops.aten.bmm] for flops in attentions]
    of_positions = counted["Global"][torch.ops.aten.bmm] - sum(layers)  # older rotary embeddings are a product
    graph = trace(build_model(config, torch.float32), sample_row(length))
    n_parameters = sum(parameter.numel() for parameter in reference_model(config).parameters())
    whole, causal = (flops - 2 * n_parameters * length - of_positions for flops in forward_flops(graph))
    pairs = [sum(min(query + 1, window) for query in range(length)) for window in WINDOWS[family]]
    assert whole == sum(n * window / length for n, window in zip(layers, WINDOWS[family], strict=True))
    assert causal == sum(n * seen / length**2 for n, seen in zip(layers, pairs, strict=True))


def test_the_mfu_of_a_windowed_model_at_its_fastest_is_below_100_percent(tmp_path):
    config = small_config("mistral", sliding_window=4096, hidden_size=4096, num_attention_heads=32, vocab_size=32000)
    graph = trace(build_model(config, torch.bfloat16), sample_row(131072))
    setting = Setting(1, 1, hardware.HARDWARE["h100"], 1e15)
    facts = predict(graph, make_plan(graph, setting), setting)
    peak = setting.hardware.matrix_flops * facts.time.total
    assert 3 * facts.forward_flops_causal / peak < 3 * facts.forward_flops / peak < 1
