"""Seals: whatever byte of a sealed file changes, the file is named; what can't be compared is said."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from longctx import seal


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "sub").mkdir()
    for name, size in (("empty", 0), ("small", 5), ("sub/of two blocks", seal.BLOCK + 7)):
        (tmp_path / name).write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    return tmp_path


def test_a_digest_is_the_librarys_own_of_the_whole_file(files, monkeypatch):
    xxhash = pytest.importorskip("xxhash")
    content = (files / "sub/of two blocks").read_bytes()
    assert seal.digest(files / "sub/of two blocks") == f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"
    monkeypatch.delitem(seal.HASHERS, "xxh3_128")
    expected = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert seal.digest(files / "sub/of two blocks") == f"blake2b:{expected}"


def test_bytes_are_hashed_as_they_are_written(tmp_path):
    with open(tmp_path / "file", "wb") as opened:
        stream = seal.Hashing(opened)
        for part in (b"one", memoryview(b"two"), torch.arange(3).numpy().data):
            stream.write(part)
        assert stream.tell() == 3 + 3 + 3 * 8
    assert seal.seal(tmp_path, ["file"])["file"] == stream.seal()


@pytest.mark.parametrize("name", ["small", "sub/of two blocks"])
def test_a_flipped_byte_is_named(files, name):
    seals = seal.seal(files, seal.files_in(files))
    seal.verify(files, seals)
    content = (files / name).read_bytes()
    for place in {0, len(content) // 2, len(content) - 1}:
        (files / name).write_bytes(flipped(content, place))
        seal.check_sizes(files, seals)
        with pytest.raises(ValueError, match=f"^its file {name} is damaged: its bytes are not those"):
            seal.verify(files, seals)


def test_a_file_that_is_missing_or_of_another_size_is_named(files):
    seals = seal.seal(files, seal.files_in(files))
    (files / "small").write_bytes(b"shor")
    with pytest.raises(ValueError, match="^its file small has 4 bytes instead of 5"):
        seal.check_sizes(files, seals)
    (files / "small").unlink()
    with pytest.raises(ValueError, match="^its file small is missing"):
        seal.check_sizes(files, seals)
    with pytest.raises(ValueError, match="^its file small can't be read .*No such file"):
        seal.verify(files, seals)


def test_what_is_not_compared_is_said(files, monkeypatch, capsys):
    pytest.importorskip("xxhash")
    seals = seal.seal(files, ["small"])
    monkeypatch.delitem(seal.HASHERS, "xxh3_128")
    seal.verify(files, seals)
    assert "without comparing digests: they are xxh3_128's; pip install xxhash" in capsys.readouterr().out
    seal.verify(files, {"small": seal.Seal(5)})
    assert "without comparing digests: it was written before there were any" in capsys.readouterr().out


@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_sealed_by_its_last_value_and_any_flipped_byte_is_noticed(indent):
    facts = {"a": [1, {"b": "c"}], "d": None}
    content = seal.sealed_json(facts, indent)
    assert list(json.loads(content)) == ["a", "d", "digest"]
    assert seal.read_sealed_json(content) == (facts, True)
    assert seal.read_sealed_json(json.dumps(facts).encode()) == (facts, False)
    for place in range(len(content)):
        with suppress(ValueError):
            assert not seal.read_sealed_json(flipped(content, place))[1]  # whoever needs a seal then misses it


def test_a_seal_after_a_files_end_is_of_all_before_it_and_torch_reads_the_file_as_it_is(tmp_path):
    file = tmp_path / "file"
    torch.save({"a": torch.arange(10)}, file)
    size = file.stat().st_size
    assert seal.appended_seal(file) is None
    seal.append_seal(file)
    found = seal.appended_seal(file)
    assert found is not None and found.bytes == size
    seal.verify(tmp_path, {"file": found})
    assert torch.load(file, mmap=True, weights_only=True)["a"].tolist() == list(range(10))
    content = file.read_bytes()
    for place in (*range(0, size, 11), *range(size, len(content))):
        file.write_bytes(flipped(content, place))
        left = seal.appended_seal(file)
        if left is not None:
            with pytest.raises(ValueError, match="^its file file is damaged"):
                seal.verify(tmp_path, {"file": left})
        else:
            assert place >= size
