"""The built-in engine, on stock PyTorch: torch.export -> plan -> Python -> FSDP2."""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from longctx.atomic import whole_folder
from longctx.compiler import codegen, hardware, partition, planner, report
from longctx.compiler.annotation import REGISTERED_OPS
from longctx.compiler.trace import trace
from longctx.errors import UserError
from longctx.huggingface.build import DTYPES, build_model
from longctx.huggingface.flops import forward_flops
from longctx.huggingface.weights import check_weights, find_weights, random_weights, save_hf_files
from longctx.runtime import checkpoint, parallel
from longctx.runtime.metrics import FlopCount
from longctx.runtime.trainer import TrainSettings, announce, find_resume, train

# What a compiled folder holds; the first, the mark of one, is what says that compile wrote it.
COMPILED_FILES = ("plan.json", "gencode.py", "report.md", "__pycache__")
COMPILE_TIMEOUT = timedelta(hours=1)  # far beyond what any model takes


def compile_plan(args: argparse.Namespace, config, sequence_length: int) -> Path:
    """Writes the compiled folder (gencode.py, plan.json, report.md) unless an equal one is there; returns it.

    Of ranks that torchrun started, the first of each node compiles, and the others wait to hear of it.

    Raises:
        UserError: the plan can't be made as asked, or this rank would make another one than its node's first.
    """
    inputs = plan_inputs(args, config, sequence_length)
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = Path(args.compiled_dir) / args.name
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        write_plan(args, config, sequence_length, folder, {**inputs, "fingerprint": fingerprint})
        return folder
    store = rendezvous_store()
    compiled = f"{folder.resolve()} of node {os.environ.get('GROUP_RANK', 0)}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            write_plan(args, config, sequence_length, folder, {**inputs, "fingerprint": fingerprint})
        except BaseException:
            store.set(compiled, "")
            raise
        store.set(compiled, fingerprint)
        return folder
    store.wait([compiled], COMPILE_TIMEOUT)
    of_first = store.get(compiled).decode()
    if not of_first:
        raise UserError(f"--compiled_dir {args.compiled_dir}: compiling {folder} failed on this node's first rank")
    if of_first != fingerprint:
        raise UserError(
            f"--compiled_dir {args.compiled_dir}: this node's first rank compiled {folder} from other options, code or "
            "devices than this rank has; start all ranks alike"
        )
    return folder


@functools.cache  # where it is rank 0's own, it ends with the object
def rendezvous_store() -> dist.Store:
    """What the ranks tell each other before there is a process group: torchrun's key-value store, or rank 0's."""
    return next(dist.rendezvous("env://"))[0]


def write_plan(args: argparse.Namespace, config, sequence_length: int, folder: Path, inputs: dict) -> None:
    """Compiles into `folder` unless what is there has the fingerprint in `inputs`; rank 0 says which it did."""
    rank_zero = os.environ.get("RANK", "0") == "0"
    if fingerprint_of(folder) == inputs["fingerprint"]:
        if rank_zero:
            print(f"compile: {folder} is up to date, reusing it", flush=True)
        return
    started = time.perf_counter()
    wrapped = build_model(config, DTYPES[args.precision], args.attn_implementation, sequence_length)
    sample = {name: torch.empty(1, sequence_length, dtype=torch.long, device="meta") for name in ("tokens", "labels")}
    graph = trace(wrapped, sample)
    traced = time.perf_counter()
    setting = plan_setting(args, graph)
    fixed = planner.fix(graph, inputs["plan"], f"--plan {args.plan}") if args.plan else None
    plan = planner.make_plan(graph, setting, fixed)
    local = partition.localize(graph, plan.assignment)
    n_parameters = sum(parameter.numel() for parameter in wrapped.parameters())
    flops = forward_flops(config, n_parameters, sequence_length)
    predicted = report.plan_facts(graph, plan, setting, n_parameters, flops)
    facts = {**inputs, **plan_facts(graph, plan, predicted)}
    title = f"{graph.class_name} at {sequence_length:,} tokens on {args.plan_ngpus} rank(s), {args.precision}."
    with whole_folder(folder, COMPILED_FILES) as aside:
        (aside / "gencode.py").write_text(codegen.generate(local, plan, title))
        (aside / "plan.json").write_text(json.dumps(facts, indent=1) + "\n")
        (aside / "report.md").write_text(report.report(graph, plan, setting, predicted, sequence_length))
    if rank_zero:
        print(
            f"compile: {graph.class_name} at {sequence_length:,} tokens for {setting.hardware.name}: "
            f"traced in {traced - started:.1f} s, planned and written in {time.perf_counter() - traced:.1f} s"
        )
        for line in report.summary(graph, plan, setting, predicted, sequence_length):
            print(f"  {line}")
        print(f"compile: wrote {folder}/gencode.py, plan.json, report.md", flush=True)


def plan_setting(args: argparse.Namespace, graph) -> planner.Setting:
    """What the plan is for.

    Raises:
        UserError: --recompute_modules names no layer class of the model.
    """
    modules = None
    if args.recompute_modules is not None:
        modules = tuple(name for name in args.recompute_modules.split(",") if name)
        known = {kind.class_name.rstrip("0123456789") for kind in graph.kinds}
        if unknown := set(modules) - known:
            raise UserError(
                f"--recompute_modules {args.recompute_modules}: {sorted(unknown)[0]} is no layer of "
                f"{graph.class_name}; its layers are {', '.join(sorted(known))}"
            )
    device = hardware.load(args.hardware)
    memory_limit = args.gpu_mem_constraint * 1e9
    ranks = (args.plan_ngpus, args.runtime_ngpus)
    return planner.Setting(*ranks, device, memory_limit, modules, args.grad_accumulation_steps)


def read_plan(path: str) -> dict:
    """The decisions in a plan.json.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(Path(path).read_text())["decisions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--plan {path}: it is no plan.json that compile wrote") from error


def plan_inputs(args: argparse.Namespace, config, sequence_length: int) -> dict:
    """All that the plan depends on: compiled folders with equal ones are the same."""
    sources = sorted(Path(planner.__file__).parent.parent.rglob("*.py"))
    return {
        "config": json.loads(config.to_json_string()),
        "sequence_length": sequence_length,
        "plan_ngpus": args.plan_ngpus,
        "runtime_ngpus": args.runtime_ngpus,
        "precision": args.precision,
        "attn_implementation": args.attn_implementation,
        "hardware": dataclasses.asdict(hardware.load(args.hardware)),
        "gpu_mem_constraint": args.gpu_mem_constraint,
        "grad_accumulation_steps": args.grad_accumulation_steps,
        "recompute_modules": args.recompute_modules,
        "plan": read_plan(args.plan) if args.plan else None,
        "annotations": {op.name: op.fingerprint() for op in REGISTERED_OPS.values()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compiler": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest(),
    }


def plan_facts(graph, plan: planner.Plan, predicted: report.Facts) -> dict:
    """What run needs to know of a plan, and what is predicted of it."""
    return {
        "class_name": graph.class_name,
        "layers_path": graph.layers_path,
        "recompute": plan.recompute,
        "resident": graph.named(plan.assignment.resident),
        "decisions": planner.describe(graph, plan),
        "parameters": {name: list(tensor.shape) for name, tensor in graph.all_parameters().items()},
        "predicted": dataclasses.asdict(predicted),
    }


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of a compiled folder; None where there is none."""
    try:
        return json.loads((folder / "plan.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


# --- run -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, config, dataset, settings: TrainSettings) -> None:
    """Trains: checks first all that can be checked without a process group, then joins the ranks."""
    resume = find_resume(args, len(dataset), "torch")
    weights = None if args.random_init or resume else find_weights(args.model_id, config)
    folder = compile_plan(args, config, settings.sequence_length)
    plan = json.loads((folder / "plan.json").read_text())
    if resume:
        checkpoint.check_same_model(resume.state, plan["parameters"], resume.option, resume.path)
    elif weights:
        check_weights(weights, plan["parameters"])
    dtype = DTYPES[args.precision]
    with parallel.process_group() as device:
        module = parallel.load_generated(folder, plan["class_name"])
        sharded = parallel.parallelize(module, plan["layers_path"], device, dtype, args.plan_ngpus, plan["resident"])
        if resume is None and args.random_init:
            parallel.load_tensors(sharded, random_weights(config, args.seed))
        elif resume is None:
            parallel.load_safetensors(sharded, weights)
        flops = FlopCount(
            plan["predicted"]["forward_flops"],
            plan["predicted"]["forward_flops_causal"],
            hardware.peak_rate_here(dtype),
        )
        announce(args, settings, len(dataset), resume)
        write_hf_files = functools.partial(save_hf_files, args.model_id, config)
        train(sharded, dataset, settings, flops, device, resume, write_hf_files)
