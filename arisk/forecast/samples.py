"""Per-sample drift: whether it is shared by all safety rows, and which rows lose most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.anatomy.record import CollectResult
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.report.figure import LEGEND, Figure, axes, threshold_line
from arisk.report.rows import Column, rows_table
from arisk.report.text import last_drift, number, sample_sentence
from arisk.report.worth import worth_line

__all__ = ["sample_drift", "sample_table"]

LOST, KEPT = "#D55E00", "#0072B2"
COLUMNS = (
    Column("safety row"),
    Column("change", "descending"),
    Column("loss at the start"),
    Column("lost at step"),
)


def sample_drift(measured: RolloutResult, forecast: ForecastResult, collected: CollectResult) -> Figure:
    """Every safety sample's change at the last finite point of the rollout, in ascending order."""
    reading = (
        "One dot per safety row, sorted: how much its loss has changed at the end of the virtual run. A line "
        "that is flat and then shoots up means that a few rows are lost; one that lies above the threshold "
        "as a whole means that safety is lost everywhere. The mean is what the forecast shows."
    )
    equation = "ℓ_i(θ_k) − ℓ_i(θ*) for each safety row i, ascending"
    header = ["share of rows", "change at most"]
    drift = last_drift(measured)
    if drift is None:
        missing = measured.reason or "the rollout has no finite point after its start"
        return Figure("samples", "Drift row by row", [], {}, reading, equation, header, [], missing)
    step, values = drift
    ranked = sorted(enumerate(values), key=lambda pair: pair[1])
    lines = _lines(measured, collected)
    data = [
        _dots("below the threshold", KEPT, ranked, lines, lambda v: v < forecast.threshold),
        _dots("lost", LOST, ranked, lines, lambda v: v >= forecast.threshold),
    ]
    line = threshold_line(forecast.threshold, None, 100)
    mean = sum(values) / len(values)
    layout = axes(
        "safety rows, sorted (% of rows)",
        f"change of loss at step {step} (nats / token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        legend=LEGEND,
    )
    layout["xaxis"]["range"] = [-2, 102]
    quantiles = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    return Figure(
        "samples",
        "Drift row by row",
        [trace for trace in data if trace["x"]],
        layout,
        reading,
        equation,
        header,
        [
            *[[f"{q:.0%}", number(ranked[round(q * (len(ranked) - 1))][1])] for q in quantiles],
            ["mean", number(mean)],
        ],
        says=sample_sentence(measured, forecast.threshold) or "",
        worth=f"{worth_line('rollout')} That is about the mean; single rows were not compared one by one.",
    )


def _dots(
    name: str, colour: str, ranked: Sequence[tuple[int, float]], lines: Sequence[Any] | None, keep: Any
) -> dict[str, Any]:
    last = max(1, len(ranked) - 1)
    kept = [(100 * rank / last, index, value) for rank, (index, value) in enumerate(ranked) if keep(value)]
    return {
        "type": "scatter",
        "name": name,
        "mode": "markers",
        "x": [round(share, 3) for share, _, _ in kept],
        "y": [value for _, _, value in kept],
        "customdata": [index + 1 if lines is None else lines[index] for _, index, _ in kept],
        "marker": {"color": colour, "size": 6, "symbol": "circle" if name != "lost" else "diamond"},
        "hovertemplate": "row %{customdata}: %{y:+.3g}<extra></extra>",
    }


def _lines(measured: RolloutResult, collected: CollectResult) -> list[Any] | None:
    """The data file's line of each measured sample; None where rows cannot be matched."""
    rows = _matched(measured, collected)
    return None if rows is None else [row.get("line", index + 1) for index, row in enumerate(rows)]


def _matched(measured: RolloutResult, collected: CollectResult) -> Sequence[Mapping[str, Any]] | None:
    """Rows of collect in the order of the rollout: both read the same data, collect drops duplicates."""
    count = measured.safety.shape[0]
    if collected.dropped_duplicates or len(collected.rows) < count:
        return None
    return collected.rows[:count]


def sample_table(
    measured: RolloutResult, forecast: ForecastResult, collected: CollectResult, show_text: bool, limit: int
) -> str:
    """The safety rows that lose most, sortable, their text folded away."""
    drift = last_drift(measured)
    if drift is None:
        return ""
    step, values = drift
    rows = _matched(measured, collected) or [{}] * len(values)
    worst = sorted(range(len(values)), key=lambda i: -values[i])[:limit]
    told = [
        (
            [
                rows[i].get("line", i + 1),
                values[i],
                float(collected.losses[i]) if rows[i] else None,
                _lost_at(measured, i, forecast.threshold),
            ],
            rows[i],
        )
        for i in worst
    ]
    note = (
        ""
        if rows[0]
        else '<p class="note">Texts are not shown: duplicates were dropped from the gradients, so rows '
        "cannot be matched by place.</p>"
    )
    return (
        f"<h3>Safety rows that lose most by step {step}</h3>"
        '<p class="note">Changes and losses in nats per token. Lost at step: first measured step at which '
        f"the row has lost {forecast.threshold:g} or more; – where it has not.</p>"
        f"{note}{rows_table(COLUMNS, told, show_text, 'safety rows that lose most')}"
    )


def _lost_at(measured: RolloutResult, row: int, threshold: float) -> str | int:
    changes = measured.safety[row].tolist()
    for step, change in zip(measured.steps, changes, strict=True):
        if math.isnan(change):
            continue
        if change >= threshold:
            return step
    return "–"
