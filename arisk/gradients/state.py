"""Measuring without leaving traces: modes, flags, gradients and random state are put back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from arisk.gradients.layout import ParameterLayout

__all__ = ["measuring", "recomputing"]


@contextmanager
def measuring(model: nn.Module, layout: ParameterLayout) -> Generator[None]:
    """Inside: evaluation mode (no dropout) and gradients for exactly the selected parameters.

    Afterwards, also after an error, the model has its modes, `requires_grad` flags and `.grad` back,
    and the global random state is what it was.

    Args:
        model: the model to measure.
        layout: the parameters that get gradients.
    """
    selected = set(layout.names)
    parameters = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in parameters if name in selected}
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for _, p in parameters]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for _, parameter in parameters:
                parameter.requires_grad_(id(parameter) in chosen)
                parameter.grad = None
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag, grad in flags:
                parameter.requires_grad_(flag)
                parameter.grad = grad


@contextmanager
def recomputing(model: nn.Module) -> Generator[None]:
    """Inside, layers marked for activation checkpointing recompute; their dropout stays off.

    Transformers does so in training mode only, and reads the flag of the layer itself.
    """
    marked = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and not m.training]
    try:
        for module in marked:
            module.training = True
        yield
    finally:
        for module in marked:
            module.training = False
