"""Everything that is said before training: the forecasters, and the plain numbers a user could take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arisk import PipelineConfig, assess
from arisk.base.artifacts import write_record
from arisk.base.task import Task
from arisk.config.plan import RolloutConfig
from arisk.forecast.rollout import rollout
from arisk.training.recipe import recipe_of
from tests.bench.validity.jobs import Job, job_task

#: The rollout with one part changed at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no speed control": {"speed_control": False},
    "no distance correction": {"distance_correction": False},
    "neither": {"speed_control": False, "distance_correction": False},
    "no rare rows": {"rare_rows": False},
    "2 batches a segment": {"batches_per_segment": 2},
    "one leap (no refreshed gradients)": {"segments": 1},
    "pilot of 5 steps": {"pilot_steps": 5},
}


def rolled_out(job: Job, folder: Path) -> dict[str, Any]:
    """The rollout, kept as a record."""
    config, task = job_task(job, folder)
    made = rollout(task, config=RolloutConfig(), training=config.training, steps=job.steps)
    write_record(folder / "rollouts" / job.name, made)
    return {"gradients": made.gradient_evaluations}


def forecasts(job: Job, folder: Path) -> dict[str, Any]:
    """Curves and plain numbers from the aligned point alone; the rollout is a result of its own."""
    config, task = job_task(job, folder)
    settings = PipelineConfig.model_validate(
        {
            "seed": job.seed,
            "training": config.training.model_dump(),
            "score": {"nulls": 0, "examples": 0},
            "rollout": {"enabled": False},
        }
    )
    report = assess(task, settings)
    curves = {
        name: {
            "steps": list(curve.steps),
            "median": list(curve.median),
            "lower": list(curve.lower),
            "upper": list(curve.upper),
            "collapse": curve.collapse_step,
            "interval": curve.collapse_interval,
            "probability": curve.probability,
        }
        for name, curve in report.forecast.forecasters.items()
        if curve.status == "measured"
    }
    scored, overlap = report.scored, report.scored.overlap
    flow = float(recipe_of(config.training, job.steps).times[-1])
    mean_safety = report.collected.mean_gradient
    return {
        "curves": curves,
        "baselines": {
            "lr T |Dg|": flow * scored.update_norm,
            "lr T sqrt(d'Fd)": flow * float(scored.c_update.square().mean().sqrt()),
            "initial fine-tuning loss": scored.finetune_loss,
            "overlap |Pg|/|g|": overlap.ratio,
            "gradient conflict": -float(scored.c_update.mean())
            / (float(mean_safety.norm()) * scored.update_norm or 1.0),
            "gamma": scored.gamma_hat,
            "peer": peer_forecast(report, flow),
            "bound": scored.gamma_hat**2 * flow**4 / 8,
        },
    }


def peer_forecast(report: Any, flow: float) -> float:
    """The forecast of the package alignment-risk, re-derived: (λ/8) γ̂² t⁴ when the update starts outside.

    λ is the smallest retained eigenvalue; a gradient inside the subspace (large ε̂) is called safe,
    as max(½ γ̂ t² − ε̂ t, 0) does.
    """
    scored = report.scored
    drift = max(0.5 * scored.gamma_hat * flow**2 - scored.epsilon_hat * flow, 0.0)
    return 0.5 * float(report.subspace.eigenvalues[-1]) * drift**2


def ablated(job: Job, folder: Path, name: str) -> dict[str, Any]:
    """Mean safety change along a rollout with one part changed."""
    config, task = job_task(job, folder)
    return plain_rollout(job, config.training, task, RolloutConfig(**ABLATIONS[name]))


def plain_rollout(job: Job, training: Any, task: Task, config: RolloutConfig) -> dict[str, Any]:
    """Steps, mean safety change and cost of one rollout."""
    made = rollout(task, config=config, training=training, steps=job.steps)
    values = made.safety.mean(0)
    steps = list(made.steps)
    if made.diverged_at is not None:
        steps, values = [*steps, job.steps], torch.cat([values, torch.tensor([50.0])])
    return {"steps": steps, "median": values.tolist(), "gradients": made.gradient_evaluations}
