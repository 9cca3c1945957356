"""Merges a checkpoint's shards into one file, or into a Hugging Face folder.

    python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
    python ckpt_merger.py --ckpt_dir ./checkpoints/0001-000500 --hf_dir ./llama3_trained

Checkpoints may be of either engine; nnScaler's are merged with nnScaler. A merged file resumes training under both
engines, on any number of ranks (`train.py --resume_path ./merged.ckpt`). With several nodes and no file system that
they share, collect all shards in one folder first.
"""

import argparse
from pathlib import Path

from longctx.atomic import why_not_writable
from longctx.errors import UserError, run_script
from longctx.runtime import checkpoint


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--ckpt_dir", required=True, help="a checkpoint, a folder of them (the last is taken), or a merged file"
    )
    parser.add_argument("--output_fname", help="the merged file to write: weights, optimizer and step, for torch.load")
    parser.add_argument("--hf_dir", help="the folder to write for AutoModelForCausalLM.from_pretrained")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = checkpoint.find_stored(Path(args.ckpt_dir))
    check_outputs(args, path)
    state = checkpoint.read_state(path, "--ckpt_dir")
    print(f"{path}: step {state.position.step}, {len(state.parameters)} parameters, from {state.world_size} rank(s)")
    if args.output_fname is not None:
        merge(path, Path(args.output_fname))
        print(f"wrote {args.output_fname}")
    if args.hf_dir is not None:
        source = Path(args.output_fname) if checkpoint.is_nnscalers(path) else path
        checkpoint.export_hf(source, Path(args.hf_dir))
        print(f"wrote {args.hf_dir}")


def check_outputs(args: argparse.Namespace, path: Path) -> None:
    """Raises a UserError for outputs that are missing, in the way, or can't be made of what --ckpt_dir names."""
    if args.output_fname is None and args.hf_dir is None:
        raise UserError("--output_fname: it is missing; give it, or --hf_dir, or both")
    for option in ("output_fname", "hf_dir"):
        output = getattr(args, option)
        if output is not None and Path(output).exists():
            raise UserError(f"--{option} {output}: it is there already; remove it or choose another name")
        if output is not None and (problem := why_not_writable(output)):
            raise UserError(f"--{option} {output}: {problem}; choose another name")
    if path.is_file() and args.output_fname is not None:
        raise UserError(f"--ckpt_dir {path}: it is merged already; leave out --output_fname")
    if checkpoint.is_nnscalers(path) and args.output_fname is None:
        raise UserError("--output_fname: it is missing; of nnScaler's shards, --hf_dir is made from the merged file")


def merge(path: Path, output: Path) -> None:
    """Merges with the engine whose checkpoint it is."""
    if not checkpoint.is_nnscalers(path):
        checkpoint.merge(path, output)
        return
    try:
        from longctx.engines.nnscaler import engine as nnscaler_engine
    except ImportError as error:
        raise UserError(
            f"--ckpt_dir {path}: it is a checkpoint of nnScaler's, which can't be imported here ({error}); merge it "
            "where nnscaler is installed (longctx/engines/nnscaler/requirements.txt)"
        ) from error
    nnscaler_engine.merge(path, output)


if __name__ == "__main__":
    run_script(main)
