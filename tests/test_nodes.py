"""Several nodes: what they have to share is checked before anything is trained."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

from longctx.errors import CheckpointFolderError
from longctx.runtime import parallel
from longctx.runtime.shared_folder import check_shared


def check_shared_on_rank(shared: Path, own: list[Path]) -> None:
    """Each rank is a node, whose disk has its own one of the folders `own` under the name that all use."""
    os.environ["GROUP_RANK"] = os.environ["RANK"]
    with parallel.process_group():
        check_shared(shared)
        sentence = "^node 1 does not see what node 0 writes there, .*; name a folder on a disk that they share"
        with pytest.raises(CheckpointFolderError, match=sentence):
            check_shared(own[dist.get_rank()])


def test_a_folder_that_a_node_does_not_share_is_refused_and_nothing_stays_of_the_question(tmp_path):
    (tmp_path / "shared").mkdir()
    run_ranks(2, check_shared_on_rank, tmp_path / "shared", [tmp_path / "a" / "checkpoints", tmp_path / "b"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "shared"]
