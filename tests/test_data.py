"""Every row is trained on once an epoch, in an order of the seed, whatever the ranks and wherever a run resumes."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_rows import save_rows
from transformers.loss.loss_utils import ForCausalLMLoss

from longctx.data import order
from longctx.data import rows as stored
from longctx.data.order import (
    Position,
    advance,
    epoch_order,
    micro_batches,
    position_after,
    rows_per_step,
    side_by_side,
    step_rows,
    steps_per_epoch,
    waiting,
)
from longctx.data.packing import find_boundaries
from longctx.errors import RowsError


def all_rows(n_rows, world_size, accumulation, seed, start, n_steps, work=None):
    """(epoch, rows of all ranks) of each of `n_steps` steps from `start` on, and the position after them."""
    seen, position = [], start
    for _ in range(n_steps):
        shuffled = epoch_order(n_rows, seed, position.epoch, work)
        rows = step_rows(shuffled, position, rows_per_step(world_size, accumulation))
        per_rank = [micro_batches(rows, world_size, rank, work) for rank in range(world_size)]
        assert len({len(rows) for rows in per_rank}) == 1  # as many collectives on every rank
        seen.append((position.epoch, sorted(row for rows in per_rank for row in rows if row is not None)))
        position = advance(position, rows, n_rows)
    return seen, position


def drawn_work(n_rows: int, seed: int) -> torch.Tensor:
    """How much attention has to compute of each row, from little to very much."""
    return torch.rand(n_rows, generator=torch.Generator().manual_seed(seed)).double() ** -0.7


@pytest.fixture
def short_blocks(monkeypatch):
    """Rows of like work come in blocks so short that tests have several."""
    monkeypatch.setattr(order, "ALIKE", 8)
    monkeypatch.setattr(order, "WINDOW", 24)


function_scoped = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("short_blocks")
@function_scoped
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_each_row_is_seen_once_an_epoch_over_all_ranks(n_rows, world_size, accumulation, seed, has_work):
    per_epoch = steps_per_epoch(n_rows, rows_per_step(world_size, accumulation))
    work = drawn_work(n_rows, seed) if has_work else None
    steps, position = all_rows(n_rows, world_size, accumulation, seed, Position(), 2 * per_epoch, work)
    for epoch in (0, 1):
        assert sorted(row for e, rows in steps if e == epoch for row in rows) == list(range(n_rows))
    assert position == Position(2 * per_epoch, 2, 0)


@pytest.mark.usefixtures("short_blocks")
@function_scoped
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data())
def test_a_run_resumed_on_other_ranks_still_sees_each_row_once(n_rows, before, after, has_work, draw):
    work = drawn_work(n_rows, 0) if has_work else None
    first, position = all_rows(n_rows, before, 2, 0, Position(), draw.draw(st.integers(0, 5)), work)
    seen = [row for epoch, rows in first if epoch == position.epoch for row in rows]
    left = steps_per_epoch(n_rows - position.row, rows_per_step(after, 2))
    rest, _ = all_rows(n_rows, after, 2, 0, position, left, work)
    assert sorted(seen + [row for _, rows in rest for row in rows]) == list(range(n_rows))


def test_each_epoch_and_each_seed_has_another_order_of_rows():
    orders = {tuple(epoch_order(50, seed, 0).tolist()) for seed in range(5)}
    orders |= {tuple(epoch_order(50, 0, epoch).tolist()) for epoch in range(1, 5)}
    assert len(orders) > 5


def test_rows_of_like_work_are_side_by_side_and_what_ranks_still_wait_is_told():
    n_rows, ranks, per_step = 4096, 8, 32
    lengths = torch.randn(n_rows, 40, generator=torch.Generator().manual_seed(0)).exp()  # log-normal, as texts' are
    work = (lengths**2).sum(1) / lengths.sum(1) ** 2
    price = 0.4 + 0.6 * work / work.mean()

    dealt, shuffled = epoch_order(n_rows, 0, 0, work), epoch_order(n_rows, 0, 0)
    left = waiting(dealt, price, per_step, ranks, work)
    assert left.mean() < 0.005 and (left < 0.05).float().mean() > 0.98
    assert waiting(shuffled, price, per_step, ranks).mean() > 0.2  # what it would be

    steps = [side_by_side(rows.tolist(), ranks, work) for rows in dealt.split(per_step)]
    by_hand = [sum(price[own].max() for own in step) / sum(price[own].mean() for own in step) - 1 for step in steps]
    torch.testing.assert_close(left, torch.tensor(by_hand), rtol=1e-4, atol=1e-6)
    of_ranks = torch.tensor([[sum(price[own[rank]] for own in step) for rank in range(ranks)] for step in steps])
    apart_by = of_ranks.max(1).values / of_ranks.min(1).values - 1
    assert (apart_by < 0.05).float().mean() > 0.98


@pytest.mark.usefixtures("short_blocks")
def test_rows_of_like_work_do_not_come_in_the_order_of_their_work():
    work = drawn_work(480, 0)
    dealt = epoch_order(480, 0, 0, work)
    blocks = work[dealt].view(-1, 8)
    assert (blocks.mean(1).diff() < 0).float().mean() > 0.3
    assert (blocks.diff(dim=1) < 0).float().mean() > 0.3
    assert not torch.equal(dealt, epoch_order(480, 0, 1, work)) and not torch.equal(dealt, epoch_order(480, 1, 0, work))


def test_labels_are_tokens_shifted_left_and_the_last_is_ignored():
    rows = pa.table({"input_ids": [[5, 6, 7]]})
    tokens, labels = stored.load_row(rows, 0, 3, 10)
    assert tokens.tolist() == [[5, 6, 7]]
    assert labels.tolist() == [[6, 7, -100]]


def test_the_row_of_a_rank_that_has_none_left_has_no_label_that_counts():
    tokens, labels = stored.load_row(pa.table({"input_ids": [[5, 6, 7, 8]]}), None, 4, 10)
    assert tokens.shape == (1, 4)
    assert (labels == -100).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.sets(st.sampled_from(["labels", *stored.MASKS])), st.data())
def test_rows_that_bring_labels_or_masks_have_the_loss_that_transformers_computes_of_them(length, columns, data):
    table = {"input_ids": data.draw(st.lists(st.integers(0, 9), min_size=length, max_size=length))}
    for column in sorted(columns):
        values = st.sampled_from([-100, *range(10)]) if column == "labels" else st.booleans()
        table[column] = data.draw(st.lists(values, min_size=length, max_size=length))
    if "attention_mask" in columns:
        table["attention_mask"] = sorted(table["attention_mask"], reverse=True)
    dataset = pa.table({name: [row] for name, row in table.items()})
    stored.check_rows(dataset)
    tokens, labels = stored.load_row(dataset, 0, length, 10)

    theirs = torch.tensor([table.get("labels", table["input_ids"])])
    for mask in columns - {"labels"}:
        theirs[~torch.tensor([table[mask]])] = -100
    logits = torch.randn(1, length, 10, generator=torch.Generator().manual_seed(length))
    ours = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
    torch.testing.assert_close(ours, ForCausalLMLoss(logits, theirs, 10, num_items_in_batch=1))
    assert tokens.tolist() == [table["input_ids"]]


def test_labels_of_any_saved_dataset_are_taken(tmp_path):
    datasets = pytest.importorskip("datasets", reason="compares with the package datasets")
    columns = {"text": ["a", "b"], "labels": [[-100, 6, 7], [8, -100, -100]], "input_ids": [[5, 6, 7], [8, 9, 5]]}
    columns["attention_mask"] = [[1, 1, 1], [1, 1, 0]]
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    opened = stored.open_dataset(str(tmp_path / "rows"))
    assert [stored.load_row(opened, row, 3, 10)[1].tolist() for row in (0, 1)] == [[[6, 7, -100]], [[-100] * 3]]


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("labels", [[1, 2, 3], [1, 2]], "row 1 has 2 labels and 3 tokens; mend it, or remove the column"),
        ("loss_mask", [[1, 1, 1], None], "row 1 has 0 loss_mask and 3 tokens; mend it, or remove the column"),
        ("labels", [["a"], ["b"]], "its 'labels' are of type list<.*string>, not lists of integers, one a token"),
        ("labels", [1, 0], "its 'labels' are of type int64, not lists of integers, one a token"),
        ("labels", [[True] * 3] * 2, "its 'labels' are of type list<.*bool>, not lists of integers, one a token"),
        ("assistant_masks", [[1.0] * 3] * 2, "its 'assistant_masks' are of type list<.*double>, not lists of integers"),
    ],
)
def test_labels_and_masks_that_do_not_fit_the_tokens_are_refused_before_training(tmp_path, column, values, sentence):
    datasets = pytest.importorskip("datasets", reason="saves with the package datasets")
    columns = {"input_ids": [[1, 2, 3]] * 2, column: values}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    with pytest.raises(RowsError, match=f"^{sentence}"):
        stored.open_dataset(str(tmp_path / "rows"))


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("labels", [1, 10, 2], "row 0 has label 10, and the model's vocabulary has 10"),
        ("labels", [1, -1, 2], "row 0 has label -1, and the model's vocabulary has 10"),
        ("labels", [1, None, 2], "row 0 has a label that is null"),
        ("loss_mask", [1, None, 0], "row 0 has a loss_mask value that is null"),
        ("loss_mask", [1, 2, 0], "row 0 has a loss_mask of other values than 0 and 1"),
        ("attention_mask", [0, 1, 1], "row 0 has tokens after places that its attention_mask leaves out"),
    ],
)
def test_labels_and_masks_with_values_that_mean_nothing_are_refused_with_their_row(column, values, sentence):
    with pytest.raises(RowsError, match=f"^{sentence}"):
        stored.load_row(pa.table({"input_ids": [[1, 2, 3]], column: [values]}), 0, 3, 10)


def test_a_folder_of_several_splits_is_refused_with_what_to_name(tmp_path):
    save_rows(tmp_path / "rows" / "train", [[1, 2, 3]])
    (tmp_path / "rows" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(RowsError, match="^it holds several splits; name the folder of one of them"):
        stored.open_dataset(str(tmp_path / "rows"))


def test_rows_are_read_from_a_folder_whose_name_is_no_text(tmp_path):
    """Of such bytes, a path consists where the locale is C and Python's UTF-8 mode is off."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    save_rows(tmp_path / "rows", [[1, 2, 3]])
    (tmp_path / "rows").rename(folder)
    assert len(stored.open_dataset(str(folder))) == 1


def test_columns_that_training_does_not_read_are_told(tmp_path):
    datasets = pytest.importorskip("datasets", reason="saves with the package datasets")
    columns = {"input_ids": [[1, 2]], "position_ids": [[0, 1]], "labels": [[1, 2]], "seq_lengths": [[2]]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    folder = str(tmp_path / "rows")
    assert stored.columns_left_out(folder) == ["position_ids", "seq_lengths"]
    assert sorted(stored.open_dataset(folder).column_names) == ["input_ids", "labels"]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_tokenizer_may_have_more_entries_than_the_model_if_none_of_them_occurs(tmp_path, recorded):
    folder = save_rows(tmp_path / "rows", [[1, 2, 9], [3, 4, 5]])
    facts = {"vocab_size": 11, "tokenizer": "theirs"} | ({"largest_token": 9} if recorded else {})
    (tmp_path / "rows" / "corpus.json").write_text(json.dumps(facts))
    stored.check_tokenizer(folder, 10)
    with pytest.raises(RowsError, match="theirs has 11 entries and the model's vocabulary 9, and token 9 occurs"):
        stored.check_tokenizer(folder, 9)


@pytest.mark.parametrize("content", ['{"vocab_size": "11"}', '{"vocab_size": null}', "[1]", "[" * 10**5])
def test_a_corpus_json_of_wrong_types_is_refused_in_one_sentence(tmp_path, content):
    folder = save_rows(tmp_path / "rows", [[1, 2, 9]])
    (tmp_path / "rows" / "corpus.json").write_text(content)
    with pytest.raises(RowsError, match=r"^its file corpus.json is damaged \(.*\); make it again with bookcorpus.py$"):
        stored.check_tokenizer(folder, 10)


def test_a_token_outside_the_vocabulary_is_refused_with_its_row():
    for token in (10, -1):
        with pytest.raises(
            RowsError, match=f"^row 0 has token {token}, and the model's vocabulary has 10; make the dataset"
        ):
            stored.load_row(pa.table({"input_ids": [[5, token, 7]]}), 0, 3, 10)


def test_a_token_that_is_null_is_refused_with_its_row():
    with pytest.raises(RowsError, match="^row 1 has a token that is null; make the dataset with bookcorpus.py"):
        stored.load_row(pa.table({"input_ids": [[5, 6, 7], [5, None, 7]]}), 1, 3, 10)


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
    "state",
    [
        "{",
        "3",
        "[]",
        "{}",
        '{"_data_files": [{"filename": 3}]}',
        '{"_data_files": []}',
        '{"_data_files": [3]}',
        '{"_data_files": [{"filename": "lost"}]}',
    ],
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


def test_a_flipped_byte_in_rows_that_bookcorpus_wrote_is_named(tmp_path):
    folder = Path(save_rows(tmp_path / "rows", torch.arange(64).view(4, 16)))
    stored.verify_dataset(str(folder))  # another program's have no digests
    stored.record_corpus(folder, {"tokenizer": "mine", "vocab_size": 64})
    stored.verify_dataset(str(folder))
    assert stored.corpus_facts(str(folder)).vocab_size == 64
    for name in ("state.json", "corpus.json", "data-00000-of-00001.arrow"):
        content = (folder / name).read_bytes()
        for place in range(0, len(content), 37):
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(RowsError, match=f"^its file {name} is damaged.*; make it again with bookcorpus.py"):
                stored.verify_dataset(str(folder))
        (folder / name).write_bytes(content)
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(RowsError, match="^its file data-00000-of-00001.arrow is missing; make it again"):
        stored.verify_dataset(str(folder))


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


# --- documents of a row ----------------------------------------------------------------------------------------------

BOS = 1


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 9), st.integers(1, 5), st.booleans(), st.booleans(), st.data())
def test_documents_begin_where_the_column_or_else_the_bos_tokens_say_and_with_each_row(
    tmp_path_factory, length, n_rows, by_column, in_chunks, data
):
    folder = str(tmp_path_factory.getbasetemp())
    tokens = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=n_rows))
    tokens[-1][-1] = BOS
    table = pa.table({"input_ids": tokens})
    begins = [[place for place, token in enumerate(row) if token == BOS] for row in tokens]
    if by_column:
        begins = [sorted(data.draw(st.sets(st.integers(0, length - 1)))) for _ in tokens]
        table = table.append_column(stored.BEGINS, pa.array(begins, pa.list_(pa.int32())))
    if in_chunks:
        table = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    boundaries = find_boundaries(folder, table, length, None if by_column else BOS)
    squares = []
    for row, own in enumerate(begins):
        starts = sorted({0, *own})
        assert boundaries.starts(row) == tuple(starts)
        squares.append(sum((end - start) ** 2 for start, end in zip(starts, [*starts[1:], length], strict=True)))
        rows = stored.Rows(table, length, 10, boundaries)
        tokens_of_row, labels, positions, given_starts = rows.load(row)
        plain_tokens, plain_labels = stored.load_row(table, row, length, 10)
        assert torch.equal(tokens_of_row, plain_tokens)
        assert given_starts == tuple(starts)
        assert positions.tolist() == [[place - max(s for s in starts if s <= place) for place in range(length)]]
        lasts = [start - 1 for start in starts[1:]]
        assert all(labels[0, place] == (-100 if place in lasts else plain_labels[0, place]) for place in range(length))
    assert boundaries.squares.tolist() == squares
    assert boundaries.length == pytest.approx(sum(squares) / (length * len(tokens)))


@pytest.mark.parametrize(
    ("bos", "facts", "sentence"),
    [
        (None, None, "nothing says where its documents begin: it has no column document_starts, and its model no bos"),
        (BOS, {"bos_token": None}, "nothing says where .* and its tokenizer no bos token; make it again with"),
        (BOS, None, "nothing says where its documents begin: .* the model's bos token, 1, is nowhere in it; make it"),
    ],
)
def test_rows_that_do_not_say_where_documents_begin_are_refused(tmp_path, bos, facts, sentence):
    if facts:
        (tmp_path / "corpus.json").write_text(json.dumps({"tokenizer": "theirs", "vocab_size": 9} | facts))
    with pytest.raises(RowsError, match=f"^{sentence}"):
        find_boundaries(str(tmp_path), pa.table({"input_ids": [[5, 6], [7, 8]]}), 2, bos)


@pytest.mark.parametrize("begins", [[0, 3], [-1], [None]])
def test_document_starts_that_are_no_places_in_a_row_are_refused(tmp_path, begins):
    table = pa.table({"input_ids": [[5, 6, 7]], stored.BEGINS: pa.array([begins], pa.list_(pa.int32()))})
    with pytest.raises(RowsError, match="^its column document_starts has values that are no places in a row; make it"):
        find_boundaries(str(tmp_path), table, 3, None)
