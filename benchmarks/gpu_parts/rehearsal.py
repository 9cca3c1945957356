"""One rank of eight that train Llama-3-8B, rehearsed by train.py at three lengths, beside what was predicted."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu_parts.results import Measurement, Row
from benchmarks.gpu_parts.training import small_llama
from longctx.compiled import Predicted, read_plan_file

ROOT = Path(__file__).parent.parent.parent
LLAMA_8B = ROOT / "examples" / "llama3_8b_128k"
LENGTHS, RANKS = (131_072, 32_768, 8_192), 8
SMALL_LENGTHS, SMALL_RANKS = (64,), 2
GB = 1e9


def measurements(small: bool, folder: Path) -> Iterator[Measurement]:
    model = LLAMA_8B
    if small:
        model = folder / "model"
        small_llama(64).save_pretrained(model)
    for length in SMALL_LENGTHS if small else LENGTHS:
        name = f"rehearsal at {length:,}"
        ranks = SMALL_RANKS if small else RANKS
        yield Measurement(name, partial(rehearsal_rows, name, model, length, ranks, folder / "compiled"))


def rehearsal_rows(name: str, model: Path, length: int, ranks: int, compiled: Path) -> list[Row]:
    """Seconds by part and the peak of a micro-batch, each beside the prediction; and the step that is projected."""
    folder = compiled / f"{length}-tokens"
    rehearse(model, length, ranks, folder)
    rehearsal = json.loads((folder / "rehearsal.json").read_text())
    predicted = read_plan_file(folder).predicted
    measured, projection = rehearsal["measured"], rehearsal["projection"]
    return [
        whole_row(name, measured, predicted, rehearsal),
        *part_rows(name, measured["micro_batch"]["parts"], predicted.parts),
        Row(f"{name}, the optimizer's step", ms=1e3 * measured["update_seconds"]),
        Row(f"{name}, projected step", ms=1e3 * projection["step_seconds"], note=say_projection(projection)),
    ]


def rehearse(model: Path, length: int, ranks: int, folder: Path) -> None:
    """Rehearses rank 0 of a plan over all `ranks`; train.py writes rehearsal.json and rehearsal.md into `folder`.

    Raises:
        RuntimeError: it failed; the message is the last line that it said.
    """
    plan = ["--plan_ngpus", str(ranks), "--runtime_ngpus", str(ranks), "--sequence_length", str(length)]
    places = ["--model_id", str(model), "--compiled_dir", str(folder.parent), "--name", folder.name]
    start = [sys.executable, str(ROOT / "train.py"), "--run_mode", "rehearse", "--engine", "torch"]
    done = subprocess.run([*start, *plan, *places], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(done.stdout.strip().splitlines()[-1])
    print((folder / "rehearsal.md").read_text(), flush=True)  # with the table of kernels, into the part's log


def whole_row(name: str, measured: dict, predicted: Predicted, rehearsal: dict) -> Row:
    """The micro-batch as a whole. `detail` is the whole of rehearsal.json, with a GPU's kernels."""
    micro_batch, computing = measured["micro_batch"], sum(predicted.parts.values())
    note = f"predicted {1e3 * computing:,.1f} ms and {predicted.peak_bytes / GB:.2f} GB"
    if measured["reserved"] is not None:
        note += f"; {measured['reserved'] / GB:.2f} GB reserved, {measured['in_use'] / GB:.2f} in use on the card"
    ms, peak_gb = 1e3 * micro_batch["seconds"], peak_bytes(measured) / GB
    return Row(f"{name}, a micro-batch", ms=ms, peak_gb=peak_gb, note=note, detail=rehearsal)


def peak_bytes(measured: dict) -> float:
    """Measured.peak of longctx/runtime/rehearsal.py, of what rehearsal.json has as measured."""
    return 4 * measured["masters"] + measured["micro_batch"]["peak"]


def part_rows(name: str, parts: dict[str, float], predicted: dict[str, float]) -> list[Row]:
    return [
        Row(
            f"{name}, {part}",
            ms=1e3 * seconds,
            note=f"predicted {1e3 * predicted[part]:,.1f} ms" if part in predicted else "",
        )
        for part, seconds in parts.items()
    ]


def say_projection(projection: dict) -> str:
    said = f"{projection['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU"
    if projection["mfu"] is not None:
        said += f", MFU {projection['mfu_causal']:.1%} counting attention as causal, {projection['mfu']:.1%} whole"
    return f"{said}; communication is predicted"
