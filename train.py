"""Trains a causal language model at long context: compiles a plan for it, then runs the generated code.

    python train.py --run_mode compile --model_id MODEL --dataset_path ROWS --plan_ngpus 1 --runtime_ngpus 8
    torchrun --nproc_per_node=8 train.py --model_id MODEL --dataset_path ROWS --plan_ngpus 1 --runtime_ngpus 8

Two engines do the job: longctx/engines/builtin.py, on stock PyTorch, compiles with no GPU and no weights;
longctx/engines/nnscaler/engine.py, on upstream nnScaler. Run compiles too, unless what is compiled is up to date.
"""

import argparse
import importlib
import importlib.util
import os
from pathlib import Path

import torch
import transformers

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.atomic import why_not_replaceable, why_not_writable
from longctx.compiler import hardware
from longctx.compiler.ops import register_op
from longctx.data import rows
from longctx.engines import builtin
from longctx.errors import UserError, run_script
from longctx.huggingface import build
from longctx.kernels import cross_entropy
from longctx.runtime.trainer import TrainSettings

NNSCALER_NEWEST_TORCH = (2, 6)
# What a policy of nnScaler's takes no notice of.
IGNORED_BY_POLICY = {
    "autodist": (),
    "tp": ("recompute_modules", "pipeline_pivots", "pipeline_nstages"),
    "dp": ("recompute_modules", "pipeline_pivots", "pipeline_nstages"),
    "hybrid": ("recompute_modules", "pipeline_pivots"),
}
# What only one engine has a meaning for.
ENGINE_OPTIONS = {
    "torch": ("hardware", "plan"),
    "nnscaler": ("pas_policy", "pipeline_pivots", "pipeline_nstages", "trace_strategy"),
}


def register_loss() -> None:
    """The loss may be partitioned along rows and tokens, never along the hidden size or the vocabulary."""
    register_op("b l d^, n^ d^, b l -> b l", **cross_entropy.RULES)(chunk_linear_cross_entropy)


register_loss()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run_mode", choices=("compile", "run"), default="run", help="compile: write the plan's code and stop")
    add("--engine", choices=("auto", *ENGINE_OPTIONS), default="auto", help="auto: nnscaler where it works, else torch")
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
    add("--precision", choices=build.DTYPES, default="bf16", help="of compute; masters, optimizer and sums are float32")
    add("--attn_implementation", choices=build.ATTN_IMPLEMENTATIONS, default="auto", help="force one kernel")
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
    only = parser.add_argument_group("of nnScaler alone").add_argument
    only("--pas_policy", choices=("autodist", "tp", "dp", "hybrid"), help="what partitions (default: autodist)")
    only("--pipeline_pivots", help="class names, by commas, that pipeline stages may begin at")
    only("--pipeline_nstages", help="pipeline stages, or 'auto' (default: 1)")
    strategies = ("cpu", "cuda", "meta", "cuda_run_cpu_offload", "reuse_cache")
    only("--trace_strategy", choices=strategies, help="how the tracer runs the model (default: reuse_cache)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    transformers.logging.set_verbosity_error()
    args = parse_args(argv)
    check_args(args)
    name, reason = choose_engine(args.engine)
    check_engine_options(args, name)
    config = build.load_config(args.model_id)
    dataset = rows.open_dataset(args.dataset_path) if args.dataset_path else None
    sequence_length = choose_sequence_length(args, dataset)
    check_vocabulary(args, config)
    if args.name is None:
        args.name = f"{Path(args.model_id).name}-{sequence_length}-{args.plan_ngpus}of{args.runtime_ngpus}"
    check_folders(args, name)
    if os.environ.get("RANK", "0") == "0":
        print(f"engine: {name}, {reason}", flush=True)
    engine = importlib.import_module(
        {"torch": "longctx.engines.builtin", "nnscaler": "longctx.engines.nnscaler.engine"}[name]
    )
    if args.run_mode == "compile":
        engine.compile_plan(args, config, sequence_length)
    else:
        engine.run(args, config, dataset, train_settings(args, config, sequence_length))


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
    if args.name is not None and (args.name in ("", "..") or Path(args.name).name != args.name):
        raise UserError(f"--name {args.name!r}: it has to be a plain name, of one folder; leave out slashes and dots")
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


def check_folders(args: argparse.Namespace, engine: str) -> None:
    """Raises a UserError for a folder that could not be written to, before there is anything to lose."""
    folders = {"compiled_dir": Path(args.compiled_dir, args.name if engine == "torch" else "_parallel_modules")}
    if args.run_mode == "run":
        folders |= {"checkpoint_dir": Path(args.checkpoint_dir), "log_dir": Path(args.log_dir, args.name)}
    compiled = folders["compiled_dir"]
    if engine == "torch" and (problem := why_not_replaceable(compiled, builtin.COMPILED_FILES)):
        raise UserError(f"--compiled_dir {args.compiled_dir} --name {args.name}: {compiled}: {problem}; name another")
    if compiled.is_dir():  # it may be up to date, and then is only read
        del folders["compiled_dir"]
    for option, folder in folders.items():
        if problem := why_not_writable(folder):
            raise UserError(f"--{option} {getattr(args, option)}: {problem}; name another folder")


def choose_engine(asked: str) -> tuple[str, str]:
    """The engine, 'torch' or 'nnscaler', and why it is that one.

    Raises:
        UserError: nnScaler is asked for, and is not here or does not work with the PyTorch that is.
    """
    if asked == "torch":
        return asked, "as asked"
    problem = None
    if importlib.util.find_spec("nnscaler") is None:
        problem = "nnscaler is not installed"
    elif tuple(int(part) for part in torch.__version__.split(".")[:2]) > NNSCALER_NEWEST_TORCH:
        newest = ".".join(map(str, NNSCALER_NEWEST_TORCH))
        problem = f"nnscaler works with PyTorch up to {newest} and here is {torch.__version__}"
    if asked == "nnscaler":
        if problem:
            raise UserError(
                f"--engine nnscaler: {problem}; see longctx/engines/nnscaler/requirements.txt, or choose torch"
            )
        return asked, "as asked"
    if problem is None and not torch.cuda.is_available():
        problem = "nnscaler needs a GPU and there is none"
    return (
        ("torch", f"since {problem}") if problem else ("nnscaler", "since it is installed and works with this PyTorch")
    )


def check_engine_options(args: argparse.Namespace, engine: str) -> None:
    """Raises a UserError for an option that means nothing to the engine."""
    for other, options in ENGINE_OPTIONS.items():
        given = [option for option in options if getattr(args, option) is not None]
        if other != engine and given:
            raise UserError(
                f"--{given[0]} {getattr(args, given[0])}: it means nothing to the {engine} engine; leave it out, or "
                f"choose --engine {other}"
            )
    if engine == "nnscaler":
        check_policy(args)


def check_policy(args: argparse.Namespace) -> None:
    """Raises a UserError for what nnScaler's policy does not take."""
    policy, stages = args.pas_policy or "autodist", args.pipeline_nstages
    for option in IGNORED_BY_POLICY[policy]:
        if getattr(args, option) is not None:
            raise UserError(
                f"--{option} {getattr(args, option)}: it means nothing to --pas_policy {policy}; leave it out, or "
                "choose autodist"
            )
    if policy == "dp" and args.plan_ngpus != 1:
        raise UserError(f"--plan_ngpus {args.plan_ngpus}: --pas_policy dp takes 1; choose autodist, or leave it out")
    if stages not in (None, "auto") and not (stages.isdigit() and int(stages) >= 1):
        raise UserError(f"--pipeline_nstages {stages}: it has to be 1 or more, or 'auto'")
    if policy == "hybrid" or stages in (None, "auto"):
        return
    if stages != "1" and not args.pipeline_pivots:
        raise UserError(f"--pipeline_nstages {stages}: --pipeline_pivots is missing; name the layers it may cut before")
    if stages == "1" and args.pipeline_pivots:
        raise UserError(
            f"--pipeline_pivots {args.pipeline_pivots}: --pipeline_nstages 1 has no use for it; leave it out"
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
    facts = rows.corpus_facts(args.dataset_path) if args.dataset_path else {}
    if facts.get("vocab_size", 0) > config.vocab_size:
        raise UserError(
            f"--dataset_path {args.dataset_path}: its tokenizer {facts['tokenizer']} has {facts['vocab_size']} entries "
            f"and the model's vocabulary {config.vocab_size}; make the rows with the model's own tokenizer"
        )


def train_settings(args: argparse.Namespace, config, sequence_length: int) -> TrainSettings:
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
        log_dir=Path(args.log_dir) / args.name,
    )


if __name__ == "__main__":
    run_script(main)
