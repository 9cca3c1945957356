"""bookcorpus.py loses and repeats no token, says in one sentence what is wrong, and leaves nothing half-written."""

import contextlib
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import run_script
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import bookcorpus
import longctx.data.documents
import longctx.data.folders
import longctx.data.formats
import longctx.data.groups
import longctx.data.tokens
from longctx.data.documents import Columns, Member
from longctx.errors import SplitError, UserError

datasets = pytest.importorskip("datasets", reason="bookcorpus.py saves rows with the package datasets")
ROOT = Path(__file__).parent.parent


def examples(number: int) -> settings:
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, suppress_health_check=slow)


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path):
    return AutoTokenizer.from_pretrained(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def tokenizers_by_kind(tokenizer, plays_path):
    """Tokenizers that differ in what may go wrong at the start of a piece: prefix spaces, no words, normalization."""
    text = [play.read_text("utf-8")[:40_000] for play in sorted(plays_path.rglob("*.md"))[:4]]
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

    prefix = Tokenizer(models.BPE(unk_token="<unk>"))
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = {"special_tokens": list(marks.values()), "show_progress": False}
    prefix.train_from_iterator(text, trainers.BpeTrainer(vocab_size=2000, **trainer))

    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(text, trainers.UnigramTrainer(vocab_size=1000, unk_token="<unk>", **trainer))

    made = {"prefix space": prefix, "unigram": unigram}
    return {"llama3": tokenizer} | {
        kind: PreTrainedTokenizerFast(tokenizer_object=backend, **marks) for kind, backend in made.items()
    }


@pytest.fixture
def run(monkeypatch, tmp_path, tokenizer):
    """Runs bookcorpus.main in this process with the real tokenizer, loaded once; returns the folder written."""

    def run_main(data, **options):
        given = {"data_path_or_name": data, "tokenizer_path_or_name": tmp_path, "save_path": tmp_path / "rows"}
        given |= {"sequence_length": 8, "num_proc": 1} | options
        words = [word for key, value in given.items() for word in (f"--{key}", str(value)) if word != "True"]
        monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *words])
        if "tokenizer_path_or_name" not in options:
            monkeypatch.setattr(bookcorpus, "load_tokenizer", lambda name: tokenizer)
        bookcorpus.main()
        return Path(given["save_path"])

    return run_main


def one_at_a_time(tokenizer, texts) -> list[int]:
    """What the corpus must be, by transformers alone: every document tokenized whole, by itself."""
    documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts if text]
    marked = [token for ids in documents for token in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)]
    return [token for token in marked if token is not None]


def begins(tokenizer, texts) -> list[int]:
    """Where documents must begin in the corpus."""
    lengths = [len(one_at_a_time(tokenizer, [text])) for text in texts if text]
    return [sum(lengths[:n]) for n in range(len(lengths))]


def length_in_rows(tokenizer, texts, whole: int, sequence_length: int) -> dict[str, float]:
    """The mean length of what the first `whole` tokens have of documents in rows, and that of a token's document."""
    cuts = sorted({*(n for n in begins(tokenizer, texts) if n < whole), *range(0, whole, sequence_length), whole})
    lengths = [end - start for start, end in itertools.pairwise(cuts)]
    squares = sum(n * n for n in lengths)
    return {"mean": whole / max(len(lengths), 1), "weighted_mean": squares / max(whole, 1)}


def saved_rows(folder) -> list[list[int]]:
    return datasets.load_from_disk(str(folder))["input_ids"][:]


def saved_begins(folder, sequence_length: int) -> list[int]:
    """Where documents begin by the column of the rows, counted from the first row's first token."""
    rows = datasets.load_from_disk(str(folder))["document_starts"][:]
    return [row * sequence_length + place for row, places in enumerate(rows) for place in places]


def in_pieces_of(monkeypatch, piece, overlap):
    for module in (longctx.data.documents, longctx.data.tokens):
        monkeypatch.setattr(module, "PIECE", piece)
        monkeypatch.setattr(module, "OVERLAP", overlap)


# The rows


@examples(40)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=30),
    sequence_length=st.integers(2, 40),
    num_proc=st.sampled_from([1, 1, 1, 2, 3]),
    piece=st.integers(64, 300),
    block=st.integers(1, 100),
    blocks_per_shard=st.integers(1, 3),
)
def test_rows_are_the_tokens_of_all_documents_one_after_another_but_for_the_tail(
    tmp_path_factory, tokenizer, texts, sequence_length, num_proc, piece, block, blocks_per_shard
):
    expected = one_at_a_time(tokenizer, texts)
    whole = len(expected) - len(expected) % sequence_length
    folder = tmp_path_factory.mktemp("rows")
    documents = ((text, 1) for text in texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longctx.data.tokens, "PIECE", piece)
        patch.setattr(bookcorpus, "BLOCK", block)
        patch.setattr(bookcorpus, "BLOCKS_PER_SHARD", blocks_per_shard)
        tokens = longctx.data.tokens.tokenize(documents, tokenizer, num_proc)
        counts = bookcorpus.write_rows(folder, tokens, len(texts), sequence_length)
    if whole:
        rows = saved_rows(folder)
        assert [token for row in rows for token in row] == expected[:whole]
        assert {len(row) for row in rows} == {sequence_length}
        assert saved_begins(folder, sequence_length) == [n for n in begins(tokenizer, texts) if n < whole]
    assert counts == {
        "documents": sum(map(bool, texts)),
        "empty_documents": texts.count(""),
        "tokens": len(expected),
        "rows": whole // sequence_length,
        "largest_token": max(expected, default=-1),
        "tail_dropped": len(expected) - whole,
        "document_length": length_in_rows(tokenizer, texts, whole, sequence_length),
    }


def test_rows_are_the_same_for_any_number_of_processes(run, tmp_path, tokenizer, plays_path):
    some = sorted(plays_path.rglob("*.md"))[:3]
    for play in some:
        (tmp_path / "plays" / play.name).parent.mkdir(exist_ok=True)
        (tmp_path / "plays" / play.name).write_bytes(play.read_bytes())
    folders = [
        run(tmp_path / "plays", save_path=tmp_path / f"rows{n}", sequence_length=512, num_proc=n) for n in (1, 2)
    ]
    assert saved_rows(folders[0]) == saved_rows(folders[1])
    expected = one_at_a_time(tokenizer, [play.read_bytes().decode() for play in some])
    assert list(itertools.chain(*saved_rows(folders[0]))) == expected[: len(expected) // 512 * 512]


@examples(60)
@given(kind=st.sampled_from(["llama3", "prefix space", "unigram"]), data=st.data())
def test_a_document_read_in_pieces_has_the_tokens_of_the_document_tokenized_whole(
    tokenizers_by_kind, plays_path, kind, data
):
    tokenizer = tokenizers_by_kind[kind]
    play = (plays_path / "tragedies" / "hamlet.md").read_text("utf-8")
    start, length = st.integers(0, 150_000), st.integers(300, 3000)
    passages = st.builds(lambda start, length: play[start : start + length], start, length)
    special = tokenizer.eos_token
    units = st.sampled_from(["a", " ", "\n", "7", "-", "\r\n", "é", "e\u0301", "漢字", "\u3000", "'s ", special])
    runs = st.builds(lambda unit, times: unit * times, units, length)
    text = "".join(data.draw(st.lists(passages | runs | st.text(max_size=40), min_size=4, max_size=14)))
    with pytest.MonkeyPatch.context() as patch:
        in_pieces_of(patch, 2048, 512)
        documents = longctx.data.documents.row_documents(text, 1)
        found = list(longctx.data.tokens.tokenize(documents, tokenizer, 1))
    assert np.concatenate([tokens.ids for tokens in found]).tolist() == one_at_a_time(tokenizer, [text])
    assert [tokens.begins.tolist() for tokens in found] == [[0], *[[]] * (len(found) - 1)]


def test_a_long_text_file_is_read_in_pieces_and_tokenized_on_all_processes(
    run, monkeypatch, tmp_path, tokenizer, plays_path
):
    play = (plays_path / "tragedies" / "macbeth.md").read_bytes().decode()
    (tmp_path / "long.txt").write_text(play, encoding="utf-8", newline="")
    in_pieces_of(monkeypatch, 10_000, 1_000)
    documents = list(longctx.data.formats.read_documents(tmp_path / "long.txt", Columns("text")))
    assert len(documents) > 10
    assert all(len(piece.text) <= 10_000 for piece, _ in documents)
    assert sum(share for _, share in documents) == (tmp_path / "long.txt").stat().st_size
    expected = one_at_a_time(tokenizer, [play])
    found = list(itertools.chain(*saved_rows(run(tmp_path / "long.txt", num_proc=2))))
    assert found == expected[: len(expected) // 8 * 8]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_documents_are_read_only_a_few_batches_ahead_of_the_tokens(monkeypatch, tokenizer, num_proc):
    in_pieces_of(monkeypatch, 100, 10)
    read = itertools.count()
    documents = ((f"document {next(read)} " + "of fifty characters" * 2, 1) for _ in range(400))
    tokens = longctx.data.tokens.tokenize(documents, tokenizer, num_proc)
    done = 0
    for some in itertools.islice(tokens, 30):
        done += some.documents
        ahead = next(read) - done
        assert ahead <= 2 * (2 * num_proc + 1) + 31  # two documents a batch; 31 numbers went to this count
    tokens.close()


def test_truncation_and_padding_set_in_the_tokenizer_file_are_ignored(tokenizer, llama3_tokenizer_path):
    cutting = AutoTokenizer.from_pretrained(llama3_tokenizer_path)
    cutting.backend_tokenizer.enable_truncation(4)
    cutting.backend_tokenizer.enable_padding(length=64)
    found = list(longctx.data.tokens.tokenize(iter([("to be or not to be, that is", 1)]), cutting, 1))
    assert found[0].ids.tolist() == one_at_a_time(tokenizer, ["to be or not to be, that is"])


# One file


COMPRESS = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),  # the same in every process that collects the tests
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def as_parquet(texts, kind=None, **options) -> bytes:
    stream = io.BytesIO()
    column = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts).cast(kind or pa.string())
    pq.write_table(pa.table({"id": range(len(texts)), "text": column}), stream, **options)
    return stream.getvalue()


def as_jsonl(texts) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


WRITE = {
    ".jsonl": as_jsonl,
    ".json": lambda texts: json.dumps([{"id": [1], "text": text} for text in texts], indent=1).encode(),
    ".parquet": as_parquet,
}


def read(file: Path) -> list[str]:
    """The documents of a file, pieces joined, and for each that can't be read, its error with a mark before it."""
    return whole(document for document, _ in longctx.data.formats.read_documents(file, Columns("text")))


def whole(parts) -> list[str]:
    documents, held = [], ""
    for document in parts:
        if isinstance(document, longctx.data.documents.Piece):
            held += document.text[longctx.data.documents.OVERLAP if held else 0 :]
            if not document.last:
                continue
            document, held = held, ""
        documents.append(document if isinstance(document, str) else f"BAD {document}")
    assert not held
    return documents


@examples(40)
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=90), max_size=12),
    kind=st.sampled_from(list(WRITE)),
    compression=st.sampled_from(list(COMPRESS)),
    block=st.integers(3, 70),
)
def test_a_file_has_the_same_documents_in_every_format_and_compression(
    tmp_path_factory, texts, kind, compression, block
):
    file = tmp_path_factory.mktemp("data") / f"a{kind}{compression}"
    file.write_bytes(COMPRESS[compression](WRITE[kind](texts)))
    with pytest.MonkeyPatch.context() as patch:
        in_pieces_of(patch, 64, 16)
        patch.setattr(longctx.data.formats, "BLOCK", block)
        assert read(file) == texts
        if texts:
            file = file.with_name(f"b.txt{compression}")
            file.write_bytes(COMPRESS[compression](texts[0].encode()))
            assert read(file) == [texts[0].removeprefix("\ufeff")]


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + as_jsonl(["a", "b"]))
    assert read(tmp_path / "a.json") == ["a", "b"]


TEXT_TYPES = [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), "dictionary"]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_parquet_may_hold_text_in_every_type_that_arrow_has_for_it(tmp_path, kind):
    (tmp_path / "a.parquet").write_bytes(as_parquet(["a", "é", None, "a"], kind))
    assert read(tmp_path / "a.parquet") == ["a", "é", "", "a"]


def test_a_row_of_parquet_that_is_no_text_is_named_and_the_rest_is_read(tmp_path):
    rows = pa.table({"text": pa.array([b"a", b"b\xff", b"c\0", None, b"e"])})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=2)
    texts = [
        "a",
        "BAD row 1: byte 1 is not UTF-8: invalid start byte",
        "BAD row 2: its text has a NUL, which is no text",
    ]
    assert read(tmp_path / "a.parquet") == [*texts, "", "e"]


def test_a_corrupt_page_of_parquet_is_named_by_its_rows_and_the_next_row_group_is_read(tmp_path):
    texts = [f"document {i}, of which there are some" for i in range(12)]
    options = {"row_group_size": 4, "write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    content = as_parquet(texts, **options).replace(b"document 5", b"document X")
    (tmp_path / "a.parquet").write_bytes(content)
    found = read(tmp_path / "a.parquet")
    assert found[:4] + found[5:] == texts[:4] + texts[8:]
    assert found[4].startswith("BAD rows 4 to 7 can't be read: could not verify page integrity")


@examples(150)
@given(kind=st.sampled_from([*WRITE, ".txt"]), compression=st.sampled_from(list(COMPRESS)), data=st.data())
def test_no_broken_file_raises_anything_while_it_is_read(tmp_path_factory, kind, compression, data):
    texts = ["First.", "Second, é", "Third"]
    content = bytearray(COMPRESS[compression](WRITE.get(kind, as_jsonl)(texts)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 12))
        content[at : at + length] = data.draw(st.binary(max_size=12) | st.sampled_from([b"[" * 5000, b"", bytes(8)]))
    file = tmp_path_factory.mktemp("data") / f"a{kind}{compression}"
    file.write_bytes(content)
    for document in read(file):
        assert "\0" not in document
        assert "\n" not in document or not document.startswith("BAD")


# Where documents come from

FIVE = ["First text.\r\nOf two lines.", "Second text, é", "", "Fourth\u2028text", "Fifth text."]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts), encoding="utf-8")


def expect(folder, tokenizer, texts):
    expected = one_at_a_time(tokenizer, texts)
    assert list(itertools.chain(*saved_rows(folder))) == expected[: len(expected) // 8 * 8]
    assert json.loads((folder / "corpus.json").read_text())["documents"] == sum(map(bool, texts))


def test_a_folder_of_all_kinds_of_files_is_read_recursively_in_sorted_order(run, tmp_path, tokenizer):
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    (data / "a.txt").write_bytes(b"\xef\xbb\xbf" + FIVE[0].encode())  # the byte order mark is no text
    write_jsonl(data / "b" / "one.jsonl", [FIVE[1], FIVE[2], FIVE[3]])
    pq.write_table(pa.table({"text": [FIVE[4], None], "id": [1, 2]}), data / "b" / "two.parquet")
    (data / "c.MD").write_text("# Last", encoding="utf-8")
    (data / "b" / "notes.csv").write_text("not,read")
    expect(run(data), tokenizer, [*FIVE, "# Last"])


@pytest.fixture
def tree(tmp_path):
    """Makes a folder of files, each of whose texts is the file's name; returns it."""

    def make(*names) -> Path:
        for name in names:
            file = tmp_path / "data" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(as_jsonl([name]) if ".json" in name else name.encode())
        return tmp_path / "data"

    return make


def chosen(folder, split=None, config_name=None) -> tuple[list[str], dict]:
    choice = longctx.data.folders.choose_files(folder, split, config_name)
    return choice.read, choice.left_out


def test_hidden_files_and_what_is_about_the_data_are_left_out_and_listed(tree):
    text = ["a.txt", "b/README/c.md", "b/license.jsonl", "b/notice-of-death.txt"]
    hidden = [".a.txt", "._a.txt", ".git/b.txt", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt"]
    about = ["LICENSE.txt", "README.md", "b/README.zh.md", "b/dataset_info.json", "b/licence.md", "b/COPYING.txt"]
    other = ["b/COPYING", "b/data.csv", "b/data.tar.gz", "b/text.gz"]
    read, left_out = chosen(tree(*text, *hidden, *about, *other))
    assert read == text
    assert left_out == {
        "hidden": ["._a.txt", ".a.txt", ".git", ".ipynb_checkpoints", "__MACOSX"],
        "about the data": sorted(about),
        "of a format that is not read": other,
    }


def test_links_are_followed_and_what_several_names_lead_to_is_read_once(tree, tmp_path):
    data = tree("a.txt", "b/c.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("d")
    for name, target in {"link": tmp_path / "elsewhere", "b/up": data, "again": data / "b", "e.txt": "a.txt"}.items():
        (data / name).symlink_to(target)
    read, left_out = chosen(data)
    assert read == ["a.txt", "again/c.txt", "link/d.txt"]
    assert left_out == {"read already under another name": ["again/up", "b", "e.txt"]}


def test_a_download_of_the_hub_in_its_cache_is_read_through_its_links(tree):
    data = tree("blobs/1f3a", "blobs/.2c", "snapshots/old/README.md")
    for name, target in {"train.txt": "1f3a", "test.txt": "1f3a", "train_2.txt": ".2c"}.items():
        (data / "snapshots" / "old" / name).symlink_to(data / "blobs" / target)
    assert chosen(data)[0] == ["snapshots/old/train.txt", "snapshots/old/train_2.txt"]


def test_a_link_that_leads_nowhere_is_a_document_that_can_not_be_read(run, tree):
    data = tree("a.txt")
    (data / "b.txt").symlink_to("lost")
    assert f"b.txt: it can't be opened: No such file or directory; {MEND}" in refused(run, data)


PARTS = ["train", "test", "val", "dev", "training", "a", "train-1", "my_test", "evaluation", "contest"]
SHARDS = [f"data/{split}-00000-of-00001.txt" for split in ("train", "test", "own")]


@examples(40)
@given(
    names=st.sets(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), min_size=1, max_size=6),
    shards=st.just(set()) | st.sets(st.sampled_from(SHARDS), max_size=2),
)
def test_the_splits_of_a_folder_are_those_that_the_library_datasets_finds(tmp_path_factory, names, shards):
    folder = tmp_path_factory.mktemp("data")
    names = {f"{name}.txt" for name in names} | shards
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    patterns = datasets.data_files.get_data_patterns(str(folder))
    theirs = datasets.data_files.DataFilesDict.from_patterns(patterns, str(folder))
    for split in theirs:
        assert sorted(set(theirs[split])) == sorted(str(folder / name) for name in chosen(folder, split)[0])
    assert chosen(folder, "all") == (sorted(names, key=lambda name: name.split("/")), {})
    if "train" not in theirs:
        with pytest.raises(SplitError, match=f"^it has no split named train, only {', '.join(map(str, theirs))}$"):
            chosen(folder)


CARD = """---
license: mit
configs:
- config_name: plain
  data_files: a/*.txt
- config_name: parts
  default: true
  data_files:
  - split: train
    path: ["b/*.txt", "c.txt"]
  - split: test
    path: "**/d.txt"
- config_name: folder
  data_dir: b
---
# About
"""


@pytest.mark.parametrize("config_name", [None, "plain", "parts", "folder"])
def test_the_configurations_in_a_readme_choose_the_files_that_the_library_datasets_chooses(tree, tmp_path, config_name):
    data = tree("README.md", "a/1.txt", "a/d.txt", "b/2.txt", "b/test.txt", "c.txt", "e.txt")
    (data / "README.md").write_text(CARD)
    builder = datasets.load_dataset_builder(str(data), config_name, cache_dir=str(tmp_path / "cache"))
    for split, files in builder.config.data_files.items():
        read, left_out = chosen(data, str(split), config_name)
        assert sorted(map(os.path.realpath, files)) == sorted(os.path.realpath(data / name) for name in read)
        assert set(read).isdisjoint(itertools.chain(*left_out.values()))


def test_a_split_or_configuration_that_is_not_there_is_refused_with_those_that_are(run, tree, tmp_path):
    data = tree("train.txt", "test.txt")
    advice = "name one of them with --split, or take all files with --split all"
    assert f"it has no split named dev, only train, test; {advice}" in refused(run, data, split="dev")
    assert "it has no configuration en, only files; name one" in refused(run, data, config_name="en")
    assert "a file by itself has no splits and no configurations" in refused(run, data / "train.txt", split="train")
    (data / "README.md").write_text(CARD.replace("  default: true\n", ""))
    assert "it has several configurations: plain, parts, folder; name one with --config_name" in refused(run, data)
    (data / "README.md").write_text("---\nconfigs: 3\n---\n")
    assert "README.md: its YAML can't be read: Expected configs to be a list" in refused(run, data)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert "a saved dataset has no configurations" in refused(run, tmp_path / "saved", config_name="en")
    assert "it has no split named test, only train" in refused(run, tmp_path / "saved", split="test")


def test_what_was_read_and_left_out_and_why_is_printed_and_recorded(run, tree, capsys):
    data = tree("train.txt", "train_2.jsonl", "test.txt", "README.md", "._train.txt", "notes.txt", "a.pdf", "b.pdf")
    with open(data / "train_2.jsonl", "ab") as file:
        file.write(b'{"text": 3}\n')
    record = json.loads((run(data, skip_bad_documents=True) / "corpus.json").read_text())
    assert record["files"] == ["train.txt", "train_2.jsonl"]
    assert record["left_out"] == {
        "hidden": ["._train.txt"],
        "about the data": ["README.md"],
        "of a format that is not read": ["a.pdf", "b.pdf"],
        "of no split": ["notes.txt"],
        "of the split test": ["test.txt"],
    }
    assert record["bad_documents"] == ["train_2.jsonl: line 2: text holds 3, not text"]
    said = capsys.readouterr().out
    assert "each document begins with <|begin_of_text|> and ends with <|end_of_text|>\n" in said
    assert "read: 2 files (train.txt, train_2.jsonl)\n" in said
    assert "left out: 2 of a format that is not read (a.pdf, b.pdf)\n" in said
    assert "left out: 1 bad documents (train_2.jsonl: line 2: text holds 3, not text)\n" in said


@examples(25)
@given(data=st.data())
def test_every_document_of_a_folder_is_in_the_rows_or_listed_and_a_bad_one_leaves_nothing_behind(
    tmp_path_factory, run, tokenizer, data
):
    folder = tmp_path_factory.mktemp("corpus")
    documents = st.lists(st.sampled_from(["To be, or not to be", "é", "", None]), min_size=1, max_size=5)
    good, n_bad = [], 0
    for name in sorted(data.draw(st.sets(st.sampled_from(["a", "b/c", "b/d", "e"]), min_size=1))):
        texts, compression = data.draw(documents), data.draw(st.sampled_from(list(COMPRESS)))
        bad = data.draw(st.sampled_from([b'{"text": "\xff"}', b"{", b"3", b'{"text": 3}', b"\0", b"[" * 9999, b"{}"]))
        lines = [bad if text is None else as_jsonl([text]).strip() for text in texts]
        file = folder / "data" / f"{name}.jsonl{compression}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(COMPRESS[compression](b"\n".join(lines)))
        good += [text for text in texts if text is not None]
        n_bad += texts.count(None)
    expected = one_at_a_time(tokenizer, good)
    if n_bad:
        said = refused(run, folder / "data", save_path=folder / "rows")
        assert ".jsonl" in said and ": line " in said
        assert os.listdir(folder) == ["data"]
    with pytest.raises(UserError, match="too few for a row") if len(expected) < 8 else contextlib.nullcontext():
        rows = run(folder / "data", save_path=folder / "rows", skip_bad_documents=True)
        assert list(itertools.chain(*saved_rows(rows))) == expected[: len(expected) // 8 * 8]
        assert len(json.loads((rows / "corpus.json").read_text())["bad_documents"]) == n_bad
    assert sorted(os.listdir(folder)) == (["data", "rows"] if len(expected) >= 8 else ["data"])


@pytest.mark.parametrize(("mark", "place"), [("bos", "begins"), ("eos", "ends")])
def test_a_tokenizer_with_one_of_bos_and_eos_has_that_between_documents(
    run, monkeypatch, tmp_path, capsys, tokenizers_by_kind, plays_path, mark, place
):
    backend = tokenizers_by_kind["prefix space"].backend_tokenizer
    one = PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{mark}_token": "<s>"})
    monkeypatch.setattr(bookcorpus, "load_tokenizer", lambda name: one)
    texts = [(plays_path / "tragedies" / "hamlet.md").read_bytes().decode()[:9000], "Second", "Third"]
    write_jsonl(tmp_path / "data.jsonl", texts)
    in_pieces_of(monkeypatch, 2048, 512)
    rows = run(tmp_path / "data.jsonl", tokenizer_path_or_name=tmp_path)
    expect(rows, one, texts)
    tokens = len(one_at_a_time(one, texts))
    assert saved_begins(rows, 8) == [n for n in begins(one, texts) if n < tokens // 8 * 8]
    assert f"\neach document {place} with <s>\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved dataset", "saved splits"])
def test_text_is_read_from_the_column_that_text_key_names(run, tmp_path, tokenizer, kind):
    data = tmp_path / ("data.jsonl" if kind == "jsonl" else "data.parquet" if kind == "parquet" else "data")
    table = {"id": list(range(5)), "body": FIVE}
    if kind == "jsonl":
        write_jsonl(data, FIVE, "body")
    elif kind == "parquet":
        pq.write_table(pa.table(table).cast(pa.schema({"id": pa.int8(), "body": pa.large_string()})), data)
    else:
        saved = datasets.Dataset.from_dict(table)
        (saved if kind == "saved dataset" else datasets.DatasetDict(train=saved)).save_to_disk(data)
    expect(run(data, text_key="body"), tokenizer, FIVE)


def test_a_hub_dataset_that_is_a_script_is_read_from_its_conversion_to_parquet(run, monkeypatch, tmp_path, tokenizer):
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("")
    real, asked = datasets.load_dataset, []

    def load_dataset(name, config_name, split, revision=None):
        asked.append((name, config_name, split, revision))
        return datasets.Dataset.from_dict({"text": FIVE}) if revision else real(str(script), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expect(run("someone/some-script", split="test", config_name="en"), tokenizer, FIVE)
    assert asked == [("someone/some-script", "en", "test", kept) for kept in (None, "refs/convert/parquet")]


def test_corpus_json_records_what_the_rows_are_made_of_and_the_counts_are_printed(run, tmp_path, tokenizer, capsys):
    write_jsonl(tmp_path / "data.jsonl", FIVE)
    tokens = len(one_at_a_time(tokenizer, FIVE))
    record = json.loads((run(tmp_path / "data.jsonl") / "corpus.json").read_text())
    assert record.pop("made_with").keys() >= {"datasets", "tokenizers", "transformers"}
    assert record.pop("digest").startswith("blake2b:")
    assert record.pop("seals").keys() >= {"data-00000-of-00001.arrow", "dataset_info.json", "state.json"}
    assert record == {
        "data": str(tmp_path / "data.jsonl"),
        "text_key": "text",
        "chat_template": None,
        "group_by": None,
        "split": None,
        "config_name": None,
        "tokenizer": str(tmp_path),
        "vocab_size": 128256,
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "sequence_length": 8,
        "documents": 4,
        "empty_documents": 1,
        "tokens": tokens,
        "rows": tokens // 8,
        "largest_token": max(one_at_a_time(tokenizer, FIVE)),
        "tail_dropped": tokens % 8,
        "document_length": length_in_rows(tokenizer, FIVE, tokens // 8 * 8, 8),
        "files": ["data.jsonl"],
        "left_out": {},
        "bad_documents": [],
    }
    assert f"4 documents, {tokens} tokens -> {tokens // 8} rows of 8" in capsys.readouterr().out


def test_rows_are_int32_and_so_is_where_documents_begin_in_them(run, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", FIVE)
    saved = datasets.load_from_disk(str(run(tmp_path / "data.jsonl")))
    lists = datasets.List(datasets.Value("int32"))
    assert saved.features == datasets.Features({"input_ids": lists, "document_starts": lists})


# Documents joined by group


@examples(40)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "é", "\U0001f600", 2, 10]),
            st.sampled_from(["x", "y", "10", "9", 9, 10]),
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=60) | st.just("line\n"),
        ),
        max_size=40,
    ),
    run=st.integers(1, 3000),
)
def test_each_group_is_one_document_of_its_texts_in_order_however_few_are_sorted_at_a_time(tmp_path_factory, rows, run):
    expected = {}
    for group, _, text in sorted(rows, key=lambda row: [(isinstance(key, str), key) for key in row[:2]]):
        joined = expected.get(group, "")
        expected[group] = joined + "\n" * (bool(joined and text) and not joined.endswith("\n")) + text
    with pytest.MonkeyPatch.context() as patch:
        in_pieces_of(patch, 64, 16)
        patch.setattr(longctx.data.groups, "RUN", run)
        members = ((Member(*row), 3) for row in rows)
        with longctx.data.groups.joined_groups(members, tmp_path_factory.mktemp("aside")) as documents:
            found = list(documents)
    assert whole(document for document, _ in found) == list(expected.values())
    assert sum(share for _, share in found) == 3 * len(rows)


REPOSITORY = [("b", "1.py", "import a\n"), ("a", "z.py", "z = 1"), ("b", "0.py", "x = 0"), ("a", "é.py", "")]
REPOSITORY += [("a", "a.py", "from z import z")]
JOINED = ["from z import z\nz = 1", "x = 0\nimport a\n"]


@pytest.mark.parametrize("kind", ["jsonl", "files", "parquet", "saved dataset"])
def test_rows_of_a_repository_are_one_document_wherever_they_are_in_the_data(run, tmp_path, tokenizer, kind, capsys):
    table = pa.table(dict(zip(("repo", "path", "text"), map(list, zip(*REPOSITORY, strict=True)), strict=True)))
    data = tmp_path / "data"
    if kind == "saved dataset":
        datasets.Dataset(table).save_to_disk(data)
    elif kind == "parquet":
        dictionary = table.column("repo").dictionary_encode()
        pq.write_table(table.set_column(0, "repo", dictionary), data.with_suffix(".parquet"), row_group_size=2)
        data = data.with_suffix(".parquet")
    else:
        data.mkdir()
        for n in range(3 if kind == "files" else 1):
            lines = [json.dumps(row) for row in table.to_pylist()[n :: 3 if kind == "files" else 1]]
            (data / f"{n}.jsonl.gz").write_bytes(COMPRESS[".gz"]("\n".join(lines).encode()))
    for num_proc in (1, 2) if kind == "files" else (1,):
        rows = run(data, group_by="repo,path", save_path=tmp_path / f"rows{num_proc}", num_proc=num_proc)
        expect(rows, tokenizer, JOINED)
        assert not [name for name in os.listdir(rows) if not name.endswith((".arrow", ".json"))]
    assert "each document is made of the rows of one repo, in the order of path\n" in capsys.readouterr().out


def test_the_texts_of_a_corpus_that_is_to_be_joined_are_sorted_with_few_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(longctx.data.groups, "RUN", 2**20)
    members = ((Member(n * 7919 % 1009, n, "four" * 2**12), 1) for n in range(2 * 1009))
    tracemalloc.start()
    with longctx.data.groups.joined_groups(members, tmp_path) as documents:
        assert sum(len(document) for document, _ in documents) == 1009 * (2 * 2**14 + 1)
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**20  # of 32 MiB
    tracemalloc.stop()
    assert not list(tmp_path.iterdir())


# What is wrong, in one sentence


def refused(run, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        run(*args, **options)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_options_out_of_range_are_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bookcorpus, "open_corpus", None)
    (tmp_path / "there").mkdir()
    assert "--sequence_length 1" in refused(run, tmp_path, sequence_length=1)
    assert "--num_proc 0" in refused(run, tmp_path, num_proc=0)
    assert "there: it is there already" in refused(run, tmp_path, save_path=tmp_path / "there")
    assert "./absent: there is no such file or folder" in refused(run, "./absent")
    assert "a/b/c: there is no such file or folder" in refused(run, tmp_path, tokenizer_path_or_name="a/b/c")


def test_without_the_library_datasets_the_sentence_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bookcorpus, "find_spec", lambda name: None)
    said = refused(run, tmp_path)
    assert said == "the package datasets, which rows are saved with, is not installed; pip install datasets"
    assert not (tmp_path / "rows").exists()


ADVICE = "name a column of text with --text_key"
MEND = "mend it, or leave out what can't be read with --skip_bad_documents"


def broken_inputs():
    """File name, its content, and what the sentence must say."""
    yield "short.txt", b"To be", "the corpus has 4 tokens, too few for a row of 8"
    yield "text.pdf", b"To be", "no text there, that is, no file of .txt, .md, .jsonl, .json, .parquet"
    yield "latin1.txt", b"caf\xe9 " * 20, "latin1.txt: byte 3 is not UTF-8: invalid continuation byte"
    yield "latin1.jsonl", b'{"text": "caf\xe9"}', "latin1.jsonl: line 1: byte 13 is not UTF-8"
    yield "a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl: line 3: not JSON: "
    yield "list.jsonl", b'["a"]', "list.jsonl: line 1: not a JSON object"
    yield "key.jsonl", b'{"title": "a", "body": "b"}', f"key.jsonl: line 1: no column text, only title, body; {ADVICE}"
    yield "number.jsonl", b'{"text": 3}', f"number.jsonl: line 1: text holds 3, not text; {ADVICE}"
    yield "half.jsonl", rb'{"text": "\ud800"}', "half.jsonl: line 1: character 0 of its text is not UTF-8: surrogates"
    yield "nul.txt", b"a\0b" * 20, f"nul.txt: byte 1 is NUL, which is no text; {MEND}"
    yield (
        "zeros.jsonl",
        b'{"text": "a"}\n' + bytes(40),
        f"zeros.jsonl: line 2: not JSON: Expecting value at column 1; {MEND}",
    )
    yield "deep.jsonl", b"[" * 10**5, f"deep.jsonl: line 1: nested deeper than Python can read; {MEND}"
    yield (
        "deep.json",
        b'[{"text": "a"},' + b"[" * 10**5,
        "deep.json: row 1: not JSON, and what follows is not read: nested",
    )
    yield (
        "cut.json",
        b'[{"text": "a"}, {"text"',
        "cut.json: row 1: not JSON, and what follows is not read: Expecting ':'",
    )
    yield "digits.json", b'[{"n": ' + b"1" * 5000, "digits.json: row 0: not JSON, and what follows is not read: Exceeds"
    yield "two.json", b"[] []", "two.json: row 0: not JSON, and what follows is not read: there is more after the array"
    yield "number.json", b'[{"text": "a"}, 3]', f"number.json: row 1: not a JSON object; {MEND}"
    yield "cut.jsonl.gz", COMPRESS[".gz"](b'{"text": "a"}\n' * 99)[:-9], "cut.jsonl.gz: it breaks off near byte "
    yield "cut.txt.zst", COMPRESS[".zst"](b"a" * 99)[:-3], "cut.txt.zst: it breaks off near byte "
    yield (
        "not.txt.gz",
        b"To be",
        "not.txt.gz: it breaks off near byte 2, and what follows is not read: Not a gzipped",
    )
    yield (
        "lfs.txt",
        b"version https://git-lfs.github.com/spec/v1\n",
        "lfs.txt: it is Git LFS's pointer to a file; fetch",
    )
    yield "not.parquet", b"PAR", "not.parquet: no Parquet that can be read"


@pytest.mark.parametrize(("name", "content", "sentence"), list(broken_inputs()), ids=lambda value: value[:12])
def test_a_file_that_cannot_be_used_is_named_with_the_reason(run, tmp_path, name, content, sentence):
    (tmp_path / "data" / "inner").mkdir(parents=True)
    file = tmp_path / "data" / "inner" / name
    file.write_bytes(content)
    said = refused(run, file)
    assert sentence in said
    assert said.startswith((f"--data_path_or_name {file}: ", "the corpus has"))
    if file.suffix != ".pdf" and said.startswith("--"):  # in a folder, it is named by its place there
        assert f"--data_path_or_name {tmp_path / 'data'}: inner/{sentence}" in refused(run, tmp_path / "data")
    assert not (tmp_path / "rows").exists()


def test_a_dataset_without_the_column_or_split_or_text_is_refused_with_what_it_has(run, tmp_path):
    pq.write_table(pa.table({"title": ["a"], "body": [1]}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"title": ["a"], "body": [1]}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    for data in ("a.parquet", "saved"):
        said = refused(run, tmp_path / data)
        assert said == f"--data_path_or_name {tmp_path / data}: no column text, only title, body; {ADVICE}"
        assert f"{data}: body holds int64, not text; {ADVICE}" in refused(run, tmp_path / data, text_key="body")
    assert "no split named train, only test" in refused(run, tmp_path / "splits")
    assert "empty: no text there" in refused(run, tmp_path / "empty")


def test_columns_that_documents_cannot_be_joined_by_are_refused(run, tmp_path):
    for name in ("group_by", "text_key"):
        assert f"--{name}" in refused(run, tmp_path, **{name: "repo,path,text" if name == "group_by" else "\t"})

    def said(row, file="a.jsonl", **options):
        (tmp_path / file).write_text(json.dumps(row) + "\n")
        return refused(run, tmp_path / file, group_by="repo,path", **options)

    named = "--group_by repo,path: "
    assert said({"text": "a", "path": "b"}) == f"{named}line 1: no column repo, only text, path"
    assert said({"text": "a", "path": "b", "repo": 0.5}) == f"{named}line 1: repo holds 0.5, not text or whole numbers"
    assert said({"text": "a", "path": True, "repo": 1}).endswith("line 1: path holds True, not text or whole numbers")
    null = said({"text": "a", "path": None, "repo": 1})
    assert f"a.jsonl: line 1: its path is null, so that it can't be joined with others; {MEND}" in null
    assert said({"path": "a", "repo": 1}).endswith(f"line 1: no column text, only path, repo; {ADVICE}")
    assert said({}, "a.txt") == f"{named}a file of text has no columns by which to join it with others"
    datasets.Dataset.from_dict({"text": ["a"], "repo": ["a"], "path": [0.5]}).save_to_disk(tmp_path / "saved")
    not_whole = refused(run, tmp_path / "saved", group_by="repo,path")
    assert not_whole == f"{named}path holds double, not text or whole numbers"
    assert refused(run, tmp_path / "saved", group_by="name,path").endswith("no column name, only text, repo, path")
    assert not (tmp_path / "rows").exists()


def test_a_tokenizer_that_cannot_be_used_is_refused(run, tmp_path, tokenizers_by_kind):
    tokenizers_by_kind["unigram"].save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())
    shutil.copytree(tmp_path / "whole", tmp_path / "bare")
    without = {key: value for key, value in config.items() if key not in ("bos_token", "eos_token")}
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(without))
    assert "it has no bos and no eos token" in refused(run, tmp_path, tokenizer_path_or_name=tmp_path / "bare")
    (tmp_path / "whole" / "tokenizer.json").write_text("{")
    assert "whole: no tokenizer loads from there" in refused(run, tmp_path, tokenizer_path_or_name=tmp_path / "whole")


def test_a_hub_that_cannot_be_reached_is_refused_with_the_reason(run, monkeypatch, tmp_path):
    def load(*args, **options):
        raise ConnectionError("Couldn't reach 'someone/some'\non the Hub")

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", load)
        sentence = refused(run, tmp_path, tokenizer_path_or_name="someone/some")
    assert "someone/some: no tokenizer loads from there: Couldn't reach" in sentence
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "no such file or folder, and no dataset of the hub: Couldn't reach" in refused(run, "someone/some")


def test_a_save_path_that_cannot_be_written_to_is_refused_before_any_work(run, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "data.jsonl", FIVE)
    monkeypatch.setattr(bookcorpus, "open_corpus", None)
    sentence = refused(run, tmp_path / "data.jsonl", save_path=tmp_path / "data.jsonl" / "rows")
    assert sentence.endswith(f"{tmp_path / 'data.jsonl'} is no folder; name another folder")


# Real processes


def start(data, tokenizer_path, save_path):
    command = [sys.executable, ROOT / "bookcorpus.py", "--data_path_or_name", data, "--num_proc", 2]
    command += ["--tokenizer_path_or_name", tokenizer_path, "--save_path", save_path, "--sequence_length", 4096]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "LC_ALL": "C"},  # as in many containers; paths need not be ASCII for that
        # A job that a shell runs in the background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_corpus_too_short_ends_with_status_2_and_one_line(tmp_path, llama3_tokenizer_path):
    (tmp_path / "short.md").write_text("To be, or not to be")
    options = ["--data_path_or_name", tmp_path, "--tokenizer_path_or_name", llama3_tokenizer_path, "--num_proc", 2]
    result = run_script("bookcorpus.py", *options, "--save_path", tmp_path / "rows", "--sequence_length", 4096)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "bookcorpus.py: error: the corpus has 9 tokens, too few for a row of 4,096\n"
    assert [path.name for path in tmp_path.iterdir()] == ["short.md"]


def test_paths_that_are_not_ascii_are_taken_where_the_locale_is_c(tmp_path, llama3_tokenizer_path, plays_path):
    folder = tmp_path / "größe 漢字"
    folder.mkdir()
    (folder / "ñ.md").write_bytes((plays_path / "tragedies" / "hamlet.md").read_bytes())
    (folder / "tokenizer").symlink_to(llama3_tokenizer_path)
    process = start(folder / "ñ.md", folder / "tokenizer", folder / "rows")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"tokens in {folder}/rows\n" in out
    assert "read: 1 files (ñ.md)\n" in out
    assert {len(row) for row in saved_rows(folder / "rows")} == {4096}


def test_a_run_that_is_killed_leaves_no_rows_and_no_process(tmp_path, llama3_tokenizer_path, plays_path):
    text = "".join(play.read_text("utf-8") for play in sorted(plays_path.rglob("*.md"))[:12])
    (tmp_path / "long.txt").write_text(text * 20, encoding="utf-8")
    killed_by = {"rows9": signal.SIGKILL, "rows2": signal.SIGINT}
    runs = {name: start(tmp_path / "long.txt", llama3_tokenizer_path, tmp_path / name) for name in killed_by}
    for name, process in runs.items():
        while len(children_of(process.pid)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert list(tmp_path.glob(f".{name}.*"))
        process.send_signal(killed_by[name])
        process.communicate()  # returns once all that hold its stdout are gone: the workers too
        assert process.returncode == (-signal.SIGKILL if killed_by[name] == signal.SIGKILL else 130)
        assert not (tmp_path / name).exists()
    assert not list(tmp_path.rglob("state.json"))
    assert not list(tmp_path.glob(".rows2*"))


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
