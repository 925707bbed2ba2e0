"""`arisk screen`: runs the stage, and says what it found on a terminal and to machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.artifacts import read_record
from arisk.config import Config
from arisk.job import Display
from arisk.pipeline import run_optional
from arisk.rundir import RunDir
from arisk.runners import finite
from arisk.screened import ScreenResult
from arisk.terminal import table

__all__ = ["ScreenOutcome", "run_screen", "screen_text"]

#: Rows of the terminal's table, and characters of a row's text there.
SHOWN, WIDTH = 12, 60


@dataclass(frozen=True)
class ScreenOutcome:
    """What a screening showed.

    Attributes:
        run_dir: the run directory; `folder` the stage's, with the JSONL files.
        ran: whether rows were scored or flagged now, or a fresh result found.
        report: the report that shows it; None while there is none.
        missing: the stage that the report waits for, and `next` the command that runs it.
        screen: `ScreenResult.as_json`, finite.
    """

    run_dir: Path
    folder: Path
    ran: bool
    report: Path | None
    missing: str | None
    next: str | None
    screen: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "run_dir": str(self.run_dir),
            "folder": str(self.folder),
            "ran": self.ran,
            "report": str(self.report) if self.report else None,
            "missing": self.missing,
            "next": self.next,
            "screen": self.screen,
        }


def run_screen(
    config: Config, *, run_dir: Path, show: Display, command: str, report_command: str, force: bool = False
) -> ScreenOutcome:
    """Screen the fine-tuning rows, and bring the report up to date where there is a forecast.

    Args:
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that does this, for the lock.
        report_command: the command that makes the report.
        force: score again even where a fresh result exists.

    Raises:
        AriskError: what went wrong; what was finished before is kept.
    """
    ran, made, missing = run_optional(
        "screen",
        config,
        run_dir=run_dir,
        show=show,
        command=command,
        report_command=report_command,
        force=force,
    )
    folder = RunDir(run_dir).stage_dir("screen")
    found: dict[str, Any] = finite(read_record(folder, ScreenResult).as_json())
    report = made.report if made else None
    return ScreenOutcome(run_dir, folder, ran, report, missing, report_command if missing else None, found)


def screen_text(outcome: ScreenOutcome) -> str:
    """The most harmful rows, what dropping them changes, and the files; the report's path comes last."""
    found = outcome.screen
    lines = [found["sentence"], "", table(*_rows(found)), ""]
    lines += [f"finding: {sentence}" for sentence in found["findings"]]
    lines += [f"caveat: {sentence}" for sentence in found["warnings"]]
    files = [str(outcome.folder / name) for name in found["files"]]
    lines += [f"files: {', '.join(files)}" if files else f"no files: {found['files_missing']}"]
    if outcome.report is None:
        return "\n".join([*lines, f"no report: stage {outcome.missing} is not fresh; next: {outcome.next}"])
    return "\n".join([*lines, f"report: {outcome.report}"])


def _rows(found: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    header = ["rank", "row", "flagged", "score", "safety", "control", "p", "text"]
    rows = [
        [
            str(row["rank"]),
            str(row.get("line", row["row"])),
            "yes" if row["flagged"] else "no",
            _signed(row["score"]),
            _signed(row["first_order"]),
            _signed(row["control_order"]),
            "not measured" if row["p_value"] is None else f"{row['p_value']:.1e}",
            _short(f"{row.get('prompt', '')} → {row.get('response', '')}" if "prompt" in row else ""),
        ]
        for row in found["examples"][:SHOWN]
    ]
    return rows, header


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3g}"


def _short(text: str) -> str:
    flat = "".join(c if c.isprintable() else " " for c in text)
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
