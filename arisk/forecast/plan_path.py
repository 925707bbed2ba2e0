"""The planned run on the local model: displacements at recorded steps, projected on the safety gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.anatomy.record import ScoreResult
from arisk.config.plan import TrainingConfig
from arisk.geometry.dynamics import LocalModel, Recipe, krylov_path, optimizer_path, recorded_steps
from arisk.training.schedules import flow_times, learning_rates

__all__ = ["Plan", "local_path", "planned"]

#: Steps kept where a step costs J numbers, and where it costs a product with every safety gradient.
DENSE_POINTS, PATH_POINTS = 4800, 64
#: Parameters up to which the second kind is as cheap as the first.
FEW_PARAMETERS = 4096
#: Floating-point operations above which the true recursion gives way to the frozen preconditioner.
PATH_BUDGET = 2e11


@dataclass(frozen=True)
class Plan:
    """The planned run: T learning rates and flow times (T + 1), with the optimizer's settings."""

    rates: Tensor
    times: Tensor
    training: TrainingConfig

    @property
    def horizon(self) -> int:
        """Planned optimizer steps T."""
        return len(self.rates)


def planned(training: TrainingConfig, steps: int, *, scale: float = 1.0) -> Plan:
    """The plan with `steps` steps and `scale` times its peak learning rate."""
    rates = learning_rates(
        training.learning_rate * scale,
        steps,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
    )
    return Plan(rates, flow_times(rates, momentum=training.momentum), training)


def local_path(
    scored: ScoreResult,
    plan: Plan,
    directions: dict[str, Tensor],
    dots: Callable[[Tensor], Tensor] | None,
) -> tuple[list[int], Tensor, list[str]]:
    """Steps, c-vectors (N, M) of the displacements there, and how they were got."""
    training = plan.training
    plain = training.optimizer == "sgd" and not training.weight_decay and training.max_grad_norm is None
    if not plain and dots is not None and directions:
        parameters, krylov = directions["curvature_basis"].shape
        if parameters * plan.horizon * (4 * krylov + 20) <= PATH_BUDGET:
            return _vector_path(plan, scored, directions, dots)
    path = krylov_path(scored.krylov_t, scored.krylov_beta, plan.rates, momentum=training.momentum)
    notes: list[str] = []
    if not plain:
        why = "no gradient store" if dots is None else "the exact recursion is too long for this plan"
        if not directions:
            why = "the vectors of the exact recursion do not fit the memory budget"
        notes.append(
            f"{training.optimizer} with its preconditioner frozen at the start ({why}); weight decay "
            "and clipping are left out."
        )
    steps = recorded_steps(plan.horizon, DENSE_POINTS)
    return steps, scored.c_krylov @ path[steps].T, notes


def _vector_path(
    plan: Plan, scored: ScoreResult, directions: dict[str, Tensor], dots: Callable[[Tensor], Tensor]
) -> tuple[list[int], Tensor, list[str]]:
    """The true optimizer recursion on P-sized vectors, projected on G in chunks."""
    training = plan.training
    model = LocalModel(
        gradient=directions["gradient"],
        curvature_basis=directions["curvature_basis"],
        curvature=scored.krylov_t,
        noise_variance=directions["noise_variance"],
        theta=directions.get("theta"),
    )
    recipe = Recipe(
        rates=plan.rates,
        optimizer=training.optimizer,
        momentum=training.momentum,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        noise_divisor=training.gradient_accumulation,
    )
    small = len(model.gradient) <= FEW_PARAMETERS
    steps = recorded_steps(plan.horizon, DENSE_POINTS if small else PATH_POINTS)
    chunk = max(1, int(1e8 / len(model.gradient)))
    columns: list[Tensor] = []
    pending: list[Tensor] = []
    for step, delta in optimizer_path(model, recipe, steps):
        pending.append(delta)
        if len(pending) == chunk or step == steps[-1]:
            columns.append(dots(torch.stack(pending, dim=1)))
            pending = []
    return steps, torch.cat(columns, dim=1), []
