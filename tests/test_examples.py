"""examples/llama3_8b_128k/ shows what compile writes; `make examples` writes it anew."""

from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "llama3_8b_128k"
COMPILE = ["--run_mode", "compile", "--engine", "torch", "--sequence_length", "131072", "--hardware", "h100"]
RANKS = ["--plan_ngpus", "8", "--runtime_ngpus", "8"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    paths = ["--model_id", str(EXAMPLE), "--compiled_dir", str(folder), "--name", "llama3_8b_128k"]
    train.main([*COMPILE, *RANKS, *paths])
    return folder / "llama3_8b_128k"


@pytest.mark.parametrize("name", ["gencode.py", "report.md"])
def test_the_example_of_llama3_8b_is_what_compile_writes_now(compiled, name):
    assert (EXAMPLE / name).read_text() == (compiled / name).read_text(), "run `make examples`, and look at the change"
