"""The order in which training takes the rows. It depends on the seed alone, not on the number of ranks.

Every rank computes the same order and picks its own rows from it, so nothing has to be sent; a checkpoint needs only
the Position to go on, on as many ranks as there are then.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import torch

from longctx.schema import Count


@dataclass(frozen=True)
class Skipped:
    """Rows of the dataset, by their numbers, that are left out of an epoch, since a step on them went wrong."""

    epoch: Count
    rows: tuple[Count, ...]


@dataclass(frozen=True)
class Position:
    """How far training has come.

    `step` optimizer steps are done in all; of the current epoch, number `epoch` from 0, the first `row` rows are done.
    Rows that are skipped are counted as done, and a step that has no others as taken, so that steps keep their rows.
    """

    step: Count = 0
    epoch: Count = 0
    row: Count = 0
    skipped: tuple[Skipped, ...] | None = None


def rows_per_step(data_parallel_size: int, accumulation_steps: int) -> int:
    """Rows of one optimizer step, over all ranks."""
    return data_parallel_size * accumulation_steps


def steps_per_epoch(n_rows: int, per_step: int) -> int:
    """Optimizer steps of one epoch, the last of which takes the rows that are left."""
    return -(-n_rows // per_step)


@lru_cache(maxsize=1)
def epoch_order(n_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch's rows, int64 [n_rows]: each row once, shuffled differently in every epoch."""
    # A hash of both: with seed + epoch, epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    return torch.randperm(n_rows, generator=generator)


def step_rows(order: torch.Tensor, position: Position, per_step: int) -> list[int]:
    """The rows of the next step, over all ranks and micro-batches; fewer than per_step at the end of an epoch."""
    return order[position.row : position.row + per_step].tolist()


def without_skipped(rows: list[int], position: Position) -> list[int]:
    """Those of a step's rows that are trained on."""
    skipped = {row for each in position.skipped or () if each.epoch == position.epoch for row in each.rows}
    return [row for row in rows if row not in skipped]


def advance(position: Position, rows: list[int], n_rows: int) -> Position:
    """The position after the step that starts at `position` and takes `rows`."""
    row = position.row + len(rows)
    epoch, row = (position.epoch + 1, 0) if row == n_rows else (position.epoch, row)
    return Position(position.step + 1, epoch, row, position.skipped)


def position_after(step: int, n_rows: int, per_step: int, start: Position | None = None) -> Position:
    """The position after `step` steps in all, those from `start` on of `per_step` rows each.

    The last step of an epoch takes what is left.
    """
    start = start or Position()
    steps, rest_of_epoch = step - start.step, steps_per_epoch(n_rows - start.row, per_step)
    if steps < rest_of_epoch:
        return Position(step, start.epoch, start.row + steps * per_step)
    epochs, steps = divmod(steps - rest_of_epoch, steps_per_epoch(n_rows, per_step))
    return Position(step, start.epoch + 1 + epochs, steps * per_step)


def micro_batches(rows: list[int], data_parallel_size: int, data_parallel_rank: int) -> list[int | None]:
    """The rows of a step that one data-parallel rank computes, one row to a micro-batch.

    All ranks get the same number of micro-batches, since each takes part in the collectives of all; a rank that has no
    row for its last one gets None there.
    """
    n_micro_batches = -(-len(rows) // data_parallel_size)
    own = rows[data_parallel_rank::data_parallel_size]
    return [*own, *[None] * (n_micro_batches - len(own))]
