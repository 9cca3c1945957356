"""Joins the texts of a group, such as the files of a code repository, into one document.

Texts of a group may be anywhere in a corpus, which may be larger than memory. So they are sorted on disk: as many as
RUN allows are sorted in memory and written to a file as a run, until all are, and the runs are then read side by side.
"""

import heapq
import io
import itertools
import marshal
import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from longctx.data.documents import Documents, Member, pieces

RUN = 2**27  # characters that are in memory at a time to be sorted
HEAD = 2**8  # about what a text takes in memory besides its characters
SIZE = struct.Struct("<Q")


@dataclass(frozen=True)
class Place:
    """Where in the file a text is, and what it is sorted by. `share` is its share of the corpus's size."""

    group: str | int
    order: str | int
    share: int
    begin: int
    end: int


@contextmanager
def joined_groups(members: Iterator[tuple[Member, int]], folder: Path) -> Iterator[Documents]:
    """Yields a document for each group: its texts in their order, each of which begins on a line of its own.

    Groups come in the order of their names, numbers before text; texts of equal order as they came. All members are
    read first, each with its share of the corpus's size.

    Args:
        folder: where to keep a file that has no name, and is gone at the end of the context.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        runs = [write_run(file, run) for run in runs_in_memory(members)]
        file.flush()
        yield read_groups(file, runs)


def runs_in_memory(members: Iterator[tuple[Member, int]]) -> Iterator[list[tuple[Member, int]]]:
    """All members, sorted within each list."""
    run, size = [], 0
    for member, share in members:
        run.append((member, share))
        size += len(member.text) + HEAD
        if size >= RUN:
            yield sorted(run, key=lambda found: sorted_by(found[0]))
            run, size = [], 0
    if run:
        yield sorted(run, key=lambda found: sorted_by(found[0]))


def sorted_by(text: Member | Place) -> tuple:
    """What texts are compared by: a number and a text can't be compared with each other."""
    return isinstance(text.group, str), text.group, isinstance(text.order, str), text.order


def write_run(file: IO[bytes], run: list[tuple[Member, int]]) -> tuple[int, int]:
    """Appends texts to the file, each after what it is sorted by; returns where they begin and end."""
    begin = file.tell()
    for member, share in run:
        text = member.text.encode()
        head = marshal.dumps((member.group, member.order, share, len(text)))
        file.write(SIZE.pack(len(head)) + head)
        file.write(text)
    return begin, file.tell()


def read_run(written: mmap.mmap, at: int, end: int) -> Iterator[Place]:
    while at < end:
        begin = at + SIZE.size + SIZE.unpack_from(written, at)[0]
        group, order, share, length = marshal.loads(written[at + SIZE.size : begin])
        at = begin + length
        yield Place(group, order, share, begin, at)


def read_groups(file: IO[bytes], runs: list[tuple[int, int]]) -> Documents:
    """The documents, once all texts are in the file."""
    if not runs:  # and an empty file can't be mapped
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as written:
        places = heapq.merge(*(read_run(written, *run) for run in runs), key=sorted_by)
        for _, group in itertools.groupby(places, key=lambda place: place.group):
            joined, done = Joined(written, group), 0
            for document in pieces(joined):
                yield document, joined.share - done
                done = joined.share


class Joined:
    """The texts of a group, read as one, of which one at a time is in memory.

    A newline comes between two of them where the first doesn't end in one. `share` is that of the texts read so far.
    """

    def __init__(self, written: mmap.mmap, places: Iterator[Place]):
        self.written, self.places = written, places
        self.text, self.ends_line = io.StringIO(), True
        self.share = 0

    def read(self, size: int, /) -> str:
        """The next `size` characters; fewer at the end."""
        read = self.text.read(size)
        while len(read) < size and (place := next(self.places, None)):
            text = self.written[place.begin : place.end].decode()
            self.share += place.share
            if text:
                read += "" if self.ends_line else "\n"
                self.ends_line = text.endswith("\n")
                self.text = io.StringIO(text, newline="")
                read += self.text.read(size - len(read))
        return read
