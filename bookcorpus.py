"""Turns raw text into rows of exactly sequence_length tokens, in a folder that `datasets.load_from_disk` opens.

    python bookcorpus.py --data_path_or_name bookcorpus/bookcorpus \
        --tokenizer_path_or_name meta-llama/Meta-Llama-3-8B-Instruct \
        --save_path ./bookcorpus_llama3_128K --sequence_length 131072

The data is a dataset of the Hugging Face hub, a folder that `save_to_disk` wrote, or a file or folder of .txt and .md
files (a document each), .jsonl, .json and .parquet files (a document to a row), each also as .gz or .zst. Of a folder,
links are followed, hidden files, READMEs and licences are left out, and if its files are of several splits, by their
names or by its README, --split is read. Files are read in sorted order. Each document becomes bos + tokens + eos, with
what the tokenizer has of the two; all are concatenated and cut into rows, and only the tail that fills no row is left
out. A column beside the tokens has the places at which documents begin. What was read and what was left out is printed,
and recorded in corpus.json beside the rows. With --group_by repo,path all rows of the data that have the same `repo`
are one document, joined in the order of `path`.

Where the data has no text but a column of `messages` or `conversations`, each conversation is written by the
tokenizer's chat template, and another column says which tokens are the assistant's: these alone are learned. Rows are
made of whole conversations, and filled up with padding.

A document that can't be read ends the script before any is tokenized, since all are read once to see whether they can
be; with --skip_bad_documents it is left out instead and counted.
"""

import itertools
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longctx.atomic import whole_folder, why_not_new
from longctx.command_line import MOST_TOKENS, Cause, naming_options, option, parse
from longctx.data.chats import chat_template, fill_rows, padded, parts_of_rows, read_chat
from longctx.data.corpus import Corpus, choose_columns, open_corpus
from longctx.data.documents import Columns
from longctx.data.groups import joined_groups
from longctx.data.packing import document_lengths
from longctx.data.rows import BEGINS, record_corpus
from longctx.data.tokens import Tokens, tokenize, tokenize_chats
from longctx.errors import (
    BadDocument,
    ChatTemplateError,
    ColumnError,
    ConfigNameError,
    DocumentsError,
    GroupError,
    SplitError,
    UserError,
    one_line,
    run_script,
    some_of,
)

TEXT, MESSAGES = "text", ("messages", "conversations")  # the columns that are read where none is named
LEARNED = "assistant_masks"  # the column of which tokens are learned, by the name that transformers has for it
BLOCK = 2**22  # tokens that are packed and written at a time (16 MiB)
BLOCKS_PER_SHARD = 32  # blocks of one .arrow file (512 MiB)
CORES = (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()) or 1
MOST_PROCESSES = 1024  # each starts at once, and takes memory of its own
CAUSES = {
    DocumentsError: Cause("data_path_or_name"),
    ColumnError: Cause("data_path_or_name", "name a column of text with --text_key"),
    GroupError: Cause("group_by"),
    ChatTemplateError: Cause("tokenizer_path_or_name", "name that of a chat model"),
    BadDocument: Cause("data_path_or_name", "mend it, or leave out what can't be read with --skip_bad_documents"),
    SplitError: Cause("data_path_or_name", "name one of them with --split, or take all files with --split all"),
    ConfigNameError: Cause("data_path_or_name", "name one with --config_name, or leave the option out"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What bookcorpus.py is asked to make."""

    data_path_or_name: str = option(help="dataset of the hub, or local file or folder")
    tokenizer_path_or_name: str = option(help="model of the hub, or local folder")
    save_path: Path = option(help="folder to write, which must not exist")
    sequence_length: int = option(
        help="tokens in a row", at_least=2, at_most=MOST_TOKENS
    )  # it takes two to predict one
    split: str | None = option(None, "split of the data to read, or all (default: train)")
    config_name: str | None = option(None, "configuration of the data, where its README has several")
    text_key: str | None = option(
        None, "column that holds the text, or messages (default: text, messages or conversations, which there is)"
    )
    group_by: tuple[str, ...] | None = option(
        None, "two columns, as in repo,path: rows equal in the first are one document, joined in the second's order"
    )
    num_proc: int = option(CORES, "processes that tokenize; one for each core", at_least=1, at_most=MOST_PROCESSES)
    skip_bad_documents: bool = option(False, "leave out and count what can't be read")


def main(argv: list[str] | None = None) -> None:
    asked = parse(Asked, argv, "Tokenize text and pack it into rows of equal length.")
    check(asked)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this script has processes, and threads don't survive a fork
    huggingface_hub.logging.set_verbosity_error()  # it would print a line for each retry without a network
    tokenizer = load_tokenizer(asked.tokenizer_path_or_name)
    began = time.monotonic()
    try:
        with naming_options(asked, CAUSES):
            corpus = write_corpus(asked, tokenizer)
    except BrokenProcessPool as error:
        raise UserError("a process was killed, probably for want of memory: give a smaller --num_proc") from error
    print(summary(corpus, asked, time.monotonic() - began))


def summary(corpus: dict, asked: Asked, seconds: float) -> str:
    """What was made of what, and what was left out and why; `corpus` is what corpus.json records."""
    lines = [
        f"{corpus['documents']:,} documents, {corpus['tokens']:,} tokens -> {corpus['rows']:,} rows of"
        f" {asked.sequence_length:,} tokens in {asked.save_path}",
        of_each_document(corpus),
    ]
    if asked.group_by:
        group, order = asked.group_by
        lines.append(f"each document is made of the rows of one {group}, in the order of {order}")
    if corpus["files"]:
        lines.append(f"read: {named(corpus['files'], 'files')}")
    left_out = corpus["left_out"] | ({"bad documents": corpus["bad_documents"]} if corpus["bad_documents"] else {})
    tail, empty = corpus.get("tail_dropped", 0), corpus["empty_documents"]
    mean, of_a_token = corpus["document_length"]["mean"], corpus["document_length"]["weighted_mean"]
    lines.append(
        f"documents, cut where rows end, have {mean:,.0f} tokens on average, and a token is in one of {of_a_token:,.0f}"
    )
    lines.append(f"left out: a tail of {tail:,} tokens, {empty:,} empty documents")
    lines += [f"left out: {named(names, reason)}" for reason, names in left_out.items()]
    speed = corpus["tokens"] / seconds
    lines.append(f"took {seconds:.1f} s: {speed:,.0f} tokens/s on {asked.num_proc} processes")
    return "\n".join(lines)


def of_each_document(corpus: dict) -> str:
    """What tokens a document has besides those of its text; and of conversations, how much of the rows is learned."""
    if corpus["chat_template"] is None:
        marks = {"begins with": corpus["bos_token"], "ends with": corpus["eos_token"]}
        return (
            f"each document {' and '.join(f'{place} {token}' for place, token in marks.items() if token is not None)}"
        )
    padding, all_of = corpus["padding"], corpus["padding"] + corpus["tokens"]
    return (
        f"each document is a conversation, written by the chat template: {corpus['learned_tokens']:,} tokens are"
        f" learned, those of the assistant; {padding:,} tokens of the rows ({padding / all_of:.1%}) are padding;"
        f" {corpus['split_conversations']:,} conversations are longer than a row and were split"
    )


def named(names: list[str], what: str) -> str:
    """How many there are, and the first of them."""
    return f"{len(names):,} {what} ({some_of(names)})"


def check(asked: Asked) -> None:
    """Raises UserError for what can be seen to be wrong before anything is loaded."""
    if find_spec("datasets") is None:  # training does without, so it may be missing where train.py runs
        raise UserError("the package datasets, which rows are saved with, is not installed; pip install datasets")
    if problem := why_not_new(asked.save_path):
        raise UserError(f"--save_path {asked.save_path}: {problem}; name another folder")
    if asked.group_by is not None and len(asked.group_by) != 2:
        raise UserError(f"--group_by {','.join(asked.group_by)}: it has to be two columns, as in repo,path")
    for option_name in ("data_path_or_name", "tokenizer_path_or_name"):
        name = getattr(asked, option_name)
        try:
            if not os.path.exists(name):
                huggingface_hub.utils.validate_repo_id(name)
        except huggingface_hub.errors.HFValidationError as error:
            raise UserError(f"--{option_name} {name}: there is no such file or folder") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer with bos or eos, from the hub or a local folder; raises UserError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library, and each way in which a file can be broken, has its own exceptions
        raise UserError(f"--tokenizer_path_or_name {name}: no tokenizer loads from there: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer_path_or_name {name}: this tokenizer has no fast version (a tokenizer.json)")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer_path_or_name {name}: it has no bos and no eos token to show where documents meet")
    return tokenizer


def write_corpus(asked: Asked, tokenizer: PreTrainedTokenizerFast) -> dict:
    """Writes the rows, and corpus.json beside them, to --save_path, whole or not at all; returns corpus.json's facts.

    Raises:
        DocumentsError: the data can't be read.
        UserError: its tokens don't fill a row.
    """
    corpus = open_corpus(asked.data_path_or_name, asked.split, asked.config_name)
    columns = choose_columns(corpus, possible_columns(asked, tokenizer))
    if not asked.skip_bad_documents:
        check_documents(corpus, columns)
    bad: list[str] = []
    documents = good_documents(corpus, columns, bad)
    with whole_folder(asked.save_path) as folder:
        if columns.read_chat:
            chats = good_chats(tokenize_chats(documents, tokenizer, asked.num_proc), bad, asked.skip_bad_documents)
            counts = write_rows(folder, chats, corpus.size, asked.sequence_length, padding_of(tokenizer))
        else:
            sorting = watched(documents, corpus.size, "sorting")
            with joined_groups(sorting, folder) if asked.group_by else nullcontext(documents) as documents:
                tokens = tokenize(documents, tokenizer, asked.num_proc)
                counts = write_rows(folder, tokens, corpus.size, asked.sequence_length)
        if not counts["rows"]:
            raise UserError(too_short(counts["tokens"], asked.sequence_length, bad))
        sources = {"files": corpus.read, "left_out": corpus.left_out, "bad_documents": bad}
        facts = provenance(asked, columns, tokenizer) | counts | sources
        record_corpus(folder, facts)
    return facts


def possible_columns(asked: Asked, tokenizer: PreTrainedTokenizerFast) -> list[Columns]:
    """What may be read: text, or conversations, which are not joined with others."""
    text = Columns(asked.text_key or TEXT, asked.group_by)  # type: ignore[arg-type]  # check saw that it is two
    if asked.group_by:
        return [text]
    names = (asked.text_key,) if asked.text_key else MESSAGES
    return [text, *(Columns(name, read_chat=partial(read_chat, tokenizer)) for name in names)]


def padding_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that rows are filled up with. Nothing is learned of it, but it has to be in the model's vocabulary."""
    token: Any = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return token


def too_short(tokens: int, sequence_length: int, bad: list[str]) -> str:
    skipped = f"; {len(bad):,} bad documents were left out, the first of them {bad[0]}" if bad else ""
    return f"the corpus has {tokens:,} tokens, too few for a row of {sequence_length:,}{skipped}"


def check_documents(corpus: Corpus, columns: Columns) -> None:
    """Reads all documents, and raises the error of the first that can't be: now, and not after hours of tokenizing."""
    for document, _ in watched(corpus.documents(columns), corpus.size, "checking"):
        if isinstance(document, DocumentsError):
            raise document


def watched(documents: Iterator[tuple[Any, int]], size: int, doing: str) -> Iterator[tuple[Any, int]]:
    """Yields `documents`, each with its share of `size`, and shows progress."""
    with progress(size, doing) as bar:
        for document, share in documents:
            yield document, share
            bar.update(share)


def good_documents(corpus: Corpus, columns: Columns, bad: list[str]) -> Iterator[tuple[Any, int]]:
    """The documents that can be read, or what is to be joined to documents; of all others `bad` gets where and why."""
    for document, share in corpus.documents(columns):
        if isinstance(document, DocumentsError):
            bad.append(str(document))
        else:
            yield document, share


def good_chats(tokens: Iterator[Tokens], bad: list[str], skip_bad: bool) -> Iterator[Tokens]:
    """The tokens of conversations. Of each that is not among them `bad` gets which and why, if these are skipped."""
    for some in tokens:
        if some.bad and not skip_bad:
            raise BadDocument(some.bad[0])
        bad.extend(some.bad)
        yield some


def provenance(asked: Asked, columns: Columns, tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the rows are made from and with, to be recorded beside them."""
    return {
        "data": asked.data_path_or_name,
        "text_key": columns.text,
        "chat_template": chat_template(tokenizer) if columns.read_chat else None,
        "group_by": asked.group_by,
        "split": asked.split,
        "config_name": asked.config_name,
        "tokenizer": asked.tokenizer_path_or_name,
        "vocab_size": len(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "sequence_length": asked.sequence_length,
        "made_with": {library: version(library) for library in ("datasets", "pyarrow", "tokenizers", "transformers")},
    }


@dataclass(frozen=True)
class Block:
    """Whole rows: their token ids, int32, and the indices at which documents begin among them, int64; of conversations
    also which tokens are learned, bool."""

    ids: np.ndarray
    begins: np.ndarray
    learned: np.ndarray | None = None


def write_rows(
    folder: Path, tokens: Iterable[Tokens], size: int, sequence_length: int, padding: int | None = None
) -> dict:
    """Writes the rows into `folder` as the `datasets` library saves a dataset; returns the counts for corpus.json.

    Args:
        size: that of the corpus, for the progress bar.
        padding: the token that fills up rows of conversations; None if documents are cut where rows end.
    """
    import datasets  # here, since --help and a sentence that it is missing do without

    kinds = {"input_ids": "int32", BEGINS: "int32"} | ({} if padding is None else {LEARNED: "int8"})
    features = datasets.Features({name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()})
    schema = features.arrow_schema
    counts = {"documents": 0, "empty_documents": 0, "tokens": 0, "rows": 0, "largest_token": -1}
    shards, n_documents, squares = [], 0, 0  # as they are in the rows
    read = counted(tokens, counts, size)
    blocks = packed(read, sequence_length) if padding is None else packed_whole(read, sequence_length, padding, counts)
    for first in blocks:
        shards.append(folder / f"data-{len(shards):05d}.arrow")
        with pa.OSFile(os.fsencode(shards[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as shard:
            for block in itertools.chain([first], itertools.islice(blocks, BLOCKS_PER_SHARD - 1)):
                shard.write_batch(rows := rows_of(block, sequence_length, schema))
                counts["rows"] += len(rows)
                lengths = document_lengths(block.begins, len(rows), sequence_length)
                n_documents, squares = n_documents + len(lengths), squares + int((lengths**2).sum())
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    write_state(folder, shards)
    kept = counts["rows"] * sequence_length
    # Each document counts once for the mean, and each of its tokens for the other, by which attention's work goes.
    length = {"mean": kept / max(n_documents, 1), "weighted_mean": squares / max(kept, 1)}
    left = {"tail_dropped": counts["tokens"] - kept} if padding is None else {"padding": kept - counts["tokens"]}
    return counts | left | {"document_length": length}


def rows_of(block: Block, sequence_length: int, schema: pa.Schema) -> pa.RecordBatch:
    ends = np.arange(0, len(block.ids) + 1, sequence_length)  # of rows
    begins = (block.begins % sequence_length).astype(np.int32)
    columns = [lists(block.ids, ends), lists(begins, np.searchsorted(block.begins, ends))]
    if block.learned is not None:
        columns.append(lists(block.learned.astype(np.int8), ends))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def lists(values: np.ndarray, ends: np.ndarray) -> pa.ListArray:
    """A list of the values between each of `ends` and the next, the first of which is 0."""
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))


def counted(tokens: Iterable[Tokens], counts: dict, size: int) -> Iterator[Tokens]:
    """Yields `tokens`, adds them up in `counts`, and shows progress."""
    with progress(size) as bar:
        for some in tokens:
            counts["documents"] += some.documents
            counts["empty_documents"] += some.empty_documents
            counts["tokens"] += len(some.ids)
            counts["largest_token"] = max(counts["largest_token"], int(some.ids.max(initial=-1)))
            seconds = max(time.time() - bar.start_t, 1e-3)
            bar.set_description_str(
                f"{counts['documents']:,} documents ({counts['documents'] / seconds:,.0f}/s),"
                f" {counts['tokens']:,} tokens ({counts['tokens'] / seconds:,.0f}/s)",
                refresh=False,
            )
            bar.update(some.share)
            yield some


def progress(size: int, description: str = "") -> tqdm:
    """A bar that appears after a second, so that an error which ends the script at once stands alone."""
    form = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}"
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=size, desc=description, bar_format=form, delay=1, mininterval=interval)


def packed(tokens: Iterable[Tokens], sequence_length: int) -> Iterator[Block]:
    """Concatenates tokens and yields blocks of whole rows, of about BLOCK tokens or, if longer, of one row."""
    held, begins, size = [], [], 0
    for some in itertools.chain(tokens, [None]):
        if some is not None:
            held.append(some.ids)
            begins.append(some.begins + size)
            size += len(some.ids)
        whole = size - size % sequence_length
        if whole and (size >= BLOCK or some is None):
            ids, starts = np.concatenate(held), np.concatenate(begins)
            yield Block(ids[:whole], starts[starts < whole])
            held, begins, size = [ids[whole:]], [starts[starts >= whole] - whole], size - whole


def packed_whole(tokens: Iterator[Tokens], sequence_length: int, padding: int, counts: dict) -> Iterator[Block]:
    """Puts whole conversations into rows, and yields blocks of about BLOCK tokens or, if longer, of one row."""
    counts |= {"split_conversations": 0, "learned_tokens": 0}
    rows = fill_rows(parts_of_rows(tokens, sequence_length, counts), sequence_length)
    while some := list(itertools.islice(rows, max(BLOCK // sequence_length, 1))):
        ids, begins, learned = zip(*(padded(parts, sequence_length, padding) for parts in some), strict=True)
        begins = [places + row * sequence_length for row, places in enumerate(begins)]
        block = Block(np.concatenate(ids), np.concatenate(begins), np.concatenate(learned))
        counts["learned_tokens"] += sum(int(np.count_nonzero(of_row)) for of_row in learned)
        counts["largest_token"] = max(counts["largest_token"], padding)
        yield block


def write_state(folder: Path, shards: list[Path]) -> None:
    """Gives the shards their final names, and writes state.json, by which `load_from_disk` finds them."""
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": secrets.token_hex(8),  # the key of `datasets`' caches, so it has to differ between corpora
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
