"""A checkpoint is written aside, has its name once all of it is on disk, and then older ones may go.

A process that is killed while it saves leaves at most a folder half written, `.<epoch>-<step>.writing`, and, where a
checkpoint was being replaced, the whole one that it replaces, `.<epoch>-<step>.old-*`; the next save removes them.
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from longctx.atomic import publish_folder
from longctx.data.order import Position
from longctx.errors import CheckpointFolderError, UserError, one_line
from longctx.runtime.checkpoint import (
    FORMAT,
    LAST,
    STATE,
    State,
    first_failure,
    folder_name,
    name_when_saved,
    read_manifest,
    read_state,
)
from longctx.runtime.storage import SHARD, SealedWriter

FILES = re.compile(rf"{SHARD.pattern}|\.metadata|{re.escape(STATE)}|hf")  # all that a checkpoint folder holds
_LEFTOVER = re.compile(r"\.\d+-\d+\.(writing|removed|old-.+)")  # of a save that was killed

# --- by all ranks ----------------------------------------------------------------------------------------------------


class CheckpointWriter(SealedWriter):
    """Writes a checkpoint aside, and gives it its name once all of it is on disk.

    What the coordinator does alone, it does within DCP's own steps, whose errors reach all ranks. That may be a
    CheckpointFolderError: something that this program did not write has come into the place of the checkpoint or of
    `last`. The checkpoint is whole then too, and the error says where.

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


# --- by the coordinator ----------------------------------------------------------------------------------------------


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
        CheckpointFolderError: something is in the place of the checkpoint or of `last`.
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
    if not isinstance(first_failure(error)[1], CheckpointFolderError):
        shutil.rmtree(_aside(checkpoint_dir, name), ignore_errors=True)


def why_not_saved(error: BaseException) -> str:
    """What kept a save from being done, on one line."""
    rank, first = first_failure(error)
    kind = "" if isinstance(first, OSError | UserError) else f"{type(first).__name__}: "
    return f"rank {rank}: {kind}{one_line(first)}"


def _aside(checkpoint_dir: Path, name: str) -> Path:
    return checkpoint_dir / f".{name}.writing"


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
