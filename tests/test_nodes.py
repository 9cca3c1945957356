"""Several nodes: what they have to share is checked first, and a node that is lost comes back without a human."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from families import reference_model, small_config
from ranks import run_ranks
from saved_rows import save_rows
from scripts import run_script

import train
from longctx.engines.builtin import compile as pipeline
from longctx.errors import CheckpointFolderError
from longctx.runtime import parallel
from longctx.runtime.rendezvous import fresh_store
from longctx.runtime.shared_folder import check_shared

ROOT = Path(__file__).parent.parent
N_ROWS = 48


def check_shared_on_rank(shared: Path, own: list[Path]) -> None:
    """Each rank is a node, whose disk has its own one of the folders `own` under the name that all use."""
    os.environ["GROUP_RANK"] = os.environ["RANK"]
    with parallel.process_group():
        check_shared(shared)
        sentence = "^node 1 does not see what node 0 writes there, .*; name a folder on a disk that they share"
        with pytest.raises(CheckpointFolderError, match=sentence):
            check_shared(own[dist.get_rank()])


def test_a_folder_that_a_node_does_not_share_is_refused_and_nothing_stays_of_the_question(tmp_path):
    (tmp_path / "shared").mkdir()
    run_ranks(2, check_shared_on_rank, tmp_path / "shared", [tmp_path / "a" / "checkpoints", tmp_path / "b"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "shared"]


def compile_on_node(folder: Path) -> None:
    """Each rank is a node; it writes down that it compiles."""
    node = os.environ["RANK"]
    os.environ |= {"GROUP_RANK": node, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    compile_plan = pipeline.compile_plan

    def compile_and_tell(*args) -> None:
        (folder / f"compiled on node {node}").touch()
        compile_plan(*args)

    with patch.object(pipeline, "compile_plan", compile_and_tell):
        options = ["--model_id", str(folder / "model"), "--compiled_dir", str(folder / "compiled")]
        train.main(["--run_mode", "compile", "--sequence_length", "16", "--precision", "fp32", *options])
        fresh_store()  # the other node asks in rank 0's store until it is done


def test_nodes_that_share_the_compiled_folder_compile_once(tmp_path):
    reference_model(small_config("llama")).save_pretrained(tmp_path / "model")
    run_ranks(2, compile_on_node, tmp_path)
    assert [path.name for path in tmp_path.glob("compiled on*")] == ["compiled on node 0"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them; their addresses are 10.77.0.1 and 10.77.0.2."""
    names = [f"node{number}-{os.getpid()}" for number in range(2)]
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need ip, and the rights to make them")
    try:
        ip("netns", "add", names[1])
        ends = ["name", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1]]
        ip("link", "add", *ends)
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"veth{number}")
            ip("-n", name, "link", "set", f"veth{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def start_job(folder: Path, nodes: list[str], options: list[str]) -> subprocess.Popen:
    """The Slurm script as a job of two nodes with two ranks each, in which stand-ins do what Slurm would."""
    environment = {
        **os.environ,
        "PATH": f"{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "NODES": " ".join(nodes),
        "OMP_NUM_THREADS": "1",
        "RANKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
    }
    command = ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch"), *options]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(folder: Path, step: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints" / f"0000-{step:06d}").is_dir():
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.05)


def losses_in(log_folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (log_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_node_that_is_lost_comes_back_and_a_job_whose_time_is_up_ends_with_a_checkpoint(tmp_path, nodes):
    reference_model(small_config("llama")).save_pretrained(tmp_path / "model")
    save_rows(tmp_path / "rows", torch.randint(0, 256, (N_ROWS, 16)))
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    options = ["--model_id", "model", "--dataset_path", "rows", "--precision", "fp32", "--max_epochs", "1"]
    on_four = ["--plan_ngpus", "2", "--runtime_ngpus", "4", "--grad_accumulation_steps", "1", "--name", "four"]
    job = start_job(tmp_path, nodes, [*options, *on_four, "--checkpoint_interval", "1"])
    try:
        wait_for_step(tmp_path, 3, job)
        (tmp_path / "node1.lost").touch()
        os.kill(int((tmp_path / "node1.pid").read_text()), signal.SIGKILL)
        before = len(losses_in(tmp_path / "runs" / "four"))
        wait_for_step(tmp_path, before + 3, job)
        job.send_signal(signal.SIGUSR1)
        status = job.wait(120)
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(job.pid)])
    assert status == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "requeued-7").exists()
    losses = losses_in(tmp_path / "runs" / "four")
    assert before + 3 <= len(losses) < N_ROWS // 2
    assert (tmp_path / "checkpoints" / "last").resolve().name == f"0000-{len(losses):06d}"

    alone = ["--grad_accumulation_steps", "2", "--name", "alone", "--checkpoint_dir", "other"]
    run_script("train.py", *options, *alone, "--max_train_steps", str(len(losses)), cwd=tmp_path).check_returncode()
    assert losses == pytest.approx(losses_in(tmp_path / "runs" / "alone"), rel=1e-6)
