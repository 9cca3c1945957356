"""Whether what runs here is right: generated code against Hugging Face, the loss against float64, ranks, resuming."""

import copy
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
import families

import train
from benchmarks.gpu_parts.measuring import DEVICE, relative_error
from benchmarks.gpu_parts.results import Measurement, Row
from benchmarks.gpu_parts.training import training_measurements
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx import compiled
from longctx.job import DTYPES
from longctx.runtime import parallel

# Between them: windows, soft-caps, norms of queries and keys, joined projections, scaled logits, tied embeddings.
CHOSEN = ("llama", "gemma2", "qwen3", "phi3", "olmo2", "granite")
LENGTH, VOCAB = 256, 256
PROMISED_LOSS, PROMISED_GRADIENT = 1e-6, 1e-4  # relative errors in float32, of any plan (docs/design.md)
# The largest relative errors of the loss, and of its gradients, which are of the inputs' own dtype.
LOSS_ERRORS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 4e-3), torch.float16: (1e-6, 1e-3)}


def measurements(small: bool, folder: Path) -> Iterator[Measurement]:
    for dtype in LOSS_ERRORS:
        for softcap in (0.0, 30.0):
            name = f"loss in {name_of(dtype)}{f', soft-cap {softcap:g}' if softcap else ''}, against float64"
            yield Measurement(name, partial(loss_rows, name, dtype, softcap))
    with tempfile.TemporaryDirectory() as scratch, parallel.process_group() as device:
        train.register_loss()
        for family in CHOSEN[: 1 if small else None]:
            for precision in DTYPES:
                name = f"{family} in {precision}, against Hugging Face"
                yield Measurement(name, partial(generated_rows, name, family, precision, Path(scratch), device))
    yield from training_measurements(small)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def judged(what: str, note: str, holds: bool) -> list[Row]:
    """A row that is about a promise: one that does not hold has failed."""
    return [Row(what, note=note if holds else f"not as promised: {note}", state="measured" if holds else "failed")]


def loss_rows(name: str, dtype: torch.dtype, softcap: float) -> list[Row]:
    """Every seventh label is left out, and no block or chunk divides the tokens or the vocabulary."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 300, 128, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(1001, 128, device=DEVICE)).to(dtype).requires_grad_()
    labels = torch.randint(1001, (1, 300), device=DEVICE)
    labels[:, ::7] = -100
    losses = chunk_linear_cross_entropy(hidden, weight, labels, -100, 128, softcap)
    found = losses[0], *torch.autograd.grad(losses.sum(), (hidden, weight))

    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = exact_hidden[0] @ exact_weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    losses = F.cross_entropy(logits, labels[0], reduction="none", ignore_index=-100)
    exact = losses, *torch.autograd.grad(losses.sum(), (exact_hidden, exact_weight))

    of_loss, of_hidden, of_weight = map(relative_error, found, exact)
    note = f"errors: loss {of_loss:.1e}, dhidden {of_hidden:.1e}, dweight {of_weight:.1e}"
    loss_limit, gradient_limit = LOSS_ERRORS[dtype]
    return judged(name, note, of_loss <= loss_limit and max(of_hidden, of_weight) <= gradient_limit)


def generated_rows(name: str, family: str, precision: str, folder: Path, device: torch.device) -> list[Row]:
    """Loss and gradients of the generated code against the Hugging Face model's in float32, with the same weights.

    In bfloat16 nothing is promised; there the Hugging Face model's own error in bfloat16 says what to expect.
    """
    config = families.small_config(family)
    reference = families.reference_model(config).to(device)
    row = [part.to(device) for part in families.random_rows(1, LENGTH, VOCAB)]
    expected = gradients(reference, families.reference_loss(reference, *row))

    module = generated_module(config, precision, folder / f"{family}-{precision}", device, reference)
    loss, gradient = errors(gradients(module, module(*row)), expected)
    note = f"errors: loss {loss:.1e}, gradient {gradient:.1e}"
    if precision == "fp32":
        return judged(name, note, loss <= PROMISED_LOSS and gradient <= PROMISED_GRADIENT)
    half = copy.deepcopy(reference).to(DTYPES[precision])
    loss, gradient = errors(gradients(half, families.reference_loss(half, *row)), expected)
    return [Row(name, note=f"{note}; Hugging Face's own in {precision}: loss {loss:.1e}, gradient {gradient:.1e}")]


def generated_module(
    config: PreTrainedConfig, precision: str, folder: Path, device: torch.device, weights: nn.Module
) -> nn.Module:
    """What train.py compiles of a configuration for one rank, with the parameters of another module."""
    config.save_pretrained(folder)
    job = ["--model_id", str(folder), "--sequence_length", str(LENGTH), "--precision", precision]
    train.main(
        ["--run_mode", "compile", "--engine", "torch", *job, "--compiled_dir", str(folder), "--name", "compiled"]
    )
    plan = compiled.read_plan_file(folder / "compiled").module
    module = parallel.load_generated(folder / "compiled", plan.class_name)
    model = parallel.parallelize(module, plan.layers_path, device, DTYPES[precision])
    parallel.load_tensors(model, weights.named_parameters())
    return module


def gradients(model: nn.Module, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient of every parameter by name."""
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    return loss.item(), {name: grad for name, grad in whole.items() if grad is not None}


def errors(found: tuple, expected: tuple) -> tuple[float, float]:
    """Relative errors: of the loss, and the worst of any parameter's gradient."""
    return abs(found[0] - expected[0]) / abs(expected[0]), families.worst_gradient_error(found[1], expected[1])[0]
