"""A caller's loss function, refused with one clear error where it returns no loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from arisk.base.errors import InputError, ShapeError
from arisk.base.task import Batch, LossFn
from arisk.gradients import batch_size

__all__ = ["checked_loss"]


def checked_loss(loss_fn: LossFn, name: str) -> LossFn:
    """The same function; what it returns must be a scalar or one loss per sample.

    Args:
        loss_fn: `(model, batch)` → per-sample losses (B,), or their mean as a scalar.
        name: its argument's name, for messages.

    Raises:
        InputError: it cannot be called, or (when called) returns no tensor.
        ShapeError: (when called) the tensor has another shape.
    """
    if not callable(loss_fn):
        raise InputError(
            f"the loss function is a {type(loss_fn).__name__}, which cannot be called",
            where=name,
            fix="pass a function of (model, batch)",
        )

    def checked(model: nn.Module, batch: Batch) -> Tensor:
        found: Any = loss_fn(model, batch)
        if not isinstance(found, Tensor):
            raise InputError(
                f"the loss function returned a {type(found).__name__}, not a tensor",
                where=name,
                fix="return per-sample losses (B,) or their mean, with their graph (no `.item()`)",
            )
        if found.ndim > 1 or (found.ndim == 1 and len(found) not in (1, batch_size(batch))):
            raise ShapeError(
                f"the loss has shape {tuple(found.shape)} for a batch of {batch_size(batch)}",
                where=name,
                fix="return per-sample losses (B,) or their mean as a scalar",
            )
        return found

    return checked
