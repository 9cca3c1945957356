"""The training loop: AdamW on float32 masters under FSDP2, gradients averaged over the tokens that count."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from longctx import torchrun
from longctx.data.order import (
    Position,
    advance,
    epoch_order,
    micro_batches,
    position_after,
    step_rows,
    steps_per_epoch,
)
from longctx.data.rows import IGNORE_INDEX, Rows
from longctx.errors import TrainingError
from longctx.job import Job
from longctx.runtime import checkpoint
from longctx.runtime.metrics import FlopCount, Step, metrics_log, step_metrics
from longctx.runtime.parallel import ParallelModel, local, reduce_plan_sharded_gradients
from longctx.runtime.schedule import Schedule, describe_change, learning_rate, schedule_of

BETAS = (0.9, 0.95)


def train(
    model: ParallelModel,
    rows: Rows,
    job: Job,
    flops: FlopCount,
    resume: checkpoint.Checkpoint | None,
    save_hf_files: Callable[[Path], None],
) -> tuple[int, int]:
    """Trains `model` from its weights, or from `resume`, to the last step, and checkpoints it.

    Returns:
        The steps that were done before, and those that are now.

    Raises:
        TrainingError: a loss or gradient is not finite.
        RowsError: a row does not fit the model.
        CheckpointFolderError: something has come into the place of a checkpoint.
    """
    optimizer = make_optimizer(model, job)
    seed_dropout(job, model.data_parallel_rank)
    start = start_of(resume)
    if resume:
        checkpoint.load(resume, model, optimizer)
    total_steps = count_steps(len(rows), start, job)
    schedule = schedule_of(job, total_steps)

    position = start
    is_rank_zero = dist.get_rank() == 0
    with metrics_log(job.log_folder, start.step, total_steps) if is_rank_zero else nullcontext() as log:
        while position.step < total_steps:
            step = take_step(model, optimizer, rows, position, schedule, job)
            position = advance(position, step.rows, len(rows))
            if log:
                log.write(step_metrics(step, job, flops))
            if is_saved(position.step, total_steps, job):
                origin = resume.origin if resume else None
                path = save_checkpoint(model, optimizer, position, schedule, job, len(rows), save_hf_files, origin)
                if log:
                    log.bar.write(f"step {position.step}: saved {path}")
    return start.step, position.step


def announce(job: Job, n_rows: int, resume: checkpoint.Checkpoint | None) -> None:
    """Rank 0 prints what the run starts from and where things go."""
    if torchrun.rank() != 0:
        return
    start = f"random weights, seed {job.seed}" if job.random_init else f"the weights of {job.model_id}"
    if resume:
        start = f"{resume.path}, after step {resume.state.position.step}"
    print(
        f"run: {job.runtime_ngpus} rank(s), {n_rows:,} rows of {job.sequence_length:,} tokens, from {start}\n"
        f"run: logs in {job.log_folder} (metrics.jsonl, TensorBoard), checkpoints in {job.checkpoint_dir}",
        flush=True,
    )
    if resume and resume.state.schedule:
        say_if_rescheduled(resume.state.schedule, resume.state.position, job, n_rows)


def say_if_rescheduled(old: Schedule, start: Position, job: Job, n_rows: int) -> None:
    """Prints how the learning rate goes on where it is not as it would have in the run before."""
    new = schedule_of(job, count_steps(n_rows, start, job))
    change = describe_change(old, new, start.step)
    if change and start.step < new.total_steps:
        print(f"run: the schedule has changed: {change}", flush=True)


def seed_dropout(job: Job, data_parallel_rank: int) -> None:
    """Each copy of the plan has dropout of its own; on the ranks of one it is the same, as what they replicate."""
    torch.manual_seed(job.seed + data_parallel_rank)


# --- one step ------------------------------------------------------------------------------------------------------


def take_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    position: Position,
    schedule: Schedule,
    job: Job,
) -> Step:
    """The optimizer step after `position`, by all ranks together."""
    started = time.perf_counter()
    chosen = step_rows(epoch_order(len(rows), job.seed, position.epoch), position, job.rows_per_step)
    lr = learning_rate(position.step, schedule)
    loss, grad_norm, n_tokens = compute_gradients(model, rows, chosen)
    check_finite(position.step + 1, chosen, loss, grad_norm)
    update_weights(model, optimizer, lr, clip_factor(grad_norm, job) / n_tokens)
    return Step(position, chosen, lr, loss, grad_norm, time.perf_counter() - started)


def compute_gradients(model: ParallelModel, rows: Rows, chosen: list[int]) -> tuple[float, float, float]:
    """Forward and backward over the `chosen` rows, all ranks together. Gradients are summed over tokens, not averaged.

    Every micro-batch reduces its gradients at once: what accumulates is this rank's float32 shard, not a whole
    model's gradients.

    The host issues the work of all micro-batches and then waits for a GPU once, for what it returns.

    Returns:
        The loss per token whose label counts, the norm of the gradient of that, and the number of such tokens.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.mesh.device_type)
    n_tokens = 0
    for row in micro_batches(chosen, model.data_parallel_size, model.data_parallel_rank):
        tokens, labels = rows.load(row)
        loss_sum += micro_batch(model, tokens, labels)
        n_tokens += int((labels != IGNORE_INDEX).sum())  # on the host
    reduce_plan_sharded_gradients(model)
    sums = torch.stack((loss_sum, torch.full_like(loss_sum, n_tokens)))
    dist.all_reduce(sums, group=model.mesh.get_group("data_parallel"))
    loss, n_tokens, norm = torch.cat((sums, total_norm(model).view(1))).tolist()
    n_tokens = max(n_tokens, 1)  # rows that bring labels may have none that counts; loss and gradients are 0 then
    return loss / n_tokens, norm / n_tokens, n_tokens


def micro_batch(model: ParallelModel, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward and backward of one row, [1, l] tokens and labels on the host, by the ranks of one copy of the plan.

    The host doesn't wait for a GPU, so that it is always ahead of it; only gloo, between ranks that share one, waits.

    Returns:
        The loss [], summed over tokens.
    """
    device = torch.device(model.mesh.device_type)
    loss = model.module(send(tokens, device), send(labels, device))
    loss.backward()
    return loss.detach()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the host to the device. Only from pinned memory does a GPU fetch it while the host goes on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def check_finite(step: int, rows: list[int], loss: float, grad_norm: float) -> None:
    """Raises a TrainingError that names the step and its rows if the loss or the gradient norm is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainingError(
            f"step {step}: the loss ({loss:g}) or the gradient norm ({grad_norm:g}) is not finite, on "
            f"rows {', '.join(map(str, rows))} of the dataset; the last checkpoint is kept"
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


def save_checkpoint(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    position: Position,
    schedule: Schedule,
    job: Job,
    n_rows: int,
    save_hf_files: Callable[[Path], None],
    origin: str | None,
) -> Path:
    shapes = checkpoint.parameter_shapes(model)
    ranks = dist.get_world_size(), model.plan_size
    state = checkpoint.State(position, job.seed, n_rows, *ranks, shapes, schedule, origin=origin)
    return checkpoint.save(job.checkpoint_dir, model, optimizer, state, save_hf_files)


def total_norm(model: ParallelModel) -> torch.Tensor:
    """The 2-norm [] of all gradients together, over all ranks, in float64, on the device."""
    named = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    own = [gradient for name, gradient in named.items() if name in model.plan_sharded]
    sharded = [gradient for name, gradient in named.items() if name not in model.plan_sharded]
    squares = torch.zeros((), dtype=torch.float64, device=model.mesh.device_type)
    if own:
        squares += torch.nn.utils.get_total_norm(own).double() ** 2
        dist.all_reduce(squares, group=model.mesh.get_group("plan"))
    if sharded:
        norm = torch.nn.utils.get_total_norm(sharded)
        squares += (norm.full_tensor() if isinstance(norm, DTensor) else norm).double() ** 2
    return squares.sqrt()


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


def check_first_rows(rows: Rows, job: Job, resume: checkpoint.Checkpoint | None) -> None:
    """Raises a RowsError if a row of the first step can't be trained on, as none can of another model's tokenizer."""
    start = start_of(resume)
    for row in step_rows(epoch_order(len(rows), job.seed, start.epoch), start, job.rows_per_step):
        rows.load(row)


def check_checkpoint_places(job: Job, n_rows: int, resume: checkpoint.Checkpoint | None) -> None:
    """Raises a CheckpointFolderError if a checkpoint that the run will save would replace somebody's files."""
    start = start_of(resume)
    total_steps = count_steps(n_rows, start, job)
    steps = [step for step in checkpoint.steps_in(job.checkpoint_dir) if start.step < step <= total_steps]
    saved = [step for step in steps if is_saved(step, total_steps, job)]
    positions = (position_after(step, n_rows, job.rows_per_step, start) for step in saved)
    checkpoint.check_places(job.checkpoint_dir, positions)
