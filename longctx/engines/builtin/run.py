"""Training with the built-in engine: the compiled module under FSDP2, its weights, and the training loop."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from longctx import compiled, devices, torchrun
from longctx.compiler import hardware
from longctx.compiler.plan import GB
from longctx.data.packing import find_boundaries
from longctx.data.rows import Rows, columns_left_out, open_dataset
from longctx.engines.builtin.cache import check_compiled_folder, ensure_compiled, plan_inputs
from longctx.engines.checkpoints import FORMATS
from longctx.errors import KernelError, OutOfMemory
from longctx.huggingface.configuration import bos_token, vocab_size
from longctx.huggingface.overrides import changed_config
from longctx.huggingface.weights import (
    Weights,
    check_hf_files,
    find_weights,
    parameter_shapes,
    random_weights,
    remarks,
    save_hf_files,
    trained_config,
)
from longctx.job import Job
from longctx.kernels import choice, experts, fused
from longctx.runtime import parallel, watch
from longctx.runtime.determinism import be_deterministic
from longctx.runtime.metrics import FlopCount, check_log
from longctx.runtime.resume import changed_positions, check_same_model, find_resume
from longctx.runtime.saving import check_room
from longctx.runtime.shared_folder import check_shared
from longctx.runtime.trainer import announce, check_checkpoint_places, check_first_rows, count_saves, train


def run(job: Job) -> tuple[int, int]:
    """Trains: checks first all that can be checked without a process group, then joins the ranks.

    Returns:
        The steps that were done before, and those that are now.
    """
    assert job.dataset_path is not None, "parse_job refuses a run without rows"
    if job.deterministic:
        be_deterministic()
    devices.take(job.device)  # before all else that touches CUDA, as to ask for the GPU's name does
    if names := columns_left_out(job.dataset_path):
        torchrun.say(f"rows: columns that are not used: {', '.join(names)}")
    rows = open_rows(job, job.dataset_path)
    resume = find_resume(job, len(rows), FORMATS)
    check_first_rows(rows, job, resume)
    check_checkpoint_places(job, len(rows), resume)
    check_log(job.log_folder, resume is not None)
    check_compiled_folder(job, plan_inputs(job))
    check_hf_files(job.model_id)
    weights = None if job.random_init or resume else find_weights(job.model_id, job.changes)
    # Only after the weights, which it may depend on, are here.
    config = weights.config if weights else trained_config(job.model_id, job.random_init, job.changes)
    if resume:
        check_same_model(resume, parameter_shapes(config))
        if line := changed_positions(resume, getattr(config.get_text_config(), "rope_parameters", None)):
            torchrun.say(line)
    folder = ensure_compiled(job)
    plan_file = compiled.read_plan_file(folder)
    plan = plan_file.module
    check_room(job.checkpoint_dir, plan.parameters, count_saves(job, len(rows), resume))
    if weights:
        torchrun.say(*remarks(weights))
    patience = timedelta(minutes=job.hang_timeout)
    watch.expect_progress(patience, job.log_folder)
    # Collectives give up later than the watch, which says where every rank waits.
    ranks = parallel.process_group(job.device, patience + watch.MARGIN)
    with ranks as device, saying_what_was_predicted(plan_file.predicted):
        if torchrun.has_several_nodes():
            check_shared(job.checkpoint_dir)
        take_attention(job, agree_on_attention(job, plan.fused_attention, device))
        model = build_on_rank(job, folder, plan, device)
        peak = hardware.peak_rate_here(job.dtype) if device.type == "cuda" else None
        flops = FlopCount(plan.forward_flops, plan.forward_flops_causal, peak)
        announce(job, rows, resume, plan_file.predicted.attention_share)
        experts.observers.append(BalanceTeller(job.plan_ngpus, job.expert_imbalance))
        load_weights = functools.partial(load_start, weights, config, job.seed)
        write_hf_files = functools.partial(save_hf_files, job.model_id, config)
        return train(model, rows, job, flops, resume, load_weights, write_hf_files)


def open_rows(job: Job, path: str) -> Rows:
    """The rows of a folder as the job takes them."""
    dataset, config = open_dataset(path), changed_config(job.model_id, job.changes)
    apart = job.document_mask
    boundaries = find_boundaries(path, dataset, job.sequence_length, bos_token(config)) if apart else None
    return Rows(dataset, job.sequence_length, vocab_size(config), boundaries)


def load_start(weights: Weights | None, config: PreTrainedConfig, seed: int, model: parallel.ParallelModel) -> None:
    """Fills the model with the stored weights, or with random ones where there are none."""
    if weights is not None:
        parallel.load_stored(model, {name: stored.read for name, stored in weights.by_parameter.items()})
    else:
        parallel.load_tensors(model, random_weights(config, seed))


def agree_on_attention(job: Job, shapes: list[list[list[int]]], device: torch.device) -> choice.Choice | None:
    """What the first rank chooses, for all: kernels differ in the last bits, and ranks of a plan are to round alike."""
    chosen = [choose_attention(job, shapes, device) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen)
    return chosen[0]


def choose_attention(job: Job, shapes: list[list[list[int]]], device: torch.device) -> choice.Choice | None:
    """The fastest of the fused attention kernels that are here, at the plan's shapes; None if there is no choice."""
    if not shapes or device.type != "cuda" or job.dtype not in fused.HALF:
        return None
    names = choice.candidates(job.attn_implementation, job.deterministic, job.document_mask)
    return choice.choose(names, shapes, job.dtype) if names else None


def take_attention(job: Job, chosen: choice.Choice | None) -> None:
    """Takes the kernel that was chosen, before there is a model; rank 0 says which.

    Raises:
        KernelError: none takes the plan's shapes.
    """
    if chosen is None:
        return
    if chosen.kernel is None and job.attn_implementation != "auto":
        raise KernelError(f"{chosen.findings}; choose auto")
    fused.set_auto(chosen.kernel or "sdpa")
    torchrun.say(f"attention: {chosen.findings if chosen.kernel else f'sdpa, since {chosen.findings}'}")


@contextmanager
def saying_what_was_predicted(predicted: compiled.Predicted) -> Iterator[None]:
    """A GPU that runs out of memory inside becomes an OutOfMemory that says what the plan had predicted."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        raise OutOfMemory(
            f"the GPU of rank {torchrun.rank()} is out of memory, with {allocated / GB:.1f} GB allocated and "
            f"{reserved / GB:.1f} reserved at most, where the plan had predicted {predicted.peak_bytes / GB:.1f}"
        ) from error


@dataclass
class BalanceTeller:
    """Says in a line that the experts of this rank, one of n, take more of the tokens than the plan has room for.

    Another line follows only where they take a quarter more than that.
    """

    n_ranks: int
    limit: float
    told: float = 0.0

    def __call__(self, share: float) -> None:
        times = share * self.n_ranks
        if times > max(self.limit, 1.25 * self.told):
            self.told = times
            print(
                f"run: the experts of rank {torchrun.rank()} take {times:.2f} times the mean of the tokens, and the "
                f"plan has room for {self.limit:g} times; if memory runs out, compile for a larger expert_imbalance",
                flush=True,
            )


def build_on_rank(job: Job, folder: Path, plan: compiled.GeneratedModule, device) -> parallel.ParallelModel:
    """The generated module, sharded over the ranks; its weights have memory and no values yet."""
    module = parallel.load_generated(folder, plan.class_name)
    return parallel.parallelize(module, plan.layers_path, device, job.dtype, job.plan_ngpus, plan.plan_sharded)
