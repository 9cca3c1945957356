"""Training with the built-in engine: the compiled module under FSDP2, its weights, and the training loop."""

import functools
from pathlib import Path

from longctx import compiled
from longctx.compiler import hardware
from longctx.data.rows import Rows, open_dataset
from longctx.engines.builtin.cache import ensure_compiled
from longctx.engines.checkpoints import FORMATS
from longctx.huggingface.build import DTYPES, load_config
from longctx.huggingface.weights import check_weights, find_weights, random_weights, save_hf_files
from longctx.options import Job
from longctx.runtime import parallel
from longctx.runtime.metrics import FlopCount, check_log
from longctx.runtime.resume import check_same_model, find_resume
from longctx.runtime.trainer import announce, train


def run(job: Job) -> None:
    """Trains: checks first all that can be checked without a process group, then joins the ranks."""
    assert job.dataset_path is not None, "parse_job refuses a run without rows"
    config = load_config(job.model_id)
    rows = Rows(open_dataset(job.dataset_path), job.sequence_length, config.vocab_size)
    resume = find_resume(job, len(rows), FORMATS)
    check_log(job.log_folder, resume is not None)
    weights = None if job.random_init or resume else find_weights(job.model_id, config)
    folder = ensure_compiled(job)
    plan = compiled.read_plan_file(folder).module
    if resume:
        check_same_model(resume, plan.parameters)
    elif weights:
        check_weights(weights, plan.parameters)
    with parallel.process_group() as device:
        model = build_on_rank(job, folder, plan, device)
        if weights is not None:
            parallel.load_safetensors(model, weights)
        elif resume is None:
            parallel.load_tensors(model, random_weights(config, job.seed))
        flops = FlopCount(plan.forward_flops, plan.forward_flops_causal, hardware.peak_rate_here(DTYPES[job.precision]))
        announce(job, len(rows), resume)
        train(model, rows, job, flops, resume, functools.partial(save_hf_files, job.model_id, config))


def build_on_rank(job: Job, folder: Path, plan: compiled.GeneratedModule, device) -> parallel.ParallelModel:
    """The generated module, sharded over the ranks; its weights have memory and no values yet."""
    module = parallel.load_generated(folder, plan.class_name)
    dtype = DTYPES[job.precision]
    return parallel.parallelize(module, plan.layers_path, device, dtype, job.plan_ngpus, plan.plan_sharded)
