"""train.py's options read from a command line: completed, checked, and named by the errors that are about them.

What the options are is declared in job.py.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from longctx import devices, torchrun
from longctx.atomic import why_not_writable
from longctx.command_line import LONGEST_NAME, Cause, naming_options, parse, value_as_text
from longctx.data import packing, rows
from longctx.engines import NNSCALER, TORCH
from longctx.engines.nnscaler import options as nnscaler
from longctx.errors import (
    CheckpointError,
    CheckpointFolderError,
    CheckpointMismatch,
    CompiledError,
    CompiledFolderError,
    ConfigurationError,
    DecisionsError,
    DeviceError,
    DoesNotFit,
    EngineError,
    GeneratedCodeError,
    HardwareError,
    KernelError,
    LayerNameError,
    LogError,
    MemoryLimitError,
    ModelError,
    NoRoom,
    NoWeights,
    OtherEngine,
    OutOfMemory,
    PlanSizeError,
    ProofError,
    RehearsalError,
    RowsError,
    SaveError,
    TrainingError,
    UserError,
)
from longctx.huggingface.configuration import bos_token, vocab_size
from longctx.huggingface.overrides import changed_config
from longctx.job import Job, Options
from longctx.kernels.fused import KERNELS, check_documents, why_not

DESCRIPTION = "Trains a causal language model at long context: compiles a plan for it, then runs the generated code."


def parse_job(argv: list[str] | None = None) -> Job:
    """The job that a command line asks for, complete and checked.

    Raises:
        UserError: it can't be done as asked; the sentence names the option.
    """
    options = parse(Options, argv, DESCRIPTION)
    check_environment(options)
    with naming_options(options, causes(options)):
        job = complete(options)
        for check in CHECKS:
            check(job)
    return job


def check_environment(options: Options) -> None:
    """Raises a UserError for variables of ranks that can't be, where ranks are to work together."""
    if (options.run_mode == "run" or torchrun.started_this()) and (problem := torchrun.why_not_usable()):
        raise UserError(problem)


def complete(options: Options) -> Job:
    """The job, with a value for whatever the options leave open.

    Raises:
        UserError: no value would do.
    """
    device = choose_device(options)
    engine, reason = nnscaler.choose_engine(options.engine, device)
    if engine == NNSCALER and options.device == "cpu":
        raise UserError("--device cpu: the nnscaler engine works on GPUs only; choose --engine torch")
    runtime_ngpus = choose_runtime_ngpus(options)
    length = choose_sequence_length(options)
    chosen = {
        "engine": engine,
        "engine_reason": reason,
        "runtime_ngpus": runtime_ngpus,
        "device": device,
        "sequence_length": length,
        "name": options.name or f"{model_name(options.model_id)}-{length}-{options.plan_ngpus}of{runtime_ngpus}",
    }
    job = Job(**{**vars(options), **chosen})
    return replace(job, equal_documents=equal_documents(job)) if job.document_mask else job


def model_name(model_id: str) -> str:
    """The last part of a hub model's name or of a folder's path, also where that is `.` or `..`."""
    return Path(os.path.abspath(model_id)).name


def choose_device(options: Options) -> str:
    """'cpu' or 'cuda'. To compile takes no device.

    Raises:
        DeviceError: there is no GPU, and one is asked for.
    """
    return devices.choose("auto" if options.run_mode == "compile" else options.device)


def choose_runtime_ngpus(options: Options) -> int:
    """All ranks: as many as are asked for, else those that are running, else one copy of the plan.

    Raises:
        UserError: copies of the plan don't add up to them, or others are running.
    """
    running, alone = torchrun.world_size(), options.run_mode != "run"
    runtime_ngpus = options.runtime_ngpus or (options.plan_ngpus if alone else running)
    if runtime_ngpus % options.plan_ngpus:
        raise UserError(
            f"--runtime_ngpus {runtime_ngpus}: it has to be a multiple of --plan_ngpus {options.plan_ngpus}, "
            "since each copy of the plan spans that many"
        )
    if not alone and runtime_ngpus != running:
        raise UserError(
            f"--runtime_ngpus {runtime_ngpus}: there are {running} processes; start with "
            f"torchrun --nproc_per_node={runtime_ngpus} train.py ..."
        )
    return runtime_ngpus


def choose_sequence_length(options: Options) -> int:
    """The rows' length, or --sequence_length where there are no rows.

    Raises:
        UserError: neither is given, or they differ.
    """
    if options.dataset_path is None:
        if options.run_mode == "run":
            raise UserError("--dataset_path: it is missing; make rows of tokens with bookcorpus.py")
        if options.sequence_length is None:
            raise UserError(f"--dataset_path: it is missing; give it, or --sequence_length, to {options.run_mode}")
        return options.sequence_length
    try:
        length = rows.row_length(rows.open_dataset(options.dataset_path))
    except RowsError:
        rows.verify_dataset(options.dataset_path)  # names the file, if one is not what was written
        raise
    if options.sequence_length not in (None, length):
        raise UserError(
            f"--sequence_length {options.sequence_length}: the rows of --dataset_path {options.dataset_path} have "
            f"{length} tokens; leave the option out, or make rows of that length with bookcorpus.py"
        )
    return length


def equal_documents(job: Job) -> int:
    """How many documents of equal length attention in a row costs as much as within the rows' own; 1 without rows.

    Raises:
        RowsError: nothing says where the documents of the rows begin.
    """
    if job.dataset_path is None:
        return 1
    dataset, bos = rows.open_dataset(job.dataset_path), bos_token(changed_config(job.model_id, job.changes))
    boundaries = packing.find_boundaries(job.dataset_path, dataset, job.sequence_length, bos)
    return max(1, round(job.sequence_length / boundaries.length))


# --- checks --------------------------------------------------------------------------------------------------------


def check_name(job: Job) -> None:
    if job.name == ".." or Path(job.name).name != job.name:
        raise UserError(f"--name {job.name!r}: it has to be a plain name, of one folder; leave out slashes and dots")
    if (
        len(os.fsencode(job.name)) > LONGEST_NAME
    ):  # made of the model's, since one that is given is checked as it is read
        raise UserError(
            f"--name: what is made of the model's name is longer than {LONGEST_NAME} bytes; give a shorter one"
        )


def check_engine_options(job: Job) -> None:
    """Raises a UserError for an option that only the other engine has a meaning for."""
    of_one_engine = {TORCH: ("hardware", "plan", "keep_last_n"), NNSCALER: nnscaler.OPTION_NAMES}
    for engine, names in of_one_engine.items():
        given = [name for name in names if value_as_text(job, name)]
        if engine != job.engine and given:
            raise UserError(
                f"--{given[0]} {value_as_text(job, given[0])}: it means nothing to the {job.engine} engine; leave it "
                f"out, or choose --engine {engine}"
            )


def check_schedule(job: Job) -> None:
    """Raises a UserError for a floor of the learning rate that is above it, or that it never falls to."""
    if job.min_learning_rate > job.learning_rate:
        raise UserError(
            f"--min_learning_rate {job.min_learning_rate}: it is above --learning_rate {job.learning_rate}; lower it"
        )
    if job.min_learning_rate and job.lr_schedule == "constant":
        raise UserError(
            f"--min_learning_rate {job.min_learning_rate}: a constant learning rate does not fall; leave it out, or "
            "choose --lr_schedule linear or cosine"
        )


def check_rehearsal(job: Job) -> None:
    """Raises a UserError for a rehearsal of no rank, or by an engine or a launcher that can't do one."""
    if job.run_mode != "rehearse":
        return
    if job.engine != TORCH:
        raise UserError(
            f"--run_mode rehearse: the {job.engine} engine has no rehearsal; choose --engine {TORCH}, or --run_mode run"
        )
    if job.rehearse_rank >= job.runtime_ngpus:
        raise UserError(
            f"--rehearse_rank {job.rehearse_rank}: it has to be below --runtime_ngpus {job.runtime_ngpus}, since ranks "
            "count from 0"
        )
    if torchrun.world_size() > 1:
        raise UserError(
            "--run_mode rehearse: it runs one rank in one process; start it with python train.py, without torchrun"
        )


def check_attention(job: Job) -> None:
    """Raises a KernelError for a kernel that is not there, and a UserError for one that is not deterministic."""
    name = job.attn_implementation
    # Which GPU it is, is asked when this rank has taken its own: to ask before would start CUDA on another one.
    runs_on_cpu = job.run_mode != "compile" and job.device == "cpu"
    if reason := why_not(name, job.dtype, "cpu" if runs_on_cpu else None):
        raise KernelError(reason)
    if job.deterministic and name in KERNELS and not KERNELS[name].deterministic:
        others = ", ".join(other for other, kernel in KERNELS.items() if kernel.deterministic)
        raise UserError(
            f"--deterministic: the backward of --attn_implementation {name} gives other bits each time; leave one of "
            f"them out, or choose auto or one of {others}"
        )
    if job.document_mask:
        check_documents(name)


def check_vocabulary(job: Job) -> None:
    """Raises a RowsError if the rows have tokens that the model does not know, by what is recorded of them."""
    if job.dataset_path:
        rows.check_tokenizer(job.dataset_path, vocab_size(changed_config(job.model_id, job.changes)))


def check_folders(job: Job) -> None:
    """Raises a UserError for a folder that could not be written to, before there is anything to lose."""
    generated = job.compiled_folder if job.engine == TORCH else job.compiled_dir / nnscaler.GENERATED_FOLDER
    written = {} if generated.is_dir() else {"compiled_dir": generated}  # it may be up to date, and then is only read
    if job.run_mode == "run":
        written |= {"checkpoint_dir": job.checkpoint_dir, "log_dir": job.log_folder}
    for name, folder in written.items():
        if problem := why_not_writable(folder):
            raise UserError(f"--{name} {value_as_text(job, name)}: {problem}; name another folder")


def check_rows(job: Job) -> None:
    """Raises a RowsError if the rows of a run are not what was written. To read them all takes a while."""
    if job.run_mode == "run" and job.dataset_path and not job.no_verify and torchrun.local_rank() == 0:
        rows.verify_dataset(job.dataset_path)  # the other ranks of the node wait for it


CHECKS = (
    check_name,
    check_engine_options,
    check_schedule,
    check_rehearsal,
    check_attention,
    nnscaler.check_options,
    nnscaler.check_policy,
    nnscaler.check_torchrun,
    check_folders,
    check_rows,
    check_vocabulary,
)


# --- errors --------------------------------------------------------------------------------------------------------

CAUSES: Mapping[type[UserError], Cause] = {
    EngineError: Cause("engine"),
    ModelError: Cause("model_id"),
    ConfigurationError: Cause("{error.field}"),
    ProofError: Cause("model_id", "pass --trust_model to compile it all the same"),
    NoWeights: Cause("model_id", "pass --random_init to start without"),
    RowsError: Cause("dataset_path"),
    DeviceError: Cause("device"),
    KernelError: Cause("attn_implementation"),
    HardwareError: Cause("hardware"),
    PlanSizeError: Cause("plan_ngpus"),
    DoesNotFit: Cause(
        "gpu_mem_constraint",
        "raise it by {error.missing_gb:.1f}, take more GPUs (--plan_ngpus, --runtime_ngpus), or shorter rows",
    ),
    MemoryLimitError: Cause("gpu_mem_constraint", "choose less, with some GB to spare (docs/memory.md says how many)"),
    OutOfMemory: Cause(
        "gpu_mem_constraint",
        "lower it, for a plan that keeps less, or take more GPUs (--plan_ngpus, --runtime_ngpus), or shorter rows",
    ),
    DecisionsError: Cause("plan"),
    RehearsalError: Cause("rehearse_layers", "leave the option out"),
    LayerNameError: Cause("recompute_modules"),
    CompiledError: Cause("compiled_dir"),
    GeneratedCodeError: Cause("compiled_dir", "or pass --trust_gencode to run it as it is"),
    CompiledFolderError: Cause("compiled_dir", "name another folder, or another --name"),
    CheckpointFolderError: Cause("checkpoint_dir"),
    SaveError: Cause("checkpoint_dir"),
    NoRoom: Cause("checkpoint_dir"),
    CheckpointMismatch: Cause("{error.field}"),
    LogError: Cause("log_dir", "name another folder, or another --name"),
    TrainingError: Cause(None, "look at these rows, or resume from it with a lower --learning_rate"),
    **nnscaler.CAUSES,
}


def causes(options: Options) -> dict[type[UserError], Cause]:
    """Which option each kind of error is about."""
    checkpoint = "resume_path" if options.resume_path else "checkpoint_dir"
    other_engine = (
        "choose --engine {error.engine}, or merge it with ckpt_merger.py and name the merged file with --resume_path, "
        "and another --checkpoint_dir"
    )
    return {**CAUSES, CheckpointError: Cause(checkpoint), OtherEngine: Cause(checkpoint, other_engine)}
