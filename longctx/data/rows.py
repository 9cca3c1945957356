"""Rows of tokens as bookcorpus.py saves them: opened, checked, and read as tokens and labels.

The label of a token is the id of the token after it, or IGNORE_INDEX where the loss should count none.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types

from longctx.errors import RowsError, one_line

IGNORE_INDEX = -100  # the label of a position that the loss leaves out, PyTorch's default


def open_dataset(path: str) -> pa.ChunkedArray:
    """The rows that bookcorpus.py wrote, or those in the column `input_ids` of any other dataset that was saved.

    It reads what `datasets.Dataset.save_to_disk` writes: state.json, which names files of Arrow streams. They are
    mapped into memory, so that a token takes memory only once its row is read. The library itself is not needed.

    Returns:
        One list of token ids a row.

    Raises:
        RowsError: there is no such dataset, it holds something else, or its rows are not all of one length.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RowsError("no such folder; make it with bookcorpus.py")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        table = pa.concat_tables([_map_table(folder / file["filename"]) for file in state["_data_files"]])
        table.validate()
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise RowsError(f"it is no dataset that bookcorpus.py wrote ({one_line(error)})") from error
    if state.get("_indices_data_files"):  # old versions of `datasets` wrote one, of a dataset that was shuffled
        raise RowsError("its rows are in the order of an indices file; save it again after Dataset.flatten_indices()")
    if "input_ids" not in table.column_names:
        raise RowsError("it has no rows of 'input_ids'; make it with bookcorpus.py")
    if len(table) == 0:
        raise RowsError("it has no rows; make it again with shorter rows")
    check_rows(table.column("input_ids"))
    return table.column("input_ids")


def _map_table(file: Path) -> pa.Table:
    with pa.ipc.open_stream(pa.memory_map(str(file))) as stream:
        return stream.read_all()


def check_rows(rows: pa.ChunkedArray) -> None:
    """Raises RowsError unless all rows have the same number of token ids, 2 or more.

    It reads where each row begins, from Arrow's offsets, and none of the tokens.
    """
    lists = types.is_list(rows.type) or types.is_large_list(rows.type) or types.is_fixed_size_list(rows.type)
    if not lists or not types.is_integer(rows.type.value_type):
        raise RowsError(f"its 'input_ids' are of type {rows.type}, not lists of token ids; make it with bookcorpus.py")
    lengths = pc.fill_null(pc.call_function("list_value_length", [rows]), 0)
    first = lengths[0].as_py()
    row = pc.index(pc.call_function("not_equal", [lengths, lengths[0]]), True).as_py()
    if row >= 0:
        raise RowsError(
            f"row {row} has {lengths[row]} tokens and row 0 has {first}, and the plan is compiled for one length; "
            "make it again with bookcorpus.py"
        )
    if first < 2:
        raise RowsError(f"its rows have {first} tokens, and it takes 2 to predict one; make it again with longer rows")


def corpus_facts(path: str) -> dict[str, Any]:
    """What bookcorpus.py recorded of the rows it made in corpus.json; empty for a dataset without that file.

    Raises:
        RowsError: the file is damaged.
    """
    file = Path(path) / "corpus.json"
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise RowsError(f"its corpus.json is damaged ({one_line(error)}); make it again with bookcorpus.py") from error


def load_row(
    dataset: pa.ChunkedArray, row: int | None, sequence_length: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row `row` as (tokens, labels), [1, l] int64 each.

    The labels are the tokens shifted left by one, and the last is IGNORE_INDEX. For `row` None all of them are: a rank
    that has no row left computes this one, to take part in the others' collectives and add nothing to the loss.

    Raises:
        RowsError: the row has a token that is not in the model's vocabulary, or that is null.
    """
    if row is None:
        tokens = torch.zeros(1, sequence_length, dtype=torch.long)
        return tokens, torch.full_like(tokens, IGNORE_INDEX)
    ids = dataset[row].values
    if ids.null_count:
        raise RowsError(f"row {row} has a token that is null; make the dataset with bookcorpus.py")
    tokens = torch.from_numpy(ids.to_numpy().astype("int64")).unsqueeze(0)
    low, high = tokens.aminmax()
    if low < 0 or high >= vocab_size:
        raise RowsError(
            f"row {row} has token {int(high if high >= vocab_size else low)}, and the model's "
            f"vocabulary has {vocab_size}; make the dataset with the model's own tokenizer"
        )
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, :-1] = tokens[:, 1:]
    return tokens, labels


@dataclass(frozen=True)
class Rows:
    """The rows to train on, read as the plan and the model take them. `dataset` is open_dataset's."""

    dataset: pa.ChunkedArray
    sequence_length: int
    vocab_size: int

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, row: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Row `row` as (tokens, labels), as load_row gives them."""
        return load_row(self.dataset, row, self.sequence_length, self.vocab_size)
