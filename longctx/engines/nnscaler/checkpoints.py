"""nnScaler's checkpoints, read without it: a `<rank>.ckpt` a rank, and a merged file in a form of its own.

Both have two entries of ours beside nnScaler's: 'state' and 'hf', as a merged file of the built-in engine has them; a
merged file lists them by rank. nnScaler calls a parameter `loss.model.<its name>`, after where it is in WrappedModel.
Only merging takes nnScaler.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from longctx.atomic import whole_file
from longctx.errors import CheckpointError, CheckpointFolderError, one_line
from longctx.job import DTYPES
from longctx.runtime.checkpoint import (
    HF_ENTRY,
    LAST,
    STATE_ENTRY,
    Checkpoint,
    CheckpointFormat,
    State,
    map_file,
    reason,
)
from longctx.seal import append_seal

Parameters = dict[str, list[int]]  # name -> shape, in the order in which nnScaler counts them

FIRST_SHARD = "0.ckpt"  # of rank 0
PREFIX = "loss.model."  # of a parameter's name, before the name that Hugging Face gives it
LINK_FOLDERS = (LAST, "best")  # nnScaler makes a link to each shard in them


def read_state(path: Path) -> State:
    """The state of a checkpoint folder.

    Raises:
        ValueError: it is not whole; the message says why.
    """
    try:
        state = State.from_json(json.loads(map_file(path / FIRST_SHARD)[STATE_ENTRY]))
    except Exception as error:  # whatever a damaged file makes torch or json raise
        raise ValueError(f"its file {FIRST_SHARD} is damaged ({reason(error)})") from error
    for name in (f"{rank}.ckpt" for rank in range(state.world_size)):
        if not (path / name).is_file():
            raise ValueError(f"its file {name} is missing")
        if not zipfile.is_zipfile(path / name):  # nnScaler writes no sizes down; a zip file ends in its list of files
            raise ValueError(f"its file {name} is cut short")
    return state


def check(path: Path, compare_digests: bool) -> None:
    """Raises a ValueError unless all shards of a checkpoint are there, and by torch.save's own checksums undamaged."""
    state = read_state(path)
    for rank in range(state.world_size if compare_digests else 0):
        try:
            with zipfile.ZipFile(path / f"{rank}.ckpt") as shard:
                damaged = shard.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"its file {rank}.ckpt is damaged ({one_line(error)})") from error
        if damaged:
            raise ValueError(f"its file {rank}.ckpt is damaged, in {damaged}")


def stored_precision(path: Path) -> str:
    """The precision of the run that a checkpoint folder is of: bf16 or fp32.

    Raises:
        CheckpointError: its first shard can't be read.
    """
    try:
        return map_file(path / FIRST_SHARD)["train_args"]["precision"]["param"]
    except Exception as error:  # whatever a damaged file makes torch raise
        raise CheckpointError(f"{path / FIRST_SHARD} can't be read ({one_line(error)})") from error


def check_folder(folder: Path) -> None:
    """Raises a CheckpointFolderError where nnScaler would put links in the place of files, or could not put them."""
    for name in LINK_FOLDERS:
        links = folder / name
        files = links.iterdir() if links.is_dir() and not links.is_symlink() else [links]
        for file in files:
            if os.path.lexists(file) and not (file.parent == links and file.is_symlink()):
                raise CheckpointFolderError(
                    f"{file} is no link to a checkpoint, as nnscaler makes it; move it, or name another folder"
                )


def merge(checkpoint: Checkpoint, output: Path) -> None:
    """A checkpoint's shards -> one file in nnScaler's own form, which both engines resume from.

    Raises:
        CheckpointError: nnScaler can't be imported.
    """
    try:
        from nnscaler.cli.trainer import Trainer
    except ImportError as error:
        raise CheckpointError(
            f"it is a checkpoint of nnScaler's, which can't be imported here ({error}); merge it where nnscaler is "
            "installed (longctx/engines/nnscaler/requirements.txt)"
        ) from error
    shards = [str(checkpoint.path / f"{rank}.ckpt") for rank in range(checkpoint.state.world_size)]
    with whole_file(output) as aside:
        Trainer.merge_checkpoint(shards, str(aside))
        append_seal(aside)


def as_builtin(merged: dict[str, Any]) -> dict[str, Any]:
    """A merged file's entries in the built-in engine's form, which other entries than nnScaler's are in already.

    nnScaler numbers the optimizer's entries in the order of the parameters, keeps the float32 masters among them, and
    lists what else ranks saved by rank.
    """
    if not isinstance(merged[STATE_ENTRY], list):
        return merged
    state = merged[STATE_ENTRY][0]
    names = list(json.loads(state)["parameters"])
    optimizer = {}
    for number, name in enumerate(names):
        optimizer |= {f"{name}/{key}": value for key, value in merged["optimizer"]["state"][number].items()}
    # A tied weight is stored by each of its names; it is a parameter by one.
    weights = {name: optimizer.pop(f"{name}/fp32_params", merged["model"][PREFIX + name]) for name in names}
    return {"model": weights, "optimizer": optimizer, STATE_ENTRY: state, HF_ENTRY: merged[HF_ENTRY][0]}


def as_nnscaler(merged: dict[str, Any], names: list[str], precision: str, version: str) -> dict[str, Any]:
    """A merged file's entries, in the built-in engine's form, in the one that nnScaler loads: by parameters' numbers.

    Args:
        names: the parameters, in the order in which nnScaler counts them.
        version: nnScaler's own; without it MixedPrecisionAdamW takes the rounded weights for its masters.
    """
    states: dict[int, dict[str, torch.Tensor]] = {number: {} for number in range(len(names))}
    for number, name in enumerate(names):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            states[number][key] = merged["optimizer"][f"{name}/{key}"]
        if precision == "bf16":  # MixedPrecisionAdamW's masters
            states[number]["fp32_params"] = merged["model"][name]
    step = json.loads(merged[STATE_ENTRY])["position"]["step"]
    return {
        "model": {PREFIX + name: tensor.to(DTYPES[precision]) for name, tensor in merged["model"].items()},
        "optimizer": {"state": states, "param_groups": [{"params": list(states)}]},
        "train_status": {"finished_train_steps": step},
        "nnscaler": version,
    }


FORMAT = CheckpointFormat(
    mark=FIRST_SHARD,
    shards="*.ckpt",
    read_state=read_state,
    check=check,
    check_folder=check_folder,
    merge=merge,
    as_builtin=as_builtin,
    exports_shards=False,
)
