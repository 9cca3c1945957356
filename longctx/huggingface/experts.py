"""Gives a mixture of experts this program's experts, by way of transformers' registry of experts functions.

An experts module that takes its function from that registry has its weights under names that all families share, and
says how they lie. What it computes between its products is its own: that is run once on random numbers, to find the
gate of ours that gives the same. Routers and shared experts are traced as what they are.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from longctx.errors import ModelError
from longctx.kernels.experts import ACTIVATIONS, Gate, experts

REGISTERED_NAME = "annotated"  # what models are told as experts_implementation
LEAST_SPREAD = 8.0  # of the random numbers by which gates are compared


def route_experts(model: PreTrainedModel, imbalance: float) -> None:
    """Tells every experts module by which arguments `experts` computes what it does, and which imbalance it allows for.

    Raises:
        ModelError: a module computes something that `experts` does not, or doesn't ask the registry.
    """
    for path, module in model.named_modules():
        if hasattr(module, "_apply_gate"):
            told: Any = arguments_of(module) | ({} if imbalance == 1 else {"imbalance": imbalance})
            module.told_to_experts = told
        elif path.rsplit(".", 1)[-1] == "experts":
            raise ModelError(
                f"the experts of {type(model).__name__} are computed by code of its own, and this program has a "
                "partition of those only that take a function from transformers' registry; choose another model"
            )


def refuse_mixtures(model: PreTrainedModel) -> None:
    """Raises a ModelError for a mixture of experts."""
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is a mixture of experts, which this engine can't train; choose the torch engine"
        )


def _experts_function(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts with the signature of transformers: [n, d], [n, k] int64, [n, k] -> [n, d]."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weights = [getattr(module, name) for name in (first, "down_proj")]
    biases = [getattr(module, f"{name}_bias") for name in (first, "down_proj")] if module.has_bias else []
    return experts(hidden_states, top_k_index, top_k_weights, *weights, *biases, **module.told_to_experts)


def arguments_of(module: Any) -> dict[str, Any]:
    """The plain arguments of `experts` for a module, less those that have their defaults.

    Raises:
        ModelError: the module computes something else between its products, or normalizes what they give.
    """
    gate = next((gate for gate in _gates(module) if _is_gate_of(module, gate)), None)
    if gate is None or getattr(module, "has_post_expert_norm", False):
        raise ModelError(
            f"{type(module).__name__} has a gate or a norm of its own, which this program's experts do not compute; "
            "choose another model"
        )
    default = vars(Gate())
    told = {name: value for name, value in vars(gate).items() if value != default[name]}
    return told | ({"transposed": True} if module.is_transposed else {})


def _gates(module: Any) -> Iterator[Gate]:
    """The gates that a module may have, whose numbers are among its attributes."""
    numbers = {
        float(value)
        for name, value in vars(module).items()
        if (isinstance(value, float) or (type(value) is int and "limit" in name)) and value > 0
    }
    if not module.has_gate:
        yield from (Gate(activation, gated=False) for activation in ACTIVATIONS)
        return
    for limit, slope, offset, interleaved in product((0.0, *numbers), (1.0, *numbers), (0.0, 1.0), (False, True)):
        for activation in ACTIVATIONS:
            yield Gate(activation, True, interleaved, slope, limit, offset)


def _is_gate_of(module: Any, gate: Gate) -> bool:
    """Whether a module computes what a gate does, of small numbers and of such as are beyond all limits that it has."""
    numbers = [abs(v) for v in vars(module).values() if isinstance(v, (int, float)) and math.isfinite(v)]
    spread = 2 * max([LEAST_SPREAD, *numbers])
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat((x, LEAST_SPREAD * x, spread * x))
    compute = module._apply_gate if module.has_gate else module.act_fn
    with torch.no_grad():
        expected = compute(x)
    return expected.shape == (found := gate(x)).shape and torch.allclose(expected.double(), found, rtol=1e-5, atol=1e-6)


ALL_EXPERTS_FUNCTIONS.register(REGISTERED_NAME, _experts_function)
