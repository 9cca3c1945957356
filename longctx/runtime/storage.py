"""A checkpoint's files as torch.distributed.checkpoint (DCP) writes and reads them: sealed, and running no code."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longctx.seal import Hashing, Seal, files_in, seal, sealed_json


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
        super().__init__(folder)
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
        others = [name for name in files_in(folder) if name not in seals]
        seals |= seal(folder, others)
        files = {name: asdict(seals[name]) for name in sorted(seals)}
        (folder / self.manifest).write_bytes(sealed_json({**self.facts(), "files": files}))
