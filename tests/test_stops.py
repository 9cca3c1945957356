"""A run that is told to stop, hangs, goes wrong or meets another: how it ends, and how its next start goes on."""

import ctypes
import json
import os
import signal
import threading
import time
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from families import reference_loss, reference_model, small_config
from ranks import environment_of_rank, start_server
from saved_rows import save_rows
from scripts import run_script, start_script

from longctx.data import order
from longctx.errors import CheckpointFolderError
from longctx.runtime import lock, watch

LENGTH, ROWS, STEPS = 32, 20, 6
FAULTS = "tests/faults.py"


def rows_to_learn() -> torch.Tensor:
    """int64 [ROWS, LENGTH]"""
    return torch.randint(0, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a model and the rows that it is to learn."""
    folder = tmp_path_factory.mktemp("job")
    reference_model(small_config("llama")).save_pretrained(folder / "model")
    save_rows(folder / "rows", rows_to_learn())
    return folder


def options(job: Path, name: str, n_ranks: int, *more: str) -> list[str]:
    """Of a run whose steps take 2 rows, whatever the number of ranks, with a checkpoint after every second step."""
    paths = ["--model_id", job / "model", "--dataset_path", job / "rows", "--compiled_dir", job / "compiled"]
    paths += ["--log_dir", job / name / "runs", "--checkpoint_dir", job / name, "--name", f"{n_ranks}ranks"]
    steps = ["--max_train_steps", STEPS, "--checkpoint_interval", 2, "--grad_accumulation_steps", 2 // n_ranks]
    rest = ["--precision", "fp32", "--learning_rate", "1e-3", "--hardware", "cpu", "--runtime_ngpus", n_ranks]
    return [*map(str, (*paths, *steps, *rest)), *more]


def fault(**facts) -> str:
    return json.dumps(facts)


def metrics(job: Path, name: str, n_ranks: int) -> dict[int, dict]:
    lines = [json.loads(line) for line in (job / name / "runs" / f"{n_ranks}ranks" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line for line in lines}


def losses(job: Path, name: str, n_ranks: int) -> list[float | None]:
    return [line.get("loss") for line in metrics(job, name, n_ranks).values()]


def chosen_rows(step: int) -> list[int]:
    """The rows of a step, by the numbers they have in the dataset."""
    return order.step_rows(order.epoch_order(ROWS, 0, 0), order.Position(step - 1, 0, 2 * (step - 1)), 2)


def reference_losses(job: Path, steps: list[int]) -> list[float]:
    """Of these steps and no others, by the Hugging Face model and torch's AdamW."""
    model = reference_model(small_config("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.0)
    found = []
    for step in steps:
        tokens = rows_to_learn()[chosen_rows(step)]
        labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
        loss = reference_loss(model, tokens, labels) / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def uninterrupted(job) -> list[float]:
    """The losses of a run on two ranks."""
    result = run_script("train.py", *options(job, "uninterrupted", 2), n_ranks=2)
    assert result.returncode == 0, result.stderr
    found = losses(job, "uninterrupted", 2)
    assert found == pytest.approx(reference_losses(job, list(range(1, STEPS + 1))), rel=2e-5)
    return found


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "name"), [(0, "SIGINT"), (1, "SIGTERM")])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_same_command_goes_on(
    job, uninterrupted, rank, name
):
    stopped = f"stopped by {name}"
    result = run_script(FAULTS, fault(step=3, rank=rank, signal=name), *options(job, stopped, 2), n_ranks=2)
    assert result.returncode == 0, result.stderr
    by = name if rank == 0 else "a signal to another rank"
    assert f"run: stopped by {by} after step 3; the same command goes on from there" in result.stdout
    assert len(losses(job, stopped, 2)) == 3

    result = run_script("train.py", *options(job, stopped, 2), n_ranks=2)
    assert "after step 3" in result.stdout
    assert losses(job, stopped, 2) == uninterrupted
    assert not (job / stopped / lock.LOCK).exists()


def test_a_second_signal_ends_a_run_at_once_where_it_waits_for_ranks_that_hang(job, tmp_path):
    words = options(job, "second signal", 2)
    ranks = start_script(tmp_path, FAULTS, fault(step=2, rank=1, signal=""), *words, n_ranks=2)
    try:
        wait_until(lambda: len(losses(job, "second signal", 2)) == 1)
        os.kill(ranks[0].pid, signal.SIGINT)
        time.sleep(1)
        assert ranks[0].exitcode is None
        os.kill(ranks[0].pid, signal.SIGTERM)
        ranks[0].join(5)
        assert ranks[0].exitcode == 128 + signal.SIGTERM
    finally:
        for process in ranks:
            process.kill()


def test_a_signal_while_a_plan_is_compiled_ends_the_run_and_leaves_nothing(job, tmp_path):
    words = [*options(job, "compiling", 1), "--compiled_dir", str(tmp_path / "compiled"), "--run_mode", "compile"]
    [process] = start_script(tmp_path, "train.py", *words)
    wait_until(lambda: (tmp_path / "out-0").exists() and "engine:" in (tmp_path / "out-0").read_text())
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
    assert not (tmp_path / "compiled").exists() or not list((tmp_path / "compiled").iterdir())
    assert "Traceback" not in (tmp_path / "err-0").read_text()


def wait_until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"it does not hold after {seconds} s")


# --- hangs -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_hangs_is_noticed_by_all_and_the_stacks_are_written(job, tmp_path):
    """One rank waits for ever, and in another run one is stopped, so that it can't even write."""
    runs = {}
    for name in ("", "SIGSTOP"):
        said = tmp_path / f"said {name}"
        said.mkdir()
        words = options(job, f"hangs {name}", 2, "--hang_timeout", "0.05")
        runs[name] = start_script(said, FAULTS, fault(step=2, rank=1, signal=name, stacks_s=3), *words, n_ranks=2)
    try:
        for name, ranks in runs.items():
            ranks[0].join(60)
            assert ranks[0].exitcode == 1
            stacks = job / f"hangs {name}" / "runs" / "2ranks"
            assert "in compute_gradients" in (stacks / "stacks-rank0.txt").read_text()
            said = (tmp_path / f"said {name}" / "err-0").read_text()
            assert "no progress for 0.05 minutes" in said and "in compute_gradients" in said
            if not name:
                assert "in fail" in (stacks / "stacks-rank1.txt").read_text()
    finally:
        for process in (process for ranks in runs.values() for process in ranks):
            process.kill()


def _hold_pythons_lock(folder: Path) -> None:
    """Hangs in a library that lets no other thread of Python's run."""
    os.dup2(os.open(folder / "err", os.O_WRONLY | os.O_CREAT), 2)
    watch.MARGIN, watch.STACKS_S = timedelta(seconds=1), 0.5
    watch.start()
    watch.expect_progress(timedelta(seconds=2), folder)
    time.sleep(1.2 * watch.LOOK_S)  # so that the thread has seen it
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def test_a_process_that_hangs_with_pythons_lock_ends_too(tmp_path):
    start_server()
    process = get_context("forkserver").Process(target=_hold_pythons_lock, args=(tmp_path,))
    process.start()
    process.join(20)
    assert process.exitcode == 1
    assert "in _hold_pythons_lock" in (tmp_path / "err").read_text()


def _torchrun(folder: Path) -> None:
    """Starts a rank that does nothing, and waits."""
    if os.fork() == 0:
        os.environ |= environment_of_rank(0, 1, 0)
        watch.start()
        (folder / str(os.getpid())).touch()
    threading.Event().wait()


def test_a_rank_ends_when_its_torchrun_has_died(tmp_path):
    start_server()
    process = get_context("forkserver").Process(target=_torchrun, args=(tmp_path,))
    process.start()
    wait_until(lambda: list(tmp_path.iterdir()))
    [pid] = [int(file.name) for file in tmp_path.iterdir()]
    process.kill()
    wait_until(lambda: not is_running(pid), 10)


def is_running(pid: int) -> bool:
    """Whether there is a process that is more than an entry for a parent to read."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# --- steps that go wrong ---------------------------------------------------------------------------------------------


def test_after_a_loss_that_is_not_finite_a_run_goes_back_and_leaves_the_rows_out(job):
    """Of the first steps, before there is a checkpoint, and of later ones, at once and after a resume."""
    bad = [*chosen_rows(1)[:1], *chosen_rows(4)[1:]]
    words = options(job, "rolls back", 2, "--on_nonfinite", "rollback")
    result = run_script(FAULTS, fault(nan_rows=bad), *words, "--max_train_steps", "2", n_ranks=2)
    assert result.returncode == 0, result.stderr
    rows = ", ".join(map(str, chosen_rows(1)))
    assert f"not finite, on rows {rows} of the dataset; the last checkpoint is kept; going back to" in result.stdout

    result = run_script(FAULTS, fault(nan_rows=bad), *words, n_ranks=2)
    assert result.returncode == 0, result.stderr
    assert "going back to step 2, from where these rows are left out" in result.stdout
    found = metrics(job, "rolls back", 2)
    assert [found[step].get("skipped_rows") for step in (1, 4)] == [chosen_rows(1), chosen_rows(4)]
    expected = reference_losses(job, [2, 3, 5, 6])
    assert [found[step]["loss"] for step in (2, 3, 5, 6)] == pytest.approx(expected, rel=2e-5)
    assert found[6]["loss"] != pytest.approx(reference_losses(job, [2, 3, 4, 5, 6])[-1], rel=1e-4)


def test_rows_that_are_to_be_left_out_stay_so_after_a_resume(job):
    """The run is stopped after it has gone back, and before it comes to the rows."""
    words = options(job, "resumes", 1, "--on_nonfinite", "rollback")
    bad = chosen_rows(4)
    result = run_script(FAULTS, fault(nan_rows=bad), *words, "--max_train_steps", "4")
    assert "going back to step 2" in result.stdout
    state = json.loads((job / "resumes" / "last" / "checkpoint.json").read_text())
    assert state["position"]["skipped"] == [{"epoch": 0, "rows": bad}]

    result = run_script(FAULTS, fault(nan_rows=bad), *words)
    assert result.returncode == 0 and "going back" not in result.stdout
    assert json.loads((job / "resumes" / "last" / "checkpoint.json").read_text())["position"]["skipped"]


def test_a_run_that_goes_wrong_on_whatever_rows_gives_up(job):
    words = options(job, "gives up", 1, "--on_nonfinite", "rollback")
    result = run_script(FAULTS, fault(nan_rows=list(range(ROWS))), *words)
    assert result.returncode == 2
    assert result.stdout.count("going back to step") == 3
    assert "step 4: the loss (nan)" in result.stderr and "going back 3 times" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_loss_above_what_is_allowed_is_taken_as_one_that_is_not_finite(job):
    result = run_script("train.py", *options(job, "spike", 1, "--max_loss", "5"))
    assert result.returncode == 2
    assert "step 1: the loss (5." in result.stderr and ") is above 5, on rows " in result.stderr


def test_each_row_of_an_epoch_is_taken_once_but_those_left_out_on_any_number_of_ranks():
    left_out = order.Skipped(0, (3, 8, 9))
    for per_step in (1, 2, 3, 4):
        position, taken = order.Position(skipped=(left_out,)), []
        while position.epoch == 0:
            rows = order.step_rows(order.epoch_order(ROWS, 0, 0), position, per_step)
            taken += order.without_skipped(rows, position)
            position = order.advance(position, rows, ROWS)
        assert sorted(taken) == [row for row in range(ROWS) if row not in left_out.rows]
        rows = order.step_rows(order.epoch_order(ROWS, 0, 1), position, ROWS)
        assert order.without_skipped(rows, position) == rows  # the next epoch has them again


# --- two runs --------------------------------------------------------------------------------------------------------


def test_a_second_run_on_one_folder_is_refused_until_the_first_is_dead_however_it_dies(job, tmp_path):
    words = options(job, "shared", 1)
    [first] = start_script(tmp_path, FAULTS, fault(step=2, signal=""), *words)
    wait_until(lambda: len(losses(job, "shared", 1)) == 1)
    result = run_script("train.py", *words)
    assert result.returncode == 2
    assert f"--checkpoint_dir {job}/shared: process {first.pid} on {lock.HOST}, since 2" in result.stderr
    assert "and two runs would destroy each other's" in result.stderr and "Traceback" not in result.stderr
    assert len(losses(job, "shared", 1)) == 1

    first.kill()
    first.join()
    result = run_script("train.py", *words)
    assert result.returncode == 0, result.stderr
    assert len(losses(job, "shared", 1)) == STEPS


def test_a_folder_that_a_run_trains_into_can_be_merged_from(job, tmp_path):
    [run] = start_script(tmp_path, FAULTS, fault(step=4, signal=""), *options(job, "merged", 1))
    try:
        wait_until(lambda: len(losses(job, "merged", 1)) == 3 and (job / "merged" / "last").exists())
        result = run_script("ckpt_merger.py", "--ckpt_dir", job / "merged", "--output_fname", tmp_path / "merged.ckpt")
        assert result.returncode == 0, result.stderr
        assert torch.load(tmp_path / "merged.ckpt", weights_only=True)["optimizer"]["model.norm.weight/step"] == 2
    finally:
        run.kill()


@pytest.fixture
def of_another_kernel(tmp_path, monkeypatch) -> Path:
    """The lock that a run on another host has left, on a file system that keeps the kernel's locks to each host."""
    monkeypatch.setattr(lock, "DEAD_S", 1.5)
    monkeypatch.setattr(lock, "LOOK_S", 0.1)
    owner = {"host": "node7", "pid": 4242, "kernel": "another", "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / lock.LOCK).write_text(json.dumps(owner) + "\n")
    return tmp_path / lock.LOCK


def test_a_lock_of_another_host_counts_as_long_as_its_owner_writes_to_it(of_another_kernel):
    with lock.sole_run(of_another_kernel.parent):  # after DEAD_S: nobody does
        assert json.loads(of_another_kernel.read_text())["pid"] == os.getpid()
    assert not of_another_kernel.exists()


def _beat(path: Path) -> None:
    for number in range(100):
        with path.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.1)


def test_a_lock_of_another_host_whose_owner_writes_to_it_is_refused(of_another_kernel):
    start_server()
    owner = get_context("forkserver").Process(target=_beat, args=(of_another_kernel,))
    owner.start()
    try:
        with pytest.raises(CheckpointFolderError, match="^process 4242 on node7, since 2026"):
            lock._take(of_another_kernel)
    finally:
        owner.kill()


def test_an_owner_writes_to_its_lock_again_and_again_and_a_file_system_without_locks_is_told_by_that(
    tmp_path, monkeypatch
):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "DEAD_S", 1.5)
    monkeypatch.setattr(lock, "LOOK_S", 0.1)
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    refused = pytest.raises(CheckpointFolderError, match=f"^process {os.getpid()} on {lock.HOST}")
    with lock.sole_run(tmp_path), refused:
        lock._take(tmp_path / lock.LOCK)
    with lock.sole_run(tmp_path):
        pass


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_run_that_finds_the_disk_full_trains_on_and_saves_when_it_can(job, uninterrupted):
    result = run_script(FAULTS, fault(full_disk_step=2, rank=1), *options(job, "full", 2), n_ranks=2)
    assert result.returncode == 0, result.stderr
    assert "step 2: the checkpoint could not be saved (rank 1: [Errno 28] No space left on device)" in result.stdout
    assert losses(job, "full", 2) == uninterrupted
    assert {"0000-000004", "0000-000006"} < set(os.listdir(job / "full"))
    assert not [name for name in os.listdir(job / "full") if "000002" in name]


def test_a_run_that_is_to_stop_where_it_cannot_save_stops_after_the_step_that_is_under_way(job):
    more = ("--stop_on_save_failure", "--max_train_steps", "200")
    result = run_script(FAULTS, fault(full_disk_step=2, rank=1), *options(job, "stopped", 2, *more), n_ranks=2)
    assert result.returncode == 2
    sentence = f"error: --checkpoint_dir {job}/stopped: the checkpoint of step 2 could not be saved (rank 1: [Errno 28]"
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert 2 <= len(losses(job, "stopped", 2)) < 100
