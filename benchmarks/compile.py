"""How long compiling takes as layers, length and ranks double: the whole process, from the command line to the files.

    python benchmarks/compile.py

Llama-3-8B's shape, one dimension changed at a time. Prints a Markdown table.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CASES = [(32, 131072, 8), (16, 131072, 8), (64, 131072, 8), (32, 2048, 8), (32, 65536, 8), (32, 262144, 8)]
CASES += [(32, 131072, 2), (32, 131072, 4)]


def compile_once(folder: Path, layers: int, length: int, ranks: int) -> tuple[float, float, float, int]:
    """Seconds of the whole process, of tracing, and of planning and writing; lines of gencode.py."""
    config = json.loads((ROOT / "examples" / "llama3_8b_128k" / "config.json").read_text())
    model = folder / f"{layers}-{length}-{ranks}"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    command = [sys.executable, str(ROOT / "train.py"), "--run_mode", "compile", "--model_id", str(model)]
    command += ["--sequence_length", str(length), "--plan_ngpus", str(ranks), "--runtime_ngpus", str(ranks)]
    # Twice the layers need twice the memory: no limit, so that all can be compared.
    command += ["--compiled_dir", str(folder / "compiled"), "--gpu_mem_constraint", "1000", "--name", model.name]
    command += ["--hardware", "h100"]
    started = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    whole = time.perf_counter() - started
    (seconds,) = re.findall(r"traced in ([\d.]+) s, .* in ([\d.]+) s", output)
    traced, planned = map(float, seconds)
    return whole, traced, planned, len((folder / "compiled" / model.name / "gencode.py").read_text().splitlines())


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    print("| layers | tokens | plan_ngpus | whole process, s | tracing, s | planning and writing, s | lines |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        for layers, length, ranks in CASES:
            whole, traced, planned, lines = compile_once(Path(name), layers, length, ranks)
            print(
                f"| {layers} | {length:,} | {ranks} | {whole:.1f} | {traced:.1f} | {planned:.1f} | {lines} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
