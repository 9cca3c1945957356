"""Ranks find each other in a store where ranks that are gone have left theirs."""

import os
import time
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from ranks import start_server

from longctx.runtime import parallel, rendezvous


def _rank(rank: int, port: int, heard, end) -> None:
    """A rank as torchrun starts it with a store of its own; it lives until `end` is set."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with parallel.process_group("cpu"):
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        heard.put(int(total))
        end.wait()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["rank 0 first", "rank 1 first"])
def test_ranks_that_are_restarted_meet_whatever_those_before_left_in_torchruns_store(order):
    """Who comes first finds the addresses of two ranks that are dead."""
    start_server()
    context = get_context("forkserver")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        heard, end = context.Queue(), context.Event()
        ranks = [context.Process(target=_rank, args=(rank, server.port, heard, end)) for rank in order]
        for rank in ranks:
            rank.start()
            time.sleep(0.3)
        try:
            assert [heard.get(timeout=20) for _ in ranks] == [3, 3]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def test_a_rank_that_never_starts_is_named_by_rank_zero(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(rendezvous, "_connect", lambda: server)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TimeoutError, match="^rank 1 has not started within 0:00:00.1"):
        rendezvous.fresh_store(timedelta(seconds=0.1))
