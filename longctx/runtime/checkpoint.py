"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there at all, and loaded by slices.

A checkpoint is a folder `checkpoints/<epoch>-<step>` of one `.distcp` file a rank and DCP's `.metadata`, with `hf/`
(configuration and tokenizer) and `checkpoint.json`: what it is of, how far training had come, and the size and digest
of every file, its own included. `checkpoints/last` links to the newest. Its tensors have flat names:
`model/<parameter>`, `optimizer/<parameter>/exp_avg`, `random/<rank>/cpu`.

A merged file (merge.py makes it) is one for torch.load, followed by its digest: {'model': {parameter: tensor},
'optimizer': {'<parameter>/exp_avg': tensor}, 'state': what checkpoint.json holds but for the files, as JSON, 'hf':
{path in hf/: bytes, uint8}}.

Other engines may store checkpoints and merged files in another form: a `CheckpointFormat` says how to read theirs.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from longctx import seal
from longctx.data.order import Position
from longctx.errors import CheckpointError, one_line
from longctx.runtime import watch
from longctx.runtime.parallel import ParallelModel, load_slice
from longctx.runtime.schedule import Schedule
from longctx.runtime.storage import ClosedReader
from longctx.schema import Count, Range, decode

FORMAT = 2  # of checkpoint.json and of merged files: sealed
UNSEALED = 1  # the format before, which had no digests
LAST = "last"
STATE = "checkpoint.json"
STATE_ENTRY, HF_ENTRY = "state", "hf"  # of a merged file
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of a parameter's own shape; it also counts its `step`


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


# --- tensors -------------------------------------------------------------------------------------------------------


def parameter_shapes(model: ParallelModel) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def tensors_of(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors that are saved, on every rank its own part, by their flat names; they share the model's memory."""
    return _named_tensors(model, optimizer) | _random_state(model.mesh.device_type)


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
            rank, problem = first_failure(error)
            raise not_whole(
                Path(reader.path), f"its tensors can't be read on rank {rank} ({one_line(problem)})"
            ) from error


def first_failure(error: BaseException) -> tuple[int, BaseException]:
    """The rank that failed first, of those that DCP has gathered, and its error."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = next(iter(error.failures.items()))
        return rank, first
    return dist.get_rank(), error
