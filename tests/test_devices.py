"""Which device ranks compute on, how they talk, and how they end: none waits for others that will not come."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from longctx import devices
from longctx.compiled import Predicted
from longctx.engines.builtin.run import saying_what_was_predicted
from longctx.errors import OutOfMemory, UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def machine(monkeypatch):
    """Makes this one that has so many GPUs, and this process a rank of a node; returns what set_device was given."""

    def make(n_gpus: int, local_rank: int = 0, ranks_on_node: int = 1) -> list[torch.device]:
        taken: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        for of_node in ("", "LOCAL_"):
            monkeypatch.setenv(f"{of_node}RANK", str(local_rank))
            monkeypatch.setenv(f"{of_node}WORLD_SIZE", str(ranks_on_node))
        for name in devices.ALLOCATOR_SETTINGS:
            monkeypatch.delenv(name, raising=False)
        return taken

    return make


@pytest.mark.parametrize(
    ("asked", "n_gpus", "kind"), [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda")]
)
def test_auto_takes_a_gpu_where_there_is_one(machine, asked, n_gpus, kind):
    machine(n_gpus)
    assert devices.choose(asked) == kind


def test_a_gpu_that_is_not_there_is_refused_before_the_rows_are_opened(machine):
    machine(0)
    with pytest.raises(UserError, match=r"^--device cuda: PyTorch .* sees no GPU here \(.*\); choose cpu, or auto$"):
        train.main(["--model_id", "any", "--dataset_path", "nowhere", "--device", "cuda"])


def test_nnscaler_on_cpus_is_refused(machine, monkeypatch):
    machine(1)
    monkeypatch.setattr("longctx.engines.nnscaler.options._why_it_can_not_be_imported", lambda: None)
    with pytest.raises(
        UserError, match="^--device cpu: the nnscaler engine works on GPUs only; choose --engine torch$"
    ):
        train.main(["--model_id", "any", "--engine", "nnscaler", "--device", "cpu"])


@pytest.mark.parametrize(
    ("n_gpus", "local_rank", "ranks_on_node", "index", "backend"),
    [
        (8, 5, 8, 5, "cpu:gloo,cuda:nccl"),
        (8, 3, 4, 3, "cpu:gloo,cuda:nccl"),
        (1, 1, 2, 0, "gloo"),
        (2, 3, 4, 1, "gloo"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own_or_shares_one_and_talks_by_gloo(
    machine, n_gpus, local_rank, ranks_on_node, index, backend
):
    taken = machine(n_gpus, local_rank, ranks_on_node)
    device = devices.take("cuda")
    assert taken == [device] == [torch.device("cuda", index)]
    assert devices.backend(device) == backend


def test_what_ranks_that_share_a_gpu_give_up_is_said(machine):
    machine(1, 0, 2)
    assert devices.describe_sharing().startswith("2 ranks share 1 GPU: they talk by gloo, through the CPU, ")


def test_a_run_on_cpus_touches_no_gpu(machine):
    taken = machine(8, 5, 8)
    assert devices.take("cpu") == torch.device("cpu")
    assert taken == [] and devices.backend(torch.device("cpu")) == "gloo"


@pytest.mark.parametrize("setting", [None, *devices.ALLOCATOR_SETTINGS])
def test_segments_can_grow_unless_the_user_has_settled_how_memory_is_taken(machine, monkeypatch, setting):
    machine(1)
    if setting:
        monkeypatch.setenv(setting, "max_split_size_mb:64")
    devices.take("cuda")
    expected = {setting: "max_split_size_mb:64"} if setting else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: os.environ[name] for name in devices.ALLOCATOR_SETTINGS if name in os.environ} == expected


def test_a_gpu_out_of_memory_becomes_a_sentence_that_says_what_the_plan_had_predicted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70.04e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 79.26e9)
    predicted = Predicted(time={}, memory={"saved": 40e9, "loss": 23.8e9, "moment": "loss"}, parts={})
    sentence = (
        r"the GPU of rank 0 is out of memory, with 70.0 GB allocated and 79.3 reserved at most, where the plan had "
        r"predicted 63.8$"
    )
    with pytest.raises(OutOfMemory, match=sentence), saying_what_was_predicted(predicted):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# --- how ranks end ---------------------------------------------------------------------------------------------------

RANK = """
import sys
import torch, torch.distributed as dist
from longctx import errors
from longctx.runtime.parallel import process_group

def main():
    with process_group("cpu"):
        other = dist.new_group([0, 1])
        if dist.get_rank() == int(sys.argv[1]):
            # As FSDP's next all-gather is under way, which the other rank will not take part in.
            under_way = dist.all_reduce(torch.ones(1), group=other, async_op=True)
            raise {"UserError": errors.UserError, "RuntimeError": RuntimeError}[sys.argv[2]]("this rank failed")
        dist.all_reduce(torch.ones(1))

errors.OTHER_RANKS_WAIT_S = 0
errors.run_script(main)
"""


@pytest.mark.parametrize(("failing", "error", "status"), [(0, "UserError", 2), (1, "RuntimeError", 1)])
def test_a_rank_that_fails_ends_at_once_and_so_does_one_that_waits_for_it_in_a_collective(failing, error, status):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    of_torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = {**os.environ, **of_torchrun, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(failing), error],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[failing].returncode == status and processes[1 - failing].returncode not in (0, None)
    assert "".join(said).count("this rank failed") == 1
    assert time.monotonic() - started < 100
