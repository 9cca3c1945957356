"""bookcorpus.py loses and repeats no token, says in one sentence what is wrong, and leaves nothing half-written."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import bookcorpus
import longctx.data.documents
import longctx.data.tokens
from longctx.errors import UserError

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
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["bookcorpus.py", *words])
        if "tokenizer_path_or_name" not in options:
            monkeypatch.setattr(bookcorpus, "load_tokenizer", lambda name: tokenizer)
        bookcorpus.main()
        return Path(given["save_path"])

    return run_main


def one_at_a_time(tokenizer, texts) -> list[int]:
    """What the corpus must be, by transformers alone: every document tokenized whole, by itself."""
    documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts if text]
    return [token for ids in documents for token in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)]


def saved_rows(folder) -> list[list[int]]:
    return datasets.load_from_disk(str(folder))["input_ids"][:]


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
        if not whole:
            with pytest.raises(UserError, match=f"{len(expected):,} tokens"):
                bookcorpus.write_rows(folder, tokens, len(texts), sequence_length)
            return
        counts = bookcorpus.write_rows(folder, tokens, len(texts), sequence_length)
    rows = saved_rows(folder)
    assert [token for row in rows for token in row] == expected[:whole]
    assert {len(row) for row in rows} == {sequence_length}
    assert counts == {
        "documents": sum(map(bool, texts)),
        "empty_documents": texts.count(""),
        "tokens": len(expected),
        "rows": whole // sequence_length,
        "tail_dropped": len(expected) - whole,
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
        found = np.concatenate([tokens.ids for tokens in longctx.data.tokens.tokenize(documents, tokenizer, 1)])
    assert found.tolist() == one_at_a_time(tokenizer, [text])


def test_a_long_text_file_is_read_in_pieces_and_tokenized_on_all_processes(
    run, monkeypatch, tmp_path, tokenizer, plays_path
):
    play = (plays_path / "tragedies" / "macbeth.md").read_bytes().decode()
    (tmp_path / "long.txt").write_text(play, encoding="utf-8", newline="")
    in_pieces_of(monkeypatch, 10_000, 1_000)
    documents = list(longctx.data.documents.read_text(tmp_path / "long.txt", "text"))
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

    def load_dataset(name, split, revision=None):
        asked.append((name, split, revision))
        return datasets.Dataset.from_dict({"text": FIVE}) if revision else real(str(script), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expect(run("someone/some-script"), tokenizer, FIVE)
    assert asked == [("someone/some-script", "train", None), ("someone/some-script", "train", "refs/convert/parquet")]


def test_corpus_json_records_what_the_rows_are_made_of_and_the_counts_are_printed(run, tmp_path, tokenizer, capsys):
    write_jsonl(tmp_path / "data.jsonl", FIVE)
    tokens = len(one_at_a_time(tokenizer, FIVE))
    record = json.loads((run(tmp_path / "data.jsonl") / "corpus.json").read_text())
    assert record.pop("made_with").keys() >= {"datasets", "tokenizers", "transformers"}
    assert record == {
        "data": str(tmp_path / "data.jsonl"),
        "text_key": "text",
        "tokenizer": str(tmp_path),
        "vocab_size": 128256,
        "sequence_length": 8,
        "documents": 4,
        "empty_documents": 1,
        "tokens": tokens,
        "rows": tokens // 8,
        "tail_dropped": tokens % 8,
    }
    assert f"4 documents, {tokens} tokens -> {tokens // 8} rows of 8" in capsys.readouterr().out


def test_rows_are_int32_in_one_column(run, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", FIVE)
    saved = datasets.load_from_disk(str(run(tmp_path / "data.jsonl")))
    assert saved.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


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
    assert "there exists already" in refused(run, tmp_path, save_path=tmp_path / "there")
    assert "./absent: there is no such file or folder" in refused(run, "./absent")
    assert "a/b/c: there is no such file or folder" in refused(run, tmp_path, tokenizer_path_or_name="a/b/c")


def test_without_the_library_datasets_the_sentence_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bookcorpus, "find_spec", lambda name: None)
    said = refused(run, tmp_path)
    assert said == "the package datasets, which rows are saved with, is not installed; pip install datasets"
    assert not (tmp_path / "rows").exists()


ADVICE = "name a column of text with --text_key"


def broken_inputs():
    """File name, its content, and what the sentence must say."""
    yield "short.txt", b"To be", "the corpus has 4 tokens, too few for a row of 8"
    yield "text.pdf", b"To be", "no text there, that is, no file of .txt, .md, .jsonl, .parquet"
    yield "latin1.txt", b"caf\xe9 " * 20, "latin1.txt: not UTF-8"
    yield "latin1.jsonl", b'{"text": "caf\xe9"}', "latin1.jsonl: line 1: 'utf-8' codec can't decode"
    yield "a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl: line 3: not JSON: "
    yield "list.jsonl", b'["a"]', "list.jsonl: line 1: not a JSON object"
    yield "key.jsonl", b'{"title": "a", "body": "b"}', f"key.jsonl: line 1: no column text, only title, body; {ADVICE}"
    yield "number.jsonl", b'{"text": 3}', f"number.jsonl: line 1: text holds 3, not text; {ADVICE}"
    yield "half.jsonl", rb'{"text": "\ud800"}', "half.jsonl: line 1: 'utf-8' codec can't encode character"
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


def test_a_tokenizer_that_cannot_be_used_is_refused(run, tmp_path, tokenizers_by_kind):
    tokenizers_by_kind["unigram"].save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())
    for token in ("bos", "eos"):
        shutil.copytree(tmp_path / "whole", tmp_path / f"no_{token}")
        without = {key: value for key, value in config.items() if key != f"{token}_token"}
        (tmp_path / f"no_{token}" / "tokenizer_config.json").write_text(json.dumps(without))
        assert f"it has no {token} token" in refused(run, tmp_path, tokenizer_path_or_name=tmp_path / f"no_{token}")
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
        # A job that a shell runs in the background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_corpus_too_short_ends_with_status_2_and_one_line(tmp_path, llama3_tokenizer_path):
    (tmp_path / "short.md").write_text("To be, or not to be")
    process = start(tmp_path, llama3_tokenizer_path, tmp_path / "rows")
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert err == "bookcorpus.py: error: the corpus has 9 tokens, too few for a row of 4,096\n"
    assert [path.name for path in tmp_path.iterdir()] == ["short.md"]


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
