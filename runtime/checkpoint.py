"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there at all, resumed by slices, merged.

A checkpoint is a folder `checkpoints/<epoch>-<step>` of one `.distcp` file a rank and DCP's `.metadata`, with
`checkpoint.json` (what it is of, how far training had come, and the size of every file) and `hf/` (configuration and
tokenizer). `checkpoints/last` links to the newest. Its tensors have flat names: `model/<parameter>`,
`optimizer/<parameter>/exp_avg`, `random/<rank>/cpu`.

A merged file is one for torch.load: {'model': {parameter: tensor}, 'optimizer': {'<parameter>/exp_avg': tensor},
'state': what checkpoint.json holds, as JSON, 'hf': {file name: bytes, uint8}}. nnScaler's checkpoints, a
`<rank>.ckpt` a rank, and its merged files have the last two beside their own entries, and are read here too.
"""

import json
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from tqdm import tqdm

from errors import UserError, one_line
from files import publish_folder, whole_file, whole_folder
from runtime.data import Position
from runtime.parallel import ParallelModel, load_slice

FORMAT = 1
LAST = "last"
STATE = "checkpoint.json"
NNSCALER_SHARD = "0.ckpt"  # of rank 0, in a checkpoint of nnScaler's
MARKS = {"torch": STATE, "nnscaler": NNSCALER_SHARD}  # the file by which to know an engine's checkpoint
NNSCALER_PREFIX = "loss.model."  # of a parameter's name there, before the name that Hugging Face gives it
STATE_ENTRY, HF_ENTRY = "state", "hf"  # of a merged file


@dataclass(frozen=True)
class State:
    """What a checkpoint is of, besides its tensors."""

    position: Position
    seed: int  # of the order of the rows
    n_rows: int
    world_size: int
    parameters: dict[str, list[int]]  # name -> shape: the model it is of

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "State":
        return State(
            Position(**value["position"]), value["seed"], value["n_rows"], value["world_size"], value["parameters"]
        )


def parameter_shapes(model: ParallelModel) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


# --- saving --------------------------------------------------------------------------------------------------------


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
    """
    path = checkpoint_dir / f"{state.position.epoch:04d}-{state.position.step:06d}"
    aside = checkpoint_dir / f".{path.name}.writing"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    tensors = _named_tensors(model, optimizer) | _random_state()
    dcp.save(tensors, storage_writer=FileSystemWriter(aside), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    if dist.get_rank() == 0:
        save_hf_files(aside / "hf")
        files = {str(f.relative_to(aside)): f.stat().st_size for f in sorted(aside.rglob("*")) if f.is_file()}
        manifest = {**state.to_json(), "files": {name: {"bytes": size} for name, size in files.items()}}
        (aside / STATE).write_text(json.dumps(manifest))
        publish_folder(aside, path)
        _point_last(checkpoint_dir, path.name)
    dist.barrier()
    return path


def _named_tensors(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.module.named_parameters():
        tensors[f"model/{name}"] = model.globally(name, parameter.detach())
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = model.globally(name, value)
    return tensors


def _random_state() -> dict[str, torch.Tensor]:
    state = {f"random/{dist.get_rank()}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random/{dist.get_rank()}/cuda"] = torch.cuda.get_rng_state()
    return state


def _point_last(checkpoint_dir: Path, name: str) -> None:
    aside = checkpoint_dir / f".{LAST}.writing"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, checkpoint_dir / LAST)


# --- finding and checking ------------------------------------------------------------------------------------------


def find(checkpoint_dir: Path, resume_path: str | None, engine: str = "torch") -> Path | None:
    """What to resume from: `resume_path` (a checkpoint, a folder of checkpoints or a merged file), else the last.

    None where there is no checkpoint yet.

    Raises:
        UserError: `resume_path` is no such thing, or the checkpoint is another engine's and not merged.
    """
    path = Path(resume_path or checkpoint_dir)
    option = "--resume_path" if resume_path else "--checkpoint_dir"
    if resume_path and path.is_file():
        return path
    if found := _checkpoint_in(path, engine):
        return found
    for other in MARKS:
        if _checkpoint_in(path, other):
            raise UserError(
                f"{option} {path}: its checkpoint is the {other} engine's; choose --engine {other}, or merge it with "
                "ckpt_merger.py and name the merged file with --resume_path"
            )
    if resume_path:
        what = "it has no checkpoint in it" if path.is_dir() else "there is no such file or folder"
        raise UserError(f"--resume_path {resume_path}: {what}; name a checkpoint folder or a merged file")
    return None


def find_stored(ckpt_dir: Path) -> Path:
    """What --ckpt_dir names: a merged file, a checkpoint of either engine, or the last one in a folder of them.

    Raises:
        UserError: there is none.
    """
    found = [ckpt_dir] if ckpt_dir.is_file() else [_checkpoint_in(ckpt_dir, engine) for engine in MARKS]
    if not any(found):
        what = "it has no checkpoint in it" if ckpt_dir.is_dir() else "there is no such folder"
        raise UserError(f"--ckpt_dir {ckpt_dir}: {what}; name the --checkpoint_dir that train.py wrote to")
    return next(path for path in found if path)


def is_nnscalers(path: Path) -> bool:
    """Whether a checkpoint folder is nnScaler's."""
    return (path / NNSCALER_SHARD).is_file()


def _checkpoint_in(folder: Path, engine: str) -> Path | None:
    """`folder` itself if it is a checkpoint of the engine's, else the last one in it, if any."""
    mark = MARKS[engine]
    if (folder / mark).is_file():
        return folder
    return (folder / LAST / mark).resolve().parent if (folder / LAST / mark).is_file() else None


def read_state(path: Path, option: str) -> State:
    """The state of a checkpoint folder or merged file; `option` is what a person named it with.

    Raises:
        UserError: it is none, or files of it are missing or cut short.
    """
    if path.is_file():
        return State.from_json(json.loads(_open_merged(path, option)[STATE_ENTRY]))
    if is_nnscalers(path):
        return State.from_json(json.loads(_torch_load(path / NNSCALER_SHARD, option)[STATE_ENTRY]))
    manifest = json.loads((path / STATE).read_text())
    for name, facts in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != facts["bytes"]:
            problem = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise UserError(f"{option} {path}: its file {name} {problem}; resume from another checkpoint")
    return State.from_json(manifest)


def check_same_model(state: State, parameters: dict[str, list[int]], option: str, path: Path) -> None:
    """Raises a UserError if a checkpoint is not of the model with these parameters."""
    differing = [n for n in {**state.parameters, **parameters} if state.parameters.get(n) != parameters.get(n)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{option} {path}: it is a checkpoint of another model ({name!r} is {state.parameters.get(name, 'not')} "
            f"there and {parameters.get(name, 'not')} in --model_id); "
            "name another checkpoint, or another --checkpoint_dir to start anew"
        )


def check_same_order(state: State, seed: int, n_rows: int, option: str, path: Path) -> None:
    """Raises a UserError if the rows would come in another order than the checkpoint's run has seen them in."""
    if state.seed != seed:
        raise UserError(
            f"--seed {seed}: {option} {path} is of a run with seed {state.seed}, and another would shuffle its rows "
            f"anew in the middle of an epoch; pass --seed {state.seed}"
        )
    if state.n_rows != n_rows:
        raise UserError(
            f"--dataset_path: it has {n_rows} rows and the run of {option} {path} had {state.n_rows}; to train on "
            "other rows, export the weights with ckpt_merger.py --hf_dir and name them with --model_id"
        )


def _open_merged(path: Path, option: str) -> dict[str, Any]:
    """A merged file's entries, whichever engine's, its tensors mapped, not read."""
    return normalized(_torch_load(path, option))


def _torch_load(path: Path, option: str) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([slice]):  # nnScaler's shards say which slices they are
            entries = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if STATE_ENTRY in entries:
            return entries
        reason = "it holds something else"
    except Exception as error:  # whatever a foreign or damaged file makes torch raise
        reason = one_line(error)
    raise UserError(f"{option} {path}: it is no merged checkpoint ({reason}); make one with ckpt_merger.py")


def normalized(merged: dict[str, Any]) -> dict[str, Any]:
    """A merged file's entries in the form of the built-in engine's.

    nnScaler numbers the optimizer's entries in the order of the parameters, keeps the float32 masters among them, and
    lists what else ranks saved by rank.
    """
    if not isinstance(merged[STATE_ENTRY], list):
        return merged
    state = merged[STATE_ENTRY][0]
    optimizer = {}
    for number, name in enumerate(json.loads(state)["parameters"]):
        optimizer |= {f"{name}/{key}": value for key, value in merged["optimizer"]["state"][number].items()}
    weights = {}
    for stored, tensor in merged["model"].items():
        name = stored.removeprefix(NNSCALER_PREFIX)
        weights[name] = optimizer.pop(f"{name}/fp32_params", tensor)
    return {"model": weights, "optimizer": optimizer, STATE_ENTRY: state, HF_ENTRY: merged[HF_ENTRY][0]}


# --- loading -------------------------------------------------------------------------------------------------------


def load(path: Path, model: ParallelModel, optimizer: torch.optim.Optimizer, state: State, option: str) -> None:
    """Fills parameters and optimizer by slices and, on as many ranks as saved it, random state."""
    tensors = _named_tensors(model, optimizer)
    if path.is_file():
        merged = _open_merged(path, option)
        for name, tensor in tensors.items():
            load_slice(tensor, merged[name.split("/")[0]][name.split("/", 1)[1]].__getitem__)
        return
    random = _random_state() if state.world_size == dist.get_world_size() else {}
    _read_shards(path, tensors | random)
    for name, value in random.items():
        (torch.cuda if name.endswith("/cuda") else torch).set_rng_state(value)


def _read_shards(path: Path, tensors: dict[str, torch.Tensor], no_dist: bool = False) -> None:
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with warnings.catch_warnings():  # that no_dist means one process is no news
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=FileSystemReader(path), planner=planner, no_dist=no_dist)


# --- merging -------------------------------------------------------------------------------------------------------


def merge(path: Path, output: Path) -> None:
    """A checkpoint's shards -> one file for torch.load.

    Memory stays bounded, however large the model: the file is laid out with room for every tensor, then mapped, and
    the shards are read into the map.
    """
    state = read_state(path, "--ckpt_dir")
    with whole_file(output) as aside:
        with FakeTensorMode():
            hf = {name: torch.empty(len(content), dtype=torch.uint8) for name, content in _hf_bytes(path / "hf")}
            entries = {"model": {}, "optimizer": {}, STATE_ENTRY: json.dumps(state.to_json()), HF_ENTRY: hf}
            for kind, name, size, dtype in _stored_tensors(path, ("model", "optimizer")):
                entries[kind][name] = torch.empty(size, dtype=dtype)
        with _layout_only():
            torch.save(entries, aside)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(aside, mmap=True, weights_only=True)
        for name, content in _hf_bytes(path / "hf"):
            mapped[HF_ENTRY][name].copy_(_as_tensor(content))
        for kind in ("model", "optimizer"):
            for name, tensor in tqdm(mapped[kind].items(), desc=f"merging {kind}", unit="tensor"):
                _read_shards(path, {f"{kind}/{name}": tensor}, no_dist=True)


def hf_entry(save_hf_files: Callable[[Path], None]) -> dict[str, torch.Tensor]:
    """A merged file's 'hf' entry: the files that `save_hf_files` writes to a folder."""
    with TemporaryDirectory() as folder:
        save_hf_files(Path(folder))
        return {name: _as_tensor(content) for name, content in _hf_bytes(Path(folder))}


def _hf_bytes(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a folder that has no subfolders; empty ones hold nothing to keep."""
    for file in sorted(folder.iterdir()):
        if content := file.read_bytes():
            yield file.name, content


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def export_hf(path: Path, hf_dir: Path) -> None:
    """The weights of a checkpoint or merged file -> a folder for AutoModelForCausalLM.from_pretrained.

    They are in the dtype of its configuration. One safetensors file is in memory at a time.
    """
    merged = _open_merged(path, "--ckpt_dir") if path.is_file() else None
    with whole_folder(hf_dir) as aside:
        if merged is None:
            shutil.copytree(path / "hf", aside, dirs_exist_ok=True)
            sizes = {name: size for _, name, size, _ in _stored_tensors(path, ("model",))}
        else:
            for name, content in merged[HF_ENTRY].items():
                (aside / name).write_bytes(content.numpy().tobytes())
            sizes = {name: tensor.shape for name, tensor in merged["model"].items()}
        dtype = getattr(torch, _config_dtype(aside / "config.json"))
        split = split_torch_state_dict_into_shards(
            {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
        )
        for file, names in tqdm(split.filename_to_tensors.items(), desc="writing safetensors", unit="file"):
            tensors = merged["model"] if merged else _read_weights(path, {name: sizes[name] for name in names})
            named = {name: tensors[name].to(dtype) for name in names}
            save_file(named, aside / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _read_weights(path: Path, sizes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(size, dtype=torch.float32) for name, size in sizes.items()}
    _read_shards(path, {f"model/{name}": tensor for name, tensor in tensors.items()}, no_dist=True)
    return tensors


def _stored_tensors(path: Path, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, torch.Size, torch.dtype]]:
    """(kind, name, size, dtype) of every tensor of these kinds in a checkpoint."""
    for key, facts in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        kind, name = key.split("/", 1)
        if kind in kinds:
            yield kind, name, facts.size, facts.properties.dtype


@contextmanager
def _layout_only() -> Iterator[None]:
    """torch.save inside writes the file's structure and leaves holes where the tensors' bytes go, and no checksums."""
    crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            yield
    finally:
        torch.serialization.set_crc32_options(crc32)


def _config_dtype(config: Path) -> str:
    facts = json.loads(config.read_text())
    return facts.get("dtype") or facts.get("torch_dtype") or "bfloat16"
