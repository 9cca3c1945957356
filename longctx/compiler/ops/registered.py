"""Functions that are operators: `register_op`, for attention, RMSNorm, the loss, and whatever a user adds.

Tracing records a registered function as one node, and generated code calls the Python function itself, so that its own
autograd runs. Besides the annotation everything may be left to the defaults: FLOPs and what autograd keeps are then
counted by running the function once on meta tensors, which computes nothing, under PyTorch's own FLOP counter and
saved-tensor hooks.
"""

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.compiler.annotation import Annotation, parse
from longctx.compiler.ir import Op, Tensor, map_tensors, nbytes, storage_of
from longctx.compiler.ops.python import by_name
from longctx.compiler.ops.spec import Flops, OpSpec, Shares, may_draw, not_partitioned
from longctx.errors import AnnotationError, one_line


@dataclass(frozen=True)
class RegisteredOp:
    """A function that tracing records as one node and that generated code calls."""

    fn: Callable
    annotation: str | Callable[..., str]
    spec: OpSpec

    @property
    def name(self) -> str:
        """The `target` of its ops: where generated code imports it from."""
        return target_of(self.fn)

    def annotate(self, args: tuple, kwargs: dict) -> Annotation:
        """The annotation for these arguments."""
        text = self.annotation if isinstance(self.annotation, str) else self.annotation(*args, **kwargs)
        return parse(text)

    @property
    def annotation_untold(self) -> str | Callable[..., str]:
        """The annotation for an engine that tells the function nothing: what a rank has to be told of is not split."""
        if self.spec.told is None or not isinstance(self.annotation, str):
            return self.annotation
        return re.sub(rf"\b{self.spec.told.dim}\b\+?", f"{self.spec.told.dim}^", self.annotation)

    def fingerprint(self) -> str:
        """What the annotation is, the same in every process: its text, or where its function is and the source there.

        The whole file counts, since the function may use anything in it.
        """
        if isinstance(self.annotation, str):
            return self.annotation
        file = inspect.getsourcefile(self.annotation)
        source = Path(file).read_bytes() if file and Path(file).is_file() else self.annotation.__code__.co_code
        return f"{self.annotation.__module__}.{self.annotation.__qualname__} {hashlib.sha256(source).hexdigest()}"


REGISTERED_OPS: dict[str, RegisteredOp] = {}


def register_op(annotation: str | Callable[..., str], **rules: Any) -> Callable[[Callable], Callable]:
    """Registers a module-level function as an operator: `@register_op('b l^ -> b l^')`, or `register_op(...)(fn)`.

    The annotation's entries stand for the function's first arguments, in order; the rest are values, never partitioned.

    Args:
        annotation: a string, or a function of the op's arguments that returns one.
        rules: fields of `OpSpec` but `name` and `partition`, for what the defaults do not know. By default FLOPs and
            what autograd saves are counted on meta tensors, inputs are read once and outputs written once, nothing is
            needed as workspace, and the function may draw random numbers.

    Raises:
        AnnotationError: the annotation is neither text nor a function, or breaks the grammar, or generated code could
            not import the function.
        TypeError: a rule is no field of `OpSpec`.
    """
    if told := sorted({"name", "partition"} & set(rules)):
        raise AnnotationError(f"register_op: {told[0]} is told by the function and its annotation; leave it out")
    if isinstance(annotation, str):
        parse(annotation)
    elif not isinstance(annotation, FunctionType):
        raise AnnotationError(
            f"register_op: annotation {annotation!r} is neither a string nor a function that returns one"
        )

    def register(fn: Callable) -> Callable:
        if fn.__qualname__ != fn.__name__ or fn.__module__ == "__main__":
            raise AnnotationError(
                f"register_op: {fn.__module__}.{fn.__qualname__} can't be imported by generated code; "
                "move it to the top level of a module of its own"
            )
        if isinstance(annotation, str) and len(parse(annotation).inputs) > len(inspect.signature(fn).parameters):
            raise AnnotationError(
                f"register_op: annotation {annotation!r} has more inputs than {fn.__name__} has arguments"
            )
        op = RegisteredOp(fn, annotation, _spec(fn, rules))
        REGISTERED_OPS[op.name] = op
        return fn

    return register


def target_of(fn: Callable) -> str:
    """The `target` of a registered function's ops."""
    return f"{fn.__module__}.{fn.__name__}"


def arguments_of(op: Op) -> dict[str, Any]:
    """A registered op's arguments by name, those that were left out with their defaults."""
    bound = _signature(REGISTERED_OPS[op.target].fn).bind_partial(*op.args, **op.kwargs)
    bound.apply_defaults()
    return bound.arguments


@cache
def _signature(fn: Callable) -> inspect.Signature:
    return inspect.signature(fn)


def _spec(fn: Callable, rules: dict[str, Any]) -> OpSpec:
    defaults = {
        "python": by_name,
        "flops": lambda op: _counted(op).flops,
        "saves": lambda op: _counted(op).saves,
        "saves_besides": lambda op: _counted(op).saves_besides,
        "draws_random": may_draw,
    }
    return OpSpec(fn.__name__, not_partitioned, **{**defaults, **rules})


# --- the defaults: one call on meta tensors --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counted:
    """What one call of a function was seen to do."""

    flops: Flops
    saves: list[Tensor]
    saves_besides: Shares


def _counted(op: Op) -> _Counted:
    """What a call of the op's function does, counted once for all calls with the same shapes and values."""
    try:
        flops, saved_inputs, saved_outputs, other_bytes = _count(op.target, _key(op))
    except Exception as error:  # whatever a function that has no backward on meta tensors raises
        raise AnnotationError(
            f"register_op: {op.target} can't be run forward and backward on meta tensors, to count its FLOPs and what "
            f"it saves ({one_line(error)}); give register_op its flops, saves and saves_besides"
        ) from error
    saves = [op.inputs[i] for i in saved_inputs] + [op.outputs[i] for i in saved_outputs]
    return _Counted(flops, saves, {op.outputs[0]: other_bytes / nbytes(op.outputs[0])} if other_bytes else {})


@dataclass(frozen=True)
class _Key:
    """The arguments of a call, compared by the tensors' shapes, dtypes and need of a gradient, and all else as text."""

    text: str
    op: Op

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


def _key(op: Op) -> _Key:
    facts = map_tensors((op.args, op.kwargs), lambda t: (t.shape, t.dtype, t.requires_grad))
    return _Key(repr(facts), op)


@cache
def _count(target: str, key: _Key) -> tuple[Flops, tuple[int, ...], tuple[int, ...], float]:
    """FLOPs; the places of the inputs and outputs that autograd keeps; and the bytes that it keeps besides them."""
    fn, op = REGISTERED_OPS[target].fn, key.op
    metas = {t: _meta(t) for t in op.inputs}
    args, kwargs = map_tensors((op.args, op.kwargs), metas.__getitem__)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[storage_of(tensor)] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
            result = fn(*args, **kwargs)
        forward = counter.get_total_flops()
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        differentiable = [out for out in outputs if out.requires_grad]
        if differentiable:
            wanted = [meta for meta in metas.values() if meta.requires_grad]
            gradients = [torch.empty_like(out) for out in differentiable]
            torch.autograd.grad(differentiable, wanted, gradients, allow_unused=True)
    flops = Flops(float(forward), float(counter.get_total_flops() - forward))
    saved_inputs = tuple(i for i, t in enumerate(op.inputs) if kept.pop(storage_of(metas[t]), None) is not None)
    saved_outputs = tuple(i for i, out in enumerate(outputs) if kept.pop(storage_of(out), None) is not None)
    return flops, saved_inputs, saved_outputs, float(sum(t.untyped_storage().nbytes() for t in kept.values()))


def _meta(tensor: Tensor) -> torch.Tensor:
    """A tensor without values, and no leaf of the graph: a function may write to its inputs in place."""
    leaf = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
    with torch.enable_grad():
        return leaf.clone()
