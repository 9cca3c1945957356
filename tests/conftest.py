"""What several test files share."""

from pathlib import Path

import demo_assets
import pytest
import torch

import train

torch.set_num_threads(1)  # the tests' tensors are so small that a second thread only waits for the first


@pytest.fixture(scope="session", autouse=True)
def registered_loss() -> None:
    """The loss is an operator, as train.py makes it one, whatever a test traces."""
    train.register_loss()


@pytest.fixture(scope="session")
def llama3_tokenizer_path(tmp_path_factory) -> Path:
    """Folder of the real Llama-3 tokenizer (128,256 entries), converted once a session."""
    folder = tmp_path_factory.mktemp("tokenizer") / "llama3"
    demo_assets.llama3_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def plays_path() -> Path:
    """Folder of the 38 plays of Shakespeare as Markdown, in subfolders by genre."""
    return demo_assets.plays_folder()
