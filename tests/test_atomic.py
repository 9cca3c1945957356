"""Files and folders appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longctx import atomic
from longctx.atomic import HOST, publish_folder, whole_file, whole_folder, why_not_writable

ROOT = Path(__file__).parent.parent


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
        with whole_folder(path, ours=("mark",)) as aside:
            (aside / "mark").write_text(text)
    assert (path / "mark").read_text() == "new"
    with pytest.raises(RuntimeError), whole_folder(path, ours=("mark",)) as aside:
        (aside / "mark").write_text("half")
        raise RuntimeError
    assert (path / "mark").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_fails_leaves_none_of_the_folders_that_were_made_for_it(tmp_path, whole):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), whole(tmp_path / "there" / "new" / "newer" / "name"):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    name = "é" * 127 + "x"
    with whole_folder(tmp_path / name), whole_file(tmp_path / name[:-1]) as aside:
        aside.write_text("")
    assert sorted(os.listdir(tmp_path)) == [name[:-1], name]


@pytest.mark.parametrize("names", [["theirs"], ["mark", "theirs"], ["ours"]])
def test_a_folder_that_this_program_did_not_write_is_never_replaced(tmp_path, names):
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_text("theirs")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "folder", ours=("mark", "ours")) as aside:
        (aside / "mark").write_text("")
    assert sorted(os.listdir(tmp_path / "folder")) == sorted(names)


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_live_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".folder.writing-{HOST}-{dead.pid}").mkdir()
    (tmp_path / f".folder.writing-{HOST}-{os.getppid()}").mkdir()
    with whole_folder(tmp_path / "folder"):
        pass
    assert sorted(os.listdir(tmp_path)) == [f".folder.writing-{HOST}-{os.getppid()}", "folder"]


def test_what_another_host_writes_is_left_alone_whatever_runs_here(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in ("folder", "file"):
        (tmp_path / f".{name}.writing-elsewhere-{dead.pid}").mkdir()
    with whole_folder(tmp_path / "folder"), whole_file(tmp_path / "file") as aside:
        aside.write_text("")
    assert len(list(tmp_path.glob(f".*.writing-elsewhere-{dead.pid}"))) == 2


WRITE = """
import sys
from longctx.atomic import whole_folder
with whole_folder(sys.argv[1], ours=("old",)) as aside:
    (aside / "theirs").write_text("")
"""


@pytest.mark.parametrize("there_before", [False, True])
def test_of_two_processes_that_make_the_same_folder_the_first_keeps_its_place(tmp_path, there_before):
    path = tmp_path / "folder"
    if there_before:
        path.mkdir()
        (path / "old").write_text("")
    with whole_folder(path, ours=("old", "new")) as aside:
        (aside / "ours").write_text("")
        subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, cwd=ROOT)
    assert os.listdir(path) == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_process_that_comes_between_the_two_renames_keeps_its_place(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", os.rename
    path.mkdir()

    def rename_late(source, target):
        if target == path:
            subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, cwd=ROOT)
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", rename_late)
    with whole_folder(path, ours=("old", "new")) as aside:
        (aside / "ours").write_text("")
    assert os.listdir(path) == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_was_being_replaced_stays_until_its_place_is_taken(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", os.rename
    path.mkdir()
    (path / "old").write_text("")

    def killed_before_the_second(source, target):
        if target == path:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic.os, "rename", killed_before_the_second)
        (tmp_path / "new").mkdir()
        publish_folder(tmp_path / "new", path)
    [kept] = tmp_path.glob(".folder.old-*")
    assert os.listdir(kept) == ["old"]
    publish_folder(tmp_path / "new", path)
    assert os.listdir(tmp_path) == ["folder"]


def test_a_place_that_can_not_be_written_to_is_known_before_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    assert why_not_writable(tmp_path) is None
    assert why_not_writable(tmp_path / "a" / "b") is None
    for name in ("file", "link"):
        for path in (tmp_path / name, tmp_path / name / "a"):
            assert why_not_writable(path) == f"{tmp_path / name} is no folder"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may do everything
    assert why_not_writable(tmp_path / "a") == f"the folder {tmp_path} can't be written to"
