"""Runs a function on several ranks, each a process of its own.

A new interpreter takes 8 seconds to import PyTorch, transformers and this program. The ranks are forked from a process
that has imported them and done nothing else: it has neither taken a device nor started threads that a fork would lose.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from unittest.mock import patch

import torch
import torch.multiprocessing as mp

# Between them they import all that the scripts and the tests do.
PRELOADED = ["train", "ckpt_merger", "create_mini_model", "bookcorpus", "families", "hypothesis", "pytest"]


def run_ranks(
    world_size: int, function: Callable, *args, device: str = "cpu", start_method: str = "forkserver"
) -> None:
    """Calls function(*args) in `world_size` processes, set up as torchrun does; an exception in one is raised here.

    The processes see GPUs only if `device` is 'cuda', and else train on the CPU wherever the tests run. With the start
    method 'fork' they have what this process has, in which PyTorch must not have made threads.
    """
    if start_method == "forkserver":
        start_server()
    ranks = (world_size, free_port(), device, dict(os.environ), function, args)
    mp.start_processes(_run_rank, ranks, nprocs=world_size, start_method=start_method)


def start_server() -> None:
    """Starts the process that ranks are forked from, unless it is there already."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(
    rank: int, world_size: int, port: int, device: str, environment: dict[str, str], function: Callable, args: tuple
) -> None:
    os.environ.clear()
    os.environ |= environment | environment_of_rank(rank, world_size, port)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    function(*args)


def environment_of_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells the process of a rank on a machine that has all ranks."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
