"""A penalty applied beside the optimizer instead of through it.

Adding a stiff penalty to the loss lets AdamW divide the task's gradient by the penalty's size: the
fine-tune then learns less, wherever it is heading. As with decoupled weight decay (arXiv 1711.05101)
the penalty can act after the optimizer's step on its own,

    θ ← θ − c · v(θ)/‖∇v(θ)‖² · ∇v(θ),

Polyak's step for a function v ≥ 0 whose least value 0 is known. It needs no λ: scaling v changes nothing.
That AlignGuard's Fisher term acts so is this project's departure from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from arisk.base.errors import NumericsError
from arisk.geometry.vectors import squared_norm

__all__ = ["relax"]


def relax(
    value: Callable[[], Tensor], parameters: Sequence[nn.Parameter], *, factor: float, repeats: int
) -> tuple[float, float]:
    """θ ← θ − c v/‖∇v‖² ∇v, in place, `repeats` times; the optimizer's state is left alone.

    On v = a x² in one variable a step with factor c gives x(1 − c/2).

    Args:
        value: v ≥ 0 at the parameters as they are, with gradient.
        parameters: θ.
        factor: c in (0, 4); a quadratic of one curvature shrinks for these, fastest at 2.
        repeats: steps taken; none where the gradient is 0.

    Returns:
        v before the first and after the last step.

    Raises:
        NumericsError: v or its gradient is NaN or infinite, before a step or after the last.
    """
    before = after = float("nan")
    for turn in range(repeats + 1):
        with torch.enable_grad():
            current = value()
        after = float(current.detach())
        before = after if turn == 0 else before
        _require_finite(after, after)
        if turn == repeats or not current.requires_grad:
            break
        gradients = torch.autograd.grad(current, list(parameters), allow_unused=True)
        square = squared_norm(gradients)
        _require_finite(square, after)
        if square == 0:
            break
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient.to(parameter.dtype), alpha=factor * after / square)
    return before, after


def _require_finite(number: float, value: float) -> None:
    if not abs(number) < float("inf"):
        raise NumericsError(
            f"the penalty diverges: its value is {value}",
            where="penalty applied after the step",
            fix="lower the relaxation factor, or `training.learning_rate`",
        )
