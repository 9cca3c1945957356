"""The order in which training takes the rows: it depends on the seed alone, whatever the number of ranks."""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Position:
    """How far training has come: `row` rows of epoch `epoch`'s order are done, after `step` optimizer steps."""

    step: int = 0
    epoch: int = 0
    row: int = 0


def rows_per_step(data_parallel: int, accumulation: int) -> int:
    return data_parallel * accumulation


def steps_per_epoch(n_rows: int, per_step: int) -> int:
    """The last step of an epoch takes the rows that are left."""
    return -(-n_rows // per_step)


@lru_cache(maxsize=1)
def epoch_order(n_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch sees the rows: a shuffle of its own, each row once."""
    shuffle = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))  # seed + epoch would repeat orders
    return torch.randperm(n_rows, generator=shuffle)


def step_rows(order: torch.Tensor, position: Position, per_step: int) -> list[int]:
    """The rows of the next step, over all ranks and micro-batches; fewer at the end of an epoch."""
    return order[position.row : position.row + per_step].tolist()


def advance(position: Position, rows: list[int], n_rows: int) -> Position:
    """Where training stands once the step over `rows` is done."""
    row = position.row + len(rows)
    if row == n_rows:
        return Position(position.step + 1, position.epoch + 1, 0)
    return Position(position.step + 1, position.epoch, row)


def position_after(step: int, n_rows: int, per_step: int) -> Position:
    """Where training stands after so many steps that all took `per_step` rows, but the last of each epoch."""
    epoch, steps = divmod(step, steps_per_epoch(n_rows, per_step))
    return Position(step, epoch, steps * per_step)


def micro_batches(rows: list[int], data_parallel: int, rank: int) -> list[int | None]:
    """The rows that data-parallel rank `rank` computes, one a micro-batch; None where the others have one and it not.

    Every rank has as many micro-batches as the others, since each is a round of collectives for all.
    """
    n_micro_batches = -(-len(rows) // data_parallel)
    mine = rows[rank::data_parallel]
    return [*mine, *[None] * (n_micro_batches - len(mine))]
