"""Rows of tokens as bookcorpus.py saves them: opened, checked, and read as tokens and labels.

The label of a token is the id of the token after it, or IGNORE_INDEX where the loss should count none. Rows of other
programs may bring labels of their own, or masks that say which tokens are to be learned.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types

from longctx import seal
from longctx.errors import RowsError, one_line
from longctx.schema import Count, Range, decode, read_json

if TYPE_CHECKING:
    from longctx.data.packing import Boundaries

CORPUS = "corpus.json"  # what bookcorpus.py records of rows beside them
MAKE_AGAIN = "make it again with bookcorpus.py"
IGNORE_INDEX = -100  # the label of a position that the loss leaves out, PyTorch's default
# Columns of 0 and 1, of which 0 leaves a token out of the loss, as transformers' apply_chat_template and TRL name them.
# attention_mask has 0 for padding.
MASKS = ("loss_mask", "assistant_masks", "completion_mask", "attention_mask")
BEGINS = "document_starts"  # the column of the tokens of a row at which a document begins; packing.py reads it
# What one value is called, of each column that is read.
NAMES = {"input_ids": "token", "labels": "label", BEGINS: "document start"} | {mask: f"{mask} value" for mask in MASKS}

# What a model takes of a row: tokens and labels, and, where documents do not see each other, positions and where each
# document begins.
RowInputs = tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]


@dataclass(frozen=True)
class DataFile:
    filename: str


@dataclass(frozen=True)
class SavedDataset:
    """What is read of state.json, which the library `datasets` writes. Old versions of it wrote a file of indices
    beside a dataset that was shuffled."""

    _data_files: list[DataFile]
    _indices_data_files: Any = None


def open_dataset(path: str) -> pa.Table:
    """The rows of a dataset that was saved: those that bookcorpus.py wrote, or any other's with `input_ids`.

    It reads what `datasets.Dataset.save_to_disk` writes: state.json, which names files of Arrow streams. They are
    mapped into memory, so that a token takes memory only once its row is read. The library itself is not needed.

    Returns:
        A row of lists of equal length each: the token ids in `input_ids`, and, where the dataset has them, `labels` and
        the columns of MASKS; and the lists of BEGINS, which are of any length.

    Raises:
        RowsError: there is no such dataset, it holds something else, or its rows are not all of one length.
    """
    table = _read_table(path)
    if "input_ids" not in table.column_names:
        raise RowsError("it has no rows of 'input_ids'; make it with bookcorpus.py")
    if len(table) == 0:
        raise RowsError("it has no rows; make it again with shorter rows")
    check_rows(table)
    return table.select([name for name in NAMES if name in table.column_names])


def columns_left_out(path: str) -> list[str]:
    """The columns of a saved dataset that training takes no notice of."""
    return [name for name in _read_table(path).column_names if name not in NAMES]


def _read_table(path: str) -> pa.Table:
    """All that was saved in a dataset's folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise RowsError("no such folder; make it with bookcorpus.py")
    if (folder / "dataset_dict.json").exists():
        raise RowsError("it holds several splits; name the folder of one of them, which is inside")
    try:
        saved = decode(SavedDataset, read_json(folder / "state.json"))
        table = pa.concat_tables([_map_table(folder / file.filename) for file in saved._data_files])
        table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RowsError(f"it is no dataset that bookcorpus.py wrote ({one_line(error)})") from error
    if saved._indices_data_files:
        raise RowsError("its rows are in the order of an indices file; save it again after Dataset.flatten_indices()")
    return table


def record_corpus(folder: Path, facts: dict[str, Any]) -> None:
    """Writes corpus.json: what rows were made of, and the seals of all other files that are in their folder."""
    seals = {name: asdict(of) for name, of in seal.seal(folder, seal.files_in(folder)).items()}
    (folder / CORPUS).write_bytes(seal.sealed_json(facts | {"seals": seals}, indent=2))


def verify_dataset(path: str) -> None:
    """Compares the files of a dataset that bookcorpus.py wrote with their digests; other datasets have none.

    Raises:
        RowsError: a byte of them is not what was written.
    """
    folder = Path(path)
    if not (folder / CORPUS).is_file():
        return
    try:
        facts, is_sealed = seal.read_sealed_json((folder / CORPUS).read_bytes())
        if not is_sealed and "seals" in facts:
            raise ValueError("its digest is missing")
    except (OSError, ValueError) as error:
        raise RowsError(f"its file {CORPUS} is damaged ({one_line(error)}); {MAKE_AGAIN}") from error
    if not is_sealed:  # what older versions wrote
        return
    try:
        seals = decode(dict[str, seal.Seal], facts["seals"])
        seal.check_sizes(folder, seals)
        seal.verify(folder, seals)
    except (OSError, ValueError, KeyError) as error:
        raise RowsError(f"{one_line(error)}; {MAKE_AGAIN}") from error


def _map_table(file: Path) -> pa.Table:
    with pa.ipc.open_stream(pa.memory_map(os.fsencode(file))) as stream:
        return stream.read_all()


def row_length(dataset: pa.Table) -> int:
    """Tokens of a row, of which all have the same number."""
    return len(dataset.column("input_ids")[0])


def check_rows(table: pa.Table) -> None:
    """Raises RowsError unless all rows have the same number of token ids, 2 or more, and as many labels and so on.

    It reads where each row begins, from Arrow's offsets, and none of the tokens.
    """
    lengths = list_lengths(table, "input_ids", "token ids; make it with bookcorpus.py")
    first = lengths[0].as_py()
    if (row := first_other_than(first, lengths)) is not None:
        raise RowsError(
            f"row {row} has {lengths[row]} tokens and row 0 has {first}, and the plan is compiled for one length; "
            "make it again with bookcorpus.py"
        )
    if first < 2:
        raise RowsError(f"its rows have {first} tokens, and it takes 2 to predict one; make it again with longer rows")
    if BEGINS in table.column_names:
        list_lengths(table, BEGINS, f"integers, one a document; {MAKE_AGAIN}")
    for column in (name for name in NAMES if name not in ("input_ids", BEGINS) and name in table.column_names):
        lengths = list_lengths(table, column, "integers, one a token; mend them, or remove the column")
        if (row := first_other_than(first, lengths)) is not None:
            raise RowsError(f"row {row} has {lengths[row]} {column} and {first} tokens; mend it, or remove the column")


def list_lengths(table: pa.Table, column: str, of_what: str) -> pa.ChunkedArray:
    """The length of each row's list in a column; raises RowsError if they are no lists of integers."""
    lists = table.column(column)
    kind = lists.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    numbers = (types.is_integer, types.is_boolean) if column in MASKS else (types.is_integer,)
    if not is_list or not any(is_number(kind.value_type) for is_number in numbers):
        raise RowsError(f"its '{column}' are of type {kind}, not lists of {of_what}")
    return pc.fill_null(pc.call_function("list_value_length", [lists]), 0)


def first_other_than(length: int, lengths: pa.ChunkedArray) -> int | None:
    """The first row of another length; None if there is none."""
    row = pc.index(pc.call_function("not_equal", [lengths, length]), True).as_py()
    return None if row < 0 else row


@dataclass(frozen=True)
class CorpusFacts:
    """What is read of corpus.json, in which bookcorpus.py records what it made rows of.

    Attributes:
        vocab_size: entries of the tokenizer.
        bos_token: what each document begins with; None if the tokenizer has no such token.
        largest_token: -1 if there is none; None from older versions of bookcorpus.py, which did not record it.
    """

    tokenizer: str
    vocab_size: Count
    bos_token: str | None = None
    largest_token: Annotated[int, Range(at_least=-1)] | None = None


def corpus_facts(path: str) -> CorpusFacts | None:
    """What bookcorpus.py recorded of the rows it made in corpus.json; None for a dataset without that file.

    Raises:
        RowsError: the file is damaged.
    """
    file = Path(path) / CORPUS
    if not os.path.lexists(file):
        return None
    try:
        return decode(CorpusFacts, read_json(file))
    except ValueError as error:
        raise RowsError(f"its file {CORPUS} is damaged ({error}); {MAKE_AGAIN}") from error


def check_tokenizer(path: str, vocab_size: int) -> None:
    """Raises RowsError if the rows have a token of their tokenizer that is not in a model's vocabulary of that size.

    A tokenizer may have more entries than the model, as Gemma 3's has one for images, as long as none of them occurs.
    """
    facts = corpus_facts(path)
    if facts is None or facts.vocab_size <= vocab_size:
        return
    largest = largest_token(open_dataset(path)) if facts.largest_token is None else facts.largest_token
    if largest >= vocab_size:
        raise RowsError(
            f"its tokenizer {facts.tokenizer} has {facts.vocab_size} entries and the model's vocabulary {vocab_size}, "
            f"and token {largest} occurs; make the rows with the model's own tokenizer"
        )


def largest_token(dataset: pa.Table) -> int:
    tokens = pc.call_function("list_flatten", [dataset.column("input_ids")])
    return pc.call_function("max", [tokens]).as_py()


def load_row(
    dataset: pa.Table, row: int | None, sequence_length: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row `row` as (tokens, labels), [1, l] int64 each.

    The labels are the tokens, or those that the row brings, shifted left by one, and the last is IGNORE_INDEX: Hugging
    Face's models shift `labels` in the same way, which belong to the token at their own place. A label whose place a
    mask leaves out is IGNORE_INDEX too. For `row` None all of them are: a rank that has no row left computes this one,
    to take part in the others' collectives and add nothing to the loss.

    Raises:
        RowsError: the row has a token or a label that is not in the model's vocabulary, a value that is null, a mask of
            other values than 0 and 1, or an attention mask that the plan does not compute.
    """
    if row is None:
        tokens = torch.zeros(1, sequence_length, dtype=torch.long)
        return tokens, torch.full_like(tokens, IGNORE_INDEX)
    tokens = load_values(dataset, "input_ids", row)
    check_vocabulary(tokens, row, "token", vocab_size)
    places = tokens
    if "labels" in dataset.column_names:
        places = load_values(dataset, "labels", row)
        check_vocabulary(places[places != IGNORE_INDEX], row, "label", vocab_size)
    for mask in MASKS:
        if mask in dataset.column_names:
            places = places.where(load_mask(dataset, mask, row), IGNORE_INDEX)
    return tokens.unsqueeze(0), torch.nn.functional.pad(places[1:], (0, 1), value=IGNORE_INDEX).unsqueeze(0)


def apart(tokens: torch.Tensor, labels: torch.Tensor, starts: tuple[int, ...]) -> RowInputs:
    """Tokens and labels of a row, [1, l] int64 each, as a model takes them whose documents do not see each other.

    From the last token of a document nothing is learned: what comes after it is another document's. Positions, [1, l]
    int64, begin anew with each document.

    Args:
        starts: the tokens at which a document begins, ascending from 0.
    """
    firsts, length = torch.tensor(starts), tokens.shape[1]
    labels = labels.index_fill(1, firsts[1:] - 1, IGNORE_INDEX)
    positions = torch.arange(length) - firsts.repeat_interleave(firsts.diff(append=torch.tensor([length])))
    return tokens, labels, positions.unsqueeze(0), starts


def load_values(dataset: pa.Table, column: str, row: int) -> torch.Tensor:
    """One row of a column, int64 [l]."""
    values = dataset.column(column)[row].values
    if values.null_count:
        raise RowsError(f"row {row} has a {NAMES[column]} that is null; make the dataset with bookcorpus.py")
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).astype("int64"))


def load_mask(dataset: pa.Table, mask: str, row: int) -> torch.Tensor:
    """Which places of a row count, bool [l]."""
    values = load_values(dataset, mask, row)
    if values.min() < 0 or values.max() > 1:
        raise RowsError(f"row {row} has a {mask} of other values than 0 and 1; mend it, or remove the column")
    if mask == "attention_mask" and (values[1:] > values[:-1]).any():
        raise RowsError(
            f"row {row} has tokens after places that its attention_mask leaves out, and attention here is over all "
            "tokens before; put padding at the end of a row, or remove the column"
        )
    return values.bool()


def check_vocabulary(ids: torch.Tensor, row: int, what: str, vocab_size: int) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise RowsError(
            f"row {row} has {what} {int(outside[0])}, and the model's vocabulary has {vocab_size}; "
            "make the dataset with the model's own tokenizer"
        )


@dataclass(frozen=True)
class Rows:
    """The rows to train on, read as the plan and the model take them.

    `dataset` is open_dataset's. `boundaries` are None where the documents of a row see each other.
    """

    dataset: pa.Table
    sequence_length: int
    vocab_size: int
    boundaries: "Boundaries | None" = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def work(self) -> torch.Tensor | None:
        """What attention has to compute of each row, [n_rows], in some unit; None where rows have all the same."""
        return self.boundaries and self.boundaries.squares

    def load(self, row: int | None) -> RowInputs:
        """Row `row` as load_row gives it, or as `apart` makes it."""
        loaded = load_row(self.dataset, row, self.sequence_length, self.vocab_size)
        return loaded if self.boundaries is None else apart(*loaded, self.boundaries.starts(row))
