"""Stage forecast: every forecaster's curve, the what-if grid and the verdict, from artifacts alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from arisk.config import ForecastConfig, TrainingConfig
from arisk.geometry.dynamics import krylov_path
from arisk.geometry.forecast import diffusion, first_crossing, local_change
from arisk.geometry.ray import interpolate_rows, ray_positions
from arisk.geometry.schedule import flow_times
from arisk.results import Curve, ForecastResult, RolloutResult, ScoreResult
from arisk.stages.forecasters import bound_curve, local_curve, ray_curve
from arisk.stages.measured import combined_curve, control_change, pilot_curve, rollout_curve
from arisk.stages.plan_path import Plan, planned
from arisk.stages.verdict import decide

__all__ = ["forecast"]

#: Multiples of the planned learning rate, and of the planned steps, in the what-if grid.
RATE_GRID = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEP_GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
#: Steps of one what-if recursion; longer plans are followed in equal groups of steps.
GRID_STEPS = 1000


def forecast(
    scored: ScoreResult,
    measured: RolloutResult,
    *,
    config: ForecastConfig,
    training: TrainingConfig,
    steps: int,
    directions: dict[str, Tensor],
    dots: Callable[[Tensor], Tensor] | None,
    seed: int,
) -> ForecastResult:
    """Curves, verdict and what-if grid for the planned run.

    Args:
        scored: what was measured at the aligned point.
        measured: the rollout.
        config: threshold, confidence, risk levels.
        training: the planned run.
        steps: planned optimizer steps T.
        directions: P-sized vectors of the local model (g, noise variance, R, θ*); may be empty.
        dots: G V (N, m) from the gradient store; None without one.
        seed: seeds the bootstrap.
    """
    plan = planned(training, steps)
    generator = torch.Generator().manual_seed(seed)
    curves = {
        "bound": bound_curve(scored, plan, config),
        "local": local_curve(scored, plan, config, directions=directions, dots=dots, generator=generator),
        "ray": ray_curve(scored, plan, config, generator),
        "pilot": pilot_curve(measured, plan, config, seed),
        "rollout": rollout_curve(measured, plan, config, seed),
        "combined": combined_curve(measured, plan, config, seed),
    }
    control = control_change(measured)
    verdict = decide(curves, config, steps, control)
    noise = diffusion(scored.c_batches, plan.rates, noise_divisor=training.gradient_accumulation)
    basis = verdict.basis if verdict.basis in ("local", "ray") else "local"
    columns = sorted({max(1, round(steps * factor)) for factor in STEP_GRID})
    grid = [_row(scored, training, columns, factor, basis) for factor in RATE_GRID]
    return ForecastResult(
        threshold=config.collapse_threshold,
        confidence=config.confidence,
        training={**training.model_dump(mode="json"), "steps": steps},
        verdict=verdict,
        forecasters=curves,
        diffusion=None if noise is None else float(noise[-1]),
        learning_rate_grid=list(RATE_GRID),
        what_if_steps=columns,
        what_if=[[_finite(v) for v in row] for row in grid],
        what_if_collapse=[_grid_collapse(columns, row, config.collapse_threshold) for row in grid],
        warnings=_warnings(curves),
        what_if_basis=basis,
        control_change=control,
        gradient_evaluations=measured.gradient_evaluations,
        planned_evaluations=steps * training.gradient_accumulation,
    )


def _row(
    scored: ScoreResult, training: TrainingConfig, columns: list[int], factor: float, basis: str
) -> list[float]:
    """ΔL_s at the end of runs of each length, the schedule stretched to it."""
    return [_end_of(scored, planned(training, steps, scale=factor), basis) for steps in columns]


def _end_of(scored: ScoreResult, plan: Plan, basis: str) -> float:
    """ΔL_s at the last step of a plan, by the ray or by the Krylov recursion."""
    plan = _grouped(plan)
    if basis == "ray" and scored.probe_times is not None:
        assert scored.probe_safety is not None
        assert scored.probe_finetune is not None
        position = ray_positions(
            scored.probe_times, scored.probe_finetune, torch.diff(plan.times), slope=scored.krylov_beta**2
        )[-1:]
        return float(interpolate_rows(scored.probe_times, scored.probe_safety.mean(0)[None], position))
    momentum = plan.training.momentum
    path = krylov_path(scored.krylov_t, scored.krylov_beta, plan.rates, momentum=momentum)
    return float(local_change(scored.c_krylov @ path[-1]).mean())


def _grouped(plan: Plan) -> Plan:
    """The plan in at most `GRID_STEPS` steps; momentum folded into the rates where it is grouped."""
    if plan.horizon <= GRID_STEPS:
        return plan
    ends = torch.linspace(0, plan.horizon, GRID_STEPS + 1).round().to(torch.int64)
    rates = torch.diff(plan.times[ends])
    training = plan.training.model_copy(update={"momentum": 0.0})
    return Plan(rates, flow_times(rates), training)


def _grid_collapse(columns: list[int], row: list[float], threshold: float) -> int | None:
    return first_crossing([0, *columns], torch.tensor([0.0, *row]), threshold)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _warnings(curves: dict[str, Curve]) -> list[str]:
    found: list[str] = []
    if curves["local"].status == "measured" and any(math.isinf(v) for v in curves["local"].median):
        found.append("The local model diverges within the plan: the learning rate exceeds 2/curvature.")
    return found
