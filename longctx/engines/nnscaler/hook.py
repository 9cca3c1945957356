"""What the built-in engine does around a step, done within nnScaler's training loop, which calls back."""

import functools
import json
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from nnscaler.cli.train_hook import TrainHook
from nnscaler.cli.trainer import Trainer
from nnscaler.cli.trainer_args import AggregatedOutputs
from transformers import PreTrainedConfig

from longctx.compiler import hardware
from longctx.compiler.prediction import forward_flops
from longctx.compiler.trace import sample_row, trace
from longctx.data import order
from longctx.engines.nnscaler.checkpoints import Parameters
from longctx.errors import ModelError
from longctx.huggingface.build import build_model
from longctx.huggingface.weights import save_hf_files, trained_config
from longctx.job import Job
from longctx.runtime import checkpoint, merge, watch
from longctx.runtime.metrics import FlopCount, Step, metrics_log, step_metrics
from longctx.runtime.schedule import learning_rate, schedule_of
from longctx.runtime.trainer import check_finite, say_stopped, seed_dropout


def aggregate_outputs(outputs: list[tuple], sync_group: dist.ProcessGroup) -> AggregatedOutputs:
    """Sums losses and tokens that count over micro-batches and data-parallel ranks."""
    sums = functools.reduce(
        torch.add, (torch.stack((loss.double(), n_tokens.double())) for _, loss, n_tokens in outputs)
    )
    dist.all_reduce(sums, group=sync_group)
    loss_sum, n_tokens = sums.tolist()
    return AggregatedOutputs(
        loss_sum, num_batches=len(outputs) * dist.get_world_size(sync_group), num_tokens=int(n_tokens)
    )


def count_flops(job: Job, config: PreTrainedConfig) -> FlopCount:
    """What MFU is reckoned from; a model that our tracer refuses is trained all the same, without MFU."""
    model = build_model(config, job.dtype, job.attn_implementation, job.sequence_length)
    try:
        flops = forward_flops(trace(model, sample_row(job.sequence_length)))
    except ModelError as error:
        print(f"run: MFU is left out, since the FLOPs of a step are not known: {error}", flush=True)
        return FlopCount(0.0, 0.0, peak_per_s=None)
    return FlopCount(*flops, hardware.peak_rate_here(job.dtype))


def is_any_rank_asked_to_stop() -> bool:
    """Whether any of all ranks was, of which each micro-batch sums over a part only. All of them have to call this."""
    asked = torch.tensor(watch.stop_asked() is not None, dtype=torch.int32)
    dist.all_reduce(asked)
    return bool(asked)


class StepHook(TrainHook):
    """Our learning rate, check of the loss, log, stops, and what our checkpoints hold, where nnScaler asks for them.

    The watch over this process begins with the first step: compiling and loading are inside nnScaler.
    """

    def __init__(self, job: Job, parameters: Parameters, n_rows: int):
        self.job, self.parameters, self.n_rows = job, parameters, n_rows
        self.config = trained_config(job.model_id, job.random_init, job.changes)
        self.until_the_end = ExitStack()

    def on_train_start(self, trainer: Trainer) -> None:
        # Of a resumed run nnScaler puts the random state back after this.
        seed_dropout(self.job, trainer.rank // self.job.plan_ngpus)
        steps = trainer.train_status.finished_train_steps
        self.position = order.position_after(steps, self.n_rows, self.job.rows_per_step)
        self.schedule = schedule_of(self.job, trainer.max_train_steps)
        if trainer.rank == 0:
            self.flops = count_flops(self.job, self.config)
            files = metrics_log(self.job.log_folder, self.position.step, trainer.max_train_steps)
            self.log = self.until_the_end.enter_context(files)
        self.until_the_end.enter_context(watch.finishing_steps())
        watch.expect_progress(timedelta(minutes=self.job.hang_timeout), self.job.log_folder)

    def on_step_start(self, trainer: Trainer, epoch: int, idx: int) -> None:
        watch.progress()  # of the save before, which training waits for
        shuffled = order.epoch_order(self.n_rows, self.job.seed, self.position.epoch)
        self.rows = order.step_rows(shuffled, self.position, self.job.rows_per_step)
        self.started = time.perf_counter()

    def after_aggregate_train_step_outputs(
        self, trainer: Trainer, aggregated_outputs: AggregatedOutputs, train_loss: float
    ) -> None:
        self.loss = train_loss

    def after_gnorm_clip(self, trainer: Trainer, gnorm: torch.Tensor) -> None:
        self.grad_norm = float(gnorm)
        check_finite(self.position.step + 1, self.rows, self.loss, self.grad_norm, self.job.max_loss)

    def before_optimizer_step(self, trainer: Trainer) -> None:
        self.lr = learning_rate(self.position.step, self.schedule)
        for group in trainer.optimizer.param_groups:
            group["lr"] = self.lr

    def after_optimizer_step(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self.started
        step = Step(self.position, self.rows, self.lr, self.loss, self.grad_norm, seconds)
        self.position = order.advance(self.position, self.rows, self.n_rows)
        if trainer.rank == 0:
            self.log.write(step_metrics(step, self.job, self.flops))

    def on_step_end(self, trainer: Trainer, *_: Any) -> None:
        watch.progress()
        if is_any_rank_asked_to_stop():
            trainer.max_train_steps = self.position.step  # of which nnScaler saves a checkpoint, and leaves the epoch

    def on_epoch_end(self, trainer: Trainer, epoch: int) -> None:
        if trainer.max_train_steps < self.schedule.total_steps:
            trainer.train_args.max_train_steps = trainer.max_train_steps  # and so it begins no other
            say_stopped(self.position.step)

    def on_save_checkpoint(self, trainer: Trainer, state_dict: dict[str, Any]) -> None:
        ranks = trainer.world_size, self.job.plan_ngpus
        state = checkpoint.State(self.position, self.job.seed, self.n_rows, *ranks, self.parameters, self.schedule)
        state_dict[checkpoint.STATE_ENTRY] = json.dumps(state.to_json())
        if trainer.rank == 0:
            write_hf_files = functools.partial(save_hf_files, self.job.model_id, self.config)
            state_dict[checkpoint.HF_ENTRY] = merge.hf_entry(write_hf_files)

    def on_load_checkpoint(self, trainer: Trainer, state_dict: dict[str, Any]) -> None:
        for name, value in trainer.optimizer.param_groups[0].items():  # this run's options, not the checkpoint's
            if name != "params":
                state_dict["optimizer"]["param_groups"][0][name] = value

    def on_finalize(self, trainer: Trainer) -> None:
        self.until_the_end.close()
