"""What the documentation names, exists: links, files, scripts, options, messages and places in the code."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from scripts import run_script

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md"), *ROOT.glob("longctx/**/*.md")]
)
FOLDERS = ("longctx", "docs", "examples", "benchmarks", "tests")
PROGRAMS = (
    "train.py",
    "ckpt_merger.py",
    "create_mini_model.py",
    "bookcorpus.py",
    "longctx.measure",
    "benchmarks/gpu.py",
)
QUOTED = 12  # characters that a piece of a message has at least, to be looked for

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, no punctuation, dashes for spaces."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code_spans(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's code blocks and code spans."""
    blocks = re.findall(r"^(?: {4}|\$ )(\S.*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
    for line in (*blocks, *code_spans(page)):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe: no command, but a quoted sentence
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            del words[0]
        if words and words[0] in ("python", "torchrun"):
            yield words


def all_commands() -> Iterator[list[str]]:
    return (command for page in PAGES for command in commands(page))


def program_of(command: list[str]) -> tuple[str, list[str]]:
    """The script or module that a command runs ('' for none), and the words that it is given."""
    for place, word in enumerate(command):
        if word.endswith(".py"):
            return word, command[place + 1 :]
        if word.startswith("longctx.") and command[place - 1] == "-m":
            return word, command[place + 1 :]
    return "", []


def options_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}


@cache
def help_of(program: str) -> str:
    """What a script or module prints with --help."""
    result = run_script(program, "--help")
    assert result.returncode == 0, result.stderr
    return result.stdout


def has_option(program: str, option: str) -> bool:
    return re.search(rf"{re.escape(option)}\b(?!_)", help_of(program)) is not None


def test_the_commands_that_are_checked_include_those_that_run_a_module():
    assert any(program_of(command) == ("longctx.measure", ["--output", "profile.json"]) for command in all_commands())


@each_page
def test_every_relative_link_of_a_page_leads_to_a_file_and_a_heading_in_it(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@each_page
def test_every_path_of_the_repository_that_a_page_names_exists(page):
    for span in code_spans(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", span):
            assert list(ROOT.glob(span.rstrip("/"))), span


@each_page
def test_every_program_that_a_page_runs_exists(page):
    for command in commands(page):
        program, _ = program_of(command)
        file = program if program.endswith(".py") else program.replace(".", "/") + ".py"
        assert not program or (ROOT / file).is_file(), command


@each_page
def test_every_option_that_a_page_gives_to_a_program_is_in_its_help(page):
    for command in commands(page):
        program, words = program_of(command)
        for option in options_in(words):
            assert has_option(program, option), command


@each_page
def test_every_option_that_a_page_names_by_itself_is_in_the_help_of_a_program(page):
    for span in code_spans(page):
        for option in options_in(span.split()[:1]):
            assert any(has_option(program, option.rstrip(":")) for program in PROGRAMS), span


@each_page
def test_no_page_has_a_part_that_is_still_to_be_written(page):
    assert "TODO" not in page.read_text()


@cache
def strings_of_the_program() -> list[str]:
    """Every string in the sources, with a 0 byte for each value that an f-string puts in."""
    strings = []
    for file in (*ROOT.glob("*.py"), *ROOT.glob("longctx/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


def test_every_message_that_the_troubleshooting_page_quotes_is_one_of_the_programs():
    spans = code_spans(ROOT / "docs" / "troubleshooting.md")
    for span in (span for span in spans if "…" in span or (span.count(" ") >= 3 and "--" not in span)):
        message = re.sub(r"^--\w+ \S+: ", "", span)  # the script puts the option there, and may add advice after a ;
        for piece in re.split("…|; ", message):
            found = len(piece) < QUOTED or any(piece.strip(" ;") in string for string in strings_of_the_program())
            assert found, f"{piece!r} of {span!r}"


def names_defined_in(file: Path) -> set[str]:
    """The functions, classes and variables at the top level of a file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
    return names - {None}


def test_every_place_on_the_map_in_train_py_is_where_the_map_says():
    text = ast.get_docstring(ast.parse((ROOT / "train.py").read_text()))
    places = re.findall(r"([\w/]+\.py): (\w+(?:, \w+)*)", text)
    assert len(places) > 10
    for file, names in places:
        assert set(names.split(", ")) <= names_defined_in(ROOT / "longctx" / file), (file, names)
