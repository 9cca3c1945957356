"""Stand-ins that let upstream nnScaler, which calls torch.cuda throughout, run on CPUs over gloo.

    python tests/nnscaler_on_cpu.py train.py --engine nnscaler --run_mode compile ...
    python -m torch.distributed.run --nproc_per_node=2 tests/nnscaler_on_cpu.py train.py --engine nnscaler ...

The first argument is the script to run; it sees no GPU (torch.cuda.is_available() stays False).
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

MEMORY = 80 << 30  # what every "GPU" says it has


def install() -> None:
    """Call it before nnscaler is imported."""
    answers = {
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "current_device": torch.device("cpu"),
        "default_stream": _Stream(),
        "current_stream": _Stream(),
        "stream": contextlib.nullcontext(),
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "get_device_properties": SimpleNamespace(total_memory=MEMORY),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.cuda.Stream = _Stream
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state
    torch.Tensor.cuda = torch.nn.Module.cuda = _itself
    init_process_group = dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: init_process_group("gloo", **_without_backend(kwargs))

    dist.all_to_all, dist.reduce_scatter = _all_to_all, _reduce_scatter
    _trace_on_cpu()
    _profile_in_this_process()


def _always(answer: object) -> Callable:
    return lambda *args, **kwargs: answer


def _itself(self, *args, **kwargs):
    return self


class _Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def _without_backend(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name not in ("backend", "device_id")}


def _all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group=None, async_op: bool = False):
    """torch.distributed.all_to_all of equal parts, which gloo lacks, by the all_to_all_single that it has."""
    received = torch.empty(sum(part.numel() for part in outputs), dtype=outputs[0].dtype)
    work = dist.all_to_all_single(received, torch.cat([part.flatten() for part in inputs]), group=group, async_op=True)
    work.wait()
    for part, values in zip(outputs, received.split([part.numel() for part in outputs]), strict=True):
        part.copy_(values.view(part.shape))
    return work if async_op else None


def _reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], group=None, async_op: bool = False):
    """torch.distributed.reduce_scatter, a sum, which this PyTorch's gloo lacks, by its all_reduce."""
    sums = torch.stack(inputs)
    work = dist.all_reduce(sums, group=group, async_op=True)
    work.wait()
    output.copy_(sums[dist.get_rank(group)])
    return work if async_op else None


def _trace_on_cpu() -> None:
    """The tracer moves what it computes with to a GPU, and answers torch.device('cuda') to `.device`."""
    from nnscaler.graph.tracer.trace_strategy import BaseTraceStrategy
    from torch.utils._pytree import tree_map

    def to_cpu(value):
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return value

    place = BaseTraceStrategy._place_tensors_to
    BaseTraceStrategy._place_tensors_to = staticmethod(
        lambda *args, device: tree_map(to_cpu, place(*args, device="cpu" if device == "cuda" else device))
    )


def _profile_in_this_process() -> None:
    """Autodist profiles in child processes, which these stand-ins would not reach."""
    from nnscaler import policies

    config = policies.AutoDistConfig
    policies.AutoDistConfig = lambda **options: config(**{**options, "parallel_profile": False})


def main() -> None:
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
