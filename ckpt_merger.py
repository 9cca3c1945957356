"""Merges a checkpoint's shards into one file, or into a Hugging Face folder.

    python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
    python ckpt_merger.py --ckpt_dir ./checkpoints/0001-000500 --hf_dir ./llama3_trained

Checkpoints may be of any engine, and each engine merges its own. A merged file resumes training under all of them, on
any number of ranks (`train.py --resume_path ./merged.ckpt`). With several nodes and no file system that they share,
collect all shards in one folder first.
"""

from dataclasses import dataclass
from pathlib import Path

from longctx.atomic import why_not_new
from longctx.command_line import Cause, naming_options, option, parse
from longctx.engines.checkpoints import FORMATS
from longctx.errors import CheckpointError, NoRoom, UserError, run_script
from longctx.runtime.checkpoint import Checkpoint, read
from longctx.runtime.merge import export_hf
from longctx.runtime.resume import find_stored


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What ckpt_merger.py is asked to do."""

    ckpt_dir: Path = option(help="a checkpoint, a folder of them (the newest is taken), or a merged file")
    output_fname: Path | None = option(None, "the merged file to write: weights, optimizer and step, for torch.load")
    hf_dir: Path | None = option(None, "the folder to write for AutoModelForCausalLM.from_pretrained")
    no_verify: bool = option(False, "merge without comparing bytes with their digests")


def main(argv: list[str] | None = None) -> None:
    asked = parse(Merge, argv, (__doc__ or "").splitlines()[0])
    with naming_options(asked, {CheckpointError: Cause("ckpt_dir"), NoRoom: Cause("output_fname")}):
        found = read(find_stored(asked.ckpt_dir, FORMATS, verify=not asked.no_verify), FORMATS)
        check_outputs(asked, found)
        state = found.state
        print(
            f"{found.path}: step {state.position.step}, {len(state.parameters)} parameters, from "
            f"{state.world_size} rank(s)"
        )
        if asked.output_fname is not None and found.engine is not None:
            FORMATS[found.engine].merge(found, asked.output_fname)
            print(f"wrote {asked.output_fname}")
    if asked.hf_dir is not None:
        with naming_options(asked, {CheckpointError: Cause("ckpt_dir"), NoRoom: Cause("hf_dir")}):
            export_hf(source_of_weights(asked, found), asked.hf_dir)
        print(f"wrote {asked.hf_dir}")


def check_outputs(asked: Merge, found: Checkpoint) -> None:
    """Raises a UserError for outputs that are missing, in the way, or can't be made of what --ckpt_dir names."""
    if asked.output_fname is None and asked.hf_dir is None:
        raise UserError("--output_fname: it is missing; give it, or --hf_dir, or both")
    for name in ("output_fname", "hf_dir"):
        output = getattr(asked, name)
        if output is not None and (problem := why_not_new(output)):
            raise UserError(f"--{name} {output}: {problem}; choose another name")
    if asked.output_fname is not None and asked.hf_dir is not None:
        file, folder = asked.output_fname.resolve(), asked.hf_dir.resolve()
        if file == folder or file in folder.parents or folder in file.parents:
            raise UserError(
                f"--hf_dir {asked.hf_dir}: it is the place of --output_fname {asked.output_fname}, or one would be "
                "inside the other; name two places apart"
            )
    if found.merged and asked.output_fname is not None:
        raise UserError(f"--ckpt_dir {found.path}: it is merged already; leave out --output_fname")
    if asked.output_fname is None and not exports_hf(found):
        raise UserError(
            f"--output_fname: it is missing; of the {found.engine} engine's shards, --hf_dir is made from the merged "
            "file"
        )


def exports_hf(found: Checkpoint) -> bool:
    """Whether the Hugging Face folder can be made of what was found: a merged file, or some engines' shards."""
    return found.engine is None or FORMATS[found.engine].exports_shards


def source_of_weights(asked: Merge, found: Checkpoint) -> Checkpoint:
    """What the Hugging Face folder is made from: what was found, or the merged file that has been made of it."""
    if asked.output_fname is None or exports_hf(found):
        return found
    return read(asked.output_fname, FORMATS)


if __name__ == "__main__":
    run_script(main)
