"""What one rank takes for a micro-batch and for the optimizer's step: seconds by part, bytes by kind.

The weights are random and so are the rows; the process group may be the stand-in for one (see stand_in.py), or real.
Where a model is too large for one device, some layers of each kind run and the others pass on what they are given. A
layer's time and memory are then the difference between a micro-batch with the layers of its kind and one without them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import profile
from tqdm import tqdm

from longctx import compiled
from longctx.data.rows import RowInputs, apart
from longctx.job import Job
from longctx.runtime import parallel, parts, trainer
from longctx.runtime.stand_in import COPIES

TIMED = 2  # micro-batches, of which the faster counts
MICRO_BATCHES = TIMED + 2  # that one measurement takes: these, one that is weighed and one that is profiled
KERNELS = 40  # of a GPU that are listed

# --- the layers that run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Layers that are alike, in their code and in what they recompute: all of them, and those that run."""

    container: nn.ModuleList
    count: int
    kept: tuple[int, ...]

    @property
    def left_out(self) -> int:
        return self.count - len(self.kept)


class Passed(nn.Module):
    """A layer that is left out."""

    def forward(self, hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        return hidden_states


def keep_layers(module: nn.Module, plan: compiled.PlanFile, most: int | None) -> list[Layers]:
    """The module's layers by kind. Of each kind all but the first `most`, if that is a number, are left out."""
    if not plan.module.layers_path:
        return []
    container = module.get_submodule(plan.module.layers_path)
    assert isinstance(container, nn.ModuleList)
    by_kind: dict[tuple, list[int]] = {}
    for index, layer in enumerate(container):
        by_kind.setdefault((type(layer), plan.decisions.recompute[index]), []).append(index)
    groups = []
    for indices in by_kind.values():
        groups.append(Layers(container, len(indices), tuple(indices[:most])))
        for index in indices[len(groups[-1].kept) :]:
            container[index] = Passed()
    return groups


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a micro-batch costs on this rank.

    seconds: of computing, from its beginning to its end, without the copies that stand in for the network; parts: of
    the device's work, by what it is for; held, peak: bytes that it allocates, after the forward pass and at the most.
    """

    seconds: float
    parts: dict[str, float]
    held: float
    peak: float

    def with_more_layers(self, ran: "Cost", without: "Cost", times: float) -> "Cost":
        """This cost with more layers of a kind: `times` as many as those by which `ran` and `without` differ.

        Of a layer's memory only what it keeps for the backward pass adds to the peak.
        """
        held = times * (ran.held - without.held)
        seconds = self.seconds + times * (ran.seconds - without.seconds)
        by_part = {name: own + times * (ran.parts[name] - without.parts[name]) for name, own in self.parts.items()}
        return Cost(seconds, by_part, self.held + held, self.peak + held)


@dataclass(frozen=True)
class Measured:
    """What one rank takes for the whole model, and the kernels of the layers that ran.

    masters: bytes of this rank's float32 weights; reserved, in_use: bytes that the allocator held at the most, and that
    the device had in use with all else, or None on a CPU and where layers were left out.
    """

    micro_batch: Cost
    update_seconds: float  # of an optimizer step: the norm of the gradients, and AdamW
    masters: float
    reserved: float | None
    in_use: float | None
    layers_run: int
    layers: int
    kernels: tuple[parts.Kernel, ...]

    @property
    def peak(self) -> float:
        """Bytes at the peak: masters, their gradients and AdamW's two moments, and what a micro-batch allocates."""
        return 4 * self.masters + self.micro_batch.peak


def measure_step(model: parallel.ParallelModel, job: Job, row: RowInputs, layers: Sequence[Layers] = ()) -> Measured:
    """Times and weighs a micro-batch and the optimizer's step on this rank.

    The process group may be the stand-in, or real ranks that all call this.
    """
    device = torch.device(model.mesh.device_type)
    optimizer = trainer.make_optimizer(model, job)
    cut = [group for group in layers if group.left_out]
    with tqdm(total=2 + MICRO_BATCHES * (1 + len(cut)), unit="micro-batch", desc="rehearse") as bar:
        for _ in range(2):  # Libraries start, kernels are chosen, and gradients are there for the next micro-batches.
            trainer.micro_batch(model, row)
            bar.update()
        run_update(model, optimizer, job)
        ran, kernels = measure_micro_batch(model, row, bar)
        update_seconds = timed(lambda: run_update(model, optimizer, job), device)
        reserved, in_use = (None, None) if cut else device_memory(device)
        total = ran
        for group in cut:
            with left_out(group):
                without, _ = measure_micro_batch(model, row, bar)
            total = total.with_more_layers(ran, without, group.left_out / len(group.kept))
    masters = whole_bytes(model.module, layers)
    update_seconds *= masters / local_bytes(model.module)
    n_run, n_layers = sum(len(group.kept) for group in layers), sum(group.count for group in layers)
    return Measured(total, update_seconds, masters, reserved, in_use, n_run, n_layers, kernels)


def measure_micro_batch(
    model: parallel.ParallelModel, row: RowInputs, bar: tqdm
) -> tuple[Cost, tuple[parts.Kernel, ...]]:
    """The cost of a micro-batch whose gradients are added to others, and the kernels that took most of its time."""
    device = torch.device(model.mesh.device_type)
    seconds = []
    for _ in range(TIMED):
        seconds.append(timed(lambda: trainer.micro_batch(model, row), device))
        bar.update()
    held, peak = weigh_micro_batch(model, row)
    bar.update()
    with profile(activities=parts.activities(device)) as profiled:
        profiled_seconds = timed(lambda: trainer.micro_batch(model, row), device)
    bar.update()
    by_part = parts.seconds_by_part(profiled, device)
    if device.type == "cpu":  # Events tell when they began and ended; here other processes may have run in between.
        scale = profiled_seconds / sum(by_part.values())
        by_part = {name: scale * value for name, value in by_part.items()}
    copies = by_part.pop(COPIES)
    return Cost(min(seconds) - copies, by_part, held, peak), tuple(parts.kernels(profiled, KERNELS))


def weigh_micro_batch(model: parallel.ParallelModel, row: RowInputs) -> tuple[int, int]:
    """Bytes that a micro-batch has allocated after its forward pass, and at the most."""
    device = torch.device(model.mesh.device_type)
    inputs = trainer.send(row, device)
    losses: list[torch.Tensor] = []
    peak_forward, held = parts.bytes_allocated(lambda: losses.append(model.module(*inputs)), device)
    peak_backward, _ = parts.bytes_allocated(lambda: losses.pop().backward(), device)
    return held, max(peak_forward, held + peak_backward)


def run_update(model: parallel.ParallelModel, optimizer: torch.optim.Optimizer, job: Job) -> None:
    """The optimizer's step as the trainer takes it, but that gradients stay: the next micro-batch adds to them."""
    gradients = [(parameter, parameter.grad) for parameter in model.module.parameters()]
    norm = trainer.total_norm(model)
    trainer.update_weights(model, optimizer, 0.0, trainer.clip_factor(norm.item(), job))
    for parameter, gradient in gradients:
        parameter.grad = gradient


@contextmanager
def left_out(group: Layers) -> Iterator[None]:
    """The layers of this kind that ran are left out as well."""
    own = {index: group.container[index] for index in group.kept}
    for index in own:
        group.container[index] = Passed()
    yield
    for index, layer in own.items():
        group.container[index] = layer


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: on a GPU by the wall clock, on a CPU of computing, without waiting for others."""
    if device.type == "cpu":
        start = time.thread_time()
        call()
        return time.thread_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def device_memory(device: torch.device) -> tuple[float | None, float | None]:
    """Bytes that PyTorch's allocator has reserved at the most, and that are in use on the device, the context too."""
    if device.type == "cpu":
        return None, None
    free, total = torch.cuda.mem_get_info(device)
    return float(torch.cuda.max_memory_reserved(device)), float(total - free)


def whole_bytes(module: nn.Module, layers: Sequence[Layers]) -> float:
    """Bytes of this rank's part of all weights, those of the layers that were left out too."""
    more = sum(
        group.left_out / len(group.kept) * sum(local_bytes(group.container[index]) for index in group.kept)
        for group in layers
    )
    return local_bytes(module) + more


def local_bytes(module: nn.Module) -> int:
    """Bytes of this rank's part of a module's weights."""
    tensors = map(parallel.local, module.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- what a rank is given --------------------------------------------------------------------------------------------


@torch.no_grad()
def random_values(model: parallel.ParallelModel, seed: int) -> None:
    """Fills this rank's part of every weight: matrices at random, as models start, and vectors with ones or zeros."""
    torch.manual_seed(seed)
    for name, parameter in model.module.named_parameters():
        local = parallel.local(parameter)
        if parameter.dim() > 1:
            local.normal_(std=0.02)
        else:
            local.fill_(0.0 if name.endswith("bias") else 1.0)


def random_row(vocab_size: int, job: Job) -> RowInputs:
    """A row on the host; where documents do not see each other, of as many of equal length as the plan was made for."""
    length, n = job.sequence_length, job.equal_documents
    tokens = torch.randint(vocab_size, (1, length + 1))
    row = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return apart(*row, tuple(length * number // n for number in range(n))) if n else row
