"""nnScaler as an engine: the same job, on the same rows, as the built-in engine does it.

What is marked nnscaler runs the real nnScaler 0.8 in real processes, on CPUs by the stand-ins of nnscaler_on_cpu.py.
Run this file with the Python of longctx/engines/nnscaler/requirements.txt; the built-in engine, of another PyTorch,
runs beside it with the Python of `make .venv`.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import reference_model, small_config
from ranks import run_ranks
from saved_rows import save_rows
from transformers import AutoModelForCausalLM

import ckpt_merger
import train
from longctx import devices
from longctx.command_line import naming_options, parse
from longctx.data import order
from longctx.engines.checkpoints import FORMATS
from longctx.engines.nnscaler.checkpoints import as_builtin
from longctx.engines.nnscaler.engine import check_generated
from longctx.engines.nnscaler.options import check_policy, choose_engine
from longctx.errors import CheckpointError, CheckpointFolderError, CompiledError, UserError
from longctx.job import Job, Options
from longctx.options import causes, check_engine_options
from longctx.runtime import checkpoint, merge, resume

ROOT = Path(__file__).parent.parent
LENGTH, ROWS, STEPS = 64, 22, 8  # of 4 rows each: an epoch is 6 steps, the last of 2 rows
TORCH_PYTHON = ROOT / ".venv" / "bin" / "python"


def needs_nnscaler(test):
    here = importlib.util.find_spec("nnscaler") is not None
    skip = pytest.mark.skipif(
        not here, reason="nnscaler is not installed: see longctx/engines/nnscaler/requirements.txt"
    )
    return pytest.mark.nnscaler(skip(test))


# --- which engine --------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Makes this one that has nnScaler or not, a PyTorch and GPUs or none."""

    def make(installed: bool, version: str, gpu: bool) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return make


@pytest.mark.parametrize(
    ("installed", "version", "gpu", "engine", "reason"),
    [
        (True, "2.6.0+cu124", True, "nnscaler", "it is installed and works with this PyTorch"),
        (True, "2.6.0+cu124", False, "torch", "nnscaler needs a GPU and this is a run on CPUs"),
        (True, "2.13.0", True, "torch", "nnscaler works with PyTorch up to 2.6 and here is 2.13.0"),
        (False, "2.6.0", True, "torch", "nnscaler is not installed"),
    ],
)
def test_auto_takes_nnscaler_where_it_works_and_says_why(machine, installed, version, gpu, engine, reason):
    machine(installed, version, gpu)
    device = devices.choose("auto")
    assert choose_engine("auto", device) == (engine, f"since {reason}")
    assert choose_engine("torch", device) == ("torch", "as asked")


@pytest.mark.parametrize(
    ("installed", "version", "sentence"),
    [
        (False, "2.6.0", "--engine nnscaler: nnscaler is not installed; see longctx/engines/nnscaler/requirements.txt"),
        (True, "2.13.0", "--engine nnscaler: nnscaler works with PyTorch up to 2.6 and here is 2.13.0; see"),
    ],
)
def test_nnscaler_is_refused_where_it_can_not_work(machine, installed, version, sentence):
    machine(installed, version, True)
    with pytest.raises(UserError, match=sentence):
        train.main(["--model_id", "any", "--engine", "nnscaler"])


def job_of(engine: str, *words: str) -> Job:
    """The job that these options ask for, of the engine, unchecked."""
    options = parse(Options, ["--model_id", "any", *words], "")
    return Job(**{**vars(options), "engine": engine, "sequence_length": LENGTH, "runtime_ngpus": 1, "name": "any"})


@pytest.mark.parametrize(
    ("engine", "option"),
    [
        ("torch", ["--pas_policy", "tp"]),
        ("torch", ["--pipeline_pivots", "LlamaDecoderLayer"]),
        ("torch", ["--pipeline_nstages", "2"]),
        ("torch", ["--trace_strategy", "cpu"]),
        ("nnscaler", ["--hardware", "h100"]),
        ("nnscaler", ["--plan", "plan.json"]),
    ],
)
def test_an_option_that_means_nothing_to_the_engine_is_refused(engine, option):
    other = {"torch": "nnscaler", "nnscaler": "torch"}[engine]
    sentence = (
        f"{option[0]} {option[1]}: it means nothing to the {engine} engine; leave it out, or choose --engine {other}"
    )
    with pytest.raises(UserError, match=sentence):
        check_engine_options(job_of(engine, *option))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--pipeline_nstages none", "--pipeline_nstages none: it has to be 1 or more, or 'auto'"),
        ("--pipeline_nstages 0", "--pipeline_nstages 0: it has to be 1 or more, or 'auto'"),
        ("--pipeline_nstages 2", "--pipeline_nstages 2: --pipeline_pivots is missing"),
        ("--pipeline_nstages 1 --pipeline_pivots A", "--pipeline_pivots A: --pipeline_nstages 1 has no use for it"),
        ("--pas_policy tp --pipeline_nstages 2", "--pipeline_nstages 2: it means nothing to --pas_policy tp; leave"),
        ("--pas_policy tp --recompute_modules A", "--recompute_modules A: it means nothing to --pas_policy tp; leave"),
        ("--pas_policy hybrid --pipeline_pivots A", "--pipeline_pivots A: it means nothing to --pas_policy hybrid"),
        ("--pas_policy dp --plan_ngpus 2", "--plan_ngpus 2: --pas_policy dp takes 1"),
    ],
)
def test_options_that_nnscalers_policy_has_no_use_for_are_refused(words, sentence):
    with pytest.raises(UserError, match=sentence):
        check_policy(job_of("nnscaler", *words.split()))


@pytest.mark.parametrize(
    "words", ["--pas_policy hybrid --pipeline_nstages 2", "--pipeline_pivots A", "--pipeline_nstages auto"]
)
def test_options_that_nnscalers_policy_has_a_use_for_are_accepted(words):
    check_policy(job_of("nnscaler", *words.split()))


def check_that_the_scripts_are_imported_without_nnscaler() -> None:
    assert {"train", "ckpt_merger"} <= set(sys.modules)
    assert "nnscaler" not in sys.modules


def test_importing_the_scripts_does_not_import_nnscaler():
    run_ranks(1, check_that_the_scripts_are_imported_without_nnscaler)


# --- nnScaler's files, read without it -------------------------------------------------------------------------------


@pytest.fixture
def nnscaler_merged(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A merged file as nnScaler writes it of two ranks in bfloat16, and the float32 masters within."""
    model = reference_model(small_config("llama"))
    masters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: list(tensor.shape) for name, tensor in masters.items()}
    state = checkpoint.State(order.Position(4, 0, 16), 0, ROWS, 2, 2, shapes)
    moments = [
        {"step": torch.tensor(4.0), "exp_avg": m * 2, "exp_avg_sq": m * m, "fp32_params": m} for m in masters.values()
    ]
    hf = merge.hf_entry(model.config.save_pretrained)
    entries = {
        "model": {f"loss.model.{name}": tensor.bfloat16() for name, tensor in masters.items()},
        "optimizer": {"state": dict(enumerate(moments)), "param_groups": [{"lr": 1e-3}]},
        "train_status": {"finished_train_steps": 4},
        "state": 2 * [json.dumps(state.to_json())],
        "hf": [hf, None],
    }
    torch.save(entries, tmp_path / "merged.ckpt")
    return tmp_path / "merged.ckpt", masters


def test_nnscalers_merged_file_becomes_a_hugging_face_folder_of_its_float32_masters(nnscaler_merged, tmp_path):
    merged, masters = nnscaler_merged
    ckpt_merger.main(["--ckpt_dir", str(merged), "--hf_dir", str(tmp_path / "hf")])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, masters[name]), name


def test_nnscalers_merged_file_is_read_as_the_built_in_engines(nnscaler_merged):
    merged, masters = nnscaler_merged
    assert checkpoint.read(merged, FORMATS).state.position == order.Position(4, 0, 16)
    entries = as_builtin(torch.load(merged, weights_only=True))
    assert {name.rpartition("/")[2] for name in entries["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
    for name, master in masters.items():
        assert torch.equal(entries["model"][name], master)
        assert torch.equal(entries["optimizer"][f"{name}/exp_avg"], master * 2)


def test_a_checkpoint_of_the_other_engine_is_named_as_such(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "0.ckpt").write_bytes(b"")
    sentence = "--checkpoint_dir .*: its checkpoint is the nnscaler engine's; choose --engine nnscaler, or merge it"
    job = job_of("torch", "--checkpoint_dir", str(tmp_path))
    with pytest.raises(UserError, match=sentence), naming_options(job, causes(job)):
        resume.find_resume(job, ROWS, FORMATS)
    with pytest.raises(CheckpointError, match="^the checkpoint last is not whole: its file 0.ckpt is damaged"):
        resume.find(tmp_path, None, "nnscaler", FORMATS)  # it is its own


@pytest.mark.parametrize("place", ["last", "best", "last/0.ckpt", "best/1.ckpt"])
def test_files_of_the_users_are_never_replaced_by_links_to_nnscalers_checkpoints(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("years of work")
    with pytest.raises(
        CheckpointFolderError, match=f"{place} is no link to a checkpoint, as nnscaler makes it; move it"
    ):
        FORMATS["nnscaler"].check_folder(tmp_path)


def test_a_file_of_the_users_among_generated_code_is_refused_before_nnscaler_would_remove_it(tmp_path):
    for name in ("gencode0.py", "graph.ckp", "forward_args.pkl", "compute_config.pt", "fullmodel.pt.0"):
        (tmp_path / name).write_text("generated")
    check_generated(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CompiledError, match="thesis.tex is not one that nnscaler wrote, and compiling would remove it"):
        check_generated(tmp_path)


def test_a_folder_of_nnscalers_own_links_is_saved_to_again(tmp_path):
    for name in ("last", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.ckpt").symlink_to("../0000-0004/0.ckpt")
    FORMATS["nnscaler"].check_folder(tmp_path)


def test_what_is_merged_already_is_not_merged_again(nnscaler_merged, tmp_path):
    with pytest.raises(UserError, match="--ckpt_dir .*: it is merged already; leave out --output_fname"):
        ckpt_merger.main(["--ckpt_dir", str(nnscaler_merged[0]), "--output_fname", str(tmp_path / "again.ckpt")])


# --- the real nnScaler -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a model and rows that have something to learn: each token is a function of the one before."""
    folder = tmp_path_factory.mktemp("job")
    reference_model(small_config("llama")).save_pretrained(folder / "model")
    rows = [torch.randint(0, 256, (ROWS, 1), generator=torch.Generator().manual_seed(1))]
    for _ in range(LENGTH - 1):
        rows.append((rows[-1] * 5 + 17) % 256)
    save_rows(folder / "rows", torch.cat(rows, 1))
    return folder


def run(job: Path, engine: str, name: str, *more: str, plan_ngpus: int = 2, check: bool = True):
    """train.py on two ranks with an engine; its checkpoints and logs go to `name`."""
    process = start(job, engine, name, *more, plan_ngpus=plan_ngpus)
    out, err = process.communicate(timeout=900)
    assert not check or process.returncode == 0, err[-3000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(job: Path, engine: str, name: str, *more: str, plan_ngpus: int = 2, max_restarts: int = 0):
    """Starts what `run` runs."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max_restarts={max_restarts}"]
    if engine == "nnscaler":
        script = [sys.executable, *torchrun, str(ROOT / "tests" / "nnscaler_on_cpu.py"), str(ROOT / "train.py")]
    else:
        script = [str(TORCH_PYTHON), *torchrun, str(ROOT / "train.py"), "--hardware", "cpu"]
    paths = ["--model_id", "model", "--dataset_path", "rows", "--name", "job", "--compiled_dir", f"{name}/compiled"]
    paths += ["--checkpoint_dir", f"{name}/checkpoints", "--log_dir", f"{name}/runs"]
    ranks = ["--plan_ngpus", str(plan_ngpus), "--runtime_ngpus", "2", "--grad_accumulation_steps", str(2 * plan_ngpus)]
    steps = ["--max_train_steps", str(STEPS), "--max_epochs", "3", "--checkpoint_interval", "4"]
    rates = ["--learning_rate", "1e-3", "--lr_schedule", "cosine", "--warmup_steps", "2", "--weight_decay", "0.1"]
    command = [*script, "--engine", engine, *paths, *ranks, *steps, *rates, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=job, **said)


def wait_for_step(job: Path, name: str, step: int) -> None:
    file = job / name / "runs" / "job" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("\n") >= step):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_of(process: subprocess.Popen, rank: int) -> int:
    """The process of a rank that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(entry[5:]): child for entry in environment if entry.startswith(b"RANK=")}
    return ranks[rank]


def read_steps(job: Path, name: str) -> dict[int, dict]:
    lines = (job / name / "runs" / "job" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def assert_same_training(job: Path, name: str, other: str, first: int, rel: float) -> None:
    """Whether two runs' steps, from the first to the last, are the same to within rounding."""
    steps, others = read_steps(job, name), read_steps(job, other)
    assert max(steps) == max(others) == STEPS
    for step in range(first, STEPS + 1):
        for key, tolerance in (("loss", rel), ("grad_norm", 20 * rel), ("learning_rate", 0)):
            assert steps[step][key] == pytest.approx(others[step][key], rel=tolerance, abs=0), (step, key)
        assert [steps[step][key] for key in ("epoch", "tokens")] == [others[step][key] for key in ("epoch", "tokens")]


TP = ("--pas_policy", "tp", "--precision", "fp32")


@pytest.fixture(scope="module")
def trained(job) -> Path:
    """The job, once trained by each engine in float32, nnScaler with its policy 'tp'."""
    run(job, "nnscaler", "nnscaler", *TP)
    run(job, "torch", "torch", "--precision", "fp32")
    return job


@needs_nnscaler
def test_a_run_takes_the_same_steps_as_the_built_in_engines(trained):
    assert_same_training(trained, "nnscaler", "torch", 1, rel=1e-6)


@needs_nnscaler
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite", "gpt_neox"])
def test_other_families_take_the_same_steps_too(job, family):
    reference_model(small_config(family)).save_pretrained(job / family)
    for engine, options in (("nnscaler", TP), ("torch", ("--precision", "fp32"))):
        run(job, engine, f"{engine}_{family}", *options, "--model_id", family)
    assert_same_training(job, f"nnscaler_{family}", f"torch_{family}", 1, rel=1e-6)


@needs_nnscaler
def test_generated_code_calls_our_ops(trained):
    folder = (
        trained
        / "nnscaler"
        / "compiled"
        / "_parallel_modules"
        / "longctx"
        / "engines"
        / "nnscaler"
        / "model"
        / "WrappedModel"
        / "job"
    )
    for rank in range(2):
        code = (folder / f"gencode{rank}.py").read_text()
        for call in (
            "longctx.kernels.attention.attention(",
            "longctx.kernels.rms_norm.rms_norm(",
            "chunk_linear_cross_entropy.chunk_linear_cross_entropy(",
        ):
            assert call in code


@needs_nnscaler
def test_data_parallel_ranks_share_the_rows_as_the_built_in_engines_do(trained):
    run(trained, "nnscaler", "nnscaler_dp", *TP, plan_ngpus=1)
    assert_same_training(trained, "nnscaler_dp", "torch", 1, rel=1e-6)


@needs_nnscaler
def test_in_bfloat16_runs_differ_by_its_rounding(trained):
    run(trained, "nnscaler", "nnscaler_bf16", "--pas_policy", "tp", "--precision", "bf16")
    run(trained, "torch", "torch_bf16", "--precision", "bf16")
    assert_same_training(trained, "nnscaler_bf16", "torch_bf16", 1, rel=2**-9)


@needs_nnscaler
def test_autodist_plans_and_trains_to_the_same_losses(trained):
    run(trained, "nnscaler", "autodist", "--precision", "fp32", "--recompute_modules", "LlamaDecoderLayer")
    assert_same_training(trained, "autodist", "torch", 1, rel=1e-6)


@needs_nnscaler
def test_two_pipeline_stages_train_to_the_same_losses(trained):
    stages = ("--pipeline_nstages", "2", "--pipeline_pivots", "LlamaDecoderLayer")
    run(trained, "nnscaler", "pipeline", "--precision", "fp32", *stages)
    assert_same_training(trained, "pipeline", "torch", 1, rel=1e-6)


@needs_nnscaler
def test_a_run_goes_on_from_its_shards_bit_for_bit(trained):
    run(trained, "nnscaler", "resumed", *TP, "--resume_path", "nnscaler/checkpoints/0000-0004")
    assert min(read_steps(trained, "resumed")) == 5
    assert_same_training(trained, "resumed", "nnscaler", 5, rel=0)


@needs_nnscaler
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_same_command_goes_on(trained, rank):
    """After step 2 at the soonest, of which there is no checkpoint but for the signal, and before the last."""
    name = f"stopped_{rank}"
    process = start(trained, "nnscaler", name, *TP)
    wait_for_step(trained, name, 1)
    os.kill(rank_of(process, rank), signal.SIGTERM)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    by = "SIGTERM" if rank == 0 else "a signal to another rank"
    stop = re.search(f"run: stopped by {by} after step ([0-9]+); the same command goes on from there", said)
    step = int(stop[1])
    assert step == max(read_steps(trained, name)) < STEPS
    again = run(trained, "nnscaler", name, *TP)
    assert f"after step {step}\n" in again.stdout
    assert_same_training(trained, name, "nnscaler", 1, rel=0)


@needs_nnscaler
def test_a_rank_that_hangs_is_noticed_and_stacks_are_written(trained):
    """One is stopped, so that it can't even write; the other waits for it."""
    process = start(trained, "nnscaler", "hung", *TP, "--hang_timeout", "0.1")
    wait_for_step(trained, "hung", 1)
    os.kill(rank_of(process, 1), signal.SIGSTOP)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no progress for 0.1 minutes" in error
    stacks = (trained / "hung" / "runs" / "job" / "stacks-rank0.txt").read_text()
    assert "in run_trainer" in stacks


@needs_nnscaler
def test_ranks_that_are_restarted_go_on_from_the_last_checkpoint(trained):
    process = start(trained, "nnscaler", "restarted", *TP, max_restarts=1)
    wait_for_step(trained, "restarted", 5)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    assert_same_training(trained, "restarted", "nnscaler", 1, rel=0)


@pytest.fixture(scope="module")
def merged(trained) -> Path:
    """The job, with both engines' checkpoints of step 4 merged."""
    merger = [str(ROOT / "ckpt_merger.py"), "--ckpt_dir"]
    for python, folder in (
        (sys.executable, "nnscaler/checkpoints/0000-0004"),
        (TORCH_PYTHON, "torch/checkpoints/0000-000004"),
    ):
        output = f"{folder.split('/')[0]}.ckpt"
        subprocess.run([str(python), *merger, folder, "--output_fname", output], check=True, cwd=trained)
    return trained


@needs_nnscaler
@pytest.mark.parametrize("start", ["nnscaler", "torch"])
@pytest.mark.parametrize("engine", ["nnscaler", "torch"])
def test_either_engine_goes_on_from_a_merged_file_of_either(merged, start, engine):
    options = TP if engine == "nnscaler" else ("--precision", "fp32")
    run(merged, engine, f"{start}_then_{engine}", *options, "--resume_path", f"{start}.ckpt")
    assert_same_training(merged, f"{start}_then_{engine}", "torch", 5, rel=1e-6)


@needs_nnscaler
def test_a_merged_files_float32_masters_survive_a_bfloat16_resume(merged):
    options = ("--pas_policy", "tp", "--precision", "bf16", "--resume_path", "torch.ckpt", "--learning_rate", "1e-9")
    run(merged, "nnscaler", "masters", *options, "--weight_decay", "0")
    shards = [torch.load(merged / f"masters/checkpoints/last/{rank}.ckpt", weights_only=False) for rank in range(2)]
    masters = [v["fp32_params"].flatten() for shard in shards for v in shard["optimizer"]["state"].values()]
    nonzero = torch.cat([master[master != 0] for master in masters])
    assert (nonzero == nonzero.bfloat16().float()).float().mean() < 0.1


@needs_nnscaler
def test_shards_of_another_precision_are_refused(trained):
    more = ("--pas_policy", "tp", "--precision", "bf16", "--resume_path", "nnscaler/checkpoints/0000-0004")
    refusal = run(trained, "nnscaler", "other_precision", *more, check=False)
    assert "is of a run in fp32, whose shards nnscaler can't go on from in another" in refusal.stderr


@needs_nnscaler
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--recompute_modules", "Decoder"), "--recompute_modules Decoder: Decoder is no module of LlamaForCausalLM"),
        (("--pipeline_pivots", "Decoder"), "--pipeline_pivots Decoder: Decoder is no module of LlamaForCausalLM"),
    ],
)
def test_modules_that_are_not_there_are_refused(job, more, sentence):
    refusal = run(job, "nnscaler", "refused", *more, check=False)
    assert sentence in refusal.stderr and "exitcode  : 2" in refusal.stderr


@needs_nnscaler
def test_a_gpu_is_asked_for_in_a_sentence(job):
    command = [sys.executable, str(ROOT / "train.py"), "--engine", "nnscaler", "--run_mode", "compile"]
    refusal = subprocess.run(
        [*command, "--model_id", "model", "--dataset_path", "rows"], capture_output=True, text=True, cwd=job
    )
    assert refusal.returncode == 2 and "Traceback" not in refusal.stderr
    assert "--engine nnscaler: it needs a GPU, to compile too, and there is none" in refusal.stderr


@needs_nnscaler
def test_a_run_that_is_complete_says_so(trained):
    again = run(trained, "nnscaler", "nnscaler", *TP)
    assert "run: training is complete after step 8; raise --max_epochs or --max_train_steps" in again.stdout


@needs_nnscaler
def test_data_parallel_ranks_draw_dropout_of_their_own_and_the_ranks_of_a_plan_the_same(job):
    from longctx.engines.nnscaler.hook import StepHook

    ranks = {"plan_ngpus": 2, "runtime_ngpus": 8}
    hook = StepHook(Job(model_id=str(job / "model"), seed=5, sequence_length=LENGTH, name="job", **ranks), {}, ROWS)
    seeds = []
    for rank in range(1, 8):  # the first opens the logs
        status = SimpleNamespace(finished_train_steps=0)
        hook.on_train_start(SimpleNamespace(rank=rank, train_status=status, max_train_steps=STEPS))
        seeds.append(torch.initial_seed())
    assert seeds == [5, 6, 6, 7, 7, 8, 8]


@needs_nnscaler
def test_the_merged_weights_open_in_transformers(merged):
    merger = [sys.executable, str(ROOT / "ckpt_merger.py"), "--ckpt_dir", "nnscaler.ckpt", "--hf_dir", "hf"]
    subprocess.run(merger, check=True, cwd=merged)
    opened = AutoModelForCausalLM.from_pretrained(merged / "hf", dtype=torch.float32)
    of_nnscaler, of_torch = (
        as_builtin(torch.load(merged / f"{engine}.ckpt", weights_only=True))["model"]
        for engine in ("nnscaler", "torch")
    )
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, of_nnscaler[name])
        # AdamW moves a weight by up to the learning rate, 1e-3, even where its gradient is all rounding.
        torch.testing.assert_close(parameter, of_torch[name], rtol=1e-4, atol=1e-4)


@needs_nnscaler
def test_a_checkpoint_of_other_rows_a_step_is_refused_before_ranks_start(trained):
    refusal = run(trained, "nnscaler", "nnscaler", *TP, "--grad_accumulation_steps", "3", check=False)
    assert re.search("--grad_accumulation_steps 3: .*/0001-0008 is of a run", refusal.stderr)
    assert "exitcode  : 2" in refusal.stderr
