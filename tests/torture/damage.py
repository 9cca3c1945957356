"""Every file of a checkpoint, a merged file, a compiled folder and a dataset: flipped, cut, grown, swapped and lost.

    PYTHONPATH=.:tests python -m tests.torture.damage

After each, what is damaged is named, and refused in a sentence or passed over for an older one; it is never used.
"""

import contextlib
import io
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from families import small_config
from saved_rows import save_rows
from test_checkpoint import write_checkpoint

import ckpt_merger
import train
from longctx.data import rows
from longctx.engines import TORCH
from longctx.engines.builtin import cache
from longctx.engines.checkpoints import FORMATS
from longctx.errors import UserError
from longctx.job import Job
from longctx.options import parse_job
from longctx.runtime import checkpoint, merge, resume
from longctx.seal import files_in
from tests.torture import Row

OLD, NEW = "0000-000001", "0000-000002"
GOOD = ("named, an older one taken", "refused in a sentence", "named, compiled anew", "compiled anew")


def main(quick: bool) -> list[Row]:
    """Raises an AssertionError if anything damaged was used, or ended in another exception than a UserError."""
    n_flips = 8 if quick else 400
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        outcomes = {
            **of_checkpoint(place / "checkpoints", n_flips),
            **of_merged_file(place / "merged", n_flips),
            **of_compiled_folder(place / "compiled", n_flips),
            **of_dataset(place / "rows", n_flips),
        }
    table = [
        Row(
            what, sum(counts.values()), ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(counts.items()))
        )
        for what, counts in outcomes.items()
    ]
    wrong = [row for row, counts in zip(table, outcomes.values(), strict=True) if set(counts) - set(GOOD)]
    assert not wrong, wrong
    return table


# --- one file --------------------------------------------------------------------------------------------------------


def damages(content: bytes, other: bytes, n_flips: int) -> Iterator[bytes | None]:
    """What may become of a file's content, and of `other`, in whose place it may have come; None: it is lost."""
    draw = random.Random(len(content))
    edges = {0, 1, len(content) - 2, len(content) - 1}
    for place in sorted(edges | {draw.randrange(len(content)) for _ in range(n_flips)}):
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    for length in (0, 1, len(content) // 2, len(content) - 1):
        yield content[:length]
    yield content + b"\0"
    if other != content:
        yield other
    yield None


def try_all(file: Path, other: bytes, n_flips: int, outcome: Callable[[], str]) -> Counter:
    """How often each outcome came of a damage to the file, which is whole again after each."""
    content, counts = file.read_bytes(), Counter()
    for damaged in damages(content, other, n_flips):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        counts[outcome()] += 1
        file.write_bytes(content)
    return counts


def outcome_of(act: Callable[[], str]) -> str:
    try:
        return act()
    except UserError as error:
        return "refused in a sentence" if "\n" not in str(error) else f"refused in {error}"
    except Exception as error:
        return f"ended in {type(error).__name__}: {error}"


# --- what is damaged -------------------------------------------------------------------------------------------------


def of_checkpoint(folder: Path, n_flips: int) -> dict[str, Counter]:
    """Of the newer of two checkpoints; a file that is swapped comes from the older one."""
    old, new = write_checkpoint(folder, OLD, serial=1), write_checkpoint(folder, NEW, serial=2)
    counts = {}
    for name in files_in(new):

        def act(name: str = name) -> str:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                found = resume.find(folder, None, TORCH, FORMATS)
            if found != old:
                return "used"
            # A manifest of another checkpoint, whole in itself, leaves it to the files to differ.
            which = "" if name == checkpoint.STATE else f"{name} "
            is_named = f"{NEW} is not whole (its file {which}" in said.getvalue()
            return "named, an older one taken" if is_named else f"not named in {said.getvalue()!r}"

        counts[f"checkpoint, {name}"] = try_all(
            new / name, (old / name).read_bytes(), n_flips, lambda act=act: outcome_of(act)
        )
    return counts


def of_merged_file(folder: Path, n_flips: int) -> dict[str, Counter]:
    files = []
    for name in (OLD, NEW):
        files.append(folder / f"{name}.ckpt")
        merge.merge(checkpoint.read(write_checkpoint(folder, name, id=name), FORMATS), files[-1])

    def resumes() -> str:
        with contextlib.redirect_stdout(io.StringIO()):
            resume.find(folder / "none", files[0], TORCH, FORMATS)
        return "used"

    def merges() -> str:
        """Makes a Hugging Face folder of it; whatever is written is undone when that fails."""
        try:
            ckpt_merger.main(["--ckpt_dir", str(files[0]), "--hf_dir", str(folder / "hf")])
        finally:
            assert not list(folder.glob("*hf*")), "something was written of what is damaged"
        return "used"

    other = files[1].read_bytes()[:-1]  # the newer one whole would be another merged file, and good
    return {
        "merged file, resumed from": try_all(files[0], other, n_flips, lambda: outcome_of(resumes)),
        "merged file, exported": try_all(files[0], other, n_flips // 4, lambda: outcome_of(merges)),
    }


def of_compiled_folder(folder: Path, n_flips: int) -> dict[str, Counter]:
    small_config("llama").save_pretrained(folder / "model")
    words = ["--model_id", str(folder / "model"), "--engine", TORCH, "--run_mode", "compile"]
    one, other = (
        parse_job([*words, "--sequence_length", length, "--compiled_dir", str(folder / length)])
        for length in ("8", "16")
    )
    with contextlib.redirect_stdout(io.StringIO()):
        cache.ensure_compiled(other)
        cache.ensure_compiled(one)
    inputs = cache.plan_inputs(one)
    return {
        f"compiled folder, {name}": try_all(
            one.compiled_folder / name,
            (other.compiled_folder / name).read_bytes(),
            n_flips,
            lambda: outcome_of(lambda: reuses(one, inputs)),
        )
        for name in files_in(one.compiled_folder)
    }


def reuses(job: Job, inputs: dict) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, patch.object(cache.pipeline, "compile_plan") as compiles:
        cache.compile_unless_up_to_date(job, inputs)
    if not compiles.called:
        return "used"
    return "named, compiled anew" if "since it is damaged (plan.json: " in said.getvalue() else "compiled anew"


def of_dataset(folder: Path, n_flips: int) -> dict[str, Counter]:
    """Without corpus.json rows are another program's, of which there are no digests; its loss is left out."""
    one, other = (Path(save_rows(folder / str(seed), torch.randint(0, 64, (8, 32)))) for seed in (0, 1))
    for each in (one, other):
        rows.record_corpus(each, {"tokenizer": str(each), "vocab_size": 64, "largest_token": 63})

    def act() -> str:
        if not (one / rows.CORPUS).exists():
            return "refused in a sentence"
        rows.verify_dataset(str(one))
        return "used"

    return {
        f"dataset, {name}": try_all(one / name, (other / name).read_bytes(), n_flips, lambda: outcome_of(act))
        for name in files_in(one)
    }


if __name__ == "__main__":
    train.register_loss()
    for row in main(quick=False):
        print(row)
