"""Stage guard: how it runs on a job, and what its verb prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import read_record
from arisk.engine.job import Job
from arisk.engine.stage import Stage, steps_option, where_hidden
from arisk.forecast.stage import JUDGE_KEYS

if TYPE_CHECKING:
    from arisk.config.plan import Config
    from arisk.guard.record import GuardResult
    from arisk.models.judge import Judge
    from arisk.report.page import Section

__all__ = ["GUARD"]

#: Settings of guard that change its numbers; its limits only change the recommendation.
GUARD_KEYS = (
    *("methods", "steps", "alignguard", "ewc", "projection", "replay", "task", "task_samples"),
    *("constrained", "kl", "own_replay"),
    *("calibration_steps", "control_samples", "generate", "max_new_tokens"),
)


def _guard(job: Job, workspace: Path) -> GuardResult:
    """Carry out the planned fine-tune plain and under every protection."""
    from arisk.guard.record import without_texts
    from arisk.guard.run import guard

    config = job.config
    reach = job.states["guard"].ingredients["config"]["guard.steps"]
    found = guard(
        job.task,
        config=config.guard.model_copy(update={"steps": reach}),
        training=config.training,
        steps=job.planned_steps(),
        seed=config.run.seed,
        behaviour=config.behaviour,
        workspace=workspace,
        measured=job.record("verify") if job.states["verify"].fresh else None,
        progress=job.show.progress,
    )
    return found if config.report.show_text else without_texts(found, _judge(found, config))


def _judged_keys(config: Config) -> tuple[str, ...]:
    """The judge's settings where it decides a number: which own refusals are replayed, or what is kept."""
    hidden = where_hidden(*JUDGE_KEYS)(config)
    own = JUDGE_KEYS if "own_replay" in config.guard.methods else ()
    return tuple(dict.fromkeys([*hidden, *own]))


def _judge(result: GuardResult, config: Config) -> Judge:
    """The judge of a config, with the openings that the record's safe responses teach."""
    from arisk.models.judge import judge_for, learnt_openings

    learnt = learnt_openings(str(row.get("response") or "") for row in result.prompts)
    return judge_for(config.behaviour, learnt)


def _section(job: Job, later: Mapping[str, Any]) -> Section | None:
    """What guard shows on the report."""
    del later
    if not job.states["guard"].fresh:
        return None
    from arisk.guard import page

    return page.section(job.record("guard"), job.config)


def _found(folder: Path, config: Config) -> dict[str, Any]:
    from arisk.guard.record import GuardResult, guard_summary

    result = read_record(folder, GuardResult)
    return guard_summary(
        result,
        threshold=config.forecast.collapse_threshold,
        tolerated=config.guard.tolerated_task_loss,
        wanted=config.guard.wanted_drift,
        judge=_judge(result, config),
    )


GUARD = Stage(
    name="guard",
    version=5,
    help="Really fine-tune plain and protected, and measure what protection costs and brings",
    run=_guard,
    config=(
        *("model", "safety", "finetune", "control", "training", "verify.safety"),
        *(f"guard.{key}" for key in GUARD_KEYS),
    ),
    config_also=_judged_keys,
    inputs=("model", "adapter", "safety", "finetune", "control", "verify.safety", "guard.task"),
    optional=True,
    reach="guard.steps",
    parallel=True,
    resume_files=("arm-*/*",),
    record="arisk.guard.record:GuardResult",
    cost="arisk.guard.run:guard_cost",
    section=_section,
    shown=(*JUDGE_KEYS, "guard.tolerated_task_loss", "guard.wanted_drift"),
    options=(steps_option("guard.steps"),),
    example="--steps 100",
    found=_found,
    text="arisk.guard.page:guard_text",
)
