"""What torchrun tells each process that it starts: a process is one rank. Started alone, it is rank 0 of 1."""

import os


def started_this() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The rank's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many ranks there are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def node() -> int:
    return int(os.environ.get("GROUP_RANK", 0))


def world_size() -> int:
    """How many ranks there are, on all nodes together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def has_several_nodes() -> bool:
    return world_size() > local_world_size()


def say(*lines: str) -> None:
    """Prints lines, on rank 0 alone: what holds for all ranks is said once."""
    if rank() == 0:
        for line in lines:
            print(line, flush=True)
