"""The nnScaler engine, as the scripts call it. Importing it does not import nnScaler; using it does.

It needs PyTorch 2.6 or older, GPUs, and a model's weights already to compile.
"""

import re
from pathlib import Path

import torch

from longctx import torchrun
from longctx.data.order import position_after
from longctx.data.rows import Rows, open_dataset
from longctx.engines.checkpoints import FORMATS
from longctx.engines.nnscaler.checkpoints import Parameters, stored_precision
from longctx.engines.nnscaler.model import WrappedModel
from longctx.engines.nnscaler.options import GENERATED_FOLDER, PivotNameError, instance_name
from longctx.errors import CheckpointMismatch, CompiledError, EngineError, LayerNameError, one_line
from longctx.huggingface.attention import refuse_own_attention
from longctx.huggingface.build import build_model
from longctx.huggingface.configuration import vocab_size
from longctx.huggingface.experts import refuse_mixtures
from longctx.huggingface.overrides import changed_config
from longctx.huggingface.weights import check_hf_files, find_weights, remarks, trained_config
from longctx.job import Job
from longctx.runtime.checkpoint import Checkpoint
from longctx.runtime.metrics import check_log
from longctx.runtime.resume import check_same_model, find_resume
from longctx.runtime.trainer import announce, check_first_rows, count_steps, start_of

# The files of a folder of generated code.
GENERATED_FILES = re.compile(r"gencode\d+\.py|graph\.ckp|forward_args\.pkl|\w+\.pt(\.\d+)?")


def ensure_compiled(job: Job) -> Path:
    """Traces, partitions and writes one gencode<rank>.py a rank, unless equal ones are there; returns their folder."""
    check_gpu()
    check_model(job)
    folder = generated_folder(job)
    check_generated(folder)
    _training().compile_plan(job)
    print(f"compile: {folder} has a gencode<rank>.py for each of {job.runtime_ngpus} rank(s)", flush=True)
    return folder


def run(job: Job) -> tuple[int, int]:
    """Trains: checks first all that can be checked without a process group, which nnScaler then starts.

    Returns:
        The steps that were done before, and those that are now.
    """
    assert job.dataset_path is not None, "parse_job refuses a run without rows"
    check_gpu()
    parameters = check_model(job)
    check_generated(generated_folder(job))
    words = vocab_size(changed_config(job.model_id, job.changes))
    rows = Rows(open_dataset(job.dataset_path), job.sequence_length, words)
    resume = find_resume(job, len(rows), FORMATS)
    if resume:
        check_resume(resume, job, parameters, len(rows))
    check_first_rows(rows, job, resume)
    check_hf_files(job.model_id)
    check_log(job.log_folder, resume is not None)
    announce(job, rows, resume)
    start = start_of(resume)
    total_steps = count_steps(len(rows), start, job)
    if start.step >= total_steps:
        return start.step, start.step
    return start.step, _training().train(job, rows, parameters, resume)


def _training():
    """The part of the engine that imports nnScaler, which takes seconds and is not everywhere."""
    from longctx.engines.nnscaler import training

    return training


def generated_folder(job: Job) -> Path:
    """Where nnScaler puts the code: a folder after the module and the class of the model, and the job's name."""
    model = WrappedModel
    return job.compiled_dir.joinpath(GENERATED_FOLDER, *model.__module__.split("."), model.__name__, instance_name(job))


# --- checks --------------------------------------------------------------------------------------------------------


def check_gpu() -> None:
    try:
        torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:  # as PyTorch says that there is no driver, or that it has no CUDA
        raise EngineError(
            f"it needs a GPU, to compile too, and there is none ({one_line(error)}); choose the torch engine"
        ) from error


def check_generated(folder: Path) -> None:
    """Raises a CompiledError for a file that nnScaler, which empties the folder to compile anew, did not write."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file() and not GENERATED_FILES.fullmatch(file.name):
            raise CompiledError(f"{file} is not one that nnscaler wrote, and compiling would remove it; move it")


def check_model(job: Job) -> Parameters:
    """The parameters of the model, whose weights are known to be there, and to have the modules that options name.

    Raises:
        LayerNameError: it lacks one of the classes.
        ModelError: the weights are not there or do not fit, or the model has an attention of its own, or experts.
    """
    weights = None if job.random_init else find_weights(job.model_id, job.changes)
    # Only after the weights, which it may depend on, are here.
    config = weights.config if weights else trained_config(job.model_id, job.random_init, job.changes)
    wrapped = build_model(config, job.dtype, job.attn_implementation)
    refuse_own_attention(wrapped.model)
    refuse_mixtures(wrapped.model)
    known = {type(module).__name__ for module in wrapped.modules()}
    model_name = type(wrapped.model).__name__
    for kind, names in ((LayerNameError, job.recompute_modules), (PivotNameError, job.nnscaler.pipeline_pivots)):
        if unknown := sorted(set(names or ()) - known):
            raise kind(f"{unknown[0]} is no module of {model_name}; its modules are {', '.join(sorted(known))}")
    if weights:
        torchrun.say(*remarks(weights))
    return {name: list(parameter.shape) for name, parameter in wrapped.model.named_parameters()}


def check_resume(resume: Checkpoint, job: Job, parameters: Parameters, n_rows: int) -> None:
    """Raises a CheckpointError for a checkpoint of another model, precision or number of rows a step."""
    check_same_model(resume, parameters)
    stored = job.precision if resume.merged else stored_precision(resume.path)
    if stored != job.precision:
        raise CheckpointMismatch(
            "precision",
            f"{resume.path} is of a run in {stored}, whose shards nnscaler can't go on from in another; pass {stored}, "
            "or merge them with ckpt_merger.py and name the merged file",
        )
    if resume.state.position != position_after(resume.state.position.step, n_rows, job.rows_per_step):
        raise CheckpointMismatch(
            "grad_accumulation_steps",
            f"{resume.path} is of a run that did not take {job.rows_per_step} rows a step, from whose place in the "
            "data nnscaler can't go on; take as many, or choose the torch engine",
        )
