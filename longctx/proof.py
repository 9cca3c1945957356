"""The proof of a model: before its plan is made, its generated code is compared with the model itself.

What can go wrong between a model and its code is a silent loss of numbers: an operator that tracing drops, a mask that
is not built, a norm that was taken for another. So each model is run once as transformers runs it, with its own eager
attention, in float32 on the CPU, and once as generated code, on the same row with the same weights: the loss and every
gradient have to be equal. Where the documents of a row do not see each other, transformers runs them one by one. The
model is a small one of the same configuration, which runs the same operators in every kind of layer; that it does is
checked.

A proof holds for a configuration, this program's code, and the versions of PyTorch and transformers. It is remembered
in the user's cache folder: longctx/proofs in $XDG_CACHE_HOME, or in ~/.cache.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longctx import compiled, sources
from longctx.atomic import whole_file
from longctx.compiler import codegen
from longctx.compiler.ir import DOCUMENT_STARTS, Graph, Op, Tensor
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.ops import legal_partitions, spec_of
from longctx.compiler.ops.aten import is_aten
from longctx.compiler.ops.spec import View
from longctx.compiler.plan import Plan
from longctx.compiler.recompute import Recompute
from longctx.compiler.trace import sample_row, trace
from longctx.data.rows import IGNORE_INDEX, apart
from longctx.errors import ModelError, ProofError, UserError, one_line
from longctx.huggingface.build import build_model
from longctx.huggingface.configuration import vocab_size
from longctx.huggingface.shrink import small_configs
from longctx.runtime import parallel
from longctx.schema import decode, read_json

LEAST_LENGTH = 31  # of rows of which a square is no width that a model may have
# A row's length is a prime, so that no width of the model is a multiple of it, and a chunk and a bit of the scans'.
LENGTHS = (67, 61, 47, 31, 23, 13, 7, 5, 3, 2)
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4
ROUNDINGS = 5  # how many times its own rounding a model's gradients may be off where that is more
NOT_COMPARED = {"dropout", "deterministic", "implementation", "imbalance"}  # options that a proof is made without
SMALL = 1e-4  # of the norm of all gradients: less is nothing but rounding, as the gradient of a key's bias is
MOST_PARAMETERS = 500_000_000  # 16 bytes each: two models and their gradients


@dataclass(frozen=True)
class Proof:
    """How far generated code is from the model: the gradient that is furthest beyond what is allowed is `parameter`'s.

    `rounding` is how far the model's own gradient of it in float32 is from that in float64, where that was asked.
    """

    loss_error: float
    gradient_error: float
    parameter: str
    rounding: float = 0.0

    @property
    def holds(self) -> bool:  # no comparison holds for a NaN
        return self.loss_error < LOSS_TOLERANCE and self.gradient_error < allowed(self.rounding)


def allowed(rounding: float) -> float:
    """How far the gradient of a parameter may be off whose own rounding is so large."""
    return max(GRADIENT_TOLERANCE, ROUNDINGS * rounding)


def may_be_rounding(gradient_error: float) -> bool:
    """Whether a gradient is so little off that the model's own rounding may explain it."""
    return GRADIENT_TOLERANCE <= gradient_error < 100 * GRADIENT_TOLERANCE


def prove(graph: Graph, config: PreTrainedConfig, sequence_length: int) -> Proof:
    """Proves the model that `graph` was traced from, unless that is remembered.

    Args:
        config: the model's, as it was loaded.

    Raises:
        ProofError: the generated code computes something else, or no small model of the same kinds could be run.
        ModelError: a tensor of the model grows with the square of the sequence length.
    """
    length = next(length for length in LENGTHS if length <= sequence_length)
    signature = _signature(graph)
    small, *_ = candidates = list(small_configs(config, sequence_length, length, _layers_with_all_kinds(graph)))
    key = [config.to_json_string(), small.to_json_string(), length, signature, *_code()]
    file = cache_folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"
    with suppress(ValueError):
        if (remembered := decode(Proof, read_json(file))).holds:
            return remembered
    proof = _prove(candidates, signature, length, graph.class_name, _keeps_documents_apart(graph))
    with suppress(OSError), whole_file(file) as aside:  # a home may be one that can't be written to
        aside.write_text(json.dumps(dataclasses.asdict(proof)))
    return proof


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longctx" / "proofs"


def _code() -> list:
    """All else that a proof depends on."""
    rows = sources.PACKAGE / "data" / "rows.py"  # by which documents are taken apart
    files = [*sources.files_in("compiler", "kernels", "huggingface"), rows, Path(__file__)]
    return [sources.hash_registered_ops(), sources.hash_files(files), torch.__version__, transformers.__version__]


def _prove(
    candidates: list[PreTrainedConfig], signature: list, length: int, class_name: str, documents_apart: bool
) -> Proof:
    """The proof by the first of the small models that has the signature of the large one.

    Args:
        documents_apart: whether the documents of a row do not see each other.
    """
    reason = f"none of its layers can be had with fewer than {MOST_PARAMETERS:,} parameters"
    for config in candidates:
        try:
            model = build_model(config, torch.float32, "auto", length, documents_apart=documents_apart)
            if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
                continue
            graph = trace(model, sample_row(length, len(_documents(length)) if documents_apart else 0))
        except UserError as error:
            reason = one_line(error)
            continue
        if (difference := _difference(_signature(graph), signature)) is not None:
            reason = f"a smaller one computes something else in {difference}"
            continue
        check_no_squares(graph, length)
        proof = compare(graph, config, length)
        if not proof.holds:
            raise ProofError(
                f"the code generated for {class_name} does not compute what transformers computes"
                f"{' of the documents of a row, one by one' if documents_apart else ''}: in a small model of "
                f"its kind the loss differs by {proof.loss_error:.1e} and the gradient of {proof.parameter} by "
                f"{proof.gradient_error:.1e}; choose another model"
            )
        return proof
    raise ProofError(f"{class_name} can't be compared with transformers' own at a small size ({reason})")


# --- what a graph computes, sizes aside ------------------------------------------------------------------------------


def _signature(graph: Graph) -> list:
    """What the root and each kind of layer run, in order: a module, an operator and the options it is given."""
    kinds = {json.dumps([kind.source_class, _calls(list(kind.ops))]): None for kind in graph.kinds}
    (_, root), *_ = graph.bodies()
    return [json.dumps([graph.class_name, _calls(root)]), *kinds]


def _calls(ops: list[Op]) -> list:
    calls = filter(_counts, ops)
    return [[op.module, op.target, sorted(op.kwargs.keys() - NOT_COMPARED)] for op in calls]


def _counts(op: Op) -> bool:
    """Whether an operator is part of what a model computes, whatever its sizes and its precision.

    Dropout is no part, since a comparison is made without, nor are casts, which float32 has fewer of, nor views: one of
    all the elements there are is left out by tracing.
    """
    spec = spec_of(op)
    return not is_aten(op) or not (spec.keeps_name or spec.draws_random(op) or spec.view is View.ALWAYS)


def _difference(found: list, expected: list) -> str | None:
    """The class in which two signatures differ first; None if nowhere. The order of kinds doesn't matter."""
    for text in sorted(set(found) ^ set(expected)):
        return json.loads(text)[0]
    return None


def _layers_with_all_kinds(graph: Graph) -> int:
    """The number of first layers in which every kind comes: two at least, where there are as many."""
    first = {call.kind: call.index for call in reversed(graph.layer_calls)}
    return min(max([1, *first.values()]) + 1, max(1, len(graph.layer_calls)))


def check_no_squares(graph: Graph, length: int) -> None:
    """Raises a ModelError if a tensor outside attention's operator grows with the square of the sequence length.

    It can't be seen in a graph for few tokens, nor where some weight is as wide as the row is long.

    Args:
        length: that the graph was traced for.
    """
    widths = {size for tensor in graph.all_parameters().values() for size in tensor.shape}
    if length < LEAST_LENGTH or widths & _as_long_as(length):
        return
    for op in graph.all_ops():
        for tensor in op.outputs if is_aten(op) else ():
            long = [size for size in tensor.shape if size in _as_long_as(length) or size and size % length**2 == 0]
            if len(long) > 1 or any(size % length**2 == 0 for size in long):
                raise ModelError(_say_square(graph, op, tensor, length))


def _as_long_as(length: int) -> set[int]:
    """The lengths of dimensions that grow with the row: of its tokens, and of the distances between them."""
    return {length, 2 * length - 1}  # odd numbers, as widths are not


def _say_square(graph: Graph, op: Op, tensor: Tensor, length: int) -> str:
    shape = ", ".join("l" if size == length else str(size) for size in tensor.shape)
    place = f"line {op.statement.place[1]} of {Path(op.statement.place[0]).name}" if op.statement else "it"
    return (
        f"{op.module or graph.class_name} makes a tensor that grows with the square of the sequence length "
        f"({place} makes [{shape}], where l is the length), which no memory holds at long context; choose another model"
    )


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(graph: Graph, config: PreTrainedConfig, length: int) -> Proof:
    """Runs the model as transformers has it, and the code of a plan for one rank, on one row.

    Args:
        graph: of that model, traced at `length`.

    Raises:
        ProofError: transformers can't run the model, or the generated code doesn't run.
    """
    row, starts = _random_row(vocab_size(config), length), (0,)
    if _keeps_documents_apart(graph):
        starts = _documents(length)
        row = apart(*row, starts)
    tokens, labels = row[:2]
    try:
        model = _random_model(config)
        expected = _own_loss(model, tokens, labels, starts)
        expected.backward()
    except Exception as error:  # whatever a model's own code raises
        raise ProofError(
            f"{graph.class_name} can't be compared with transformers' own, which does not run with eager attention "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    if not expected.isfinite():
        raise ModelError(
            f"transformers' own {graph.class_name} gives a loss that is not finite at a small size; check the numbers "
            "in its config.json"
        )
    weights = model.state_dict()
    try:
        module = _generated_module(graph, weights)
        loss = module(*row)
        loss.backward()
    except Exception as error:
        raise ProofError(
            f"the code generated for {graph.class_name} does not run ({type(error).__name__}: {one_line(error)}); "
            "choose another model"
        ) from error
    error = abs(loss.item() - expected.item()) / abs(expected.item())
    errors = gradient_errors(gradients_of(module), gradients_of(model))
    close = may_be_rounding(max(errors.values()))
    roundings = _own_roundings(model, tokens, labels, starts) if close else dict.fromkeys(errors, 0.0)
    worst = max(errors, key=lambda name: errors[name] / allowed(roundings[name]))
    return Proof(error, errors[worst], worst, roundings[worst])


def _keeps_documents_apart(graph: Graph) -> bool:
    return any(tensor.name == DOCUMENT_STARTS for tensor in graph.inputs)


def _documents(length: int) -> tuple[int, ...]:
    """Where the documents of a row begin: a long one, one of a single token, and two more; fewer in a short row."""
    return tuple(sorted({0, 2 * length // 3, 2 * length // 3 + 1, 3 * length // 4}))


def _own_loss(
    model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor, starts: tuple[int, ...]
) -> torch.Tensor:
    """The summed cross entropy of the model's own logits, one document after another.

    If its configuration asks for its routers' auxiliary loss, it is the loss that the model itself returns, as a sum.
    """
    losses = []
    for start, end in pairwise((*starts, tokens.shape[1])):
        own = labels[:, start:end]
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            mean = model(input_ids=tokens[:, start:end], labels=own, shift_labels=own, use_cache=False).loss
            losses.append((own != IGNORE_INDEX).sum() * mean)
        else:
            logits = model(input_ids=tokens[:, start:end], use_cache=False).logits[0].to(model.dtype)
            losses.append(F.cross_entropy(logits, own[0], ignore_index=IGNORE_INDEX, reduction="sum"))
    return torch.stack(losses).sum()


def _own_roundings(
    model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor, starts: tuple[int, ...]
) -> dict[str, float]:
    """How far each of the model's own gradients, which it has in float32, is from that in float64."""
    rounded = {name: gradient.double() for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    _own_loss(model.double(), tokens, labels, starts).backward()
    return gradient_errors(rounded, gradients_of(model))


def _random_row(vocabulary: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, [1, length] each; every eighth label is left out of the loss."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, 3::8] = IGNORE_INDEX
    return tokens[:, :-1].contiguous(), labels


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model in float32, with weights under which every operator matters: none is 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _generated_module(graph: Graph, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module that compile would write for one rank, with these weights."""
    partitions = {op: legal_partitions(op, 1)[0] for op in graph.all_ops()}
    policies = (Recompute.NOTHING,) * len(graph.layer_calls)
    plan = Plan(Assignment(1, partitions), policies, seconds=0.0, memory=0.0)
    with tempfile.TemporaryDirectory() as name:
        code = codegen.generate(localize(graph, plan.assignment), plan, graph.class_name)
        (Path(name) / compiled.CODE).write_text(code)
        module = parallel.load_generated(Path(name), graph.class_name)
    parallel.give_memory(module, torch.device("cpu"))
    module.load_state_dict({name: weights[name] for name, _ in module.named_parameters()})
    return module


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each parameter by its name; zeros where the loss does not depend on it."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def gradient_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """|found - expected| / |expected| of each parameter's gradient, infinite for one that is no number.

    |expected| counts as SMALL of the norm of all gradients at least: the bias of keys, for one, doesn't change the
    softmax, and its gradient is nothing but rounding. One that is not found counts as zero.
    """
    floor = SMALL * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = {}
    for name, gradient in expected.items():
        off = (found.get(name, torch.zeros_like(gradient)) - gradient).norm() / gradient.norm().clamp_min(floor)
        errors[name] = off.nan_to_num(torch.inf).item()
    return errors
