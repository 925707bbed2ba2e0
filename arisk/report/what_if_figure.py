"""The what-if map: learning rate × steps, each cell saying what filled it."""

from __future__ import annotations

import math
import re
from typing import Any

from arisk.grid import WhatIfCell, WhatIfGrid, WhatIfRow
from arisk.report.figure import Figure, axes
from arisk.report.text import number

__all__ = ["what_if_map"]

#: Light to dark, so that the order survives without colour; the middle is the threshold.
COLOURS = [[0, "#fff5eb"], [0.5, "#fd8d3c"], [1, "#7f2704"]]
UNKNOWN = "#b8bdc4"


def what_if_map(grid: WhatIfGrid) -> Figure:
    """Safety loss at the end of whole runs at other learning rates and lengths."""
    rates = [number(row.learning_rate) for row in grid.rows]
    steps = [str(step) for step in grid.steps]
    cells = [list(row.cells) for row in grid.rows]
    base: dict[str, Any] = {
        "type": "heatmap",
        "x": steps,
        "y": rates,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": "%{text}",
        "textfont": {"size": 13},
        "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False,
        "showscale": False,
    }
    told = [[_hover(row, cell) for cell in row.cells] for row in grid.rows]
    top = 2 * grid.threshold
    known = {
        **base,
        "z": [[_shade(cell, top) for cell in row] for row in cells],
        "text": [[_short(cell.text(grid.threshold)) for cell in row] for row in cells],
        "customdata": told,
        "zmin": 0,
        "zmax": top,
        "colorscale": COLOURS,
    }
    unknown = {
        **base,
        "z": [[1 if cell.state == "not_measured" else None for cell in row] for row in cells],
        "text": [["?" if cell.state == "not_measured" else "" for cell in row] for row in cells],
        "customdata": told,
        "colorscale": [[0, UNKNOWN], [1, UNKNOWN]],
    }
    data: list[dict[str, Any]] = [unknown, known]
    layout = axes("optimizer steps of the whole run", "peak learning rate", shapes=_plan(grid))
    layout["xaxis"]["type"] = layout["yaxis"]["type"] = "category"
    layout["xaxis"]["showgrid"] = layout["yaxis"]["showgrid"] = False
    filled = any(cell.state != "not_measured" for row in cells for cell in row)
    return Figure(
        "what-if",
        "What if",
        data,
        layout,
        _reading(grid),
        "ΔL_s(η', k) = combined(τ'_k), τ'_k = Σ_{i≤k} η'_i, for τ'_k ≤ the largest τ measured",
        ["learning rate", "× plan", "longest safe run", *[f"{step} steps" for step in steps]],
        [
            [
                number(row.learning_rate),
                number(row.factor),
                row.budget_text(),
                *[f"{cell.text(grid.threshold)} ({cell.basis})" for cell in row.cells],
            ]
            for row in grid.rows
        ],
        None if filled else "no cell of the grid was measured",
    )


def _reading(grid: WhatIfGrid) -> str:
    """How to read the map, how far each learning rate goes, and how the map was filled."""
    parts = [
        "Each cell is a whole run of that many steps at that peak learning rate, its schedule stretched to "
        "it; the number is the change of the safety loss it ends with, in nats per response token; darker "
        f"is more, up to +{2 * grid.threshold:g}.",
        f"! collapses: +{grid.threshold:g} is reached on the way (alone: its end was not measured).",
        "× diverges.",
        "~ rough: far above the planned rate and rather too low, or by the local model with a frozen "
        "preconditioner.",
        "Grey ? was not measured; that is not the same as safe.",
        "The framed cell is the plan.",
        _budgets(grid),
        *grid.notes,
    ]
    return " ".join(parts)


def _budgets(grid: WhatIfGrid) -> str:
    """The longest safe run of every learning rate, in one line."""
    runs = " · ".join(f"{number(row.learning_rate)}: {row.budget_text()}" for row in grid.rows)
    return f"Longest run (steps) whose upper interval stays below the threshold, by learning rate: {runs}."


def _short(text: str) -> str:
    """Without the zero before the point: a cell of a phone holds five characters."""
    return re.sub(r"(?<!\d)0\.", ".", text)


def _shade(cell: WhatIfCell, top: float) -> float | None:
    if cell.state == "not_measured":
        return None
    return top if cell.change is None or not math.isfinite(cell.change) else cell.change


def _hover(row: WhatIfRow, cell: WhatIfCell) -> str:
    """Everything about one cell, line by line."""
    lines = [f"{cell.steps} steps at {row.learning_rate:.3g} ({row.factor:.3g} × the plan)"]
    if cell.state == "not_measured":
        return "<br>".join([*lines, "not measured", cell.note])
    if cell.change is not None:
        lines.append(f"ends at {number(cell.change)} [{number(cell.lower)}, {number(cell.upper)}] nats/token")
        lines.append(f"peak {number(cell.peak)}")
    else:
        lines.append("diverges" if cell.state == "diverges" else "its end was not measured")
    step = cell.collapse_step
    lines.append("no collapse" if step is None else f"collapses at step {step}")
    lines.append(f"by the {cell.basis}")
    return "<br>".join([*lines, f"rough: {cell.note}"] if cell.rough else lines)


def _plan(grid: WhatIfGrid) -> list[dict[str, Any]]:
    """A frame around the cell of the plan, where the grid holds it; categories sit at whole numbers."""
    frames: list[dict[str, Any]] = []
    for y, row in enumerate(grid.rows):
        for x, step in enumerate(grid.steps):
            if grid.is_plan(row, step):
                box = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
                # White around blue is seen on light cells and on dark ones.
                for colour, width in (("#ffffff", 7), ("#0072B2", 3.5)):
                    frames.append({"type": "rect", **box, "line": {"color": colour, "width": width}})
    return frames
