"""The options of nnScaler alone, what its policies take, and where it works. Nothing here imports nnScaler."""

import importlib.util
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from longctx import torchrun
from longctx.command_line import Cause, option, value_as_text
from longctx.engines import NNSCALER, TORCH
from longctx.errors import EngineError, LayerNameError, UserError

if TYPE_CHECKING:  # a Job has these options as a field
    from longctx.job import Job

NEWEST_TORCH = (2, 6)
GENERATED_FOLDER = "_parallel_modules"  # where nnScaler puts all generated code, in the folder that it is given
# What a policy takes no notice of.
IGNORED_BY_POLICY = {
    "autodist": (),
    "tp": ("recompute_modules", "pipeline_pivots", "pipeline_nstages"),
    "dp": ("recompute_modules", "pipeline_pivots", "pipeline_nstages"),
    "hybrid": ("recompute_modules", "pipeline_pivots"),
}
TRACE_STRATEGIES = ("cpu", "cuda", "meta", "cuda_run_cpu_offload", "reuse_cache")


@dataclass(frozen=True, kw_only=True)
class NnscalerOptions:
    """of nnScaler alone"""

    pas_policy: str | None = option(None, "what partitions (default: autodist)", choices=tuple(IGNORED_BY_POLICY))
    pipeline_pivots: tuple[str, ...] | None = option(
        None, "class names, separated by commas, of the layers that pipeline stages may begin at"
    )
    pipeline_nstages: str | None = option(None, "pipeline stages, or 'auto' (default: 1)")
    trace_strategy: str | None = option(
        None, "how the tracer runs the model (default: reuse_cache)", choices=TRACE_STRATEGIES
    )


class PivotNameError(LayerNameError):
    """A pipeline stage is to begin at a layer class that the model doesn't have."""


CAUSES = {PivotNameError: Cause("pipeline_pivots")}
OPTION_NAMES = tuple(field.name for field in fields(NnscalerOptions))


def choose_engine(asked: str, device: str) -> tuple[str, str]:
    """The engine's name, and why it is that one. 'auto' takes nnScaler where it works.

    Args:
        device: what ranks compute on, 'cpu' or 'cuda'.

    Raises:
        EngineError: nnScaler is asked for, and is not here or does not work with the PyTorch that is.
    """
    if asked == TORCH:
        return asked, "as asked"
    problem = _why_it_can_not_be_imported()
    if asked == NNSCALER:
        if problem:
            raise EngineError(f"{problem}; see longctx/engines/nnscaler/requirements.txt, or choose torch")
        return asked, "as asked"
    if problem is None and device == "cpu":
        problem = "nnscaler needs a GPU and this is a run on CPUs"
    if problem:
        return TORCH, f"since {problem}"
    return NNSCALER, "since it is installed and works with this PyTorch"


def instance_name(job: "Job") -> str:
    """The job's name as nnScaler takes it: a part of a module's name, where a dot would begin another."""
    return job.name.replace(".", "_")


def _why_it_can_not_be_imported() -> str | None:
    if importlib.util.find_spec("nnscaler") is None:
        return "nnscaler is not installed"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) > NEWEST_TORCH:
        newest = ".".join(map(str, NEWEST_TORCH))
        return f"nnscaler works with PyTorch up to {newest} and here is {torch.__version__}"
    return None


def check_torchrun(job: "Job") -> None:
    if job.engine == NNSCALER and job.run_mode == "run" and not torchrun.started_this():
        raise UserError(
            "--engine nnscaler: it needs torchrun; start with torchrun --nproc_per_node=1 train.py ..., or choose "
            "--engine torch"
        )


def check_options(job: "Job") -> None:
    """Raises a UserError for an option that asks nnScaler for what it does not do, or does anyway."""
    if job.engine != NNSCALER:
        return
    other = f"leave it out, or choose --engine {TORCH}"
    refusals = (
        (job.trust_model, f"--trust_model: {NNSCALER} proves no model; {other}"),
        (job.on_nonfinite == "rollback", f"--on_nonfinite rollback: {NNSCALER} can only stop; {other}"),
        (job.trust_gencode, f"--trust_gencode: {NNSCALER} checks no code; {other}"),
        (job.stop_on_save_failure, f"--stop_on_save_failure: {NNSCALER} does so anyway; leave it out"),
        (job.document_mask, f"--document_mask: {NNSCALER} does not know it; {other}"),
        (job.deterministic, f"--deterministic: {NNSCALER} does not know it; {other}"),
    )
    for is_asked, sentence in refusals:
        if is_asked:
            raise UserError(sentence)


def check_policy(job: "Job") -> None:
    """Raises a UserError for what nnScaler's policy does not take."""
    if job.engine != NNSCALER:
        return
    policy = job.nnscaler.pas_policy or "autodist"
    stages, pivots = job.nnscaler.pipeline_nstages, job.nnscaler.pipeline_pivots
    for name in IGNORED_BY_POLICY[policy]:
        if value := value_as_text(job, name):
            raise UserError(
                f"--{name} {value}: it means nothing to --pas_policy {policy}; leave it out, or choose autodist"
            )
    if policy == "dp" and job.plan_ngpus != 1:
        raise UserError(f"--plan_ngpus {job.plan_ngpus}: --pas_policy dp takes 1; choose autodist, or leave it out")
    if stages not in (None, "auto") and not (stages.isdigit() and int(stages) >= 1):
        raise UserError(f"--pipeline_nstages {stages}: it has to be 1 or more, or 'auto'")
    if policy == "hybrid" or stages in (None, "auto"):
        return
    if stages != "1" and not pivots:
        raise UserError(f"--pipeline_nstages {stages}: --pipeline_pivots is missing; name the layers it may cut before")
    if stages == "1" and pivots:
        raise UserError(f"--pipeline_pivots {','.join(pivots)}: --pipeline_nstages 1 has no use for it; leave it out")
