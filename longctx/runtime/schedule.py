"""The learning rate of every step: a linear warm-up, then constant, or falling to a floor."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, cast

from longctx.job import Job
from longctx.schema import Count, Positive, Range

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """All that the learning rate of a step follows from. Checkpoints record that of their run."""

    kind: Kind  # after the warm-up
    learning_rate: Positive  # the highest
    min_learning_rate: Annotated[float, Range(at_least=0)]  # what linear and cosine fall to
    warmup_steps: Count
    total_steps: Count  # at which a falling one has reached its floor


def schedule_of(job: Job, total_steps: int) -> Schedule:
    kind = cast(Kind, job.lr_schedule)  # one of the option's choices
    return Schedule(kind, job.learning_rate, job.min_learning_rate, job.warmup_steps, total_steps)


def learning_rate(step: int, schedule: Schedule) -> float:
    """The learning rate of the step after `step` steps. After its last step a schedule stays where it is."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / (schedule.warmup_steps + 1)
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, schedule.total_steps - schedule.warmup_steps))
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[schedule.kind]
    return schedule.min_learning_rate + (schedule.learning_rate - schedule.min_learning_rate) * factor


def describe_change(old: Schedule, new: Schedule, step: int) -> str | None:
    """What differs between two schedules, and the learning rate of the step after `step` steps by each of them.

    None if nothing differs; a constant schedule has neither an end nor a floor.
    """
    before, after = asdict(old), asdict(new)
    if old.kind == new.kind == "constant":
        for name in ("total_steps", "min_learning_rate"):
            before[name] = after[name]
    changed = [
        f"{name.replace('_', ' ')} {before[name]} -> {after[name]}" for name in after if before[name] != after[name]
    ]
    if not changed:
        return None
    return (
        f"{', '.join(changed)}; the learning rate of step {step + 1} is {learning_rate(step, new):.6g}, and by the "
        f"schedule before it was {learning_rate(step, old):.6g}"
    )
