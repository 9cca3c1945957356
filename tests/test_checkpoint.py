"""Checkpoints: the newest whole one is found whatever a kill has left, and what is damaged is named."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from saved_checkpoints import save
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import ckpt_merger
from longctx import atomic, seal
from longctx.data.order import Position
from longctx.engines.checkpoints import FORMATS
from longctx.errors import CheckpointError, CheckpointFolderError, NoRoom, SaveError, UserError
from longctx.job import Job
from longctx.runtime import checkpoint, merge, parallel, resume, storage, trainer, writing

ROOT = Path(__file__).parent.parent


def write_checkpoint(folder: Path, name: str, engine: str = "torch", **recorded) -> Path:
    """A checkpoint of a model of one weight, by two ranks; `recorded` is what its state says of the save."""
    path = folder / name
    path.mkdir(parents=True)
    epoch, step = name.split("-")
    state = checkpoint.State(Position(int(step), int(epoch), 0), 0, 8, 2, 1, {"w": [3]}, **recorded).to_json()
    if engine == "nnscaler":
        for rank in range(2):
            torch.save({"state": json.dumps(state)}, path / f"{rank}.ckpt")
    else:
        write_shards(path, {"format": 2, **state}, tensors_of_one_weight())
    return path


def tensors_of_one_weight() -> dict[str, torch.Tensor]:
    moments = {f"optimizer/w/{key}": torch.arange(3.0) for key in ("exp_avg", "exp_avg_sq")}
    random = {f"random/{rank}/cpu": torch.get_rng_state() for rank in range(2)}
    return {"model/w": torch.arange(3.0), "optimizer/w/step": torch.tensor(1.0), **moments, **random}


def write_shards(path: Path, facts: dict, tensors: dict[str, torch.Tensor]) -> None:
    """What a save by one process writes."""
    writer = storage.SealedWriter(path, "checkpoint.json", lambda: facts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, planner=writing.make_save_planner(), no_dist=True)


def file_of(path: Path) -> Path:
    """A file of a checkpoint, of either engine, beside the one by which it is known."""
    return path / "__0_0.distcp" if (path / "__0_0.distcp").exists() else path / "1.ckpt"


def point_last(folder: Path, name: str, engine: str = "torch") -> None:
    if engine == "torch":
        (folder / "last").symlink_to(name)
    else:
        (folder / "last").mkdir()
        for rank in range(2):
            (folder / "last" / f"{rank}.ckpt").symlink_to(f"../{name}/{rank}.ckpt")


# --- finding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "nnscaler"])
@pytest.mark.parametrize("last", [None, "0000-000003"])
def test_where_the_newest_is_damaged_the_newest_whole_one_is_taken_and_nothing_is_deleted(
    tmp_path, capsys, engine, last
):
    for name in ("0000-000001", "0001-000002", "0000-000003"):
        write_checkpoint(tmp_path, name, engine)
    file = file_of(tmp_path / "0000-000003")
    file.write_text("cut")
    if last:
        point_last(tmp_path, last, engine)
    assert resume.find(tmp_path, None, engine, FORMATS) == tmp_path / "0001-000002"
    said = capsys.readouterr().out
    assert f"checkpoint: 0000-000003 is not whole (its file {file.name} " in said
    assert said.endswith("; taking 0001-000002, the newest that is whole\n")
    assert resume.find_stored(tmp_path, FORMATS) == tmp_path / "0001-000002"
    assert resume.find(Path("none"), tmp_path, engine, FORMATS) == tmp_path / "0001-000002"
    assert file.read_text() == "cut"


@pytest.mark.parametrize("engine", ["torch", "nnscaler"])
def test_damage_that_leaves_the_size_as_it_was_is_noticed_unless_nothing_is_to_be_verified(tmp_path, capsys, engine):
    for name in ("0000-000001", "0000-000002"):
        write_checkpoint(tmp_path, name, engine)
    file = file_of(tmp_path / "0000-000002")
    content = bytearray(file.read_bytes())
    content[content.index(b"position" if engine == "nnscaler" else b"storage")] ^= 1
    file.write_bytes(content)
    assert resume.find(tmp_path, None, engine, FORMATS) == tmp_path / "0000-000001"
    assert f"0000-000002 is not whole (its file {file.name} is damaged" in capsys.readouterr().out
    assert resume.find(tmp_path, None, engine, FORMATS, verify=False) == tmp_path / "0000-000002"
    with pytest.raises(CheckpointError, match=f"^the checkpoint 0000-000002 is not whole: its file {file.name} is dam"):
        resume.find(tmp_path, tmp_path / "0000-000002", engine, FORMATS)


@pytest.mark.parametrize("engine", ["torch", "nnscaler"])
def test_where_last_names_nothing_the_newest_is_taken_and_that_is_said(tmp_path, capsys, engine):
    write_checkpoint(tmp_path, "0000-000001", engine)
    point_last(tmp_path, "0000-000009", engine)
    assert resume.find(tmp_path, None, engine, FORMATS) == tmp_path / "0000-000001"
    said = f"checkpoint: {tmp_path}/last names 0000-000009, which is gone; taking 0000-000001, the newest that is whole"
    assert said in capsys.readouterr().out


def test_the_newest_is_the_one_that_was_saved_last_whatever_last_names_and_whatever_its_steps(tmp_path, capsys):
    """A kill between the two renames that end a save leaves `last` at the one before; and a run that went back to step
    1 has saved its step 2 after the step 3 of the run before."""
    for name, serial in (("0000-000001", 1), ("0000-000003", 2), ("0000-000002", 3)):
        write_checkpoint(tmp_path, name, serial=serial)
    point_last(tmp_path, "0000-000003")
    assert resume.find(tmp_path, None, "torch", FORMATS) == tmp_path / "0000-000002"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("engine", ["torch", "nnscaler"])
def test_of_checkpoints_that_do_not_tell_which_is_newer_the_one_that_last_names_is_taken(tmp_path, capsys, engine):
    for name in ("0000-000001", "0000-000002"):
        write_checkpoint(tmp_path, name, engine)
    point_last(tmp_path, "0000-000001", engine)
    assert resume.find(tmp_path, None, engine, FORMATS) == tmp_path / "0000-000001"
    assert capsys.readouterr().out == ""


def test_a_command_that_names_where_to_start_goes_on_from_what_it_has_saved_since(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "elsewhere", "0000-000005", id="source")
    folder = tmp_path / "checkpoints"
    assert resume.find(folder, source, "torch", FORMATS) == source
    assert capsys.readouterr().out == ""
    write_checkpoint(folder, "0000-000009", serial=1, id="other")
    assert resume.find(folder, source, "torch", FORMATS) == source
    said = f"checkpoint: starting from {source}, from which no checkpoint in {folder} comes"
    assert said in capsys.readouterr().out
    for serial, name in ((2, "0000-000006"), (3, "0000-000007")):
        write_checkpoint(folder, name, serial=serial, id=name, origin="source")
    assert resume.find(folder, source, "torch", FORMATS) == folder / "0000-000007"
    assert f"checkpoint: going on from 0000-000007, which a run from {source} has saved" in capsys.readouterr().out
    file_of(folder / "0000-000007").write_text("cut")
    assert resume.find(folder, source, "torch", FORMATS) == folder / "0000-000006"


def test_a_run_that_went_back_in_its_own_folder_goes_on_from_what_it_has_saved_since(tmp_path):
    first = write_checkpoint(tmp_path, "0000-000001", serial=1, id="first")
    write_checkpoint(tmp_path, "0000-000002", serial=2)
    assert resume.find(tmp_path, first, "torch", FORMATS) == first
    write_checkpoint(tmp_path, "0000-000003", serial=3, origin="first")
    assert resume.find(tmp_path, first, "torch", FORMATS) == tmp_path / "0000-000003"


def test_a_checkpoint_that_was_being_replaced_by_a_killed_run_is_found(tmp_path, monkeypatch):
    for name in ("0000-000001", "0000-000002", "0000-000003"):
        write_checkpoint(tmp_path, name)
    point_last(tmp_path, "0000-000002")
    rename = os.rename

    def killed_before_the_second(source, target):
        if target == tmp_path / "0000-000002":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic.os, "rename", killed_before_the_second)
        (tmp_path / ".0000-000002.writing").mkdir()
        atomic.publish_folder(tmp_path / ".0000-000002.writing", tmp_path / "0000-000002")
    found = resume.find(tmp_path, None, "torch", FORMATS)
    assert found.name.startswith(".0000-000002.old-")
    assert checkpoint.read(found, FORMATS).state.position.step == 2


@pytest.mark.parametrize("engine", ["torch", "nnscaler"])
def test_where_the_last_checkpoint_is_gone_and_there_is_no_other_nothing_starts_anew(tmp_path, engine):
    point_last(tmp_path, "0000-000002", engine)
    sentence = "^its last checkpoint, .*0000-000002.*, is gone, and there is no other; put it back"
    with pytest.raises(CheckpointError, match=sentence):
        resume.find(tmp_path, None, engine, FORMATS)


def test_checkpoints_of_two_engines_do_not_get_into_one_folder(tmp_path):
    torch.save(merged_entries(), tmp_path / "merged.ckpt")
    write_checkpoint(tmp_path / "checkpoints", "0000-0002", "nnscaler")
    merged = tmp_path / "merged.ckpt"
    sentence = "^the checkpoints in it are the nnscaler engine's, .*; name another folder"
    with pytest.raises(CheckpointFolderError, match=sentence):
        resume.find(tmp_path / "checkpoints", merged, "torch", FORMATS)
    assert resume.find(tmp_path / "checkpoints", merged, "nnscaler", FORMATS) == merged


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "its file checkpoint.json is damaged"),
        ("[]", "its file checkpoint.json is damaged"),
        (
            "{}",
            "its file checkpoint.json is damaged .its format is None, and this version of the program knows 1 and 2",
        ),
        ('{"format": 3}', "its file checkpoint.json is damaged .its format is 3, and this version"),
        ('{"format": 2}', "its file checkpoint.json is damaged .its digest is missing"),
        ('{"format": 1, "files": {}}', "its file checkpoint.json is damaged .position is missing"),
    ],
)
def test_a_damaged_manifest_is_named_as_such(tmp_path, content, reason):
    path = write_checkpoint(tmp_path, "0000-000001")
    (path / "checkpoint.json").write_text(content)
    sentence = f"the checkpoint 0000-000001 is not whole: {reason}.*; name another checkpoint"
    with pytest.raises(CheckpointError, match=f"^{sentence}"):
        checkpoint.read(path, FORMATS)
    with pytest.raises(UserError, match=f"^--ckpt_dir {tmp_path}: {sentence}"):
        ckpt_merger.main(["--ckpt_dir", str(tmp_path), "--output_fname", str(tmp_path / "merged.ckpt")])


class Runs:
    """What unpickling it would run."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def bend(tensors, storage_data):
    """Ways in which `.metadata` may be wrong, each by what it does to DCP's description of the tensors."""
    first = tensors["model/w"]
    [index] = [index for index in storage_data if index.fqn == "model/w"]
    return {
        "it asks for posix.system": lambda trace: tensors.update(extra=Runs(trace)),
        "it asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata": lambda _: tensors.update(
            x=BytesStorageMetadata()
        ),
        "it asks for torch.serialization.save": lambda _: tensors.update(extra=torch.save),
        "a part of model/w is nowhere": lambda _: storage_data.pop(index),
        "a part of a tensor is in '../x.distcp'": lambda _: setattr(
            storage_data[index], "relative_path", "../x.distcp"
        ),
        "a part of a tensor lies behind the end": lambda _: setattr(storage_data[index], "offset", 10**9),
        "a part of a tensor lies outside of it": lambda _: setattr(first.chunks[0], "offsets", torch.Size([1])),
        "the parts of a tensor are not all of it": lambda _: setattr(first, "size", torch.Size([5])),
        "a tensor has no dtype": lambda _: setattr(first.properties, "dtype", "float32"),
        "it has something else, where whole numbers": lambda _: setattr(first, "size", (3.0,)),
    }


WAYS = list(bend({"model/w": None}, {MetadataIndex("model/w"): None}))


@pytest.mark.parametrize("way", WAYS)
def test_metadata_that_is_not_ours_is_refused_before_anything_in_it_runs(tmp_path, way):
    path = write_checkpoint(tmp_path, "0000-000001")
    metadata = dcp.FileSystemReader(path).read_metadata()
    bend(metadata.state_dict_metadata, metadata.storage_data)[way](tmp_path / "ran")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=f"^its file .metadata is damaged .*{re.escape(way)}"):
        storage.ClosedReader(path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_flipped_byte_in_metadata_is_an_error_or_describes_tensors_that_may_be(tmp_path):
    """Without digests, as of an older version, a flip that leaves names and numbers possible is not noticed."""
    path = write_checkpoint(tmp_path, "0000-000001")
    content = (path / ".metadata").read_bytes()
    noticed = 0
    for place in range(0, len(content), 3):
        (path / ".metadata").write_bytes(content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :])
        try:
            storage.ClosedReader(path).read_metadata()
        except ValueError:
            noticed += 1
    assert noticed > len(content) / 3 / 2


def test_metadata_of_the_library_itself_is_read_as_it_reads_it(tmp_path):
    path = write_checkpoint(tmp_path, "0000-000001")
    expected, found = dcp.FileSystemReader(path).read_metadata(), storage.ClosedReader(path).read_metadata()
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data


@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("model/w", None, "its tensor model/w is missing"),
        ("optimizer/w/exp_avg_sq", None, "its tensor optimizer/w/exp_avg_sq is missing"),
        ("optimizer/w/step", torch.ones(2), "its tensor optimizer/w/step has the shape .2. instead of "),
        ("model/w", torch.ones(4), "its tensor model/w has the shape .4. instead of .3."),
        ("model/w", torch.ones(3, dtype=torch.int64), "its tensor model/w is of torch.int64"),
        ("random/1/cpu", None, "its tensor random/1/cpu is missing"),
    ],
)
def test_a_checkpoint_without_all_its_tensors_is_not_whole(tmp_path, name, tensor, problem):
    facts = checkpoint.read_state(write_checkpoint(tmp_path, "0000-000001")).to_json()
    tensors = {**tensors_of_one_weight(), name: tensor}
    path = tmp_path / "0000-000002"
    write_shards(path, {"format": 2, **facts}, {name: each for name, each in tensors.items() if each is not None})
    with pytest.raises(CheckpointError, match=f"^the checkpoint 0000-000002 is not whole: {problem}"):
        resume.find(Path("none"), path, "torch", FORMATS, verify=False)


def merged_entries() -> dict:
    """What a merged file of a model of one weight holds, of the format without a digest."""
    tensors = tensors_of_one_weight()
    optimizer = {name.removeprefix("optimizer/"): each for name, each in tensors.items() if name.startswith("opt")}
    state = checkpoint.State(Position(1, 0, 0), 0, 8, 1, 1, {"w": [3]}).to_json()
    hf = {"config.json": torch.frombuffer(bytearray(b'{"dtype": "float32"}'), dtype=torch.uint8)}
    return {"model": {"w": tensors["model/w"]}, "optimizer": optimizer, "state": json.dumps(state), "hf": hf}


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/../../x", "..", "", "a//b", "./a", "C:/x", "a\\..\\x", "a\0b", 3]
)
def test_a_merged_file_can_not_write_outside_of_the_hugging_face_folder(tmp_path, name):
    entries = merged_entries()
    entries["hf"][name] = torch.zeros(1, dtype=torch.uint8)
    torch.save(entries, tmp_path / "merged.ckpt")
    with pytest.raises(UserError, match="^--ckpt_dir .*: it is no merged checkpoint .it has a file named .*; make one"):
        ckpt_merger.main(["--ckpt_dir", str(tmp_path / "merged.ckpt"), "--hf_dir", str(tmp_path / "hf")])
    assert os.listdir(tmp_path) == ["merged.ckpt"]


@pytest.mark.parametrize(
    ("bend", "problem"),
    [
        (lambda entries: entries["model"].clear(), "its tensor model/w is missing"),
        (
            lambda entries: entries["model"].update(w=torch.ones(2)),
            "its tensor model/w has the shape .2. instead of .3.",
        ),
        (lambda entries: entries["optimizer"].pop("w/exp_avg"), "its tensor optimizer/w/exp_avg is missing"),
        (lambda entries: entries.update(hf={"x": torch.ones(2)}), "its file x has no bytes"),
        (lambda entries: entries.update(state="3"), "it is no merged checkpoint"),
    ],
)
def test_a_merged_file_that_does_not_hold_all_it_should_is_refused(tmp_path, bend, problem):
    entries = merged_entries()
    torch.save(entries, tmp_path / "merged.ckpt")
    assert checkpoint.read(tmp_path / "merged.ckpt", FORMATS).state.position.step == 1
    bend(entries)
    torch.save(entries, tmp_path / "merged.ckpt")
    with pytest.raises(CheckpointError, match=problem):
        checkpoint.read(tmp_path / "merged.ckpt", FORMATS)


@pytest.mark.parametrize("dtype", ["load", "int64", 3, "float8_e4m3fn"])
def test_a_dtype_of_which_no_weights_are_is_refused_and_nothing_is_written(tmp_path, dtype):
    entries = merged_entries()
    content = json.dumps({"dtype": dtype}).encode()
    entries["hf"]["config.json"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    torch.save(entries, tmp_path / "merged.ckpt")
    with pytest.raises(UserError, match="^--ckpt_dir .*: its config.json has the dtype .*, of which no weights are"):
        ckpt_merger.main(["--ckpt_dir", str(tmp_path / "merged.ckpt"), "--hf_dir", str(tmp_path / "hf")])
    assert os.listdir(tmp_path) == ["merged.ckpt"]


@pytest.mark.parametrize(("file", "folder"), [("x", "x"), ("x/merged", "x"), ("x", "x/hf"), ("x", "y/../x")])
def test_two_outputs_in_one_place_are_refused_before_either_is_written(tmp_path, file, folder):
    write_checkpoint(tmp_path / "checkpoints", "0000-000001")
    outputs = ["--output_fname", str(tmp_path / file), "--hf_dir", str(tmp_path / folder)]
    with pytest.raises(UserError, match="^--hf_dir .*: it is the place of --output_fname .*; name two places apart"):
        ckpt_merger.main(["--ckpt_dir", str(tmp_path / "checkpoints"), *outputs])
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_checkpoints_and_merged_files_without_digests_are_used_and_that_is_said(tmp_path, capsys):
    path = write_checkpoint(tmp_path, "0000-000001")
    facts = json.loads((path / "checkpoint.json").read_text())
    del facts["digest"]
    facts |= {"format": 1, "files": {name: {"bytes": of["bytes"]} for name, of in facts["files"].items()}}
    (path / "checkpoint.json").write_text(json.dumps(facts))
    assert resume.find(tmp_path, None, "torch", FORMATS) == path
    assert f"verify: {path} is used without comparing digests: it was written before" in capsys.readouterr().out
    torch.save(merged_entries(), tmp_path / "merged.ckpt")
    assert resume.find(Path("none"), tmp_path / "merged.ckpt", "torch", FORMATS) == tmp_path / "merged.ckpt"
    assert f"verify: {tmp_path}/merged.ckpt is used without comparing digests" in capsys.readouterr().out


def test_a_merged_file_holds_what_the_shards_hold_and_memory_one_tensor_at_a_time(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, "0000-000001")
    alive = weakref.WeakSet()
    read = merge._read_tensor

    def read_alone(*args):
        assert not alive
        tensor = read(*args)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(merge, "_read_tensor", read_alone)
    merge.merge(checkpoint.read(path, FORMATS), tmp_path / "merged.ckpt")
    found = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    for name, tensor in tensors_of_one_weight().items():
        kind, own_name = name.split("/", 1)
        assert kind == "random" or torch.equal(found[kind][own_name], tensor)


@pytest.mark.parametrize("number", ["-1", "1.5", '"1"', "NaN", "9"])
def test_a_position_that_no_run_can_be_at_is_damage(tmp_path, number):
    path = write_checkpoint(tmp_path, "0000-000001")
    text = (path / "checkpoint.json").read_text()
    facts = json.loads(text.replace('"row": 0', f'"row": {number}'))
    (path / "checkpoint.json").write_bytes(seal.sealed_json({name: facts[name] for name in facts if name != "digest"}))
    with pytest.raises(ValueError, match="^its file checkpoint.json is damaged .position.row: "):
        checkpoint.read_state(path)


@pytest.mark.parametrize("entries", [3, {"model": {}}, {"state": 3}, {"state": []}, {"state": "{}"}])
def test_a_file_of_something_else_is_no_merged_checkpoint(tmp_path, entries):
    torch.save(entries, tmp_path / "file")
    with pytest.raises(CheckpointError, match="^it is no merged checkpoint"):
        checkpoint.read(tmp_path / "file", FORMATS)


# --- saving, loading, merging ----------------------------------------------------------------------------------------


def save_on_rank(folder: Path, plan_ngpus: int, step: int = 1) -> None:
    with parallel.process_group() as device:
        model, optimizer = small_model(device, plan_ngpus)
        torch.manual_seed(dist.get_rank())
        shapes = checkpoint.parameter_shapes(model)
        state = checkpoint.State(Position(step, 0, 0), 0, 8, dist.get_world_size(), plan_ngpus, shapes)
        save(folder, model, optimizer, state, write_hf_files)


def small_model(device: torch.device, plan_ngpus: int, width: int = 8) -> tuple:
    model = parallel.parallelize(nn.Linear(width, width), "", device, torch.float32, plan_ngpus)
    parallel.load_tensors(model, [("weight", torch.ones(width, width)), ("bias", torch.ones(width))])
    return model, trainer.make_optimizer(
        model, Job(model_id="linear", sequence_length=1, runtime_ngpus=1, name="linear")
    )


def write_hf_files(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"dtype": "float32"}')


def load_on_rank(folder: Path, plan_ngpus: int, expected: list[int]) -> None:
    """Asserts that each rank draws what it would after torch.manual_seed of its number in `expected`."""
    with parallel.process_group() as device:
        model, optimizer = small_model(device, plan_ngpus)
        torch.manual_seed(100)
        path = resume.find(folder, None, "torch", FORMATS)
        checkpoint.load(checkpoint.read(path, FORMATS), model, optimizer)
        drawn = torch.rand(1)
        torch.manual_seed(expected[dist.get_rank()])
        assert drawn == torch.rand(1)


def test_random_state_comes_back_only_where_each_rank_does_what_it_did(tmp_path):
    run_ranks(2, save_on_rank, tmp_path, 1)
    run_ranks(2, load_on_rank, tmp_path, 1, [0, 1])
    run_ranks(2, load_on_rank, tmp_path, 2, [100, 100])  # ranks of one plan draw the same


def load_where_there_is_a_gpu_on_rank(folder: Path) -> None:
    state_of_a_cpu = checkpoint._random_state
    checkpoint._random_state = lambda device_type: {**state_of_a_cpu("cpu"), "random/0/cuda": torch.get_rng_state()}
    load_on_rank(folder, 1, [0])


def test_a_run_on_a_gpu_goes_on_from_a_checkpoint_of_cpus(tmp_path):
    run_ranks(1, save_on_rank, tmp_path, 1)
    run_ranks(1, load_where_there_is_a_gpu_on_rank, tmp_path)


def test_a_save_removes_what_killed_ones_left_and_nothing_else(tmp_path):
    for name in (".0000-000004.writing", ".0000-000005.old-host-12", ".0000-000009.old-12", ".mine"):
        (tmp_path / name / "inside").mkdir(parents=True)
    run_ranks(1, save_on_rank, tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == [".mine", "0000-000001", "last"]


def save_beside_the_users_on_rank(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "thesis.tex").write_text("years of work")
    with pytest.raises(SaveError, match=f"/{name} is "):
        save_on_rank(folder, 1)


@pytest.mark.parametrize(("name", "saved_as"), [("0000-000001", ".0000-000001.writing"), ("last", "0000-000001")])
def test_what_came_into_a_checkpoints_place_while_training_stays_and_the_checkpoint_is_whole(tmp_path, name, saved_as):
    run_ranks(1, save_beside_the_users_on_rank, tmp_path, name)
    assert sorted(os.listdir(tmp_path)) == sorted([name, saved_as])
    assert (tmp_path / name / "thesis.tex").read_text() == "years of work"
    assert checkpoint.read_state(tmp_path / saved_as).position.step == 1


def test_a_checkpoint_whose_place_is_taken_outlives_the_next_save(tmp_path):
    run_ranks(1, save_beside_the_users_on_rank, tmp_path, "0000-000001")
    run_ranks(1, save_on_rank, tmp_path, 1, 2)
    assert checkpoint.read_state(tmp_path / ".0000-000001.writing").position.step == 1
    assert sorted(os.listdir(tmp_path)) == [".0000-000001.writing", "0000-000001", "0000-000002", "last"]


def test_a_save_is_not_kept_from_its_place_by_what_is_in_another(tmp_path):
    (tmp_path / "0000-000002").mkdir()
    (tmp_path / "0000-000002" / "thesis.tex").write_text("years of work")
    run_ranks(1, save_on_rank, tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["0000-000001", "0000-000002", "last"]


def save_large_on_rank(folder: Path) -> None:
    with parallel.process_group() as device:
        model, optimizer = small_model(device, 1, width=1024)
        state = checkpoint.State(Position(1, 0, 0), 0, 8, 1, 1, checkpoint.parameter_shapes(model))
        save(folder, model, optimizer, state, write_hf_files)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 12 MiB."""
    folder = tmp_path_factory.mktemp("large")
    run_ranks(1, save_large_on_rank, folder)
    return folder


def test_a_merged_file_that_the_disk_has_no_room_for_is_refused_before_it_is_written(large, tmp_path, monkeypatch):
    def full(handle, offset, size):
        assert size > 12 << 20
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoRoom, match="^there is no room for it .*No space left"):
        merge.merge(checkpoint.read(large / "last", FORMATS), tmp_path / "merged.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [1 << 16, 3 << 20])
@pytest.mark.parametrize("option", ["output_fname", "hf_dir"])
def test_a_merger_that_may_not_write_as_much_ends_in_one_sentence(large, tmp_path, option, limit):
    command = [sys.executable, str(ROOT / "ckpt_merger.py"), "--ckpt_dir", str(large)]

    def allow_less() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(
        [*command, f"--{option}", str(tmp_path / "merged")],
        capture_output=True,
        text=True,
        preexec_fn=allow_less,
    )
    assert result.returncode == 2
    [sentence] = [line for line in result.stderr.splitlines() if line.startswith("ckpt_merger.py: error:")]
    assert f"--{option} {tmp_path}/merged: there is no room for it" in sentence
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
