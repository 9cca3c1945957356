"""Trains a causal language model at long context: compiles a plan for it, then runs the generated code.

    python train.py --run_mode compile --model_id MODEL --dataset_path ROWS --plan_ngpus 1 --runtime_ngpus 8
    torchrun --nproc_per_node=8 train.py --model_id MODEL --dataset_path ROWS --plan_ngpus 1 --runtime_ngpus 8

Compile needs no GPU and reads no weights. Run compiles too, unless the compiled folder is up to date.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import transformers

import model
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from compiler import codegen, hardware, partition, planner, report
from compiler.annotation import REGISTERED_OPS, register_op
from compiler.trace import trace
from errors import UserError, run_script
from files import whole_folder
from runtime import checkpoint, data, parallel
from runtime.metrics import FlopCount
from runtime.trainer import Resume, TrainSettings, train

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

register_op("b l d^, n^ d^, b l -> b l")(chunk_linear_cross_entropy)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run_mode", choices=("compile", "run"), default="run", help="compile: write the plan's code and stop")
    add("--model_id", required=True, help="a Hugging Face model: a name on the hub, or a folder")
    add("--dataset_path", help="rows of tokens that bookcorpus.py wrote")
    add("--sequence_length", type=int, help="tokens a row; stands in for --dataset_path in compile")
    add("--plan_ngpus", type=int, default=1, help="GPUs that one copy of the plan spans")
    add("--runtime_ngpus", type=int, help="all GPUs, a multiple of plan_ngpus (default: the processes there are)")
    add("--name", help="of the compiled folder and the logs (default: made of model, length and ranks)")
    add("--compiled_dir", default="./compiled", help="where compiled folders go")
    add("--checkpoint_dir", default="./checkpoints")
    add("--log_dir", default="./runs", help="where TensorBoard events and metrics.jsonl go")
    add("--resume_path", help="a checkpoint folder or a merged file (default: the last in --checkpoint_dir)")
    add("--hardware", help=f"to plan for: {', '.join(hardware.HARDWARE)} or a measured profile (default: what is here)")
    add("--gpu_mem_constraint", type=float, default=64.0, help="GB a GPU that the plan may need")
    add(
        "--recompute_modules", help="class names, by commas, of the layers to recompute; '' for none (default: planned)"
    )
    add("--plan", help="the plan.json whose partitions to take, at this sequence length")
    add("--random_init", action="store_true", help="start from seeded random weights, not from the model's")
    add("--precision", choices=DTYPES, default="bf16", help="of compute; masters, optimizer and sums are float32")
    add("--attn_implementation", choices=model.ATTN_IMPLEMENTATIONS, default="auto", help="force one kernel")
    add("--learning_rate", type=float, default=2e-5)
    add("--lr_schedule", choices=("constant", "linear", "cosine"), default="constant", help="after the warm-up")
    add("--warmup_steps", type=int, default=0)
    add("--weight_decay", type=float, default=0.0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--grad_accumulation_steps", type=int, default=4, help="rows a data-parallel rank takes in a step")
    add("--max_epochs", type=int, default=2)
    add("--max_train_steps", type=int, help="stop here even if epochs are left")
    add("--checkpoint_interval", type=int, default=1000, help="steps between checkpoints; the last step has one anyway")
    add("--seed", type=int, default=0, help="of the order of the rows, of dropout and of --random_init")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    transformers.logging.set_verbosity_error()
    args = parse_args(argv)
    check_args(args)
    config = model.load_config(args.model_id)
    dataset = data.open_dataset(args.dataset_path) if args.dataset_path else None
    sequence_length = choose_sequence_length(args, dataset)
    check_vocabulary(args, config)
    if args.run_mode == "compile":
        compile_plan(args, config, sequence_length)
    else:
        run(args, config, dataset, sequence_length)


# --- what was asked ------------------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    """Raises a UserError for numbers that can't be, alone or together."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.runtime_ngpus is None:
        args.runtime_ngpus = args.plan_ngpus if args.run_mode == "compile" else world_size
    at_least_one = ("plan_ngpus", "runtime_ngpus", "grad_accumulation_steps", "max_epochs", "checkpoint_interval")
    for name in (*at_least_one, "max_train_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: it has to be 1 or more")
    if args.sequence_length is not None and args.sequence_length < 2:
        raise UserError(f"--sequence_length {args.sequence_length}: it has to be 2 or more")
    for name in ("learning_rate", "max_grad_norm", "gpu_mem_constraint"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: it has to be above 0")
    for name in ("warmup_steps", "weight_decay"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} {getattr(args, name)}: it can't be negative")
    if args.runtime_ngpus % args.plan_ngpus:
        raise UserError(
            f"--runtime_ngpus {args.runtime_ngpus}: it has to be a multiple of --plan_ngpus {args.plan_ngpus}, "
            "since each copy of the plan spans that many"
        )
    if args.run_mode == "run" and args.runtime_ngpus != world_size:
        raise UserError(
            f"--runtime_ngpus {args.runtime_ngpus}: there are {world_size} processes; start with "
            f"torchrun --nproc_per_node={args.runtime_ngpus} train.py ..."
        )


def choose_sequence_length(args: argparse.Namespace, dataset) -> int:
    """The rows' length, or --sequence_length where there are no rows.

    Raises:
        UserError: neither is given, or they differ.
    """
    if dataset is None:
        if args.run_mode == "run":
            raise UserError("--dataset_path: it is missing; make rows of tokens with bookcorpus.py")
        if args.sequence_length is None:
            raise UserError("--dataset_path: it is missing; give it, or --sequence_length, to compile")
        return args.sequence_length
    length = len(dataset[0]["input_ids"])
    if args.sequence_length not in (None, length):
        raise UserError(
            f"--sequence_length {args.sequence_length}: the rows of --dataset_path {args.dataset_path} have {length} "
            "tokens; leave the option out, or make rows of that length with bookcorpus.py"
        )
    return length


def check_vocabulary(args: argparse.Namespace, config) -> None:
    """Raises a UserError if the tokenizer that made the rows has more entries than the model."""
    facts = data.corpus_facts(args.dataset_path) if args.dataset_path else {}
    if facts.get("vocab_size", 0) > config.vocab_size:
        raise UserError(
            f"--dataset_path {args.dataset_path}: its tokenizer {facts['tokenizer']} has {facts['vocab_size']} entries "
            f"and the model's vocabulary {config.vocab_size}; make the rows with the model's own tokenizer"
        )


# --- compile -------------------------------------------------------------------------------------------------------


def compile_plan(args: argparse.Namespace, config, sequence_length: int) -> Path:
    """Writes the compiled folder (gencode.py, plan.json, report.md) unless an equal one is there; returns it."""
    inputs = plan_inputs(args, config, sequence_length)
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    default_name = f"{Path(args.model_id).name}-{sequence_length}-{args.plan_ngpus}of{args.runtime_ngpus}"
    folder = Path(args.compiled_dir) / (args.name or default_name)
    rank_zero = os.environ.get("RANK", "0") == "0"
    if fingerprint_of(folder) == fingerprint:
        if rank_zero:
            print(f"compile: {folder} is up to date, reusing it", flush=True)
        return folder
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one rank a node compiles, the others wait for its folder
        while fingerprint_of(folder) != fingerprint:
            time.sleep(0.2)
        return folder

    started = time.perf_counter()
    wrapped = model.build_model(config, DTYPES[args.precision], args.attn_implementation)
    sample = {name: torch.empty(1, sequence_length, dtype=torch.long, device="meta") for name in ("tokens", "labels")}
    graph = trace(wrapped, sample)
    traced = time.perf_counter()
    setting = plan_setting(args, graph)
    fixed = planner.fix(graph, inputs["plan"], f"--plan {args.plan}") if args.plan else None
    plan = planner.make_plan(graph, setting, fixed)
    local = partition.localize(graph, plan.assignment)
    predicted = report.plan_facts(graph, plan, setting, config.hidden_size, sequence_length)
    facts = {**inputs, "fingerprint": fingerprint, **plan_facts(graph, plan, predicted)}
    title = f"{graph.class_name} at {sequence_length:,} tokens on {args.plan_ngpus} rank(s), {args.precision}."
    with whole_folder(folder) as aside:
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
    return folder


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
    return planner.Setting(args.plan_ngpus, args.runtime_ngpus, device, args.gpu_mem_constraint * 1e9, modules)


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
    sources = sorted([*Path(planner.__file__).parent.glob("*.py"), Path(model.__file__)])
    return {
        "config": json.loads(config.to_json_string()),
        "sequence_length": sequence_length,
        "plan_ngpus": args.plan_ngpus,
        "runtime_ngpus": args.runtime_ngpus,
        "precision": args.precision,
        "attn_implementation": args.attn_implementation,
        "hardware": dataclasses.asdict(hardware.load(args.hardware)),
        "gpu_mem_constraint": args.gpu_mem_constraint,
        "recompute_modules": args.recompute_modules,
        "plan": read_plan(args.plan) if args.plan else None,
        "annotations": {op.name: str(op.annotation) for op in REGISTERED_OPS.values()},
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


def run(args: argparse.Namespace, config, dataset, sequence_length: int) -> None:
    """Trains: checks first all that can be checked without a process group, then joins the ranks."""
    resume = find_resume(args, len(dataset))
    weights = None if args.random_init or resume else model.find_weights(args.model_id)
    folder = compile_plan(args, config, sequence_length)
    plan = json.loads((folder / "plan.json").read_text())
    if resume:
        checkpoint.check_same_model(resume.state, plan["parameters"], resume.option, resume.path)
    elif weights:
        model.check_weights(args.model_id, weights, plan["parameters"])
    with parallel.process_group() as device:
        module = parallel.load_generated(folder, plan["class_name"])
        parts = (plan["layers_path"], device, DTYPES[args.precision], args.plan_ngpus, plan["resident"])
        sharded = parallel.parallelize(module, *parts)
        if resume is None and args.random_init:
            parallel.load_tensors(sharded, model.random_weights(config, args.seed))
        elif resume is None:
            parallel.load_safetensors(sharded, weights)
        settings = train_settings(args, config, sequence_length, plan, folder.name, device)
        announce(args, resume, settings, len(dataset))
        train(sharded, dataset, settings, device, resume, lambda path: model.save_hf_files(args.model_id, config, path))


def find_resume(args: argparse.Namespace, n_rows: int) -> Resume | None:
    """What to resume from, known to be whole and of these rows; None to start from the model's weights."""
    path = checkpoint.find(Path(args.checkpoint_dir), args.resume_path)
    if path is None:
        return None
    option = "--resume_path" if args.resume_path else "--checkpoint_dir"
    state = checkpoint.read_state(path, option)
    checkpoint.check_same_order(state, args.seed, n_rows, option, path)
    return Resume(path, state, option)


def train_settings(
    args: argparse.Namespace, config, sequence_length: int, plan: dict, name: str, device: torch.device
) -> TrainSettings:
    known = hardware.identify(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    flops = plan["predicted"]
    return TrainSettings(
        sequence_length=sequence_length,
        vocab_size=config.vocab_size,
        learning_rate=args.learning_rate,
        lr_schedule=args.lr_schedule,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        grad_accumulation_steps=args.grad_accumulation_steps,
        max_epochs=args.max_epochs,
        max_train_steps=args.max_train_steps,
        checkpoint_interval=args.checkpoint_interval,
        seed=args.seed,
        checkpoint_dir=Path(args.checkpoint_dir),
        log_dir=Path(args.log_dir) / name,
        flops=FlopCount(
            flops["forward_flops"], flops["forward_flops_causal"], known and known.peak_rate(DTYPES[args.precision])
        ),
    )


def announce(args: argparse.Namespace, resume: Resume | None, settings: TrainSettings, n_rows: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    start = f"random weights, seed {args.seed}" if args.random_init else f"the weights of {args.model_id}"
    if resume:
        start = f"{resume.path}, after step {resume.state.position.step}"
    print(
        f"run: {args.runtime_ngpus} rank(s), {n_rows:,} rows of {settings.sequence_length:,} tokens, from {start}\n"
        f"run: logs in {settings.log_dir} (metrics.jsonl, TensorBoard), checkpoints in {settings.checkpoint_dir}",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
