"""Everything that only a GPU can say, by one command: ceilings, kernels, truth, the loss, and rehearsals of one rank.

    python benchmarks/gpu.py                          # 8 minutes on one GPU; the table is in runs/gpu/gpu.md
    python benchmarks/gpu.py --parts 2,5 --minutes 4
    python benchmarks/gpu.py --device cpu --small     # the same code at sizes for a CPU, in a good minute

Each part is a process of its own with a time limit, so that one that fails or hangs costs the others nothing. After
every part gpu.json and gpu.md are written anew, since a machine may be taken away. The exit status is 1 if a part or a
measurement in it failed. docs/gpu.md says how to read the table.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_parts import PARTS, ROWS, Part
from benchmarks.gpu_parts.processes import end_family
from longctx.atomic import whole_file, why_not_writable
from longctx.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("", "ms", "TFLOP/s", "TB/s", "peak GB", "")
LAST_LINES = 5  # of what a part said, kept where it failed


@dataclass(frozen=True)
class Result:
    """What a part came to."""

    part: int  # its number, from 1
    title: str
    state: str  # 'done', 'failed' or 'out of time'
    seconds: float
    limit_s: float
    rows: list[dict[str, Any]]  # measuring.Row's fields
    message: str = ""  # the last lines that a part which failed said

    @property
    def is_right(self) -> bool:
        return self.state == "done" and all(row["state"] != "failed" for row in self.rows)


def main() -> None:
    options = parse_arguments()
    check(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `timeout` ends it; the part that runs ends with it
    about = describe(options)
    results: list[Result] = []
    for result in run_parts(options):
        results.append(result)
        write(options.output, about, results)
        print(f"{result.part}. {result.title}: {result.state} after {result.seconds:.0f} s", flush=True)
    print(f"\n{table(results)}\ngpu: wrote {options.output}/gpu.json and gpu.md")
    if not all(result.is_right for result in results):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="a folder (default: runs/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --small")
    parser.add_argument(
        "--small", action="store_true", help="sizes at which a CPU takes a good minute; figures mean nothing"
    )
    everything = ",".join(str(number) for number in numbers())
    titles = ", ".join(f"{number} {part.title.lower()}" for number, part in enumerate(PARTS, 1))
    parser.add_argument("--parts", default=everything, help=f"numbers of the parts to run: {titles} (default: all)")
    return parser.parse_args()


def numbers() -> range:
    return range(1, len(PARTS) + 1)


def check(options: argparse.Namespace) -> None:
    """Raises a UserError that names the option for what can't be done as asked."""
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes:g}: it has to be above 0")
    if options.device == "cpu" and not options.small:
        raise UserError("--device cpu: a CPU would take hours for these sizes; add --small, or run it on a GPU")
    if options.device == "cuda" and not has_gpu():
        raise UserError("--device cuda: PyTorch finds no GPU here; give --device cpu --small to try the command out")
    for name in options.parts.split(","):
        if name not in map(str, numbers()):
            raise UserError(f"--parts {options.parts}: there is no part {name!r}; give numbers from 1 to {len(PARTS)}")
    if problem := why_not_writable(options.output):
        raise UserError(f"--output {options.output}: {problem}; choose another folder")


def has_gpu() -> bool:
    """Whether PyTorch finds a GPU. A process of its own asks, so that this one holds no memory of the GPU's."""
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(asked, capture_output=True).returncode == 0


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What gpu.json says of the run as a whole."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = (
        subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() if (ROOT / ".git").exists() else ""
    )
    return {
        "command": ["python", "benchmarks/gpu.py", *sys.argv[1:]],
        "commit": commit or "unknown",
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "small": options.small,
    }


# --- the parts -------------------------------------------------------------------------------------------------------


def run_parts(options: argparse.Namespace) -> Iterator[Result]:
    """Runs the chosen parts in their order; what one leaves of its time, the others share."""
    chosen = [(number, part) for number, part in enumerate(PARTS, 1) if str(number) in options.parts.split(",")]
    end = time.monotonic() + 60 * options.minutes
    for index, (number, part) in enumerate(chosen):
        limit_s = time_limit(end - time.monotonic(), [later.weight for _, later in chosen[index:]])
        yield run_part(number, part, limit_s, options)


def time_limit(left_s: float, weights: Sequence[float]) -> float:
    """Seconds for the next part, of `left_s` for it and those after it: in proportion to the first of the weights."""
    return max(left_s, 0.0) * weights[0] / sum(weights)


def run_part(number: int, part: Part, limit_s: float, options: argparse.Namespace) -> Result:
    """Runs a part in a process of its own, for `limit_s` seconds at most; what it says goes to log.txt."""
    folder = options.output / part.module
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ROWS).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part.module, str(folder.resolve())]
    started = time.monotonic()
    # Whatever the part and those that it starts leave behind when they are killed is in the scratch folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, (folder / "log.txt").open("w") as log:
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
        process = subprocess.Popen(
            command + ["--small"] * options.small,
            cwd=ROOT,
            env={**os.environ, **hidden, "TMPDIR": scratch},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            state = "failed" if process.wait(timeout=limit_s) else "done"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            end_family(process)
    said = (folder / "log.txt").read_text().splitlines()
    message = "\n".join(said[-LAST_LINES:]) if state == "failed" else ""
    return Result(number, part.title, state, time.monotonic() - started, limit_s, read_rows(folder / ROWS), message)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that a part has written, without a last line that a kill cut short."""
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


# --- what is written -------------------------------------------------------------------------------------------------


def write(folder: Path, about: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes gpu.json, which has everything, and gpu.md, the table."""
    with whole_file(folder / "gpu.json") as aside:
        aside.write_text(json.dumps({**about, "parts": [asdict(result) for result in results]}, indent=1) + "\n")
    with whole_file(folder / "gpu.md") as aside:
        heading = f"# {' '.join(about['command'])}, commit {about['commit']}, {about['started']}"
        aside.write_text(f"{heading}\n\n{table(results)}\n")


def table(results: Sequence[Result]) -> str:
    """One Markdown table: a line in bold for each part, with its state, and a line for each of its rows."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for result in results:
        state = f"{result.state} after {result.seconds:.0f} s"
        if result.state == "out of time":
            state += ", all that it was given; what follows was measured before"
        message = f": {result.message}" if result.message else ""
        lines.append(_line(f"**{result.part}. {result.title}**", "", "", "", "", f"**{state}**{message}"))
        lines += [row_line(row) for row in result.rows]
    return "\n".join(lines)


def row_line(row: dict[str, Any]) -> str:
    state = "" if row["state"] == "measured" else f"**{row['state']}**: "
    figures = (
        _figure(row[name], digits) for name, digits in (("ms", 3), ("tflops", 0), ("tb_per_s", 2), ("peak_gb", 2))
    )
    return _line(row["what"], *figures, state + row["note"])


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    run_script(main)
