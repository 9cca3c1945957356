"""Tries every family of transformers' causal mapping, and writes which ones this program trains as the model they are.

    PYTHONPATH=. python tests/survey.py --quick                      # plans for 1 rank; some minutes
    PYTHONPATH=. python tests/survey.py --output docs/models.md      # plans for 2 and 4 ranks; half an hour on 2 cores

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

import torch
import transformers
from families import (
    ALL_FAMILIES,
    config_of,
    random_rows,
    reference_loss,
    reference_model,
)
from plans import LENGTH, Case, check_cases, trace_family
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longctx.errors import UserError, one_line
from longctx.proof import Proof, gradient_errors, gradients_of, may_be_rounding, prove

TIME_LIMIT_S = 300
MEMORY_LIMIT = 8 << 30  # bytes of a process
Drawn = dict[int, list[tuple[int, int]]]
# Plans by the number of ranks, as (ranks of a plan, seed); a plan of 2 on 4 ranks has two copies.
DRAWN = {4: [(4, 0), (4, 1), (2, 2)]}
DRAWN_QUICKLY = {1: [(1, 0)]}


@dataclass(frozen=True)
class Row:
    """What was found of a family. `result` is 'right', 'wrong', 'refused', or 'failed' (with no sentence)."""

    family: str
    result: str
    says: str = ""  # the sentence, or the error and where it was raised
    loss_error: float = 0.0
    gradient_error: float = 0.0
    n_plans: int = 0


def try_family(family: str, drawn: Drawn) -> Row:
    """Compares drawn plans of a family's tiny model with the Hugging Face model, on ranks of this machine."""
    errors = []
    try:
        for n_ranks, plans in drawn.items():
            cases = [Case(family, seed, plan_ngpus, n_ranks) for plan_ngpus, seed in plans]
            errors += check_cases(cases, start_method="fork").values()
        prove(trace_family(family), config_of(family), LENGTH)  # compile refuses what fails here
    except UserError as error:
        return Row(family, "refused", str(error))
    except Exception as error:
        inner = traceback.extract_tb(error.__traceback__)[-1]
        says = f"{type(error).__name__}: {one_line(error)} ({Path(inner.filename).name}:{inner.lineno})"
        return Row(family, "failed", str(error)[-1500:] if "-- Process" in str(error) else says)
    return judge(family, errors)


def judge(family: str, errors: list[tuple[float, float, str]]) -> Row:
    """'right' or 'wrong', by the loss error, the worst gradient error and its parameter of each plan, as proofs are."""
    loss_error = max(loss for loss, _, _ in errors)
    gradient_error, parameter = max((gradient, name) for _, gradient, name in errors)
    roundings = own_roundings(family) if may_be_rounding(gradient_error) else {}
    right = all(Proof(loss, gradient, name, roundings.get(name, 0.0)).holds for loss, gradient, name in errors)
    says = "" if right else f"the gradient of {parameter}"
    return Row(family, "right" if right else "wrong", says, loss_error, gradient_error, len(errors))


def own_roundings(family: str) -> dict[str, float]:
    """How far each of the Hugging Face model's own gradients in float32 is from that in float64."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = reference_model(config_of(family)).to(dtype)
        reference_loss(model, *random_rows(1, LENGTH, 256)).backward()
        gradients.append({name: gradient.double() for name, gradient in gradients_of(model).items()})
    return gradient_errors(*gradients)


def _write_row(path: Path, family: str, drawn: Drawn) -> None:
    """What the process of a family does."""
    os.setsid()  # so that its ranks end with it
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    path.write_text(json.dumps(asdict(try_family(family, drawn))))


def try_in_a_process(family: str, drawn: Drawn, folder: Path) -> Row:
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


def survey(families: list[str], drawn: Drawn, results: Path) -> list[Row]:
    """A row for each family; those in the file `results` are taken from there, the others are added to it."""
    rows = {row["family"]: Row(**row) for row in json.loads(results.read_text())} if results.exists() else {}
    for family in tqdm([family for family in families if family not in rows]):
        rows[family] = try_in_a_process(family, drawn, results.parent)
        results.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1))
        tqdm.write(f"{family}: {rows[family].result} {rows[family].says[:150]}")
    return [rows[family] for family in families]


PAGE = """# Which models this program trains

transformers {transformers} has {families} families of causal language models, and this program trains {right} of them
as the models that they are: its loss and every gradient are those of the Hugging Face model. It refuses each of the
others with a sentence that says why, before anything is compiled. Written by

    PYTHONPATH=. python tests/survey.py --output docs/models.md

**How a family is proved.** A tiny model of the family, with random weights under which every operator matters, is
traced, and plans for it are drawn at random among all that are legal: how the ranks share each operator, how values lie
between layers, which weights each rank has its own part of, and what each layer recomputes. The generated code runs on
4 ranks in float32, in plans for all 4 and in two copies of plans for 2. Its loss must equal that of the Hugging Face
model with its own eager attention to 1e-6 relative, and each parameter's gradient to 1e-4 of its norm. Where rounding
alone moves the Hugging Face model's gradients by nearly as much (float32 against float64), 5 times its rounding is
allowed. The table has the worst errors over all plans.

Families that are encoders by default, as BERT, are proved with `is_decoder` set.

| family | class | what it is found to be |
| --- | --- | --- |
{rows}
"""


def write_page(rows: list[Row], path: Path) -> None:
    """Writes the table of families, with how they are proved."""
    n_right = sum(row.result == "right" for row in rows)
    lines = (f"| {row.family} | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.family]} | {describe(row)} |" for row in rows)
    facts = {"transformers": transformers.__version__, "families": len(rows), "right": n_right}
    path.write_text(PAGE.format(**facts, rows="\n".join(lines)))


def describe(row: Row) -> str:
    """A row's last cell."""
    if row.result == "right":
        return f"right: loss to {row.loss_error:.0e}, gradients to {row.gradient_error:.0e}, over {row.n_plans} plans"
    return f"{row.result}: {row.says.replace('|', '/')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=ALL_FAMILIES)
    parser.add_argument("--quick", action="store_true", help="plans for 1 rank only")
    parser.add_argument("--results", type=Path, default=Path("survey.json"))
    parser.add_argument("--output", type=Path, help="the page to write")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = survey(args.families, DRAWN_QUICKLY if args.quick else DRAWN, args.results)
    if args.output:
        write_page(rows, args.output)
    print({result: sum(row.result == result for row in rows) for result in ("right", "refused", "wrong", "failed")})


if __name__ == "__main__":
    main()
