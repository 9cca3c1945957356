"""One rank of a plan, run alone: what it measures is what a rank among others would, and what its group hands out."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from families import small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.gpu_parts.rehearsal import peak_bytes
from longctx import compiled
from longctx.engines import builtin
from longctx.engines.builtin.run import build_on_rank
from longctx.errors import UserError
from longctx.huggingface.configuration import load_config
from longctx.kernels import fused
from longctx.kernels.attention import attention
from longctx.kernels.choice import Choice
from longctx.options import parse_job
from longctx.runtime import collectives, parts
from longctx.runtime.parallel import process_group
from longctx.runtime.rehearsal import Cost, Measured, measure_step, random_row, random_values
from longctx.runtime.stand_in import COPIES, stand_in_group

CPU = torch.device("cpu")
rehearsal = sys.modules["longctx.engines.builtin.rehearse"]  # the package has a function of that name


def arguments(folder: Path, family: str, *more: str, layers: int = 4, length: int = 64) -> list[str]:
    small_config(family, num_hidden_layers=layers).save_pretrained(folder / family)
    argv = ["--engine", "torch", "--model_id", str(folder / family), "--sequence_length", str(length)]
    argv += ["--precision", "fp32", "--hardware", "cpu", "--compiled_dir", str(folder), "--name", "rehearsed"]
    return [*argv, *more]


def rehearse(folder: Path, argv: list[str], *more: str) -> dict:
    train.main(["--run_mode", "rehearse", *argv, *more])
    return json.loads((folder / "rehearsed" / compiled.REHEARSAL).read_text())


# --- the group -------------------------------------------------------------------------------------------------------

RESHARDS = {
    "all_to_all": lambda x: collectives.all_to_all(x, 0, 1),
    "all_gather": lambda x: collectives.all_gather(x, 0),
    "all_gather_reduce": lambda x: collectives.all_gather_reduce(x, 1),
    "take_slice": lambda x: collectives.take_slice(x, 1),
    "replicate": collectives.replicate,
    "all_reduce": collectives.all_reduce,
    "all_reduce_both": collectives.all_reduce_both,
    "reduce_scatter": lambda x: collectives.reduce_scatter(x, 0),
}


@settings(deadline=None, max_examples=20)
@given(name=st.sampled_from(sorted(RESHARDS)), size=st.sampled_from([2, 3, 4]), parts_of=st.integers(1, 3))
def test_every_reshard_gives_a_lone_rank_its_own_values_in_the_shape_that_real_ranks_give(name, size, parts_of):
    x = torch.randn(size * parts_of, size * parts_of, 2, requires_grad=True)
    with stand_in_group(size - 1, size):
        collectives.set_plan_group(dist.group.WORLD)
        y = RESHARDS[name](x)
        y.sum().backward()
    expected = {
        "all_to_all": (x.shape[0] // size, x.shape[1] * size, 2),
        "all_gather": (x.shape[0] * size, x.shape[1], 2),
        "all_gather_reduce": (x.shape[0], x.shape[1] * size, 2),
        "take_slice": (x.shape[0], x.shape[1] // size, 2),
        "reduce_scatter": (x.shape[0] // size, x.shape[1], 2),
    }.get(name, tuple(x.shape))
    assert y.shape == expected
    assert x.grad.shape == x.shape
    assert x.grad.isfinite().all()
    assert set(y.detach().flatten().tolist()) <= set(x.detach().flatten().tolist())


def test_a_lone_rank_stands_in_for_one_of_a_group_of_neighbours_too():
    x = torch.randn(4, 16, 2, requires_grad=True)
    with stand_in_group(13, 16):
        collectives.set_plan_group(dist.group.WORLD)
        assert collectives.own_starts(64, balanced=True, across=8) == (16, 32)  # of the second of two groups
        of_group = collectives.all_to_all(x, split=1, gather=0, balanced_gather=True, within=8)
        whole = collectives.all_gather_reduce(of_group, dim=0, balanced=True, across=8)
        whole.sum().backward()
        other = collectives.reorder(x, dim=1, balanced=True)
    assert of_group.shape == (32, 2, 2) and whole.shape == (64, 2, 2) and other.shape == x.shape
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("window", [0, 5], ids=["blocks go round", "a window reaches some"])
def test_a_lone_rank_is_passed_its_own_keys_for_those_of_others(window):
    query, key, value = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    with stand_in_group(3, 4), profile(activities=[ProfilerActivity.CPU]) as profiled:
        collectives.set_plan_group(dist.group.WORLD)
        y = attention(query, key, value, 0.25, window, ring=collectives.ring_of(32))
        y.sum().backward()
    assert y.shape == (1, 8, 2, 16)
    assert all(x.grad.shape == x.shape and x.grad.isfinite().all() for x in (query, key, value))
    seconds = parts.seconds_by_part(profiled, CPU)
    assert min(seconds[part] for part in (COPIES, parts.ATTENTION_FORWARD, parts.ATTENTION_BACKWARD)) > 0


# --- what is measured ------------------------------------------------------------------------------------------------


def measure_among_real_ranks(argv: list[str], folder: str) -> None:
    train.register_loss()
    job = parse_job([*argv, "--run_mode", "compile"])
    plan = compiled.read_plan_file(job.compiled_folder).module
    with process_group() as device:
        model = build_on_rank(job, builtin.ensure_compiled(job), plan, device)
        random_values(model, job.seed)
        measured = measure_step(model, job, random_row(load_config(job.model_id).vocab_size, job))
    Path(folder, f"rank{os.environ['RANK']}").write_text(str(measured.peak))


@pytest.mark.parametrize("family, plan_ngpus", [("llama", 2), ("gemma2", 1)])
def test_a_rank_alone_takes_the_memory_that_it_takes_among_real_ranks(family, plan_ngpus, tmp_path):
    argv = arguments(tmp_path, family, "--plan_ngpus", str(plan_ngpus), "--runtime_ngpus", "2", length=256)
    rehearsed = [rehearse(tmp_path, argv, "--rehearse_rank", str(rank))["measured"] for rank in range(2)]
    run_ranks(2, measure_among_real_ranks, argv, str(tmp_path))
    for rank in range(2):
        assert peak_bytes(rehearsed[rank]) == pytest.approx(float((tmp_path / f"rank{rank}").read_text()), rel=0.05)


def test_layers_that_are_left_out_are_counted_like_those_of_their_kind_that_ran(tmp_path):
    """Gemma 2 has two kinds of layers; of each, four run, or two."""
    options = ["--plan_ngpus", "2", "--runtime_ngpus", "2", "--recompute_modules", ""]  # else there are more kinds
    argv = arguments(tmp_path, "gemma2", *options, layers=8, length=128)
    whole = rehearse(tmp_path, argv)["measured"]
    some = rehearse(tmp_path, argv, "--rehearse_layers", "2")["measured"]
    assert (some["layers_run"], whole["layers_run"], some["layers"]) == (4, 8, 8)
    assert some["masters"] == whole["masters"]
    assert peak_bytes(some) == pytest.approx(peak_bytes(whole), rel=0.02)
    assert (tmp_path / "rehearsed" / compiled.REHEARSAL_TEXT).read_text().count("4 of 8 layers ran") == 1


def test_a_rehearsal_says_what_it_measured_beside_what_was_predicted(tmp_path, capsys):
    rehearsal = rehearse(tmp_path, arguments(tmp_path, "llama", "--plan_ngpus", "2", "--runtime_ngpus", "4"))
    measured, projection = rehearsal["measured"], rehearsal["projection"]
    assert set(measured["micro_batch"]["parts"]) == set(parts.PARTS)
    for part in (
        parts.ATTENTION_FORWARD,
        parts.ATTENTION_BACKWARD,
        parts.LINEAR,
        parts.LOSS,
        parts.PACKING,
        parts.FSDP,
    ):
        assert measured["micro_batch"]["parts"][part] > 0, part
    step = 4 * measured["micro_batch"]["seconds"] + measured["update_seconds"]
    assert projection["step_seconds"] > step > 0
    assert projection["tokens_per_s_per_gpu"] == pytest.approx(2 * 4 * 64 / projection["step_seconds"] / 4)
    said = capsys.readouterr().out
    assert "projection:" in said
    assert "were predicted for cpu;" in said
    assert "were predicted" in said


def test_time_is_sorted_into_parts_by_what_an_operator_lies_in():
    """A product inside the loss is the loss's, and one that no other part encloses a linear layer's."""
    hidden = torch.randn(1, 64, 32, requires_grad=True)
    weight = torch.randn(500, 32, requires_grad=True)
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    for call, expected in (
        (lambda: torch.nn.functional.linear(hidden, weight), {parts.LINEAR}),
        (lambda: train.chunk_linear_cross_entropy(hidden, weight, torch.zeros(1, 64, dtype=torch.long)), {parts.LOSS}),
        (
            lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True),
            {parts.ATTENTION_FORWARD, parts.ATTENTION_BACKWARD},
        ),
    ):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call().sum().backward()
        seconds = parts.seconds_by_part(profiled, CPU)
        assert {part for part, value in seconds.items() if value > 0 and part != parts.REST} == expected
        assert seconds[COPIES] == 0


def gpu_event(name: str, linked: int, stream: int, microseconds: int, device=DeviceType.CUDA, number: int = 0):
    """An event as the profiler has it: an operator on the host, or what ran on a GPU for the operator `linked`."""
    facts = {"name": name, "linked_correlation_id": linked, "device_resource_id": stream, "device_type": device}
    facts |= {"correlation_id": number, "duration_ns": 1000 * microseconds}
    return SimpleNamespace(**{fact: (lambda value=value: value) for fact, value in facts.items()})


def test_a_gpus_kernels_count_once_and_copies_only_where_computing_waits_for_them():
    """FSDP's gathers lie in a record_function, whose span is among the GPU's events, and have a stream of their own."""
    gather = SimpleNamespace(id=1, name="FSDP::all_gather", cpu_parent=None, device_type=DeviceType.CPU)
    copied = SimpleNamespace(id=2, name=COPIES, cpu_parent=gather, device_type=DeviceType.CPU)
    waited = SimpleNamespace(id=3, name=COPIES, cpu_parent=None, device_type=DeviceType.CPU)
    product = SimpleNamespace(id=4, name="aten::mm", cpu_parent=None, device_type=DeviceType.CPU)
    operators = [gather, copied, waited, product]
    events = [gpu_event(o.name, 0, 0, 0, DeviceType.CPU, o.id) for o in operators]
    events += [gpu_event("FSDP::all_gather", 1, 9, 50), gpu_event("copy", 2, 9, 20), gpu_event("cast", 1, 9, 5)]
    events += [gpu_event("copy", 3, 7, 30), gpu_event("gemm", 4, 7, 400)]
    results = SimpleNamespace(events=lambda: events)
    profiled = SimpleNamespace(events=lambda: operators, profiler=SimpleNamespace(kineto_results=results))
    seconds = parts.seconds_by_part(profiled, torch.device("cuda"))
    assert {part: round(1e6 * own) for part, own in seconds.items() if own} == {
        parts.LINEAR: 400,
        parts.FSDP: 5,
        COPIES: 30,
    }


def test_bytes_allocated_are_counted_by_the_allocator_at_the_most_and_in_the_end():
    kept = []

    def call():
        large = torch.ones(2**20)
        kept.append(large[: 2**10].clone())

    peak, held = parts.bytes_allocated(call, CPU)
    assert (peak, held) == (2**22 + 2**12, 2**12)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, problem",
    [
        (["--rehearse_rank", "2"], "--rehearse_rank 2: it has to be below --runtime_ngpus 2"),
        (["--rehearse_layers", "0"], "--rehearse_layers 0: it has to be a whole number from 1 to 2147483647"),
    ],
)
def test_a_rehearsal_that_can_not_be_is_refused_in_a_sentence(more, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        rehearse(tmp_path, arguments(tmp_path, "llama", "--runtime_ngpus", "2"), *more)
    assert not (tmp_path / "rehearsed").exists()


def test_a_rehearsal_under_torchrun_is_refused_in_a_sentence(tmp_path, monkeypatch):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", **ranks}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--run_mode rehearse: it runs one rank in one process"):
        rehearse(tmp_path, arguments(tmp_path, "llama", "--runtime_ngpus", "2"))


def test_a_rank_other_than_the_first_chooses_attentions_kernel_itself(monkeypatch, tmp_path, capsys):
    """There is no other rank that could tell it."""
    chosen = Choice("cudnn", "cudnn, as it was made to be")
    monkeypatch.setattr(rehearsal, "choose_attention", lambda *asked: chosen)
    rehearse(tmp_path, arguments(tmp_path, "llama", "--plan_ngpus", "2"), "--rehearse_rank", "1")
    assert "attention: cudnn, as it was made to be" in capsys.readouterr().out
    fused.set_auto("auto")


def test_a_rank_that_needs_more_than_the_plans_limit_is_warned_of(tmp_path, capsys):
    argv = arguments(tmp_path, "llama", "--plan_ngpus", "2", length=128)
    rehearse(tmp_path, argv)
    assert "warning: that is more" not in capsys.readouterr().out
    plan = compiled.read_plan_file(tmp_path / "rehearsed")
    plan.inputs["gpu_mem_constraint"] = 1e-4
    found = json.loads((tmp_path / "rehearsed" / compiled.REHEARSAL).read_text())
    micro_batch = Cost(**found["measured"].pop("micro_batch"))
    measured = Measured(micro_batch, **{**found["measured"], "kernels": ()})
    said = rehearsal.summary(
        rehearsal.Rehearsal("cpu", "", 0, measured, rehearsal.Projection(**found["projection"])), plan
    )
    assert any(line.startswith("warning: that is more than the 0.0001 GB") for line in said)


def test_a_projection_is_finite(tmp_path):
    rehearsal = rehearse(tmp_path, arguments(tmp_path, "llama", layers=2))
    assert all(math.isfinite(value) for value in rehearsal["projection"].values() if value is not None)
