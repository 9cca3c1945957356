"""Runs the same small job on every engine that can be had, and compares compiling, a step's time and peak memory.

    python benchmarks/engines.py --nnscaler_python ENVIRONMENT/bin/python
    python benchmarks/engines.py --hidden_size 4096 --sequence_length 8192 --ranks 8    # on GPUs

The engines need different PyTorchs, so each has a Python of its own: this one runs the built-in engine, and nnScaler
too unless another is named. Where there is no GPU, nnScaler runs by the stand-ins of tests/nnscaler_on_cpu.py, and with
its policy 'tp', since 'autodist' profiles every operator. Writes a table to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    engine: str
    policy: str
    compile_s: float  # the whole process
    first_step_s: float
    step_s: float  # median of the others
    spread: tuple[float, float]
    peak_gb: float  # rank 0's: allocated on a GPU, resident on a CPU
    last_loss: float


def run(command: list[str], folder: Path) -> float:
    """Runs a command, with one thread a process; returns its seconds."""
    started = time.perf_counter()
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return time.perf_counter() - started


def answer(python: str, expression: str) -> str:
    """What a Python prints of an expression after `import torch`."""
    command = [python, "-c", f"import torch, importlib.util; print({expression})"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_job(folder: Path, options: argparse.Namespace) -> None:
    """A small Llama-3 and enough rows of random tokens for all steps."""
    sizes = ["--hidden_size", options.hidden_size, "--intermediate_size", 4 * options.hidden_size]
    sizes += ["--num_hidden_layers", options.num_hidden_layers]
    sizes += ["--num_attention_heads", options.num_attention_heads]
    sizes += ["--num_key_value_heads", options.num_attention_heads // 2]
    model = [
        sys.executable,
        str(ROOT / "create_mini_model.py"),
        "--model_id",
        str(ROOT / "examples" / "llama3_8b_128k"),
    ]
    run([*model, "--output_id", "model", *map(str, sizes)], folder)
    n_rows = options.steps * options.ranks * 4
    rows = f"torch.randint(0, 128000, ({n_rows}, {options.sequence_length})).int().numpy()"
    save = f"import torch, datasets; datasets.Dataset.from_dict({{'input_ids': {rows}}}).save_to_disk('rows')"
    run([sys.executable, "-c", save], folder)


def measure(engine: str, python: str, folder: Path, options: argparse.Namespace) -> Result:
    on_gpu = answer(python, "torch.cuda.is_available()") == "True"
    policy = (options.pas_policy or ("autodist" if on_gpu else "tp")) if engine == "nnscaler" else "exact program"
    script = [str(ROOT / "train.py"), "--engine", engine]
    if engine == "nnscaler":
        script = [*([] if on_gpu else [str(ROOT / "tests" / "nnscaler_on_cpu.py")]), *script, "--pas_policy", policy]
    elif not on_gpu:
        script += ["--hardware", "cpu"]
    precision = "bf16" if on_gpu else "fp32"
    script += ["--model_id", "model", "--dataset_path", "rows", "--name", "job", "--precision", precision]
    for option in ("compiled_dir", "checkpoint_dir", "log_dir"):
        script += [f"--{option}", f"{engine}/{option}"]
    script += ["--plan_ngpus", str(options.ranks), "--runtime_ngpus", str(options.ranks)]
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    print(f"{engine}: compiling", flush=True)
    compile_s = run([python, *script, "--run_mode", "compile"], folder)
    print(f"{engine}: compiled in {compile_s:.1f} s; training", flush=True)
    run([python, *start, *script, "--max_train_steps", str(options.steps)], folder)
    lines = (folder / engine / "log_dir" / "job" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    seconds = [step["seconds"] for step in steps]
    later = seconds[1:]
    peak = max(step["peak_memory_gb"] for step in steps)
    spread = (min(later), max(later))
    return Result(engine, policy, compile_s, seconds[0], statistics.median(later), spread, peak, steps[-1]["loss"])


def table(results: list[Result]) -> str:
    """Markdown; ratios are to the first row."""
    lines = [
        "| engine | plan | compile, s | first step, s | step, s | spread | ratio | peak GB | ratio | last loss |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    first = results[0]
    for r in results:
        cells = [r.engine, r.policy, f"{r.compile_s:.1f}", f"{r.first_step_s:.2f}", f"{r.step_s:.2f}"]
        cells += [f"{r.spread[0]:.2f}-{r.spread[1]:.2f}", f"{r.step_s / first.step_s:.2f}"]
        cells += [f"{r.peak_gb:.2f}", f"{r.peak_gb / first.peak_gb:.2f}", f"{r.last_loss:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine_name(python: str) -> str:
    if answer(python, "torch.cuda.is_available()") == "True":
        return answer(python, "torch.cuda.get_device_name()")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{cpu.group(1) if cpu else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch_python", default=sys.executable, help="the Python that the built-in engine runs on")
    parser.add_argument("--nnscaler_python", default=sys.executable, help="the Python that has nnscaler")
    parser.add_argument("--pas_policy", help="nnScaler's (default: autodist on GPUs, tp without)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    options = parser.parse_args()
    pythons = {"torch": options.torch_python}
    if answer(options.nnscaler_python, "importlib.util.find_spec('nnscaler') is not None") == "True":
        pythons["nnscaler"] = options.nnscaler_python
    else:
        print("nnscaler is not installed there: left out (--nnscaler_python names a Python that has it)")
    with tempfile.TemporaryDirectory() as folder:
        make_job(Path(folder), options)
        results = [measure(engine, python, Path(folder), options) for engine, python in pythons.items()]
    machine = machine_name(options.torch_python)
    versions = ", ".join(f"{engine} on PyTorch {answer(p, 'torch.__version__')}" for engine, p in pythons.items())
    title = (
        f"# Engines: {options.num_hidden_layers} layers of hidden size {options.hidden_size}, vocabulary 128,256, "
        f"{options.sequence_length:,} tokens, {options.ranks} ranks, 4 accumulation steps; {machine}; {versions}\n\n"
        f"{options.steps} steps; load average {os.getloadavg()[0]:.1f} at the end.\n\n"
    )
    text = title + table(results)
    print(text)
    file = ROOT / "benchmarks" / "results" / f"engines_{re.sub('[^a-z0-9]+', '_', machine.lower())}.md"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


if __name__ == "__main__":
    main()
