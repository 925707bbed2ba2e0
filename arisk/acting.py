"""How the optional stages screen and guard run on a job, and what they show on the report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import write_tensors
from arisk.base.processes import barrier, from_first
from arisk.config.plan import planned_steps
from arisk.engine.freshness import stage_key
from arisk.engine.job import Job
from arisk.guard.record import GuardResult
from arisk.screening.record import ScreenResult

if TYPE_CHECKING:
    from arisk.report.page import Section

__all__ = ["guard_section", "run_guard", "run_screen", "screen_section"]

#: Numbers by row that `scores.safetensors` holds.
SCORES = (
    *("scores", "first_order", "control_order"),
    *("losses", "gradient_norms", "p_values", "exact"),
)
#: Settings of screen that only say which of its scores are flagged, and what is shown of that.
FLAGGING = ("drop", "false_discovery", "what_if")


def run_screen(job: Job, workspace: Path) -> ScreenResult:
    """Score the fine-tuning rows, or flag stored scores anew; write kept and flagged rows."""
    from arisk.screening.run import flagged_anew, screen
    from arisk.screening.what_if import dropping

    config, task = job.config, job.task
    steps = planned_steps(config.training, len(task.finetune.rows))
    old = from_first(lambda: _screened_before(job))
    made = flagged_anew(old, config.screen) if old is not None else None
    if made is None or not _flags_stand(made):
        made = screen(
            task,
            config=config.screen,
            training=config.training,
            steps=steps,
            workspace=workspace,
            progress=job.show.progress,
        )
    what_if: Mapping[str, Any] = {"status": "not_measured", "reason": "screen.what_if is off"}
    if config.screen.what_if:
        what_if = dropping(
            task,
            made.flagged,
            config=config.rollout,
            training=config.training,
            steps=steps,
            workspace=workspace,
            progress=job.show.progress,
        )

    def written() -> dict[str, Any]:
        for name in ("before", "after"):
            shutil.rmtree(workspace / name, ignore_errors=True)
        scores = {name: value for name in SCORES if (value := getattr(made, name)) is not None}
        write_tensors(workspace / "scores.safetensors", scores)
        return _split(job, made, workspace)

    barrier()  # No process may still read a rollout's state.
    return replace(made, what_if=what_if, **from_first(written))


def _flags_stand(record: ScreenResult) -> bool:
    """Whether flags set anew lie well within the rows that were scored exactly."""
    return record.method == "exact" or 2 * len(record.flagged) <= int(record.exact.sum())


def _screened_before(job: Job) -> ScreenResult | None:
    """A stored screening that differs in nothing but which of its scores are flagged."""
    state = job.states["screen"]
    if state.fresh or any(reason.kind == "damaged" for reason in state.reasons):
        return None
    new = state.ingredients
    old = (job.rundir.manifest("screen") or {}).get("ingredients")
    if not old:
        return None

    def scoring(given: Mapping[str, Any]) -> dict[str, Any]:
        settings = {k: v for k, v in given["config"]["screen"].items() if k not in FLAGGING}
        # The rollout's settings serve the what-if alone.
        return {**given, "config": {**given["config"], "screen": settings, "rollout": None}}

    same = stage_key(scoring(old)) == stage_key(scoring(new))
    return job.record("screen", ScreenResult) if same else None


def _split(job: Job, made: ScreenResult, workspace: Path) -> dict[str, Any]:
    """Kept and flagged rows as JSONL, where the rows come from a file or the hub."""
    data, rows = job.config.finetune, job.task.finetune.rows
    if job.config.model.source != "hf" or data is None:
        return {"files": [], "files_missing": "rows of a Python loader are scored by number only"}
    from arisk.screening.files import FLAGGED_FILE, KEPT_FILE, split_rows

    flagged = frozenset(made.flagged)
    exact = made.exact.tolist()
    rank = {row: place for place, row in enumerate(made.order, start=1)}
    added = [
        {
            "arisk_score": score,
            "arisk_rank": rank[row],
            **({} if exact[row] else {"arisk_estimate": made.method}),
            "arisk_reasons": made.reasons(row) if row in flagged else [],
        }
        for row, score in enumerate(made.scores.tolist())
    ]
    split_rows(data, [(row["source"], row["line"]) for row in rows], added, flagged, workspace)
    return {"files": [KEPT_FILE, FLAGGED_FILE], "files_missing": None}


def run_guard(job: Job, workspace: Path) -> GuardResult:
    """Carry out the planned fine-tune plain and under every protection."""
    from arisk.guard.run import guard

    config = job.config
    reach = job.states["guard"].ingredients["config"]["guard.steps"]
    return guard(
        job.task,
        config=config.guard.model_copy(update={"steps": reach}),
        training=config.training,
        steps=planned_steps(config.training, len(job.task.finetune.rows)),
        seed=config.run.seed,
        workspace=workspace,
        progress=job.show.progress,
    )


def guard_section(job: Job) -> Section:
    """What guard shows on the report."""
    from arisk.guard import page

    return page.section(job.record("guard", GuardResult), job.config)


def screen_section(job: Job) -> Section:
    """What screen shows on the report."""
    from arisk.screening import page

    shown = job.config.report
    found: ScreenResult = job.record("screen", ScreenResult)
    return page.section(found, show_text=shown.show_text, max_examples=shown.max_examples)
