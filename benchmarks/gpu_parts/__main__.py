"""Runs one part: python -m benchmarks.gpu_parts PART FOLDER [--small]. It writes a JSON line a row as it goes."""

import argparse
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from benchmarks.gpu_parts import ROWS
from benchmarks.gpu_parts.results import LeftOut, Measurement, Row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", help="a module of this package, such as kernels")
    parser.add_argument("folder", type=Path, help="where rows.jsonl and whatever else the part writes go")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = parser.parse_args()
    # As train.py trains: without this, memory that is free but in pieces can't be used (read when CUDA starts).
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    part = importlib.import_module(f"benchmarks.gpu_parts.{options.part}")
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / ROWS).open("w") as rows:
        make(part.measurements(options.small, options.folder), rows)


def make(measurements: Iterable[Measurement], rows: TextIO) -> None:
    """Makes the measurements in turn; each one's rows are on disk before the next begins."""
    gc.freeze()  # what was imported stays, and collecting after each measurement need not go through it
    for what, measure in measurements:
        print(f"{what} ...", flush=True)
        try:
            made = measure()
        except LeftOut as reason:
            made = [Row(what, note=str(reason), state="left out")]
        except Exception as error:  # whatever a kernel or a library that is measured raises
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            made = [Row(what, note=f"{type(error).__name__}: {lines[0][:200]}", state="failed")]
        rows.writelines(json.dumps(asdict(row)) + "\n" for row in made)
        rows.flush()
        release()


def release() -> None:
    """Gives the GPU's unused memory back: what comes next finds it in one piece, and other processes find it at all."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
