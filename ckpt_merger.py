"""Merges a checkpoint's shards into one file, or into a Hugging Face folder.

    python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
    python ckpt_merger.py --ckpt_dir ./checkpoints/0001-000500 --hf_dir ./llama3_trained

The merged file resumes training on any number of ranks (`train.py --resume_path ./merged.ckpt`). With several nodes and
no file system that they share, collect all shards in one folder first.
"""

import argparse
from pathlib import Path

from errors import UserError, run_script
from runtime import checkpoint


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ckpt_dir", required=True, help="a checkpoint, or a folder of them (the last is taken)")
    parser.add_argument("--output_fname", help="the merged file to write: weights, optimizer and step, for torch.load")
    parser.add_argument("--hf_dir", help="the folder to write for AutoModelForCausalLM.from_pretrained")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output_fname is None and args.hf_dir is None:
        raise UserError("--output_fname: it is missing; give it, or --hf_dir, or both")
    for option in ("output_fname", "hf_dir"):
        output = getattr(args, option)
        if output is not None and Path(output).exists():
            raise UserError(f"--{option} {output}: it is there already; remove it or choose another name")
    path = checkpoint.find_shards(Path(args.ckpt_dir))
    state = checkpoint.read_state(path, "--ckpt_dir")
    print(f"{path}: step {state.position.step}, {len(state.parameters)} parameters, from {state.world_size} rank(s)")
    if args.output_fname is not None:
        checkpoint.merge(path, Path(args.output_fname))
        print(f"wrote {args.output_fname}")
    if args.hf_dir is not None:
        checkpoint.export_hf(path, Path(args.hf_dir))
        print(f"wrote {args.hf_dir}")


if __name__ == "__main__":
    run_script(main)
