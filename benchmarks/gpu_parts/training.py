"""Runs of train.py, as people type it: on several ranks that share what is here, and killed and resumed."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
from transformers import LlamaConfig

from benchmarks.gpu_parts.measuring import ON_GPU
from benchmarks.gpu_parts.processes import end_family
from benchmarks.gpu_parts.results import Measurement, Row

ROOT = Path(__file__).parent.parent.parent
ROWS, ROWS_PER_STEP, STEPS = 48, 4, 12
CHECKPOINT_INTERVAL, KILLED_AFTER = 4, 6
RANKS_AGREE = 2e-5  # relative difference of losses in float32, whatever the number of ranks
SECONDS_OF_A_RUN = 180


@dataclass(frozen=True)
class Training:
    """A folder with a model's configuration and rows, and where its runs put what they make."""

    folder: Path
    length: int


@dataclass(frozen=True)
class Run:
    """One run of the training. All take the same rows in every step."""

    ranks: int = 1
    precision: str = "fp32"
    deterministic: bool = False
    killed: bool = False  # after a checkpoint, to be resumed

    @property
    def compiled(self) -> str:
        """The name of what is compiled for it."""
        return f"{self.ranks}-ranks-{self.precision}" + "-deterministic" * self.deterministic

    @property
    def name(self) -> str:
        return self.compiled + "-killed" * self.killed


def training_measurements(small: bool) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as scratch:
        training = make_training(Path(scratch), *((64, 32) if small else (256, 512)))
        for ranks in (2,) if small else (2, 4):
            name = f"{ranks} ranks together, against one"
            yield Measurement(name, partial(ranks_rows, name, training, ranks))
        for deterministic in (False, True) if ON_GPU else (False,):
            name = f"killed and resumed{', --deterministic' if deterministic else ''}"
            run = Run(precision="fp32" if small else "bf16", deterministic=deterministic)
            yield Measurement(name, partial(resume_rows, name, training, run))


def make_training(folder: Path, hidden: int, length: int) -> Training:
    """A Llama of two layers, and rows in which each token is a function of the one before: something to learn."""
    small_llama(hidden).save_pretrained(folder / "model")
    rows = [[first] for first in range(ROWS)]
    for row in rows:
        while len(row) < length:
            row.append((row[-1] * 5 + 17) % 256)
    save_rows(folder / "rows", rows)
    return Training(folder, length)


def small_llama(hidden: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


def save_rows(folder: Path, rows: list[list[int]]) -> None:
    """What `datasets` writes of rows of tokens with save_to_disk, where that package is not installed."""
    folder.mkdir(parents=True)
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    data = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / data), table.schema) as stream:
        stream.write_table(table)
    formats = {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    state = {"_data_files": [{"filename": data}], "_fingerprint": "0" * 16, "_split": None, **formats}
    (folder / "state.json").write_text(json.dumps(state))
    feature = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"input_ids": feature}}))


# --- runs ------------------------------------------------------------------------------------------------------------


def command(training: Training, run: Run) -> list[str]:
    """A run over the first ranks there are, whose plan is over all of them. One rank needs no torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.ranks}"]
    folder = training.folder
    plan = ["--plan_ngpus", str(run.ranks), "--runtime_ngpus", str(run.ranks), "--precision", run.precision]
    inputs = ["--engine", "torch", "--model_id", str(folder / "model"), "--dataset_path", str(folder / "rows")]
    outputs = ["--compiled_dir", str(folder / "compiled"), "--name", run.compiled]
    outputs += ["--log_dir", str(folder / run.name / "runs"), "--checkpoint_dir", str(folder / run.name / "saved")]
    outputs += ["--checkpoint_interval", str(CHECKPOINT_INTERVAL)]
    steps = ["--grad_accumulation_steps", str(ROWS_PER_STEP), "--max_train_steps", str(STEPS), "--random_init"]
    more = ["--learning_rate", "1e-3", *(["--deterministic"] if run.deterministic else [])]
    start = [sys.executable, *(torchrun if run.ranks > 1 else []), str(ROOT / "train.py")]
    return [*start, *plan, *inputs, *outputs, *steps, *more]


def start(training: Training, run: Run) -> subprocess.Popen:
    """A process that runs, or goes on, to the last step. What it says goes to a file."""
    with (training.folder / f"{run.name}.log").open("w") as log:
        return subprocess.Popen(command(training, run), stdout=log, stderr=subprocess.STDOUT)


def finish(training: Training, run: Run, process: subprocess.Popen) -> dict[int, dict]:
    """Waits for a run's end; the metrics of every step.

    Raises:
        RuntimeError: the run failed; the message is the last line that names an error.
    """
    try:
        process.wait(timeout=SECONDS_OF_A_RUN)
    finally:
        if process.poll() is None:
            end_family(process)
    said = (training.folder / f"{run.name}.log").read_text().strip()
    print(said, flush=True)
    if process.returncode:
        lines = said.splitlines() or ["it said nothing"]
        raise RuntimeError(next((line for line in reversed(lines) if "rror: " in line), lines[-1]))
    return steps_of(training, run)


def steps_of(training: Training, run: Run) -> dict[int, dict]:
    """The metrics of every step that a run has taken so far."""
    file = training.folder / run.name / "runs" / run.compiled / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return {step["step"]: step for step in map(json.loads, lines)}


def difference(found: dict[int, dict], expected: dict[int, dict], key: str) -> float:
    """The largest relative difference of a metric in any step.

    Raises:
        RuntimeError: the runs did not take the same steps.
    """
    if found.keys() != expected.keys():
        raise RuntimeError(f"one run took steps {sorted(found)} and the other {sorted(expected)}")
    return max(abs(found[number][key] / step[key] - 1) for number, step in expected.items())


# --- what is compared ------------------------------------------------------------------------------------------------


def ranks_rows(name: str, training: Training, ranks: int) -> list[Row]:
    """Ranks that compute every row together train as one rank does."""
    together = start(training, Run(ranks))
    expected = whole(training, Run())
    apart = difference(finish(training, Run(ranks), together), expected, "loss")
    note = f"largest relative difference of the loss in {STEPS} steps: {apart:.1e}"
    return [Row(name, note=note, state="measured" if apart <= RANKS_AGREE else "failed")]


def resume_rows(name: str, training: Training, run: Run) -> list[Row]:
    """A run that is killed after a checkpoint and started again takes the steps of one that was left alone.

    On a GPU the backward of fast attention adds in whatever order its blocks finish; --deterministic promises the same
    bits there, and a CPU does without it.
    """
    killed = replace(run, killed=True)
    killed_after = kill(training, killed)
    resumed = start(training, killed)
    expected = whole(training, run)
    found = finish(training, killed, resumed)
    apart = max(difference(found, expected, key) for key in ("loss", "grad_norm"))
    note = f"killed after step {killed_after} of {STEPS}; after resuming, losses and gradient norms "
    note += f"differ by {apart:.1e} at most" if apart else "have the same bits"
    promised = run.deterministic or not ON_GPU
    return [Row(name, note=note, state="failed" if promised and apart else "measured")]


def whole(training: Training, run: Run) -> dict[int, dict]:
    """The metrics of every step of a run that nothing interrupts; it is made once."""
    return steps_of(training, run) or finish(training, run, start(training, run))


def kill(training: Training, run: Run) -> int:
    """Starts a run and kills it once it has gone on from its first checkpoint; the last step that it logged.

    Raises:
        RuntimeError: it ended before it could be killed.
    """
    process = start(training, run)
    deadline = time.monotonic() + SECONDS_OF_A_RUN
    while len(steps_of(training, run)) < KILLED_AFTER and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    end_family(process)
    last = max(steps_of(training, run), default=0)
    if not CHECKPOINT_INTERVAL <= last < STEPS:
        raise RuntimeError(f"the run had taken {last} of {STEPS} steps when it was killed, which proves nothing")
    return last
