"""What torchrun tells each process that it starts: a process is one rank. Started alone, it is rank 0 of 1.

Clusters export RANK and WORLD_SIZE too, of their pods, for torchrun to find the other nodes by. So they are read only
where torchrun has started this process.
"""

import os

ALONE = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}


def started_this() -> bool:
    """Whether torchrun started this process, told as torch.distributed.is_torchelastic_launched tells it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    return _number("RANK")


def local_rank() -> int:
    """The rank's number among those of its node."""
    return _number("LOCAL_RANK")


def local_world_size() -> int:
    """How many ranks there are on this node."""
    return _number("LOCAL_WORLD_SIZE")


def node() -> int:
    return _number("GROUP_RANK")


def world_size() -> int:
    """How many ranks there are, on all nodes together."""
    return _number("WORLD_SIZE")


def _number(name: str) -> int:
    """A variable's value; that of a process alone if torchrun has not set it, or if it is none (see why_not_usable)."""
    text = os.environ.get(name, "") if started_this() else ""
    return int(text) if _is_number(text) else ALONE.get(name, 0)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def why_not_usable() -> str | None:
    """What the environment says of ranks and can't be; None if nothing. The sentence names the variable."""
    if not started_this():
        return _why_not_alone()
    for name in ALONE:
        if not _is_number(os.environ.get(name, "")):
            return f"{name}={os.environ.get(name, '')}: torchrun sets it to a number; start anew with torchrun"
    for name, number, count in (
        ("RANK", rank(), world_size()),
        ("LOCAL_RANK", local_rank(), local_world_size()),
        ("LOCAL_WORLD_SIZE", local_world_size() - 1, world_size()),
    ):
        if number >= count:
            return f"{name}={os.environ[name]}: there are {count} ranks; start anew with torchrun"
    return None


def _why_not_alone() -> str | None:
    """What says that there are other processes, although torchrun has not started this one."""
    for name, number in ALONE.items():
        text = os.environ.get(name)
        if text not in (None, "", str(number)):
            return f"{name}={text}: torchrun did not start this process; start it with torchrun, or unset {name}"
    return None


def has_several_nodes() -> bool:
    return world_size() > local_world_size()


def say(*lines: str) -> None:
    """Prints lines, on rank 0 alone: what holds for all ranks is said once."""
    if rank() == 0:
        for line in lines:
            print(line, flush=True)
