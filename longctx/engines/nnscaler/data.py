"""The rows as nnScaler's Trainer takes them: samples of WrappedModel, in the built-in engine's order."""

from collections.abc import Iterator

import torch

from longctx.data import order
from longctx.data.rows import IGNORE_INDEX, Rows
from longctx.job import Job


class Samples(torch.utils.data.Dataset):
    """The rows as samples of WrappedModel; row None has no label that counts."""

    def __init__(self, rows: Rows, job: Job):
        self.rows, self.job = rows, job

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int | None) -> dict[str, torch.Tensor]:
        return sample(*self.rows.load(row)[:2])


def sample(tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens": tokens, "labels": labels, "n_tokens": (labels != IGNORE_INDEX).sum()}


def dummy_sample(sequence_length: int) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(1, sequence_length, dtype=torch.long)
    return sample(tokens, tokens)


def only_sample(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return samples[0]


class EpochOrder(torch.utils.data.Sampler):
    """One data-parallel rank's rows, in the order in which the built-in engine takes them."""

    def __init__(self, dataset: Samples, num_replicas: int, rank: int):
        self.n_rows, self.job = len(dataset), dataset.job
        self.data_parallel_size, self.rank, self.epoch = num_replicas, rank, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int | None]:
        shuffled = order.epoch_order(self.n_rows, self.job.seed, self.epoch)
        per_step = order.rows_per_step(self.data_parallel_size, self.job.grad_accumulation_steps)
        position = order.Position(epoch=self.epoch)
        while position.epoch == self.epoch:
            rows = order.step_rows(shuffled, position, per_step)
            yield from order.micro_batches(rows, self.data_parallel_size, self.rank)
            position = order.advance(position, rows, self.n_rows)

    def __len__(self) -> int:
        return -(-self.n_rows // self.data_parallel_size)
