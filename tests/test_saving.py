"""Saving while training goes on: what is saved is what was there, and a disk that fails costs a checkpoint, no run."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_checkpoint import small_model, write_hf_files

from longctx.data.order import Position
from longctx.engines.checkpoints import FORMATS
from longctx.errors import NoRoom, NotFinite, SaveError
from longctx.job import Job
from longctx.runtime import checkpoint, parallel, resume, saving, writing
from longctx.runtime.storage import HashingFileSystem


class Training:
    """A model whose every value is the number of its step, and what saves it."""

    def __init__(self, device: torch.device, folder: Path, **options):
        names = {"model_id": "linear", "sequence_length": 1, "runtime_ngpus": 1, "name": "linear"}
        self.job = Job(**names, checkpoint_dir=folder, **options)
        self.model, self.optimizer = small_model(device, plan_ngpus=1)
        self.saver = saving.Saver(self.job, self.model, self.optimizer, write_hf_files)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = checkpoint.tensors_of(self.model, self.optimizer)
        return {name: parallel.local(tensor) for name, tensor in named.items() if tensor.is_floating_point()}

    def go_to(self, step: int) -> None:
        for tensor in self.tensors().values():
            tensor.fill_(step)

    def save(self, step: int, origin: str | None = None, number: int | None = None) -> None:
        """Values and seed are the step, or `number`."""
        number = step if number is None else number
        self.go_to(number)
        shapes = checkpoint.parameter_shapes(self.model)
        state = checkpoint.State(Position(step, 0, 0), number, 8, dist.get_world_size(), 1, shapes, origin=origin)
        self.saver.save(state)

    def assert_loads(self, folder: Path, step: int) -> None:
        """Asserts that the newest checkpoint is the one of `step`, and holds what there was then."""
        self.go_to(-1)
        found = checkpoint.read(resume.find(folder, None, "torch", FORMATS), FORMATS)
        assert found.state.position.step == step
        checkpoint.load(found, self.model, self.optimizer)
        assert all((tensor == step).all() for tensor in self.tensors().values())


@contextmanager
def training(folder: Path, **options) -> Iterator[Training]:
    with parallel.process_group("cpu") as device:
        yield Training(device, folder, **options)


@contextmanager
def writing_held_up() -> Iterator[threading.Event]:
    """No save goes on to write until the event is set."""
    go_on, write_data = threading.Event(), writing.CheckpointWriter.write_data

    def held_up(*args):
        go_on.wait(60)
        return write_data(*args)

    with patch.object(writing.CheckpointWriter, "write_data", held_up):
        yield go_on


# --- what is saved ---------------------------------------------------------------------------------------------------


def train_on_while_saving_on_rank(folder: Path) -> None:
    with training(folder) as run:
        for step in (1, 2):  # the second time into the same copies
            with writing_held_up() as go_on:
                run.save(step)
                run.go_to(step + 10)
                assert not run.saver.under_way.done()
                assert not (folder / f"0000-00000{step}").exists()
                go_on.set()
                run.saver.finish()
            run.assert_loads(folder, step)
            assert set(os.listdir(folder)) == {*(f"0000-00000{number}" for number in range(1, step + 1)), "last"}
            seconds = run.saver.take_seconds()
            assert 0 < seconds["save_stalled_s"] < seconds["save_sealed_s"]
            assert set(run.saver.take_seconds().values()) == {None}


def test_what_is_saved_is_what_was_there_however_far_training_goes_on_while_it_is_written(tmp_path):
    run_ranks(2, train_on_while_saving_on_rank, tmp_path, start_method="fork")


def save_twice_at_once_on_rank(folder: Path) -> None:
    with training(folder) as run, writing_held_up() as go_on:
        run.save(1)
        threading.Timer(0.2, go_on.set).start()
        run.save(2)
        assert (folder / "0000-000001").is_dir()
        run.saver.finish()
        run.assert_loads(folder, 2)


def test_a_save_waits_for_the_one_before_it_and_says_so(tmp_path, capfd):
    run_ranks(2, save_twice_at_once_on_rank, tmp_path, start_method="fork")
    out = capfd.readouterr().out
    assert out.count("step 2: waits for the checkpoint before, which is still being written") == 1
    assert out.index("waits for") < out.index(f"step 1: saved {tmp_path}/0000-000001 in ") < out.index("step 2: saved")


def end_in_an_error_on_rank(folder: Path) -> None:
    with parallel.process_group("cpu") as device, writing_held_up() as go_on, pytest.raises(ValueError):
        run = Training(device, folder)
        with saving.saving(run.job, run.model, run.optimizer, write_hf_files) as run.saver:
            run.save(1)
            threading.Timer(0.2, go_on.set).start()
            raise ValueError("the next step failed")


def test_a_save_that_is_under_way_when_training_ends_in_an_error_is_not_lost(tmp_path):
    run_ranks(1, end_in_an_error_on_rank, tmp_path, start_method="fork")
    assert checkpoint.read_state(tmp_path / "last").position.step == 1


def save_what_blew_up_on_rank(folder: Path, value: float) -> None:
    with training(folder) as run:
        run.save(1)
        run.saver.wait()
        if dist.get_rank() == 1:
            fill = torch.Tensor.fill_
            with patch.object(torch.Tensor, "fill_", lambda tensor, _: fill(tensor, value)):
                run.go_to(2)
            with patch.object(run, "go_to"), pytest.raises(NotFinite) as error:
                run.save(2)
        else:
            with pytest.raises(NotFinite) as error:
                run.save(2)
        assert str(error.value) == (
            "step 2: the update has left 'model/weight' with a NaN or an infinity; it is not saved, and the last "
            "checkpoint is kept"
        )
        run.assert_loads(folder, 1)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_that_an_update_has_blown_up_on_one_rank_is_not_saved(tmp_path, value):
    run_ranks(2, save_what_blew_up_on_rank, tmp_path, value, start_method="fork")
    assert sorted(os.listdir(tmp_path)) == ["0000-000001", "last"]


# --- disks that fail -------------------------------------------------------------------------------------------------


class FullDisk:
    """A stream of a disk on which there is no space left."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Only rank 1 meets it, in the middle of the save."""
    create_stream = HashingFileSystem.create_stream

    @contextmanager
    def full(*args):
        with create_stream(*args) as stream:
            yield FullDisk(stream) if dist.get_rank() == 1 else stream

    with patch.object(HashingFileSystem, "create_stream", full):
        yield


@contextmanager
def read_only_folder(folder: Path) -> Iterator[None]:
    """chmod would not keep a test that runs as root from writing."""

    def refused(path: Path, *args, **options) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with patch.object(Path, "mkdir", refused):
        yield


@contextmanager
def vanished_folder(folder: Path) -> Iterator[None]:
    write_data = writing.CheckpointWriter.write_data

    def vanishing(*args):
        written = write_data(*args)
        shutil.rmtree(folder, ignore_errors=True)
        return written

    with patch.object(writing.CheckpointWriter, "write_data", vanishing):
        yield


DISKS = {full_disk: "rank 1: .*No space left", read_only_folder: "Permission denied", vanished_folder: "No such file"}


def meet_a_disk_that_fails_on_rank(folder: Path, disk) -> None:
    with training(folder) as run:
        run.save(1)
        run.saver.wait()
        with disk(folder):
            run.save(2)
            assert run.saver.wait().problem
        assert dist.get_rank() != 0 or not list(folder.glob(".*"))  # rank 0 removes them before it goes on
        run.save(3)
        run.saver.finish()
        run.assert_loads(folder, 3)


@pytest.mark.parametrize("disk", DISKS)
def test_training_goes_on_where_a_checkpoint_cannot_be_saved_and_the_next_is(tmp_path, capfd, disk):
    run_ranks(2, meet_a_disk_that_fails_on_rank, tmp_path, disk, start_method="fork")
    said = capfd.readouterr()
    [line] = [line for line in said.out.splitlines() if "could not be saved" in line]
    sentence = r"step 2: the checkpoint could not be saved \(rank [01]: .*\); training goes on without it"
    assert re.fullmatch(sentence, line)
    assert re.search(DISKS[disk], line)
    assert "Traceback" not in said.err


def stop_at_a_disk_that_fails_on_rank(folder: Path) -> None:
    with training(folder, stop_on_save_failure=True) as run, full_disk(folder):
        run.save(1)
        for go_on in (lambda: run.save(2), run.saver.finish):
            with pytest.raises(SaveError, match=r"^the checkpoint of step 1 could not be saved \(rank 1: .*space"):
                go_on()


def test_a_run_that_is_to_stop_where_a_checkpoint_cannot_be_saved_stops_on_all_ranks(tmp_path):
    run_ranks(2, stop_at_a_disk_that_fails_on_rank, tmp_path, start_method="fork")
    assert not list(tmp_path.iterdir())


def end_at_a_disk_that_fails_on_rank(folder: Path, is_mended: bool) -> None:
    with training(folder) as run:
        with full_disk(folder):
            run.save(1)
            if not is_mended:
                with pytest.raises(SaveError, match="^the checkpoint of step 1 could not be saved .*; make room"):
                    run.saver.finish()
            else:
                run.saver.wait()
        if is_mended:
            run.saver.finish()
            run.assert_loads(folder, 1)


@pytest.mark.parametrize("is_mended", [True, False])
def test_the_last_checkpoint_of_a_run_is_tried_again_and_the_run_fails_only_if_that_does(tmp_path, is_mended):
    run_ranks(2, end_at_a_disk_that_fails_on_rank, tmp_path, is_mended, start_method="fork")


# --- room ------------------------------------------------------------------------------------------------------------


def save_and_keep_on_rank(folder: Path, n: int) -> None:
    with training(folder, keep_last_n=n) as run:
        for step in (5, 6, 2, 7):  # 2: after the run was told to go on from an older one
            run.save(step)
        run.saver.finish()


@pytest.mark.parametrize(("n", "left"), [(1, ["0000-000007"]), (3, ["0000-000002", "0000-000006", "0000-000007"])])
def test_the_newest_checkpoints_are_kept_and_what_is_damaged_or_not_ours_stays(tmp_path, n, left):
    damaged, theirs = tmp_path / "0000-000001", tmp_path / "0000-000003"
    run_ranks(1, save_and_keep_on_rank, tmp_path / "made", 1, start_method="fork")
    shutil.copytree(tmp_path / "made" / "0000-000007", damaged)
    (damaged / "checkpoint.json").write_text("{")
    shutil.copytree(tmp_path / "made" / "0000-000007", theirs)
    (theirs / "thesis.tex").write_text("years of work")
    run_ranks(1, save_and_keep_on_rank, tmp_path, n, start_method="fork")
    assert sorted(os.listdir(tmp_path)) == sorted(["0000-000001", "0000-000003", *left, "last", "made"])


def go_on_from_the_first_on_rank(folder: Path) -> None:
    with training(folder, keep_last_n=1) as run:
        run.save(1)
        run.saver.finish()
        origin = checkpoint.read_state(folder / "0000-000001").id
        for step in (2, 3):
            run.save(step, origin)
        run.saver.finish()


def test_the_checkpoint_that_a_run_was_told_to_start_from_stays_since_its_command_asks_for_it_again(tmp_path):
    run_ranks(1, go_on_from_the_first_on_rank, tmp_path, start_method="fork")
    assert sorted(os.listdir(tmp_path)) == ["0000-000001", "0000-000003", "last"]


def fail_to_replace_on_rank(folder: Path) -> None:
    with training(folder, keep_last_n=1) as run:
        run.save(1)
        run.saver.wait()
        with full_disk(folder):
            run.save(2)
            run.saver.wait()
        run.assert_loads(folder, 1)


def test_the_oldest_checkpoint_goes_only_once_a_newer_is_whole(tmp_path):
    run_ranks(2, fail_to_replace_on_rank, tmp_path, start_method="fork")


@pytest.mark.parametrize(
    ("n_saves", "is_there", "free", "is_enough"),
    [
        (5, False, 24e9, True),
        (5, False, 23e9, False),
        (5, True, 12e9, True),
        (1, False, 12e9, True),
        (0, False, 0, True),
    ],
)
def test_the_disk_has_to_have_room_for_the_next_checkpoint_beside_the_last(
    tmp_path, monkeypatch, n_saves, is_there, free, is_enough
):
    folder = tmp_path / "checkpoints"
    if is_there:
        (folder / "0000-000001").mkdir(parents=True)
        (folder / "0000-000001" / "checkpoint.json").write_text("{}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    parameters = {"weight": [1000, 1000, 1000]}
    if is_enough:
        saving.check_room(folder, parameters, n_saves)
    else:
        with pytest.raises(NoRoom, match="^a checkpoint takes 12 GB, and there have to be 24 free .*, where 23 are; "):
            saving.check_room(folder, parameters, n_saves)
