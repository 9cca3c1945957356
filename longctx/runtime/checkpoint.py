"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there at all, and loaded by slices.

A checkpoint is a folder `checkpoints/<epoch>-<step>` of one `.distcp` file a rank and DCP's `.metadata`, with `hf/`
(configuration and tokenizer) and `checkpoint.json`: what it is of, how far training had come, and the size and digest
of every file, its own included. `checkpoints/last` links to the newest. Its tensors have flat names:
`model/<parameter>`, `optimizer/<parameter>/exp_avg`, `random/<rank>/cpu`.

A process that is killed while it saves leaves at most a folder half written, `.<epoch>-<step>.writing`, and, where a
checkpoint was being replaced, the whole one that it replaces, `.<epoch>-<step>.old-*`; the next save removes them.

A merged file (merge.py makes it) is one for torch.load, followed by its digest: {'model': {parameter: tensor},
'optimizer': {'<parameter>/exp_avg': tensor}, 'state': what checkpoint.json holds but for the files, as JSON, 'hf':
{path in hf/: bytes, uint8}}.

Other engines may store checkpoints and merged files in another form: a `CheckpointFormat` says how to read theirs.
"""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from longctx import seal
from longctx.atomic import publish_folder
from longctx.data.order import Position
from longctx.errors import CheckpointError, CheckpointFolderError, SaveError, UserError, one_line
from longctx.runtime import watch
from longctx.runtime.parallel import ParallelModel, load_slice
from longctx.runtime.schedule import Schedule
from longctx.runtime.storage import SHARD, ClosedReader, SealedWriter
from longctx.schema import Count, Range, decode

FORMAT = 2  # of checkpoint.json and of merged files: sealed
UNSEALED = 1  # the format before, which had no digests
LAST = "last"
STATE = "checkpoint.json"
STATE_ENTRY, HF_ENTRY = "state", "hf"  # of a merged file
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of a parameter's own shape; it also counts its `step`
FILES = re.compile(rf"{SHARD.pattern}|\.metadata|{re.escape(STATE)}|hf")  # all that a checkpoint folder holds


@dataclass(frozen=True)
class State:
    """What a checkpoint is of, besides its tensors.

    Attributes:
        seed: of the order of the rows.
        plan_ngpus: None in checkpoints that did not record it yet, as they did not what follows the parameters.
        parameters: name -> shape: the model it is of.
        schedule: of the learning rate.
        serial: which save to its folder it was, counted from 1: of two, the greater is the newer, whatever their steps.
        id: of this checkpoint and the merged files that are made of it; random.
        origin: the id of the checkpoint that its run was told to start from, which may be of another folder.
        document_mask: whether the documents of a row did not see each other; None in checkpoints from before.
    """

    position: Position
    seed: int
    n_rows: Count
    world_size: Annotated[int, Range(at_least=1)]
    plan_ngpus: Annotated[int, Range(at_least=1)] | None
    parameters: dict[str, list[Count]]
    schedule: Schedule | None = None
    serial: Count | None = None
    id: str | None = None
    origin: str | None = None
    document_mask: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "State":
        """Raises a ValueError for what no checkpoint can be of."""
        state = decode(State, {"plan_ngpus": None, **value})
        if state.position.row > state.n_rows:
            raise ValueError(f"position.row: {state.position.row}, where there are {state.n_rows} rows")
        return state


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder, or a merged file, that is there.

    Attributes:
        engine: whose folder it is; None of a merged file, which all engines read.
        merged: a file's entries, tensors mapped.
        origin: what the checkpoints of a run that goes on from here record as theirs.
    """

    path: Path
    state: State
    engine: str | None = None
    merged: dict[str, Any] | None = None
    origin: str | None = None


@dataclass(frozen=True)
class CheckpointFormat:
    """How an engine stores its checkpoints.

    Attributes:
        mark: the file that a checkpoint folder of this engine has, and of no other.
        shards: a pattern of files that it also has, by which it is known when the mark is lost.
        read_state: a folder -> its State. It raises a ValueError for a folder that files tell is not whole.
        check: (folder, whether to compare digests) raises a ValueError for a folder that is not what was written.
        check_folder: raises a CheckpointFolderError for what saving to a folder of checkpoints would destroy.
        merge: (checkpoint, output) -> the merged file of a folder's shards.
        as_builtin: a merged file's entries -> the same as this module has them; entries of another form as they are.
        exports_shards: whether Hugging Face's files are made from the shards, or from a merged file only.
    """

    mark: str
    shards: str
    read_state: Callable[[Path], State]
    check: Callable[[Path, bool], None]
    check_folder: Callable[[Path], None]
    merge: Callable[[Checkpoint, Path], None]
    as_builtin: Callable[[dict[str, Any]], dict[str, Any]]
    exports_shards: bool


Formats = Mapping[str, CheckpointFormat]  # by the name of the engine


# --- names ---------------------------------------------------------------------------------------------------------

_WHOLE = re.compile(r"(\d+-\d+)|\.(\d+-\d+)\.old-.+")  # other engines write fewer digits
_LEFTOVER = re.compile(r"\.\d+-\d+\.(writing|removed|old-.+)")  # of a save that was killed


def folder_name(position: Position) -> str:
    """The name of the checkpoint of this position: `<epoch>-<step>`."""
    return f"{position.epoch:04d}-{position.step:06d}"


def name_when_saved(name: str) -> str | None:
    """The name that a whole checkpoint folder was saved by, also of one that was being replaced; else None."""
    match = _WHOLE.fullmatch(name)
    return match and (match[1] or match[2])


def steps_in(checkpoint_dir: Path) -> list[int]:
    """The steps of all that is called as a checkpoint in a folder, which may not be there."""
    names = os.listdir(checkpoint_dir) if checkpoint_dir.is_dir() else []
    return sorted({int(name.split("-")[1]) for name in map(name_when_saved, names) if name})


# --- saving --------------------------------------------------------------------------------------------------------


def parameter_shapes(model: ParallelModel) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def save(
    checkpoint_dir: Path,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    state: State,
    write_hf_files: Callable[[Path], None],
) -> Path:
    """Writes a checkpoint by all ranks while they wait for it; saving.py writes one while they train.

    Raises:
        CheckpointFolderError: something that this program did not write has come into the place of the checkpoint or
            of `last`. The checkpoint is whole then too, and the error says where.
        SaveError: it could not be written; nothing is left of it. All ranks raise the same.
    """
    writer, planner = CheckpointWriter(checkpoint_dir, state, write_hf_files), make_save_planner()
    try:
        dcp.save(tensors_of(model, optimizer), storage_writer=writer, planner=planner)
    except CheckpointException as error:
        if dist.get_rank() == 0:
            discard(checkpoint_dir, folder_name(state.position), error)
        _, first = _first_failure(error)
        raise first if isinstance(first, CheckpointFolderError) else SaveError(why_not_saved(error)) from error
    return checkpoint_dir / folder_name(state.position)


class CheckpointWriter(SealedWriter):
    """Writes a checkpoint aside, and gives it its name once all of it is on disk.

    What the coordinator does alone, it does within DCP's own steps, whose errors reach all ranks.

    Args:
        write_hf_files: writes the model's configuration and tokenizer to a folder; the coordinator calls it.
        keep_last_n: checkpoints that stay, with this one; None for all.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        state: State,
        write_hf_files: Callable[[Path], None],
        keep_last_n: int | None = None,
    ):
        self.name = folder_name(state.position)
        super().__init__(_aside(checkpoint_dir, self.name), STATE, partial(_manifest_facts, checkpoint_dir, state))
        self.checkpoint_dir, self.write_hf_files, self.keep_last_n = checkpoint_dir, write_hf_files, keep_last_n

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the coordinator makes the folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Before any rank writes."""
        begin(self.checkpoint_dir, self.name, self.write_hf_files)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """When all ranks have written."""
        super().finish(metadata, results)
        publish(self.checkpoint_dir, self.name)
        if self.keep_last_n is not None:
            remove_all_but(self.keep_last_n, self.checkpoint_dir)


def _manifest_facts(checkpoint_dir: Path, state: State) -> dict[str, Any]:
    numbered = replace(state, serial=last_serial(checkpoint_dir) + 1, id=secrets.token_hex(8))
    return {"format": FORMAT, **numbered.to_json()}


def make_save_planner() -> dcp.DefaultSavePlanner:
    return dcp.DefaultSavePlanner(flatten_state_dict=False)


def tensors_of(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors that are saved, on every rank its own part, by their flat names; they share the model's memory."""
    return _named_tensors(model, optimizer) | _random_state(model.mesh.device_type)


def last_serial(checkpoint_dir: Path) -> int:
    """The greatest serial number of a checkpoint in the folder; 0 if there is none."""
    serials = [0]
    for manifest in checkpoint_dir.glob(f"*/{STATE}"):
        with suppress(OSError, ValueError):
            serials.append(read_manifest(manifest.parent)[0].serial or 0)
    return max(serials)


def begin(checkpoint_dir: Path, name: str, write_hf_files: Callable[[Path], None]) -> None:
    """Makes the folder that a checkpoint is written to."""
    aside = _aside(checkpoint_dir, name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_hf_files(aside / "hf")


def publish(checkpoint_dir: Path, name: str) -> None:
    """Gives a checkpoint that is written, manifest and all, its name, and points `last` at it.

    Raises:
        CheckpointFolderError: as `save` does.
    """
    aside, path = _aside(checkpoint_dir, name), checkpoint_dir / name
    if not _is_replaceable(path):
        raise CheckpointFolderError(
            f"{path} is in the way, which this program did not write; the checkpoint that was to be there is whole "
            f"in {aside}: move what is in the way, and rename {aside.name} to {path.name}"
        )
    publish_folder(aside, path)
    check_last(checkpoint_dir)
    _point_last(checkpoint_dir, name)
    _remove_leftovers(checkpoint_dir)


def remove_all_but(n: int, checkpoint_dir: Path) -> None:
    """Removes all but the newest whole checkpoints of the folder. What is damaged is not counted, and stays.

    What the run of one that stays was told to start from stays too: the same command asks for it when it starts again.
    """
    states: dict[Path, State] = {}
    for manifest in checkpoint_dir.glob(f"*/{STATE}"):
        path = manifest.parent
        if name_when_saved(path.name) == path.name and not path.is_symlink() and _is_replaceable(path):
            with suppress(OSError, ValueError):
                states[path] = read_state(path)
    oldest_first = sorted(states, key=lambda path: (states[path].serial or 0, states[path].position.step))
    origins = {states[path].origin for path in oldest_first[-n:]} - {None}
    for path in (path for path in oldest_first[:-n] if states[path].id not in origins):
        removed = path.with_name(f".{path.name}.removed")
        with suppress(OSError):
            os.rename(path, removed)  # at once, so that no part of it is taken for a checkpoint
        shutil.rmtree(removed, ignore_errors=True)


def discard(checkpoint_dir: Path, name: str, error: BaseException) -> None:
    """Removes what a save that failed has left, unless that is a whole checkpoint, whose place is taken."""
    if not isinstance(_first_failure(error)[1], CheckpointFolderError):
        shutil.rmtree(_aside(checkpoint_dir, name), ignore_errors=True)


def why_not_saved(error: BaseException) -> str:
    """What kept a save from being done, on one line."""
    rank, first = _first_failure(error)
    kind = "" if isinstance(first, OSError | UserError) else f"{type(first).__name__}: "
    return f"rank {rank}: {kind}{one_line(first)}"


def _first_failure(error: BaseException) -> tuple[int, BaseException]:
    """The rank that failed first, of those that DCP has gathered, and its error."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = next(iter(error.failures.items()))
        return rank, first
    return dist.get_rank(), error


def _aside(checkpoint_dir: Path, name: str) -> Path:
    return checkpoint_dir / f".{name}.writing"


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
        if _LEFTOVER.fullmatch(folder.name) and not _waits_for_its_place(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _waits_for_its_place(aside: Path) -> bool:
    """Whether it is a whole checkpoint whose place somebody has taken: `publish` has told where it is."""
    place = aside.with_name(aside.name.removeprefix(".").removesuffix(".writing"))
    return (aside / STATE).is_file() and not _is_replaceable(place)


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
    for engine, form in formats.items():
        if (path / form.mark).is_file():
            try:
                return Checkpoint(path, form.read_state(path), engine)
            except ValueError as error:
                raise not_whole(path, str(error)) from error
    raise CheckpointError(f"{path} is not there; all nodes have to see the folder of checkpoints")


def not_whole(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path.name} is not whole: {problem}; name another checkpoint")


def read_state(path: Path) -> State:
    """The state of a checkpoint folder.

    Raises:
        ValueError: it is not whole, as far as the sizes of its files tell; the message says why.
    """
    state, seals = read_manifest(path)
    seal.check_sizes(path, seals)
    return state


def check(path: Path, compare_digests: bool) -> None:
    """Raises a ValueError, which names a file, unless a checkpoint folder is what was written and holds all it should.

    Args:
        compare_digests: whether every byte is read.
    """
    state, seals = read_manifest(path)
    seal.check_sizes(path, seals)
    if compare_digests:
        seal.verify(path, seals)
    stored = ClosedReader(path).read_metadata().state_dict_metadata
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}
    sizes = {name: (list(tensor.size), tensor.properties.dtype) for name, tensor in tensors.items()}
    check_tensors(sizes, state.parameters, state.world_size)


def check_tensors(
    stored: Mapping[str, tuple[list[int], torch.dtype]], parameters: dict[str, list[int]], n_ranks: int
) -> None:
    """Raises a ValueError unless a checkpoint has all its tensors, each of its shape and a dtype that fits.

    Args:
        stored: the shapes and dtypes of the tensors that are there, by their flat names.
        n_ranks: of how many there is random state.
    """
    shapes = {f"model/{name}": shape for name, shape in parameters.items()}
    shapes |= {f"optimizer/{name}/{key}": shape for name, shape in parameters.items() for key in MOMENTS}
    shapes |= {f"optimizer/{name}/step": [] for name in parameters}
    shapes |= {f"random/{rank}/cpu": list(torch.get_rng_state().shape) for rank in range(n_ranks)}
    for name, expected in shapes.items():
        if name not in stored:
            raise ValueError(f"its tensor {name} is missing")
        shape, dtype = stored[name]
        if shape != expected:
            raise ValueError(f"its tensor {name} has the shape {shape} instead of {expected}")
        if not (dtype == torch.uint8 if name.startswith("random/") else dtype.is_floating_point):
            raise ValueError(f"its tensor {name} is of {dtype}")


def read_manifest(path: Path) -> tuple[State, dict[str, seal.Seal]]:
    """What checkpoint.json says: the state, and the seal of every other file by its name.

    Raises:
        ValueError: it is missing or damaged, or of a format that is not known here.
    """
    try:
        facts, is_sealed = seal.read_sealed_json((path / STATE).read_bytes())
        check_format(facts.get("format"), is_sealed)
        return State.from_json(facts), decode(dict[str, seal.Seal], facts["files"])
    except Exception as error:  # whatever a damaged file makes json or the lookups raise
        raise ValueError(f"its file {STATE} is damaged ({reason(error)})") from error


def check_format(number: Any, is_sealed: bool) -> None:
    """Raises a ValueError unless a format is known, and what is of the one that is sealed has its digest."""
    if number not in (UNSEALED, FORMAT):
        raise ValueError(f"its format is {number!r:.20}, and this version of the program knows {UNSEALED} and {FORMAT}")
    if number == FORMAT and not is_sealed:
        raise ValueError("its digest is missing")


def _read_merged(path: Path, formats: Formats) -> Checkpoint:
    try:
        merged = map_file(path)
        for form in formats.values():
            merged = form.as_builtin(merged)
        facts = json.loads(merged[STATE_ENTRY])
        check_format(facts.get("format", UNSEALED), seal.appended_seal(path) is not None)
        state = State.from_json(facts)
        tensors = {f"{kind}/{name}": tensor for kind in ("model", "optimizer") for name, tensor in merged[kind].items()}
        stored = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        check_tensors(stored, state.parameters, n_ranks=0)
        for name, content in merged[HF_ENTRY].items():
            check_hf_file(name, content)
    except Exception as error:  # whatever a foreign or damaged file makes torch or json raise
        raise CheckpointError(f"it is no merged checkpoint ({reason(error)}); make one with ckpt_merger.py") from error
    return Checkpoint(path, state, merged=merged)


def check_merged(path: Path, formats: Formats, compare_digest: bool) -> None:
    """Raises a CheckpointError unless a merged file is what was written and holds all it should."""
    sealed = seal.appended_seal(path)
    try:
        if compare_digest and sealed:
            seal.verify(path.parent, {path.name: sealed})
    except ValueError as error:
        raise CheckpointError(f"{error}; make it again with ckpt_merger.py") from error
    _read_merged(path, formats)  # which refuses one that has lost its digest
    if compare_digest and not sealed:
        seal.verify(path.parent, {path.name: seal.Seal(path.stat().st_size)})  # which says that there is none


def check_hf_file(name: Any, content: Any) -> None:
    """Raises a ValueError unless a file in 'hf' of a merged file has bytes, and a name that stays in its folder."""
    parts = name.split("/") if type(name) is str else []
    if not parts or any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in parts):
        raise ValueError(f"it has a file named {name!r:.60}, which would not stay in its folder")
    if not isinstance(content, torch.Tensor) or content.dtype != torch.uint8 or content.dim() != 1:
        raise ValueError(f"its file {name} has no bytes")


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
            watch.progress()
        return
    same_ranks = (state.world_size, state.plan_ngpus) == (dist.get_world_size(), model.plan_size)
    reader = ClosedReader(checkpoint.path)
    stored = reader.read_metadata().state_dict_metadata
    random = _random_state(model.mesh.device_type) if same_ranks else {}
    random = {name: value for name, value in random.items() if name in stored}  # a run on CPUs has none of a GPU
    read_shards(reader, tensors | random)
    for name, value in random.items():
        (torch.cuda if name.endswith("/cuda") else torch).set_rng_state(value)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's own, which tells of every tensor that is read, so that to read long is not taken for to hang."""

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        watch.progress()


def read_shards(reader: ClosedReader, tensors: dict[str, torch.Tensor], no_dist: bool = False) -> None:
    """Fills tensors, by their flat names, from a checkpoint folder; `no_dist`: by this process alone.

    Raises:
        CheckpointError: they can't be read, on some rank.
    """
    planner = _LoadPlanner(flatten_state_dict=False)
    with warnings.catch_warnings():  # that no_dist means one process is no news
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=no_dist)
        except CheckpointException as error:
            rank, problem = _first_failure(error)
            raise not_whole(
                Path(reader.path), f"its tensors can't be read on rank {rank} ({one_line(problem)})"
            ) from error
