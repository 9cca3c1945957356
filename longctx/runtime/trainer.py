"""The training loop: AdamW on float32 masters under FSDP2, gradients averaged over the tokens that count."""

import argparse
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from longctx.data.order import Position, advance, epoch_order, micro_batches, rows_per_step, step_rows, steps_per_epoch
from longctx.data.rows import IGNORE_INDEX, load_row
from longctx.errors import UserError
from longctx.runtime import checkpoint
from longctx.runtime.metrics import FlopCount, metrics_log, step_metrics
from longctx.runtime.parallel import ParallelModel, reduce_plan_sharded_gradients

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TrainSettings:
    """What a person tunes, and where things go. Learning rates and steps are of optimizer steps."""

    sequence_length: int
    vocab_size: int
    learning_rate: float
    lr_schedule: str  # 'constant', 'linear', 'cosine'
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    grad_accumulation_steps: int
    max_epochs: int
    max_train_steps: int | None
    checkpoint_interval: int
    seed: int
    checkpoint_dir: Path
    log_dir: Path


@dataclass(frozen=True)
class Resume:
    """A checkpoint folder or merged file to go on from, and the option that named it."""

    path: Path
    state: checkpoint.State
    option: str


def find_resume(args: argparse.Namespace, n_rows: int, engine: str) -> Resume | None:
    """What to resume from, known to be whole and of these rows; None to start from the model's weights."""
    path = checkpoint.find(Path(args.checkpoint_dir), args.resume_path, engine)
    if path is None:
        return None
    option = "--resume_path" if args.resume_path else "--checkpoint_dir"
    state = checkpoint.read_state(path, option)
    checkpoint.check_same_order(state, args.seed, n_rows, option, path)
    return Resume(path, state, option)


def announce(args: argparse.Namespace, settings: TrainSettings, n_rows: int, resume: Resume | None) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    start = f"random weights, seed {args.seed}" if args.random_init else f"the weights of {args.model_id}"
    if resume:
        start = f"{resume.path}, after step {resume.state.position.step}"
    print(
        f"run: {args.runtime_ngpus} rank(s), {n_rows:,} rows of {settings.sequence_length:,} tokens, from {start}\n"
        f"run: logs in {settings.log_dir} (metrics.jsonl, TensorBoard), checkpoints in {settings.checkpoint_dir}",
        flush=True,
    )


def train(
    model: ParallelModel,
    dataset: Any,
    settings: TrainSettings,
    flops: FlopCount,
    device: torch.device,
    resume: Resume | None,
    save_hf_files: Callable[[Path], None],
) -> None:
    """Trains `model` (on `device`) from its weights, or from `resume`, to the last step, and checkpoints it.

    Raises:
        UserError: a loss or gradient is not finite, or a row does not fit the plan.
    """
    optimizer = make_optimizer(model, settings, device)
    # Dropout differs from plan to plan, and is the same on the ranks of one: what all compute whole stays equal.
    torch.manual_seed(settings.seed + model.data_parallel_rank)
    position = Position()
    if resume:
        checkpoint.load(resume.path, model, optimizer, resume.state, resume.option)
        position = resume.state.position
    n_rows, world_size = len(dataset), dist.get_world_size()
    per_step = rows_per_step(model.data_parallel_size, settings.grad_accumulation_steps)
    total_steps = count_steps(n_rows, position, per_step, settings)
    rank_zero = dist.get_rank() == 0
    if rank_zero and position.step >= total_steps:
        print(complete(position))

    with metrics_log(settings.log_dir, position.step, total_steps) if rank_zero else nullcontext() as log:
        while position.step < total_steps:
            started = time.perf_counter()
            epoch = position.epoch
            order = epoch_order(n_rows, settings.seed, epoch)
            rows = step_rows(order, position, per_step)
            lr = learning_rate(position.step, total_steps, settings)
            loss, grad_norm = train_step(model, optimizer, dataset, rows, lr, settings, device, position.step + 1)
            position = advance(position, rows, n_rows)
            if log:
                seconds = time.perf_counter() - started
                log.write(
                    step_metrics(
                        step=position.step,
                        epoch=epoch,
                        loss=loss,
                        grad_norm=grad_norm,
                        learning_rate=lr,
                        rows=len(rows),
                        sequence_length=settings.sequence_length,
                        seconds=seconds,
                        world_size=world_size,
                        flops=flops,
                    )
                )
            if position.step % settings.checkpoint_interval == 0 or position.step == total_steps:
                shapes = checkpoint.parameter_shapes(model)
                state = checkpoint.State(position, settings.seed, n_rows, world_size, model.plan_size, shapes)
                path = checkpoint.save(settings.checkpoint_dir, model, optimizer, state, save_hf_files)
                if log:
                    log.bar.write(f"step {position.step}: saved {path}")


def complete(position: Position) -> str:
    return f"run: training is complete after step {position.step}; raise --max_epochs or --max_train_steps to go on"


def train_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    rows: list[int],
    lr: float,
    settings: TrainSettings,
    device: torch.device,
    step: int,
) -> tuple[float, float]:
    """One optimizer step over `rows`, all ranks together. Returns the loss per token and the gradient norm.

    Every micro-batch reduces its gradients at once: what accumulates is this rank's float32 shard, not a whole
    model's gradients.
    """
    loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=device)
    for row in micro_batches(rows, model.data_parallel_size, model.data_parallel_rank):
        tokens, labels = load_row(dataset, row, settings.sequence_length, settings.vocab_size)
        loss = model.module(tokens.to(device), labels.to(device))
        loss.backward()
        loss_and_tokens += torch.stack((loss.detach().double(), (labels != IGNORE_INDEX).sum().to(device)))
    reduce_plan_sharded_gradients(model)
    dist.all_reduce(loss_and_tokens, group=model.mesh.get_group("data_parallel"))
    loss_sum, n_tokens = loss_and_tokens.tolist()

    grad_norm = total_norm(model) / n_tokens
    check_finite(step, rows, loss_sum / n_tokens, grad_norm)
    clip = min(1.0, settings.max_grad_norm / (grad_norm + 1e-6))
    gradients = [p.grad for p in model.module.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    torch._foreach_mul_(local, clip / n_tokens)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss_sum / n_tokens, grad_norm


def check_finite(step: int, rows: list[int], loss: float, grad_norm: float) -> None:
    """Raises a UserError that names the step and its rows if the loss or the gradient norm is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"step {step}: the loss ({loss:g}) or the gradient norm ({grad_norm:g}) is not finite, on "
            f"rows {', '.join(map(str, rows))} of the dataset; the last checkpoint is kept: look at these rows, or "
            "resume from it with a lower --learning_rate"
        )


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
        squares += torch.nn.utils.get_total_norm(sharded).full_tensor().double() ** 2
    return squares.sqrt().item()


def make_optimizer(model: ParallelModel, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW with its state allocated, so that a checkpoint can be read into it in place."""
    fused = device.type == "cuda"
    named = dict(model.module.named_parameters())
    own = [parameter for name, parameter in named.items() if name in model.plan_sharded]
    sharded = [parameter for name, parameter in named.items() if name not in model.plan_sharded]
    # Groups of their own: one fused update can't take plain tensors and DTensors together.
    groups = [{"params": parameters} for parameters in (sharded, own) if parameters]
    optimizer = torch.optim.AdamW(
        groups, settings.learning_rate, BETAS, weight_decay=settings.weight_decay, fused=fused
    )
    for parameter in named.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def count_steps(n_rows: int, position: Position, per_step: int, settings: TrainSettings) -> int:
    """The step training ends at: at the end of the last epoch, or at max_train_steps if that comes first."""
    epochs_left = settings.max_epochs - position.epoch
    rest_of_epoch = steps_per_epoch(n_rows - position.row, per_step)
    steps = position.step
    if epochs_left > 0:
        steps += rest_of_epoch + (epochs_left - 1) * steps_per_epoch(n_rows, per_step)
    return min(steps, settings.max_train_steps) if settings.max_train_steps else steps


def learning_rate(step: int, total_steps: int, settings: TrainSettings) -> float:
    """The learning rate of the step after `step` steps: a linear warm-up, then the schedule, down to 0 if it falls."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.lr_schedule]
    return settings.learning_rate * factor
