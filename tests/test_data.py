"""Every row is trained on once an epoch, in an order of the seed, whatever the ranks and wherever a run resumes."""

import json
import sys

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_rows import save_rows

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
    rows = pa.chunked_array([[[5, 6, 7]]])
    tokens, labels = stored.load_row(rows, 0, 3, 10)
    assert tokens.tolist() == [[5, 6, 7]]
    assert labels.tolist() == [[6, 7, -100]]


def test_the_row_of_a_rank_that_has_none_left_has_no_label_that_counts():
    tokens, labels = stored.load_row(pa.chunked_array([[[5, 6, 7, 8]]]), None, 4, 10)
    assert tokens.shape == (1, 4)
    assert (labels == -100).all()


def test_a_token_outside_the_vocabulary_is_refused_with_its_row():
    for token in (10, -1):
        with pytest.raises(
            RowsError, match=f"^row 0 has token {token}, and the model's vocabulary has 10; make the dataset"
        ):
            stored.load_row(pa.chunked_array([[[5, token, 7]]]), 0, 3, 10)


def test_a_token_that_is_null_is_refused_with_its_row():
    with pytest.raises(RowsError, match="^row 1 has a token that is null; make the dataset with bookcorpus.py"):
        stored.load_row(pa.chunked_array([[[5, 6, 7]], [[5, None, 7]]]), 1, 3, 10)


def test_a_folder_without_rows_to_train_on_is_refused_in_one_sentence(tmp_path):
    def refused(folder: str) -> str:
        with pytest.raises(RowsError) as error:
            stored.open_dataset(str(tmp_path / folder))
        return str(error.value)

    (tmp_path / "empty").mkdir()
    save_rows(tmp_path / "short", [[1]])
    save_rows(tmp_path / "no_rows", [], pa.list_(pa.int32()))
    assert refused("absent") == "no such folder; make it with bookcorpus.py"
    assert refused("empty").startswith("it is no dataset that bookcorpus.py wrote (")
    assert refused("short") == "its rows have 1 tokens, and it takes 2 to predict one; make it again with longer rows"
    assert refused("no_rows") == "it has no rows; make it again with shorter rows"


@pytest.mark.parametrize(
    "state", ["{", "3", "{}", '{"_data_files": []}', '{"_data_files": [3]}', '{"_data_files": [{"filename": "lost"}]}']
)
def test_a_damaged_state_json_is_refused_in_one_sentence(tmp_path, state):
    save_rows(tmp_path / "rows", [[1, 2, 3]])
    (tmp_path / "rows" / "state.json").write_text(state)
    with pytest.raises(RowsError, match=r"^it is no dataset that bookcorpus.py wrote \(.+\)$"):
        stored.open_dataset(str(tmp_path / "rows"))


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9])
def test_a_file_of_rows_that_was_cut_off_is_refused_in_one_sentence(tmp_path, left):
    save_rows(tmp_path / "rows", torch.ones(64, 256), n_files=2)
    file = tmp_path / "rows" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(RowsError, match=r"^it is no dataset that bookcorpus.py wrote \(.+\)$"):
        stored.open_dataset(str(tmp_path / "rows"))


def test_files_of_rows_of_different_types_are_refused_in_one_sentence(tmp_path):
    save_rows(tmp_path / "rows", torch.ones(4, 8), n_files=2)
    save_rows(tmp_path / "long", [[1] * 8], pa.list_(pa.int64()))
    (tmp_path / "long" / "data-00000-of-00001.arrow").rename(tmp_path / "rows" / "data-00001-of-00002.arrow")
    with pytest.raises(RowsError, match=r"^it is no dataset that bookcorpus.py wrote \(.+\)$"):
        stored.open_dataset(str(tmp_path / "rows"))


def test_rows_in_the_order_of_an_indices_file_are_refused(tmp_path):
    save_rows(tmp_path / "rows", torch.ones(4, 8))
    state = json.loads((tmp_path / "rows" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "rows" / "state.json").write_text(json.dumps(state))
    with pytest.raises(RowsError, match="an indices file; save it again after Dataset.flatten_indices"):
        stored.open_dataset(str(tmp_path / "rows"))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(2, 70), st.integers(1, 5), st.sampled_from(["list", "large", "fixed"]))
def test_rows_that_the_library_datasets_saved_are_read_as_it_reads_them(tmp_path_factory, n_rows, length, shards, kind):
    datasets = pytest.importorskip("datasets", reason="compares with the package datasets")
    datasets.disable_progress_bars()
    folder = str(tmp_path_factory.mktemp("rows") / "saved")
    kinds = {
        "list": datasets.List(datasets.Value("int32")),
        "large": datasets.LargeList(datasets.Value("int64")),
        "fixed": datasets.List(datasets.Value("uint16"), length),
    }
    generator = torch.Generator().manual_seed(n_rows * 100 + length)
    rows = torch.randint(0, 60_000, (n_rows, length), generator=generator).tolist()
    made = datasets.Dataset.from_dict({"input_ids": rows}, datasets.Features({"input_ids": kinds[kind]}))
    made.save_to_disk(folder, num_shards=min(shards, n_rows))

    opened, theirs = stored.open_dataset(folder), datasets.load_from_disk(folder).with_format("torch")
    assert len(opened) == len(theirs)
    for row in range(n_rows):
        tokens, _ = stored.load_row(opened, row, length, 60_000)
        assert torch.equal(tokens[0], theirs[row]["input_ids"].long())


def test_rows_stay_in_their_file_until_they_are_read(tmp_path):
    folder = save_rows(tmp_path / "rows", torch.ones(64, 2**14))
    before = pa.total_allocated_bytes()
    opened = stored.open_dataset(folder)
    tokens, _ = stored.load_row(opened, 63, 2**14, 10)
    assert pa.total_allocated_bytes() - before < 2**14
    assert (tokens == 1).all()


def test_training_rows_are_read_without_the_library_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises ModuleNotFoundError
    assert len(stored.open_dataset(save_rows(tmp_path / "rows", torch.ones(3, 8)))) == 3


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 20))
def test_the_position_after_a_number_of_steps_is_that_of_taking_them_one_by_one(n_rows, before, now, first, steps):
    _, start = all_rows(n_rows, 1, before, 0, Position(), first)
    _, position = all_rows(n_rows, 1, now, 0, start, steps)
    assert position_after(start.step + steps, n_rows, now, start) == position
