"""The documents of a row: where each begins.

Rows are cut from one stream of documents, so a document may go on in the next row. What is there of it is, in that row,
a document of its own: it begins with the row, at position 0.

bookcorpus.py writes where documents begin in a column beside the tokens. Rows without that column go by the bos tokens
in them, where the tokenizer has put one before each document.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from longctx.data.rows import BEGINS, MAKE_AGAIN, corpus_facts, load_values
from longctx.errors import RowsError

SHORT = 1024  # tokens of the documents of a row that counts for nothing, which is to take no longer than others


@dataclass(frozen=True)
class Boundaries:
    """Where the documents of a dataset's rows begin.

    Attributes:
        bos: the token that a document begins with; None if the rows have the column BEGINS.
        squares: of each row the sum of the squares of its documents' lengths, float64 [n_rows], to which the work of
            attention within documents is proportional.
    """

    dataset: pa.Table
    sequence_length: int
    bos: int | None
    squares: torch.Tensor

    @property
    def length(self) -> float:
        """The mean length of documents, each weighted by its tokens: the length of the document that a token is in, on
        average. Attention within documents of this length takes as long as within those of the rows."""
        return self.squares.sum().item() / (len(self.squares) * self.sequence_length)

    def starts(self, row: int | None) -> tuple[int, ...]:
        """The tokens of a row at which a document begins, the first of which is 0; for no row, those of some."""
        if row is None:
            return tuple(range(0, self.sequence_length, SHORT))
        if self.bos is None:
            begins = load_values(self.dataset, BEGINS, row)
        else:
            begins = (load_values(self.dataset, "input_ids", row) == self.bos).nonzero().flatten()
        return tuple(sorted({0, *begins.tolist()}))


def find_boundaries(path: str, dataset: pa.Table, sequence_length: int, bos: int | None) -> Boundaries:
    """Where the documents of the rows in the folder `path` begin.

    Args:
        dataset: those rows, all of one length.
        bos: the model's own bos token, which tells documents apart where the rows have no column for that.

    Raises:
        RowsError: nothing says where they begin, or what does makes no sense.
    """
    if BEGINS in dataset.column_names:
        squares = _squares_of_rows(_begins_by_column(dataset, sequence_length), len(dataset), sequence_length)
        return Boundaries(dataset, sequence_length, None, squares)
    facts = corpus_facts(path)
    if bos is None or (facts is not None and facts.bos_token is None):
        whose = "model" if bos is None else "tokenizer"
        raise RowsError(
            f"nothing says where its documents begin: it has no column {BEGINS}, and its {whose} no bos token; "
            f"{MAKE_AGAIN}"
        )
    begins = _begins_by_token(dataset, bos)
    if not len(begins):
        raise RowsError(
            f"nothing says where its documents begin: it has no column {BEGINS}, and the model's bos token, {bos}, is "
            f"nowhere in it; {MAKE_AGAIN}"
        )
    return Boundaries(dataset, sequence_length, bos, _squares_of_rows(begins, len(dataset), sequence_length))


def document_lengths(begins: np.ndarray, n_rows: int, sequence_length: int) -> np.ndarray:
    """The lengths of all documents of rows, in order, given where any begins, counted from the first row's first token.

    A document has two lengths here if it is cut by the end of a row.
    """
    firsts = np.union1d(begins, np.arange(n_rows) * sequence_length)
    return np.diff(firsts, append=n_rows * sequence_length)


def _squares_of_rows(begins: np.ndarray, n_rows: int, sequence_length: int) -> torch.Tensor:
    lengths = document_lengths(begins, n_rows, sequence_length)
    rows = (np.cumsum(lengths) - 1) // sequence_length
    return torch.from_numpy(np.bincount(rows, weights=lengths.astype(np.float64) ** 2, minlength=n_rows))


def _begins_by_column(dataset: pa.Table, sequence_length: int) -> np.ndarray:
    """Where documents begin by the column BEGINS, counted from the first row's first token, int64."""
    begins, row = [], 0
    for chunk in dataset.column(BEGINS).iterchunks():
        values = chunk.flatten()
        own = values.to_numpy(zero_copy_only=False)
        if values.null_count or ((own < 0) | (own >= sequence_length)).any():
            raise RowsError(f"its column {BEGINS} has values that are no places in a row; {MAKE_AGAIN}")
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(row, row + len(chunk)), lengths)
        begins.append(rows * sequence_length + own.astype(np.int64))
        row += len(chunk)
    return _joined(begins)


def _begins_by_token(dataset: pa.Table, bos: int) -> np.ndarray:
    """Where a token is, counted from the first row's first one, int64."""
    begins, size = [], 0
    for chunk in dataset.column("input_ids").iterchunks():
        tokens = chunk.flatten().to_numpy(zero_copy_only=False)
        begins.append(np.flatnonzero(tokens == bos) + size)
        size += len(tokens)
    return _joined(begins)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *arrays])
