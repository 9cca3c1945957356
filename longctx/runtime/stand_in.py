"""A process group of one process that stands in for a whole one: no data leaves it, and what arrives is its own.

A rehearsal runs one rank of a program alone. Its collectives take their inputs and fill their outputs as real ones do,
with this rank's own tensors where another rank's would arrive: values of the right size, finite, and drawn as theirs
are, since matrix products of zeros run faster on a GPU than those of random numbers, and NaN would end the run. Sums
over ranks are left as this rank's summand.

What a collective copies here takes time that the network takes in a real run. `COPIES` names it in a profile, so that
it can be told from computing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

BACKEND = "stand_in"
COPIES = "stand-in for a collective"  # the name of these copies in a profile


_ProcessGroup: Any = dist.ProcessGroup  # its stub knows the names of one version only


class StandInGroup(_ProcessGroup):
    """The ranks of a group, of which this process is one and the others do not exist.

    PyTorch calls the methods of a process group by name, and 2.13 has new names for three of them.
    """

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self._size = size
        self._group_name = ""

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, opts: Any = None) -> dist.Work:
        """Every part of the output is this rank's."""
        with record_function(COPIES):
            output.view(self._size, -1).copy_(own.reshape(1, -1).expand(self._size, -1))
        return _done(output)

    def reduce_scatter_single(self, own: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> dist.Work:
        """This rank's part of the sum is its own summand's."""
        with record_function(COPIES):
            own.view(-1).copy_(whole.view(self._size, -1)[self.rank()])
        return _done(own)

    def all_to_all_single(
        self, output: torch.Tensor, parts: torch.Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> dist.Work:
        """What this rank would send to the others is what it receives, as often as that takes; if it sends nothing,
        random numbers are."""
        flat, length = output.view(-1), parts.numel()
        with record_function(COPIES):
            for start in range(0, flat.numel(), length) if length else ():
                some = flat[start : start + length]
                some.copy_(parts.reshape(-1)[: some.numel()])
            if not length:
                flat.normal_()
        return _done(output)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return _done(tensors)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return _done(tensors)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> dist.Work:
        with record_function(COPIES):
            for parts, own in zip(outputs, inputs, strict=True):
                for part in parts:
                    part.copy_(own)
        return _done(outputs)

    def barrier(self, opts: Any = None) -> dist.Work:
        return _done([])

    # The names of PyTorch 2.11.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def _done(result: Any) -> dist.Work:
    """A collective that has ended; what it launched on a GPU is in the order of the current stream."""
    future = torch.futures.Future()
    future.set_result(result)
    torch_c: Any = torch._C
    return torch_c._distributed_c10d._create_work_from_future(future)


@contextmanager
def stand_in_group(rank: int, world_size: int) -> Iterator[None]:
    """Makes rank `rank` of `world_size` of this process, with no process for any other rank."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _make_group, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _make_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StandInGroup:
    return StandInGroup(rank, size)
