"""Every row is trained on once an epoch, in an order of the seed, whatever the ranks and wherever a run resumes."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.data import rows as stored
from longctx.data.order import (
    Position,
    advance,
    epoch_order,
    micro_batches,
    position_after,
    rows_per_step,
    step_rows,
    steps_per_epoch,
)
from longctx.errors import RowsError


def all_rows(n_rows, world_size, accumulation, seed, start, n_steps):
    """(epoch, rows of all ranks) of each of `n_steps` steps from `start` on, and the position after them."""
    seen, position = [], start
    for _ in range(n_steps):
        order = epoch_order(n_rows, seed, position.epoch)
        rows = step_rows(order, position, rows_per_step(world_size, accumulation))
        per_rank = [micro_batches(rows, world_size, rank) for rank in range(world_size)]
        assert len({len(rows) for rows in per_rank}) == 1  # as many collectives on every rank
        seen.append((position.epoch, sorted(row for rows in per_rank for row in rows if row is not None)))
        position = advance(position, rows, n_rows)
    return seen, position


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_each_row_is_seen_once_an_epoch_over_all_ranks(n_rows, world_size, accumulation, seed):
    per_epoch = steps_per_epoch(n_rows, rows_per_step(world_size, accumulation))
    steps, position = all_rows(n_rows, world_size, accumulation, seed, Position(), 2 * per_epoch)
    for epoch in (0, 1):
        assert sorted(row for e, rows in steps if e == epoch for row in rows) == list(range(n_rows))
    assert position == Position(2 * per_epoch, 2, 0)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_run_resumed_on_other_ranks_still_sees_each_row_once(n_rows, before, after, draw):
    first, position = all_rows(n_rows, before, 2, 0, Position(), draw.draw(st.integers(0, 5)))
    seen = [row for epoch, rows in first if epoch == position.epoch for row in rows]
    left = steps_per_epoch(n_rows - position.row, rows_per_step(after, 2))
    rest, _ = all_rows(n_rows, after, 2, 0, position, left)
    assert sorted(seen + [row for _, rows in rest for row in rows]) == list(range(n_rows))


def test_each_epoch_and_each_seed_has_another_order_of_rows():
    orders = {tuple(epoch_order(50, seed, 0).tolist()) for seed in range(5)}
    orders |= {tuple(epoch_order(50, 0, epoch).tolist()) for epoch in range(1, 5)}
    assert len(orders) > 5


def test_labels_are_tokens_shifted_left_and_the_last_is_ignored():
    rows = [{"input_ids": torch.tensor([5, 6, 7])}]
    tokens, labels = stored.load_row(rows, 0, 3, 10)
    assert tokens.tolist() == [[5, 6, 7]]
    assert labels.tolist() == [[6, 7, -100]]


def test_the_row_of_a_rank_that_has_none_left_has_no_label_that_counts():
    tokens, labels = stored.load_row([], None, 4, 10)
    assert tokens.shape == (1, 4)
    assert (labels == -100).all()


def test_a_token_outside_the_vocabulary_is_refused_with_its_row():
    for token in (10, -1):
        with pytest.raises(
            RowsError, match=f"^row 0 has token {token}, and the model's vocabulary has 10; make the dataset"
        ):
            stored.load_row([{"input_ids": torch.tensor([5, token, 7])}], 0, 3, 10)


def test_a_folder_without_rows_to_train_on_is_refused_in_one_sentence(tmp_path):
    def refused(folder: str) -> str:
        with pytest.raises(RowsError) as error:
            stored.open_dataset(str(tmp_path / folder))
        return str(error.value)

    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(tmp_path / "short")
    assert refused("absent") == "no such folder; make it with bookcorpus.py"
    assert refused("empty").startswith("it is no dataset that bookcorpus.py wrote (")
    assert refused("short") == "its rows have 1 tokens, and it takes 2 to predict one; make it again with longer rows"


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 20))
def test_the_position_after_a_number_of_steps_is_that_of_taking_them_one_by_one(n_rows, before, now, first, steps):
    _, start = all_rows(n_rows, 1, before, 0, Position(), first)
    _, position = all_rows(n_rows, 1, now, 0, start, steps)
    assert position_after(start.step + steps, n_rows, now, start) == position
