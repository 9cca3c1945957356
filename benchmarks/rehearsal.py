"""Rehearsals beside real runs on a CPU: computing and peak memory of each rank, alone and among others.

    python benchmarks/rehearsal.py [--output FILE.md]      # some seven minutes on two cores

Of two small models and two plans over two ranks, every rank is rehearsed, and then both run together, joined by gloo;
the same code measures them. What is compared is computing alone:

- Time is that of the computing thread, so that waiting for the other rank does not count, and the copies that stand in
  for the network in a rehearsal are left out. Gloo's copies are made by threads of its own.
- Real ranks wait for each collective at once. Where computing goes on meanwhile, gloo's threads take turns with it on
  the same cores and empty its caches, which a network's hardware would not.
- The two rehearsals run side by side, though they know nothing of each other: two cores that are both busy are slower
  than one that is, and real ranks keep both busy.
- Rehearsals and real runs take turns, and the median of each counts, since from one process to the next the same code
  takes up to a tenth more or less.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import LlamaConfig, Qwen3Config

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from benchmarks.gpu_parts.rehearsal import peak_bytes
from longctx import compiled, torchrun
from longctx.engines import builtin
from longctx.engines.builtin.run import build_on_rank
from longctx.huggingface.configuration import load_config
from longctx.options import parse_job
from longctx.runtime.rehearsal import measure_step, random_row, random_values
from longctx.runtime.stand_in import StandInGroup

RANKS = 2
ROUNDS = 3  # of every rehearsal and real run, in turns
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
    "vocab_size": 8000,
    "head_dim": 32,
}
MODELS = {
    "Llama": LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **SIZES),
    "Qwen3, tied": Qwen3Config(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True, **SIZES),
}
# Of a plan over two ranks the layers are partitioned; of a plan over one each rank has rows of its own.
PLANS = {"plan over 2": ["--plan_ngpus", "2"], "plan over 1, recomputing": ["--plan_ngpus", "1"]}
RECOMPUTED = {"Llama": "LlamaDecoderLayer", "Qwen3, tied": "Qwen3DecoderLayer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="a Markdown file to write the table to as well")
    parser.add_argument("--as_rank", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.as_rank:
        measure_as_rank(Path(args.as_rank), rest)
        return
    with tempfile.TemporaryDirectory() as folder:
        table = compare(Path(folder))
    print(table)
    if args.output:
        args.output.write_text(table + "\n")


def compare(folder: Path) -> str:
    """A Markdown table of every model, plan and rank: what the rehearsal gave, and its ratio to the real run."""
    lines = [
        f"PyTorch {torch.__version__}, {os.cpu_count()} cores, 2,048 tokens, float32; rehearsed / real\n",
        "| model | plan | rank | s a micro-batch | ratio | peak MB | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, plan in tqdm([(model, plan) for model in MODELS for plan in PLANS], unit="plan"):
        argv = arguments(folder, model, plan)
        rounds = [(rehearse(argv), run_together(folder, argv)) for _ in range(ROUNDS)]
        for rank in range(RANKS):
            rehearsed, real = ([run[rank] for run in runs] for runs in zip(*rounds, strict=True))
            seconds, peak = median_seconds(rehearsed), max(map(peak_bytes, rehearsed))
            ratios = seconds / median_seconds(real), peak / max(map(peak_bytes, real))
            lines.append(
                f"| {model} | {plan} | {rank} | {seconds:.3f} | {ratios[0]:.3f} | {peak / 1e6:.1f} | {ratios[1]:.3f} |"
            )
    return "\n".join(lines)


def arguments(folder: Path, model: str, plan: str) -> list[str]:
    config = folder / model.split(",")[0]
    MODELS[model].save_pretrained(config)
    name = f"{config.name}-{plan.replace(' ', '-')}"
    recompute = ["--recompute_modules", RECOMPUTED[model]] if "recomputing" in plan else []
    argv = ["--run_mode", "rehearse", "--model_id", str(config), "--sequence_length", "2048", "--precision", "fp32"]
    argv += ["--hardware", "cpu", "--runtime_ngpus", str(RANKS), "--compiled_dir", str(folder), "--name", name]
    return [*argv, *PLANS[plan], *recompute]


def rehearse(argv: list[str]) -> list[dict]:
    """What rehearsal.json has as measured of each rank."""
    script = Path(__file__).parent.parent / "train.py"
    places = [f"{argv[argv.index('--name') + 1]}-rank{rank}" for rank in range(RANKS)]
    ranks = [["--name", place, "--rehearse_rank", str(rank)] for rank, place in enumerate(places)]
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(run, [[sys.executable, str(script), *argv, *options] for options in ranks]))
    folder = Path(argv[argv.index("--compiled_dir") + 1])
    return [json.loads((folder / place / compiled.REHEARSAL).read_text())["measured"] for place in places]


def run_together(folder: Path, argv: list[str]) -> list[dict]:
    """The same of real ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    run([*torchrun, __file__, "--as_rank", str(folder), *argv])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def run(command: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def measure_as_rank(folder: Path, argv: list[str]) -> None:
    """One of the real ranks: builds the compiled program and measures it as a rehearsal does."""
    train.register_loss()
    argv[argv.index("--run_mode") + 1] = "compile"
    job = parse_job(argv)
    compiled_folder = builtin.ensure_compiled(job)
    dist.Backend.register_backend("waited", WaitedGroup, devices=["cpu"])
    dist.init_process_group("waited")
    plan = compiled.read_plan_file(compiled_folder)
    model = build_on_rank(job, compiled_folder, plan.module, torch.device("cpu"))
    random_values(model, job.seed)
    measured = measure_step(model, job, random_row(load_config(job.model_id).vocab_size, job))
    dist.destroy_process_group()
    (folder / f"rank{torchrun.rank()}.json").write_text(json.dumps(dataclasses.asdict(measured)))


class WaitedGroup(StandInGroup):
    """Real ranks, joined by gloo, whose collectives have ended when they return."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, opts: Any = None) -> dist.Work:
        return self._ended(self._gloo._allgather_base(output, own))

    def reduce_scatter_single(self, own: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> dist.Work:
        return self._ended(self._gloo._reduce_scatter_base(own, whole, opts))

    def all_to_all_single(
        self, output: torch.Tensor, parts: torch.Tensor, output_sizes: Any, input_sizes: Any, opts: Any = None
    ) -> dist.Work:
        return self._ended(self._gloo.alltoall_base(output, parts, output_sizes, input_sizes))

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return self._ended(self._gloo.allreduce(tensors, opts))

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return self._ended(self._gloo.broadcast(tensors, opts))

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> dist.Work:
        return self._ended(self._gloo.allgather(outputs, inputs))

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._ended(self._gloo.barrier())

    # The names of PyTorch 2.11.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def _ended(self, work: dist.Work) -> dist.Work:
        work.wait()
        return work


def median_seconds(measured: list[dict]) -> float:
    """Seconds a micro-batch, of what rehearsal.json has as measured in every round."""
    return statistics.median(one["micro_batch"]["seconds"] for one in measured)


if __name__ == "__main__":
    main()
