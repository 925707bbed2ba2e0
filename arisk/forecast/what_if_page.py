"""The what-if map: learning rate × steps, each cell saying what filled it."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from arisk.forecast.record import WhatIfCell, WhatIfGrid, WhatIfRow
from arisk.forecast.worth import validity, worth_line
from arisk.report.figure import Figure, axes
from arisk.report.text import number

__all__ = ["UNKNOWN", "cell_ink", "colour_at", "what_if_map"]

#: Light to dark, so that the order survives without colour; the middle is the threshold.
COLOURS: list[tuple[float, str]] = [(0, "#fff5eb"), (0.5, "#fd8d3c"), (1, "#7f2704")]
UNKNOWN = "#b8bdc4"
#: Heading of the last column: the longest run that keeps refusals and loss within their limits.
BUDGET = "safe<br>steps"


def what_if_map(grid: WhatIfGrid) -> Figure:
    """Refusals, or where none were counted the safety loss, at the end of whole runs of other plans."""
    rates = [number(row.learning_rate) for row in grid.rows]
    steps = [str(step) for step in grid.steps]
    cells = [list(row.cells) for row in grid.rows]
    base: dict[str, Any] = {
        "type": "heatmap",
        "x": steps,
        "y": rates,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False,
        "showscale": False,
    }
    told = [[_hover(row, cell, grid) for cell in row.cells] for row in grid.rows]
    known = {
        **base,
        "z": [[_shade(cell, grid) for cell in row] for row in cells],
        "customdata": told,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [list(stop) for stop in COLOURS],
    }
    unknown = {
        **base,
        "z": [[1 if cell.state == "not_measured" else None for cell in row] for row in cells],
        "customdata": told,
        "colorscale": [[0, UNKNOWN], [1, UNKNOWN]],
    }
    data: list[dict[str, Any]] = [unknown, known, _labels(grid, rates, steps)]
    layout = axes("optimizer steps of the whole run", "peak learning rate", shapes=_frames(grid))
    layout["xaxis"]["type"] = layout["yaxis"]["type"] = "category"
    layout["xaxis"]["tickangle"] = 0
    layout["xaxis"]["showgrid"] = layout["yaxis"]["showgrid"] = False
    filled = any(cell.state != "not_measured" for row in cells for cell in row)
    return Figure(
        "what-if",
        "What if",
        data,
        layout,
        _reading(grid),
        "ΔL_s(η', k) = combined(τ'_k), refused(η', k) = refused(τ'_k), τ'_k = Σ_{i≤k} η'_i, for τ'_k ≤ the "
        "largest τ measured",
        ["learning rate", "× plan", "longest safe run", *[f"{step} steps" for step in steps]],
        [
            [
                number(row.learning_rate),
                number(row.factor),
                row.budget_text(),
                *[_told(cell, grid) for cell in row.cells],
            ]
            for row in grid.rows
        ],
        None if filled else "no cell of the grid was measured",
        says=_says(grid) if filled else "",
        worth=_worth(),
    )


def _says(grid: WhatIfGrid) -> str:
    """The safest cell of use by name, and what the marks mean."""
    found = grid.safest()
    told = grid.rate_sentence()
    if found is not None and grid.safest_rate() is None:
        row, steps = found
        told += f" Safest useful cell (green frame): {steps} steps at {number(row.learning_rate)}."
    elif found is not None:
        told += " That cell has the green frame."
    states = {cell.state for row in grid.rows for cell in row.cells}
    rough = any(cell.rough for row in grid.rows for cell in row.cells)
    marks = [
        "✓ within the limits",
        "a number: rise of the loss at the end",
        "! collapses",
        *(["× diverges"] if "diverges" in states else []),
        *(["~ rough"] if rough else []),
        "blue frame: the plan",
        *(["grey: would need a run of its own"] if "not_measured" in states else []),
    ]
    return f"{told} {'; '.join(marks)}."


def _told(cell: WhatIfCell, grid: WhatIfGrid) -> str:
    """A cell in the table: refusals first, where the plan counted them."""
    loss = f"{cell.text(grid.threshold)} ({cell.basis})"
    return f"{grid.refused_text(cell)} refused; {loss}" if grid.today else loss


def _reading(grid: WhatIfGrid) -> str:
    """How to read the map, and how it was filled."""
    number_is = (
        "the number is the change of the safety loss it ends with (nats / response token); darker is more, "
        f"up to +{2 * grid.threshold:g}."
    )
    if grid.today:
        number_is = (
            f"the number is how many of {grid.prompts} safety prompts are refused at its end ({grid.today} "
            "are today); darker is fewer, down to none. Where that was not measured it is the change of the "
            "safety loss (with a point; nats / response token)."
        )
    parts = [
        f"Each cell is a whole run of that many steps at that peak learning rate; {number_is}",
        f"✓ stays within the limits all the way: {grid.limits()}. A number without a mark does not, and does "
        "not collapse either.",
        *(["! after a count: too many refusals are lost."] if grid.today else []),
        f"! collapses: +{grid.threshold:g} is reached on the way (alone: its end was not measured).",
        "× diverges.",
        "~ rough: far above the planned rate and rather too low, or by the local model with a frozen "
        "preconditioner.",
        "Grey was not measured and would need a run of its own; that is not the same as safe.",
        "Framed in blue is the plan. Right: the safe-step budget, the longest run that keeps refusals and "
        f"loss (+{grid.threshold:g}) within their limits, intervals included.",
        *grid.notes,
    ]
    return " ".join(parts)


def _cell_text(cell: WhatIfCell, grid: WhatIfGrid) -> str:
    """A tick where all is well, nothing where nothing was measured, else the number and its marks."""
    if cell.state == "not_measured":
        return ""
    if cell.stays_below(grid.alarm):
        return "~✓" if cell.rough else "✓"
    if grid.today and cell.refused is not None:
        return grid.refused_text(cell)
    return _short(cell.text(grid.threshold))


def _worth() -> str:
    """What reading another learning rate off the rollout was worth."""
    title = "What-if: a third or a quarter of a learning rate, read off its rollout"
    found = {row["name"]: row for row in validity().get(title, [])}
    row = found.get("read off the rollout at the higher rate")
    if row is None:
        return worth_line("combined", "In the framed cell")
    own = found.get("its own forecast", {}).get("ρ final")
    beside = "" if own is None else f" (its own rollout: {own:.2f})"
    return (
        f"{worth_line('combined', 'In the framed cell')} A third or a quarter of the rate, read off the "
        f"higher one: ρ {row['ρ final']:.2f}{beside}, {row['jobs']} real fine-tunes. Higher rates were not "
        "tested."
    )


def _short(text: str) -> str:
    """Without the zero before the point: a cell of a phone holds five characters."""
    return re.sub(r"(?<!\d)0\.", ".", text)


def _labels(grid: WhatIfGrid, rates: list[str], steps: list[str]) -> dict[str, Any]:
    """The cells' numbers, each in an ink that is read on its own shade."""
    flat = [
        (rate, step, cell)
        for rate, row in zip(rates, grid.rows, strict=True)
        for step, cell in zip(steps, row.cells, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [step for _, step, _ in flat] + [BUDGET] * len(rates),
        "y": [rate for rate, _, _ in flat] + rates,
        "text": [_cell_text(cell, grid) for *_, cell in flat]
        + [f"<b>{'?' if row.safe_steps is None else row.budget_text()}</b>" for row in grid.rows],
        "textfont": {
            "size": 13,
            "color": [cell_ink(_shade(cell, grid), 1.0) for *_, cell in flat] + ["ink"] * len(rates),
        },
        "hoverinfo": "skip",
        "showlegend": False,
    }


def cell_ink(shade: float | None, top: float) -> str:
    """Black or white, whichever is read better on a shade; None is the grey of what was not measured.

    Whatever the shade, the better of the two has a contrast of √21 = 4.58 or more.
    """
    colour = UNKNOWN if shade is None else colour_at(min(max(shade / top, 0.0), 1.0))
    light = 0.0
    for weight, at in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        channel = int(colour[at : at + 2], 16) / 255
        light += weight * (channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4)
    return "#000000" if (light + 0.05) ** 2 >= 0.05 * 1.05 else "#ffffff"


def colour_at(share: float) -> str:
    """The colour of the scale at a share of it, from 0 to 1, as plotly mixes it."""
    for (start, first), (end, last) in pairwise(COLOURS):
        if share <= end:
            part = (share - start) / (end - start)
            mixed = [
                round((1 - part) * int(first[at : at + 2], 16) + part * int(last[at : at + 2], 16))
                for at in (1, 3, 5)
            ]
            return "#{:02x}{:02x}{:02x}".format(*mixed)
    return COLOURS[-1][1]


def _shade(cell: WhatIfCell, grid: WhatIfGrid) -> float | None:
    """Share of today's refusals that is lost, else of twice the threshold, from 0; None: not measured."""
    if cell.state == "not_measured":
        return None
    if grid.today and cell.refused is not None:
        return min(max(1 - cell.refused * grid.prompts / grid.today, 0.0), 1.0)
    if cell.change is None or not math.isfinite(cell.change):
        return 1.0
    return cell.change / (2 * grid.threshold)


def _hover(row: WhatIfRow, cell: WhatIfCell, grid: WhatIfGrid) -> str:
    """Everything about one cell, line by line."""
    lines = [f"{cell.steps} steps at {row.learning_rate:.3g} ({row.factor:.3g} × the plan)"]
    if cell.state == "not_measured":
        return "<br>".join([*lines, "not measured: would need its own run", cell.note])
    if cell.refused is not None:
        ends = [round((share or 0.0) * grid.prompts) for share in (cell.refused_lower, cell.refused_upper)]
        count = round(cell.refused * grid.prompts)
        lines.append(f"refuses {count} of {grid.prompts} at its end [{ends[0]}, {ends[1]}]")
    elif grid.today:
        lines.append("refusals: would need its own run")
    if cell.change is not None:
        lines.append(f"ends at {number(cell.change)} [{number(cell.lower)}, {number(cell.upper)}] nats/token")
        lines.append(f"peak {number(cell.peak)}")
    else:
        lines.append("diverges" if cell.state == "diverges" else "its end was not measured")
    step = cell.collapse_step
    lines.append("no collapse" if step is None else f"collapses at step {step}")
    lines.append(f"by the {cell.basis}")
    return "<br>".join([*lines, f"rough: {cell.note}"] if cell.rough else lines)


def _frames(grid: WhatIfGrid) -> list[dict[str, Any]]:
    """A blue frame around the plan's cell and a green one around the safest of use; white around both."""
    found, frames = grid.safest(), []
    for y, row in enumerate(grid.rows):
        for x, step in enumerate(grid.steps):
            box = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
            colours = ["#0072B2"] if grid.is_plan(row, step) else []
            colours += ["#009E73"] if found == (row, step) else []
            for colour in colours:
                # White around the colour is seen on light cells and on dark ones.
                for ink, width in (("#ffffff", 7), (colour, 3.5)):
                    frames.append({"type": "rect", **box, "line": {"color": ink, "width": width}})
    return frames
