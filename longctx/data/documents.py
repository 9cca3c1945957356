"""What a document is: a text, whole or in pieces, or the reason why it can't be read.

A document longer than PIECE characters comes as overlapping pieces, so that no document is too long for memory. The
text of a row that is to be joined with others comes whole, as a Member: groups.py makes documents of these. A
conversation comes whole too, as a Chat, which chats.py makes of its messages.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from longctx.errors import DocumentsError

PIECE = 2**18  # characters
OVERLAP = 2**13  # characters that neighbouring pieces share; tokens.py joins them where their tokens agree


@dataclass(frozen=True)
class Piece:
    """A part of a document longer than PIECE; its first OVERLAP characters are the last of the part before it."""

    text: str
    last: bool


@dataclass(frozen=True)
class Chat:
    """A conversation as a chat template writes it.

    `learned` are the ranges of characters that a model is to learn to write, and `borders` the places at which one
    token has to end and another to begin.
    """

    text: str
    learned: tuple[tuple[int, int], ...] = ()
    borders: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Columns:
    """The columns of a row that are read: its text, and, if rows are to be joined, the group and the order in it.

    `read_chat` makes a conversation of a value in the column `text`, and of the column's name, where it holds messages.
    """

    text: str
    group_by: tuple[str, str] | None = None
    read_chat: Callable[[Any, str], Chat] | None = None

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
# Where rows are to be joined, each is a Member; where they hold messages, a Chat.
ReadDocuments = Iterator[tuple[str | Piece | Member | Chat | DocumentsError, int]]


def row_documents(text: str | Member | Chat, share: int) -> Iterator[tuple[str | Piece | Member | Chat, int]]:
    """The document of a dataset's row, whole or, if it is a long text, in pieces; or what will be a part of one."""
    if not isinstance(text, str) or len(text) <= PIECE:
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
