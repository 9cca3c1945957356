"""How the ranks share a generated module: process group, device mesh, FSDP2, and weights read shard by shard.

Of `world_size` ranks, each `plan_size` neighbours run one copy of the plan, that is, compute one row of tokens
together; `data_parallel_size` = world_size / plan_size copies take rows of their own. A weight is sharded in one of two
ways. Most are FSDP-sharded: their shards lie on all ranks, and a layer's are gathered while it runs. The others are
plan-sharded: the plan partitions their op so that each rank of a copy needs only its own part, which stays there and
is never gathered.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longctx import compiled, devices, torchrun
from longctx.errors import ModelError
from longctx.runtime import collectives, watch
from longctx.runtime.rendezvous import fresh_store

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group(kind: str = "auto", timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[torch.device]:
    """Joins the ranks that torchrun started, or makes a group of one without torchrun; yields this rank's device.

    After an error the group of several ranks is left as it is: to destroy it would wait for collectives under way, in
    which the others may never take part. The process has to end then, by errors.leave.

    Args:
        kind: of device: 'auto', 'cpu' or 'cuda'.
        timeout: of a collective, after which it raises an error, or NCCL ends the process.

    Raises:
        DeviceError: there is no such device.
    """
    device = devices.take(devices.choose(kind))
    backend = devices.backend(device)
    if devices.are_shared(device):
        torchrun.say(devices.describe_sharing())
    if torchrun.started_this():
        store = fresh_store()
        store.set_timeout(timeout)
        rank, world_size = torchrun.rank(), torchrun.world_size()
        dist.init_process_group(backend, store=store, timeout=timeout, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    succeeded = False
    try:
        yield device
        succeeded = True
    finally:
        if succeeded or dist.get_world_size() == 1:
            dist.destroy_process_group()


def load_generated(folder: Path, class_name: str) -> nn.Module:
    """The module that a compiled folder's gencode.py defines, its parameters on meta."""
    spec = importlib.util.spec_from_file_location("gencode", folder / compiled.CODE)
    assert spec is not None and spec.loader is not None, "Python has a loader for every .py file"
    gencode = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gencode)
    with torch.device("meta"):
        return getattr(gencode, class_name)()


@dataclass(frozen=True)
class ParallelModel:
    """The generated module on this rank, and the ranks it shares its work with.

    `mesh` is [data_parallel_size, plan_size]: the ranks of one row of it run one copy of the plan. `plan_sharded` has
    the name of every plan-sharded weight, and the dimension along which it is split over those ranks.
    """

    module: nn.Module
    mesh: DeviceMesh
    plan_sharded: dict[str, int]

    @property
    def plan_size(self) -> int:
        return self.mesh.size(1)

    @property
    def data_parallel_size(self) -> int:
        return self.mesh.size(0)

    @property
    def data_parallel_rank(self) -> int:
        return self.mesh.get_local_rank(0)

    def globally(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Parameter `name`, or a tensor of its shape, as a DTensor of the whole parameter; it shares the memory."""
        if name not in self.plan_sharded or tensor.dim() == 0:
            return tensor  # FSDP's tensors are DTensors already; one of no dimensions, AdamW's step, is on every rank
        placements = (Replicate(), Shard(self.plan_sharded[name]))
        return DTensor.from_local(tensor.detach(), self.mesh, placements, run_check=False)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by name, as a DTensor of the whole parameter."""
        for name, parameter in self.module.named_parameters():
            yield name, self.globally(name, parameter)


def parallelize(
    module: nn.Module,
    layers_path: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    plan_size: int = 1,
    plan_sharded: dict[str, int] | None = None,
) -> ParallelModel:
    """Applies to a generated module, whose parameters are on meta, every technique that shares its work and memory.

    Args:
        layers_path: path of the module's list of layers; "" if it has none.
        plan_sharded: plan-sharded weights by name, with the dimension that each is split along.
    """
    plan_sharded = plan_sharded or {}
    mesh = make_mesh(device, plan_size)
    # 1. The plan: the generated code has its own collectives, and needs only to know which ranks they are over.
    collectives.set_plan_group(mesh.get_group("plan"))
    # 2. FSDP2 (ZeRO-3, arXiv:1910.02054) over all ranks: what the plan doesn't shard, it does.
    shard_with_fsdp(module, layers_path, compute_dtype, device, plan_sharded)
    # 3. Memory, only now: each rank allocates only its shards, and no rank ever holds the whole model.
    give_memory(module, device)
    return ParallelModel(module, mesh, plan_sharded)


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Moves a module to the device. Parameters, which are on meta, get memory without values; buffers keep theirs."""
    buffers = dict(module.named_buffers())
    module.to_empty(device=device)
    for name, buffer in buffers.items():
        module.get_buffer(name).copy_(buffer)


def make_mesh(device: torch.device, plan_size: int) -> DeviceMesh:
    """All ranks as [data_parallel_size, plan_size]: neighbours, which share a node's fast links, share a plan."""
    shape = (dist.get_world_size() // plan_size, plan_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data_parallel", "plan"))


def shard_with_fsdp(
    module: nn.Module, layers_path: str, compute_dtype: torch.dtype, device: torch.device, plan_sharded: Iterable[str]
) -> None:
    """Shards each layer over all ranks, then the root, except for the plan-sharded weights, and vectors that nothing
    trains, as what corrects a router's scores: each rank has these whole, in float32.

    Layers come before the root, which then holds only what they leave, the embedding and the head: a layer's weights
    are gathered only while it runs.
    """
    ranks = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("ranks",))
    ignored = {module.get_parameter(name) for name in plan_sharded}
    ignored |= {weight for weight in module.parameters() if not weight.requires_grad and weight.dim() < 2}
    # Inputs are not cast: the generated code has the model's own casts, and cos and sin may be float32 by design.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = module.get_submodule(layers_path).children() if layers_path else ()
    for part in (*layers, module):
        sharded = fully_shard(part, mesh=ranks, mp_policy=policy, ignored_params=ignored)
        # The loss is a sum over tokens, so gradients are summed; the trainer divides by the number of tokens.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def reduce_plan_sharded_gradients(model: ParallelModel) -> None:
    """Sums the gradients of plan-sharded weights over the copies of the plan; FSDP has summed all others."""
    if model.data_parallel_size > 1:
        for name in model.plan_sharded:
            if (gradient := model.module.get_parameter(name).grad) is not None:  # None where it is not trained
                dist.all_reduce(gradient, group=model.mesh.get_group("data_parallel"))


Reader = Callable[[tuple[slice, ...]], torch.Tensor]  # returns the part of a stored tensor that the slices select


def load_stored(model: ParallelModel, readers: Mapping[str, Reader]) -> None:
    """Fills every parameter, by its name, with what its reader reads; each rank reads only its own shard.

    Raises:
        ModelError: on some rank, a value is a NaN or infinite. Every rank raises it, so that none waits for another.
    """
    unusable = None
    for name, parameter in model.named_parameters():
        load_slice(parameter, readers[name])
        watch.progress()
        if unusable is None and not local(parameter).isfinite().all():
            unusable = name
    if name := first_of_all_ranks(unusable):
        raise not_finite(name)


def first_of_all_ranks(own: str | None) -> str | None:
    """What the first of all ranks that has something names, on every rank; None if none has."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return next(filter(None, found), None)


def not_finite(name: str) -> ModelError:
    return ModelError(
        f"{name!r} has a NaN or an infinity in its stored weights; download the model again, or choose another"
    )


def load_tensors(model: ParallelModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fills every parameter from (name, whole tensor), of which only one is in memory at a time."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        load_slice(parameters.pop(name), tensor.__getitem__)
        watch.progress()
    assert not parameters, f"no weights for {list(parameters)}"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_slice(tensor: torch.Tensor, read: Reader) -> None:
    """Fills a tensor, or this rank's shard of a DTensor, with what `read` returns for its place in the whole."""
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
    else:
        sizes, offsets, local = tensor.shape, (0,) * tensor.dim(), tensor
    if local.numel():
        local.copy_(read(tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))))
