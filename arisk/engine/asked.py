"""Stages that run only when asked for (verify, screen, guard): carry one out, and say what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.base.artifacts import read_record
from arisk.base.tables import verify_text
from arisk.config.plan import Config
from arisk.engine.job import Display
from arisk.engine.run import run_optional
from arisk.engine.rundir import RunDir
from arisk.guard.guard_text import guard_text
from arisk.guard.record import GuardResult, guard_summary
from arisk.runners import finite
from arisk.screening.record import ScreenResult
from arisk.screening.screen_text import screen_text
from arisk.verification.record import VerifyResult
from arisk.verification.truth import compare

__all__ = ["AskedOutcome", "asked_text", "run_asked"]


@dataclass(frozen=True)
class AskedOutcome:
    """What an optional stage found.

    Attributes:
        stage: its name, the key of `found` in the JSON.
        run_dir: the run directory.
        ran: whether it was carried out now, or a fresh record found.
        report: the report that shows it; None while there is no forecast to show it beside.
        missing: the stage that the report waits for, and `next` the command that runs it; both None
            where there is a report.
        found: plain values of the record, finite.
    """

    stage: str
    run_dir: Path
    ran: bool
    report: Path | None
    missing: str | None
    next: str | None
    found: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The stage's folder, with its files."""
        return RunDir(self.run_dir).stage_dir(self.stage)

    @property
    def last_line(self) -> str:
        """The report's path, or what the report waits for."""
        if self.report is None:
            return f"no report: stage {self.missing} is not fresh; next: {self.next}"
        return f"report: {self.report}"

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "run_dir": str(self.run_dir),
            "folder": str(self.folder),
            "ran": self.ran,
            "report": str(self.report) if self.report else None,
            "missing": self.missing,
            "next": self.next,
            self.stage: self.found,
        }


def run_asked(
    stage: str,
    config: Config,
    *,
    run_dir: Path,
    show: Display,
    command: str,
    report_command: str,
    force: bool = False,
) -> AskedOutcome:
    """Carry out an optional stage, and bring the report up to date where there is a forecast.

    Args:
        stage: verify, screen or guard.
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that does this, for the lock.
        report_command: the command that makes the report.
        force: carry it out even where a fresh record exists.

    Raises:
        AriskError: what went wrong; what was finished before is kept.
    """
    ran, made, missing = run_optional(
        stage,
        config,
        run_dir=run_dir,
        show=show,
        command=command,
        report_command=report_command,
        force=force,
    )
    # Only the report's summary has the real run beside its forecast; the other records speak for themselves.
    beside = made.summary.get(stage) if made is not None and made.summary and stage == "verify" else None
    found = beside or finite(FOUND[stage](RunDir(run_dir).stage_dir(stage), config))
    report = None if made is None else made.report
    return AskedOutcome(stage, run_dir, ran, report, missing, report_command if missing else None, found)


def _truth(folder: Path, config: Config) -> dict[str, Any]:
    """The real run without a forecast beside it."""
    threshold, markers = config.forecast.collapse_threshold, config.verify.refusal_markers
    return compare(read_record(folder, VerifyResult), None, threshold=threshold, markers=markers).as_json()


def _screened(folder: Path, config: Config) -> dict[str, Any]:
    del config
    return read_record(folder, ScreenResult).as_json()


def _guarded(folder: Path, config: Config) -> dict[str, Any]:
    return guard_summary(
        read_record(folder, GuardResult),
        threshold=config.forecast.collapse_threshold,
        tolerated=config.guard.tolerated_task_loss,
        wanted=config.guard.wanted_drift,
        markers=config.verify.refusal_markers,
    )


#: Plain values of every optional stage's record.
FOUND: dict[str, Callable[[Path, Config], dict[str, Any]]] = {
    "verify": _truth,
    "screen": _screened,
    "guard": _guarded,
}


def asked_text(outcome: AskedOutcome) -> str:
    """What an optional stage found, for people; the last line is the report's path or what it waits for."""
    return TEXTS[outcome.stage](outcome)


TEXTS: dict[str, Callable[[AskedOutcome], str]] = {
    "verify": verify_text,
    "screen": screen_text,
    "guard": guard_text,
}
