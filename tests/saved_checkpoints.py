"""Checkpoints as training saves them."""

from collections.abc import Callable
from pathlib import Path

import torch

from longctx.job import Job
from longctx.runtime.checkpoint import State
from longctx.runtime.parallel import ParallelModel
from longctx.runtime.saving import Saver


def no_hf_files(folder: Path) -> None:
    """Stands for what writes a model's configuration and tokenizer, where nobody reads them."""


def save(
    folder: Path,
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    state: State,
    write_hf_files: Callable[[Path], None] = no_hf_files,
) -> None:
    """Saves a checkpoint, by all ranks, and waits until it is whole."""
    job = Job(model_id="any", sequence_length=1, runtime_ngpus=1, name="any", checkpoint_dir=folder)
    saver = Saver(job, model, optimizer, write_hf_files)
    saver.save(state)
    saver.finish()
