"""`arisk guard`: run the stage, bring the report up to date, and say what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.artifacts import read_record
from arisk.config import Config
from arisk.guarded import GuardResult, ending, guard_summary
from arisk.job import Display
from arisk.pipeline import run_optional
from arisk.rundir import RunDir
from arisk.runners import finite
from arisk.terminal import table

__all__ = ["GuardOutcome", "guard_text", "run_guard"]


@dataclass(frozen=True)
class GuardOutcome:
    """What protected fine-tunes showed.

    Attributes:
        run_dir: the run directory.
        ran: whether they were carried out now, or a fresh record found.
        report: the report with the comparison; None while there is no forecast beside it.
        missing: the stage that the report waits for, and `next` the command that runs it; both None
            where there is a report.
        guard: `guard_summary`, finite.
    """

    run_dir: Path
    ran: bool
    report: Path | None
    missing: str | None
    next: str | None
    guard: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "run_dir": str(self.run_dir),
            "ran": self.ran,
            "report": str(self.report) if self.report else None,
            "missing": self.missing,
            "next": self.next,
            "guard": self.guard,
        }


def run_guard(
    config: Config, *, run_dir: Path, show: Display, command: str, report_command: str, force: bool = False
) -> GuardOutcome:
    """Carry out all arms, and bring the report up to date where there is a forecast.

    Args:
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that does this, for the lock.
        report_command: the command that makes the report.
        force: carry them out even where a fresh record exists.

    Raises:
        AriskError: what went wrong; finished arms are kept.
    """
    ran, made, missing = run_optional(
        "guard",
        config,
        run_dir=run_dir,
        show=show,
        command=command,
        report_command=report_command,
        force=force,
    )
    found = read_record(RunDir(run_dir).stage_dir("guard"), GuardResult)
    body = finite(guard_summary(found, **limits(config)))
    if made is None:
        return GuardOutcome(run_dir, ran, None, missing, report_command, body)
    return GuardOutcome(run_dir, ran, made.report, None, None, body)


def limits(config: Config) -> dict[str, float]:
    """The limits of the recommendation."""
    return {
        "threshold": config.forecast.collapse_threshold,
        "tolerated": config.guard.tolerated_task_loss,
        "wanted": config.guard.wanted_drift,
    }


def guard_text(outcome: GuardOutcome) -> str:
    """The arms side by side, the recommendation, and the report's path (or what it waits for) last."""
    found = outcome.guard
    rows = [
        [
            ("* " if arm["label"] == found["recommended"] else "  ") + arm["label"],
            *(
                [ending(arm["diverged_at"]), "", "", "", ""]
                if arm["diverged_at"] is not None
                else [
                    _signed(arm["safety"]),
                    _share(arm["drift_share"]),
                    _signed(arm["control"]),
                    _task(arm),
                    _ratio(arm["cost"]),
                ]
            ),
        ]
        for arm in found["arms"]
    ]
    header = [f"  after {found['last']} of {found['horizon']} steps", "safety", "of plain", "control"]
    lines = [
        found["sentence"],
        "",
        table(rows, [*header, "task loss", "CPU time"]),
        "",
        f"safety: change of the loss of {found['safety_rows']} safety rows (nats/token), "
        + ("held out" if found["heldout"] else "NOT held out"),
        f"task loss: {found['task_rows']} {found['task_source']} (nats/token), with the change against plain",
        *[f"caveat: {warning}" for warning in found["warnings"]],
    ]
    if outcome.report is None:
        return "\n".join([*lines, f"no report: stage {outcome.missing} is not fresh; next: {outcome.next}"])
    return "\n".join([*lines, f"report: {outcome.report}"])


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"× {value:.2f}"


def _task(arm: Mapping[str, Any]) -> str:
    cost = "" if arm["task_cost"] is None else f" ({arm['task_cost']:+.1%})"
    return f"{arm['task']:.3f}{cost}" if arm["task"] is not None else "not measured"
