"""The order in which training takes the rows. It depends on the seed and the rows alone, not on the number of ranks.

Every rank computes the same order and picks its own rows from it, so nothing has to be sent; a checkpoint needs only
the Position to go on, on as many ranks as there are then.

Where documents do not see each other, rows differ in what attention has to compute, and ranks wait for each other in
every micro-batch: a layer's weights are gathered from all of them. So rows of like work are dealt to be side by side.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from longctx.schema import Count

ALIKE = 64  # rows of like work that come one after another: more than rows are side by side in most runs
WINDOW = 64 * ALIKE  # rows, drawn at random, among which those of like work are looked for


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


@lru_cache(maxsize=1)  # a tensor is known again by its identity
def epoch_order(n_rows: int, seed: int, epoch: int, work: torch.Tensor | None = None) -> torch.Tensor:
    """The order of an epoch's rows, int64 [n_rows]: each row once, shuffled differently in every epoch.

    Args:
        work: of each row, [n_rows], if rows of like work are to come one after another.
    """
    # A hash of both: with seed + epoch, epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(n_rows, generator=generator)
    return order if work is None else _alike_together(order, work, generator)


def _alike_together(order: torch.Tensor, work: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same rows, int64 [n_rows], in blocks of ALIKE that have like work.

    The blocks are in random order, and the rows of each in the order in which they are given. Those that fill no block
    come last.
    """
    blocks = [block.sort().values for places in _windows(order, work) for block in places.split(ALIKE)]
    whole, rest = ([block for block in blocks if (len(block) == ALIKE) == full] for full in (True, False))
    shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
    return order[torch.cat(shuffled + rest)]


def _windows(order: torch.Tensor, work: torch.Tensor) -> Iterator[torch.Tensor]:
    """The places in `order` of each window's rows, those of the least work first."""
    for first in range(0, len(order), WINDOW):
        yield first + work[order[first : first + WINDOW]].argsort(stable=True)


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


def micro_batches(
    rows: list[int], data_parallel_size: int, data_parallel_rank: int, work: torch.Tensor | None = None
) -> list[int | None]:
    """The rows of a step that one data-parallel rank computes, one row to a micro-batch.

    All ranks get the same number of micro-batches, since each takes part in the collectives of all; a rank that has no
    row for its last one gets None there.

    Args:
        work: of each row of the dataset, if those of a step that have like work are to be side by side.
    """
    return [
        of_ranks[data_parallel_rank] if data_parallel_rank < len(of_ranks) else None
        for of_ranks in side_by_side(rows, data_parallel_size, work)
    ]


def side_by_side(rows: list[int], data_parallel_size: int, work: torch.Tensor | None = None) -> list[list[int]]:
    """The rows of each micro-batch of a step, one for each rank; the last may have fewer.

    By their work every second micro-batch is dealt from the last rank to the first, so that over a step no rank has the
    most of all of them.
    """
    if work is None:
        return [rows[first : first + data_parallel_size] for first in range(0, len(rows), data_parallel_size)]
    dealt = side_by_side(sorted(rows, key=lambda row: work[row].item()), data_parallel_size)
    return [of_ranks[::-1] if number % 2 else of_ranks for number, of_ranks in enumerate(dealt)]


def waiting(
    order: torch.Tensor, price: torch.Tensor, per_step: int, data_parallel_size: int, work: torch.Tensor | None = None
) -> torch.Tensor:
    """By how much longer each step of an epoch takes than if its ranks had as much to compute in every micro-batch.

    Args:
        price: of each row of the dataset, in any unit of time.

    Returns:
        Parts of the steps' time, [steps]: 0.05 for 5%.
    """
    parts = []
    for rows in order.split(per_step):
        prices = [price[of_ranks] for of_ranks in side_by_side(rows.tolist(), data_parallel_size, work)]
        slowest, mean = (sum(float(value(own)) for own in prices) for value in (torch.max, torch.mean))
        parts.append(slowest / mean - 1)
    return torch.tensor(parts)
