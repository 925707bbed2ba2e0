"""Stage guard: how it runs on a job, and what its verb prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import read_record
from arisk.engine.job import Job
from arisk.engine.stage import Stage, StageOption, steps_option, where_hidden
from arisk.forecast.stage import JUDGE_KEYS
from arisk.verification.stage import model_saver, refuse_saving, save_option

if TYPE_CHECKING:
    from arisk.config.plan import Config
    from arisk.guard.record import GuardResult
    from arisk.guard.run import Keep
    from arisk.report.page import Section

__all__ = ["GUARD"]

#: Settings of guard that change its numbers; its limits only change the recommendation.
GUARD_KEYS = (
    *("methods", "steps", "alignguard", "ewc", "projection", "replay", "task", "task_samples"),
    *("constrained", "kl", "own_replay", "drift_replay", "smaller", "average", "alpha"),
    *("all", "seeds", "ordinary"),
    *("calibration_steps", "control_samples", "generate", "max_new_tokens"),
)


def _guard(job: Job, workspace: Path) -> GuardResult:
    """Carry out the planned fine-tune plain and under every protection."""
    from arisk.guard.choice import without_texts
    from arisk.guard.run import guard
    from arisk.guard.summary import judge_of

    config = job.config
    _refuse(config)
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
        keep=_keep(job),
        progress=job.show.progress,
    )
    return found if config.report.show_text else without_texts(found, judge_of(found, config))


def _refuse(config: Config) -> None:
    refuse_saving(config, config.guard.save_model, "guard.save_model")


def _keep(job: Job) -> Keep | None:
    """Keeps the recommended arm's weights, where a folder is named."""
    from arisk.guard.run import Keep
    from arisk.guard.summary import summary_of

    config = job.config
    save = model_saver(job, config.guard.save_model)
    if save is None:
        return None

    def chosen(result: GuardResult) -> str | None:
        label = summary_of(result, config)["recommended"]
        if label is None:
            job.show.note("no model is kept: no arm is recommended")
        return label

    return Keep(chosen, save)


def _judged_keys(config: Config) -> tuple[str, ...]:
    """The judge's settings where it decides which own refusals are replayed, and what is trained of all."""
    guard = config.guard
    hidden = where_hidden(*JUDGE_KEYS)(config)
    own = JUDGE_KEYS if guard.methods is None or "own_replay" in guard.methods else ()
    best = () if guard.all else ("guard.tolerated_task_loss",)
    return tuple(dict.fromkeys([*hidden, *own, *best]))


def _section(job: Job, later: Mapping[str, Any]) -> Section | None:
    """What guard shows on the report."""
    del later
    if not job.states["guard"].fresh:
        return None
    from arisk.guard import page

    return page.section(job.record("guard"), job.config)


def _found(folder: Path, config: Config) -> dict[str, Any]:
    from arisk.guard.record import GuardResult
    from arisk.guard.summary import summary_of

    return summary_of(read_record(folder, GuardResult), config)


GUARD = Stage(
    name="guard",
    version=12,
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
    shown=(*JUDGE_KEYS, "guard.tolerated_task_loss", "guard.wanted_drift", "forecast.refusals_lost"),
    before=_refuse,
    options=(
        StageOption("all", "guard.all", "Train every arm; default: forecast all, train two.", kind=bool),
        steps_option("guard.steps"),
        save_option("guard.save_model", "the recommended arm's adapter or model"),
    ),
    example="--steps 100",
    found=_found,
    text="arisk.guard.printed:guard_text",
)
