"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there at all, and loaded by slices.

A checkpoint is a folder `checkpoints/<epoch>-<step>` of one `.distcp` file a rank and DCP's `.metadata`, with
`checkpoint.json` (what it is of, how far training had come, and the size of every file) and `hf/` (configuration and
tokenizer). `checkpoints/last` links to the newest. Its tensors have flat names: `model/<parameter>`,
`optimizer/<parameter>/exp_avg`, `random/<rank>/cpu`.

A process that is killed while it saves leaves at most a folder half written, `.<epoch>-<step>.writing`, and, where a
checkpoint was being replaced, the whole one that it replaces, `.<epoch>-<step>.old-*`; the next save removes them.

A merged file (merge.py makes it) is one for torch.load: {'model': {parameter: tensor}, 'optimizer':
{'<parameter>/exp_avg': tensor}, 'state': what checkpoint.json holds, as JSON, 'hf': {path in hf/: bytes, uint8}}.

Other engines may store checkpoints and merged files in another form: a `CheckpointFormat` says how to read theirs.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from longctx.atomic import publish_folder
from longctx.data.order import Position
from longctx.errors import CheckpointError, CheckpointFolderError, one_line
from longctx.runtime.parallel import ParallelModel, load_slice
from longctx.runtime.schedule import Schedule

VERSION = 1  # of what checkpoint.json holds
LAST = "last"
STATE = "checkpoint.json"
STATE_ENTRY, HF_ENTRY = "state", "hf"  # of a merged file
FILES = re.compile(rf"__\d+_\d+\.distcp|\.metadata|{re.escape(STATE)}|hf")  # all that a checkpoint folder holds


@dataclass(frozen=True)
class State:
    """What a checkpoint is of, besides its tensors."""

    position: Position
    seed: int  # of the order of the rows
    n_rows: int
    world_size: int
    plan_ngpus: int | None  # None in checkpoints that did not record it yet
    parameters: dict[str, list[int]]  # name -> shape: the model it is of
    schedule: Schedule | None = None  # of the learning rate; None in checkpoints that did not record it yet

    def to_json(self) -> dict[str, Any]:
        return {"format": VERSION, **asdict(self)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "State":
        position = Position(**value["position"])
        ranks = value["world_size"], value.get("plan_ngpus")
        schedule = Schedule(**value["schedule"]) if value.get("schedule") else None
        return State(position, value["seed"], value["n_rows"], *ranks, value["parameters"], schedule)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder, or a merged file, that is there. `merged` has a file's entries, tensors mapped."""

    path: Path
    state: State
    engine: str | None = None  # whose folder it is; None of a merged file, which all engines read
    merged: dict[str, Any] | None = None


@dataclass(frozen=True)
class CheckpointFormat:
    """How an engine stores its checkpoints.

    Attributes:
        mark: the file that a checkpoint folder of this engine has, and of no other.
        read_state: a folder -> its State. It raises a ValueError that says why the folder is not whole.
        check_folder: raises a CheckpointFolderError for what saving to a folder of checkpoints would destroy.
        merge: (checkpoint, output) -> the merged file of a folder's shards.
        as_builtin: a merged file's entries -> the same as this module has them; entries of another form as they are.
        exports_shards: whether Hugging Face's files are made from the shards, or from a merged file only.
    """

    mark: str
    read_state: Callable[[Path], State]
    check_folder: Callable[[Path], None]
    merge: Callable[[Checkpoint, Path], None]
    as_builtin: Callable[[dict[str, Any]], dict[str, Any]]
    exports_shards: bool


Formats = Mapping[str, CheckpointFormat]  # by the name of the engine


# --- names ---------------------------------------------------------------------------------------------------------

_WHOLE = re.compile(r"(\d+-\d+)|\.(\d+-\d+)\.old-.+")  # other engines write fewer digits
_LEFTOVER = re.compile(r"\.\d+-\d+\.(writing|old-.+)")  # of a save that was killed


def folder_name(position: Position) -> str:
    """The name of the checkpoint of this position: `<epoch>-<step>`."""
    return f"{position.epoch:04d}-{position.step:06d}"


def name_when_saved(name: str) -> str | None:
    """The name that a whole checkpoint folder was saved by, also of one that was being replaced; else None."""
    match = _WHOLE.fullmatch(name)
    return match and (match[1] or match[2])


# --- saving --------------------------------------------------------------------------------------------------------


def parameter_shapes(model: ParallelModel) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def save(
    checkpoint_dir: Path,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    state: State,
    save_hf_files: Callable[[Path], None],
) -> Path:
    """Writes a checkpoint by all ranks, then points `last` at it. It has its name only once all of it is on disk.

    Args:
        save_hf_files: writes the model's configuration and tokenizer to a folder; rank 0 calls it.

    Raises:
        CheckpointFolderError: something that this program did not write has come into the place of the checkpoint or
            of `last`. The checkpoint is whole then too, and the error says where.
    """
    path = checkpoint_dir / folder_name(state.position)
    aside = checkpoint_dir / f".{path.name}.writing"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    tensors = _named_tensors(model, optimizer) | _random_state(model.mesh.device_type)
    dcp.save(tensors, storage_writer=FileSystemWriter(aside), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    if dist.get_rank() == 0:
        save_hf_files(aside / "hf")
        files = {str(f.relative_to(aside)): f.stat().st_size for f in sorted(aside.rglob("*")) if f.is_file()}
        manifest = {**state.to_json(), "files": {name: {"bytes": size} for name, size in files.items()}}
        (aside / STATE).write_text(json.dumps(manifest))
        if not _is_replaceable(path):
            raise CheckpointFolderError(
                f"{path} is in the way, which this program did not write; the checkpoint that was to be there is whole "
                f"in {aside}: move what is in the way, and rename {aside.name} to {path.name}"
            )
        publish_folder(aside, path)
        check_last(checkpoint_dir)
        _point_last(checkpoint_dir, path.name)
        _remove_leftovers(checkpoint_dir)
    dist.barrier()
    return path


def _named_tensors(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.module.named_parameters():
        tensors[f"model/{name}"] = model.globally(name, parameter.detach())
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = model.globally(name, value)
    return tensors


def _random_state(device_type: str) -> dict[str, torch.Tensor]:
    state = {f"random/{dist.get_rank()}/cpu": torch.get_rng_state()}
    if device_type == "cuda":
        state[f"random/{dist.get_rank()}/cuda"] = torch.cuda.get_rng_state()
    return state


def _point_last(checkpoint_dir: Path, name: str) -> None:
    aside = checkpoint_dir / f".{LAST}.writing"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, checkpoint_dir / LAST)


def _remove_leftovers(checkpoint_dir: Path) -> None:
    """Removes what killed saves have left. Only once `last` is whole: until then it may be all that there is."""
    for folder in checkpoint_dir.iterdir():
        if _LEFTOVER.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def check_last(folder: Path) -> None:
    """Raises a CheckpointFolderError if what is called `last` in a folder of checkpoints is not a link."""
    if os.path.lexists(folder / LAST) and not (folder / LAST).is_symlink():
        raise CheckpointFolderError(
            f"{folder / LAST} is no link to a checkpoint, as this program makes it; move it, or name another folder"
        )


def check_places(folder: Path, positions: Iterable[Position]) -> None:
    """Raises a CheckpointFolderError if a checkpoint of one of these positions would replace somebody's files."""
    for path in map(folder.joinpath, map(folder_name, positions)):
        if not _is_replaceable(path):
            raise CheckpointFolderError(
                f"{path} has the name of a checkpoint that this run would save, but this program did not write it; "
                "move it, or name another folder"
            )


def _is_replaceable(path: Path) -> bool:
    """Whether there is nothing at `path`, or a checkpoint of this program's, though it may have lost files."""
    if not os.path.lexists(path):
        return True
    return path.is_dir() and not path.is_symlink() and all(FILES.fullmatch(file.name) for file in path.iterdir())


# --- reading -------------------------------------------------------------------------------------------------------


def read(path: Path, formats: Formats) -> Checkpoint:
    """The checkpoint folder or merged file at `path`.

    Raises:
        CheckpointError: it is none, or files of it are missing or cut short.
    """
    if path.is_file():
        return _read_merged(path, formats)
    engine, form = next((name, form) for name, form in formats.items() if (path / form.mark).is_file())
    try:
        return Checkpoint(path, form.read_state(path), engine)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {path.name} is not whole: {error}; name another checkpoint") from error


def read_state(path: Path) -> State:
    """The state of a checkpoint folder.

    Raises:
        ValueError: it is not whole; the message says why.
    """
    try:
        manifest = json.loads((path / STATE).read_text())
        state = State.from_json(manifest)
        sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    except Exception as error:  # whatever a damaged file makes json or the lookups raise
        raise ValueError(f"its file {STATE} is damaged ({reason(error)})") from error
    for name, expected in sizes.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            raise ValueError(f"its file {name} is missing")
        if size != expected:
            raise ValueError(f"its file {name} has {size} bytes instead of {expected}")
    return state


def _read_merged(path: Path, formats: Formats) -> Checkpoint:
    try:
        merged = map_file(path)
        for form in formats.values():
            merged = form.as_builtin(merged)
        return Checkpoint(path, State.from_json(json.loads(merged[STATE_ENTRY])), merged=merged)
    except Exception as error:  # whatever a foreign or damaged file makes torch or json raise
        raise CheckpointError(f"it is no merged checkpoint ({reason(error)}); make one with ckpt_merger.py") from error


def map_file(path: Path) -> dict[str, Any]:
    """The entries of a file of torch.save's; their tensors are mapped, not read."""
    with torch.serialization.safe_globals([slice]):  # shards may say which slices of a tensor they hold
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def reason(error: Exception) -> str:
    """What a damaged file made a library raise, on one line."""
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)


# --- loading -------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, model: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
    """Fills parameters and optimizer by slices and, where each rank does what it did, random state.

    Each rank has random state of its own, equal within a plan: over other plans, ranks that have to agree would not.
    """
    tensors, state = _named_tensors(model, optimizer), checkpoint.state
    if checkpoint.merged:
        for name, tensor in tensors.items():
            kind, own_name = name.split("/", 1)
            load_slice(tensor, checkpoint.merged[kind][own_name].__getitem__)
        return
    same_ranks = (state.world_size, state.plan_ngpus) == (dist.get_world_size(), model.plan_size)
    stored = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    random = _random_state(model.mesh.device_type) if same_ranks else {}
    random = {name: value for name, value in random.items() if name in stored}  # a run on CPUs has none of a GPU
    read_shards(checkpoint.path, tensors | random)
    for name, value in random.items():
        (torch.cuda if name.endswith("/cuda") else torch).set_rng_state(value)


def read_shards(path: Path, tensors: dict[str, torch.Tensor], no_dist: bool = False) -> None:
    """Fills tensors, by their flat names, from a checkpoint folder; `no_dist`: by this process alone."""
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with warnings.catch_warnings():  # that no_dist means one process is no news
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=FileSystemReader(path), planner=planner, no_dist=no_dist)
