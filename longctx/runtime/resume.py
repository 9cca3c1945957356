"""What a run goes on from: the checkpoint that is named, or the last whole one, whatever a kill has left of others."""

import os
from pathlib import Path

from longctx import torchrun
from longctx.errors import CheckpointError, CheckpointFolderError, CheckpointMismatch, OtherEngine
from longctx.job import Job
from longctx.runtime.checkpoint import (
    LAST,
    Checkpoint,
    CheckpointFormat,
    Formats,
    name_when_saved,
    read,
)


def find_resume(job: Job, n_rows: int, formats: Formats) -> Checkpoint | None:
    """What to resume from, known to be whole and of these rows; None to start from the model's weights.

    Raises:
        CheckpointError: there is none where one is named, or it can't be gone on from; or checkpoints can't be saved.
    """
    path = find(job.checkpoint_dir, job.resume_path, job.engine, formats)
    formats[job.engine].check_folder(job.checkpoint_dir)
    if path is None:
        return None
    checkpoint = read(path, formats)
    check_same_order(checkpoint, job.seed, n_rows)
    return checkpoint


def find(checkpoint_dir: Path, resume_path: Path | None, engine: str, formats: Formats) -> Path | None:
    """What to resume from: `resume_path` (a checkpoint, a folder of checkpoints or a merged file), else the last.

    None where there is no checkpoint yet.

    Raises:
        CheckpointError: `resume_path` is no such thing, the checkpoint is another engine's and not merged,
            `checkpoint_dir` has another engine's in it, or the one that `last` names is gone and there is no other.
    """
    path = resume_path or checkpoint_dir
    others = {name: other for name, other in formats.items() if name != engine}
    if resume_path and (name := _engine_of_any(checkpoint_dir, others)):
        raise CheckpointFolderError(
            f"the checkpoints in it are the {name} engine's, and those of another would not stay apart from them; "
            "name another folder"
        )
    if resume_path and path.is_file():
        return path
    if found := _checkpoint_in(path, formats[engine]):
        _say_if_not_last(path, found, formats[engine])
        return found
    if name := _engine_of_any(path, others):
        raise OtherEngine(f"its checkpoint is the {name} engine's", name)
    links = [path / LAST, *(path / LAST / form.mark for form in formats.values())]
    if link := next((link for link in links if link.is_symlink()), None):
        raise CheckpointError(
            f"its last checkpoint, {os.readlink(link)}, is gone, and there is no other; put it back, or remove "
            f"{path / LAST} to start anew"
        )
    if resume_path:
        what = "it has no checkpoint in it" if path.is_dir() else "there is no such file or folder"
        raise CheckpointError(f"{what}; name a checkpoint folder or a merged file")
    return None


def find_stored(path: Path, formats: Formats) -> Path:
    """`path` if it is a merged file or a checkpoint of whichever engine, else the last checkpoint in it.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    for form in formats.values():
        if found := _checkpoint_in(path, form):
            _say_if_not_last(path, found, form)
            return found
    what = "it has no checkpoint in it" if path.is_dir() else "there is no such folder"
    raise CheckpointError(f"{what}; name the folder of checkpoints that train.py wrote to")


def _engine_of_any(folder: Path, formats: Formats) -> str | None:
    """The engine, among these, that has a checkpoint in the folder."""
    return next((name for name, form in formats.items() if _checkpoint_in(folder, form)), None)


def _checkpoint_in(folder: Path, form: CheckpointFormat) -> Path | None:
    """`folder` itself if it is a checkpoint of this format, else the last whole one in it.

    That is the one that `last` names; where it is gone or damaged, what it was to replace; then the one of most steps.
    Where none is whole, the first of these, for `read` to say what is wrong with it.
    """
    if (folder / form.mark).is_file():
        return folder
    found = _newest_first(folder)
    if (folder / LAST / form.mark).is_file():
        found.insert(0, (folder / LAST / form.mark).resolve().parent)
    found = [path for path in found if (path / form.mark).is_file()]
    return next((path for path in found if _is_whole(path, form)), found[0] if found else None)


def _newest_first(folder: Path) -> list[Path]:
    """Every folder that has the name of a whole checkpoint, and those that were being replaced, by their steps.

    What stands in for the one that `last` names comes before all others.
    """
    folder = folder.resolve()
    last = os.readlink(folder / LAST) if (folder / LAST).is_symlink() else None
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if name := name_when_saved(path.name):
            epoch, step = map(int, name.split("-"))
            found.append((name == last, step, epoch, path.name == name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _is_whole(path: Path, form: CheckpointFormat) -> bool:
    try:
        form.read_state(path)
    except ValueError:
        return False
    return True


def _say_if_not_last(folder: Path, found: Path, form: CheckpointFormat) -> None:
    """Prints that `found` was taken in the place of `last`."""
    last = (folder / LAST / form.mark).resolve().parent
    if found not in (folder, last) and _is_whole(found, form):
        problem = f"{folder / LAST} is missing or damaged"
        torchrun.say(f"checkpoint: {problem}, taking {found.name}, the newest that is whole")


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


def check_same_order(checkpoint: Checkpoint, seed: int, n_rows: int) -> None:
    """Raises a CheckpointMismatch if the rows would come in another order than the checkpoint's run has seen them."""
    state, path = checkpoint.state, checkpoint.path
    if state.seed != seed:
        raise CheckpointMismatch(
            "seed",
            f"{path} is of a run with seed {state.seed}, and another would shuffle its rows anew in the middle of an "
            f"epoch; take seed {state.seed}",
        )
    if state.n_rows != n_rows:
        raise CheckpointMismatch(
            "dataset_path",
            f"it has {n_rows} rows and the run of {path} had {state.n_rows}; to train on other rows, export the "
            "weights as a Hugging Face folder with ckpt_merger.py and start a new run from them",
        )
