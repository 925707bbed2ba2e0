"""Stage forecast: every forecaster's curve, the what-if grid and the verdict, from artifacts alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from arisk.anatomy.record import ScoreResult
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.forecasters import bound_curve, local_curve, ray_curve
from arisk.forecast.known import known
from arisk.forecast.measured import combined_curve, control_change, pilot_curve, rollout_curve
from arisk.forecast.plan_path import planned
from arisk.forecast.record import Curve, ForecastResult, RolloutResult
from arisk.forecast.verdict import decide
from arisk.forecast.what_if import what_if
from arisk.geometry.local_model import diffusion

__all__ = ["forecast"]


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
    source = known(scored, curves, config=config, training=training, steps=steps, seed=seed)
    return ForecastResult(
        threshold=config.collapse_threshold,
        confidence=config.confidence,
        training={**training.model_dump(mode="json"), "steps": steps},
        verdict=verdict,
        forecasters=curves,
        diffusion=None if noise is None else float(noise[-1]),
        what_if=what_if(source),
        warnings=_warnings(curves),
        control_change=control,
        gradient_evaluations=measured.gradient_evaluations,
        planned_evaluations=steps * training.gradient_accumulation,
    )


def _warnings(curves: dict[str, Curve]) -> list[str]:
    found: list[str] = []
    if curves["local"].status == "measured" and any(math.isinf(v) for v in curves["local"].median):
        found.append("The local model diverges within the plan: the learning rate exceeds 2/curvature.")
    return found
