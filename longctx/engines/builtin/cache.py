"""Compiling once: a compiled folder is reused as long as nothing that it depends on has changed.

Under torchrun the first rank of each node compiles and the others wait for it. The first node comes first, so that the
others find the folder if they share it; they need not.
"""

import dataclasses
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers

from longctx import compiled, flops, proof, sources, torchrun
from longctx.atomic import why_not_replaceable
from longctx.compiler import hardware
from longctx.compiler.plan import GB
from longctx.engines.builtin import compile as pipeline
from longctx.errors import CompiledError, CompiledFolderError
from longctx.huggingface.weights import UNTIED, is_untied, trained_config
from longctx.job import Job
from longctx.runtime import collectives
from longctx.runtime.rendezvous import fresh_store

COMPILE_TIMEOUT = timedelta(hours=1)  # far beyond what any model takes


def ensure_compiled(job: Job) -> Path:
    """The job's compiled folder, compiled now unless an equal one is there.

    Raises:
        UserError: the plan can't be made as asked, or this rank would make another one than its node's first.
    """
    hardware.check_memory_limit(job.hardware, job.gpu_mem_constraint * GB)
    if job.run_mode == "compile":  # a run says it as it reads the weights
        say_if_untied(job)
    inputs = plan_inputs(job)
    if torchrun.world_size() == 1:
        compile_unless_up_to_date(job, inputs)
        return job.compiled_folder
    store = fresh_store()
    key, first = (f"{job.compiled_folder.resolve()} of node {node}" for node in (torchrun.node(), 0))
    if torchrun.local_rank() == 0:
        if torchrun.node() != 0:  # where nodes share the folder, it is compiled once
            store.wait([first], COMPILE_TIMEOUT)
        try:
            compile_unless_up_to_date(job, inputs)
        except BaseException:
            store.set(key, "")
            raise
        store.set(key, compiled.fingerprint(inputs))
    else:
        store.wait([key], COMPILE_TIMEOUT)
        check_first_rank(job, store.get(key).decode(), compiled.fingerprint(inputs))
    return job.compiled_folder


def say_if_untied(job: Job) -> None:
    if is_untied(job.model_id, trained_config(job.model_id, job.random_init, job.changes)):
        torchrun.say(UNTIED)


def compile_unless_up_to_date(job: Job, inputs: dict[str, Any]) -> None:
    if is_up_to_date(job, inputs):
        if not job.trust_gencode:
            compiled.check_generated(job.compiled_folder)
        torchrun.say(f"compile: {job.compiled_folder} is up to date, reusing it")
        return
    check_compiled_folder(job, inputs)
    if problem := compiled.why_damaged(job.compiled_folder):
        torchrun.say(f"compile: {job.compiled_folder} is compiled anew, since it is damaged ({problem})")
    pipeline.compile_plan(job, inputs)


def is_up_to_date(job: Job, inputs: dict[str, Any]) -> bool:
    return compiled.read_fingerprint(job.compiled_folder) == compiled.fingerprint(inputs)


def check_compiled_folder(job: Job, inputs: dict[str, Any]) -> None:
    """Raises a CompiledFolderError if compiling would replace somebody's files; a folder up to date is only read."""
    problem = why_not_replaceable(job.compiled_folder, compiled.FILES)
    if problem and not is_up_to_date(job, inputs):
        raise CompiledFolderError(f"{job.compiled_folder}: {problem}")


def check_first_rank(job: Job, theirs: str, ours: str) -> None:
    """Raises a CompiledError unless the node's first rank has compiled what this rank would have.

    Args:
        theirs: the fingerprint of what it has compiled; "" if that failed.
        ours: the fingerprint of what this rank would have compiled.
    """
    if not theirs:
        raise CompiledError(f"compiling {job.compiled_folder} failed on this node's first rank")
    if theirs != ours:
        raise CompiledError(
            f"this node's first rank compiled {job.compiled_folder} from other options, code or devices than this "
            "rank has; start all ranks alike"
        )


# --- what a compiled folder depends on -------------------------------------------------------------------------------


def plan_inputs(job: Job) -> dict[str, Any]:
    """All that the plan and the code depend on: compiled folders of equal inputs are the same."""
    return {
        "config": json.loads(trained_config(job.model_id, job.random_init, job.changes).to_json_string()),
        "sequence_length": job.sequence_length,
        "plan_ngpus": job.plan_ngpus,
        "runtime_ngpus": job.runtime_ngpus,
        "precision": job.precision,
        "attn_implementation": job.attn_implementation,
        "deterministic": job.deterministic,
        "documents": job.equal_documents,  # 0 where those of a row see each other
        "hardware": dataclasses.asdict(hardware.load(job.hardware)),
        "gpu_mem_constraint": job.gpu_mem_constraint,
        "grad_accumulation_steps": job.grad_accumulation_steps,
        "recompute_modules": job.recompute_modules,
        "expert_imbalance": job.expert_imbalance,
        "trust_model": job.trust_model,  # what was trusted is compiled anew, and proved, once it isn't any more
        "plan": compiled.read_decisions(job.plan) if job.plan else None,
        "ops": sources.hash_registered_ops(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sources": sources.hash_files(compiler_sources()),
    }


def compiler_sources() -> list[Path]:
    """Every file of ours whose change may change the plan or the code, or what the code's calls do by default."""
    rooms = sources.files_in("compiler", "kernels", "huggingface")
    return [*rooms, *(Path(str(module.__file__)) for module in (collectives, pipeline, compiled, flops, proof))]
