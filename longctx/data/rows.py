"""Rows of tokens as bookcorpus.py saves them: opened, checked, and read as tokens and labels."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longctx.errors import UserError, one_line

IGNORE_INDEX = -100  # a label that does not count


def open_dataset(path: str) -> Any:
    """The rows that bookcorpus.py wrote (or any saved dataset with rows of `input_ids`).

    Raises:
        UserError: there is none, it holds something else, or its rows are not all of one length.
    """
    from datasets import Dataset, load_from_disk

    if not Path(path).is_dir():
        raise UserError(f"--dataset_path {path}: no such folder; make it with bookcorpus.py")
    try:
        dataset = load_from_disk(path)
    except Exception as error:  # whatever a damaged or foreign folder makes datasets raise
        reason = one_line(error)
        raise UserError(f"--dataset_path {path}: it is no dataset that bookcorpus.py wrote ({reason})") from error
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        raise UserError(f"--dataset_path {path}: it has no rows of 'input_ids'; make it with bookcorpus.py")
    if len(dataset) == 0:
        raise UserError(f"--dataset_path {path}: it has no rows; make it again with a shorter --sequence_length")
    check_rows(dataset, path)
    return dataset.select_columns("input_ids").with_format("torch")


def check_rows(dataset: Any, path: str) -> None:
    """Raises a UserError unless all rows have as many token ids, 2 or more; reads Arrow's offsets, and no token."""
    import pyarrow.compute as pc
    from pyarrow import types

    column = dataset.data.column("input_ids")
    lists = types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type)
    if not lists or not types.is_integer(column.type.value_type):
        raise UserError(
            f"--dataset_path {path}: its 'input_ids' are of type {column.type}, not lists of token ids; make it with "
            "bookcorpus.py"
        )
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    first = lengths[0].as_py()
    row = pc.index(pc.not_equal(lengths, first), True).as_py()
    if row >= 0:
        raise UserError(
            f"--dataset_path {path}: row {row} has {lengths[row]} tokens and row 0 has {first}, and the plan is "
            "compiled for one length; make it again with bookcorpus.py"
        )
    if first < 2:
        raise UserError(
            f"--dataset_path {path}: its rows have {first} tokens, and it takes 2 to predict one; make it again with a "
            "longer --sequence_length"
        )


def corpus_facts(path: str) -> dict[str, Any]:
    """What bookcorpus.py recorded beside the rows; empty for a dataset that it did not make.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(path) / "corpus.json"
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--dataset_path {path}: its corpus.json is damaged ({one_line(error)}); make it again with bookcorpus.py"
        ) from error


def load_row(dataset: Any, row: int | None, sequence_length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row `row` as (tokens, labels), [1, l] int64 each; labels are shifted left by one, the last is ignored.

    Row None is a row with no label that counts: it takes part in the collectives and adds nothing.

    Raises:
        UserError: the row has a token that the model does not know.
    """
    if row is None:
        tokens = torch.zeros(1, sequence_length, dtype=torch.long)
        return tokens, torch.full_like(tokens, IGNORE_INDEX)
    tokens = dataset[row]["input_ids"].long().unsqueeze(0)
    low, high = tokens.aminmax()
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"--dataset_path: row {row} has token {int(high if high >= vocab_size else low)}, and the model's "
            f"vocabulary has {vocab_size}; make the dataset with the model's own tokenizer"
        )
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, :-1] = tokens[:, 1:]
    return tokens, labels


@dataclass(frozen=True)
class Rows:
    """The rows to train on, read as the plan and the model take them. `dataset` is open_dataset's."""

    dataset: Any
    sequence_length: int
    vocab_size: int

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, row: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Row `row` as (tokens, labels), as load_row gives them."""
        return load_row(self.dataset, row, self.sequence_length, self.vocab_size)
