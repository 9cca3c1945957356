"""Reads the documents of one file: .txt, .md, .jsonl, .json or .parquet, each also compressed as .gz or .zst.

A document that can't be read comes out as an error which says where it is: a line counts from 1, as editors count, a
row from 0, as Parquet's readers do, and a byte from 0. What follows it is read if the format lets it be found.
"""

import codecs
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from longctx.data.documents import Chat, Columns, Member, Piece, ReadDocuments, pieces, row_documents
from longctx.errors import BadDocument, ColumnError, DocumentsError, GroupError, one_line

BLOCK = 2**20  # bytes or characters that are read at a time
LONGEST_ROW = 2**28  # bytes of a line of .jsonl, or characters of an object of .json, that are read into memory at most
ROWS_READ = 128  # rows of Parquet or Arrow that are in memory as text at a time: each may be a book
COMPRESSIONS = (".gz", ".zst")
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # as its specification says


def format_of(name: str) -> tuple[str, str] | None:
    """('.jsonl', '.gz') of 'a.jsonl.gz', ('.txt', '') of 'a.txt'; None of a file that is not read."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in READERS else None


def read_documents(file: Path, columns: Columns) -> ReadDocuments:
    """The documents of a file of any format; their shares add up to about its size in bytes.

    Args:
        columns: which columns of .jsonl, .json and .parquet are read.
    """
    kind, compression = format_of(file.name) or ("", "")
    try:
        with open(file, "rb") as raw:
            if raw.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
                yield BadDocument("it is Git LFS's pointer to a file; fetch the file itself with git lfs pull"), 0
                return
            raw.seek(0)
            try:
                yield from READERS[kind](raw, compression, columns)
            except (OSError, EOFError, zlib.error) as error:
                place = f"it breaks off near byte {raw.tell()}, and what follows is not read"
                yield BadDocument(f"{place}: {one_line(error)}"), 0
    except OSError as error:
        yield BadDocument(f"it can't be opened: {error.strerror or one_line(error)}"), 0


def unpacked(raw: BinaryIO, compression: str) -> BinaryIO:
    """The bytes of a file from its first on, without the compression. `raw` stays open."""
    raw.seek(0)
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    if compression == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(KeptOpen(raw), "r"), "zstd"))
    return raw


class KeptOpen(io.RawIOBase):
    """Reads another file and leaves it open, for Arrow, which closes the file that it reads."""

    def __init__(self, raw: BinaryIO):
        self.raw = raw

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.raw.read(size)


def by_bytes_read(raw: BinaryIO, documents: Iterator[str | Piece]) -> ReadDocuments:
    """Gives each document as its share what was read of `raw` for it."""
    done = 0
    for document in documents:
        at = raw.tell()
        yield document, at - done
        done = at


# --- text: a document a file -----------------------------------------------------------------------------------------


def read_text(raw: BinaryIO, compression: str, columns: Columns) -> ReadDocuments:
    if columns.read_chat:
        yield BadDocument("a file of text has no conversations"), raw.seek(0, io.SEEK_END)
        return
    if columns.group_by:
        yield GroupError("a file of text has no columns by which to join it with others"), raw.seek(0, io.SEEK_END)
        return
    try:
        check_utf8(unpacked(raw, compression))  # the whole file first: a piece that is out can't be called back
    except BadDocument as error:
        yield error, raw.tell()
        return
    # newline="" keeps line ends as they are.
    stream = io.TextIOWrapper(unpacked(raw, compression), encoding="utf-8-sig", newline="")
    yield from by_bytes_read(raw, pieces(stream))


def check_utf8(stream: BinaryIO) -> None:
    """Raises BadDocument, which names the byte, unless all of `stream` is UTF-8 without a NUL."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin = 0  # of the block
    for block in itertools.chain(iter(lambda: stream.read(BLOCK), b""), [b""]):
        held, _ = decoder.getstate()  # bytes of a character that began in the block before
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise BadDocument(f"byte {begin - len(held) + error.start} is not UTF-8: {error.reason}") from error
        if (nul := block.find(0)) >= 0:
            raise BadDocument(f"byte {begin + nul} is NUL, which is no text")
        begin += len(block)


# --- JSON: a document an object --------------------------------------------------------------------------------------


def read_jsonl(raw: BinaryIO, compression: str, columns: Columns) -> ReadDocuments:
    lines, done = unpacked(raw, compression), 0
    for number in itertools.count(1):
        line = lines.readline(LONGEST_ROW + 1)
        if not line:
            return
        at = raw.tell()
        share, done = at - done, at
        try:
            if len(line) > LONGEST_ROW:
                raise BadDocument(f"longer than {LONGEST_ROW:,} bytes, and what follows is not read")
            if line.strip():
                yield from row_documents(json_document(parse_line(line), columns), share)
        except DocumentsError as error:
            yield type(error)(f"line {number}: {error}"), share
            if len(line) > LONGEST_ROW:
                return


def parse_line(line: bytes) -> Any:
    """What a line of a .jsonl file holds; raises BadDocument with the reason if it is no JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadDocument(f"byte {error.start} is not UTF-8: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise BadDocument(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadDocument("nested deeper than Python can read") from error
    except ValueError as error:  # a number of thousands of digits
        raise BadDocument(f"not JSON that Python reads: {one_line(error)}") from error


def read_json(raw: BinaryIO, compression: str, columns: Columns) -> ReadDocuments:
    """An array of objects, of which one at a time is in memory, or an object a line."""
    start = unpacked(raw, compression).read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] != b"[":
        yield from read_jsonl(raw, compression, columns)
        return
    # A byte that is not UTF-8 becomes half a surrogate pair, by which text_of knows the document that has it.
    stream = io.TextIOWrapper(unpacked(raw, compression), encoding="utf-8-sig", errors="surrogateescape", newline="")
    number, done = -1, 0
    try:
        for number, element in enumerate(array_elements(stream)):
            share, done = raw.tell() - done, raw.tell()
            try:
                yield from row_documents(json_document(element, columns), share)
            except DocumentsError as error:
                yield type(error)(f"row {number}: {error}"), share
    except (ValueError, RecursionError) as error:
        reason = "nested deeper than Python can read" if isinstance(error, RecursionError) else one_line(error)
        yield BadDocument(f"row {number + 1}: not JSON, and what follows is not read: {reason}"), 0


def array_elements(stream: TextIO) -> Iterator[Any]:
    """The elements of the JSON array that `stream` holds; raises ValueError or RecursionError where it is no JSON.

    What is parsed in vain, since the text read so far ends within an element, doubles each time: the time stays linear.
    """
    text, at, first = stream.read(BLOCK), 0, True
    while True:
        try:
            element, at, is_last = next_element(text, at, first)
        except (IndexError, json.JSONDecodeError) as error:
            more = stream.read(max(BLOCK, len(text) - at)) if len(text) - at <= LONGEST_ROW else ""
            if not more:
                raise ValueError(getattr(error, "msg", "the array has no end")) from error
            text, at = text[at:] + more, 0
            continue
        if element is not NO_ELEMENT:
            yield element
        first = False
        if is_last:
            break
    rest = itertools.chain([text[at:]], iter(lambda: stream.read(BLOCK), ""))
    if any(part.strip() for part in rest):
        raise ValueError("there is more after the array")


NO_ELEMENT = object()  # of an empty array
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


def next_element(text: str, at: int, first: bool) -> tuple[Any, int, bool]:
    """The element of an array that is at `at`, where the next one is, and whether there is none.

    Raises:
        IndexError, json.JSONDecodeError: the text ends within it, or it is no JSON.
    """
    at = skip(text, at)
    if first:  # the array's bracket is still to come, and it may be empty
        at = skip(text, at + 1)
        if text[at] == "]":
            return NO_ELEMENT, at + 1, True
    element, end = DECODER.raw_decode(text, at)
    end = skip(text, end)
    if text[end] not in ",]":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return element, end + 1, text[end] == "]"


def skip(text: str, at: int) -> int:
    """Where the space that begins at `at` ends."""
    space = SPACE.match(text, at)
    assert space is not None, "it matches no space too"
    return space.end()


def json_document(row: Any, columns: Columns) -> str | Member | Chat:
    """The document of a row; raises what row_document does, with the reason, if it has none."""
    if not isinstance(row, dict):
        raise BadDocument("not a JSON object")
    check_names(row, columns)
    return row_document(row, columns)


# --- rows of any kind ------------------------------------------------------------------------------------------------


def check_names(names: Collection[str], columns: Columns) -> None:
    """Raises ColumnError or GroupError unless the columns that are read are among `names`."""
    for name in columns.names:
        if name not in names:
            error = ColumnError if name == columns.text else GroupError
            raise error(f"no column {name}, only {', '.join(names) or 'an empty object'}")


def row_document(row: dict[str, Any], columns: Columns) -> str | Member | Chat:
    """The document that a row's values make.

    Raises:
        UnicodeDecodeError: bytes of it are not UTF-8.
        BadDocument: it has what is no character, or it is to be joined with others and doesn't say with which, or it is
            a conversation that can't be written.
        ColumnError, GroupError: a column's value is of another type.
    """
    text = row[columns.text]
    if columns.read_chat:
        chat = columns.read_chat(text, columns.text)
        text_of(chat.text)
        return chat
    if not isinstance(text, str | bytes | None):
        raise ColumnError(f"{columns.text} holds {text!r:.20}, not text")
    if columns.group_by is None:
        return text_of(text)
    group, order = (key_of(row[name], name) for name in columns.group_by)
    return Member(group, order, text_of(text))


def key_of(value: Any, column: str) -> str | int:
    """What a row is joined by; raises as row_document does."""
    if value is None:
        raise BadDocument(f"its {column} is null, so that it can't be joined with others")
    if isinstance(value, str | bytes):
        return text_of(value)
    if type(value) is not int:  # true and false are of a type that inherits from int
        raise GroupError(f"{column} holds {value!r:.20}, not text or whole numbers")
    return value


def text_of(value: str | bytes | None) -> str:
    """The text of a row's value, of which null is an empty one.

    Raises:
        UnicodeDecodeError: the value's bytes are not UTF-8.
        BadDocument: it has what is no character.
    """
    text = value.decode() if isinstance(value, bytes) else value or ""
    if "\0" in text:
        raise BadDocument("its text has a NUL, which is no text")
    try:
        text.encode()  # JSON can escape half of a surrogate pair, which is no character
    except UnicodeEncodeError as error:
        raise BadDocument(f"character {error.start} of its text is not UTF-8: {error.reason}") from error
    return text


# --- Parquet, and Arrow: a document a row ----------------------------------------------------------------------------


def read_parquet(raw: BinaryIO, compression: str, columns: Columns) -> ReadDocuments:
    size = raw.seek(0, io.SEEK_END)
    with tempfile.TemporaryFile() as aside:
        if compression:  # Parquet is read from its end
            shutil.copyfileobj(unpacked(raw, compression), aside, BLOCK)
        try:
            rows = pq.ParquetFile(aside if compression else raw, page_checksum_verification=True)
            check_columns(rows.schema_arrow, columns)
        except (pa.ArrowException, OSError) as error:
            yield BadDocument(f"no Parquet that can be read: {one_line(error)}"), size
        except (ColumnError, GroupError) as error:
            yield error, size
        else:
            share = size // max(rows.metadata.num_rows, 1)
            first = 0
            for group in range(rows.num_row_groups):
                yield from read_row_group(rows, group, first, columns, share)
                first += rows.metadata.row_group(group).num_rows


def read_row_group(rows: pq.ParquetFile, group: int, first: int, columns: Columns, share: int) -> ReadDocuments:
    """The documents of one row group, whose first row is number `first` of the file.

    What follows a page that can't be read is found again at the next row group.
    """
    row, end = first, first + rows.metadata.row_group(group).num_rows
    try:
        for batch in rows.iter_batches(ROWS_READ, row_groups=[group], columns=columns.names):
            yield from arrow_documents(batch, columns, row, share)
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        yield BadDocument(f"rows {row} to {end - 1} can't be read: {one_line(error)}"), share * (end - row)


def arrow_documents(batch: pa.RecordBatch | pa.Table, columns: Columns, first: int, share: int) -> ReadDocuments:
    """The documents of rows `first` and following, of `share` each."""
    for row, values in enumerate(zip(*batch.columns, strict=True), first):
        try:
            named = {name: value.as_py() for name, value in zip(batch.schema.names, values, strict=True)}
            yield from row_documents(row_document(named, columns), share)
        except UnicodeDecodeError as error:
            yield BadDocument(f"row {row}: byte {error.start} is not UTF-8: {error.reason}"), share
        except BadDocument as error:
            yield BadDocument(f"row {row}: {error}"), share


def check_columns(schema: pa.Schema, columns: Columns) -> None:
    """Raises ColumnError or GroupError unless the columns are there, and hold what they should.

    That is text, or bytes, which are then read as UTF-8, or messages; what rows are joined by may be whole numbers too.
    """
    check_names(schema.names, columns)
    kind = schema.field(columns.text).type
    if columns.read_chat and not is_list_of_objects(kind):
        raise ColumnError(f"{columns.text} holds {kind}, not lists of messages")
    if not columns.read_chat and not is_of(TEXT_TYPES, kind):
        raise ColumnError(f"{columns.text} holds {kind}, not text")
    for name in columns.group_by or ():
        if not is_of((*TEXT_TYPES, types.is_integer), kind := schema.field(name).type):
            raise GroupError(f"{name} holds {kind}, not text or whole numbers")


def is_list_of_objects(kind: pa.DataType) -> bool:
    return (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)


def is_of(kinds: tuple[Callable[[pa.DataType], bool], ...], kind: pa.DataType) -> bool:
    """Whether a column's type, or that of a dictionary's values, is one of `kinds`."""
    values = kind.value_type if types.is_dictionary(kind) else kind
    return any(is_kind(values) for is_kind in kinds)


TEXT_TYPES = (
    types.is_string,
    types.is_large_string,
    types.is_string_view,
    types.is_binary,
    types.is_large_binary,
    types.is_binary_view,
)


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}


def no_text() -> DocumentsError:
    """What is wrong with a place that has no file which a reader knows."""
    return DocumentsError(f"no text there, that is, no file of {', '.join(READERS)}, plain or as .gz or .zst")
