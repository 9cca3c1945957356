"""Peak memory of rank 0 of a generated program, counted without a GPU, beside what compiler/memory.py predicts.

    python benchmarks/memory.py                    # Llama-3-8B at 8K, 32K and 128K on 8 ranks, plans over 1 and over 8
    python benchmarks/memory.py --compiled DIR     # the program in a compiled folder

One process stands for rank 0 of all: its tensors are fake, they have sizes and no memory, and its collectives go
nowhere. Torch's FSDPMemTracker counts two micro-batches, forward and backward; the second finds the first's gradients.
What lives and dies is what autograd, FSDP2 and checkpointing decide, but for the kernels that a GPU would run and that
fake tensors on a CPU can't: attention, RMSNorm and the loss are played by functions that keep and allocate as they do.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from chunk_linear_cross_entropy import CHUNK_SIZE
from longctx.compiled import PlanFile, read_plan_file
from longctx.compiler import codegen, memory
from longctx.compiler.ir import Graph
from longctx.compiler.plan import Plan
from longctx.engines import builtin
from longctx.job import DTYPES, Job
from longctx.kernels import attention, pieces
from longctx.options import parse_job
from longctx.runtime import parallel, trainer

CPU = torch.device("cpu")
# plan_ngpus, sequence length, --gpu_mem_constraint: at 128K one GPU needs more than 64 GB for a row of its own.
CASES = [(1, 8192, 64), (1, 32768, 64), (1, 131072, 100), (8, 8192, 64), (8, 32768, 64), (8, 131072, 64)]
KINDS = {  # a row of the table: the fields of a MemoryPrediction, the tracker's kinds
    "weights, gradients, optimizer": (
        ("masters", "gradients", "optimizer"),
        (_FSDPRefType.SHARDED_PARAM, _FSDPRefType.SHARDED_GRAD, _FSDPRefType.OPT),
    ),
    "gathered weights": (("gathered",), (_FSDPRefType.UNSHARDED_PARAM, _FSDPRefType.ALL_GATHER)),
    "reduce-scatter's input": (("reduce_scatter",), (_FSDPRefType.REDUCE_SCATTER,)),
    "activations, gradients under way": (
        ("saved", "transient", "loss", "weight_gradients"),
        (_FSDPRefType.ACT, _FSDPRefType.TEMP, _FSDPRefType.UNSHARDED_GRAD),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compiled", type=Path, help="a folder that train.py --run_mode compile wrote")
    compiled = parser.parse_args().compiled
    with tempfile.TemporaryDirectory() as folder:
        if compiled:
            print(compare(compiled, compile_again(compiled, Path(folder))))
            return
        for case in CASES:
            made = compile_llama(Path(folder), *case)
            print(compare(made.folder, made), flush=True)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled folder, and what its code was written from: the graph of one rank, and the plan."""

    folder: Path
    graph: Graph
    plan: Plan


def compile_llama(folder: Path, plan_ngpus: int, sequence_length: int, gigabytes: float) -> Compiled:
    model_id = str(Path(__file__).parent.parent / "examples" / "llama3_8b_128k")
    argv = [
        "--model_id",
        model_id,
        "--compiled_dir",
        str(folder),
        "--hardware",
        "h200" if gigabytes > 80 else "h100",
        "--plan_ngpus",
        str(plan_ngpus),
    ]
    return compile_plan([*argv, "--runtime_ngpus", "8", "--gpu_mem_constraint", str(gigabytes)], sequence_length)


def compile_again(compiled: Path, folder: Path) -> Compiled:
    """Compiles what a compiled folder was compiled from.

    Raises:
        RuntimeError: it gives other code.
    """
    inputs = read_plan_file(compiled).inputs
    AutoConfig.for_model(**inputs["config"]).save_pretrained(folder)
    (folder / "hardware.json").write_text(json.dumps({"hardware": inputs["hardware"]}))
    argv = ["--model_id", str(folder), "--compiled_dir", str(folder), "--hardware", str(folder / "hardware.json")]
    options = ("plan_ngpus", "runtime_ngpus", "precision", "attn_implementation", "gpu_mem_constraint")
    for name in (*options, "grad_accumulation_steps"):
        argv += [f"--{name}", str(inputs[name])]
    if inputs["deterministic"]:
        argv += ["--deterministic"]
    if inputs["recompute_modules"] is not None:
        argv += ["--recompute_modules", ",".join(inputs["recompute_modules"])]
    if inputs["plan"]:
        (folder / "forced.json").write_text(json.dumps({"decisions": inputs["plan"]}))
        argv += ["--plan", str(folder / "forced.json")]
    again = compile_plan(argv, inputs["sequence_length"])
    if (again.folder / "gencode.py").read_text() != (compiled / "gencode.py").read_text():
        raise RuntimeError(f"{compiled}: this compiler makes other code of it; compile it again")
    return again


def compile_plan(argv: list[str], sequence_length: int) -> Compiled:
    """What train.py --run_mode compile does with these arguments."""
    argv = ["--run_mode", "compile", "--engine", "torch", "--sequence_length", str(sequence_length), *argv]
    train.register_loss()
    job = parse_job(argv)
    job = dataclasses.replace(job, name=f"{sequence_length}-{job.plan_ngpus}of{job.runtime_ngpus}")
    with mock.patch.object(codegen, "generate", wraps=codegen.generate) as generate:
        builtin.ensure_compiled(job)
    graph, plan, _ = generate.call_args.args
    return Compiled(job.compiled_folder, graph, plan)


def predict(compiled: Compiled, facts: PlanFile) -> memory.MemoryPrediction:
    parameters, world_size = compiled.graph.all_parameters(), facts.inputs["runtime_ngpus"]
    plan_sharded = {parameters[name] for name in facts.module.plan_sharded}
    return memory.predict(compiled.graph, compiled.plan.recompute, world_size, plan_sharded)


def compare(folder: Path, compiled: Compiled) -> str:
    """A Markdown table of what is predicted and what is counted for a compiled folder, in GB."""
    facts = read_plan_file(folder)
    inputs, recompute = facts.inputs, facts.decisions.recompute
    predicted, counted = predict(compiled, facts), count(folder, facts)
    policies = ", ".join(f"{recompute.count(p)} {p}" for p in dict.fromkeys(recompute))
    lines = [
        f"\n{facts.module.class_name}, {inputs['sequence_length']:,} tokens, plan_ngpus {inputs['plan_ngpus']} of "
        f"{inputs['runtime_ngpus']}, layers recompute: {policies}; peak predicted in the {predicted.moment}.\n",
        "| GB | predicted | counted | ratio |\n| --- | --- | --- | --- |",
    ]
    for row, (fields, kinds) in KINDS.items():
        lines.append(_row(row, sum(getattr(predicted, f) for f in fields), sum(counted.get(k, 0) for k in kinds)))
    listed = {k for _, kinds in KINDS.values() for k in kinds}
    lines.append(_row("inputs", 0, sum(size for kind, size in counted.items() if kind not in listed)))
    return "\n".join([*lines, _row("peak", predicted.peak, sum(counted.values()))])


def _row(name: str, predicted: float, counted: float) -> str:
    ratio = f"{predicted / counted:.3f}" if min(predicted, counted) > 1e6 else ""
    return f"| {name} | {predicted / 1e9:.2f} | {counted / 1e9:.2f} | {ratio} |"


# --- counting ------------------------------------------------------------------------------------------------------


def count(compiled: Path, facts: PlanFile) -> dict[_FSDPRefType, int]:
    """Bytes of rank 0 at its peak, by the tracker's kinds."""
    # AdamW's step is left out: on a GPU its fused kernel works in place.
    inputs = facts.inputs
    with _rank_zero(inputs["runtime_ngpus"]), ExitStack() as stack:
        module = parallel.load_generated(compiled, facts.module.class_name)
        stack.enter_context(_gpu_kernels(module))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        dtype = DTYPES[inputs["precision"]]
        parts = (facts.module.layers_path, CPU, dtype, inputs["plan_ngpus"], facts.module.plan_sharded)
        sharded = parallel.parallelize(module, *parts)
        optimizer = trainer.make_optimizer(
            sharded, Job(model_id="", sequence_length=1, runtime_ngpus=1, name="")
        )  # no size depends on the rates
        tokens, labels = (torch.zeros(1, inputs["sequence_length"], dtype=torch.long) for _ in range(2))
        tracker = FSDPMemTracker(module, optimizer)
        tracker.track_inputs((tokens, labels))
        plan_sharded = [module.get_parameter(name) for name in sharded.plan_sharded]
        for parameter in plan_sharded:  # the tracker finds FSDP's only
            tracker._update_and_maybe_create_winfos(parameter, _FSDPRefType.SHARDED_PARAM)
        with tracker, _KernelWorkspace():
            for _ in range(2):
                module(tokens, labels).backward()
                tracker.reset_mod_stats()
                for gradient in (p.grad for p in plan_sharded if p.grad is not None):
                    tracker._update_and_maybe_create_winfos(gradient, _FSDPRefType.SHARDED_GRAD)
            parallel.reduce_plan_sharded_gradients(sharded)
        peak = tracker.get_tracker_snapshot("peak")[CPU]
    return {kind: size for kind, size in peak.items() if isinstance(kind, _FSDPRefType)}


@contextmanager
def _rank_zero(world_size: int) -> Iterator[None]:
    """This process as rank 0 of many that are not there; meshes, which hold ranks, are made of real tensors."""
    init_device_mesh = parallel.init_device_mesh

    def real_mesh(*args, **kwargs):
        with unset_fake_temporarily():
            return init_device_mesh(*args, **kwargs)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with mock.patch.object(parallel, "init_device_mesh", real_mesh):
            yield
    finally:
        dist.destroy_process_group()


# --- kernels -------------------------------------------------------------------------------------------------------


@contextmanager
def _gpu_kernels(module: nn.Module) -> Iterator[None]:
    """Inside, what generated code calls allocates and keeps what it does on a GPU."""
    gencode = type(module).forward.__globals__
    loss = {"chunk_linear_cross_entropy": loss_on_gpu} if "chunk_linear_cross_entropy" in gencode else {}
    with (
        mock.patch.object(attention, "sdpa", _sdpa_on_gpu),
        mock.patch.object(pieces, "kernel_for", lambda query, kernel: pieces.FLASH),
        mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: _FusedRmsNorm.apply(x, weight)),
        mock.patch.dict(gencode, loss),
    ):
        yield


def _sdpa_on_gpu(query, key, value, scale, dropout, implementation="sdpa", is_causal=False, attn_mask=None):
    """FlashAttention-2 as torch has it; with a mask, the memory-efficient kernel, which wants a key for each query."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout, is_causal, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    bias = query.new_empty(attn_mask.shape).expand(*query.shape[:2], *attn_mask.shape)
    return efficient(query, key, value, bias, True, dropout, is_causal, scale=scale)[0]


class _KernelWorkspace(TorchDispatchMode):
    """What flash attention's backward holds while it runs, in C++ and so unseen: the row sums of grad * out and the
    query's gradient in float32, and for grouped queries the keys' and values' gradients of each query head."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
            _, query, key, value = args[:4]
            grouped = query.shape[1] // key.shape[1]
            held = [torch.empty_like(x.repeat_interleave(grouped, 1)) for x in (key, value) if grouped > 1]
            held += [torch.empty_like(query, dtype=torch.float32), torch.empty(query.shape[:3], dtype=torch.float32)]
            del held
        return result


class _FusedRmsNorm(torch.autograd.Function):
    """Allocates what aten._fused_rms_norm, and its backward, does on a GPU."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def loss_on_gpu(hidden_states, weight, labels, padding_idx=-100, chunk_size=CHUNK_SIZE, logit_softcap=0.0):
    return _Loss.apply(hidden_states, weight, labels, chunk_size)


class _Loss(torch.autograd.Function):
    """Allocates what chunk_linear_cross_entropy does with its Triton kernel."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, chunk_size):
        checked, counts = torch.empty_like(labels), torch.empty_like(labels, dtype=torch.bool)
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.empty_like(weight, dtype=torch.float32)
        n_rows = -(-labels.numel() // -(-labels.numel() // chunk_size))
        logits = hidden_states.new_empty(n_rows, -(-weight.shape[0] // 16) * 16, dtype=torch.float32)
        grad_chunk = hidden_states.new_empty(n_rows, weight.shape[1])
        del logits, grad_chunk
        ctx.save_for_backward(hidden_states, weight, checked, counts, grad_hidden, grad_weight)
        return hidden_states.new_empty(labels.shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_losses):
        hidden_states, weight, _, _, grad_hidden, grad_weight = ctx.saved_tensors
        in_place = weight.dtype == torch.float32
        return grad_hidden, grad_weight if in_place else torch.empty_like(weight), None, None


if __name__ == "__main__":
    main()
