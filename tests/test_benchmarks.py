"""benchmarks/gpu.py: its parts all run, and one that fails or hangs says so and costs the others nothing."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint, gpu
from benchmarks.gpu_parts import PARTS, Part, measuring, processes, results, training

ROOT = Path(__file__).parent.parent


def run_command(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)


def test_every_part_runs_at_sizes_for_a_cpu_and_what_it_finds_is_as_promised(tmp_path):
    result = run_command("--device", "cpu", "--small", "--minutes", "20", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["title"] for part in parts] == [part.title for part in PARTS]
    names = [row["what"] for part in parts for row in part["rows"]]
    assert len(names) == len(set(names)) > 50
    table = (tmp_path / "gpu.md").read_text().split("\n\n", 1)[1]
    assert table.strip() in result.stdout
    assert table.count("\n") == 2 + len(parts) + len(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu: a CPU would take hours for these sizes; add --small, or run it on a GPU"),
        (["--device", "cpu", "--small", "--minutes", "0"], "--minutes 0: it has to be above 0"),
        (
            ["--device", "cpu", "--small", "--parts", "2,6"],
            "--parts 2,6: there is no part '6'; give numbers from 1 to 5",
        ),
    ],
)
def test_bad_options_are_refused_in_a_sentence_before_any_part_runs(tmp_path, words, message):
    result = run_command(*words, "--output", str(tmp_path / "out"))
    assert (result.returncode, result.stderr) == (2, f"gpu.py: error: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_how_to_try_it_out():
    result = run_command()
    assert result.returncode == 2
    assert "--device cuda: PyTorch finds no GPU here; give --device cpu --small" in result.stderr


# --- the driver, with parts made for the test ------------------------------------------------------------------------

PART = """
import time
from benchmarks.gpu_parts.results import LeftOut, Measurement, Row

def fails():
    raise ValueError("the kernel is broken")

def leaves_out():
    raise LeftOut("the package is not installed")

def hangs():
    time.sleep(600)

def measurements(small, folder):
    yield Measurement("first", lambda: [Row("first", ms=1.5, note=f"small is {small}")])
    yield Measurement("second", fails)
    yield Measurement("third", leaves_out)
    yield Measurement("fourth", HANGS)
"""


@pytest.fixture
def run_made_part(tmp_path, monkeypatch):
    """Runs a part whose module is given as text."""

    def run(text: str, limit_s: float) -> gpu.Result:
        package = tmp_path / "made" / "benchmarks" / "gpu_parts"
        package.mkdir(parents=True)
        for name in ("__init__.py", "__main__.py", "results.py"):
            (package / name).write_text((ROOT / "benchmarks" / "gpu_parts" / name).read_text())
        (package / "made.py").write_text(text)
        monkeypatch.setattr(gpu, "ROOT", tmp_path / "made")
        options = argparse.Namespace(output=tmp_path / "out", device="cpu", small=True)
        return gpu.run_part(1, Part("made", "Made", 1.0), limit_s, options)

    return run


def test_a_measurement_that_fails_is_a_row_that_says_so_and_the_next_one_is_made(run_made_part):
    result = run_made_part(PART.replace("HANGS", "fails"), 120)
    assert result.state == "done"
    assert [(row["what"], row["state"], row["note"]) for row in result.rows] == [
        ("first", "measured", "small is True"),
        ("second", "failed", "ValueError: the kernel is broken"),
        ("third", "left out", "the package is not installed"),
        ("fourth", "failed", "ValueError: the kernel is broken"),
    ]
    assert not result.is_right
    assert "| second |  |  |  |  | **failed**: ValueError: the kernel is broken |" in gpu.table([result])


def test_a_part_that_hangs_is_killed_and_keeps_what_it_had_measured(run_made_part):
    started = time.monotonic()
    result = run_made_part(PART.replace("HANGS", "hangs"), 5)
    assert time.monotonic() - started < 60
    assert (result.state, len(result.rows), result.is_right) == ("out of time", 3, False)
    assert "**out of time after 5 s, all that it was given" in gpu.table([result])


def test_a_part_that_crashes_is_shown_with_the_last_that_it_said(run_made_part):
    result = run_made_part("raise SystemExit('no such driver')", 120)
    assert (result.state, result.rows, result.is_right) == ("failed", [], False)
    assert "**failed after" in gpu.table([result])
    assert "no such driver" in gpu.table([result])


def test_killing_a_part_kills_what_it_has_started_in_sessions_of_their_own():
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    child += "start_new_session=True).wait()"
    process = subprocess.Popen([sys.executable, "-c", child])
    deadline = time.monotonic() + 60
    while len(family := processes.family_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes.end_family(process)
    assert len(family) == 2
    while any(map(is_running, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, family))


def is_running(pid: int) -> bool:
    """Whether a process is there and is more than a record that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_part_leaves_of_its_time_goes_to_those_after_it():
    assert gpu.time_limit(480, [1.0, 3.0]) == 120
    assert gpu.time_limit(470, [3.0]) == 470
    assert gpu.time_limit(-5, [3.0, 1.0]) == 0


# --- what the parts share --------------------------------------------------------------------------------------------


def test_a_timed_call_takes_the_time_that_it_takes():
    assert 20 <= measuring.milliseconds(lambda: time.sleep(0.02)) < 200


def test_a_row_has_the_rates_of_the_work_that_its_call_needs():
    row = measuring.timed_row("sleep", lambda: time.sleep(0.01), flops=1e10, nbytes=3e9)
    assert row.ms is not None
    assert row.tflops == pytest.approx(1e10 / (row.ms * 1e-3) / 1e12)
    assert row.tb_per_s == pytest.approx(3e9 / (row.ms * 1e-3) / 1e12)


def test_rows_that_are_saved_without_datasets_are_those_that_datasets_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [[1, 2, 3], [4, 5, 6]]
    training.save_rows(tmp_path / "rows", rows)
    loaded = datasets.load_from_disk(str(tmp_path / "rows"))
    assert loaded["input_ids"][:] == rows
    loaded.save_to_disk(tmp_path / "again")  # what it writes itself has the same columns and types
    assert datasets.load_from_disk(str(tmp_path / "again")).features == loaded.features


@pytest.mark.parametrize(("key", "expected"), [("loss", 0.5), ("grad_norm", 0.0)])
def test_two_runs_differ_by_the_largest_relative_difference_of_a_step(key, expected):
    one = {1: {"loss": 2.0, "grad_norm": 1.0}, 2: {"loss": 4.0, "grad_norm": 1.0}}
    other = {1: {"loss": 2.5, "grad_norm": 1.0}, 2: {"loss": 2.0, "grad_norm": 1.0}}
    assert training.difference(other, one, key) == expected


def test_runs_of_different_steps_are_not_compared():
    step = {"loss": 2.0, "grad_norm": 1.0}
    with pytest.raises(RuntimeError, match=r"one run took steps \[1\] and the other \[1, 2\]"):
        training.difference({1: step}, {1: step, 2: step}, "loss")


def test_every_field_of_a_row_is_in_the_table_or_only_for_gpu_json():
    row = results.Row("what", 1.0, 2.0, 3.0, 4.0, "note", "failed", detail="only there")
    assert gpu.row_line(dataclasses.asdict(row)) == "| what | 1.000 | 2 | 3.00 | 4.00 | **failed**: note |"


# --- benchmarks/checkpoint.py ----------------------------------------------------------------------------------------


def test_the_costs_of_a_checkpoint_are_measured_and_written(tmp_path, capsys):
    checkpoint.main(["--millions", "1", "--runs", "1", "--folder", str(tmp_path), "--output", str(tmp_path / "out.md")])
    text = (tmp_path / "out.md").read_text()
    assert text.endswith(capsys.readouterr().out.rstrip("\n") + "\n")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 9 and all(float(seconds) >= 0 for _, seconds, *_ in rows)
    assert os.listdir(tmp_path) == ["out.md"]
