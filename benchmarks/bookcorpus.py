"""Speed and peak memory of bookcorpus.py against tokenizing one document at a time, on the plays of Shakespeare.

    python benchmarks/bookcorpus.py

The plays are measured as 38 documents, a file each, and as 150,000 documents, a line each, which is what the rows of
BookCorpus are like. Each measurement is a process of its own, timed without its start, and the best of three counts,
since other work on the machine can only slow one down.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
SEQUENCE_LENGTH = 4096
REPEATS = 3


def main() -> None:
    if sys.argv[1:2] == ["--one_at_a_time"]:
        one_at_a_time(*sys.argv[2:])
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, plays, lines = (f"{folder}/{name}" for name in ("tokenizer", "plays", "lines.jsonl"))
        assets = str(ROOT / "examples" / "shakespeare" / "demo_assets.py")
        measure([assets, "--tokenizer_path", tokenizer, "--text_path", plays])
        files = sorted(Path(plays).iterdir())
        texts = [line for file in files for line in file.read_text("utf-8").splitlines() if line]
        Path(lines).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        print(f"{'documents':12}{'how':16}{'tokens/s':>12}{'ratio':>8}{'peak memory of a process':>28}")
        for name, data in [("38 plays", plays), ("lines", lines)]:
            compare(name, data, tokenizer, folder)


def compare(name: str, data: str, tokenizer: str, folder: str) -> None:
    slow, peak = max(measure([__file__, "--one_at_a_time", data, tokenizer]) for _ in range(REPEATS))
    print(f"{name:12}{'one at a time':16}{slow:12,.0f}{1:8.1f}{peak:>24.2f} GiB")
    for num_proc in sorted({1, 2, len(os.sched_getaffinity(0))}):
        command = [str(ROOT / "bookcorpus.py"), "--data_path_or_name", data, "--tokenizer_path_or_name", tokenizer]
        command += ["--sequence_length", str(SEQUENCE_LENGTH), "--num_proc", str(num_proc), "--save_path"]
        speed, peak = max(measure([*command, f"{folder}/{name}-{num_proc}-{i}"]) for i in range(REPEATS))
        print(f"{name:12}{f'num_proc {num_proc}':16}{speed:12,.0f}{speed / slow:8.1f}{peak:>24.2f} GiB")


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a Python script; returns the tokens/s that it prints (0 if it prints none) and its peak memory in GiB."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "it is a pipe"
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command[0]} failed")
    speeds = [word for word, unit in zip(printed.split(), printed.split()[1:], strict=False) if unit == "tokens/s"]
    return float(speeds[0].replace(",", "")) if speeds else 0.0, usage.ru_maxrss / 2**20


def one_at_a_time(data: str, tokenizer_path: str) -> None:
    """Tokenizes a document with each call and packs lists of ints, as the reference program does."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    path = Path(data)
    texts = [file.read_text("utf-8") for file in sorted(path.iterdir())] if path.is_dir() else []
    texts = texts or [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    began = time.monotonic()
    tokens = []
    for text in texts:
        tokens += tokenizer(tokenizer.bos_token + text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    rows = [tokens[i : i + SEQUENCE_LENGTH] for i in range(0, len(tokens) - SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)]
    seconds = time.monotonic() - began
    print(f"{len(rows)} rows, {len(tokens) / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    main()
