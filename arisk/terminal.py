"""What the terminal shows: progress on stderr, and results as plain text tables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["StageDisplay", "check_text", "outcome_text", "table", "verify_text"]


class StageDisplay:
    """Shows stages and their progress on stderr: bars in a terminal, one line per stage in a pipe.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._stage = ""
        self._task: Any = None
        self._label = ""
        self._started = 0.0

    def start(self, stage: str, why: str) -> None:
        """A stage begins; `why` says what made it stale."""
        self._stage, self._label, self._started = stage, "", time.monotonic()
        if self.quiet:
            return
        self.console.print(f"[bold]{stage:<9}[/bold] {why}" if why else f"[bold]{stage}[/bold]")
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("          {task.description:<20}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()

    def progress(self, label: str, done: int, total: int) -> None:
        """The `arisk.progress.Progress` callback of the running stage."""
        if self._bars is None:
            return
        if label != self._label:
            self._label = label
            self._task = self._bars.add_task(label, total=total, memory="")
        self._bars.update(self._task, completed=done, total=total, memory=_memory())

    def finish(self, stage: str) -> None:
        """A stage is committed."""
        self._stop()
        if not self.quiet:
            self.console.print(f"{stage:<9} done in {time.monotonic() - self._started:.1f} s")

    def skip(self, stage: str) -> None:
        """A stage is fresh."""
        if not self.quiet:
            self.console.print(f"{stage:<9} fresh")

    def note(self, text: str) -> None:
        """Something else to know, in one line."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True, markup=False)

    def interrupted(self) -> None:
        """Ctrl-C: say what is kept and how to go on."""
        self._stop()
        self.console.print(
            f"interrupted in {self._stage or 'planning'}: finished stages and finished parts "
            "of this one are kept; run the same command again to go on",
            soft_wrap=True,
        )

    def failed(self) -> None:
        """An error ends the stage; the bars must not stay."""
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _memory() -> str:
    """Resident memory of this process, where the system tells it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a stored file
            pages = int(file.read().split()[1])
    except OSError:
        return ""
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A plain aligned table, readable in a pipe and at 80 columns."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def outcome_text(outcome: Any) -> str:
    """The verdict table at the end of a run, and the path of the report as the last line."""
    if outcome.summary is None:
        done = ", ".join(outcome.ran) or "nothing (all fresh)"
        return f"ran {done}\nrun directory: {outcome.run_dir}"
    verdict = outcome.summary["verdict"]
    rows = [[name, *_forecaster(curve)] for name, curve in outcome.summary["forecasters"].items()]
    lines = [
        _coloured(f"verdict: {verdict['level']}", verdict["level"]),
        verdict["sentence"],
        "",
        table(rows, ["forecaster", "collapse step", "P(collapse)", "final rise", "trusted until"]),
        "",
        f"safe-step budget: {_or(verdict['safe_steps'], 'not measured')} of {verdict['horizon']} planned"
        f" steps (basis: {verdict['basis']})",
        *[f"because: {reason}" for reason in verdict["reasons"]],
        *[f"caveat:  {caveat}" for caveat in verdict["caveats"]],
        f"report: {outcome.report}",
    ]
    return "\n".join(lines)


def _forecaster(curve: Mapping[str, Any]) -> list[str]:
    """Cells of one forecaster's row; what was not measured says so."""
    if curve["status"] != "measured":
        return [f"not measured: {curve['reason']}", "", "", ""]
    label = "bound only" if curve["kind"] == "bound" else ""
    step = curve["collapse_step"]
    return [
        (f"{step}" if step is not None else f"none within {curve['horizon']}"),
        label or (f"{curve['probability']:.0%}" if curve["probability"] is not None else "not measured"),
        f"{curve['median'][-1]:+.3g}" if curve["median"] and isinstance(curve["median"][-1], float) else "–",
        label or _or(curve["trusted_until"], "not measured"),
    ]


def _or(value: Any, fallback: str) -> str:
    return fallback if value is None else str(value)


def _coloured(text: str, level: str) -> str:
    """Colour on a terminal only, and never as the only sign."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    code = {"low": "32", "elevated": "33", "high": "31"}.get(level, "35")
    return f"\x1b[1;{code}m{text}\x1b[0m"


def verify_text(outcome: Any) -> str:
    """Forecast and truth side by side, and the report's path (or what it waits for) as the last line."""
    found = outcome.verify
    inside, counts = found["inside_share"], found["refusals"]
    expected, real = _collapse(found, "forecast"), _collapse(found, "real")
    refusals = [_fraction(counts[0]), _fraction(counts[-1])] if counts else ["not measured"] * 2
    rows = [
        ["collapse step", expected + _interval(found), real],
        ["safety change", _signed(found["forecast_change"]), _signed(found["real_change"], "diverged")],
        ["control change", _signed(found["forecast_control"]), _signed(found["control_change"])],
        ["safety minus control", _signed(_minus(found)), _signed(found["specific_change"])],
        ["refusals at the start", "", refusals[0]],
        ["refusals at the end", "", refusals[1]],
    ]
    factor = "–" if found["error_factor"] is None else f"× {found['error_factor']:.2f}"
    if found["error_factor"] is None and found["error_at_least"] is not None:
        factor = f"more than × {found['error_at_least']:.2f}"
    lines = [
        found["sentence"],
        "",
        table(rows, [f"after {found['last_step']} of {found['horizon']} steps", "forecast", "real"]),
        "",
        f"error factor of the collapse step: {factor}",
        "real curve inside the forecast's interval: "
        + ("not measured" if inside is None else f"{inside:.0%} of the measured steps"),
        *([f"refusals not measured: {found['refusals_missing']}"] if found["refusals_missing"] else []),
        *[f"caveat: {warning}" for warning in found["warnings"]],
    ]
    if outcome.report is None:
        return "\n".join([*lines, f"no report: stage {outcome.missing} is not fresh; next: {outcome.next}"])
    return "\n".join([*lines, f"report: {outcome.report}"])


def _collapse(found: Mapping[str, Any], which: str) -> str:
    """A collapse step, never without how far was looked."""
    step = found[f"{which}_collapse"]
    if which == "forecast" and found["forecaster"] is None:
        return "not measured"
    reach = found["horizon"] if which == "forecast" else found["last_step"]
    return f"none within {reach}" if step is None else str(step)


def _interval(found: Mapping[str, Any]) -> str:
    if found["forecast_interval"] is None:
        return ""
    ends = [_or(end, f"beyond {found['horizon']}") for end in found["forecast_interval"]]
    return f" ({ends[0]} to {ends[1]})"


def _minus(found: Mapping[str, Any]) -> float | None:
    """The forecast's safety change minus its control change."""
    safety, control = found["forecast_change"], found["forecast_control"]
    return None if safety is None or control is None else safety - control


def _signed(value: float | None, missing: str = "not measured") -> str:
    return missing if value is None else f"{value:+.3g}"


def _fraction(count: Mapping[str, Any]) -> str:
    return f"{count['refused']} of {count['prompts']}"


def check_text(report: Mapping[str, Any]) -> str:
    """What `arisk check` found, as indented text."""
    lines: list[str] = []
    _indent(report, 0, lines)
    return "\n".join(lines)


def _indent(value: Any, depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines.append(f"{pad}{key}:")
            _indent(item, depth + 1, lines)
        elif isinstance(item, (list, tuple)) and item and isinstance(item[0], (str, Mapping)):
            lines.append(f"{pad}{key}:")
            for entry in item:
                if isinstance(entry, Mapping):
                    _indent(entry, depth + 1, lines)
                else:
                    lines.append(f"{pad}  - {entry}")
        else:
            lines.append(f"{pad}{key}: {item}")
