"""What a document is: a text, whole or in pieces, or the reason why it can't be read.

A document longer than PIECE characters comes as overlapping pieces, so that no document is too long for memory.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from longctx.errors import DocumentsError

PIECE = 2**18  # characters
OVERLAP = 2**13  # characters that neighbouring pieces share; tokens.py joins them where their tokens agree


@dataclass(frozen=True)
class Piece:
    """A part of a document longer than PIECE; its first OVERLAP characters are the last of the part before it."""

    text: str
    last: bool


# (document or piece of one, its share of the corpus's size): the progress bar adds up the shares.
Documents = Iterator[tuple[str | Piece, int]]
# The same, with an error where a document can't be read: whoever takes them decides whether to stop there or go on.
ReadDocuments = Iterator[tuple[str | Piece | DocumentsError, int]]


def row_documents(text: str, share: int) -> Documents:
    """The document of a dataset's row, whole or in pieces."""
    if len(text) <= PIECE:
        yield text, share
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
