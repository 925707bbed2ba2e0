"""Stages rollout and forecast: how they run on a job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from arisk.anatomy.budget import COUNTS
from arisk.anatomy.stage import safety_side
from arisk.base.artifacts import read_tensors, write_text
from arisk.base.processes import is_first
from arisk.engine.job import Job
from arisk.engine.stage import Stage, where_hidden

if TYPE_CHECKING:
    from arisk.anatomy.record import ScoreResult
    from arisk.config.plan import Config
    from arisk.forecast.record import ForecastResult, RolloutResult
    from arisk.report.page import Section
    from arisk.training.behaviour import BehaviourResult

__all__ = ["BEHAVIOUR_KEYS", "FORECAST", "JUDGE_KEYS", "ROLLOUT", "kept_of", "measured_beside"]

#: Settings of behaviour that decide what is followed and written, and those that only label it.
BEHAVIOUR_KEYS = tuple(
    f"behaviour.{key}" for key in ("prompts", "ordinary_prompts", "tokens", "opening_tokens")
)
JUDGE_KEYS = ("behaviour.judge", "behaviour.refusal_openings")


def measured_beside(config: Config) -> tuple[str, ...]:
    """`config_also` of a stage that follows texts and probes: without probes it depends on none."""
    return (*where_hidden(*JUDGE_KEYS)(config), *(("probes",) if config.probes else ()))


def _rollout(job: Job, workspace: Path) -> RolloutResult:
    from arisk.base.task import without_text
    from arisk.forecast.rollout import rollout, skipped_rollout
    from arisk.forecast.run import as_walked, verdict_counts

    config = job.config
    if not config.rollout.enabled:
        return skipped_rollout("rollout.enabled is off", job.task, job.planned_steps())
    if is_first():
        write_text(workspace / COUNTS, json.dumps(verdict_counts(job.task, config)) + "\n")
    found = rollout(
        job.task,
        config=as_walked(job.task, config),
        training=config.training,
        steps=job.planned_steps(),
        behaviour=config.behaviour,
        seed=config.run.seed,
        workspace=workspace,
        progress=job.show.progress,
    )
    if config.report.show_text:
        return found
    rows, account = [without_text(row) for row in found.rows], found.account
    if account is not None:
        account = replace(account, rows=[without_text(row) for row in account.rows])
    return replace(found, rows=rows, account=account, behaviour=kept_of(config, found.behaviour))


@overload
def kept_of(config: Config, said: BehaviourResult) -> BehaviourResult: ...


@overload
def kept_of(config: Config, said: None) -> None: ...


def kept_of(config: Config, said: BehaviourResult | None) -> BehaviourResult | None:
    """What a record keeps of what was said along a run: no texts where they may not be shown."""
    from arisk.forecast.refusals import without_texts
    from arisk.models.judge import judge_for

    if config.report.show_text or said is None:
        return said
    return without_texts(said, judge_for(config.behaviour, said.learnt))


def _forecast(job: Job, workspace: Path) -> ForecastResult:
    from arisk.forecast.run import forecast
    from arisk.models.judge import judge_for

    del workspace
    scored: ScoreResult | None = None
    directions = {}
    if job.states["score"].fresh:
        scored = job.record("score")
        directions = read_tensors(job.rundir.stage_dir("score") / "directions.safetensors")
    measured: RolloutResult = job.record("rollout")
    return forecast(
        measured,
        scored,
        config=job.config.forecast,
        training=job.config.training,
        steps=measured.horizon,
        directions=directions,
        dots=lambda displacements: safety_side(job).dots(displacements),
        seed=job.config.run.seed,
        judge=judge_for(job.config.behaviour, measured.behaviour.learnt if measured.behaviour else ()),
    )


def _section(job: Job, later: Mapping[str, Any]) -> Section:
    from arisk.forecast import page

    shown = job.config.report
    return page.section(
        job.record("forecast"),
        job.record("rollout"),
        real=later.get("real_run"),
        show_text=shown.show_text,
        max_examples=shown.max_examples,
        done=later.get("done", ()),
        anatomy=job.states["score"].fresh,
    )


ROLLOUT = Stage(
    name="rollout",
    version=7,
    help="Losses measured along an accelerated virtual run of the plan",
    run=_rollout,
    config=("model", "safety", "finetune", "control", "training", "rollout", *BEHAVIOUR_KEYS),
    config_also=measured_beside,
    inputs=("model", "adapter", "safety", "finetune", "control", "probes"),
    parallel=True,
    resume_files=("state.json", "state-*.safetensors"),
    record="arisk.forecast.record:RolloutResult",
    cost="arisk.forecast.run:rollout_cost",
)


FORECAST = Stage(
    name="forecast",
    version=12,
    help="Every forecaster's curve, the what-if grid and the verdict; loads no model",
    run=_forecast,
    upstream=("rollout",),
    shows=("score",),
    config=("training", "forecast", *JUDGE_KEYS),
    shown=JUDGE_KEYS,
    parallel=True,
    record="arisk.forecast.record:ForecastResult",
    cost="arisk.forecast.run:forecast_cost",
    section=_section,
)
