"""The training loop: AdamW on float32 masters under FSDP2, gradients averaged over the tokens that count."""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from longctx import torchrun
from longctx.data.order import (
    Position,
    Skipped,
    advance,
    epoch_order,
    micro_batches,
    position_after,
    step_rows,
    steps_per_epoch,
    waiting,
    without_skipped,
)
from longctx.data.rows import IGNORE_INDEX, RowInputs, Rows
from longctx.errors import NotFinite
from longctx.job import Job
from longctx.runtime import checkpoint, watch, writing
from longctx.runtime.metrics import FlopCount, MetricsLog, Step, metrics_log, step_metrics
from longctx.runtime.parallel import ParallelModel, local, reduce_plan_sharded_gradients
from longctx.runtime.saving import Saver, saving
from longctx.runtime.schedule import Schedule, describe_change, learning_rate, schedule_of

BETAS = (0.9, 0.95)
FIRST_ROWS = 64  # that are looked at before anything is done; it takes no second
MAX_ROLLBACKS = 3  # without a good step being saved; more go wrong for another reason than their rows


@dataclass(frozen=True)
class Reached:
    """How far ranks have come since they last loaded: where they go on from, and the checkpoint they have to do so."""

    position: Position
    newest: checkpoint.Checkpoint | None  # None: the weights that the run started from
    rollbacks: int = 0  # since a step that went well was saved
    is_end: bool = False


def train(
    model: ParallelModel,
    rows: Rows,
    job: Job,
    flops: FlopCount,
    resume: checkpoint.Checkpoint | None,
    load_weights: Callable[[ParallelModel], None],
    save_hf_files: Callable[[Path], None],
) -> tuple[int, int]:
    """Trains `model` from its weights, or from `resume`, to the last step, and checkpoints it.

    A signal ends it earlier, after a step that is checkpointed. A step that goes wrong may make it go back.

    Args:
        load_weights: fills the model with the weights that a run starts from which resumes nothing.

    Returns:
        The steps that were done before, and those that are now.

    Raises:
        TrainingError: a loss or gradient is not finite.
        RowsError: a row does not fit the model.
        SaveError: the last checkpoint can't be saved, or any, where the job is to stop then.
    """
    optimizer = make_optimizer(model, job)
    start = start_of(resume)
    schedule = schedule_of(job, count_steps(len(rows), start, job))
    load(model, optimizer, resume, job, load_weights)
    with watch.finishing_steps(), saving(job, model, optimizer, save_hf_files) as saver:
        go_on = functools.partial(take_steps, model, optimizer, saver, rows, schedule=schedule, job=job, flops=flops)
        reached = go_on(Reached(start, resume))
        while not reached.is_end:
            load(model, optimizer, reached.newest, job, load_weights)
            reached = go_on(reached)
    return start.step, reached.position.step


def load(
    model: ParallelModel,
    optimizer: torch.optim.AdamW,
    source: checkpoint.Checkpoint | None,
    job: Job,
    load_weights: Callable[[ParallelModel], None],
) -> None:
    """Puts a checkpoint into model, optimizer and random state, or what a run starts from that resumes nothing."""
    optimizer.zero_grad()
    if source is None:
        load_weights(model)
        for tensor in (tensor for state in optimizer.state.values() for tensor in state.values()):
            tensor.zero_()
    seed_dropout(job, model.data_parallel_rank, start_of(source).step)
    if source is not None:
        checkpoint.load(source, model, optimizer)
    watch.progress()


def take_steps(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    saver: Saver,
    rows: Rows,
    reached: Reached,
    schedule: Schedule,
    job: Job,
    flops: FlopCount,
) -> Reached:
    """Takes steps and checkpoints them, until the last one, one after which it was asked to stop, or one gone wrong.

    Raises:
        NotFinite: a loss, a gradient or what an update leaves is not finite, and the job is to stop then.
        SaveError: the last checkpoint can't be saved, or one where the job is to stop then.
    """
    position, rollbacks, origin = reached.position, reached.rollbacks, reached.newest and reached.newest.origin
    stopped = has_trained = False
    with open_log(job, position.step, schedule.total_steps) as log:
        while position.step < schedule.total_steps and not stopped:
            order = epoch_order(len(rows), job.seed, position.epoch, rows.work)
            chosen = step_rows(order, position, job.rows_per_step)
            kept = without_skipped(chosen, position)
            after = advance(position, chosen, len(rows))
            if log and kept != chosen:
                log.write_skipped(position, [row for row in chosen if row not in kept])
            try:
                if kept:
                    step, stopped = take_step(model, optimizer, rows, kept, position, schedule, job)
                    has_trained = True
                    if log:
                        log.write(dataclasses.replace(step_metrics(step, job, flops), **saver.take_seconds()))
                if is_saved(after.step, schedule.total_steps, job) or stopped:
                    saver.save(state_at(after, model, schedule, job, len(rows), origin))
                    rollbacks = 0 if has_trained else rollbacks
            except NotFinite as error:
                check_rollback(error, rollbacks, job)
                newest = saver.newest() or reached.newest
                return Reached(roll_back(position, kept, start_of(newest), error), newest, rollbacks + 1)
            position = after
            watch.progress()
        saver.finish()
    if stopped and position.step < schedule.total_steps:
        say_stopped(position.step)
    return Reached(position, saver.newest() or reached.newest, is_end=True)


def open_log(job: Job, first_step: int, total_steps: int) -> AbstractContextManager[MetricsLog | None]:
    """The log on rank 0, and None on others."""
    return metrics_log(job.log_folder, first_step, total_steps) if dist.get_rank() == 0 else nullcontext()


def check_rollback(error: NotFinite, rollbacks: int, job: Job) -> None:
    """Raises the error if the job is to stop then, or if it has gone back often enough in vain."""
    if job.on_nonfinite == "stop":
        raise error
    if rollbacks == MAX_ROLLBACKS:
        raise NotFinite(f"{error}; going back {rollbacks} times and leaving out the rows of other steps did not help")


def roll_back(position: Position, rows: list[int], back: Position, error: NotFinite) -> Position:
    """Where to go on from after the step from `position` on these rows went wrong: at `back`, without the rows."""
    torchrun.say(f"run: {error}; going back to step {back.step}, from where these rows are left out")
    return dataclasses.replace(back, skipped=(*(position.skipped or ()), Skipped(position.epoch, tuple(rows))))


def say_stopped(step: int) -> None:
    """Rank 0 prints what has ended the run after this step, of which there is a checkpoint."""
    by = watch.stop_asked() or "a signal to another rank"
    torchrun.say(f"run: stopped by {by} after step {step}; the same command goes on from there")


def announce(job: Job, rows: Rows, resume: checkpoint.Checkpoint | None, attention_share: float = 0.0) -> None:
    """Rank 0 prints what the run starts from, where things go, and how long ranks are to wait for each other.

    Args:
        attention_share: the part of a micro-batch's predicted time that is attention's.
    """
    if torchrun.rank() != 0:
        return
    start = f"random weights, seed {job.seed}" if job.random_init else f"the weights of {job.model_id}"
    if resume:
        start = f"{resume.path}, after step {resume.state.position.step}"
    print(
        f"run: {job.runtime_ngpus} rank(s), {len(rows):,} rows of {job.sequence_length:,} tokens, from {start}\n"
        f"run: logs in {job.log_folder} (metrics.jsonl, TensorBoard), checkpoints in {job.checkpoint_dir}",
        flush=True,
    )
    if rows.work is not None and job.data_parallel_size > 1:
        print(say_waiting(rows.work, start_of(resume).epoch, job, attention_share), flush=True)
    if resume and resume.state.schedule:
        say_if_rescheduled(resume.state.schedule, resume.state.position, job, len(rows))


def say_waiting(work: torch.Tensor, epoch: int, job: Job, attention_share: float) -> str:
    """How long the ranks of a step wait for the one whose row takes longest, by the planner's price of attention."""
    price = 1 - attention_share + attention_share * work / work.mean()
    order = epoch_order(len(work), job.seed, epoch, work)
    left = waiting(order, price, job.rows_per_step, job.data_parallel_size, work)
    return (
        "run: rows of like work are side by side: as predicted, a step takes "
        f"{left.mean().item():.1%} longer than if all ranks had as much to compute, and {left.max().item():.1%} at most"
    )


def say_if_rescheduled(old: Schedule, start: Position, job: Job, n_rows: int) -> None:
    """Prints how the learning rate goes on where it is not as it would have in the run before."""
    new = schedule_of(job, count_steps(n_rows, start, job))
    change = describe_change(old, new, start.step)
    if change and start.step < new.total_steps:
        print(f"run: the schedule has changed: {change}", flush=True)


def seed_dropout(job: Job, data_parallel_rank: int, step: int = 0) -> None:
    """Each copy of the plan has dropout of its own; on the ranks of one it is the same, as what they replicate.

    From each step it is another: a run that goes on in another layout, which has no random state to take over, would
    else drop what it had dropped at its beginning.
    """
    torch.manual_seed(zlib.crc32(f"{job.seed} {data_parallel_rank} {step}".encode()))


# --- one step ------------------------------------------------------------------------------------------------------


def take_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    chosen: list[int],
    position: Position,
    schedule: Schedule,
    job: Job,
) -> tuple[Step, bool]:
    """The optimizer step after `position`, by all ranks together, and whether a rank was asked to stop after it.

    Raises:
        NotFinite: its loss or gradient is not finite, and nothing is updated. All ranks raise it.
    """
    started = time.perf_counter()
    lr = learning_rate(position.step, schedule)
    loss, grad_norm, n_tokens, stopped = compute_gradients(model, rows, chosen)
    check_finite(position.step + 1, chosen, loss, grad_norm, job.max_loss)
    update_weights(model, optimizer, lr, clip_factor(grad_norm, job) / n_tokens)
    return Step(position, chosen, lr, loss, grad_norm, time.perf_counter() - started), stopped


def compute_gradients(model: ParallelModel, rows: Rows, chosen: list[int]) -> tuple[float, float, float, bool]:
    """Forward and backward over the `chosen` rows, all ranks together. Gradients are summed over tokens, not averaged.

    Every micro-batch reduces its gradients at once: what accumulates is this rank's float32 shard, not a whole
    model's gradients.

    The host issues the work of all micro-batches and then waits for a GPU once, for what it returns. All of that is
    summed by one reduction over all ranks, so that they agree on it to the last bit.

    Returns:
        The loss per token whose label counts, the norm of the gradient of that, the number of such tokens, and whether
        a rank was asked to stop.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.mesh.device_type)
    n_tokens = 0
    for row in micro_batches(chosen, model.data_parallel_size, model.data_parallel_rank, rows.work):
        inputs = rows.load(row)
        loss_sum += micro_batch(model, inputs)
        n_tokens += int((inputs[1] != IGNORE_INDEX).sum())  # on the host
    reduce_plan_sharded_gradients(model)
    if model.mesh.get_local_rank("plan") != 0:  # all ranks of a copy of the plan have its loss
        loss_sum, n_tokens = torch.zeros_like(loss_sum), 0
    is_asked = watch.stop_asked() is not None
    counts = (torch.full_like(loss_sum, number) for number in (n_tokens, is_asked))
    sums = torch.stack((loss_sum, squared_norm(model), *counts))
    dist.all_reduce(sums)
    loss, squares, n_tokens, n_asked = sums.tolist()
    n_tokens = max(n_tokens, 1)  # rows that bring labels may have none that counts; loss and gradients are 0 then
    return loss / n_tokens, math.sqrt(squares) / n_tokens, n_tokens, n_asked > 0


def micro_batch(model: ParallelModel, inputs: RowInputs) -> torch.Tensor:
    """Forward and backward of one row, [1, l] tokens and labels on the host, by the ranks of one copy of the plan.

    The host doesn't wait for a GPU, so that it is always ahead of it; only gloo, between ranks that share one, waits.

    Returns:
        The loss [], summed over tokens.
    """
    loss = model.module(*send(inputs, torch.device(model.mesh.device_type)))
    loss.backward()
    return loss.detach()


def send(inputs: RowInputs, device: torch.device) -> list[torch.Tensor | tuple[int, ...]]:
    """Copies the tensors of a row from the host to the device; where documents begin stays on the host.

    Only from pinned memory does a GPU fetch a tensor while the host goes on.
    """
    if device.type == "cpu":
        return list(inputs)
    return [x.pin_memory().to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in inputs]


def check_finite(step: int, rows: list[int], loss: float, grad_norm: float, max_loss: float | None = None) -> None:
    """Raises a NotFinite that names a step and its rows, if its loss or gradient norm is not, or the loss too high."""
    named = ", ".join(map(str, rows))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFinite(
            f"step {step}: the loss ({loss:g}) or the gradient norm ({grad_norm:g}) is not finite, on rows {named} of "
            "the dataset; the last checkpoint is kept"
        )
    if max_loss is not None and loss > max_loss:
        raise NotFinite(
            f"step {step}: the loss ({loss:g}) is above {max_loss:g}, on rows {named} of the dataset; the last "
            "checkpoint is kept"
        )


def clip_factor(grad_norm: float, job: Job) -> float:
    """What gradients are multiplied by so that their norm is at most max_grad_norm."""
    return min(1.0, job.max_grad_norm / (grad_norm + 1e-6))


def update_weights(model: ParallelModel, optimizer: torch.optim.Optimizer, lr: float, gradient_scale: float) -> None:
    """The optimizer's step, on the gradients times `gradient_scale`."""
    gradients = [p.grad for p in model.module.parameters() if p.grad is not None]
    torch._foreach_mul_([local(gradient) for gradient in gradients], gradient_scale)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def state_at(
    position: Position, model: ParallelModel, schedule: Schedule, job: Job, n_rows: int, origin: str | None
) -> checkpoint.State:
    """What a checkpoint of this position is of."""
    ranks, shapes = (dist.get_world_size(), model.plan_size), checkpoint.parameter_shapes(model)
    apart = job.document_mask
    return checkpoint.State(position, job.seed, n_rows, *ranks, shapes, schedule, origin=origin, document_mask=apart)


def total_norm(model: ParallelModel) -> torch.Tensor:
    """The 2-norm [] of all gradients together, over all ranks, in float64, on the device."""
    squares = squared_norm(model)
    dist.all_reduce(squares)
    return squares.sqrt()


def squared_norm(model: ParallelModel) -> torch.Tensor:
    """What this rank adds to the square [] of the 2-norm of all gradients, in float64, on the device.

    Of an FSDP-sharded weight each rank has a part of its own. A plan-sharded one has the same parts in every copy of
    the plan, and those of the first copy are counted.
    """
    parameters = model.module.named_parameters()
    counted = [p.grad for name, p in parameters if model.data_parallel_rank == 0 or name not in model.plan_sharded]
    gradients = [local(gradient) for gradient in counted if gradient is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=model.mesh.device_type)
    return torch.nn.utils.get_total_norm(gradients).double() ** 2


# --- optimizer and steps ------------------------------------------------------------------------------------------


def make_optimizer(model: ParallelModel, job: Job) -> torch.optim.AdamW:
    """AdamW with its state allocated, so that a checkpoint can be read into it in place."""
    device = torch.device(model.mesh.device_type)
    fused = device.type == "cuda"
    named = dict(model.module.named_parameters())
    own = [parameter for name, parameter in named.items() if name in model.plan_sharded]
    sharded = [parameter for name, parameter in named.items() if name not in model.plan_sharded]
    # Groups of their own: one fused update can't take plain tensors and DTensors together.
    groups = [{"params": parameters} for parameters in (sharded, own) if parameters]
    optimizer = torch.optim.AdamW(groups, job.learning_rate, BETAS, weight_decay=job.weight_decay, fused=fused)
    for parameter in named.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def start_of(resume: checkpoint.Checkpoint | None) -> Position:
    """The position from which a run goes on."""
    return resume.state.position if resume else Position()


def count_steps(n_rows: int, position: Position, job: Job) -> int:
    """The step training ends at: at the end of the last epoch, or at max_train_steps if that comes first."""
    epochs_left = job.max_epochs - position.epoch
    rest_of_epoch = steps_per_epoch(n_rows - position.row, job.rows_per_step)
    steps = position.step
    if epochs_left > 0:
        steps += rest_of_epoch + (epochs_left - 1) * steps_per_epoch(n_rows, job.rows_per_step)
    return min(steps, job.max_train_steps) if job.max_train_steps else steps


def is_saved(step: int, total_steps: int, job: Job) -> bool:
    """Whether a checkpoint is saved after this step."""
    return step % job.checkpoint_interval == 0 or step == total_steps


def count_saves(job: Job, n_rows: int, resume: checkpoint.Checkpoint | None) -> int:
    """How many checkpoints a run will save."""
    start = start_of(resume)
    total_steps = count_steps(n_rows, start, job)
    if total_steps <= start.step:
        return 0
    is_one_more = total_steps % job.checkpoint_interval != 0  # of the last step
    return total_steps // job.checkpoint_interval - start.step // job.checkpoint_interval + is_one_more


def check_first_rows(rows: Rows, job: Job, resume: checkpoint.Checkpoint | None) -> None:
    """Raises a RowsError if a row that comes first can't be trained on, as none can of another model's tokenizer."""
    start = start_of(resume)
    order = epoch_order(len(rows), job.seed, start.epoch, rows.work)
    for row in without_skipped(step_rows(order, start, min(job.rows_per_step, FIRST_ROWS)), start):
        rows.load(row)


def check_checkpoint_places(job: Job, n_rows: int, resume: checkpoint.Checkpoint | None) -> None:
    """Raises a CheckpointFolderError if a checkpoint that the run will save would replace somebody's files."""
    start = start_of(resume)
    total_steps = count_steps(n_rows, start, job)
    steps = [step for step in checkpoint.steps_in(job.checkpoint_dir) if start.step < step <= total_steps]
    saved = [step for step in steps if is_saved(step, total_steps, job)]
    positions = (position_after(step, n_rows, job.rows_per_step, start) for step in saved)
    writing.check_places(job.checkpoint_dir, positions)
