"""Tries every family of transformers' causal mapping, and writes which ones this program trains as the model they are.

    PYTHONPATH=. python tests/survey.py --quick                      # plans for 1 rank; some minutes
    PYTHONPATH=. python tests/survey.py --output docs/models.md      # plans for 1, 2 and 4 ranks

Each family has a process of its own with a time limit, since some models' code never ends, takes all memory or ends the
process. What has been found is kept in --results, and a family that is there is not tried again: an interrupted survey
goes on.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers
from families import ALL_FAMILIES
from plans import Case, check_cases
from tqdm import tqdm

from longctx.errors import UserError, one_line

TIME_LIMIT_S = 300
MEMORY_LIMIT = 8 << 30  # bytes of a process
LARGEST_LOSS_ERROR, LARGEST_GRADIENT_ERROR = 1e-6, 1e-4
DRAWN = [(1, 1, 1), (2, 2, 2), (4, 4, 2)]  # ranks, ranks of a plan, plans
DRAWN_QUICKLY = [(1, 1, 1)]


@dataclass(frozen=True)
class Row:
    """What was found of a family. `result` is 'right', 'wrong', 'refused', or 'failed' (with no sentence)."""

    family: str
    result: str
    says: str = ""  # the sentence, or the error and where it was raised
    loss_error: float = 0.0
    gradient_error: float = 0.0
    n_plans: int = 0


def try_family(family: str, drawn: list[tuple[int, int, int]]) -> Row:
    """Compares drawn plans of a family's tiny model with the Hugging Face model, on ranks of this machine."""
    errors = []
    try:
        for n_ranks, plan_ngpus, n_plans in drawn:
            cases = [Case(family, seed, plan_ngpus, n_ranks) for seed in range(n_plans)]
            errors += check_cases(cases, start_method="fork").values()
    except UserError as error:
        return Row(family, "refused", str(error))
    except Exception as error:
        inner = traceback.extract_tb(error.__traceback__)[-1]
        says = f"{type(error).__name__}: {one_line(error)} ({Path(inner.filename).name}:{inner.lineno})"
        return Row(family, "failed", str(error)[-1500:] if "-- Process" in str(error) else says)
    loss_error = max(loss for loss, _, _ in errors)
    gradient_error, parameter = max((gradient, name) for _, gradient, name in errors)
    # Compared this way round, so that an error that is no number is none that is small enough.
    right = all(loss < LARGEST_LOSS_ERROR and gradient < LARGEST_GRADIENT_ERROR for loss, gradient, _ in errors)
    says = "" if right else f"the gradient of {parameter}"
    return Row(family, "right" if right else "wrong", says, loss_error, gradient_error, len(errors))


def _write_row(path: Path, family: str, drawn: list[tuple[int, int, int]]) -> None:
    """What the process of a family does."""
    os.setsid()  # so that its ranks end with it
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    path.write_text(json.dumps(asdict(try_family(family, drawn))))


def try_in_a_process(family: str, drawn: list[tuple[int, int, int]], folder: Path) -> Row:
    """try_family in a process of its own, which is ended at the time limit."""
    path = folder / f"{family}.json"
    path.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_write_row, args=(path, family, drawn))
    process.start()
    process.join(TIME_LIMIT_S)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Row(family, "failed", f"it took more than {TIME_LIMIT_S} s")
    if not path.exists():
        return Row(family, "failed", f"its process ended with status {process.exitcode}")
    return Row(**json.loads(path.read_text()))


def survey(families: list[str], drawn: list[tuple[int, int, int]], results: Path) -> list[Row]:
    """A row for each family; those in the file `results` are taken from there, the others are added to it."""
    rows = {row["family"]: Row(**row) for row in json.loads(results.read_text())} if results.exists() else {}
    for family in tqdm([family for family in families if family not in rows]):
        rows[family] = try_in_a_process(family, drawn, results.parent)
        results.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1))
        tqdm.write(f"{family}: {rows[family].result} {rows[family].says[:150]}")
    return [rows[family] for family in families]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=ALL_FAMILIES)
    parser.add_argument("--quick", action="store_true", help="plans for 1 rank only")
    parser.add_argument("--results", type=Path, default=Path("survey.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = survey(args.families, DRAWN_QUICKLY if args.quick else DRAWN, args.results)
    print({result: sum(row.result == result for row in rows) for result in ("right", "refused", "wrong", "failed")})


if __name__ == "__main__":
    main()
