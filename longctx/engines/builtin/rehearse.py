"""A rehearsal: one rank of a compiled plan, alone on the device that is there, timed and weighed part by part.

What runs is what a run runs: the generated code, FSDP2, the optimizer, at the plan's own shapes. In place of the other
ranks is a group that moves nothing (see runtime/stand_in.py), so the time of the network is the prediction's, and the
step time that follows from both is a projection.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longctx import compiled, devices
from longctx.atomic import whole_file
from longctx.compiler import hardware
from longctx.compiler.plan import GB
from longctx.engines.builtin.cache import ensure_compiled
from longctx.engines.builtin.run import choose_attention, saying_what_was_predicted, take_attention
from longctx.errors import RehearsalError
from longctx.flops import step_flops
from longctx.huggingface.configuration import vocab_size
from longctx.huggingface.overrides import changed_config
from longctx.job import Job
from longctx.runtime import parallel
from longctx.runtime.determinism import be_deterministic
from longctx.runtime.rehearsal import Measured, keep_layers, measure_step, random_row, random_values
from longctx.runtime.stand_in import stand_in_group


def rehearse(job: Job) -> None:
    """Runs rank `rehearse_rank` of the job's plan; writes rehearsal.json and rehearsal.md into its compiled folder."""
    if job.deterministic:
        be_deterministic()
    device = devices.take(job.device)
    config = changed_config(job.model_id, job.changes)
    folder = ensure_compiled(job)
    plan = compiled.read_plan_file(folder)
    check_layers(job, plan)
    print(f"rehearse: rank {job.rehearse_rank} of {job.runtime_ngpus}, alone on {device_name(device)}", flush=True)
    with stand_in_group(job.rehearse_rank, job.runtime_ngpus), saying_what_was_predicted(plan.predicted):
        take_attention(job, choose_attention(job, plan.module.fused_attention, device))
        module = parallel.load_generated(folder, plan.module.class_name)
        layers = keep_layers(module, plan, job.rehearse_layers)
        here = {name: dim for name, dim in plan.module.plan_sharded.items() if name in dict(module.named_parameters())}
        model = parallel.parallelize(module, plan.module.layers_path, device, job.dtype, job.plan_ngpus, here)
        random_values(model, job.seed)
        measured = measure_step(model, job, random_row(vocab_size(config), job), layers)
    rehearsal = Rehearsal(
        device_name(device), torch.__version__, job.rehearse_rank, measured, project(measured, plan, job)
    )
    write(folder, rehearsal, plan)
    print(*(f"  {line}" for line in summary(rehearsal, plan)), sep="\n")
    print(f"rehearse: wrote {folder}/{compiled.REHEARSAL}, {compiled.REHEARSAL_TEXT}", flush=True)


def check_layers(job: Job, plan: compiled.PlanFile) -> None:
    """Raises a UserError if layers are to be left out that do more than hand on the hidden states."""
    if job.rehearse_layers and plan.module.layer_results != 1:
        what = f"return {plan.module.layer_results} values" if plan.module.layers_path else "were not found"
        raise RehearsalError(f"the layers of {plan.module.class_name} {what}, so that none can be left out")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# --- what follows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A step of all ranks, from what one rank was measured to compute and what the links were predicted to take."""

    step_seconds: float
    reshards_seconds: float  # of a micro-batch, waited for
    fsdp_exposed_seconds: float  # of a micro-batch, waited for
    fsdp_hidden_seconds: float  # of a micro-batch, behind computing
    tokens_per_s_per_gpu: float
    mfu: float | None  # attention counted whole, as the reference program counts it; None where no peak is known
    mfu_causal: float | None  # of attention what its mask leaves


@dataclass(frozen=True)
class Rehearsal:
    """rehearsal.json."""

    device: str
    torch: str
    rank: int
    measured: Measured
    projection: Projection


def project(measured: Measured, plan: compiled.PlanFile, job: Job) -> Projection:
    time_of = plan.predicted.time
    waited = time_of["reshards"] + time_of["fsdp_exposed"] + time_of["plan_sharded_gradients"]
    micro_batch = measured.micro_batch.seconds + waited
    step = job.grad_accumulation_steps * micro_batch + measured.update_seconds
    peak = hardware.peak_rate_here(job.dtype) if job.device == "cuda" else None

    def mfu(forward_flops: float) -> float | None:
        return job.rows_per_step * step_flops(forward_flops) / (peak * job.runtime_ngpus * step) if peak else None

    return Projection(
        step,
        time_of["reshards"],
        time_of["fsdp_exposed"],
        time_of["fsdp_hidden"],
        job.rows_per_step * job.sequence_length / step / job.runtime_ngpus,
        mfu(plan.module.forward_flops),
        mfu(plan.module.forward_flops_causal),
    )


def write(folder: Path, rehearsal: Rehearsal, plan: compiled.PlanFile) -> None:
    """Writes rehearsal.json, and rehearsal.md for people to read."""
    with whole_file(folder / compiled.REHEARSAL) as aside:
        aside.write_text(json.dumps(dataclasses.asdict(rehearsal), indent=1) + "\n")
    with whole_file(folder / compiled.REHEARSAL_TEXT) as aside:
        aside.write_text("\n".join(["# Rehearsal", "", *summary(rehearsal, plan), "", *tables(rehearsal, plan)]) + "\n")


def summary(rehearsal: Rehearsal, plan: compiled.PlanFile) -> list[str]:
    """The rehearsal in a few lines, as train.py prints it."""
    measured, projected = rehearsal.measured, rehearsal.projection
    lines = [
        f"rank {rehearsal.rank} alone on {rehearsal.device}, PyTorch {rehearsal.torch}: a micro-batch computes for "
        f"{measured.micro_batch.seconds:.3g} s, where {computing_predicted(plan):.3g} were predicted for "
        f"{plan.inputs['hardware']['name']}; an optimizer step takes {measured.update_seconds:.3g} s",
        f"{measured.peak / GB:.2f} GB at the peak, where {plan.predicted.peak_bytes / GB:.2f} were predicted"
        f"{_say_device(measured)}",
        f"projection: {projected.step_seconds:.3g} s a step, {projected.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
        f"{_say_mfu(projected)}; reshards of {projected.reshards_seconds:.3g} s and FSDP's traffic of "
        f"{projected.fsdp_exposed_seconds:.3g} s ({projected.fsdp_hidden_seconds:.3g} s more hidden) a micro-batch "
        "are predictions",
    ]
    limit = plan.inputs["gpu_mem_constraint"] * GB
    if measured.peak > limit:
        lines.append(f"warning: that is more than the {limit / GB:g} GB that the plan was made for")
    if measured.layers_run < measured.layers:
        lines.append(f"{measured.layers_run} of {measured.layers} layers ran; the others were counted like them")
    return lines


def _say_device(measured: Measured) -> str:
    if measured.reserved is None or measured.in_use is None:
        return ""
    return f"; {measured.reserved / GB:.2f} reserved, {measured.in_use / GB:.2f} in use on the device with all else"


def _say_mfu(projected: Projection) -> str:
    if projected.mfu is None:
        return ""
    return f", MFU {projected.mfu_causal:.1%} counting attention as causal, {projected.mfu:.1%} counting it whole"


def computing_predicted(plan: compiled.PlanFile) -> float:
    """Seconds of computing that were predicted for a micro-batch."""
    return sum(plan.predicted.parts.values())


def tables(rehearsal: Rehearsal, plan: compiled.PlanFile) -> list[str]:
    """Markdown tables: seconds by part, bytes by kind, and a GPU's kernels."""
    measured = rehearsal.measured
    working = sum(measured.micro_batch.parts.values())
    rows = [
        (name, seconds, plan.predicted.parts.get(name, 0.0)) for name, seconds in measured.micro_batch.parts.items()
    ]
    rows += [("waiting for the host", max(0.0, measured.micro_batch.seconds - working), None)]
    rows += [("**a micro-batch**", measured.micro_batch.seconds, computing_predicted(plan))]
    rows += [("the optimizer, once a step", measured.update_seconds, None)]
    times = [f"| {name} | {1e3 * here:,.2f} | {_number(said, 1e3)} |" for name, here, said in rows]
    memory = [f"| {name} | {here / GB:.3f} | {said / GB:.3f} |" for name, here, said in bytes_by_kind(measured, plan)]
    kernels = [
        f"| `{kernel.name.replace('|', '/')[:100]}` | {kernel.count} | {1e3 * kernel.seconds:,.2f} |"
        for kernel in measured.kernels
    ]
    return [
        *_table("Time", ("part", "measured ms", "predicted ms"), times),
        *_table("Memory", ("", "measured GB", "predicted GB"), memory),
        *(_table("Kernels of the layers that ran", ("kernel", "calls", "ms"), kernels) if kernels else []),
    ]


def bytes_by_kind(measured: Measured, plan: compiled.PlanFile) -> list[tuple[str, float, float]]:
    """Kind, measured bytes and predicted bytes, at the peak."""
    predicted = {name: size for name, size in plan.predicted.memory.items() if not isinstance(size, str)}
    state = {"masters": 1, "gradients": 1, "optimizer": 2}
    rest = sum(size for name, size in predicted.items() if name not in state)
    return [
        *((name, times * measured.masters, predicted[name]) for name, times in state.items()),
        ("activations, gathered weights, workspace", measured.micro_batch.peak, rest),
        ("**peak**", measured.peak, plan.predicted.peak_bytes),
    ]


def _table(title: str, columns: Sequence[str], rows: Sequence[str]) -> list[str]:
    rule = " | ".join(["---", *["---:"] * (len(columns) - 1)])
    return [f"## {title}", "", f"| {' | '.join(columns)} |", f"| {rule} |", *rows, ""]


def _number(value: float | None, scale: float) -> str:
    return "" if value is None else f"{scale * value:,.2f}"
