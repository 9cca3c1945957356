"""examples/llama3_8b_128k/ shows what compile writes; `make examples` writes it anew.

It does so with the versions of requirements.txt: another transformers computes the same in other statements, and
another ruff may break lines elsewhere.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "llama3_8b_128k"
COMPILE = ["--run_mode", "compile", "--engine", "torch", "--sequence_length", "131072", "--hardware", "h100"]
RANKS = ["--plan_ngpus", "8", "--runtime_ngpus", "8"]


def other_versions() -> list[str]:
    """The packages that the example depends on and that are not here as requirements.txt asks for them."""
    pins = dict(re.findall(r"^(torch|transformers|ruff)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert len(pins) == 3
    return [package for package, pin in pins.items() if installed_version(package) != pin]


def installed_version(package: str) -> str:
    try:
        return version(package).partition("+")[0]  # without the kind of build: 2.13.0+cpu
    except PackageNotFoundError:
        return ""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    paths = ["--model_id", str(EXAMPLE), "--compiled_dir", str(folder), "--name", "llama3_8b_128k"]
    train.main([*COMPILE, *RANKS, *paths])
    return folder / "llama3_8b_128k"


@pytest.mark.skipif(bool(other_versions()), reason=f"other versions here than made it: {', '.join(other_versions())}")
@pytest.mark.parametrize("name", ["gencode.py", "report.md"])
def test_the_example_of_llama3_8b_is_what_compile_writes_now(compiled, name):
    assert (EXAMPLE / name).read_text() == (compiled / name).read_text(), "run `make examples`, and look at the change"
