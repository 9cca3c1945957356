"""What a document is: a text, whole or in pieces, or the reason why it can't be read.

A document longer than PIECE characters comes as overlapping pieces, so that no document is too long for memory. The
text of a row that is to be joined with others comes whole, as a Member: groups.py makes documents of these.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from longctx.errors import DocumentsError

PIECE = 2**18  # characters
OVERLAP = 2**13  # characters that neighbouring pieces share; tokens.py joins them where their tokens agree


@dataclass(frozen=True)
class Piece:
    """A part of a document longer than PIECE; its first OVERLAP characters are the last of the part before it."""

    text: str
    last: bool


@dataclass(frozen=True)
class Columns:
    """The columns of a row that are read: its text, and, if rows are to be joined, the group and the order in it."""

    text: str
    group_by: tuple[str, str] | None = None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys((self.text, *(self.group_by or ()))))


@dataclass(frozen=True)
class Member:
    """A text that is to be joined with the others of its group, in the ascending order of `order`."""

    group: str | int
    order: str | int
    text: str


# (document or piece of one, its share of the corpus's size): the progress bar adds up the shares.
Documents = Iterator[tuple[str | Piece, int]]
# The same, with an error where a document can't be read: whoever takes them decides whether to stop there or go on.
# Where rows are to be joined, each is a Member.
ReadDocuments = Iterator[tuple[str | Piece | Member | DocumentsError, int]]


def row_documents(text: str | Member, share: int) -> Iterator[tuple[str | Piece | Member, int]]:
    """The document of a dataset's row, whole or in pieces, or what will be a part of one."""
    if isinstance(text, Member) or len(text) <= PIECE:
        yield text, share
    else:
        for piece in pieces(io.StringIO(text, newline="")):
            is_last = isinstance(piece, str) or piece.last
            yield piece, share if is_last else 0


class Stream(Protocol):
    def read(self, size: int, /) -> str: ...


def pieces(stream: Stream) -> Iterator[str | Piece]:
    """Reads one document: whole if it has at most PIECE characters, else in pieces of at most that many."""
    text, more = stream.read(PIECE), stream.read(PIECE - OVERLAP)
    if not more:
        yield text
        return
    yield Piece(text, last=False)
    while more:
        text, more = text[-OVERLAP:] + more, stream.read(PIECE - OVERLAP)
        yield Piece(text, last=not more)
