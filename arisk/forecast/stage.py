"""Stages rollout and forecast: how they run on a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.anatomy.stage import safety_side
from arisk.base.artifacts import read_tensors
from arisk.config.plan import planned_steps
from arisk.engine.job import Job
from arisk.engine.stage import Cost, CostScene, Stage

if TYPE_CHECKING:
    from arisk.anatomy.record import CollectResult, ScoreResult
    from arisk.forecast.record import ForecastResult, RolloutResult
    from arisk.report.page import Section

__all__ = ["FORECAST", "ROLLOUT"]


def _rollout(job: Job, workspace: Path) -> RolloutResult:
    from arisk.forecast.rollout import rollout, skipped_rollout

    config = job.config
    if not config.rollout.enabled:
        return skipped_rollout("rollout.enabled is off")
    return rollout(
        job.task,
        config=config.rollout,
        training=config.training,
        steps=planned_steps(config.training, len(job.task.finetune.rows)),
        workspace=workspace,
        progress=job.show.progress,
    )


def _forecast(job: Job, workspace: Path) -> ForecastResult:
    from arisk.forecast.run import forecast

    del workspace
    scored: ScoreResult = job.record("score")
    return forecast(
        scored,
        job.record("rollout"),
        config=job.config.forecast,
        training=job.config.training,
        steps=planned_steps(job.config.training, scored.finetune_rows),
        directions=read_tensors(job.rundir.stage_dir("score") / "directions.safetensors"),
        dots=lambda displacements: safety_side(job).dots(displacements),
        seed=job.config.run.seed,
    )


def _section(job: Job, later: Mapping[str, Any]) -> Section:
    from arisk.forecast import page

    shown = job.config.report
    collected: CollectResult = job.record("collect")
    return page.section(
        job.record("forecast"),
        job.record("rollout"),
        task=collected.task,
        collected=collected,
        real=later.get("real_run"),
        show_text=shown.show_text,
        max_examples=shown.max_examples,
    )


def _rollout_cost(scene: CostScene) -> Cost:
    from arisk.forecast.cost import rollout_cost

    return rollout_cost(scene)


ROLLOUT = Stage(
    name="rollout",
    version=3,
    help="Losses measured along an accelerated virtual run of the plan",
    run=_rollout,
    config=("model", "safety", "finetune", "control", "training", "rollout"),
    inputs=("model", "adapter", "safety", "finetune", "control"),
    parallel=True,
    resume_files=("state.json", "state-*.safetensors"),
    record="arisk.forecast.record:RolloutResult",
    cost=_rollout_cost,
)


def _forecast_cost(scene: CostScene) -> Cost:
    from arisk.forecast.cost import forecast_cost

    return forecast_cost(scene)


FORECAST = Stage(
    name="forecast",
    version=5,
    help="Every forecaster's curve, the what-if grid and the verdict; loads no model",
    run=_forecast,
    upstream=("collect", "score", "rollout"),
    config=("training", "forecast"),
    parallel=True,
    record="arisk.forecast.record:ForecastResult",
    cost=_forecast_cost,
    section=_section,
)
