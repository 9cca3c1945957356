"""The same job on upstream nnScaler 0.8: its tracer, planner, generated code and training loop; our model and data.

nnScaler calls back: its sampler follows our data order, its hook sets our learning rate, checks and logs, and its
checkpoints hold beside their own what ours do. It needs PyTorch 2.6 or older, GPUs, and a model's weights already to
compile. What it generates lies in `<compiled_dir>/_parallel_modules/nnscaler_engine/WrappedModel/<name>/`.
"""

import argparse
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nnscaler
import torch
import torch.distributed as dist
import transformers
from nnscaler.cli.train_hook import TrainHook
from nnscaler.cli.trainer import Trainer
from nnscaler.cli.trainer_args import (
    AggregatedOutputs,
    CheckpointConfig,
    DataloaderConfig,
    DatasetConfig,
    DatasetSamplerConfig,
    HookConfig,
    ModelConfig,
    OptimizerConfig,
    ResumeOptions,
    TrainerArgs,
)
from nnscaler.parallel import ComputeConfig
from nnscaler.runtime.f16_optimizer import MixedPrecisionAdamW
from safetensors import safe_open
from torch import nn

from longctx.atomic import whole_file
from longctx.compiler import hardware
from longctx.compiler.annotation import REGISTERED_OPS
from longctx.data import order, rows
from longctx.errors import UserError, one_line
from longctx.huggingface import build
from longctx.huggingface.build import DTYPES, build_model, load_config
from longctx.huggingface.flops import forward_flops
from longctx.huggingface.weights import check_weights, find_weights, random_weights, save_hf_files
from longctx.runtime import checkpoint
from longctx.runtime.metrics import FlopCount, metrics_log, step_metrics
from longctx.runtime.trainer import (
    BETAS,
    Resume,
    TrainSettings,
    announce,
    check_finite,
    complete,
    count_steps,
    find_resume,
    learning_rate,
)

Parameters = dict[str, list[int]]  # name -> shape, in the order in which nnScaler counts them


def compile_plan(args: argparse.Namespace, config, sequence_length: int) -> None:
    """Traces, partitions and writes one gencode<rank>.py a rank, unless equal ones are there."""
    check_gpu()
    check_model(args, config)
    register_ops()
    run_trainer(trainer_args(args, config, sequence_length))
    folder = Path(args.compiled_dir, "_parallel_modules", __name__, WrappedModel.__name__, instance_name(args))
    print(f"compile: {folder} has a gencode<rank>.py for each of {args.runtime_ngpus} rank(s)", flush=True)


def run(args: argparse.Namespace, config, dataset: Any, settings: TrainSettings) -> None:
    """Trains: checks first all that can be checked without a process group, which nnScaler then starts."""
    if "RANK" not in os.environ:
        raise UserError(
            "--engine nnscaler: it needs torchrun; start with torchrun --nproc_per_node=1 train.py ..., or choose "
            "--engine torch"
        )
    check_gpu()
    parameters = check_model(args, config)
    resume = find_resume(args, len(dataset), "nnscaler")
    if resume:
        check_resume(resume, args, parameters, len(dataset))
    announce(args, settings, len(dataset), resume)
    position = resume.state.position if resume else order.Position()
    if position.step >= count_steps(len(dataset), position, rows_per_step(args), settings):
        if os.environ["RANK"] == "0":
            print(complete(position))
        return
    hook = Callbacks(args, config, settings, parameters, len(dataset))
    options = resume_options(resume, parameters, args.precision)
    register_ops()
    rows = Rows(dataset, settings)
    run_trainer(trainer_args(args, config, settings.sequence_length, rows, hook, options))


def run_trainer(train_args: TrainerArgs) -> None:
    """nnScaler's compilation or training; a UserError of ours, which it wraps in errors of its own, comes out."""
    try:
        Trainer(train_args=train_args).run()
    except Exception as error:
        cause = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def instance_name(args: argparse.Namespace) -> str:
    """The job's name as nnScaler takes it: a part of a module's name, where a dot would begin another."""
    return args.name.replace(".", "_")


def check_gpu() -> None:
    try:
        torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:  # as PyTorch says that there is no driver, or that it has no CUDA
        raise UserError(
            f"--engine nnscaler: it needs a GPU, to compile too, and there is none ({one_line(error)}); choose "
            "--engine torch"
        ) from error


def check_model(args: argparse.Namespace, config) -> Parameters:
    """The model's parameters; the modules that options name are in it, and its weights are there, in their shapes."""
    wrapped = build_model(config, DTYPES[args.precision], args.attn_implementation)
    known = {type(module).__name__ for module in wrapped.modules()}
    for option in ("recompute_modules", "pipeline_pivots"):
        names = getattr(args, option) or ""
        if unknown := {name for name in names.split(",") if name} - known:
            raise UserError(
                f"--{option} {names}: {sorted(unknown)[0]} is no module of {type(wrapped.model).__name__}; its modules "
                f"are {', '.join(sorted(known))}"
            )
    parameters = {name: list(parameter.shape) for name, parameter in wrapped.model.named_parameters()}
    if not args.random_init:
        check_weights(find_weights(args.model_id, config), parameters)
    return parameters


def register_ops() -> None:
    """Hands over our ops with their annotations, which are in nnScaler's notation."""
    for op in REGISTERED_OPS.values():
        nnscaler.register_op(op.annotation)(op.fn)


def trainer_args(
    args: argparse.Namespace, config, sequence_length: int, dataset=None, hook=None, resume=None
) -> TrainerArgs:
    """nnScaler's form of the command line. What ranks differ in has no place in it: their checkpoints compare it."""
    running = args.run_mode == "run"
    half = args.precision == "bf16"
    n_stages = args.pipeline_nstages or "auto"  # without pivots that is 1 to autodist
    policy = {
        "mem_constraint": args.gpu_mem_constraint * 1e9 / 2**30,
        "recompute_modules": args.recompute_modules or "",
        "pipeline_pivots": args.pipeline_pivots or "",
        "pipeline_nmicros": args.grad_accumulation_steps,  # of hybrid
        "pipeline_nstages": n_stages if n_stages == "auto" else int(n_stages),
    }
    adamw = {"lr": args.learning_rate, "betas": BETAS, "weight_decay": args.weight_decay}
    chosen = {name: getattr(args, name) for name in ("model_id", "precision", "attn_implementation", "random_init")}
    return TrainerArgs(
        instance_name=instance_name(args),
        run_mode=args.run_mode,
        compute_config=ComputeConfig(
            plan_ngpus=args.plan_ngpus,
            runtime_ngpus=args.runtime_ngpus,
            constant_folding=True,
            use_zero=True,
            use_end2end=True,
            trace_strategy=args.trace_strategy or "reuse_cache",
            pas_config=policy,
            # What is generated is reused where all of this is as it was.
            user_config={"config": config.to_json_string(), **fingerprints(args, config)},
        ),
        pas_policy=args.pas_policy or "autodist",
        gen_savedir=args.compiled_dir,
        gen_reuse="moo",
        broadcast_strategy="all" if running else "none",
        dummy_sample_gen_fn=lambda _: dummy_sample(sequence_length),
        model=ModelConfig(
            type=WrappedModel,
            args={**chosen, "seed": args.seed if args.random_init else 0, "sequence_length": sequence_length},
        ),
        optimizer=OptimizerConfig(
            type=MixedPrecisionAdamW if half else torch.optim.AdamW,
            args={**adamw, "fused": torch.cuda.is_available()},
            clip_gnorm=args.max_grad_norm,
            loss_reduction="per-token-mean",
            grad_reduction="per-token-mean",
            aggregate_outputs_fn=aggregate_outputs,
        ),
        dataset=DatasetConfig(type=lambda: dataset),
        dataloader=DataloaderConfig(train_args={"collate_fn": only_sample, "drop_last": True}),
        dataset_sampler=DatasetSamplerConfig(type=EpochOrder),
        checkpoint=CheckpointConfig(
            save_dir=args.checkpoint_dir,
            save_type="deduped",
            every_n_train_steps=args.checkpoint_interval,
            resume_from=resume,
        ),
        hook=HookConfig(type=lambda _: hook or TrainHook()),
        # Buffers stay float32: RoPE's frequencies in bfloat16 would blur positions thousands of tokens apart.
        precision={"param": args.precision, "buffer": "none", "input": "none"},
        max_epochs=args.max_epochs,
        max_train_steps=args.max_train_steps,
        grad_accumulation_steps=args.grad_accumulation_steps,
        enable_progress_bar=False,
        log_progress_every_n_train_steps=None,
        seed=args.seed,
    )


def fingerprints(args: argparse.Namespace, config) -> dict[str, Any]:
    """Of our code, the versions and the weights, which nnScaler stores when it compiles; the same on every node."""
    weights = {} if args.random_init else find_weights(args.model_id, config)
    return {
        "versions": [str(package.__version__) for package in (torch, transformers, nnscaler)],
        "source": hashlib.sha256(
            b"".join(file.read_bytes() for file in sorted(Path(build.__file__).parent.glob("*.py")))
        ).hexdigest(),
        "annotations": {
            op.name: str(op.annotation) for op in REGISTERED_OPS.values() if isinstance(op.annotation, str)
        },
        "weights": [hash_ends(file) for file in sorted({stored.file for stored in weights.values()})],
    }


def hash_ends(file: Path, n_bytes: int = 1 << 24) -> str:
    """A hash of a file's size, its first and its last bytes: to read all of a large model's would take minutes."""
    size = file.stat().st_size
    with file.open("rb") as content:
        first = content.read(n_bytes)
        content.seek(max(0, size - n_bytes))
        return hashlib.sha256(str(size).encode() + first + content.read()).hexdigest()


# --- the model -----------------------------------------------------------------------------------------------------


class WrappedModel(nn.Module):
    """The causal language model with its weights, on one sample, as nnScaler's Trainer builds and calls it."""

    def __init__(
        self,
        model_id: str,
        precision: str,
        attn_implementation: str,
        random_init: bool,
        seed: int,
        sequence_length: int,
    ):
        super().__init__()
        config = load_config(model_id)
        self.loss = build_model(config, DTYPES[precision], attn_implementation, sequence_length)
        weights = random_weights(config, seed) if random_init else stored_weights(model_id, config)
        fill(self.loss.model, weights)

    def forward(self, sample):
        """{'tokens': [1, l], 'labels': [1, l], 'n_tokens': []} -> summed loss, the same to be logged, n_tokens."""
        loss = self.loss(sample["tokens"], sample["labels"])
        return loss, loss.data, sample["n_tokens"]


def stored_weights(model_id: str, config) -> Iterator[tuple[str, torch.Tensor]]:
    for name, stored in find_weights(model_id, config).items():
        with safe_open(stored.file, "pt") as tensors:
            yield name, tensors.get_tensor(stored.name)


def fill(module: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Puts weights in the place of parameters on meta, in their dtype; tied ones stay tied."""
    named = dict(module.named_parameters())
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((part, name))
    for name, tensor in weights:
        if name in named:
            parameter = nn.Parameter(tensor.to(named[name].dtype))
            for part, attribute in places[named[name]]:
                setattr(part, attribute, parameter)


# --- the data ------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """The rows as samples of WrappedModel; row None has no label that counts."""

    def __init__(self, dataset: Any, settings: TrainSettings):
        self.dataset, self.settings = dataset, settings

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int | None) -> dict[str, torch.Tensor]:
        return sample(*rows.load_row(self.dataset, row, self.settings.sequence_length, self.settings.vocab_size))


def sample(tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens": tokens, "labels": labels, "n_tokens": (labels != rows.IGNORE_INDEX).sum()}


def dummy_sample(sequence_length: int) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(1, sequence_length, dtype=torch.long)
    return sample(tokens, tokens)


def only_sample(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return samples[0]


class EpochOrder(torch.utils.data.Sampler):
    """One data-parallel rank's rows, in the order in which the built-in engine takes them."""

    def __init__(self, dataset: Rows, num_replicas: int, rank: int):
        self.n_rows, self.settings = len(dataset), dataset.settings
        self.data_parallel, self.rank, self.epoch = num_replicas, rank, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int | None]:
        shuffled = order.epoch_order(self.n_rows, self.settings.seed, self.epoch)
        per_step = order.rows_per_step(self.data_parallel, self.settings.grad_accumulation_steps)
        position = order.Position(epoch=self.epoch)
        while position.epoch == self.epoch:
            rows = order.step_rows(shuffled, position, per_step)
            yield from order.micro_batches(rows, self.data_parallel, self.rank)
            position = order.advance(position, rows, self.n_rows)

    def __len__(self) -> int:
        return -(-self.n_rows // self.data_parallel)


def aggregate_outputs(outputs: list[tuple], sync_group: dist.ProcessGroup) -> AggregatedOutputs:
    """Sums losses and tokens that count over micro-batches and data-parallel ranks."""
    sums = sum(torch.stack((loss.double(), n_tokens.double())) for _, loss, n_tokens in outputs)
    dist.all_reduce(sums, group=sync_group)
    loss_sum, n_tokens = sums.tolist()
    return AggregatedOutputs(
        loss_sum, num_batches=len(outputs) * dist.get_world_size(sync_group), num_tokens=int(n_tokens)
    )


# --- the training loop's callbacks ---------------------------------------------------------------------------------


class Callbacks(TrainHook):
    """What the built-in engine does around a step, done within nnScaler's loop."""

    def __init__(self, args: argparse.Namespace, config, settings: TrainSettings, parameters: Parameters, n_rows: int):
        self.args, self.config, self.settings = args, config, settings
        self.parameters, self.n_rows, self.per_step = parameters, n_rows, rows_per_step(args)
        self.open_files = ExitStack()

    def on_train_start(self, trainer: Trainer) -> None:
        # Dropout, as in the built-in engine. Of a resumed run nnScaler puts the random state back after this.
        torch.manual_seed(self.settings.seed + trainer.rank // self.args.plan_ngpus)
        self.position = order.position_after(trainer.train_status.finished_train_steps, self.n_rows, self.per_step)
        n_parameters = sum(torch.Size(shape).numel() for shape in self.parameters.values())
        flops = forward_flops(self.config, n_parameters, self.settings.sequence_length)
        self.flops = FlopCount(*flops, hardware.peak_rate_here(DTYPES[self.args.precision]))
        if trainer.rank == 0:
            files = metrics_log(self.settings.log_dir, self.position.step, trainer.max_train_steps)
            self.log = self.open_files.enter_context(files)

    def on_step_start(self, trainer: Trainer, epoch: int, idx: int) -> None:
        shuffled = order.epoch_order(self.n_rows, self.settings.seed, self.position.epoch)
        self.rows = order.step_rows(shuffled, self.position, self.per_step)
        self.started = time.perf_counter()

    def after_aggregate_train_step_outputs(
        self, trainer: Trainer, aggregated_outputs: AggregatedOutputs, train_loss: float
    ) -> None:
        self.loss = train_loss

    def after_gnorm_clip(self, trainer: Trainer, gnorm: torch.Tensor) -> None:
        self.grad_norm = float(gnorm)
        check_finite(self.position.step + 1, self.rows, self.loss, self.grad_norm)

    def before_optimizer_step(self, trainer: Trainer) -> None:
        self.lr = learning_rate(self.position.step, trainer.max_train_steps, self.settings)
        for group in trainer.optimizer.param_groups:
            group["lr"] = self.lr

    def after_optimizer_step(self, trainer: Trainer) -> None:
        epoch, self.position = self.position.epoch, order.advance(self.position, self.rows, self.n_rows)
        if trainer.rank == 0:
            self.log.write(
                step_metrics(
                    step=self.position.step,
                    epoch=epoch,
                    loss=self.loss,
                    grad_norm=self.grad_norm,
                    learning_rate=self.lr,
                    rows=len(self.rows),
                    sequence_length=self.settings.sequence_length,
                    seconds=time.perf_counter() - self.started,
                    world_size=trainer.world_size,
                    flops=self.flops,
                )
            )

    def on_save_checkpoint(self, trainer: Trainer, state_dict: dict[str, Any]) -> None:
        ranks = trainer.world_size, self.args.plan_ngpus
        state = checkpoint.State(self.position, self.settings.seed, self.n_rows, *ranks, self.parameters)
        state_dict[checkpoint.STATE_ENTRY] = json.dumps(state.to_json())
        if trainer.rank == 0:
            write_hf_files = functools.partial(save_hf_files, self.args.model_id, self.config)
            state_dict[checkpoint.HF_ENTRY] = checkpoint.hf_entry(write_hf_files)

    def on_load_checkpoint(self, trainer: Trainer, state_dict: dict[str, Any]) -> None:
        for name, value in trainer.optimizer.param_groups[0].items():  # this run's options, not the checkpoint's
            if name != "params":
                state_dict["optimizer"]["param_groups"][0][name] = value

    def on_finalize(self, trainer: Trainer) -> None:
        self.open_files.close()


def rows_per_step(args: argparse.Namespace) -> int:
    return order.rows_per_step(args.runtime_ngpus // args.plan_ngpus, args.grad_accumulation_steps)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def check_resume(resume: Resume, args: argparse.Namespace, parameters: Parameters, n_rows: int) -> None:
    """Raises a UserError for a checkpoint of another model, precision or number of rows a step."""
    path, state, option = resume.path, resume.state, resume.option
    checkpoint.check_same_model(state, parameters, option, path)
    stored = checkpoint.nnscaler_precision(path, option) if path.is_dir() else args.precision
    if stored != args.precision:
        raise UserError(
            f"--precision {args.precision}: {option} {path} is of a run in {stored}, whose shards nnscaler can't go on "
            f"from in another; pass --precision {stored}, or merge them with ckpt_merger.py and name the merged file"
        )
    if state.position != order.position_after(state.position.step, n_rows, rows_per_step(args)):
        raise UserError(
            f"--grad_accumulation_steps {args.grad_accumulation_steps}: {option} {path} is of a run that did not "
            f"take {rows_per_step(args)} rows a step, from whose place in the data nnscaler can't go on; take as many, "
            "or choose --engine torch"
        )


def resume_options(resume: Resume | None, parameters: Parameters, precision: str) -> ResumeOptions | None:
    if resume is None:
        return None

    def convert(merged: dict[str, Any]) -> dict[str, Any]:
        return as_nnscaler(checkpoint.normalized(merged), list(parameters), precision)

    return ResumeOptions(checkpoint=str(resume.path), convert_fn=convert)


def as_nnscaler(merged: dict[str, Any], names: list[str], precision: str) -> dict[str, Any]:
    """A merged file of either engine in the form that nnScaler loads: optimizer state by parameters' numbers."""
    states: dict[int, dict[str, torch.Tensor]] = {number: {} for number in range(len(names))}
    for number, name in enumerate(names):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            states[number][key] = merged["optimizer"][f"{name}/{key}"]
        if precision == "bf16":  # MixedPrecisionAdamW's masters
            states[number]["fp32_params"] = merged["model"][name]
    step = json.loads(merged[checkpoint.STATE_ENTRY])["position"]["step"]
    return {
        "model": {
            checkpoint.NNSCALER_PREFIX + name: tensor.to(DTYPES[precision]) for name, tensor in merged["model"].items()
        },
        "optimizer": {"state": states, "param_groups": [{"params": list(states)}]},
        "train_status": {"finished_train_steps": step},
        "nnscaler": nnscaler.__version__,  # without it MixedPrecisionAdamW takes the rounded weights for its masters
    }


def merge(path: Path, output: Path) -> None:
    """A checkpoint's shards -> one file in nnScaler's own format, which both engines resume from."""
    n_ranks = checkpoint.read_state(path, "--ckpt_dir").world_size
    with whole_file(output) as aside:
        Trainer.merge_checkpoint([str(path / f"{rank}.ckpt") for rank in range(n_ranks)], str(aside))
