"""What a run goes on from: the checkpoint that is named, or the newest whole one, whatever a kill has left of others.

Rank 0 looks for it, compares every byte with its digest, and tells the other ranks: if each looked for itself, they
could find different ones while files appear or a disk fails.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from longctx import torchrun
from longctx.errors import CheckpointError, CheckpointFolderError, CheckpointMismatch, OtherEngine
from longctx.job import Job
from longctx.runtime.checkpoint import (
    HF_ENTRY,
    LAST,
    Checkpoint,
    CheckpointFormat,
    Formats,
    check_merged,
    name_when_saved,
    not_whole,
    read,
)
from longctx.runtime.rendezvous import fresh_store

SEARCH_TIMEOUT = timedelta(hours=1)  # longer than a slow disk takes to read several checkpoints of 8B parameters


def find_resume(job: Job, n_rows: int, formats: Formats) -> Checkpoint | None:
    """What to resume from, known to be whole and of these rows; None to start from the model's weights.

    All ranks have to call this.

    Raises:
        CheckpointError: there is none where one is named, or it can't be gone on from; or checkpoints can't be saved.
    """
    path = found_by_rank_zero(lambda: find(job.checkpoint_dir, job.resume_path, job.engine, formats, not job.no_verify))
    formats[job.engine].check_folder(job.checkpoint_dir)
    if path is None:
        return None
    checkpoint = read(path, formats)
    check_same_order(checkpoint, job.seed, n_rows, job.document_mask)
    is_named = job.resume_path is not None and job.resume_path.resolve() in (path.resolve(), path.parent.resolve())
    return replace(checkpoint, origin=checkpoint.state.id if is_named else checkpoint.state.origin)


def found_by_rank_zero(search: Callable[[], Path | None]) -> Path | None:
    """What rank 0 finds. Where its search ends in an error, torchrun ends the ranks that wait for it here."""
    if torchrun.world_size() == 1:
        return search()
    store, key = fresh_store(), "found"
    if torchrun.rank() == 0:
        store.set(key, str(search() or ""))
    store.wait([key], SEARCH_TIMEOUT)
    found = store.get(key).decode()
    return Path(found) if found else None


# --- finding -------------------------------------------------------------------------------------------------------


def find(
    checkpoint_dir: Path, resume_path: Path | None, engine: str, formats: Formats, verify: bool = True
) -> Path | None:
    """What to resume from: `resume_path` (a checkpoint, a folder of checkpoints or a merged file), or the newest whole
    checkpoint in `checkpoint_dir` that a run from there has saved; without `resume_path` the newest whole one.

    None where there is no checkpoint yet.

    Args:
        verify: whether digests are compared, or sizes only.

    Raises:
        CheckpointError: `resume_path` is no such thing, none is whole, it is another engine's and not merged,
            `checkpoint_dir` has another engine's in it, or the one that `last` names is gone and there is no other.
    """
    form = formats[engine]
    others = {name: other for name, other in formats.items() if name != engine}
    if resume_path:
        if name := _engine_of_any(checkpoint_dir, others):
            raise CheckpointFolderError(
                f"the checkpoints in it are the {name} engine's, and those of another would not stay apart from them; "
                "name another folder"
            )
        if own := _find_own(checkpoint_dir, resume_path, form, formats, verify):
            return own
        if resume_path.is_file():
            check_merged(resume_path, formats, verify)
            return resume_path
    path = resume_path or checkpoint_dir
    if found := _checkpoint_in(path, form, verify):
        return found
    if name := _engine_of_any(path, others):
        raise OtherEngine(f"its checkpoint is the {name} engine's", name)
    if gone := next(filter(None, (_last_that_is_gone(path, each) for each in formats.values())), None):
        raise CheckpointError(
            f"its last checkpoint, {gone}, is gone, and there is no other; put it back, or remove "
            f"{path / LAST} to start anew"
        )
    if resume_path:
        what = "it has no checkpoint in it" if path.is_dir() else "there is no such file or folder"
        raise CheckpointError(f"{what}; name a checkpoint folder or a merged file")
    return None


def find_stored(path: Path, formats: Formats, verify: bool = True) -> Path:
    """`path` if it is a merged file or a checkpoint of whichever engine, else the newest whole checkpoint in it.

    Raises:
        CheckpointError: there is none, or none is whole.
    """
    if path.is_file():
        check_merged(path, formats, verify)
        return path
    for form in formats.values():
        if found := _checkpoint_in(path, form, verify):
            return found
    what = "it has no checkpoint in it" if path.is_dir() else "there is no such folder"
    raise CheckpointError(f"{what}; name the folder of checkpoints that train.py wrote to")


def _find_own(
    checkpoint_dir: Path, resume_path: Path, form: CheckpointFormat, formats: Formats, verify: bool
) -> Path | None:
    """The newest whole checkpoint that a run from `resume_path` has saved; a line says whether there is one."""
    saved = [] if resume_path.resolve() == checkpoint_dir.resolve() else _newest_first(checkpoint_dir, form)
    source = _id_of(resume_path, form, formats) if saved else None
    own = [path for path in saved if source and _origin_of(path, form) == source]
    if own:
        found = _newest_whole(checkpoint_dir, own, form, verify)
        torchrun.say(
            f"checkpoint: going on from {found.name}, which a run from {resume_path} has saved; to start from that "
            "again, name another folder for checkpoints"
        )
        return found
    if saved:
        torchrun.say(f"checkpoint: starting from {resume_path}, from which no checkpoint in {checkpoint_dir} comes")
    return None


def _id_of(path: Path, form: CheckpointFormat, formats: Formats) -> str | None:
    """The id of a merged file, a checkpoint or the newest in a folder; None if it has none or can't be read."""
    if not path.is_file() and not (path / form.mark).is_file():
        path = next(iter(_newest_first(path, form)), path)
    try:
        return read(path, formats).state.id
    except CheckpointError:  # whoever takes it says what is wrong with it
        return None


def _origin_of(path: Path, form: CheckpointFormat) -> str | None:
    try:
        return form.read_state(path).origin
    except ValueError:
        return None


def _engine_of_any(folder: Path, formats: Formats) -> str | None:
    """The engine, among these, that has a checkpoint in the folder."""
    return next(
        (name for name, form in formats.items() if (folder / form.mark).is_file() or _newest_first(folder, form)), None
    )


def _checkpoint_in(folder: Path, form: CheckpointFormat, verify: bool) -> Path | None:
    """`folder` itself if it is a checkpoint of this format, else the newest whole one in it; None if there is none.

    Raises:
        CheckpointError: none is whole.
    """
    if not (folder / form.mark).is_file():
        found = _newest_first(folder, form)
        return _newest_whole(folder, found, form, verify) if found else None
    if problem := _problem(folder, form, verify):
        raise not_whole(folder, problem)
    return folder


def _newest_whole(folder: Path, newest_first: list[Path], form: CheckpointFormat, verify: bool) -> Path:
    """The first of these that is whole; a line says why those before it, or the one that `last` names, are not taken.

    Raises:
        CheckpointError: none is.
    """
    passed_over, first_problem = [], ""
    for path in newest_first:
        problem = _problem(path, form, verify)
        if problem is None:
            if gone := _last_that_is_gone(folder, form):
                passed_over.append(f"{folder / LAST} names {gone}, which is gone")
            if passed_over:
                torchrun.say(f"checkpoint: {'; '.join(passed_over)}; taking {path.name}, the newest that is whole")
            return path
        passed_over.append(f"{path.name} is not whole ({problem})")
        first_problem = first_problem or problem
    raise not_whole(newest_first[0], first_problem)


def _problem(path: Path, form: CheckpointFormat, verify: bool) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    try:
        form.check(path, verify)
    except ValueError as error:
        return str(error)
    return None


def _newest_first(folder: Path, form: CheckpointFormat) -> list[Path]:
    """Every folder of this format that has the name of a whole checkpoint, and those that were being replaced.

    They are in the order in which they were saved, by their serial numbers. Where there are none, as in older versions,
    the one that `last` names comes first, then those of most steps. One whose number can't be read may be the newest.
    """
    folder, found = folder.resolve(), []
    last = _last_name(folder, form)
    for path in folder.iterdir() if folder.is_dir() else ():
        name = LAST if path.name == LAST and not path.is_symlink() else name_when_saved(path.name)
        if name and not (path / form.mark).is_symlink() and _is_of(path, form):
            epoch, step = (0, 0) if name == LAST else map(int, name.split("-"))
            found.append((_serial(path, form), name in (LAST, last), step, epoch, path.name == name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _is_of(path: Path, form: CheckpointFormat) -> bool:
    """Whether a folder is a checkpoint of this format, though it may have lost files."""
    return (path / form.mark).is_file() or any(path.glob(form.shards))


def _serial(path: Path, form: CheckpointFormat) -> float:
    try:
        return form.read_state(path).serial or 0
    except ValueError:
        return math.inf


def _last_name(folder: Path, form: CheckpointFormat) -> str | None:
    """The name of the checkpoint that `last` links to, itself or by the files in it."""
    if (folder / LAST).is_symlink():
        return os.readlink(folder / LAST)
    if (folder / LAST / form.mark).is_symlink():
        return Path(os.readlink(folder / LAST / form.mark)).parent.name
    return None


def _last_that_is_gone(folder: Path, form: CheckpointFormat) -> str | None:
    """The name that `last` links to, if there is no checkpoint of it."""
    name = _last_name(folder, form)
    return name if name and not (folder / LAST / form.mark).exists() else None


# --- checks --------------------------------------------------------------------------------------------------------


def check_same_model(checkpoint: Checkpoint, parameters: dict[str, list[int]]) -> None:
    """Raises a CheckpointError if a checkpoint is not of the model with these parameters."""
    stored = checkpoint.state.parameters
    differing = [name for name in {**stored, **parameters} if stored.get(name) != parameters.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"it is a checkpoint of another model ({checkpoint.path.name} has {name!r} {stored.get(name, 'not')}, and "
            f"this model {parameters.get(name, 'not')}); name another checkpoint, or another folder for checkpoints to "
            "start anew"
        )


def changed_positions(checkpoint: Checkpoint, rope_parameters: dict[str, Any] | None) -> str | None:
    """A line that says how the model's rotary positions differ from those that a checkpoint was trained with."""
    config = stored_config(checkpoint)
    before = config.get("text_config", config).get("rope_parameters")
    if not before or before == rope_parameters:
        return None
    now = json.dumps(rope_parameters)
    return f"checkpoint: trained so far with positions {json.dumps(before)}, and with {now} from here on"


def stored_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration that is stored with a checkpoint; {} if none can be read."""
    try:
        if checkpoint.merged is None:
            text = (checkpoint.path / HF_ENTRY / "config.json").read_bytes()
        else:
            text = checkpoint.merged[HF_ENTRY]["config.json"].numpy().tobytes()
        return json.loads(text)
    except (OSError, ValueError, KeyError):
        return {}


def check_same_order(checkpoint: Checkpoint, seed: int, n_rows: int, document_mask: bool) -> None:
    """Raises a CheckpointMismatch if the rows would come in another order than the checkpoint's run has seen them."""
    state, path = checkpoint.state, checkpoint.path
    if state.seed != seed:
        raise CheckpointMismatch(
            "seed",
            f"{path} is of a run with seed {state.seed}, and another would shuffle its rows anew in the middle of an "
            f"epoch; take seed {state.seed}",
        )
    if bool(state.document_mask) != document_mask:
        was, do = ("with", "pass it") if state.document_mask else ("without", "leave it out")
        raise CheckpointMismatch(
            "document_mask",
            f"{path} is of a run {was} it, in which attention saw other tokens and rows came in another order; {do}, "
            "or export the weights as a Hugging Face folder with ckpt_merger.py and start a new run from them",
        )
    if state.n_rows != n_rows:
        raise CheckpointMismatch(
            "dataset_path",
            f"it has {n_rows} rows and the run of {path} had {state.n_rows}; to train on other rows, export the "
            "weights as a Hugging Face folder with ckpt_merger.py and start a new run from them",
        )
