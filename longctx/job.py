"""The job: what train.py's options are, and what they amount to. options.py reads them, completes and checks them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx.command_line import LARGEST_SEED, MOST_TOKENS, option
from longctx.data import order
from longctx.engines import ENGINE_NAMES
from longctx.engines.nnscaler.options import NnscalerOptions
from longctx.huggingface.changes import Changes
from longctx.kernels.fused import KERNELS

MOST_RANKS = 2**17  # more GPUs than any cluster has yet
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # that a model may compute in


@dataclass(frozen=True, kw_only=True)
class Options:
    """train.py's options, as they are given."""

    run_mode: str = option(
        "run",
        "compile: write the plan's code and stop; rehearse: time and weigh one rank of it, alone on this machine",
        choices=("compile", "run", "rehearse"),
    )
    engine: str = option("auto", "auto takes nnscaler where it works, else torch", choices=("auto", *ENGINE_NAMES))
    model_id: str = option(help="a Hugging Face model: a name on the hub, or a folder")
    dataset_path: str | None = option(None, "rows of tokens that bookcorpus.py wrote")
    sequence_length: int | None = option(
        None, "tokens a row; stands in for --dataset_path in compile", at_least=2, at_most=MOST_TOKENS
    )
    plan_ngpus: int = option(1, "GPUs that one copy of the plan spans", at_least=1, at_most=MOST_RANKS)
    runtime_ngpus: int | None = option(
        None,
        "all GPUs, a multiple of plan_ngpus (default: the processes there are)",
        at_least=1,
        at_most=MOST_RANKS,
    )

    device: str = option(
        "auto", "what ranks compute on; auto: GPUs, where there are any", choices=("auto", "cpu", "cuda")
    )

    # Where things go.
    name: str | None = option(None, "of the compiled folder and the logs (default: made of model, length and ranks)")
    compiled_dir: Path = option(Path("compiled"), "where compiled folders go")
    checkpoint_dir: Path = option(Path("checkpoints"), "where checkpoints go")
    log_dir: Path = option(Path("runs"), "where TensorBoard events and metrics.jsonl go")
    resume_path: Path | None = option(
        None, "a checkpoint folder or a merged file to go on from (default: the newest in --checkpoint_dir)"
    )
    no_verify: bool = option(False, "use checkpoints and rows without comparing their bytes with their digests")

    # The plan.
    hardware: str | None = option(
        None,
        "to plan for: a device's name, such as h100 or cpu, or a file that python -m longctx.measure "
        "measured (default: what is here)",
    )
    gpu_mem_constraint: float = option(72.0, "GB a GPU that the plan may need", above=0, at_most=1e6)
    recompute_modules: tuple[str, ...] | None = option(
        None, "class names, separated by commas, of the layers to recompute; '' for none (default: planned)"
    )
    expert_imbalance: float = option(
        1.5,
        "where ranks share out a mixture's experts, the tokens of the busiest rank's over the mean that the plan has "
        "room for",
        at_least=1,
        at_most=1e3,
    )
    plan: Path | None = option(None, "the plan.json whose partitions to take, at this sequence length")

    # A rehearsal.
    rehearse_rank: int = option(0, "the rank that is rehearsed", at_least=0)
    rehearse_layers: int | None = option(
        None, "layers of each kind that run; the others are counted like them (default: all run)", at_least=1
    )

    # The model.
    rope_parameters: dict[str, Any] | None = option(
        None, "JSON of transformers' keys, such as rope_type and factor, in place of the model's own"
    )
    rope_theta: float | None = option(None, "the base of the rotary frequencies", above=0)
    config_overrides: tuple[str, ...] | None = option(
        None, "key=value, separated by commas, in place of what the model's config.json has"
    )
    random_init: bool = option(False, "start from seeded random weights, not from the model's")
    precision: str = option("bf16", "of compute; master weights, optimizer and sums are float32", choices=tuple(DTYPES))
    attn_implementation: str = option(
        "auto", "auto takes the fastest kernel that is here", choices=("auto", *KERNELS, "sdpa", "eager")
    )
    trust_gencode: bool = option(False, "run the code in the compiled folder although it is not what compile wrote")
    trust_model: bool = option(False, "compile without proving that the code computes what the model does")
    deterministic: bool = option(False, "the same bits in every run, on a GPU too; slower, and takes more memory")

    document_mask: bool = option(
        False, "each token sees only those of its own document, and positions begin anew with each document of a row"
    )

    # Training. A step is one of the optimizer's.
    learning_rate: float = option(2e-5, "of AdamW", above=0)
    min_learning_rate: float = option(0.0, "the floor that linear and cosine schedules fall to", at_least=0)
    lr_schedule: str = option("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = option(0, at_least=0)
    weight_decay: float = option(0.0, at_least=0)
    max_grad_norm: float = option(1.0, above=0)
    grad_accumulation_steps: int = option(4, "rows a data-parallel rank takes in a step", at_least=1)
    max_epochs: int = option(2, at_least=1)
    max_train_steps: int | None = option(None, "stop here even if epochs are left", at_least=1)
    checkpoint_interval: int = option(1000, "steps between checkpoints; the last step has one anyway", at_least=1)
    max_loss: float | None = option(None, "a loss above this is taken as one that is not finite", above=0)
    on_nonfinite: str = option(
        "stop",
        "where a loss or gradient is not finite; rollback: go back to the last checkpoint and skip the step's rows",
        choices=("stop", "rollback"),
    )
    hang_timeout: float = option(
        30.0, "minutes without progress after which a rank writes its stacks and ends", above=0, at_most=1e5
    )
    keep_last_n: int | None = option(
        None, "checkpoints that stay in --checkpoint_dir; an older one goes once a newer is whole", at_least=1
    )
    stop_on_save_failure: bool = option(False, "end the run where a checkpoint can't be saved, rather than train on")
    seed: int = option(0, "of the order of the rows, of dropout and of --random_init", at_least=0, at_most=LARGEST_SEED)

    nnscaler: NnscalerOptions = NnscalerOptions()


@dataclass(frozen=True, kw_only=True)
class Job(Options):
    """The job that the options ask for: nothing is left open, and `engine` is the one that does it."""

    sequence_length: int = field()
    runtime_ngpus: int = field()
    device: str = "cpu"  # or "cuda"
    name: str = field()
    engine_reason: str = ""  # why it is this engine
    # With --document_mask: how many documents of equal length attention in a row costs as much as within the rows' own.
    equal_documents: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return DTYPES[self.precision]

    @property
    def changes(self) -> Changes:
        """What the options change of the model's configuration."""
        return Changes(self.rope_parameters, self.rope_theta, self.config_overrides or (), self.sequence_length)

    @property
    def data_parallel_size(self) -> int:
        """How many copies of the plan train side by side, each on rows of its own."""
        return self.runtime_ngpus // self.plan_ngpus

    @property
    def rows_per_step(self) -> int:
        return order.rows_per_step(self.data_parallel_size, self.grad_accumulation_steps)

    @property
    def compiled_folder(self) -> Path:
        return self.compiled_dir / self.name

    @property
    def log_folder(self) -> Path:
        return self.log_dir / self.name
