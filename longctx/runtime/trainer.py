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
from longctx.data.order import Position, advance, epoch_order, micro_batches, step_rows, steps_per_epoch
from longctx.data.rows import IGNORE_INDEX, Rows
from longctx.errors import TrainingError
from longctx.options import Job, say_complete
from longctx.runtime import checkpoint
from longctx.runtime.metrics import FlopCount, metrics_log, step_metrics
from longctx.runtime.parallel import ParallelModel, reduce_plan_sharded_gradients

BETAS = (0.9, 0.95)


def train(
    model: ParallelModel,
    rows: Rows,
    job: Job,
    flops: FlopCount,
    resume: checkpoint.Checkpoint | None,
    save_hf_files: Callable[[Path], None],
) -> None:
    """Trains `model` from its weights, or from `resume`, to the last step, and checkpoints it.

    Raises:
        TrainingError: a loss or gradient is not finite.
        RowsError: a row does not fit the model.
    """
    optimizer = make_optimizer(model, job)
    # Dropout differs from plan to plan, and is the same on the ranks of one: what all compute whole stays equal.
    torch.manual_seed(job.seed + model.data_parallel_rank)
    position = Position()
    if resume:
        checkpoint.load(resume, model, optimizer)
        position = resume.state.position
    total_steps = count_steps(len(rows), position, job)
    if position.step >= total_steps:
        say_complete(position.step)

    is_rank_zero = dist.get_rank() == 0
    with metrics_log(job.log_folder, position.step, total_steps) if is_rank_zero else nullcontext() as log:
        while position.step < total_steps:
            started = time.perf_counter()
            epoch = position.epoch
            chosen = step_rows(epoch_order(len(rows), job.seed, epoch), position, job.rows_per_step)
            lr = learning_rate(position.step, total_steps, job)
            loss, grad_norm, n_tokens = compute_gradients(model, rows, chosen)
            check_finite(position.step + 1, chosen, loss, grad_norm)
            update_weights(model, optimizer, lr, clip_factor(grad_norm, job) / n_tokens)
            position = advance(position, chosen, len(rows))
            if log:
                log.write(
                    step_metrics(
                        step=position.step,
                        epoch=epoch,
                        loss=loss,
                        grad_norm=grad_norm,
                        learning_rate=lr,
                        rows=len(chosen),
                        sequence_length=job.sequence_length,
                        seconds=time.perf_counter() - started,
                        world_size=dist.get_world_size(),
                        flops=flops,
                    )
                )
            if position.step % job.checkpoint_interval == 0 or position.step == total_steps:
                path = save_checkpoint(model, optimizer, position, job, len(rows), save_hf_files)
                if log:
                    log.bar.write(f"step {position.step}: saved {path}")


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


# --- one step ------------------------------------------------------------------------------------------------------


def compute_gradients(model: ParallelModel, rows: Rows, chosen: list[int]) -> tuple[float, float, float]:
    """Forward and backward over the `chosen` rows, all ranks together. Gradients are summed over tokens, not averaged.

    Every micro-batch reduces its gradients at once: what accumulates is this rank's float32 shard, not a whole
    model's gradients.

    Returns:
        The loss per token whose label counts, the norm of the gradient of that, and the number of such tokens.
    """
    device = torch.device(model.mesh.device_type)
    loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=device)
    for row in micro_batches(chosen, model.data_parallel_size, model.data_parallel_rank):
        tokens, labels = rows.load(row)
        loss = model.module(tokens.to(device), labels.to(device))
        loss.backward()
        loss_and_tokens += torch.stack((loss.detach().double(), (labels != IGNORE_INDEX).sum().to(device)))
    reduce_plan_sharded_gradients(model)
    dist.all_reduce(loss_and_tokens, group=model.mesh.get_group("data_parallel"))
    loss_sum, n_tokens = loss_and_tokens.tolist()
    return loss_sum / n_tokens, total_norm(model) / n_tokens, n_tokens


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
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    torch._foreach_mul_(local, gradient_scale)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def save_checkpoint(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    position: Position,
    job: Job,
    n_rows: int,
    save_hf_files: Callable[[Path], None],
) -> Path:
    shapes = checkpoint.parameter_shapes(model)
    state = checkpoint.State(position, job.seed, n_rows, dist.get_world_size(), model.plan_size, shapes)
    return checkpoint.save(job.checkpoint_dir, model, optimizer, state, save_hf_files)


def total_norm(model: ParallelModel) -> float:
    """The 2-norm of all gradients together, over all ranks."""
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
    return squares.sqrt().item()


# --- optimizer and schedule ------------------------------------------------------------------------------------------


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


def count_steps(n_rows: int, position: Position, job: Job) -> int:
    """The step training ends at: at the end of the last epoch, or at max_train_steps if that comes first."""
    epochs_left = job.max_epochs - position.epoch
    rest_of_epoch = steps_per_epoch(n_rows - position.row, job.rows_per_step)
    steps = position.step
    if epochs_left > 0:
        steps += rest_of_epoch + (epochs_left - 1) * steps_per_epoch(n_rows, job.rows_per_step)
    return min(steps, job.max_train_steps) if job.max_train_steps else steps


def learning_rate(step: int, total_steps: int, job: Job) -> float:
    """The learning rate of the step after `step` steps: a linear warm-up, then the schedule, down to 0 if it falls."""
    if step < job.warmup_steps:
        return job.learning_rate * (step + 1) / (job.warmup_steps + 1)
    progress = (step - job.warmup_steps) / max(1, total_steps - job.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[job.lr_schedule]
    return job.learning_rate * factor
