"""Files and folders appear whole or not at all."""

import os
import subprocess
import sys

import pytest

from files import whole_file, whole_folder


def test_a_file_keeps_its_old_contents_until_the_new_ones_are_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with whole_file(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_replaces_the_one_before_it_whole(tmp_path):
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with whole_folder(path) as aside:
            (aside / text).write_text(text)
    assert os.listdir(path) == ["new"]
    with pytest.raises(RuntimeError), whole_folder(path) as aside:
        (aside / "half").write_text("half")
        raise RuntimeError
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".folder.writing-{dead.pid}").mkdir()
    (tmp_path / f".folder.writing-{os.getppid()}").mkdir()
    with whole_folder(tmp_path / "folder"):
        pass
    assert sorted(os.listdir(tmp_path)) == [f".folder.writing-{os.getppid()}", "folder"]
