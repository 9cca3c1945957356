"""The learning rate is that of PyTorch's own schedulers, and a run that goes on by another schedule says so."""

from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

from longctx.data.order import Position
from longctx.errors import UserError
from longctx.job import Job
from longctx.options import parse_job
from longctx.runtime.checkpoint import State
from longctx.runtime.schedule import Schedule, describe_change, learning_rate
from longctx.runtime.trainer import say_if_rescheduled

COSINE = Schedule("cosine", 1e-3, 1e-4, warmup_steps=0, total_steps=10)


def rates_of(scheduler: type, optimizer: torch.optim.Optimizer, n_steps: int, **options) -> list[float]:
    """The learning rates by which a scheduler of PyTorch's takes `n_steps` steps."""
    schedule, rates = scheduler(optimizer, **options), []
    for _ in range(n_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_a_schedule_falls_to_its_floor_as_pytorchs_own_does(floor):
    optimizer = torch.optim.SGD([torch.zeros(1)], 1e-3)
    cosine = rates_of(lr_scheduler.CosineAnnealingLR, optimizer, 11, T_max=10, eta_min=floor)
    options = {"start_factor": 1.0, "end_factor": floor / 1e-3, "total_iters": 10}
    linear = rates_of(lr_scheduler.LinearLR, torch.optim.SGD([torch.zeros(1)], 1e-3), 11, **options)
    for kind, expected in (("cosine", cosine), ("linear", linear), ("constant", [1e-3] * 11)):
        schedule = replace(COSINE, kind=kind, min_learning_rate=floor)
        assert [learning_rate(step, schedule) for step in range(11)] == pytest.approx(expected), kind
        assert learning_rate(12, schedule) == learning_rate(10, schedule), "it stays where it ended"


def test_the_warm_up_rises_to_the_highest_learning_rate_from_which_the_schedule_falls():
    rates = [learning_rate(step, replace(COSINE, warmup_steps=3, total_steps=13)) for step in range(13)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[3:] == [learning_rate(step, COSINE) for step in range(10)]


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({}, 4, None),
        (
            {"total_steps": 20},
            10,
            "total steps 10 -> 20; the learning rate of step 11 is 0.00055, and by the schedule before it was 0.0001",
        ),
        (
            {"learning_rate": 2e-3, "warmup_steps": 5},
            4,
            "learning rate 0.001 -> 0.002, warmup steps 0 -> 5; the learning rate of step 5 is 0.00166667, and by the "
            "schedule before it was 0.000689058",
        ),
        (
            {"kind": "constant"},
            4,
            "kind cosine -> constant; the learning rate of step 5 is 0.001, and by the schedule before it was "
            "0.000689058",
        ),
    ],
)
def test_a_schedule_that_changed_is_told_with_the_old_and_the_new_learning_rate(changes, step, message):
    assert describe_change(COSINE, replace(COSINE, **changes), step) == message


def test_a_constant_schedule_that_ends_later_has_not_changed():
    constant = replace(COSINE, kind="constant")
    assert describe_change(constant, replace(constant, total_steps=20, min_learning_rate=0.0), 4) is None


@pytest.mark.parametrize(("max_train_steps", "said"), [(10, ""), (20, "run: the schedule has changed: total steps 10")])
def test_a_run_that_goes_on_says_whether_its_schedule_is_another(capsys, max_train_steps, said):
    job = Job(
        model_id="any",
        sequence_length=8,
        runtime_ngpus=1,
        name="any",
        max_train_steps=max_train_steps,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        lr_schedule="cosine",
    )
    say_if_rescheduled(COSINE, Position(4, 0, 16), job, n_rows=1000)
    out = capsys.readouterr().out
    assert out.startswith(said) if said else not out


def test_a_checkpoint_holds_the_schedule_and_one_from_before_that_does_not():
    state = State(Position(), 0, 8, 1, 1, {}, COSINE)
    assert State.from_json(state.to_json()) == state
    before = state.to_json()
    del before["schedule"]
    assert State.from_json(before) == replace(state, schedule=None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min_learning_rate", "1e-3"], "--min_learning_rate 0.001: it is above --learning_rate 2e-05; lower it"),
        (["--min_learning_rate", "1e-6"], "--min_learning_rate 1e-06: a constant learning rate does not fall"),
    ],
)
def test_a_floor_that_is_never_reached_is_refused(words, message):
    options = ["--model_id", "examples/llama3_8b_128k", "--run_mode", "compile", "--sequence_length", "64"]
    with pytest.raises(UserError, match=f"^{message}"):
        parse_job([*options, "--engine", "torch", *words])
