"""The compiler's pipeline: a Hugging Face model's configuration -> the compiled folder."""

import dataclasses
import time
from typing import Any

import torch

from longctx import compiled, torchrun
from longctx.atomic import whole_folder
from longctx.compiler import codegen, hardware, planner, report
from longctx.compiler.partition import localize
from longctx.compiler.trace import Graph, trace
from longctx.huggingface.build import DTYPES, build_model, load_config
from longctx.huggingface.flops import forward_flops
from longctx.options import Job

GB = 1e9


def compile_plan(job: Job, inputs: dict[str, Any]) -> None:
    """Writes the job's compiled folder: gencode.py, plan.json, report.md.

    Args:
        inputs: all that the folder depends on, which plan.json records (see cache.py).

    Raises:
        UserError: the model can't be traced, or no plan fits.
    """
    started = time.perf_counter()
    config = load_config(job.model_id)
    model = build_model(config, DTYPES[job.precision], job.attn_implementation, job.sequence_length)
    graph = trace(model, sample_row(job.sequence_length))
    traced = time.perf_counter()

    setting = plan_setting(job)
    plan = planner.make_plan(graph, setting, fixed_decisions(graph, inputs["plan"]))
    local = localize(graph, plan.assignment)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = report.plan_facts(
        graph, plan, setting, n_parameters, forward_flops(config, n_parameters, job.sequence_length)
    )
    title = f"{graph.class_name} at {job.sequence_length:,} tokens on {job.plan_ngpus} rank(s), {job.precision}."
    with whole_folder(job.compiled_folder, compiled.FILES) as folder:
        (folder / compiled.CODE).write_text(codegen.generate(local, plan, title))
        (folder / compiled.REPORT).write_text(report.report(graph, plan, setting, facts, job.sequence_length))
        compiled.write_plan_file(folder, plan_file(inputs, graph, plan, facts))

    if torchrun.rank() == 0:
        print(
            f"compile: {graph.class_name} at {job.sequence_length:,} tokens for {setting.hardware.name}: "
            f"traced in {traced - started:.1f} s, planned and written in {time.perf_counter() - traced:.1f} s"
        )
        for line in report.summary(graph, plan, setting, facts, job.sequence_length):
            print(f"  {line}")
        print(f"compile: wrote {job.compiled_folder}/gencode.py, plan.json, report.md", flush=True)


def sample_row(sequence_length: int) -> dict[str, torch.Tensor]:
    """What the model is traced with: [1, l] int64 each, on meta, each a tensor of its own."""
    return {name: torch.empty(1, sequence_length, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def plan_setting(job: Job) -> planner.Setting:
    """What the plan is for."""
    return planner.Setting(
        job.plan_ngpus,
        job.runtime_ngpus,
        hardware.load(job.hardware),
        job.gpu_mem_constraint * GB,
        job.recompute_modules,
        job.grad_accumulation_steps,
    )


def fixed_decisions(graph: Graph, decisions: dict[str, Any] | None) -> planner.Fixed | None:
    """The decisions of another plan, for this graph; None if the planner decides."""
    return planner.fix(graph, decisions, "--plan") if decisions else None


def plan_file(inputs: dict[str, Any], graph: Graph, plan: planner.Plan, facts: report.Facts) -> compiled.PlanFile:
    module = compiled.GeneratedModule(
        class_name=graph.class_name,
        layers_path=graph.layers_path,
        recompute=plan.recompute,
        plan_sharded=graph.named(plan.assignment.resident),
        parameters={name: list(tensor.shape) for name, tensor in graph.all_parameters().items()},
        forward_flops=facts.forward_flops,
        forward_flops_causal=facts.forward_flops_causal,
    )
    predicted = {"time": dataclasses.asdict(facts.time), "memory": dataclasses.asdict(facts.memory)}
    return compiled.PlanFile(inputs, planner.describe(graph, plan), module, predicted)
