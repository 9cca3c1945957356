"""The compiler's pipeline: a Hugging Face model's configuration -> the compiled folder."""

import dataclasses
import time
from typing import Any

from transformers import PreTrainedConfig

from longctx import compiled, proof, torchrun
from longctx.atomic import whole_folder
from longctx.compiler import codegen, hardware, planner, prediction, report
from longctx.compiler.ir import Graph
from longctx.compiler.localize import localize
from longctx.compiler.ops.registered import target_of
from longctx.compiler.plan import GB, Fixed, Plan, Setting, describe, fix
from longctx.compiler.prediction import Prediction
from longctx.compiler.trace import sample_row, trace
from longctx.huggingface.build import build_model
from longctx.huggingface.weights import trained_config
from longctx.job import Job
from longctx.kernels.attention import attention, fused_shapes


def compile_plan(job: Job, inputs: dict[str, Any]) -> None:
    """Load, build, trace, prove, plan, localize, generate, report: writes the job's compiled folder.

    Args:
        inputs: all that the folder depends on, which plan.json records (see cache.py).

    Raises:
        UserError: the model can't be traced, its code does something else than it does, or no plan fits.
    """
    started = time.perf_counter()
    config = trained_config(job.model_id, job.random_init, job.changes)
    options = (job.attn_implementation, job.sequence_length, job.deterministic, job.document_mask, job.expert_imbalance)
    model = build_model(config, job.dtype, *options)
    graph = trace(model, sample_row(job.sequence_length, job.equal_documents))
    traced = time.perf_counter()
    proved = prove(graph, config, job)
    planning = time.perf_counter()
    setting = plan_setting(job)
    plan = planner.make_plan(graph, setting, fixed_decisions(graph, inputs["plan"]))
    local = localize(graph, plan.assignment)
    code = codegen.generate(local, plan, title(graph, job))
    predicted = prediction.predict(graph, plan, setting)
    file = plan_file(inputs, graph, local, plan, predicted)
    write_folder(job, code, file, report.report(graph, plan, setting, predicted))
    summary = [proved, *report.summary(graph, plan, setting, predicted)]
    say_what_was_compiled(job, summary, traced - started, planning)


def prove(graph: Graph, config: PreTrainedConfig, job: Job) -> str:
    """Proves that the graph's code computes what the model does, unless the model is to be trusted; says which."""
    if job.trust_model:
        proof.check_no_squares(graph, job.sequence_length)
        return f"{graph.class_name} is trusted: its code was not compared with transformers' own"
    found = proof.prove(graph, config, job.sequence_length)
    return (
        f"proved against transformers' own {graph.class_name}, small and in float32: the loss differs by "
        f"{found.loss_error:.0e}, gradients by {found.gradient_error:.0e} at most"
    )


def plan_setting(job: Job) -> Setting:
    """What the plan is for."""
    return Setting(
        job.plan_ngpus,
        job.runtime_ngpus,
        hardware.load(job.hardware),
        job.gpu_mem_constraint * GB,
        job.recompute_modules,
        job.grad_accumulation_steps,
    )


def fixed_decisions(graph: Graph, decisions: dict[str, Any] | None) -> Fixed | None:
    """The decisions of another plan, for this graph; None if the planner decides."""
    return fix(graph, decisions) if decisions else None


def title(graph: Graph, job: Job) -> str:
    """The first line of gencode.py."""
    return f"{graph.class_name} at {job.sequence_length:,} tokens on {job.plan_ngpus} rank(s), {job.precision}."


def plan_file(
    inputs: dict[str, Any], graph: Graph, local: Graph, plan: Plan, predicted: Prediction
) -> compiled.PlanFile:
    """plan.json; `local` is the graph of one rank."""
    module = compiled.GeneratedModule(
        class_name=graph.class_name,
        layers_path=graph.layers_path,
        layer_results=max((len(call.outputs) for call in graph.layer_calls), default=0),
        plan_sharded=graph.named(plan.assignment.plan_sharded),
        parameters={name: list(tensor.shape) for name, tensor in graph.all_parameters().items()},
        forward_flops=predicted.forward_flops,
        forward_flops_causal=predicted.forward_flops_causal,
        fused_attention=attention_shapes(local),
    )
    decisions = compiled.Decisions(**describe(graph, plan), recompute=tuple(map(str, plan.recompute)))
    time, memory = dataclasses.asdict(predicted.time), dataclasses.asdict(predicted.memory)
    facts = compiled.Predicted(time, memory, predicted.parts)
    return compiled.PlanFile(inputs, decisions, module, facts)


def attention_shapes(local: Graph) -> list[list[list[int]]]:
    """The shapes of query, key and value of each call of a fused attention kernel on one rank; equal ones once."""
    calls = [fused_shapes(op) for op in local.all_ops() if op.target == target_of(attention)]
    return [[list(shape) for shape in shapes] for shapes in dict.fromkeys(filter(None, calls))]


def write_folder(job: Job, code: str, plan: compiled.PlanFile, report_text: str) -> None:
    """Writes gencode.py, plan.json and report.md, which appear together or not at all."""
    with whole_folder(job.compiled_folder, compiled.FILES) as folder:
        (folder / compiled.CODE).write_text(code)
        (folder / compiled.REPORT).write_text(report_text)
        compiled.write_plan_file(folder, plan)


def say_what_was_compiled(job: Job, summary: list[str], tracing_seconds: float, traced: float) -> None:
    """Rank 0 prints the report's first lines; `traced` is when planning began, in perf_counter's seconds."""
    if not codegen.has_formatter():
        torchrun.say(f"compile: ruff is not installed, so {compiled.CODE} has long lines")
    torchrun.say(
        f"compile: traced in {tracing_seconds:.1f} s, planned and written in {time.perf_counter() - traced:.1f} s",
        *(f"  {line}" for line in summary),
        f"compile: wrote {job.compiled_folder}/{compiled.CODE}, {compiled.PLAN}, {compiled.REPORT}",
    )
