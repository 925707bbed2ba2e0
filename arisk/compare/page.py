"""The page of a comparison: the ranked table first, then figures, differences and notes."""

from __future__ import annotations

import math
import os
from pathlib import Path

from arisk.compare.compare_figures import budget_bars, drift_scatter, forecast_lines
from arisk.compare.record import RULE, PlannedRun, Ranked
from arisk.compare.words import COLUMNS, MEANING, Comparative, cells, compare_findings, headline
from arisk.report.page import ICONS, figure_section, page
from arisk.report.section import esc, listed, table

__all__ = ["render_comparison"]

#: Icon of a run without a forecast.
UNKNOWN = "?"


def render_comparison(told: Comparative, folder: Path) -> str:
    """The comparison as one self-contained HTML page; equal runs give equal bytes.

    Args:
        told: what is shown.
        folder: where the page will lie, for links to the runs' own reports.
    """
    lines, scatter, bars = forecast_lines(told), drift_scatter(told), budget_bars(told)
    body = "\n".join(
        [
            _first_screen(told),
            _ranked_table(told, folder),
            figure_section(lines, tall=True),
            f'<div class="two">{figure_section(scatter)}{figure_section(bars)}</div>',
            _settings(told),
            _provenance(told),
        ]
    )
    return page(told.title, body, [lines, scatter, bars])


def _first_screen(told: Comparative) -> str:
    """The answer, and what the numbers say together."""
    best = told.ranked[0]
    level = best.run.level if best.rank is not None else "inconclusive"
    placed = sum(entry.rank is not None for entry in told.ranked)
    safest = f"Safest plan: {level}" if best.rank is not None else "Nothing is known to be safe"
    label = f"{safest} · {placed} of {len(told.ranked)} ranked"
    return (
        f'<section class="verdict" data-level="{esc(level)}" aria-labelledby="verdict">'
        f'<p class="level"><span aria-hidden="true">{ICONS[level]}</span> {esc(label)}</p>'
        f'<h1 id="verdict">{esc(headline(told))}</h1>'
        f"{listed('Findings', compare_findings(told))}{listed('Read with care', told.notes)}</section>"
    )


def _ranked_table(told: Comparative, folder: Path) -> str:
    head = "".join(f'<th scope="col"><button type="button">{esc(name)}</button></th>' for name in COLUMNS)
    rows = "".join(_row(entry, folder) for entry in told.ranked)
    return (
        '<section id="ranking"><h2>Ranking</h2>'
        f'<p class="reading"><b>How to read this.</b> {esc(RULE)} {esc(MEANING)} '
        "A heading sorts; a name opens the run's own report.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="ranking"><table class="rows rank" '
        f'role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{rows}'
        "</tbody></table></div></section>"
    )


def _row(entry: Ranked, folder: Path) -> str:
    """One run: texts as in the terminal, with the numbers they sort by."""
    texts = cells(entry)
    values = _values(entry)
    made = ""
    for column, text, value in zip(COLUMNS, texts, values, strict=True):
        shown = esc(text)
        if column == "run":
            shown = _linked(entry.run, folder)
        elif column == "verdict":
            icon = ICONS.get(text, UNKNOWN)
            shown = f'<b><span aria-hidden="true">{icon}</span> {esc(text)}</b>'
        mark = ' class="name"' if column == "run" else f' data-label="{esc(column)}"'
        key = "" if value is None else f"{value:.6g}"
        made += f'<td role="cell"{mark} data-value="{key}">{shown}</td>'
    return f'<tr role="row">{made}</tr>'


def _values(entry: Ranked) -> list[float | None]:
    """What each cell sorts by; None sorts last."""
    run = entry.run
    final = run.final[0] if run.final else None
    collapse = None if run.curve is None else float(run.collapse_step or run.horizon + 1)
    numbers = [
        None if entry.rank is None else float(entry.rank),
        None if entry.rank is None else float(entry.rank),
        None if entry.rank is None else run.order[0],
        None if run.safe_steps is None else float(run.safe_steps),
        collapse,
        run.probability,
        final,
        run.control_change,
        run.overlap_to_random,
        run.seconds,
        float(run.finetune_rows) if run.finetune_rows else None,
    ]
    return [value if value is not None and math.isfinite(value) else None for value in numbers]


def _linked(run: PlannedRun, folder: Path) -> str:
    """The name, linked to the run's own report where there is one."""
    if run.report is None:
        return esc(run.name)
    target = Path(os.path.relpath(run.report, folder)).as_posix()
    return f'<a href="{esc(target)}">{esc(run.name)}</a>'


def _settings(told: Comparative) -> str:
    """What the plans differ in."""
    names = [run.name for run in told.runs]
    rows = [[key, *values] for key, values in told.settings.items()]
    said = table(["setting", *names], rows) if rows else "<p>No setting: only the data files differ.</p>"
    return (
        '<section id="settings"><h2>What the plans differ in</h2>'
        '<p class="reading"><b>How to read this.</b> Every value of the configs that is not the same in all '
        f"plans; all else is equal.</p>{said}</section>"
    )


def _provenance(told: Comparative) -> str:
    rows = [
        [run.name, run.run_dir, run.basis, f"{run.threshold:g}", f"{run.confidence:.0%}"] for run in told.runs
    ]
    header = ["run", "run directory", "rests on", "threshold (nats/token)", "confidence"]
    return (
        f'<section id="provenance"><h2>Provenance</h2>{table(header, rows)}'
        f"<h3>Made by</h3><pre><code>{esc(told.command)}</code></pre></section>"
    )
