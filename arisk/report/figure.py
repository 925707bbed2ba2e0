"""What a figure is, and the pieces every figure uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "LEGEND",
    "TABLE_ROWS",
    "Figure",
    "axes",
    "clean",
    "reference_line",
    "step_lines",
    "thin",
    "threshold_line",
]

#: Rows of a table alternative; longer series are thinned.
TABLE_ROWS = 24
#: Above the plot, where it cannot cover the axis title however many lines it takes on a phone.
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        id: fixed element id.
        title: heading.
        data, layout: plotly's two halves; None data for a figure that was not measured.
        reading: how to read it.
        equation: the formula behind it.
        header, rows: the same numbers as a table.
        missing: why there is nothing to show; None when there is.
        says: what the figure shows in this run, in one sentence made from its numbers.
        worth: what this predictor was worth where it was compared with real fine-tunes.
        file: name of its image file where the field knows it by one; `report.figures: auto` draws these.
    """

    id: str
    title: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    reading: str
    equation: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    missing: str | None = None
    says: str = ""
    worth: str = ""
    file: str = ""


def clean(values: Sequence[float | None]) -> list[float | None]:
    """JSON has no NaN or infinity; plotly leaves a gap at null."""
    return [v if v is not None and math.isfinite(v) else None for v in values]


def thin(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """About `TABLE_ROWS` of the rows, the last one among them."""
    step = max(1, math.ceil(len(rows) / TABLE_ROWS))
    kept = list(rows[::step])
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]


def axes(x: str, y: str, **extra: Any) -> dict[str, Any]:
    """Layout with titled axes, and whatever else is given."""
    return {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
        **extra,
    }


def reference_line(*, horizon: float | None = None, step: int | None = None, text: str) -> dict[str, Any]:
    """A labelled reference line across the plot, horizontal or vertical."""
    style = {"type": "line", "line": {"color": "#8a8a8a", "width": 1.2, "dash": "dot"}}
    note = {"text": text, "showarrow": False, "font": {"size": 11}}
    if horizon is not None:
        shape = {**style, "xref": "paper", "x0": 0, "x1": 1, "y0": horizon, "y1": horizon}
        where = {"xref": "paper", "x": 0.01, "xanchor": "left", "y": horizon, "yanchor": "bottom"}
    else:
        shape = {**style, "yref": "paper", "y0": 0, "y1": 1, "x0": step, "x1": step}
        where = {"x": step, "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "top"}
    return {"shape": shape, "annotation": {**note, **where}}


def threshold_line(threshold: float, crossed: int | None, horizon: int) -> dict[str, Any]:
    """The collapse threshold, its label at the end away from where the curve crosses it.

    Args:
        threshold: collapse threshold (nats).
        crossed: step at which the curve to read reaches it; None where it does not.
        horizon: last step of the axis.
    """
    line = reference_line(horizon=threshold, text=f"collapse threshold +{threshold:g}")
    if crossed is not None and crossed < horizon / 2:
        line["annotation"].update(x=0.99, xanchor="right")
    return line


def step_lines(marks: Sequence[tuple[int, str]], horizon: int) -> list[dict[str, Any]]:
    """Labelled vertical lines whose labels do not cover one another.

    Args:
        marks: steps with their labels.
        horizon: last step; labels in the right half are written to the left of their line.
    """
    lines: list[dict[str, Any]] = []
    for level, (step, text) in enumerate(sorted(marks)):
        line = reference_line(step=step, text=text)
        line["annotation"]["y"] = 1 - 0.065 * level
        if step > horizon / 2:
            line["annotation"]["xanchor"] = "right"
        lines.append(line)
    return lines
