"""Gradients of penalties beside the task's own: adding them, comparing them, setting λ from a strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from arisk.base.errors import NumericsError
from arisk.training.loop import PlannedRun, put

__all__ = ["Terms", "add_gradients", "calibrated", "gradients_of", "norm_of", "put_gradients"]

#: Scalar penalty terms with gradient, by name.
Terms = Mapping[str, Tensor]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`.grad` of every parameter, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def put_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Set `.grad` of every parameter."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def norm_of(tensors: Sequence[Tensor | None]) -> float:
    """‖·‖ over all tensors together; None counts as zero."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors if t is not None))


def add_gradients(parameters: Sequence[nn.Parameter], terms: Terms, *, each: bool) -> dict[str, float]:
    """Add ∇Σ terms to `.grad`; tells values and norms.

    Args:
        parameters: what trains.
        terms: weighted terms.
        each: also the gradient norm of every single term, one more backward pass each.

    Returns:
        Each term's value, `‖∇task‖`, `‖∇penalty‖`, and with `each` `‖∇term‖`.

    Raises:
        NumericsError: a term or its gradient is NaN or infinite; `.grad` is then left alone.
    """
    told = {name: float(value.detach()) for name, value in terms.items()}
    acting = {name: value for name, value in terms.items() if value.requires_grad}
    told["‖∇task‖"] = norm_of([p.grad for p in parameters])
    if each:
        told |= {f"‖∇{name}‖": norm_of(_gradient(value, parameters)) for name, value in acting.items()}
    added: Sequence[Tensor | None] = []
    if acting:
        added = _gradient(torch.stack(list(acting.values())).sum(), parameters, keep=False)
        told["‖∇penalty‖"] = norm_of(added)
    bad = [name for name, value in told.items() if not math.isfinite(value)]
    if bad:
        raise NumericsError(
            f"the protection diverges: {bad[0]} is {told[bad[0]]}",
            where=f"penalty: {bad[0]}",
            fix="lower the strength of this method, or `training.learning_rate`",
        )
    for parameter, more in zip(parameters, added, strict=False):
        if more is not None:
            parameter.grad = more if parameter.grad is None else parameter.grad + more
    return told


def _gradient(
    value: Tensor, parameters: Sequence[nn.Parameter], *, keep: bool = True
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=keep)


def calibrated(
    fresh: Callable[[], PlannedRun], terms: Callable[[], Terms], wanted: Mapping[str, float], steps: int
) -> dict[str, float]:
    """λ by term such that λ‖∇term‖ = c‖∇L_task‖ after a few plain steps.

    ‖∇L_task‖ is the mean over those steps, ‖∇term‖ is taken after the last; the parameters are put
    back. At the aligned point itself the gradient of a quadratic penalty is 0.

    Args:
        fresh: makes the planned run from its start.
        terms: the terms with weight 1, at the parameters as they are.
        wanted: c by term.
        steps: plain steps, at most those of the plan.

    Raises:
        NumericsError: the run diverges, or a term has no gradient there.
    """
    run = fresh()
    start = [p.detach().clone() for p in run.parameters]
    try:
        norms: list[float] = []
        for number in range(1, min(steps, len(run.rates)) + 1):
            run.step(number)
            norms.append(norm_of([p.grad for p in run.parameters]))
        task = sum(norms) / len(norms)
        found = {n: norm_of(_gradient(value, run.parameters)) for n, value in terms().items() if n in wanted}
    finally:
        put(run.parameters, start)
    weak = [name for name in wanted if not found.get(name, 0.0) > 0]
    if weak:
        raise NumericsError(
            f"the {weak[0]} term has no gradient after {len(norms)} plain steps, so no strength can be set",
            where=f"guard: {weak[0]}",
            fix="raise `guard.calibration_steps`, or check that the safety loss depends on what trains",
        )
    return {name: c * task / found[name] for name, c in wanted.items()}
