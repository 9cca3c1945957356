"""Whether all nodes of a run see one folder: files that each node writes to a disk of its own are no checkpoint."""

import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longctx import torchrun
from longctx.atomic import parents
from longctx.errors import CheckpointFolderError

SECONDS = 5  # that a network's file system may take to show a new file


def check_shared(folder: Path) -> None:
    """Shows all ranks a file in `folder`, which is made for it if it is not there; nothing of it stays.

    Raises:
        CheckpointFolderError: on every rank, if one of them does not see the file.
    """
    first = dist.get_rank() == 0
    name = [f".seen-by-all-nodes-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name)
    file = folder / name[0]
    with parents(file) if first else nullcontext():
        if first:
            file.touch()
        dist.barrier()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (torchrun.node(), _appears(file)))
        if first:
            file.unlink()
        blind = sorted({node for node, seen in found if not seen})
        if blind:
            raise CheckpointFolderError(
                f"node {', '.join(map(str, blind))} does not see what node 0 writes there, and a checkpoint is written "
                "by all nodes; name a folder on a disk that they share"
            )


def _appears(file: Path) -> bool:
    """Whether a file is there, or comes to be within SECONDS."""
    deadline = time.monotonic() + SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
