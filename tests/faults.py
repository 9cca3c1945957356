"""train.py, with a fault: python tests/faults.py FAULT OPTIONS..., where FAULT is a Fault as JSON."""

import errno
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from longctx import torchrun  # noqa: E402
from longctx.errors import run_script  # noqa: E402
from longctx.runtime import trainer, watch  # noqa: E402
from longctx.runtime.writing import CheckpointWriter  # noqa: E402


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        nan_rows: rows of the dataset on which the loss is NaN.
        step, rank, signal: at the beginning of this step this rank sends itself this signal, by its name, or waits for
            ever if it is ''; only in the first attempt of torchrun's.
        full_disk_step: the checkpoint of this step finds the disk full, on this rank.
        stacks_s: watch.STACKS_S
    """

    nan_rows: tuple[int, ...] = ()
    step: int = -1
    rank: int = 0
    signal: str = ""
    full_disk_step: int = -1
    stacks_s: float = watch.STACKS_S


def inject(fault: Fault) -> None:
    write_data = CheckpointWriter.write_data
    take_step, compute_gradients = trainer.take_step, trainer.compute_gradients

    def take_step_or_fail(model, optimizer, rows, chosen, position, *others):
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if is_first and (position.step + 1, torchrun.rank()) == (fault.step, fault.rank):
            fail(fault.signal)
        return take_step(model, optimizer, rows, chosen, position, *others)

    def compute_gradients_or_nan(model, rows, chosen):
        loss, *others = compute_gradients(model, rows, chosen)
        return (float("nan") if set(chosen) & set(fault.nan_rows) else loss, *others)

    def write_data_or_fail(writer, *others):
        if (int(writer.name.split("-")[1]), torchrun.rank()) == (fault.full_disk_step, fault.rank):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_data(writer, *others)

    watch.STACKS_S = fault.stacks_s
    CheckpointWriter.write_data = write_data_or_fail
    trainer.take_step, trainer.compute_gradients = take_step_or_fail, compute_gradients_or_nan


def fail(name: str) -> None:
    if name:
        os.kill(os.getpid(), signal.Signals[name])
    else:
        threading.Event().wait()


if __name__ == "__main__":
    facts = json.loads(sys.argv.pop(1))
    inject(Fault(**{**facts, "nan_rows": tuple(facts.get("nan_rows", ()))}))
    watch.start()
    run_script(train.main)
