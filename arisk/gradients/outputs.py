"""Losses at extrapolated model outputs: outputs often move straighter than losses do.

Softmax turns a straight path of logits into a curved loss, so a short pilot says more through
z₀ + (z_k − z₀) s than through its losses. Works for any loss that calls the model as a function and
gets a tensor, or an object with `logits`; other losses have no outputs to extrapolate.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.task import Batch, LossFn

__all__ = ["logits_of", "loss_at", "losses_between", "outputs_of"]


class _Replay(nn.Module):
    """Stands in for a model: gives a fixed output, and the model's other attributes."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["_model"] = model
        self.__dict__["_output"] = output
        self.__dict__["calls"] = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """The fixed output."""
        self.__dict__["calls"] += 1
        return self.__dict__["_output"]


def outputs_of(model: nn.Module, batch: Batch, loss_fn: LossFn, *, graph: bool = False) -> Any | None:
    """The model's output in this loss; None when it is not called exactly once or gives no logits.

    With `graph` it can be differentiated by the parameters.
    """
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _m, _i, output: seen.append(output))
    try:
        with torch.set_grad_enabled(graph):
            loss_fn(model, batch)
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 and logits_of(seen[0]) is not None else None


def loss_at(model: nn.Module, batch: Batch, loss_fn: LossFn, output: Any, logits: Tensor) -> Tensor | None:
    """The loss of other logits in place of the output's; None when it does not use the stand-in."""
    stand_in = _Replay(model, _with_logits(output, logits))
    losses = loss_fn(stand_in, batch)
    return losses if stand_in.__dict__["calls"] == 1 else None


def losses_between(
    model: nn.Module, batch: Batch, loss_fn: LossFn, start: Any, end: Any, scales: Sequence[float]
) -> Tensor | None:
    """ℓ_i at outputs z₀ + (z_k − z₀) s.

    Args:
        model: asked for attributes only; it does not run.
        batch: the batch the outputs belong to.
        loss_fn: per-sample losses.
        start: output from `outputs_of` at the first point.
        end: output at the second.
        scales: s, 0 at the start and 1 at the end.

    Returns:
        (B, S) float64, or None when the loss gives one number or does not use the stand-in.
    """
    first, last = logits_of(start), logits_of(end)
    if first is None or last is None:
        return None
    columns: list[Tensor] = []
    for scale in scales:
        with torch.no_grad():
            losses = loss_at(model, batch, loss_fn, end, torch.lerp(first, last, float(scale)))
        if losses is None or losses.ndim == 0:
            return None
        columns.append(losses.reshape(-1).to("cpu", torch.float64))
    return torch.stack(columns, dim=1)


def logits_of(output: Any) -> Tensor | None:
    """The floating-point tensor in a model's output: itself, or its `logits`."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _with_logits(output: Any, logits: Tensor) -> Any:
    if isinstance(output, Tensor):
        return logits
    changed = copy.copy(output)
    changed.logits = logits
    return changed
