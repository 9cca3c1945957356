"""On a GPU the host issues a micro-batch, forward and backward, without once waiting for what the GPU computes."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import random_rows, small_config
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from longctx import devices
from longctx.compiled import read_plan_file
from longctx.data.rows import apart
from longctx.runtime import parallel, trainer

LENGTH = 256


def compile_for(n_ranks: int, folder: Path, *more: str) -> Path:
    """A small Llama's code in bfloat16, whose rows `n_ranks` compute together."""
    small_config("llama").save_pretrained(folder / "model")
    options = ["--run_mode", "compile", "--engine", "torch", "--hardware", "h100", "--sequence_length", str(LENGTH)]
    options += ["--plan_ngpus", str(n_ranks), "--runtime_ngpus", str(n_ranks)]
    train.main(
        [*options, *more, "--model_id", str(folder / "model"), "--compiled_dir", str(folder), "--name", "compiled"]
    )
    return folder / "compiled"


@contextmanager
def rank_0_of(n_ranks: int):
    """This process as one of several ranks; the others are not there, and collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("starts", [(), (0, 100, 101, 180)], ids=["one text", "documents"])
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_micro_batch_does_not_wait_for_the_gpu(n_ranks, starts, tmp_path):
    compiled = compile_for(n_ranks, tmp_path, *(["--document_mask"] if starts else []))
    plan = read_plan_file(compiled).module
    device = devices.take("cuda")
    row = random_rows(1, LENGTH, 256)
    rows = [apart(*row, starts), apart(*row, (0, *starts[2:]))] if starts else [row, row]
    with rank_0_of(n_ranks):
        module = parallel.load_generated(compiled, plan.class_name)
        model = parallel.parallelize(module, plan.layers_path, device, torch.bfloat16, n_ranks, plan.plan_sharded)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        trainer.micro_batch(model, rows[0])  # the first compiles kernels and takes memory, for which it waits
        with waiting_is_an_error():
            trainer.micro_batch(model, rows[1])


def test_a_row_is_computed_where_it_is_on_a_cpu():
    row = apart(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), (0, 2))
    assert all(sent is given for sent, given in zip(trainer.send(row, torch.device("cpu")), row, strict=True))
