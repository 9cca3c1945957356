"""What a person or a machine did wrong is one line on stderr and exit status 2."""

import errno

import pytest

from longctx.errors import UserError, run_script


def said(capsys, error: Exception) -> str:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.split(": error: ", 1)[1].rstrip("\n")


def test_what_the_system_refuses_is_one_sentence(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "some/file")
    assert said(capsys, full) == "[Errno 28] No space left on device: 'some/file'"
    assert said(capsys, PermissionError("two\nlines")) == "two lines"


def test_a_sentence_of_ours_is_printed_whole(capsys):
    sentence = "--option: " + "word " * 100 + "end."
    assert said(capsys, UserError(sentence)) == sentence


def test_a_bug_keeps_its_traceback():
    def main() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_script(main)
