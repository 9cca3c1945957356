"""Routes what a Hugging Face model computes token by token to this program's kernels: convolutions, recurrences, and
the sums over tokens that a mixture of experts is balanced by.

transformers has each recurrence as a function beside the models that use it, once for each family, which other
packages may replace by kernels of theirs. What it has itself loops over the tokens, so that tracing it at long context
would take forever. A function is told by its parameters, and is replaced only if ours gives the same on random numbers.
It is replaced for the modules of this one model, while their forward runs; elsewhere transformers keeps its own.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from longctx.errors import ModelError
from longctx.kernels.causal_conv1d import causal_conv1d
from longctx.kernels.experts import balance
from longctx.kernels.linear_attention import decaying_linear_attention, gated_delta_rule
from longctx.kernels.selective_scan import bounded_sqrt, linear_recurrence, selective_scan


def route_recurrences(model: nn.Module) -> None:
    """Gives every module whose forward calls such a function a forward that calls ours.

    Raises:
        ModelError: a function has the parameters of one that is known here and computes something else.
    """
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        functions, methods = _replacements(type(module), forward)
        for name, ours in methods.items():
            setattr(module, name, types.MethodType(ours, module))
        if functions:
            module.forward = _calling(module.forward, forward.__globals__, functions)
        if _is_causal_convolution(module):
            module.forward = types.MethodType(_convolution_forward, module)


def _calling(forward: Callable, namespace: dict[str, Any], ours: dict[str, Any]) -> Callable:
    """The forward, while which the names in `ours` stand for something else in the file that it is from."""

    @functools.wraps(forward)
    def calling(*args, **kwargs):
        theirs = {name: namespace[name] for name in ours}
        namespace.update(ours)
        try:
            return forward(*args, **kwargs)
        finally:
            namespace.update(theirs)

    return calling


@functools.cache
def _replacements(owner: type, forward: Callable) -> tuple[dict[str, Any], dict[str, Callable]]:
    """What a class's forward uses by name and ours replaces: what stands in its file, and methods."""
    names = forward.__code__.co_names
    functions = {name: _ours_for(forward.__globals__.get(name)) for name in names}
    methods = {name: _ours_for(getattr(owner, name, None)) for name in names}
    functions, methods = ({n: ours for n, ours in found.items() if ours} for found in (functions, methods))
    return functions, methods


def _ours_for(theirs: Any) -> Any:
    """What replaces a function of transformers; None if it is none, or no recurrence.

    Raises:
        ModelError: it has the parameters of one that is known here and computes something else.
    """
    if isinstance(theirs, type) and issubclass(theirs, torch.autograd.Function):
        return BoundedSquareRoot if _is_bounded_square_root(theirs) else None
    if not inspect.isfunction(theirs):
        return None
    theirs = inspect.unwrap(theirs)
    parameters = set(inspect.signature(theirs).parameters)
    for recurrence in RECURRENCES:
        if recurrence.parameters <= parameters and "conv_state" not in parameters:
            if _same(theirs, recurrence):
                return recurrence.ours
            if recurrence.may_differ:
                return None
            raise ModelError(
                f"{theirs.__module__}.{theirs.__name__} has the parameters of a function that this program knows "
                "and computes something else; choose another model"
            )
    return None


def _same(theirs: Callable, recurrence: "Recurrence") -> bool:
    """Whether both functions give the same on the first of the samples that transformers' function takes."""
    for draw in recurrence.samples:
        sample = draw(torch.Generator().manual_seed(0))
        with torch.no_grad():
            try:
                expected = _output(theirs(**sample))
            except (RuntimeError, TypeError, ValueError, IndexError):  # it takes tensors of other shapes
                continue
            found = _output(recurrence.ours(**sample))
        return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-4, atol=1e-5)
    return False


def _output(result: Any) -> torch.Tensor:
    """The output of a function that may return a state behind it."""
    return result[0] if isinstance(result, tuple) else result


def _is_bounded_square_root(function: type[torch.autograd.Function]) -> bool:
    """Whether it computes what BoundedSquareRoot does, its gradient too, which tracing would lose."""
    x = torch.tensor([0.0, 1e-9, 1e-6, 0.3], requires_grad=True)
    try:
        expected, found = (f.apply(x) for f in (function, BoundedSquareRoot))
        slopes = [torch.autograd.grad(result.sum(), x)[0] for result in (expected, found)]
    except (RuntimeError, TypeError, ValueError):  # it takes something else
        return False
    return torch.allclose(expected, found) and torch.allclose(slopes[0], slopes[1])


def _is_causal_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution of each channel alone, padded so that it begins before the first token."""
    if type(module) is not nn.Conv1d or module.padding_mode != "zeros":
        return False
    alone = module.groups == module.in_channels == module.out_channels
    return alone and (module.stride, module.dilation, module.padding) == ((1,), (1,), (module.kernel_size[0] - 1,))


# --- transformers' functions, as ours compute them -------------------------------------------------------------------


def _convolve(hidden_states, weight, bias=None, activation=None, **others):
    """causal_conv1d_fn: [b, channels, l], [channels, k], [channels] -> [b, channels, l]."""
    _check_neutral(others)
    silu = activation in ("silu", "swish")
    output = causal_conv1d(hidden_states, weight, bias, silu)
    return output if silu or activation is None else ACT2FN[activation](output)


def _gated_delta_rule(
    query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **others
):
    """chunk_gated_delta_rule: [b, l, heads, d] or [b, l, heads] each -> ([b, l, heads, e], no state)."""
    _check_stateless(initial_state, output_final_state)
    _check_neutral(others)
    return gated_delta_rule(query, key, value, g, beta, key.shape[-1] ** -0.5, use_qk_l2norm_in_kernel), None


def _mamba2_scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **others,
):
    """mamba_chunk_scan_combined: [b, l, heads, e], [b, l, heads], [heads], twice [b, l, groups, d] -> the first."""
    _check_stateless(initial_states, return_final_states)
    _check_neutral(others)
    dt = _time_step(dt, dt_bias, dt_softplus).clamp(*dt_limit).float()
    hidden_states = hidden_states.float()
    output = decaying_linear_attention(C, B, hidden_states * dt.unsqueeze(-1), A.float() * dt)
    return output if D is None else output + D.unsqueeze(-1) * hidden_states


def _mamba_scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    **others,
):
    """selective_scan_fn: twice [b, channels, l], [channels, n], twice [b, n, l] -> [b, channels, l]."""
    _check_stateless(None, return_last_state)
    _check_neutral(others)
    dt = _time_step(dt, None if delta_bias is None else delta_bias.unsqueeze(-1), delta_softplus)
    output = selective_scan(hidden_states, dt, A, B, C)
    if D is not None:
        output = output + hidden_states * D.unsqueeze(-1)
    return output if z is None else output * F.silu(z)


def _recurrence(self, hidden_states, recurrent_gate, reset, recurrent_states=None, acc_dtype=torch.float32):
    """RecurrentGemma's _rnn_scan: twice [b, l, channels], [1, l, 1] -> ([b, l, channels], no state)."""
    _check_stateless(recurrent_states, False)
    return linear_recurrence(recurrent_gate * ~reset, hidden_states), None


def _load_balancing_loss(gate_logits, num_experts: Any = None, top_k=2, attention_mask=None):
    """load_balancing_loss_func (arXiv:2101.03961, equations 4 to 6): of each layer [n, experts] -> []; 0 for none."""
    if not isinstance(gate_logits, tuple):
        return 0
    _check_neutral({"attention_mask": attention_mask})
    sums = torch.stack([balance(logits, top_k) for logits in gate_logits]).sum(0)
    counts, probabilities = (sums / sum(logits.shape[0] for logits in gate_logits)).unbind()
    return num_experts * (counts * probabilities).sum()


class BoundedSquareRoot:
    """RecurrentGemma's SqrtBoundDerivative."""

    @staticmethod
    def apply(x: torch.Tensor) -> torch.Tensor:
        return bounded_sqrt(x)


def _convolution_forward(self: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """nn.Conv1d's output, which is k - 1 tokens longer than its input: [b, channels, l] -> [b, channels, l + k - 1]."""
    beyond = torch.zeros(*x.shape[:2], self.kernel_size[0] - 1, dtype=x.dtype, device=x.device)
    return causal_conv1d(torch.cat((x, beyond), dim=2), self.weight.squeeze(1), self.bias)


def _time_step(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _check_stateless(state: torch.Tensor | None, returns_state: bool) -> None:
    if state is not None or returns_state:
        raise ModelError("it carries a state from row to row, and rows are trained apart; choose another model")


def _check_neutral(others: dict[str, Any]) -> None:
    """Raises a ModelError for an argument that ours lacks, unless no result depends on it."""
    for name, value in others.items():
        if name not in NEUTRAL and value is not None and value is not False:
            raise ModelError(
                f"it gives a recurrence or a convolution the argument {name}, which this program does not know; "
                "choose another model"
            )


NEUTRAL = {"chunk_size", "use_associative_scan"}  # in what pieces and order the same sums are made


@dataclass(frozen=True)
class Recurrence:
    """A function of transformers, told by its parameters; what replaces it; and arguments by which both are compared.

    Attributes:
        samples: draw arguments; of several the first that the function takes is used.
        may_differ: whether a function that computes something else is traced as it is, and no reason to refuse a model.
    """

    parameters: frozenset[str]
    ours: Callable
    samples: tuple[Callable[[torch.Generator], dict[str, Any]], ...]
    may_differ: bool = False


def _convolution_sample(generator: torch.Generator) -> dict[str, Any]:
    shapes = {"hidden_states": (2, 6, 9), "weight": (6, 4), "bias": (6,)}
    return {**_drawn(shapes, generator), "activation": "silu"}


def _gated_delta_sample(generator: torch.Generator) -> dict[str, Any]:
    shapes = {"query": (2, 9, 2, 8), "key": (2, 9, 2, 8), "value": (2, 9, 4, 6), "g": (2, 9, 4), "beta": (2, 9, 4)}
    drawn = _drawn(shapes, generator)
    return {**drawn, "g": -drawn["g"].abs(), "beta": drawn["beta"].sigmoid(), "use_qk_l2norm_in_kernel": True}


def _repeated_keys_sample(generator: torch.Generator) -> dict[str, Any]:
    """With as many key heads as value heads, as older releases of transformers (5.17) want them."""
    sample = _gated_delta_sample(generator)
    return {**sample, **{name: sample[name].repeat_interleave(2, dim=2) for name in ("query", "key")}}


def _mamba2_sample(generator: torch.Generator) -> dict[str, Any]:
    shapes = {"hidden_states": (2, 9, 4, 6), "dt": (2, 9, 4), "A": (4,), "B": (2, 9, 2, 8), "C": (2, 9, 2, 8)}
    drawn = _drawn({**shapes, "D": (4,), "dt_bias": (4,)}, generator)
    return {**drawn, "A": -drawn["A"].abs(), "dt_softplus": True, "dt_limit": (0.1, 0.9), "chunk_size": 4}


def _mamba_sample(generator: torch.Generator) -> dict[str, Any]:
    shapes = {"hidden_states": (2, 6, 9), "dt": (2, 6, 9), "A": (6, 4), "B": (2, 4, 9), "C": (2, 4, 9)}
    drawn = _drawn({**shapes, "D": (6,), "z": (2, 6, 9), "delta_bias": (6,)}, generator)
    return {**drawn, "A": -drawn["A"].abs(), "delta_softplus": True}


def _recurrence_sample(generator: torch.Generator) -> dict[str, Any]:
    drawn = _drawn({"hidden_states": (2, 9, 6), "recurrent_gate": (2, 9, 6)}, generator)
    reset = torch.arange(9).view(1, 9, 1) % 4 == 0
    return {"self": None, **drawn, "reset": reset, "recurrent_states": None}


def _router_sample(generator: torch.Generator) -> dict[str, Any]:
    drawn = _drawn({"first": (9, 4), "second": (9, 4)}, generator)
    return {"gate_logits": tuple(drawn.values()), "num_experts": 4, "top_k": 2}


def _drawn(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


_SCAN = frozenset(("hidden_states", "dt", "A", "B", "C"))
RECURRENCES = (
    Recurrence(frozenset(("gate_logits", "num_experts", "top_k")), _load_balancing_loss, (_router_sample,), True),
    Recurrence(frozenset(("hidden_states", "weight", "bias", "activation")), _convolve, (_convolution_sample,)),
    Recurrence(
        frozenset(("query", "key", "value", "g", "beta", "chunk_size")),
        _gated_delta_rule,
        (_gated_delta_sample, _repeated_keys_sample),
    ),
    Recurrence(_SCAN | {"chunk_size"}, _mamba2_scan, (_mamba2_sample,)),
    Recurrence(_SCAN | {"delta_softplus"}, _mamba_scan, (_mamba_sample,)),
    Recurrence(frozenset(("hidden_states", "recurrent_gate", "reset")), _recurrence, (_recurrence_sample,)),
)
