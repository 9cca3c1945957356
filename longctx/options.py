"""train.py's options: all of them, their checks, and which option an error is about. `Job` is what they amount to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from longctx import compiled, torchrun
from longctx.atomic import why_not_replaceable, why_not_writable
from longctx.command_line import Cause, naming_options, option, parse, value_as_text
from longctx.data import order, rows
from longctx.engines.nnscaler import options as nnscaler
from longctx.engines.nnscaler.options import NnscalerOptions
from longctx.errors import (
    CheckpointError,
    CheckpointFolderError,
    CheckpointMismatch,
    CompiledError,
    DecisionsError,
    DoesNotFit,
    EngineError,
    HardwareError,
    KernelError,
    LayerNameError,
    LogError,
    ModelError,
    NoWeights,
    OtherEngine,
    PlanSizeError,
    RowsError,
    TrainingError,
    UserError,
)
from longctx.huggingface.build import ATTN_IMPLEMENTATIONS, DTYPES, load_config

DESCRIPTION = "Trains a causal language model at long context: compiles a plan for it, then runs the generated code."


@dataclass(frozen=True, kw_only=True)
class Job:
    """What train.py is asked to do. `parse_job` fills in runtime_ngpus, sequence_length and name, if they are None."""

    run_mode: str = option("run", "compile: write the plan's code and stop", choices=("compile", "run"))
    engine: str = option(
        "auto", "auto takes nnscaler where it works, else torch", choices=("auto", "torch", "nnscaler")
    )
    engine_reason: str = ""  # why it is this engine
    model_id: str = option(help="a Hugging Face model: a name on the hub, or a folder")
    dataset_path: str | None = option(None, "rows of tokens that bookcorpus.py wrote")
    sequence_length: int = option(None, "tokens a row; stands in for --dataset_path in compile", at_least=2)
    plan_ngpus: int = option(1, "GPUs that one copy of the plan spans", at_least=1)
    runtime_ngpus: int = option(
        None, "all GPUs, a multiple of plan_ngpus (default: the processes there are)", at_least=1
    )

    # Where things go.
    name: str = option(None, "of the compiled folder and the logs (default: made of model, length and ranks)")
    compiled_dir: Path = option(Path("compiled"), "where compiled folders go")
    checkpoint_dir: Path = option(Path("checkpoints"), "where checkpoints go")
    log_dir: Path = option(Path("runs"), "where TensorBoard events and metrics.jsonl go")
    resume_path: Path | None = option(
        None, "a checkpoint folder or a merged file to go on from (default: the last in --checkpoint_dir)"
    )

    # The plan.
    hardware: str | None = option(
        None,
        "to plan for: a device's name, such as h100 or cpu, or a file that python -m longctx.measure "
        "measured (default: what is here)",
    )
    gpu_mem_constraint: float = option(64.0, "GB a GPU that the plan may need", above=0)
    recompute_modules: tuple[str, ...] | None = option(
        None, "class names, separated by commas, of the layers to recompute; '' for none (default: planned)"
    )
    plan: Path | None = option(None, "the plan.json whose partitions to take, at this sequence length")

    # The model.
    random_init: bool = option(False, "start from seeded random weights, not from the model's")
    precision: str = option("bf16", "of compute; master weights, optimizer and sums are float32", choices=tuple(DTYPES))
    attn_implementation: str = option("auto", "force one kernel", choices=ATTN_IMPLEMENTATIONS)

    # Training. A step is one of the optimizer's.
    learning_rate: float = option(2e-5, above=0)
    lr_schedule: str = option("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = option(0, at_least=0)
    weight_decay: float = option(0.0, at_least=0)
    max_grad_norm: float = option(1.0, above=0)
    grad_accumulation_steps: int = option(4, "rows a data-parallel rank takes in a step", at_least=1)
    max_epochs: int = option(2, at_least=1)
    max_train_steps: int | None = option(None, "stop here even if epochs are left", at_least=1)
    checkpoint_interval: int = option(1000, "steps between checkpoints; the last step has one anyway", at_least=1)
    seed: int = option(0, "of the order of the rows, of dropout and of --random_init")

    nnscaler: NnscalerOptions = NnscalerOptions()

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


def parse_job(argv: list[str] | None = None) -> Job:
    """The job that a command line asks for, complete and checked.

    Raises:
        UserError: it can't be done as asked; the sentence names the option.
    """
    job = parse(Job, argv, DESCRIPTION)
    with naming_options(job, causes(job)):
        job = fill_in(job)
        for check in CHECKS:
            check(job)
    return job


def fill_in(job: Job) -> Job:
    """The job with a value for what a person may leave out."""
    engine, reason = nnscaler.choose_engine(job.engine)
    runtime_ngpus = job.runtime_ngpus
    if runtime_ngpus is None:
        runtime_ngpus = job.plan_ngpus if job.run_mode == "compile" else torchrun.world_size()
    length = choose_sequence_length(job)
    name = job.name
    if name is None:
        name = f"{Path(job.model_id).name}-{length}-{job.plan_ngpus}of{runtime_ngpus}"
    filled = {"runtime_ngpus": runtime_ngpus, "sequence_length": length, "name": name}
    return replace(job, engine=engine, engine_reason=reason, **filled)


def choose_sequence_length(job: Job) -> int:
    """The rows' length, or --sequence_length where there are no rows.

    Raises:
        UserError: neither is given, or they differ.
    """
    if job.dataset_path is None:
        if job.run_mode == "run":
            raise UserError("--dataset_path: it is missing; make rows of tokens with bookcorpus.py")
        if job.sequence_length is None:
            raise UserError("--dataset_path: it is missing; give it, or --sequence_length, to compile")
        return job.sequence_length
    length = len(rows.open_dataset(job.dataset_path)[0]["input_ids"])
    if job.sequence_length not in (None, length):
        raise UserError(
            f"--sequence_length {job.sequence_length}: the rows of --dataset_path {job.dataset_path} have {length} "
            "tokens; leave the option out, or make rows of that length with bookcorpus.py"
        )
    return length


# --- checks --------------------------------------------------------------------------------------------------------


def check_name(job: Job) -> None:
    if job.name in ("", "..") or Path(job.name).name != job.name:
        raise UserError(f"--name {job.name!r}: it has to be a plain name, of one folder; leave out slashes and dots")


def check_ranks(job: Job) -> None:
    if job.runtime_ngpus % job.plan_ngpus:
        raise UserError(
            f"--runtime_ngpus {job.runtime_ngpus}: it has to be a multiple of --plan_ngpus {job.plan_ngpus}, "
            "since each copy of the plan spans that many"
        )
    if job.run_mode == "run" and job.runtime_ngpus != torchrun.world_size():
        raise UserError(
            f"--runtime_ngpus {job.runtime_ngpus}: there are {torchrun.world_size()} processes; start with "
            f"torchrun --nproc_per_node={job.runtime_ngpus} train.py ..."
        )


def check_engine_options(job: Job) -> None:
    """Raises a UserError for an option that only the other engine has a meaning for."""
    of_one_engine = {"torch": ("hardware", "plan"), "nnscaler": nnscaler.OPTION_NAMES}
    for engine, names in of_one_engine.items():
        given = [name for name in names if value_as_text(job, name)]
        if engine != job.engine and given:
            raise UserError(
                f"--{given[0]} {value_as_text(job, given[0])}: it means nothing to the {job.engine} engine; leave it "
                f"out, or choose --engine {engine}"
            )


def check_vocabulary(job: Job) -> None:
    """Raises a UserError if the tokenizer that made the rows has more entries than the model."""
    config = load_config(job.model_id)
    facts = rows.corpus_facts(job.dataset_path) if job.dataset_path else {}
    if facts.get("vocab_size", 0) > config.vocab_size:
        raise UserError(
            f"--dataset_path {job.dataset_path}: its tokenizer {facts['tokenizer']} has {facts['vocab_size']} entries "
            f"and the model's vocabulary {config.vocab_size}; make the rows with the model's own tokenizer"
        )


def check_folders(job: Job) -> None:
    """Raises a UserError for a folder that could not be written to, before there is anything to lose."""
    if job.engine == "torch" and (problem := why_not_replaceable(job.compiled_folder, compiled.FILES)):
        raise UserError(
            f"--compiled_dir {job.compiled_dir} --name {job.name}: {job.compiled_folder}: {problem}; name another"
        )
    generated = job.compiled_folder if job.engine == "torch" else job.compiled_dir / nnscaler.GENERATED_FOLDER
    written = {} if generated.is_dir() else {"compiled_dir": generated}  # it may be up to date, and then is only read
    if job.run_mode == "run":
        written |= {"checkpoint_dir": job.checkpoint_dir, "log_dir": job.log_folder}
    for name, folder in written.items():
        if problem := why_not_writable(folder):
            raise UserError(f"--{name} {value_as_text(job, name)}: {problem}; name another folder")


CHECKS = (
    check_name,
    check_ranks,
    check_engine_options,
    nnscaler.check_policy,
    nnscaler.check_torchrun,
    check_vocabulary,
    check_folders,
)


def say_complete(step: int) -> None:
    """Rank 0 prints that a job has no step left to take after this one."""
    if torchrun.rank() == 0:
        print(f"run: training is complete after step {step}; raise --max_epochs or --max_train_steps to go on")


# --- errors --------------------------------------------------------------------------------------------------------

CAUSES: Mapping[type[UserError], Cause] = {
    EngineError: Cause("engine"),
    ModelError: Cause("model_id"),
    NoWeights: Cause("model_id", "pass --random_init to start without"),
    RowsError: Cause("dataset_path"),
    KernelError: Cause("attn_implementation"),
    HardwareError: Cause("hardware"),
    PlanSizeError: Cause("plan_ngpus"),
    DoesNotFit: Cause(
        "gpu_mem_constraint",
        "raise it by {error.missing_gb:.1f}, take more GPUs (--plan_ngpus, --runtime_ngpus), or shorter rows",
    ),
    DecisionsError: Cause("plan"),
    LayerNameError: Cause("recompute_modules"),
    CompiledError: Cause("compiled_dir"),
    CheckpointFolderError: Cause("checkpoint_dir", "name another folder"),
    CheckpointMismatch: Cause("{error.field}"),
    LogError: Cause("log_dir", "name another folder, or another --name"),
    TrainingError: Cause(None, "look at these rows, or resume from it with a lower --learning_rate"),
    **nnscaler.CAUSES,
}


def causes(job: Job) -> dict[type[UserError], Cause]:
    """Which option of the job each kind of error is about."""
    checkpoint = "resume_path" if job.resume_path else "checkpoint_dir"
    other_engine = (
        "choose --engine {error.engine}, or merge it with ckpt_merger.py and name the merged file with --resume_path, "
        "and another --checkpoint_dir"
    )
    return {**CAUSES, CheckpointError: Cause(checkpoint), OtherEngine: Cause(checkpoint, other_engine)}
