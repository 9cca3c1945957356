"""Routes a Hugging Face model's RMSNorms to `rms_norm`: one operator, where transformers writes out several.

One operator is one kernel, keeps less for the backward pass, and is planned as a whole. Nearly every family has an
RMSNorm class of its own and each release brings more, so a list of class names would always be out of date, and a name
doesn't say whether the weight is an offset from 1. Hence each candidate is run on random numbers, and is routed only if
`rms_norm` gives the same.
"""

import copy
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn

from longctx.kernels.rms_norm import rms_norm

LARGEST_EPS = 1e-2  # a larger float attribute is something else


def route_rms_norms(model: nn.Module) -> None:
    """Gives every module that computes an RMSNorm a forward that calls `rms_norm`."""
    tried: dict[tuple, tuple | None] = {}
    for module in model.modules():
        if not _may_be_rms_norm(module):
            continue
        settings = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float))))
        key = (type(module), module.get_parameter("weight").shape, settings)
        if key not in tried:
            tried[key] = _rms_norm_arguments(module)
        if (arguments := tried[key]) is not None:
            module.forward = types.MethodType(_forward_with(arguments), module)


def _forward_with(arguments: tuple) -> Callable:
    """A module's forward that calls `rms_norm` with the module's weight and these arguments."""

    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, *arguments)

    return forward


def _may_be_rms_norm(module: nn.Module) -> bool:
    """Whether it is worth trying: a norm by its class's name, of one tensor, with one weight of one dimension alone."""
    parameters = dict(module.named_parameters())
    if "norm" not in type(module).__name__.lower() or list(parameters) != ["weight"]:
        return False
    return parameters["weight"].ndim == 1 and len(inspect.signature(module.forward).parameters) == 1  # no gate


def _rms_norm_arguments(module: nn.Module) -> tuple | None:
    """The (eps,) or (eps, offset) with which `rms_norm` computes what `module` does; None if there are none."""
    generator = torch.Generator().manual_seed(0)
    shape = module.get_parameter("weight").shape
    weight = torch.randn(shape, generator=generator)
    x = 1e-2 * torch.randn(4, *shape, generator=generator)  # so small that a wrong eps shows
    real = copy.copy(module)
    real.__dict__ = {**vars(module), "_parameters": {"weight": nn.Parameter(weight)}}  # the module's own is on meta
    for eps in {value for value in vars(module).values() if isinstance(value, float) and value < LARGEST_EPS}:
        for arguments in ((eps,), (eps, 1.0)):
            try:
                if torch.allclose(real(x), rms_norm(x, weight, *arguments), rtol=1e-5, atol=1e-6):
                    return arguments
            except Exception:  # its forward takes something else than [*, d], and says so in its own way
                return None
    return None
