"""Turns documents into tokens on several processes, and yields them in the order of the documents."""

import itertools
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from longctx.data.documents import OVERLAP, PIECE, Chat, Documents, Piece

DIFFERENT_TOKENS = 16  # that two neighbouring pieces must at least agree on to be joined


@dataclass(frozen=True)
class Batch:
    """What a process tokenizes at a time: whole documents (`texts`), strings or Chats, or one `piece` of a long one.

    `share` is the batch's share of the corpus's size.
    """

    texts: list[Any]
    piece: Piece | None
    share: int


@dataclass(frozen=True)
class Tokens:
    """The next tokens of the corpus, bos and eos included, int32 [n], and how many documents end among them.

    `begins` are the indices at which a document begins, int64, ascending. `share` is the share of the corpus's size
    that has been read for them. Of conversations, `learned` says which tokens a model is to learn to write, bool [n],
    and `bad` which conversations are not among them, and why.
    """

    ids: np.ndarray
    begins: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    documents: int = 0
    empty_documents: int = 0
    share: int = 0
    learned: np.ndarray | None = None
    bad: tuple[str, ...] = ()


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerFast, num_proc: int) -> Iterator[Tokens]:
    """Yields the tokens of all documents in order, which are the same for any `num_proc`.

    Each document becomes bos + tokens + eos, with what the tokenizer has of the two. Empty documents are counted and
    left out: bos + eos alone would teach a model to end a text before it begins.
    """
    encoded = encode_in_order(encode, batches(documents), tokenizer, num_proc)
    for batch, ids, starts in encoded:
        if batch.piece is None:
            yield Tokens(ids, starts, len(starts), batch.texts.count(""), batch.share)
        else:
            yield from join_pieces(batch.piece, batch.share, ids, starts, encoded)


def tokenize_chats(
    chats: Iterator[tuple[Chat, int]], tokenizer: PreTrainedTokenizerFast, num_proc: int
) -> Iterator[Tokens]:
    """Yields the tokens of all conversations in order, which are the same for any `num_proc`, and as they are written:
    it is the template that writes bos and eos."""
    for batch, ids, begins, learned, bad in encode_in_order(encode_chats, batches(chats), tokenizer, num_proc):
        empty = sum(not chat for chat in batch.texts)
        yield Tokens(ids, begins, len(begins), empty, batch.share, learned, bad)


def batches(documents: Iterator[tuple[Any, int]]) -> Iterator[Batch]:
    """Groups short documents into batches of about PIECE characters, so that all batches take about as long."""
    texts, characters, shares = [], 0, 0
    for document, share in documents:
        is_piece = isinstance(document, Piece)
        if texts and (is_piece or characters + len(document) > PIECE):
            yield Batch(texts, None, shares)
            texts, characters, shares = [], 0, 0
        if is_piece:
            yield Batch([], document, share)
        else:
            texts.append(document)
            characters, shares = characters + len(document) + 1, shares + share
    if texts:
        yield Batch(texts, None, shares)


def encode_in_order(
    encode: Callable[[Batch], tuple], batches: Iterator[Batch], tokenizer: PreTrainedTokenizerFast, num_proc: int
) -> Iterator[tuple]:
    """Yields (batch, *encode(batch)) in order. At most 2 * num_proc batches are under way, which bounds the memory."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # some tokenizer.json files set a length beyond which text is cut off
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    marks = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")]
    bos, eos = ([] if token is None else [token] for token in marks)
    initargs = (backend, bos, eos)
    use_tokenizer(*initargs)
    if num_proc == 1:
        yield from ((batch, *encode(batch)) for batch in batches)
        return
    context = get_context("fork" if sys.platform == "linux" else "spawn")  # a forked process has the tokenizer already
    with ProcessPoolExecutor(num_proc, context, start_worker, initargs) as pool:
        under_way = deque()
        for batch in batches:
            under_way.append((batch, pool.submit(encode, batch)))
            if len(under_way) == 2 * num_proc:
                first, future = under_way.popleft()
                yield first, *future.result()
        for batch, future in under_way:
            yield batch, *future.result()


def start_worker(backend: Tokenizer, bos: list[int], eos: list[int]) -> None:
    use_tokenizer(backend, bos, eos)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it for them
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for the parent process to end, and then ends this one, which would otherwise outlive a killed parent."""
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)


# The tokenizer of this process, with bos and eos, a list of none or one token each: to send it with each batch would
# cost more than the batch itself.
tokenizer_in_use: tuple[Tokenizer, list[int], list[int]]


def use_tokenizer(backend: Tokenizer, bos: list[int], eos: list[int]) -> None:
    global tokenizer_in_use
    tokenizer_in_use = backend, bos, eos


def encode(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes a batch: a piece as encode_piece does, or whole documents, with bos and eos.

    Of documents it returns the tokens of all, int32, and the index at which each of them begins, int64.
    """
    if batch.piece:
        return encode_piece(batch.piece.text)
    backend, bos, eos = tokenizer_in_use
    encodings = backend.encode_batch_fast([text for text in batch.texts if text], add_special_tokens=False)
    ids = itertools.chain.from_iterable(itertools.chain(bos, encoding.ids, eos) for encoding in encodings)
    ends = np.cumsum([0, *(len(bos) + len(encoding.ids) + len(eos) for encoding in encodings)], dtype=np.int64)
    return np.fromiter(ids, np.int32), ends[:-1]


def encode_chats(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Tokenizes conversations.

    Returns:
        The tokens of all, int32; the index at which each begins, int64; which tokens a model is to learn, bool; and of
        each conversation that is not among them how it begins, and why.
    """
    chats = [chat for chat in batch.texts if chat]
    encodings = tokenizer_in_use[0].encode_batch([chat.text for chat in chats], add_special_tokens=False)
    ids, learned, bad = [], [], []
    for chat, encoding in zip(chats, encodings, strict=True):
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        if any(((starts < border) & (border < ends)).any() for border in chat.borders):
            bad.append(f"the conversation that begins with {chat.text!r:.60}: a token is partly the assistant's")
        else:
            ids.append(np.array(encoding.ids, np.int32))
            learned.append(tokens_within(chat.learned, starts, ends))
    begins = np.cumsum([0, *map(len, ids)], dtype=np.int64)[:-1]
    none = np.empty(0, np.int32)
    return np.concatenate([none, *ids]), begins, np.concatenate([none.astype(bool), *learned]), tuple(bad)


def tokens_within(ranges: Sequence[tuple[int, int]], starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which tokens are the first with a character of one of the ranges, the last with one, or between them, bool."""
    within = np.zeros(len(starts), bool)
    for begin, end in ranges:
        inside = np.flatnonzero((starts < end) & (ends > begin))
        if len(inside):
            within[inside[0] : inside[-1] + 1] = True
    return within


def encode_piece(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of `text`, int32 [n], and the index of the character at which each starts, int64 [n], ascending."""
    encoding = tokenizer_in_use[0].encode(text, add_special_tokens=False)
    starts = np.fromiter((start for start, _ in encoding.offsets), np.int64)
    return np.fromiter(encoding.ids, np.int32), np.maximum.accumulate(starts)


def join_pieces(
    piece: Piece, share: int, ids: np.ndarray, starts: np.ndarray, following: Iterator[tuple]
) -> Iterator[Tokens]:
    """Yields the tokens of one long document as if it had been tokenized whole.

    `piece`, `share`, `ids` and `starts` are those of its first piece, and `following` yields (batch, ids, starts) of
    the next ones.

    What a tokenizer does at one place depends on few characters around it, so the tokens of a piece are wrong only near
    its ends. Where two neighbours agree on every token in the middle half of their overlap, the document's tokens are
    taken from one piece up to the start of that half, and from the other after it. Agreement on few different tokens
    proves nothing, since a run of one character may be divided in several ways. Without agreement, the pieces are
    joined and tokenized again as one; the text doubles each time, so that the time stays nearly linear in its length.
    """
    text, begin, low, high = piece.text, 0, OVERLAP // 4, OVERLAP * 3 // 4
    yield Tokens(np.array(tokenizer_in_use[1], np.int32), np.zeros(1, np.int64), share=share)
    while not piece.last:
        offset = len(text) - OVERLAP  # of the next piece in this one
        batch, next_ids, next_starts = next(following)
        piece, share = batch.piece, batch.share
        here = slice(*np.searchsorted(starts, [offset + low, offset + high]))
        there = slice(*np.searchsorted(next_starts, [low, high]))
        agree = np.array_equal(ids[here], next_ids[there])
        agree = agree and np.array_equal(starts[here] - offset, next_starts[there])
        if agree and len(np.unique(ids[here])) >= DIFFERENT_TOKENS:
            yield Tokens(ids[np.searchsorted(starts, begin) : here.start], share=share)
            text, begin, ids, starts = piece.text, low, next_ids, next_starts
            continue
        long = 2 * len(text)
        text += piece.text[OVERLAP:]
        while len(text) < long and not piece.last:
            batch, _, _ = next(following)
            piece = batch.piece
            text, share = text + piece.text[OVERLAP:], share + batch.share
        ids, starts = encode_piece(text)
        yield Tokens(ids[:0], share=share)
    end = np.array(tokenizer_in_use[2], np.int32)
    yield Tokens(np.concatenate([ids[np.searchsorted(starts, begin) :], end]), documents=1)
