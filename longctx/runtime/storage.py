"""A checkpoint's files as torch.distributed.checkpoint (DCP) writes and reads them: sealed, and running no code."""

import math
import pickle
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longctx.errors import CheckpointError, one_line
from longctx.seal import Hashing, Seal, check_sizes, files_in, seal, sealed_json

# --- writing -------------------------------------------------------------------------------------------------------


class HashingFileSystem(FileSystem):
    """DCP's files on disk, hashed as they are written; `seals` has those that are complete, by their names."""

    def __init__(self) -> None:
        self.seals: dict[str, Seal] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            hashing = Hashing(stream)
            yield hashing
        self.seals[Path(path).name] = hashing.seal()


@dataclass
class Written:
    """What one rank has written: DCP's results, and the seals of its files."""

    results: list[WriteResult]
    seals: dict[str, Seal] = field(default_factory=dict)


class SealedWriter(FileSystemWriter):
    """Writes a checkpoint's files, and then `checkpoint.json`, which seals them all.

    Each rank hashes its files while it writes them. DCP gathers what the ranks return, and with it their seals, so this
    needs no collectives of its own, and serves dcp.save and dcp.async_save alike. Files that are in the folder already
    are sealed too.

    Args:
        manifest: the name of the file that seals.
        facts: makes what it says besides, as JSON; the coordinator calls it.
    """

    def __init__(self, folder: Path, manifest: str, facts: Callable[[], dict[str, Any]]):
        super().__init__(folder, per_thread_copy_ahead=0)  # the thread that writes has no business with a GPU
        self.fs = HashingFileSystem()
        self.manifest, self.facts = manifest, facts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.fs.seals = {}
        written: Future[Any] = Future()
        written.set_result(Written(super().write_data(plan, planner).wait(), dict(self.fs.seals)))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        ranks = cast(list[Written], results)
        super().finish(metadata, [rank.results for rank in ranks])
        folder = Path(self.path)
        seals = {name: of for rank in ranks for name, of in rank.seals.items()}
        others = set(files_in(folder)) - seals.keys() - {self.manifest}
        check_visible(folder, seals)
        seals |= seal(folder, others)
        files = {name: asdict(seals[name]) for name in sorted(seals)}
        (folder / self.manifest).write_bytes(sealed_json({**self.facts(), "files": files}))


def check_visible(folder: Path, seals: dict[str, Seal]) -> None:
    """Raises a CheckpointError unless this rank sees all that others have written."""
    try:
        check_sizes(folder, seals)
    except ValueError as error:
        raise CheckpointError(
            f"rank 0 does not see what another rank has written to {folder.parent} ({error}); name a folder that all "
            "nodes share"
        ) from error


# --- reading -------------------------------------------------------------------------------------------------------

SHARD = re.compile(r"__\d+_\d+\.distcp")


class ClosedReader(FileSystemReader):
    """Reads what SealedWriter has written. `.metadata` is a pickle, and DCP's own reader would run what it asks for.

    Here it may name DCP's few classes and nothing else, and none of them is made before its values have been checked.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's description of the tensors: where in which file each chunk is. It is read once.

        Raises:
            ValueError: `.metadata` is damaged, or holds what this program does not write.
        """
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                root = _Unpickler(file).load()
            return _as_metadata(root, Path(self.path))
        except Exception as error:  # whatever a damaged pickle makes Python raise
            raise ValueError(f"its file .metadata is damaged ({one_line(error)})") from error


class _Record:
    """Stands for an object of one of DCP's classes while a pickle is read: what it was made with, and no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
# What is called with values, and whose results nobody needs: layout, memory format, and the folder's path when saved.
_UNUSED = {
    ("torch.serialization", "_get_layout"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
}


class _Unpickler(pickle.Unpickler):
    """Makes records of DCP's classes. They are classes of this one read, whatever a pickle may do to them."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.classes = {name: type(name[1], (_Record,), {}) for name in _CLASSES}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = module_name, global_name
        if name in self.classes:
            return self.classes[name]
        if name in _UNUSED:
            return lambda *values: None
        if name == ("torch", "Size"):
            return lambda values: tuple(values)
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no checkpoint of ours holds")


def _as_metadata(root: Any, folder: Path) -> Metadata:
    facts = _state(root, "Metadata")
    tensors: dict[str, Any] = {_text(name): _as_tensor(of) for name, of in facts["state_dict_metadata"].items()}
    size_of = cache(lambda name: (folder / name).stat().st_size)  # a file holds parts of many tensors
    storage = {_as_index(index): _as_place(of, size_of) for index, of in facts["storage_data"].items()}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in storage:
                raise ValueError(f"a part of {name} is nowhere")
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(), version=facts.get("version"))


def _as_tensor(record: Any) -> TensorStorageMetadata:
    facts = _state(record, "TensorStorageMetadata")
    dtype, size = _state(facts["properties"], "TensorProperties")[0], _shape(facts["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor has no dtype")
    chunks = [_as_chunk(chunk, size) for chunk in facts["chunks"]]
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError("the parts of a tensor are not all of it")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _as_chunk(record: Any, size: torch.Size) -> ChunkStorageMetadata:
    facts = _state(record, "ChunkStorageMetadata")
    offsets, sizes = _shape(facts["offsets"]), _shape(facts["sizes"])
    if any(start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)):
        raise ValueError("a part of a tensor lies outside of it")
    return ChunkStorageMetadata(offsets, sizes)


def _as_index(record: Any) -> MetadataIndex:
    facts = _state(record, "MetadataIndex")
    return MetadataIndex(_text(facts["fqn"]), _shape(facts["offset"]))


def _as_place(record: Any, size_of: Callable[[str], int]) -> _StorageInfo:
    facts = _state(record, "_StorageInfo")
    name, (offset, length) = _text(facts["relative_path"]), _shape((facts["offset"], facts["length"]))
    if not SHARD.fullmatch(name) or facts.get("transform_descriptors"):
        raise ValueError(f"a part of a tensor is in {name!r:.50}")
    if offset + length > size_of(name):
        raise ValueError(f"a part of a tensor lies behind the end of {name}")
    return _StorageInfo(name, offset, length)


def _state(record: Any, name: str) -> Any:
    """What a record of this class was made with."""
    if not isinstance(record, _Record) or type(record).__name__ != name:
        raise TypeError(f"it has {type(record).__name__}, where {name} belongs")
    return record.state


def _shape(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(length) is int and length >= 0 for length in value):
        raise TypeError("it has something else, where whole numbers belong")
    return torch.Size(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"it has {type(value).__name__}, where a name belongs")
    return value
