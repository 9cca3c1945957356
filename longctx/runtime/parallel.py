"""Ranks, their mesh, FSDP2 over the generated module, and weights loaded by slices."""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longctx.runtime import collectives

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a checkpoint of 8B parameters on a slow disk is within it


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the ranks that torchrun started (or stands alone); yields this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def load_generated(folder: Path, class_name: str) -> nn.Module:
    """The module that a compiled folder's gencode.py defines, its parameters on meta."""
    spec = importlib.util.spec_from_file_location("gencode", folder / "gencode.py")
    gencode = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gencode)
    with torch.device("meta"):
        return getattr(gencode, class_name)()


@dataclass(frozen=True)
class ParallelModel:
    """The generated module on this rank, and the ranks it shares its work with.

    `mesh` is [data_parallel, plan]: a row of it computes one row of tokens together, and rows differ in their data.
    `resident` names the weights that each rank of a plan keeps its own part of, and the dimension they are split along;
    all others are FSDP's.
    """

    module: nn.Module
    mesh: DeviceMesh
    resident: dict[str, int]

    @property
    def plan_ngpus(self) -> int:
        return self.mesh.size(1)

    @property
    def data_parallel_size(self) -> int:
        return self.mesh.size(0)

    @property
    def data_parallel_rank(self) -> int:
        return self.mesh.get_local_rank(0)

    def globally(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter, or a tensor of its shape, as the part of the whole that it is; it shares its memory."""
        if name not in self.resident or tensor.dim() == 0:
            return tensor
        placements = (Replicate(), Shard(self.resident[name]))
        return DTensor.from_local(tensor.detach(), self.mesh, placements, run_check=False)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by name, as the part of the whole that this rank has."""
        for name, parameter in self.module.named_parameters():
            yield name, self.globally(name, parameter)


def parallelize(
    module: nn.Module,
    layers_path: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    plan_ngpus: int = 1,
    resident: dict[str, int] | None = None,
) -> ParallelModel:
    """Joins the ranks of each plan, wraps each layer, then the root, in FSDP2 over all ranks (ZeRO-3,
    arXiv:1910.02054), and gives the weights memory.

    Layers come before the root: it then holds what is left, the embedding and the head, and a layer's weights are
    gathered only while it runs. Gradients are summed in float32: the loss is a sum over tokens, so no rank count
    divides it.
    """
    world_size = dist.get_world_size()
    ranks = init_device_mesh(device.type, (world_size,), mesh_dim_names=("ranks",))
    shape = (world_size // plan_ngpus, plan_ngpus)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data_parallel", "plan"))
    collectives.set_plan_group(mesh.get_group("plan"))

    resident = resident or {}
    kept = {module.get_parameter(name) for name in resident}
    # Inputs are not cast: the generated code has the model's own casts, and cos and sin may be float32 by design.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = module.get_submodule(layers_path) if layers_path else []
    for part in (*layers, module):
        fully_shard(part, mesh=ranks, mp_policy=policy, ignored_params=kept)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    module.to_empty(device=device)
    return ParallelModel(module, mesh, resident)


def reduce_resident_gradients(model: ParallelModel) -> None:
    """Sums the gradients of resident weights over the plans; FSDP has summed the others."""
    if model.data_parallel_size > 1:
        for name in model.resident:
            dist.all_reduce(model.module.get_parameter(name).grad, group=model.mesh.get_group("data_parallel"))


Reader = Callable[[tuple[slice, ...]], torch.Tensor]  # gives the part of a stored tensor at these slices


def load_safetensors(model: ParallelModel, weights: dict[str, Any]) -> None:
    """Fills every parameter from the tensor stored for it; each rank reads its part only.

    `weights`: parameter -> its `file` and its `name` there, known to be complete (model.find_weights, check_weights).
    """
    with ExitStack() as stack:
        opened = {f: stack.enter_context(safe_open(f, "pt")) for f in {stored.file for stored in weights.values()}}
        for name, parameter in model.named_parameters():
            stored = weights[name]
            load_slice(parameter, opened[stored.file].get_slice(stored.name).__getitem__)


def load_tensors(model: ParallelModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fills every parameter from whole tensors, which come one at a time."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        load_slice(parameters.pop(name), tensor.__getitem__)
    assert not parameters, f"no weights for {list(parameters)}"


@torch.no_grad()
def load_slice(tensor: torch.Tensor, read: Reader) -> None:
    """Fills a tensor, or this rank's shard of a DTensor, from its place in the whole."""
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
    else:
        sizes, offsets, local = tensor.shape, (0,) * tensor.dim(), tensor
    if local.numel():
        local.copy_(read(tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))))
