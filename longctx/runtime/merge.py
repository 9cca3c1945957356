"""Merging: a checkpoint's shards -> one file for torch.load, or a folder for AutoModelForCausalLM.from_pretrained.

Memory holds one tensor at a time, however large the model: a file is laid out first, then each tensor is written to its
place. A merged file that is read is mapped.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from longctx.atomic import whole_file, whole_folder
from longctx.errors import CheckpointError, NoRoom, one_line
from longctx.runtime.checkpoint import FORMAT, HF_ENTRY, STATE_ENTRY, Checkpoint, State, read_shards
from longctx.runtime.storage import ClosedReader
from longctx.seal import append_seal

# --- one file --------------------------------------------------------------------------------------------------------


def merge(checkpoint: Checkpoint, output: Path) -> None:
    """A checkpoint folder's shards -> a merged file, sealed.

    Raises:
        NoRoom: the disk has no room for it.
        CheckpointError: the shards can't be read.
    """
    reader, hf = ClosedReader(checkpoint.path), dict(_hf_bytes(checkpoint.path / "hf"))
    stored = {name: facts for name, facts in stored_tensors(reader) if name.startswith(("model/", "optimizer/"))}
    with whole_file(output) as aside, _saying_no_room():
        _lay_out(aside, _fake_entries(checkpoint.state, hf, stored))
        places = _places(aside)
        with open(aside, "r+b") as file:
            for name, content in hf.items():
                _write(file, places[f"{HF_ENTRY}/{name}"], _as_tensor(content))
            for name, facts in tqdm(stored.items(), desc="merging", unit="tensor"):
                _write(file, places[name], _read_tensor(reader, name, facts))
        append_seal(aside)


def _fake_entries(
    state: State, hf: Mapping[str, bytes], stored: Mapping[str, TensorStorageMetadata]
) -> dict[str, dict[str, torch.Tensor] | str]:
    """A merged file's entries, of tensors that have no memory."""
    entries = {"model": {}, "optimizer": {}, STATE_ENTRY: json.dumps({"format": FORMAT, **state.to_json()})}
    with FakeTensorMode():
        for name, facts in stored.items():
            kind, own_name = name.split("/", 1)
            entries[kind][own_name] = torch.empty(facts.size, dtype=facts.properties.dtype)
        entries[HF_ENTRY] = {name: torch.empty(len(content), dtype=torch.uint8) for name, content in hf.items()}
    return entries


def _lay_out(file: Path, entries: dict[str, Any]) -> None:
    """Writes what torch.save would of entries whose tensors are fake: its structure, and holes for their bytes."""
    crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # of bytes that are not there yet
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(entries, file)
    except RuntimeError as error:  # what a full disk makes torch raise
        raise OSError(errno.ENOSPC, one_line(error)) from error
    finally:
        torch.serialization.set_crc32_options(crc32)
    _reserve(file)


def _places(file: Path) -> dict[str, int]:
    """Where in a file of torch.save's the bytes of each tensor begin, by the name of its entry and its own."""
    with FakeTensorMode():
        entries = torch.load(file, weights_only=True)
    tensors = {
        f"{kind}/{name}": each for kind in ("model", "optimizer", HF_ENTRY) for name, each in entries[kind].items()
    }
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in tensors.items()}


def _reserve(file: Path) -> None:
    """Takes room on the disk for a file's holes, before hours of writing to it."""
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _write(file: BinaryIO, place: int, tensor: torch.Tensor) -> None:
    file.seek(place)
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _read_tensor(reader: ClosedReader, name: str, facts: TensorStorageMetadata) -> torch.Tensor:
    """One tensor, whole, from a checkpoint's shards."""
    tensor = torch.empty(facts.size, dtype=facts.properties.dtype)
    read_shards(reader, {name: tensor}, no_dist=True)
    return tensor


def stored_tensors(reader: ClosedReader) -> Iterator[tuple[str, TensorStorageMetadata]]:
    """Every tensor of a checkpoint folder, by its flat name."""
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata), "ClosedReader refuses all else"
        yield name, facts


@contextmanager
def _saying_no_room() -> Iterator[None]:
    """Raises a NoRoom for a disk that is full, or a file that would be larger than it may be."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise NoRoom(f"there is no room for it ({one_line(error)}); make some, or choose another disk") from error


def hf_entry(save_hf_files: Callable[[Path], None]) -> dict[str, torch.Tensor]:
    """A merged file's 'hf' entry: the files that `save_hf_files` writes to a folder."""
    with TemporaryDirectory() as folder:
        save_hf_files(Path(folder))
        return {name: _as_tensor(content) for name, content in _hf_bytes(Path(folder))}


def _hf_bytes(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a folder and of its subfolders, by their paths in it; empty ones hold nothing to keep."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (content := file.read_bytes()):
            yield file.relative_to(folder).as_posix(), content


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# --- a Hugging Face folder -------------------------------------------------------------------------------------------


def export_hf(checkpoint: Checkpoint, hf_dir: Path) -> None:
    """The weights of a checkpoint folder or merged file -> a Hugging Face folder, in the dtype of its configuration.

    Vectors that no step has changed, as what corrects a router's scores, keep the float32 that they were read in.

    Raises:
        NoRoom: the disk has no room for it.
        CheckpointError: the shards can't be read, or the configuration names no dtype.
    """
    sizes, read = _weights(checkpoint)
    with whole_folder(hf_dir) as aside, _saying_no_room():
        _write_hf_files(checkpoint, aside)
        dtype = _config_dtype(aside / "config.json")
        untrained = _untrained(checkpoint, [name for name, size in sizes.items() if len(size) < 2])
        tensors = {
            name: torch.empty(size, dtype=torch.float32 if name in untrained else dtype, device="meta")
            for name, size in sizes.items()
        }
        split = split_torch_state_dict_into_shards(tensors)
        with tqdm(total=len(sizes), desc="writing safetensors", unit="tensor") as bar:
            for file, names in split.filename_to_tensors.items():
                places = lay_out_safetensors(aside / file, {name: tensors[name] for name in names})
                with open(aside / file, "r+b") as opened:
                    for name in names:
                        _write(opened, places[name], read(name).to(tensors[name].dtype))
                        bar.update()
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _weights(checkpoint: Checkpoint) -> tuple[dict[str, torch.Size], Callable[[str], torch.Tensor]]:
    """The sizes of all weights by name, and what reads one of them whole."""
    if checkpoint.merged:
        weights = checkpoint.merged["model"]
        return {name: tensor.shape for name, tensor in weights.items()}, weights.__getitem__
    reader = ClosedReader(checkpoint.path)
    prefix = "model/"
    stored = {name.removeprefix(prefix): facts for name, facts in stored_tensors(reader) if name.startswith(prefix)}
    sizes = {name: facts.size for name, facts in stored.items()}
    return sizes, lambda name: _read_tensor(reader, prefix + name, stored[name])


def _untrained(checkpoint: Checkpoint, names: list[str]) -> set[str]:
    """The weights that the optimizer has made no step of."""
    steps = {f"optimizer/{name}/step": torch.ones(()) for name in names}
    if checkpoint.merged:
        steps = {name: checkpoint.merged["optimizer"][name.removeprefix("optimizer/")] for name in steps}
    else:
        read_shards(ClosedReader(checkpoint.path), steps, no_dist=True)
    return {name for name in names if not steps[f"optimizer/{name}/step"]}


def _write_hf_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a checkpoint's configuration and tokenizer to a folder; `read` has refused names that would leave it."""
    if checkpoint.merged is None:
        shutil.copytree(checkpoint.path / "hf", folder, dirs_exist_ok=True)
        return
    for name, content in checkpoint.merged[HF_ENTRY].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.numpy().tobytes())


def _config_dtype(config: Path) -> torch.dtype:
    """The dtype of the weights that a config.json speaks of."""
    try:
        facts = json.loads(config.read_text())
        name = facts.get("dtype") or facts.get("torch_dtype") or "bfloat16"
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its config.json can't be read ({one_line(error)}); name another checkpoint") from error
    dtype = next((dtype for dtype in SAFETENSORS_NAMES if str(dtype) == f"torch.{name}"), None)
    if dtype is None:
        raise CheckpointError(
            f"its config.json has the dtype {name!r:.40}, of which no weights are; name another checkpoint"
        )
    return dtype


SAFETENSORS_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def lay_out_safetensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Writes a file of safetensors (https://github.com/huggingface/safetensors, 'Format') but for the tensors' bytes.

    Returns:
        Where the bytes of each tensor begin.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name], end = end, end + tensor.nbytes
        offsets = [places[name], end]
        header[name] = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    _reserve(file)
    return {name: 8 + len(text) + place for name, place in places.items()}
