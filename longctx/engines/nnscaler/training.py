"""nnScaler's Trainer with our model, data and hook. This is the one module that the engine imports nnScaler through."""

import dataclasses
import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers

# Where nnScaler is not installed, pyright takes this folder, which has the same name, for it.
from nnscaler import __version__ as nnscaler_version  # pyright: ignore[reportAttributeAccessIssue]
from nnscaler import register_op  # pyright: ignore[reportAttributeAccessIssue]
from nnscaler.cli.train_hook import TrainHook
from nnscaler.cli.trainer import Trainer
from nnscaler.cli.trainer_args import (
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
from nnscaler.graph.tracer.wrap_utils import LeafWrapInfo, Location, default_autowrap_leaf_function
from nnscaler.parallel import ComputeConfig
from nnscaler.runtime.f16_optimizer import MixedPrecisionAdamW

from longctx import sources
from longctx.compiler.ops import REGISTERED_OPS
from longctx.data.rows import Rows
from longctx.engines.nnscaler.checkpoints import Parameters, as_builtin, as_nnscaler
from longctx.engines.nnscaler.data import EpochOrder, Samples, dummy_sample, only_sample
from longctx.engines.nnscaler.hook import StepHook, aggregate_outputs
from longctx.engines.nnscaler.model import WrappedModel
from longctx.engines.nnscaler.options import instance_name
from longctx.errors import UserError
from longctx.huggingface import attention as huggingface_attention
from longctx.huggingface.weights import find_weights, trained_config
from longctx.job import Job
from longctx.runtime import watch
from longctx.runtime.checkpoint import Checkpoint
from longctx.runtime.parallel import process_group
from longctx.runtime.trainer import BETAS

COMPILE_TIMEOUT = timedelta(hours=6)  # nnScaler's own, of collectives: ranks wait in one while the first compiles


def compile_plan(job: Job) -> None:
    """Traces, partitions and writes the code, unless equal code is there."""
    register_ops()
    run_trainer(trainer_args(job))


def train(job: Job, rows: Rows, parameters: Parameters, resume: Checkpoint | None) -> int:
    """Trains by all ranks, which are joined here; nnScaler takes that over. Returns the steps that are done then."""
    hook = StepHook(job, parameters, len(rows))
    register_ops()
    with process_group(job.device, max(COMPILE_TIMEOUT, timedelta(minutes=job.hang_timeout) + watch.MARGIN)):
        run_trainer(trainer_args(job, Samples(rows, job), hook, resume_options(resume, parameters, job.precision)))
    return hook.position.step


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


def register_ops() -> None:
    """Hands over our ops with their annotations, which are in nnScaler's notation.

    nnScaler's tracer finds an op by its name in the file of a module's forward. Attention is called from elsewhere, by
    a function that transformers calls, so the tracer is told that place.
    """
    for op in REGISTERED_OPS.values():
        register_op(op.annotation_untold)(op.fn)
    place = Location(huggingface_attention, huggingface_attention.attention.__name__)
    default_autowrap_leaf_function[huggingface_attention.attention] = LeafWrapInfo([place], is_force_trace=True)


def trainer_args(
    job: Job, samples: Samples | None = None, hook: StepHook | None = None, resume: ResumeOptions | None = None
) -> TrainerArgs:
    """nnScaler's form of the job. What ranks differ in has no place in it: their checkpoints compare it."""
    model = {name: getattr(job, name) for name in ("model_id", "precision", "attn_implementation", "random_init")}
    seed = job.seed if job.random_init else 0
    return TrainerArgs(
        instance_name=instance_name(job),
        run_mode=job.run_mode,
        compute_config=compute_config(job),
        pas_policy=job.nnscaler.pas_policy or "autodist",
        gen_savedir=str(job.compiled_dir),
        gen_reuse="moo",
        broadcast_strategy="all" if job.run_mode == "run" else "none",
        dummy_sample_gen_fn=lambda _: dummy_sample(job.sequence_length),
        model=ModelConfig(type=WrappedModel, args={**model, "seed": seed, "changes": dataclasses.asdict(job.changes)}),
        optimizer=optimizer_config(job),
        dataset=DatasetConfig(type=lambda: samples),
        dataloader=DataloaderConfig(train_args={"collate_fn": only_sample, "drop_last": True}),
        dataset_sampler=DatasetSamplerConfig(type=EpochOrder),
        checkpoint=CheckpointConfig(
            save_dir=str(job.checkpoint_dir),
            save_type="deduped",
            every_n_train_steps=job.checkpoint_interval,
            resume_from=resume,
        ),
        hook=HookConfig(type=lambda _: hook or TrainHook()),
        # Buffers stay float32: RoPE's frequencies in bfloat16 would blur positions thousands of tokens apart.
        precision={"param": job.precision, "buffer": "none", "input": "none"},
        max_epochs=job.max_epochs,
        max_train_steps=job.max_train_steps,
        grad_accumulation_steps=job.grad_accumulation_steps,
        enable_progress_bar=False,
        log_progress_every_n_train_steps=None,
        seed=job.seed,
    )


def compute_config(job: Job) -> ComputeConfig:
    n_stages = job.nnscaler.pipeline_nstages or "auto"  # without pivots that is 1 to autodist
    policy = {
        "mem_constraint": job.gpu_mem_constraint * 1e9 / 2**30,
        "recompute_modules": ",".join(job.recompute_modules or ()),
        "pipeline_pivots": ",".join(job.nnscaler.pipeline_pivots or ()),
        "pipeline_nmicros": job.grad_accumulation_steps,  # of hybrid
        "pipeline_nstages": n_stages if n_stages == "auto" else int(n_stages),
    }
    config = trained_config(job.model_id, job.random_init, job.changes)
    return ComputeConfig(
        plan_ngpus=job.plan_ngpus,
        runtime_ngpus=job.runtime_ngpus,
        constant_folding=True,
        use_zero=True,
        use_end2end=True,
        trace_strategy=job.nnscaler.trace_strategy or "reuse_cache",
        pas_config=policy,
        # What is generated is reused where all of this is as it was.
        user_config={"config": config.to_json_string(), **fingerprints(job)},
    )


def optimizer_config(job: Job) -> OptimizerConfig:
    adamw = {"lr": job.learning_rate, "betas": BETAS, "weight_decay": job.weight_decay}
    return OptimizerConfig(
        type=MixedPrecisionAdamW if job.precision == "bf16" else torch.optim.AdamW,
        args={**adamw, "fused": torch.cuda.is_available()},
        clip_gnorm=job.max_grad_norm,
        loss_reduction="per-token-mean",
        grad_reduction="per-token-mean",
        aggregate_outputs_fn=aggregate_outputs,
    )


def fingerprints(job: Job) -> dict[str, Any]:
    """Of our code, the versions and the weights, which nnScaler stores when it compiles; the same on every node."""
    files = [] if job.random_init else find_weights(job.model_id, job.changes).files
    return {
        "versions": [str(torch.__version__), str(transformers.__version__), str(nnscaler_version)],
        "sources": sources.hash_files(sources.files_in("kernels", "huggingface")),
        "ops": sources.hash_registered_ops(),
        "weights": [hash_ends(file) for file in files],
    }


def hash_ends(file: Path, n_bytes: int = 1 << 24) -> str:
    """A hash of a file's size, its first and its last bytes: to read all of a large model's would take minutes."""
    size = file.stat().st_size
    with file.open("rb") as content:
        first = content.read(n_bytes)
        content.seek(max(0, size - n_bytes))
        return hashlib.sha256(str(size).encode() + first + content.read()).hexdigest()


def resume_options(resume: Checkpoint | None, parameters: Parameters, precision: str) -> ResumeOptions | None:
    if resume is None:
        return None

    def convert(merged: dict[str, Any]) -> dict[str, Any]:
        return as_nnscaler(as_builtin(merged), list(parameters), precision, nnscaler_version)

    return ResumeOptions(checkpoint=str(resume.path), convert_fn=convert)
