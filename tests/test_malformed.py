"""Whatever is wrong with an option or a file: one sentence that names it, status 2, no traceback, nothing left behind.

Values and contents are drawn at random. Set HYPOTHESIS_EXAMPLES to draw more of them than `make test` has time for.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import reference_model, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_rows import save_rows
from scripts import run_script as run_in_a_process
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bookcorpus
import ckpt_merger
import create_mini_model
import train
from longctx import measure
from longctx.command_line import fields_of, range_of
from longctx.compiler.hardware import HARDWARE
from longctx.errors import run_script
from longctx.job import Options
from longctx.runtime import parallel


def examples(number: int) -> settings:
    number = int(os.environ.get("HYPOTHESIS_EXAMPLES", number))
    return settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder, the current one, with everything that the scripts read, all of it valid."""
    folder = tmp_path_factory.mktemp("malformed")
    make_inputs(folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def make_inputs(folder: Path) -> None:
    reference_model(small_config("llama", num_hidden_layers=1)).save_pretrained(folder / "model")
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "to": 3, "be": 4}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    save_rows(folder / "rows", torch.randint(0, 5, (4, 16)))
    facts = {"tokenizer": "words", "vocab_size": 5, "largest_token": 4}
    (folder / "rows" / "corpus.json").write_text(json.dumps(facts))
    (folder / "profile.json").write_text(json.dumps({"hardware": asdict(HARDWARE["cpu"])}))
    (folder / "text").mkdir()
    (folder / "text" / "book.txt").write_text("to be to be " * 10)
    (folder / "file").write_text("a file")
    with contextlib.chdir(folder):
        train.main(words(COMPILE | {"name": "planned", "compiled_dir": "plans"}))


# --- commands --------------------------------------------------------------------------------------------------------

TRAIN = {"engine": "torch", "model_id": "model", "dataset_path": "rows", "precision": "fp32", "device": "cpu"}
COMPILE = {**TRAIN, "run_mode": "compile"}
BOOKS = {"data_path_or_name": "text", "tokenizer_path_or_name": "model", "save_path": "made", "sequence_length": 8}
# Of each script its main, its options, and a command line that is accepted.
SCRIPTS: dict[str, tuple[Callable[..., None], type, dict[str, Any]]] = {
    "train": (train.main, Options, COMPILE),
    "bookcorpus": (bookcorpus.main, bookcorpus.Asked, {**BOOKS, "num_proc": 1}),
    "create_mini_model": (create_mini_model.main, create_mini_model.Mini, {"model_id": "model", "output_id": "made"}),
    "ckpt_merger": (ckpt_merger.main, ckpt_merger.Merge, {"ckpt_dir": "checkpoints", "output_fname": "made"}),
    "measure": (measure.main, measure.Asked, {"output": "made.json"}),
}


def words(options: dict[str, Any]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


class Accepted(Exception):
    """Everything was checked, and the ranks are to be joined."""


@contextlib.contextmanager
def joining_no_ranks() -> Iterator[None]:
    """Inside, what comes after all checks is not done."""

    def accept(*_: object) -> None:
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "process_group", accept)
        patch.setattr(measure, "process_group", accept)
        yield


def refusal(main: Callable[..., None], options: dict[str, Any]) -> str | None:
    """The sentence with which a command is refused, with status 2 and nothing left behind; None if it is accepted."""
    before = listing(Path.cwd())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), joining_no_ranks():
        try:
            run_script(lambda: main(words(options)))
        except Accepted:
            return None
        except SystemExit as ended:
            assert ended.code == 2
        else:
            return None
    sentence = err.getvalue().rstrip("\n")
    assert sentence.count("\n") == 0 and ": error: " in sentence, sentence
    assert listing(Path.cwd()) == before, f"left behind by: {sentence}"
    return sentence.split(": error: ", 1)[1]


def listing(folder: Path) -> dict[str, int]:
    """Every name below a folder, with the size of what is there."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


# --- options ---------------------------------------------------------------------------------------------------------

NO_NAMES = st.sampled_from(["a\0b", "two\nlines", "\x1b[31m", "x" * 256, "x/" * 3000, "\ud800"])
NO_NUMBERS = st.one_of(
    st.sampled_from(["", "1e3", "nan", "inf", "-inf", "1e400", "0x10", "1 2", "--", "9" * 5000, "\0"]),
    st.text(max_size=5).filter(lambda text: not text.strip().replace("_", "").lstrip("+-").isdecimal()),
)


def malformed(field: dataclasses.Field, kind: Any) -> st.SearchStrategy[str]:
    """Values that an option can't have, by what its field says of it."""
    if kind is bool:
        return st.sampled_from(["yes", "1", ""])
    if kind not in (int, float):
        names = st.text(min_size=1, max_size=10).filter(lambda text: text not in (field.metadata["choices"] or (text,)))
        return names if field.metadata["choices"] else NO_NAMES
    allowed = range_of(field, kind)
    numbers = st.integers() if kind is int else st.one_of(st.floats(), st.integers())
    outside = numbers.filter(lambda number: number not in allowed).map(str)
    beside = [str(bound + step) for bound, step in ((allowed.at_least, -1), (allowed.at_most, 1)) if bound is not None]
    return st.one_of(NO_NUMBERS if kind is int else st.just("x"), outside, st.sampled_from(beside or ["nan"]))


def options_of(job_type: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    for field, kind in fields_of(job_type):
        if dataclasses.is_dataclass(kind):
            yield from options_of(kind)
        elif field.metadata:
            yield field, kind


@pytest.mark.parametrize("script", SCRIPTS)
@examples(20)
@given(data=st.data())
def test_a_value_that_an_option_can_not_have_is_refused_by_the_options_name(place, script, data):
    main, job_type, valid = SCRIPTS[script]
    field, kind = data.draw(st.sampled_from(list(options_of(job_type))))
    value = data.draw(malformed(field, kind))
    sentence = refusal(main, valid | {field.name: value})
    assert sentence is not None and f"--{field.name}" in sentence, sentence


# --- files -----------------------------------------------------------------------------------------------------------

RUN = {**TRAIN, "random_init": True, "max_train_steps": 1}
OF_PLAN = {"plan": "plans/planned/plan.json"}
AS_PLANNED = {"compiled_dir": "plans", "name": "planned"}  # up to date, so that no time is spent on compiling


@dataclass(frozen=True)
class Reader:
    """A command that is accepted and reads a file, and how many damages of the file are tried on it.

    What `can_do_without` makes of a file that can't be read is what it does where there is none.
    """

    file: str
    script: str
    options: dict[str, Any]
    examples: int = 6
    can_do_without: bool = False


READERS = [
    Reader("model/config.json", "train", COMPILE, 3),
    Reader("model/config.json", "create_mini_model", {"model_id": "model", "output_id": "made"}),
    Reader("model/generation_config.json", "train", RUN | AS_PLANNED),
    Reader("model/tokenizer.json", "train", RUN | AS_PLANNED),
    Reader("model/tokenizer_config.json", "train", RUN | AS_PLANNED),
    Reader("model/chat_template.jinja", "train", RUN | AS_PLANNED),
    Reader("model/tokenizer.json", "bookcorpus", {**BOOKS, "num_proc": 1}),
    Reader("model/tokenizer_config.json", "bookcorpus", {**BOOKS, "num_proc": 1}),
    Reader("model/config.json", "bookcorpus", {**BOOKS, "num_proc": 1}, can_do_without=True),
    Reader("rows/state.json", "train", COMPILE | AS_PLANNED),
    Reader("rows/corpus.json", "train", COMPILE | AS_PLANNED),
    Reader("rows/data-00000-of-00001.arrow", "train", COMPILE | AS_PLANNED),
    Reader("profile.json", "train", COMPILE | {"hardware": "profile.json"}, 3),
    Reader("plans/planned/plan.json", "train", COMPILE | OF_PLAN, 3),
    Reader("plans/planned/plan.json", "train", RUN | AS_PLANNED, 2, can_do_without=True),
]
NUMBERS = [True, -1, 0, 3, 2**31, 2**70, 0.5, -0.5, 1e30, float("nan"), float("inf")]
OTHER_VALUES = st.sampled_from([None, *NUMBERS, "", "x" * 500, [], [3], {}, [[[]]]])
FOLDER, LINK_TO_NOTHING = "a folder", "a link to nothing"


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value within a JSON value, but for the inputs of a plan, which are free."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if path == ("inputs",):
            return
        yield (*path, key)
        yield from places_in(inner, (*path, key))


@st.composite
def changed_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A value in it is removed, or one of another type or out of its range takes its place."""
    whole = json.loads(content)
    *path, last = draw(st.sampled_from(list(places_in(whole))))
    holder = whole
    for key in path:
        holder = holder[key]
    if draw(st.integers(0, 3)) == 0:
        del holder[last]
    else:
        holder[last] = draw(OTHER_VALUES)
    return json.dumps(whole).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes | str:
    """What a file may hold in place of `content`, or what may be in its place."""
    cut = draw(st.integers(0, max(len(content) - 2, 0)))
    others = [b"", content[:cut], content[:cut] + b"\xff\xfe" + content[cut:], b"[" * 100_000, b"3", b"null", b"[]"]
    return draw(st.sampled_from([*others, FOLDER, LINK_TO_NOTHING]))


@contextlib.contextmanager
def in_place_of(file: Path, content: bytes | str) -> Iterator[None]:
    """Inside, a file is another; afterwards all is as before."""
    kept = file.read_bytes()
    names = set(Path.cwd().iterdir())
    plans = {path: path.read_bytes() for path in Path("plans/planned").iterdir() if path.is_file()}
    file.unlink()
    if content == FOLDER:
        file.mkdir()
    elif content == LINK_TO_NOTHING:
        file.symlink_to("nowhere")
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        for new in set(Path.cwd().iterdir()) - names:
            shutil.rmtree(new) if new.is_dir() else new.unlink()
        for path, plan in plans.items():
            if path != file:
                path.write_bytes(plan)
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(kept)


def can_be_read(file: Path, damage: bytes | str) -> bool:
    """Whether what has taken the place of a file is a file, and JSON where that was."""
    if not isinstance(damage, bytes):
        return False
    try:
        return file.suffix != ".json" or isinstance(json.loads(damage), dict)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader.script}-{reader.file}")
def test_a_damaged_file_is_refused_by_its_name_if_it_can_not_be_read_or_what_is_in_it_can_not_be(place, reader):
    file, main = Path(reader.file), SCRIPTS[reader.script][0]
    content = file.read_bytes()
    damages = st.one_of(changed_json(content), damaged(content)) if file.suffix == ".json" else damaged(content)

    @examples(reader.examples)
    @given(damages)
    def refuse(damage: bytes | str) -> None:
        with in_place_of(file, damage):
            sentence = refusal(main, reader.options)
        if sentence is None:
            assert reader.can_do_without or can_be_read(file, damage)
        else:
            assert file.name in sentence or any(f"--{name} " in sentence for name in reader.options), sentence

    refuse()


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--seed", str(2**64)], ["--log_dir", "file/in"], ["--plan_ngpus=two"]])
def test_a_process_that_is_refused_ends_with_status_2_and_one_line_and_leaves_nothing(place, words):
    before = listing(place)
    result = run_in_a_process("train.py", *(f"--{name}={value}" for name, value in TRAIN.items()), *words, cwd=place)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("train.py: error: --") and result.stderr.count("\n") == 1
    assert listing(place) == before
