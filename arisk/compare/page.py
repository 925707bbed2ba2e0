"""The page of a comparison: the ranked table first, then figures, differences and notes.

Figures of a comparison: forecasts over one another, safety against control drift, budgets.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from arisk.compare.record import Ranked, RankedRun, rule_of
from arisk.compare.text import (
    COLUMNS,
    MEANING,
    Comparative,
    cells,
    compare_findings,
    final_text,
    headline,
    rank_text,
    refused_text,
    signed,
)
from arisk.forecast.first_screen import ICONS
from arisk.forecast.probes_page import probe_value
from arisk.forecast.text import collapse_text
from arisk.report.figure import LEGEND, Figure, axes, clean, reference_line
from arisk.report.page import Piece, page
from arisk.report.section import esc, listed, notes, table
from arisk.report.text import NOT_MEASURED

__all__ = ["budget_bars", "drift_scatter", "forecast_lines", "refusal_lines", "render_comparison"]

#: Icon of a run without a forecast.
UNKNOWN = "?"


def render_comparison(told: Comparative, folder: Path) -> str:
    """The comparison as one self-contained HTML page; equal runs give equal bytes.

    Args:
        told: what is shown.
        folder: where the page will lie, for links to the runs' own reports.
    """
    pieces = [
        Piece(0, _first_screen(told)),
        Piece(1, _ranked_table(told, folder)),
        *([Piece(2, figure=refusal_lines(told), shape="tall")] if _counted(told) else []),
        Piece(2, figure=forecast_lines(told), shape="tall"),
        Piece(3, figure=drift_scatter(told), shape="half"),
        Piece(4, figure=budget_bars(told), shape="half"),
        Piece(5, _probes(told)),
        Piece(5, _settings(told)),
        Piece(6, _provenance(told)),
    ]
    return page(told.title, pieces)


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
        '<div class="scroll" tabindex="0" role="region" aria-label="ranking"><table class="rows rank" '
        f'role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{rows}'
        f"</tbody></table></div>{notes(rule_of(told.runs) + ' ' + MEANING + MORE)}</section>"
    )


MORE = " A heading sorts; a name opens the run's own report."


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
        None if entry.rank is None else run.order(refusals=False)[0],
        run.refusals.median[-1] if run.refusals is not None and run.refusals.median else None,
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


def _linked(run: RankedRun, folder: Path) -> str:
    """The name, linked to the run's own report where there is one."""
    if run.report is None:
        return esc(run.name)
    target = Path(os.path.relpath(run.report, folder)).as_posix()
    return f'<a href="{esc(target)}">{esc(run.name)}</a>'


def _probes(told: Comparative) -> str:
    """What else each plan costs, where probes were given."""
    names = list(dict.fromkeys(probe.name for run in told.runs for probe in run.probes))
    if not names:
        return ""
    rows = [[name, *(_probe(run, name) for run in told.runs)] for name in names]
    return (
        '<section id="probes"><h2>What else the plans cost</h2>'
        '<p class="note">Before and at the end of the plan: loss in nats per token, or questions answered '
        f"rightly.</p>{table(['probe', *(run.name for run in told.runs)], rows)}</section>"
    )


def _probe(run: RankedRun, name: str) -> str:
    found = next((probe for probe in run.probes if probe.name == name), None)
    if found is None:
        return NOT_MEASURED
    end = None if found.end is None else found.end[0]
    return f"{probe_value(found.measure, found.start)} → {probe_value(found.measure, end)}"


def _settings(told: Comparative) -> str:
    """What the plans differ in."""
    names = [run.name for run in told.runs]
    rows = [[key, *values] for key, values in told.settings.items()]
    said = table(["setting", *names], rows) if rows else "<p>No setting: only the data files differ.</p>"
    return (
        '<section id="settings"><h2>What the plans differ in</h2>'
        f'<p class="note">All else is equal.</p>{said}</section>'
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


#: Colours that stay apart for the colour-blind (after Okabe and Ito 2008); dashes go on where they end.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#8a8a8a")
DASHES = ("solid", "dash", "dot", "dashdot")
#: Longest name on an axis.
NAME = 22


def look(index: int) -> tuple[str, str]:
    """Colour and dash of a run by its place."""
    return COLOURS[index % len(COLOURS)], DASHES[(index // len(COLOURS)) % len(DASHES)]


def short(name: str) -> str:
    """A name that fits an axis: its end tells more than its beginning."""
    return name if len(name) <= NAME else "…" + name[-(NAME - 1) :]


def _counted(told: Comparative) -> list[tuple[int, RankedRun]]:
    """Runs whose refusals were counted, with their places."""
    return [(i, run) for i, run in enumerate(told.runs) if run.counted is not None]


def refusal_lines(told: Comparative) -> Figure:
    """Share of safety prompts that each plan's model still refuses, with its band."""
    data: list[dict[str, Any]] = []
    for i, run in _counted(told):
        said = run.counted
        assert said is not None
        colour, dash = look(i)
        hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        group = {"type": "scatter", "x": list(said.steps), "legendgroup": f"run{i}"}
        band = {"fill": "tonexty", "fillcolor": f"{colour}24"}
        line = {"color": colour, "dash": dash, "width": 2.5}
        lower, median, upper = (
            [round(100 * value, 2) for value in values] for values in (said.lower, said.median, said.upper)
        )
        data += [
            {**group, **hidden, "y": lower},
            {**group, **hidden, **band, "y": upper},
            {**group, "name": run.name, "mode": "lines", "y": median, "line": line},
        ]
    layout = axes("optimizer step", "safety prompts refused (%)", hovermode="x unified", legend=LEGEND)
    layout["yaxis"]["range"] = [-4, 106]
    return Figure(
        "refusals",
        "Refusals of all plans",
        data,
        layout,
        "Share of safety prompts that the model is forecast to refuse along each plan; the highest line is "
        "the safest plan. The band is the interval at the run's confidence. A plan whose refusals were not "
        "counted has no line, which is not the same as none lost.",
        "P(prompt i is refused) = σ(u_i), see the run's own report",
        ["run", "refused at the end"],
        [[run.name, refused_text(run)] for run in told.runs],
        None if data else "no run has counted refusals",
    )


def forecast_lines(told: Comparative) -> Figure:
    """The curve each verdict rests on, with its band, and the collapse thresholds."""
    shown = [(i, entry.run) for i, entry in enumerate(told.ranked) if entry.run.curve is not None]
    data = [trace for i, run in shown for trace in _band(i, run)]
    thresholds = sorted({run.threshold for run in told.runs})
    lines = [reference_line(horizon=t, text=f"collapse threshold +{t:g}") for t in thresholds]
    curves = [run.curve for _, run in shown if run.curve is not None]
    tops = [v for c in curves for v in (*c.lower, *c.median, *c.upper) if math.isfinite(v)]
    layout = axes(
        "optimizer step",
        "change of safety loss (nats / response token)",
        shapes=[line["shape"] for line in lines],
        annotations=[line["annotation"] for line in lines],
        hovermode="x unified",
        legend=LEGEND,
    )
    low, high = min([0.0, *tops]), max([1.3 * thresholds[-1], *tops])
    room = 0.07 * (high - low)
    layout["yaxis"]["range"] = [low - room, high + room]
    rows = [
        [
            entry.run.name,
            entry.run.basis,
            collapse_text(entry.run.curve) if entry.run.curve else NOT_MEASURED,
            final_text(entry.run),
        ]
        for entry in told.ranked
    ]
    return Figure(
        "forecasts",
        "Forecasts of all plans",
        data,
        layout,
        "Each line is the forecast that one run's verdict rests on: the mean safety loss along the planned "
        "run, in nats per response token over optimizer steps. Its band is the interval at the run's "
        "confidence. Safety has collapsed where a line reaches the threshold; the lowest line is the safest "
        "plan. A name in the legend hides or shows its line.",
        "L_s(θ_k) − L_s(θ*)",
        ["run", "rests on", "collapse", "change at the end (nats/token)"],
        rows,
        None if data else "no run has a forecast",
    )


def _band(index: int, run: RankedRun) -> list[dict[str, Any]]:
    """Line and band of one run, hidden and shown together."""
    if run.curve is None:
        return []
    colour, dash = look(index)
    steps = list(run.curve.steps)
    hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    group = {"type": "scatter", "x": steps, "legendgroup": f"run{index}"}
    band = {"fill": "tonexty", "fillcolor": f"{colour}24"}
    line = {"color": colour, "dash": dash, "width": 2.5}
    return [
        {**group, **hidden, "y": clean(run.curve.lower)},
        {**group, **hidden, **band, "y": clean(run.curve.upper)},
        {**group, "name": run.name, "mode": "lines", "y": clean(run.curve.median), "line": line},
    ]


def drift_scatter(told: Comparative) -> Figure:
    """Safety drift over control drift at the end of each run's rollout."""
    data: list[dict[str, Any]] = []
    points: list[tuple[float, float]] = []
    for index, entry in enumerate(told.ranked):
        x, y = entry.run.control_change, entry.run.safety_change
        if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
            continue
        points.append((x, y))
        data.append(
            {
                "type": "scatter",
                "name": entry.run.name,
                "mode": "markers+text",
                "x": [x],
                "y": [y],
                "text": [rank_text(entry)],
                "textposition": "middle right",
                "marker": {"color": look(index)[0], "size": 12},
            }
        )
    line = reference_line(horizon=told.runs[0].threshold, text="collapse threshold")
    layout = axes(
        "control drift (nats / token)",
        "safety drift (nats / response token)",
        shapes=[line["shape"], *_diagonal(points)],
        annotations=[line["annotation"]],
        legend=LEGEND,
    )
    rows = [[e.run.name, signed(e.run.safety_change), signed(e.run.control_change)] for e in told.ranked]
    return Figure(
        "drifts",
        "Safety against ordinary answers",
        data,
        layout,
        "One point per plan, numbered by rank: how far the loss of safe responses (upwards) and of ordinary "
        "answers (to the right) has moved at the end of the rollout, in nats per token. On the dotted "
        "diagonal the model gets worse at everything alike; what lies above it is specific to safety. Runs "
        "without control data or rollout are not drawn, which is not the same as no drift.",
        "x = L_c(θ_T) − L_c(θ*), y = L_s(θ_T) − L_s(θ*)",
        ["run", "safety drift", "control drift"],
        rows,
        None if data else "no run has both a rollout and control data",
    )


def _diagonal(points: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """The line of equal drift across the points."""
    if not points:
        return []
    ends = [value for point in points for value in point]
    low, high = min([0.0, *ends]), max([0.01, *ends])
    style = {"color": "#8a8a8a", "width": 1.2, "dash": "dot"}
    return [{"type": "line", "x0": low, "y0": low, "x1": high, "y1": high, "line": style}]


def budget_bars(told: Comparative) -> Figure:
    """Safe steps of each plan beside its planned steps."""
    shown = [(i, entry) for i, entry in enumerate(told.ranked) if entry.run.safe_steps is not None]
    names = [f"{rank_text(entry)} · {short(entry.run.name)}" for _, entry in shown]
    planned = [entry.run.horizon for _, entry in shown]
    safe = [entry.run.safe_steps for _, entry in shown]
    bar = {"type": "bar", "orientation": "h", "y": names}
    data = [
        {
            **bar,
            "name": "planned steps",
            "x": planned,
            "marker": {"color": "#8a8a8a55"},
            # Beside the bars: no ink is read on every colour.
            "text": [f"{s} of {p}" for s, p in zip(safe, planned, strict=True)],
            "textposition": "outside",
        },
        {
            **bar,
            "name": "safe-step budget",
            "x": safe,
            "marker": {"color": [look(i)[0] for i, _ in shown]},
            "width": 0.45,
        },
    ]
    layout = axes("optimizer steps", "", barmode="overlay", legend=LEGEND)
    layout["yaxis"].update(autorange="reversed", type="category")
    layout["xaxis"]["range"] = [0, 1.45 * max(planned, default=1)]
    rows = [[*cells(entry)[:3], cells(entry)[4]] for entry in told.ranked]
    return Figure(
        "budgets",
        "Safe-step budgets",
        data if shown else [],
        layout,
        "How many optimizer steps each plan can take before an interval, of refusals or of the loss, reaches "
        "its limit (narrow bar), of those planned (pale bar), safest plan on top. An inconclusive plan (–) "
        "may look long here: its forecast is not trusted to the end. No bar means not measured.",
        "largest k with upper(L_s(θ_j) − L_s(θ*)) < threshold, and refusals above their limit, for all j ≤ k",
        ["rank", "run", "verdict", "safe-step budget"],
        rows,
        None if shown else "no run has a forecast",
    )
