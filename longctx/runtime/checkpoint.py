"""Checkpoints: sharded by torch.distributed.checkpoint, whole or not there at all, resumed by slices, merged.

A checkpoint is a folder `checkpoints/<epoch>-<step>` of one `.distcp` file a rank and DCP's `.metadata`, with
`checkpoint.json` (what it is of, how far training had come, and the size of every file) and `hf/` (configuration and
tokenizer). `checkpoints/last` links to the newest. Its tensors have flat names: `model/<parameter>`,
`optimizer/<parameter>/exp_avg`, `random/<rank>/cpu`.

A kill leaves no more than a folder half written, `.<epoch>-<step>.writing`, and, where a checkpoint was being replaced,
the whole one that it replaces, `.<epoch>-<step>.old-*`; the next save removes them.

A merged file is one for torch.load: {'model': {parameter: tensor}, 'optimizer': {'<parameter>/exp_avg': tensor},
'state': what checkpoint.json holds, as JSON, 'hf': {file name: bytes, uint8}}. nnScaler's checkpoints, a
`<rank>.ckpt` a rank, and its merged files have the last two beside their own entries, and are read here too.
"""

import json
import mmap
import os
import re
import shutil
import warnings
import zipfile
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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from tqdm import tqdm

from longctx.atomic import publish_folder, whole_file, whole_folder
from longctx.data.order import Position
from longctx.errors import UserError, one_line
from longctx.runtime.parallel import ParallelModel, load_slice

FORMAT = 1
LAST = "last"
STATE = "checkpoint.json"
NNSCALER_SHARD = "0.ckpt"  # of rank 0, in a checkpoint of nnScaler's
MARKS = {"torch": STATE, "nnscaler": NNSCALER_SHARD}  # the file by which to know an engine's checkpoint
NNSCALER_PREFIX = "loss.model."  # of a parameter's name there, before the name that Hugging Face gives it
STATE_ENTRY, HF_ENTRY = "state", "hf"  # of a merged file
SAVED = re.compile(r"(\d+)-(\d+)|\.(\d+)-(\d+)\.old-.+")  # names of whole folders: epoch and step
LEFTOVER = re.compile(r"\.\d+-\d+\.(writing|old-.+)")


@dataclass(frozen=True)
class State:
    """What a checkpoint is of, besides its tensors."""

    position: Position
    seed: int  # of the order of the rows
    n_rows: int
    world_size: int
    plan_ngpus: int | None  # None in checkpoints that did not record it yet
    parameters: dict[str, list[int]]  # name -> shape: the model it is of

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "State":
        position = Position(**value["position"])
        ranks = value["world_size"], value.get("plan_ngpus")
        return State(position, value["seed"], value["n_rows"], *ranks, value["parameters"])


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


def _remove_leftovers(checkpoint_dir: Path) -> None:
    """Removes what saves that were killed have left; only once `last` is whole, for it may be all that there is."""
    for folder in checkpoint_dir.iterdir():
        if LEFTOVER.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


# --- finding and checking ------------------------------------------------------------------------------------------


def find(checkpoint_dir: Path, resume_path: str | None, engine: str) -> Path | None:
    """What to resume from: `resume_path` (a checkpoint, a folder of checkpoints or a merged file), else the last.

    None where there is no checkpoint yet.

    Raises:
        UserError: `resume_path` is no such thing, the checkpoint is another engine's and not merged, `checkpoint_dir`
            has another engine's in it, or the one that `last` names is gone and there is no other.
    """
    path = Path(resume_path or checkpoint_dir)
    option = "--resume_path" if resume_path else "--checkpoint_dir"
    for other in MARKS:
        if resume_path and other != engine and _checkpoint_in(checkpoint_dir, other):
            raise UserError(
                f"--checkpoint_dir {checkpoint_dir}: the checkpoints in it are the {other} engine's, and those of "
                "another would not stay apart from them; name another folder"
            )
    if resume_path and path.is_file():
        return path
    if found := _checkpoint_in(path, engine):
        _say_if_not_last(path, found, engine)
        return found
    for other in MARKS:
        if _checkpoint_in(path, other):
            raise UserError(
                f"{option} {path}: its checkpoint is the {other} engine's; choose --engine {other}, or merge it with "
                "ckpt_merger.py and name the merged file with --resume_path, and another --checkpoint_dir"
            )
    if link := next((link for link in (path / LAST, path / LAST / NNSCALER_SHARD) if link.is_symlink()), None):
        raise UserError(
            f"{option} {path}: its last checkpoint, {os.readlink(link)}, is gone, and there is no other; put it back, "
            f"or remove {path / LAST} to start anew"
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
    if ckpt_dir.is_file():
        return ckpt_dir
    for engine in MARKS:
        if found := _checkpoint_in(ckpt_dir, engine):
            _say_if_not_last(ckpt_dir, found, engine)
            return found
    what = "it has no checkpoint in it" if ckpt_dir.is_dir() else "there is no such folder"
    raise UserError(f"--ckpt_dir {ckpt_dir}: {what}; name the --checkpoint_dir that train.py wrote to")


def is_nnscalers(path: Path) -> bool:
    """Whether a checkpoint folder is nnScaler's."""
    return (path / NNSCALER_SHARD).is_file()


def _checkpoint_in(folder: Path, engine: str) -> Path | None:
    """`folder` itself if it is a checkpoint of the engine's, else the last whole one in it.

    That is the one that `last` names; where it is gone or damaged, what it was to replace; then the one of most steps.
    Where none is whole, the first of these, for read_state to say what is wrong with it.
    """
    mark = MARKS[engine]
    if (folder / mark).is_file():
        return folder
    found = sorted(_saved_in(folder), key=_by_steps(folder), reverse=True)
    if (folder / LAST / mark).is_file():
        found.insert(0, (folder / LAST / mark).resolve().parent)
    found = [path for path in found if (path / mark).is_file()]
    return next((path for path in found if _is_whole(path)), found[0] if found else None)


def _saved_in(folder: Path) -> list[Path]:
    """Every folder of the name of a whole checkpoint, those included that were being replaced."""
    folder = folder.resolve()
    return [path for path in folder.iterdir() if SAVED.fullmatch(path.name)] if folder.is_dir() else []


def _by_steps(folder: Path) -> Callable[[Path], tuple]:
    """What to sort checkpoints by: what stands in for the one that `last` names comes after all others."""
    last = os.readlink(folder / LAST) if (folder / LAST).is_symlink() else None

    def key(path: Path) -> tuple:
        epoch, step = (number for number in SAVED.fullmatch(path.name).groups() if number)
        return f"{epoch}-{step}" == last, int(step), int(epoch), not path.name.startswith(".")

    return key


def _is_whole(path: Path) -> bool:
    try:
        _read_folder(path)
    except ValueError:
        return False
    return True


def _say_if_not_last(folder: Path, found: Path, engine: str) -> None:
    """Prints that `found` was taken in the place of `last`."""
    last = (folder / LAST / MARKS[engine]).resolve().parent
    if found not in (folder, last) and _is_whole(found) and os.environ.get("RANK", "0") == "0":
        problem = f"{folder / LAST} is missing or damaged"
        print(f"checkpoint: {problem}, taking {found.name}, the newest that is whole", flush=True)


def read_state(path: Path, option: str) -> State:
    """The state of a checkpoint folder or merged file; `option` is what a person named it with.

    Raises:
        UserError: it is none, or files of it are missing or cut short.
    """
    if path.is_file():
        return State.from_json(json.loads(_open_merged(path, option)[STATE_ENTRY]))
    try:
        return _read_folder(path)
    except ValueError as error:
        raise UserError(f"{option} {path}: {error}; name another checkpoint") from error


def _read_folder(path: Path) -> State:
    """The state of a checkpoint folder of either engine.

    Raises:
        ValueError: it is not whole; the message says why.
    """
    sizes: dict[str, int | None] = {}
    mark = NNSCALER_SHARD if is_nnscalers(path) else STATE
    try:
        if mark == NNSCALER_SHARD:
            state = State.from_json(json.loads(_torch_load(path / mark)[STATE_ENTRY]))
            sizes = {f"{rank}.ckpt": None for rank in range(state.world_size)}  # nnScaler writes no sizes down
        else:
            manifest = json.loads((path / mark).read_text())
            state = State.from_json(manifest)
            sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    except Exception as error:  # whatever a damaged file makes json or torch raise
        raise ValueError(f"its file {mark} is damaged ({_reason(error)})") from error
    for name, expected in sizes.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            raise ValueError(f"its file {name} is missing")
        if expected is None and not zipfile.is_zipfile(path / name):  # a zip file's table of contents is its end
            raise ValueError(f"its file {name} is cut short")
        if expected not in (None, size):
            raise ValueError(f"its file {name} has {size} bytes instead of {expected}")
    return state


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)


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
    try:
        merged = normalized(_torch_load(path))
        State.from_json(json.loads(merged[STATE_ENTRY]))
    except Exception as error:  # whatever a foreign or damaged file makes torch or json raise
        reason = _reason(error)
        raise UserError(
            f"{option} {path}: it is no merged checkpoint ({reason}); make one with ckpt_merger.py"
        ) from error
    return merged


def nnscaler_precision(path: Path, option: str) -> str:
    """The precision of the run that a checkpoint folder of nnScaler's is of: bf16 or fp32.

    Raises:
        UserError: its first shard can't be read.
    """
    try:
        return _torch_load(path / NNSCALER_SHARD)["train_args"]["precision"]["param"]
    except Exception as error:  # whatever a damaged file makes torch raise
        raise UserError(f"{option} {path}: {NNSCALER_SHARD} can't be read ({one_line(error)})") from error


def _torch_load(path: Path) -> dict[str, Any]:
    """The entries of a file of torch.save's, their tensors mapped, not read."""
    with torch.serialization.safe_globals([slice]):  # nnScaler's shards say which slices they are
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def normalized(merged: dict[str, Any]) -> dict[str, Any]:
    """A merged file's entries in the form of the built-in engine's.

    nnScaler numbers the optimizer's entries in the order of the parameters, keeps the float32 masters among them, and
    lists what else ranks saved by rank.
    """
    if not isinstance(merged[STATE_ENTRY], list):
        return merged
    state = merged[STATE_ENTRY][0]
    names = list(json.loads(state)["parameters"])
    optimizer = {}
    for number, name in enumerate(names):
        optimizer |= {f"{name}/{key}": value for key, value in merged["optimizer"]["state"][number].items()}
    # A tied weight is stored by each of its names; it is a parameter by one.
    weights = {name: optimizer.pop(f"{name}/fp32_params", merged["model"][NNSCALER_PREFIX + name]) for name in names}
    return {"model": weights, "optimizer": optimizer, STATE_ENTRY: state, HF_ENTRY: merged[HF_ENTRY][0]}


# --- loading -------------------------------------------------------------------------------------------------------


def load(path: Path, model: ParallelModel, optimizer: torch.optim.Optimizer, state: State, option: str) -> None:
    """Fills parameters and optimizer by slices and, where each rank does what it did, random state.

    Random state is a rank's own, but the same within a plan: on other plans ranks that have to agree would not.
    """
    tensors = _named_tensors(model, optimizer)
    if path.is_file():
        merged = _open_merged(path, option)
        for name, tensor in tensors.items():
            load_slice(tensor, merged[name.split("/")[0]][name.split("/", 1)[1]].__getitem__)
        return
    same_ranks = (state.world_size, state.plan_ngpus) == (dist.get_world_size(), model.plan_size)
    random = _random_state() if same_ranks else {}
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

    Raises:
        UserError: the disk has no room for it.
    """
    state = read_state(path, "--ckpt_dir")
    with whole_file(output) as aside:
        with FakeTensorMode():
            hf = {name: torch.empty(len(content), dtype=torch.uint8) for name, content in _hf_bytes(path / "hf")}
            entries = {"model": {}, "optimizer": {}, STATE_ENTRY: json.dumps(state.to_json()), HF_ENTRY: hf}
            for kind, name, size, dtype in _stored_tensors(path, ("model", "optimizer")):
                entries[kind][name] = torch.empty(size, dtype=dtype)
        try:
            with _layout_only():
                torch.save(entries, aside)
            _reserve(aside)
        except (OSError, RuntimeError) as error:  # torch.save's of a full disk is a RuntimeError
            raise _no_room(f"--output_fname {output}", error) from error
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(aside, mmap=True, weights_only=True)
        for name, content in _hf_bytes(path / "hf"):
            mapped[HF_ENTRY][name].copy_(_as_tensor(content))
        for kind in ("model", "optimizer"):
            for name, tensor in tqdm(mapped[kind].items(), desc=f"merging {kind}", unit="tensor"):
                _read_shards(path, {f"{kind}/{name}": tensor}, no_dist=True)


def _no_room(option: str, error: Exception) -> UserError:
    return UserError(f"{option}: there is no room for it ({one_line(error)}); make some, or choose another disk")


def _reserve(file: Path) -> None:
    """Takes room on the disk for a file's holes: writing to a map for which there is none kills the process."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


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

    Raises:
        UserError: the disk has no room for it.
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
            try:
                save_file(named, aside / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise _no_room(f"--hf_dir {hf_dir}", error) from error
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
