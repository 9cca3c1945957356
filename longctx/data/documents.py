"""Reads text from files, folders, saved datasets and the hub, as one stream of documents.

A document longer than PIECE characters comes as overlapping pieces, so that no document is too long for memory.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from longctx.errors import ColumnError, DocumentsError, one_line

if TYPE_CHECKING:  # not everywhere installed: bookcorpus.py says so, once it knows that it is asked for rows
    import datasets

PIECE = 2**18  # characters
OVERLAP = 2**13  # characters that neighbouring pieces share; tokens.py joins them where their tokens agree
ROWS_READ = 128  # rows of Parquet or Arrow that are in memory as text at a time: each may be a book


@dataclass(frozen=True)
class Piece:
    """A part of a document longer than PIECE; its first OVERLAP characters are the last of the part before it."""

    text: str
    last: bool


# (document or piece of one, its share of the corpus's size): the progress bar adds up the shares.
Documents = Iterator[tuple[str | Piece, int]]


def open_corpus(name: str, text_key: str) -> tuple[Documents, int]:
    """The documents of a file, a folder, a saved dataset or a hub dataset, and their size: bytes of files, or rows.

    Raises:
        DocumentsError: there is no such corpus, or no text in it; documents read later may raise it too.
        ColumnError: there is no text under `text_key`.
    """
    path = Path(name)
    if not path.exists():
        return dataset_documents(load_hub_dataset(name), text_key)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return dataset_documents(load_saved_dataset(name), text_key)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix.lower() in READERS]
    if not files:
        raise DocumentsError(f"no text there, that is, no file of {', '.join(READERS)}")
    for file in files:  # its first row shows a missing column now, and not after hours of tokenizing
        next(file_documents(file, path, text_key), None)
    documents = (document for file in files for document in file_documents(file, path, text_key))
    return documents, sum(file.stat().st_size for file in files)


def file_documents(file: Path, corpus: Path, text_key: str) -> Documents:
    """The documents of one file of a corpus; what is wrong with it is said with its path in the corpus's folder."""
    try:
        yield from READERS[file.suffix.lower()](file, text_key)
    except DocumentsError as error:
        if file == corpus:
            raise
        raise type(error)(f"{file.relative_to(corpus)}: {error}") from error


def load_hub_dataset(name: str) -> "datasets.Dataset":
    import datasets

    try:
        try:
            return datasets.load_dataset(name, split="train")
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Of every dataset that is a script, the hub keeps a conversion to Parquet.
            return datasets.load_dataset(name, split="train", revision="refs/convert/parquet")
    except Exception as error:  # of the network, the hub or the dataset: each has its own
        raise DocumentsError(f"no such file or folder, and no dataset of the hub: {one_line(error)}") from error


def load_saved_dataset(name: str) -> "datasets.Dataset":
    import datasets

    dataset = datasets.load_from_disk(name)
    if isinstance(dataset, datasets.Dataset):
        return dataset
    if "train" not in dataset:
        raise DocumentsError(f"it has no split named train, only {', '.join(map(str, dataset))}")
    return dataset["train"]


def dataset_documents(dataset: "datasets.Dataset", text_key: str) -> tuple[Documents, int]:
    check_column(dataset.features.arrow_schema, text_key)
    tables = dataset.select_columns(text_key).with_format("arrow").iter(ROWS_READ)
    texts = (text for table in tables for text in _first_column(table))
    return (document for text in texts for document in row_documents(text, 1)), len(dataset)


def _first_column(table: Any) -> list[str | None]:
    return table.column(0).to_pylist()


def read_text(file: Path, _: str) -> Documents:
    try:
        # newline="" keeps line ends as they are.
        with open(file, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
            done = 0
            for document in pieces(stream):
                yield document, raw.tell() - done
                done = raw.tell()
    except UnicodeDecodeError as error:
        raise DocumentsError(f"not UTF-8: {error.reason}") from error


def read_jsonl(file: Path, text_key: str) -> Documents:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield from row_documents(json_text(line.decode("utf-8-sig"), text_key), len(line))
            except json.JSONDecodeError as error:
                raise DocumentsError(f"line {number}: not JSON: {error.msg} at column {error.colno}") from error
            except ColumnError as error:
                raise ColumnError(f"line {number}: {error}") from error
            except ValueError as error:
                raise DocumentsError(f"line {number}: {error}") from error


def json_text(line: str, text_key: str) -> str | None:
    """The text of one line of a .jsonl file; raises ColumnError or ValueError with the reason if it has none."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if text_key not in row:
        raise ColumnError(f"no column {text_key}, only {', '.join(row)}")
    text = row[text_key]
    if not isinstance(text, str | None):
        raise ColumnError(f"{text_key} holds {text!r:.20}, not text")
    (text or "").encode()  # JSON can escape half of a surrogate pair, which is no character: UnicodeEncodeError
    return text


def read_parquet(file: Path, text_key: str) -> Documents:
    try:
        with pq.ParquetFile(file) as rows:
            check_column(rows.schema_arrow, text_key)
            share = file.stat().st_size // max(rows.metadata.num_rows, 1)
            for batch in rows.iter_batches(ROWS_READ, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield from row_documents(text, share)
    except pa.ArrowInvalid as error:
        raise DocumentsError(f"no Parquet that can be read: {one_line(error)}") from error


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


def check_column(schema: pa.Schema, text_key: str) -> None:
    if text_key not in schema.names:
        raise ColumnError(f"no column {text_key}, only {', '.join(schema.names)}")
    if schema.field(text_key).type not in (pa.string(), pa.large_string()):
        raise ColumnError(f"{text_key} holds {schema.field(text_key).type}, not text")


def row_documents(text: str | None, share: int) -> Documents:
    """The document of a dataset's row, whole or in pieces; null counts as an empty document."""
    if text is None or len(text) <= PIECE:
        yield text or "", share
    else:
        for piece in pieces(io.StringIO(text, newline="")):
            is_last = isinstance(piece, str) or piece.last
            yield piece, share if is_last else 0


def pieces(stream: TextIO) -> Iterator[str | Piece]:
    """Reads one document: whole if it has at most PIECE characters, else in pieces of at most that many."""
    text, more = stream.read(PIECE), stream.read(PIECE - OVERLAP)
    if not more:
        yield text
        return
    yield Piece(text, last=False)
    while more:
        text, more = text[-OVERLAP:] + more, stream.read(PIECE - OVERLAP)
        yield Piece(text, last=not more)
