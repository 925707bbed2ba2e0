"""What `arisk what-if` does: re-forecast a run directory at other learning rates and lengths.

Reads artifacts alone: no model is loaded and nothing is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arisk.base.artifacts import read_record
from arisk.base.errors import ConfigError
from arisk.base.terminal import table
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.config.yaml import validate_mapping
from arisk.engine.freshness import made_from
from arisk.engine.rundir import RunDir
from arisk.forecast.record import WhatIfCell, WhatIfGrid, WhatIfRow
from arisk.forecast.stage import FORECAST
from arisk.report.text import percent

__all__ = ["grid_json", "grid_text", "number_list", "reforecast"]

Number = TypeVar("Number", int, float)
#: Most values of a list, and the longest run.
MOST, LONGEST = 64, 10_000_000


def number_list(text: str | None, kind: Callable[[str], Number], option: str) -> list[Number] | None:
    """Positive numbers from `1e-4,2e-4`; None where the option was not given.

    Args:
        text: what was typed.
        kind: `int` or `float`.
        option: its name, for messages.

    Raises:
        ConfigError: an item is no positive number of that kind, or there are none or too many.
    """
    if text is None:
        return None
    what = "whole number" if kind is int else "number"
    fix = f"give positive {what}s with commas between, e.g. {option} " + (
        "100,500" if kind is int else "1e-4,2e-4"
    )
    items = [item.strip() for item in text.split(",")]
    if len(items) > MOST:
        raise ConfigError(f"{len(items)} values are too many, the most is {MOST}", where=option, fix=fix)
    values: list[Number] = []
    for item in items:
        try:
            value = kind(item)
        except ValueError as err:
            raise ConfigError(f"{item!r} is not a {what}", where=option, fix=fix) from err
        if not (math.isfinite(value) and value > 0) or (kind is int and value > LONGEST):
            limit = f" up to {LONGEST}" if kind is int else ""
            raise ConfigError(f"{item} is not a positive {what}{limit}", where=option, fix=fix)
        values.append(value)
    return values


def reforecast(
    run: Path, *, rates: Sequence[float] | None = None, lengths: Sequence[int] | None = None
) -> WhatIfGrid:
    """The what-if grid of a finished run, from its artifacts.

    Args:
        run: the run directory.
        rates: peak learning rates; default multiples of the planned one.
        lengths: optimizer steps; default multiples of the planned number.

    Raises:
        ArtifactError: no run directory, or a stage is missing, damaged, of another version of arisk, or
            not the one the forecast was made from.
    """
    from arisk.anatomy.record import ScoreResult
    from arisk.forecast.record import ForecastResult
    from arisk.forecast.what_if import known, what_if

    rundir = RunDir(run)
    made = made_from(rundir, FORECAST, reads=("score",))
    scored = None
    if "score" in made["upstream"]:
        rundir.verify("score", deep=False)
        scored = read_record(rundir.stage_dir("score"), ScoreResult)
    forecast = read_record(rundir.stage_dir("forecast"), ForecastResult)
    where = str(rundir.stage_dir("forecast"))
    source = known(
        scored,
        forecast.forecasters,
        config=validate_mapping(ForecastConfig, made["config"]["forecast"], where),
        training=validate_mapping(TrainingConfig, made["config"]["training"], where),
        steps=int(forecast.training["steps"]),
        seed=int(made["seed"]),
        refusals=forecast.refusals,
    )
    return what_if(source, rates=rates, lengths=lengths)


def grid_json(grid: WhatIfGrid) -> dict[str, Any]:
    """Plain values for `--json`; what is not known or not finite is null."""
    return _plain(dataclasses.asdict(grid))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grid_text(grid: WhatIfGrid, *, cells: bool = False) -> str:
    """The grid as tables for a terminal, with its answers below.

    Args:
        grid: the grid.
        cells: one line per cell with interval, peak and basis, instead of the two tables.
    """
    counted = [_refused(grid), ""] if grid.today else []
    parts = [_long(grid)] if cells else [*counted, _ends(grid), "", _collapses(grid)]
    used = sorted({cell.basis for row in grid.rows for cell in row.cells} - {"none"})
    answers = [
        f"cells filled by: {', '.join(used) or 'nothing'}",
        "! collapses, or loses too many refusals (alone: its end was not measured)   × diverges   * the plan",
        "~ rough: far above the planned rate and rather too low, or by a frozen preconditioner",
        "? not measured, which is not the same as safe",
        "",
        f"safe-step budget, longest run within the limits, intervals included ({_limits(grid)}):",
        *[f"  {_rate(row)}: {row.budget_text()}" for row in grid.rows],
        grid.rate_sentence(),
        *[f"note: {note}" for note in grid.notes],
    ]
    return "\n".join([*parts, "", *answers])


def _limits(grid: WhatIfGrid) -> str:
    lost = grid.refusals_lost
    refusals = "" if lost is None else f", less than {percent(lost)} of refusals lost"
    return f"loss up by less than {grid.threshold:g}{refusals}"


def _rate(row: WhatIfRow) -> str:
    mark = "*" if row.factor == 1.0 else ""
    return f"{mark}{row.learning_rate:.3g} ({row.factor:.3g} × plan)"


def _matrix(grid: WhatIfGrid, title: str, show: Callable[[WhatIfCell], str]) -> str:
    header = ["learning rate", *[f"{'*' if s == grid.planned_steps else ''}{s}" for s in grid.steps]]
    rows = [[_rate(row), *[show(cell) for cell in row.cells]] for row in grid.rows]
    return f"{title}\n{table(rows, header)}"


def _ends(grid: WhatIfGrid) -> str:
    title = f"change of the safety loss after so many steps (nats/token; +{grid.threshold:g} is collapse)"
    return _matrix(grid, title, lambda cell: cell.text(grid.threshold))


def _refused(grid: WhatIfGrid) -> str:
    title = f"safety prompts refused after so many steps (of {grid.prompts}; {grid.today} today)"
    return _matrix(grid, title, grid.refused_text)


def _collapses(grid: WhatIfGrid) -> str:
    def step(cell: WhatIfCell) -> str:
        if cell.state == "not_measured":
            return "?"
        return "none" if cell.collapse_step is None else str(cell.collapse_step)

    return _matrix(grid, "collapse step of those runs", step)


def _long(grid: WhatIfGrid) -> str:
    def shown(value: float | None) -> str:
        return "?" if value is None else f"{value:+.3g}"

    rows = [
        [
            _rate(row),
            str(cell.steps),
            shown(cell.change),
            f"{shown(cell.lower)} … {shown(cell.upper)}",
            shown(cell.peak),
            *([_between(grid, cell)] if grid.today else []),
            "?" if cell.state == "not_measured" else str(cell.collapse_step or "none"),
            f"{cell.state.replace('_', ' ')}{' ~' if cell.rough else ''}",
            cell.basis,
        ]
        for row in grid.rows
        for cell in row.cells
    ]
    refused = [f"refused of {grid.prompts}"] if grid.today else []
    return table(
        rows, ["learning rate", "steps", "end", "interval", "peak", *refused, "collapse", "state", "by"]
    )


def _between(grid: WhatIfGrid, cell: WhatIfCell) -> str:
    """Prompts refused with their interval."""
    if cell.refused_lower is None or cell.refused_upper is None:
        return grid.refused_text(cell)
    ends = [round(share * grid.prompts) for share in (cell.refused_lower, cell.refused_upper)]
    return f"{grid.refused_text(cell)} ({ends[0]} to {ends[1]})"
