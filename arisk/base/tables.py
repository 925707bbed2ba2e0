"""What the terminal shows of results: plain text tables, readable at 80 columns and in a pipe."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.base.terminal import columns, fancy, wrapped

__all__ = ["outcome_text", "table", "verify_text"]

FORECASTS = ("forecaster", "collapse step", "P(collapse)", "final rise", "trusted until")


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, width: int | None = None) -> str:
    """A plain aligned table.

    Args:
        rows: the cells; an empty tail of a row leaves its last text free to run to the right.
        header: names of the columns.
        width: columns of the terminal, to which the last text of a row is wrapped; None: no wrapping.
    """
    filled = [_without_tail(row) for row in [header, *rows]]
    sizes = [max((len(r[i]) for r in filled if i < len(r) - 1), default=0) for i in range(len(header))]
    sizes = [max(size, len(name)) for size, name in zip(sizes, header, strict=True)]
    full = [row[-1] for row in filled if len(row) == len(header)]
    sizes[-1] = max([len(header[-1]), *map(len, full)])
    if width is not None:
        sizes[-1] = max(len(header[-1]), min(sizes[-1], width - sum(sizes[:-1]) - 2 * len(header) + 2))
    lines = [line for row in filled for line in _row_lines(row, sizes, width)]
    lines.insert(1, "  ".join("-" * size for size in sizes))
    return "\n".join(lines)


def _without_tail(row: Sequence[str]) -> list[str]:
    """The cells up to the last one that is not empty."""
    cells = list(row)
    while len(cells) > 1 and not cells[-1]:
        cells.pop()
    return cells


def _row_lines(row: Sequence[str], sizes: Sequence[int], width: int | None) -> list[str]:
    """One row, its last text wrapped below itself."""
    start = "".join(cell.ljust(size) + "  " for cell, size in zip(row[:-1], sizes, strict=False))
    if width is None or len(start) + len(row[-1]) <= width:
        return [(start + row[-1]).rstrip()]
    room = max(16, width - len(start))
    parts = textwrap.wrap(row[-1], room, break_on_hyphens=False, break_long_words=False)
    return [(start + part if i == 0 else " " * len(start) + part).rstrip() for i, part in enumerate(parts)]


def _width() -> int | None:
    """Columns to wrap to: those of the terminal, none in a pipe."""
    return columns(sys.stdout) - 1 if sys.stdout.isatty() else None


def _said(text: str, indent: str = "") -> str:
    return wrapped(text, sys.stdout, indent=indent)


def outcome_text(outcome: Any) -> str:
    """The verdict table at the end of a run, and the path of the report as the last line."""
    if outcome.summary is None:
        done = ", ".join(outcome.ran) or "nothing (all fresh)"
        return f"ran {done}\nrun directory: {outcome.run_dir}"
    verdict = outcome.summary["verdict"]
    rows = [[name, *_forecaster(curve)] for name, curve in outcome.summary["forecasters"].items()]
    lines = [
        _coloured(f"verdict: {verdict['level']}", verdict["level"]),
        _said(verdict["sentence"]),
        "",
        table(
            rows,
            ["forecaster", "collapse step", "P(collapse)", "final rise", "trusted until"],
            width=_width(),
        ),
        "",
        _said(
            f"safe-step budget: {_or(verdict['safe_steps'], 'not measured')} of {verdict['horizon']} planned"
            f" steps (basis: {verdict['basis']})"
        ),
        *[_said(f"because: {reason}", " " * 9) for reason in verdict["reasons"]],
        *[_said(f"caveat:  {caveat}", " " * 9) for caveat in verdict["caveats"]],
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
    if not fancy(sys.stdout) or os.environ.get("NO_COLOR"):
        return text
    code = {"low": "32", "elevated": "33", "high": "31"}.get(level, "35")
    return f"\x1b[1;{code}m{text}\x1b[0m"


def verify_text(outcome: Any) -> str:
    """Forecast and truth side by side, and the report's path (or what it waits for) as the last line."""
    found = outcome.found
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
    reach = f"after {found['last_step']} of {found['horizon']} steps"
    factor = "–" if found["error_factor"] is None else f"× {found['error_factor']:.2f}"
    if found["error_factor"] is None and found["error_at_least"] is not None:
        factor = f"more than × {found['error_at_least']:.2f}"
    lines = [
        _said(found["sentence"]),
        "",
        table(rows, [reach, "forecast", "real"], width=_width()),
        "",
        f"error factor of the collapse step: {factor}",
        "real curve inside the forecast's interval: "
        + ("not measured" if inside is None else f"{inside:.0%} of the measured steps"),
        *([f"refusals not measured: {found['refusals_missing']}"] if found["refusals_missing"] else []),
        *[_said(f"caveat: {warning}", " " * 8) for warning in found["warnings"]],
    ]
    return "\n".join([*lines, outcome.last_line])


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
