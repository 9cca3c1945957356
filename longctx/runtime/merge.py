"""Merging: a checkpoint's shards -> one file for torch.load, or a folder for AutoModelForCausalLM.from_pretrained.

Memory stays bounded, however large the model: tensors are mapped, or one file's are held at a time.
"""

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from longctx.atomic import whole_file, whole_folder
from longctx.errors import NoRoom, one_line
from longctx.runtime.checkpoint import FORMAT, HF_ENTRY, STATE_ENTRY, Checkpoint, read_shards
from longctx.runtime.storage import ClosedReader
from longctx.seal import append_seal

# --- one file --------------------------------------------------------------------------------------------------------


def merge(checkpoint: Checkpoint, output: Path) -> None:
    """A checkpoint folder's shards -> a merged file.

    The file is laid out with room for every tensor, then mapped, and the shards are read into the map.

    Raises:
        NoRoom: the disk has no room for it.
    """
    path = checkpoint.path
    with whole_file(output) as aside:
        with FakeTensorMode():
            hf = {name: torch.empty(len(content), dtype=torch.uint8) for name, content in _hf_bytes(path / "hf")}
            state = json.dumps({"format": FORMAT, **checkpoint.state.to_json()})
            entries = {"model": {}, "optimizer": {}, STATE_ENTRY: state, HF_ENTRY: hf}
            for kind, name, size, dtype in _stored_tensors(path, ("model", "optimizer")):
                entries[kind][name] = torch.empty(size, dtype=dtype)
        try:
            with _layout_only():
                torch.save(entries, aside)
            _reserve(aside)
        except (OSError, RuntimeError) as error:  # torch.save's of a full disk is a RuntimeError
            raise _no_room(error) from error
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(aside, mmap=True, weights_only=True)
        for name, content in _hf_bytes(path / "hf"):
            mapped[HF_ENTRY][name].copy_(_as_tensor(content))
        for kind in ("model", "optimizer"):
            for name, tensor in tqdm(mapped[kind].items(), desc=f"merging {kind}", unit="tensor"):
                read_shards(path, {f"{kind}/{name}": tensor}, no_dist=True)
        del mapped, tensor  # and with them the map, so that all of it is in the file
        append_seal(aside)


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
    """The files of a folder and of its subfolders, by their paths in it; empty ones hold nothing to keep."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (content := file.read_bytes()):
            yield file.relative_to(folder).as_posix(), content


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# --- a Hugging Face folder -------------------------------------------------------------------------------------------


def export_hf(checkpoint: Checkpoint, hf_dir: Path) -> None:
    """The weights of a checkpoint folder or merged file -> a Hugging Face folder, in the dtype of its configuration.

    Raises:
        NoRoom: the disk has no room for it.
    """
    path, merged = checkpoint.path, checkpoint.merged
    with whole_folder(hf_dir) as aside:
        if merged is None:
            shutil.copytree(path / "hf", aside, dirs_exist_ok=True)
            sizes = {name: size for _, name, size, _ in _stored_tensors(path, ("model",))}
        else:
            for name, content in merged[HF_ENTRY].items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
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
                raise _no_room(error) from error
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _read_weights(path: Path, sizes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(size, dtype=torch.float32) for name, size in sizes.items()}
    read_shards(path, {f"model/{name}": tensor for name, tensor in tensors.items()}, no_dist=True)
    return tensors


def _config_dtype(config: Path) -> str:
    facts = json.loads(config.read_text())
    return facts.get("dtype") or facts.get("torch_dtype") or "bfloat16"


# --- both ------------------------------------------------------------------------------------------------------------


def _stored_tensors(path: Path, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, torch.Size, torch.dtype]]:
    """(kind, name, size, dtype) of every tensor of these kinds in a checkpoint folder."""
    for key, facts in ClosedReader(path).read_metadata().state_dict_metadata.items():
        kind, name = key.split("/", 1)
        if kind in kinds and isinstance(facts, TensorStorageMetadata):
            yield kind, name, facts.size, facts.properties.dtype


def _no_room(error: Exception) -> NoRoom:
    return NoRoom(f"there is no room for it ({one_line(error)}); make some, or choose another disk")
