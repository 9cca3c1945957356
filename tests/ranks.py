"""Runs a function on several ranks, each a process of its own."""

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable, *args, device: str = "cpu", start_method: str = "spawn") -> None:
    """Calls function(*args) in `world_size` processes, set up as torchrun does; an exception in one is raised here.

    The processes see GPUs only if `device` is 'cuda', and else train on the CPU wherever the tests run. Processes that
    are forked start at once, but PyTorch must not have made threads in this process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _run_rank, (world_size, port, device, function, args), nprocs=world_size, start_method=start_method
    )


def _run_rank(rank: int, world_size: int, port: int, device: str, function: Callable, args: tuple) -> None:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(*args)
