"""Computing with the same bits in every run."""

import os

import torch


def be_deterministic() -> None:
    """Makes PyTorch take deterministic kernels only; where an operator has none, it raises an error that names it.

    Has to be called before CUDA starts: cuBLAS reads its variable then. Without one workspace of a fixed size it may
    split a product in other ways while several streams run (cuBLAS's documentation, "Results reproducibility").
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # By default this fills all memory that is allocated. Nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
