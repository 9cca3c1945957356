"""A checkpoint's shards load into any number of ranks and any plan, and training goes on as if nothing had changed."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from families import reference_model, small_config
from plain_training import train_plainly
from ranks import run_ranks
from saved_checkpoints import save
from saved_rows import save_rows
from torch import nn
from transformers import AutoModelForCausalLM

import bookcorpus
import train
from longctx.data.order import Position
from longctx.data.tokens import Tokens
from longctx.engines.checkpoints import FORMATS
from longctx.errors import UserError
from longctx.job import Job
from longctx.runtime import checkpoint, parallel, resume, trainer
from longctx.runtime.metrics import peak_memory_bytes

# --- tensors ---------------------------------------------------------------------------------------------------------

# Sizes that ranks do not divide evenly, and dimensions that plans of 2 and of 4 do.
SHAPES = {"embedding": (13, 8), "up": (8, 12), "down": (12, 8), "norm": (5,), "one": (1, 3)}
MAY_BE_PLAN_SHARDED = {"embedding": (1,), "up": (0, 1), "down": (0, 1)}


@dataclass(frozen=True)
class Layout:
    """How tensors lie: the ranks, those of one plan, and the dimensions along which it splits weights."""

    n_ranks: int
    plan_ngpus: int
    plan_sharded: dict[str, int]


def draw_layout(draw: random.Random) -> Layout:
    n_ranks = draw.choice([1, 2, 3, 4])
    plan_ngpus = draw.choice([size for size in (1, 2, 4) if n_ranks % size == 0])
    weights = MAY_BE_PLAN_SHARDED if plan_ngpus > 1 else {}
    chosen = [name for name in weights if draw.random() < 0.5]
    return Layout(n_ranks, plan_ngpus, {name: draw.choice(weights[name]) for name in chosen})


def whole_tensors(factor: float) -> dict[str, torch.Tensor]:
    """A tensor for each of SHAPES, of which no two elements are alike."""
    draw = torch.Generator().manual_seed(int(factor))
    return {name: torch.rand(shape, generator=draw) for name, shape in SHAPES.items()}


def model_on_rank(layout: Layout, device: torch.device, shapes: dict = SHAPES) -> tuple:
    """A module of these parameters, and its optimizer; a part of a plan-sharded weight, as generated code has it."""
    module = nn.Module()
    for name, shape in shapes.items():
        sizes = list(shape)
        if name in layout.plan_sharded:
            sizes[layout.plan_sharded[name]] //= layout.plan_ngpus
        module.register_parameter(name, nn.Parameter(torch.empty(sizes, device="meta")))
    model = parallel.parallelize(module, "", device, torch.float32, layout.plan_ngpus, layout.plan_sharded)
    job = Job(model_id="any", sequence_length=1, runtime_ngpus=1, name="any")
    return model, trainer.make_optimizer(model, job)


def save_on_rank(folder: Path, layout: Layout, factor: float) -> None:
    with parallel.process_group("cpu") as device:
        model, optimizer = model_on_rank(layout, device)
        parallel.load_tensors(model, whole_tensors(factor).items())
        for name, parameter in model.module.named_parameters():
            state = optimizer.state[parameter]
            state["step"].fill_(factor)
            for offset, key in enumerate(("exp_avg", "exp_avg_sq"), start=1):
                whole = whole_tensors(factor + offset)[name]
                parallel.load_slice(model.globally(name, state[key]), whole.__getitem__)
        shapes = checkpoint.parameter_shapes(model)
        state = checkpoint.State(Position(1, 0, 0), 0, 8, layout.n_ranks, layout.plan_ngpus, shapes)
        save(folder, model, optimizer, state)


def check_on_rank(folder: Path, layout: Layout, factor: float) -> None:
    """Asserts that what is loaded is bit for bit what was saved."""
    with parallel.process_group("cpu") as device:
        model, optimizer = model_on_rank(layout, device)
        path = resume.find(folder, None, "torch", FORMATS)
        checkpoint.load(checkpoint.read(path, FORMATS), model, optimizer)
        for name, parameter in model.module.named_parameters():
            state = optimizer.state[parameter]
            assert state["step"] == factor
            for offset, tensor in enumerate((parameter.detach(), state["exp_avg"], state["exp_avg_sq"])):
                whole = model.globally(name, tensor)
                assert torch.equal(whole.full_tensor(), whole_tensors(factor + offset)[name]), (name, offset)


@pytest.mark.parametrize("seed", range(5))
def test_what_one_layout_saved_another_loads_bit_for_bit(tmp_path, seed):
    draw = random.Random(seed)
    before, after = draw_layout(draw), draw_layout(draw)
    run_ranks(before.n_ranks, save_on_rank, tmp_path, before, seed, start_method="fork")
    run_ranks(after.n_ranks, check_on_rank, tmp_path, after, seed, start_method="fork")


# --- memory ----------------------------------------------------------------------------------------------------------

LARGE = {f"weight{i}": (1024, 1024) for i in range(8)}  # 4 MiB each, and as much twice again for the optimizer
LARGE_BYTES = 3 * sum(4 * rows * columns for rows, columns in LARGE.values())


def save_large_on_rank(folder: Path, layout: Layout) -> None:
    with parallel.process_group("cpu") as device:
        model, optimizer = model_on_rank(layout, device, LARGE)
        parallel.load_tensors(model, ((name, torch.ones(size)) for name, size in LARGE.items()))
        shapes = checkpoint.parameter_shapes(model)
        state = checkpoint.State(Position(1, 0, 0), 0, 8, layout.n_ranks, layout.plan_ngpus, shapes)
        save(folder, model, optimizer, state)


def weigh_load_on_rank(folder: Path, layout: Layout) -> None:
    """Asserts that a load takes little memory beside this rank's own part of the tensors, which is there before."""
    with parallel.process_group("cpu") as device:
        model, optimizer = model_on_rank(layout, device, LARGE)
        own = [tensor for tensor in checkpoint._named_tensors(model, optimizer).values() if tensor.dim()]
        for tensor in own:
            parallel.local(tensor).fill_(1)  # only now has it memory
        assert sum(parallel.local(tensor).nbytes for tensor in own) == LARGE_BYTES / layout.n_ranks
        before = peak_memory_bytes("cpu")
        path = resume.find(folder, None, "torch", FORMATS)
        checkpoint.load(checkpoint.read(path, FORMATS), model, optimizer)
        assert peak_memory_bytes("cpu") - before < LARGE_BYTES / 2


def test_no_rank_holds_the_whole_model_while_it_loads_what_other_ranks_saved(tmp_path):
    run_ranks(1, save_large_on_rank, tmp_path, Layout(1, 1, {}), start_method="fork")
    run_ranks(4, weigh_load_on_rank, tmp_path, Layout(4, 1, {}), start_method="fork")


# --- training --------------------------------------------------------------------------------------------------------

N_ROWS, LENGTH, RATE = 22, 32, 1e-3


@dataclass(frozen=True)
class Stage:
    """A run that goes on from the one before it, up to its last step."""

    n_ranks: int
    plan_ngpus: int
    rows_per_step: int
    last_step: int


STAGES = (
    Stage(n_ranks=2, plan_ngpus=1, rows_per_step=4, last_step=2),
    Stage(n_ranks=4, plan_ngpus=2, rows_per_step=4, last_step=4),
    Stage(n_ranks=1, plan_ngpus=1, rows_per_step=4, last_step=5),
    Stage(n_ranks=2, plan_ngpus=2, rows_per_step=3, last_step=8),  # takes what is left of the epoch in one short step
)


def words_of(folder: Path, stage: Stage, name: str) -> list[str]:
    """train.py's options for a stage."""
    words = ["--model_id", str(folder / "model"), "--dataset_path", str(folder / "rows"), "--name", name]
    words += ["--compiled_dir", str(folder / "compiled"), "--log_dir", str(folder / "runs")]
    words += ["--checkpoint_dir", str(folder / "checkpoints"), "--hardware", "cpu", "--precision", "fp32"]
    words += ["--plan_ngpus", str(stage.plan_ngpus), "--runtime_ngpus", str(stage.n_ranks)]
    accumulation = stage.rows_per_step * stage.plan_ngpus // stage.n_ranks
    words += ["--grad_accumulation_steps", str(accumulation), "--learning_rate", str(RATE), "--weight_decay", "0.1"]
    words += ["--max_grad_norm", "3.0", "--max_epochs", "9", "--max_train_steps", str(stage.last_step)]
    return [*words, "--engine", "torch", "--device", "cpu"]


def random_tokens() -> torch.Tensor:
    return torch.randint(0, 256, (N_ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def test_a_run_that_goes_on_in_one_layout_after_another_trains_as_one_that_never_stopped(tmp_path):
    save_rows(tmp_path / "rows", random_tokens())
    check_stages(tmp_path, STAGES)


def test_rows_of_documents_that_do_not_see_each_other_train_as_the_documents_one_by_one(tmp_path):
    """bookcorpus.py packs the rows, of which some begin within a document; the second run goes on from the first's."""
    pytest.importorskip("datasets", reason="bookcorpus.py saves rows with the package datasets")
    begins = [0, *sorted(random.Random(0).sample(range(1, N_ROWS * LENGTH), 50))]
    texts = np.split(random_tokens().flatten().int().numpy(), begins[1:])
    (tmp_path / "rows").mkdir()
    bookcorpus.write_rows(tmp_path / "rows", [Tokens(text, np.zeros(1, np.int64)) for text in texts], 1, LENGTH)
    rows = range(0, N_ROWS * LENGTH, LENGTH)
    documents = [(0, *(begin - row for begin in begins if 0 < begin - row < LENGTH)) for row in rows]
    check_stages(tmp_path, STAGES[:2], "--document_mask", documents=documents)
    words = words_of(tmp_path, STAGES[2], "without")
    with pytest.raises(UserError, match="^--document_mask False: .* is of a run with it, .*; pass it, or export"):
        train.main(words)


def check_stages(
    folder: Path, stages: Sequence[Stage], *options: str, documents: Sequence[tuple[int, ...]] = ()
) -> None:
    """Each stage loads the shards that the one before it saved; the plain loop takes the same rows all along."""
    reference_model(small_config("llama")).save_pretrained(folder / "model")
    per_step, losses = [], {}
    for number, stage in enumerate(stages):
        name = f"stage{number}"
        words = [*words_of(folder, stage, name), *options]
        train.main([*words, "--run_mode", "compile"])  # here, where what compiling imports is there already
        run_ranks(stage.n_ranks, train.main, words, start_method="fork")
        per_step += [stage.rows_per_step] * (stage.last_step - len(per_step))
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses |= {line["step"]: (line["loss"], line["grad_norm"]) for line in map(json.loads, lines)}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    steps = train_plainly(model, random_tokens(), per_step, [RATE] * len(per_step), documents)
    for step, (loss, norm) in enumerate(steps, start=1):
        assert losses[step][0] == pytest.approx(loss, rel=2e-5), step
        assert losses[step][1] == pytest.approx(norm, rel=1e-3), step


def test_dropout_differs_between_copies_of_the_plan_and_does_not_begin_anew_where_a_run_goes_on():
    job = Job(model_id="any", sequence_length=1, runtime_ngpus=1, name="any")
    drawn = set()
    for rank, step in ((0, 0), (1, 0), (0, 5), (1, 5)):
        trainer.seed_dropout(job, rank, step)
        drawn.add(tuple(torch.rand(8).tolist()))
    assert len(drawn) == 4
