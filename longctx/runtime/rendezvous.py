"""The store by which ranks find each other: no key in it is left from ranks that ran before.

torchrun keeps one key-value store for as long as it lives. When it restarts the ranks, the keys of those before are
still there, and init_process_group by itself uses the same ones again: a rank then finds the address of a neighbour
that is dead, and connects to it in vain. So whenever the ranks start, they agree on a prefix for their keys that none
has used before. torchrun's own count of restarts would not do: each node counts for itself, and a node that only joins
another's restart does not count it.
"""

import functools
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from longctx import torchrun

START_TIMEOUT = timedelta(hours=1)  # for the rank that is furthest behind
POLL_S = 0.02


def fresh_store(timeout: timedelta = START_TIMEOUT) -> dist.Store:
    """A store that all ranks share, and that is empty when the first of them has it. All ranks have to call this.

    Each call waits for all ranks, since one may be an hour behind: its node downloads the model that another has.

    Raises:
        TimeoutError: rank 0 has not heard of every rank in time.
        DistStoreError: another rank has not heard of rank 0 in time.
    """
    store = _connect()
    prefix = _answer_all(store, timeout) if torchrun.rank() == 0 else _ask_rank_zero(store, timeout)
    return dist.PrefixStore(prefix, store)


@functools.cache  # where it is rank 0's own, it ends with the object
def _connect() -> dist.Store:
    """torchrun's store, or rank 0's where torchrun has none; with keys of whoever was there before."""
    return next(dist.rendezvous("env://"))[0]


def _ask_rank_zero(store: dist.Store, timeout: timedelta) -> str:
    """The prefix that rank 0 has drawn. The question is a new one, so only rank 0 as it runs now can answer it."""
    question = uuid.uuid4().hex
    store.set(_question_of(torchrun.rank()), question)
    store.wait([_answer_to(question)], timeout)
    prefix = store.get(_answer_to(question)).decode()
    store.set(_heard(prefix, torchrun.rank()), "")
    return prefix


def _answer_all(store: dist.Store, timeout: timedelta) -> str:
    """Draws a prefix and tells it to every rank. A question may be a dead rank's: it answers until all have heard."""
    prefix = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, torchrun.world_size()))
    while missing:
        for rank in tuple(missing):
            if store.check([_heard(prefix, rank)]):
                missing.remove(rank)
            elif store.check([_question_of(rank)]):
                store.set(_answer_to(store.get(_question_of(rank)).decode()), prefix)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"rank {min(missing)} has not started within {timeout}; look at its node's output")
        time.sleep(POLL_S if missing else 0)
    return prefix


def _question_of(rank: int) -> str:
    return f"question of rank {rank}"


def _answer_to(question: str) -> str:
    return f"answer to {question}"


def _heard(prefix: str, rank: int) -> str:
    return f"{prefix} heard by rank {rank}"
