"""The device that a rank computes on, and the library by which ranks talk to each other from there."""

import os

import torch

from longctx import torchrun
from longctx.errors import DeviceError

# PyTorch 2.11 and 2.13 read these, the second one as the older name of the first.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def choose(asked: str) -> str:
    """The kind of device, 'cpu' or 'cuda'. 'auto' takes a GPU where there is one.

    Raises:
        DeviceError: a GPU is asked for, and PyTorch sees none.
    """
    has_gpu = torch.cuda.is_available()  # this asks the driver, and leaves no context on any GPU
    if asked == "cuda" and not has_gpu:
        built = "it was built without CUDA" if torch.version.cuda is None else "look at nvidia-smi and the driver"
        raise DeviceError(f"PyTorch {torch.__version__} sees no GPU here ({built}); choose cpu, or auto")
    return ("cuda" if has_gpu else "cpu") if asked == "auto" else asked


def take(kind: str) -> torch.device:
    """This rank's device. Where a node has more ranks than GPUs, ranks share them.

    A process has to call this before anything else of its touches CUDA, which would then take some hundred MB of the
    first GPU for every rank of the node. Memory is taken in segments that can grow, unless the user has settled
    otherwise: an allocator that can't join its free segments reserves a tenth more than it has in use.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    device = torch.device("cuda", torchrun.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def are_shared(device: torch.device) -> bool:
    """Whether ranks of this node share a GPU."""
    return device.type == "cuda" and torchrun.local_world_size() > torch.cuda.device_count()


def backend(device: torch.device) -> str:
    """What torch.distributed sends tensors by. NCCL refuses two ranks on one GPU; gloo sends through the CPU."""
    return "gloo" if device.type == "cpu" or are_shared(device) else "cpu:gloo,cuda:nccl"


def describe_sharing() -> str:
    """What a person has to know where ranks share GPUs."""
    n_ranks, n_gpus = torchrun.local_world_size(), torch.cuda.device_count()
    return (
        f"{n_ranks} ranks share {n_gpus} GPU{'s' if n_gpus > 1 else ''}: they talk by gloo, through the CPU, since "
        "NCCL needs a GPU for each rank; that tries a plan out, and says nothing of its speed"
    )
