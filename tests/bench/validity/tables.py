"""From stored results to tables: forecasters beside baselines, groups, ceiling, ablations, coverage."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arisk.base.artifacts import read_record
from arisk.config.plan import ForecastConfig
from arisk.forecast.measured import combined_curve, pilot_curve, rollout_curve
from arisk.forecast.record import Curve, RolloutResult
from arisk.forecast.verdict import decide
from arisk.training.recipe import recipe_of
from tests.bench.validity.jobs import Job, job_config
from tests.bench.validity.scores import Case, Line, interval, resampled, rho
from tests.bench.validity.whatif import stored_records, what_if_pairs

#: Stands for the change of a run that diverged (nats).
DIVERGED = 50.0
READERS = {"pilot": pilot_curve, "rollout": rollout_curve, "combined": combined_curve}
Row = dict[str, Any]


def stored(kind: str, job: Job, folder: Path) -> dict[str, Any] | None:
    """A stored result, None where it was not computed."""
    path = folder / kind / f"{job.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def truth_line(job: Job, folder: Path) -> Line | None:
    """What really happened; a run that diverged ends far up."""
    found = stored("truth", job, folder)
    if found is None:
        return None
    steps, values = list(found["steps"]), [_plain(v) for v in found["safety"]]
    if steps[-1] < job.steps:
        steps, values = [*steps, job.steps], [*values, DIVERGED]
    return Line(steps, values)


def record_of(job: Job, folder: Path) -> RolloutResult | None:
    """The stored rollout of a job."""
    path = folder / "rollouts" / job.name
    return read_record(path, RolloutResult) if path.exists() else None


def said_lines(job: Job, folder: Path, config: ForecastConfig) -> dict[str, Line]:
    """Every forecaster's curve; those of the rollout are made anew from its record."""
    found = stored("forecast", job, folder)
    record = record_of(job, folder)
    if record is None:
        return {}
    if found is None:
        found = {"curves": {}, "baselines": {}}
    lines = {
        name: Line(c["steps"], [_plain(v) for v in c["median"]])
        for name, c in found["curves"].items()
        if name in ("bound", "local", "ray")
    }
    plan = recipe_of(job_config(job, folder).training, job.steps)
    for name, reader in READERS.items():
        lines[name] = line_of(reader(record, plan, config, 0))
    if "bound" in lines:
        lines["peer"] = peer_line(lines["bound"], _plain(found["baselines"]["peer"]))
    return lines


def peer_line(bound: Line, final: float) -> Line:
    """The published forecast: the bound's curve times the smallest retained eigenvalue."""
    factor = final / bound.final if bound.final > 0 else 0.0
    return Line(bound.steps, [min(value * factor, DIVERGED) for value in bound.values])


def line_of(curve: Curve) -> Line:
    """A curve of the product as a line."""
    ends = curve.collapse_interval
    return Line(
        list(curve.steps),
        [_plain(v) for v in curve.median],
        [_plain(v) for v in curve.lower],
        [_plain(v) for v in curve.upper],
        None if ends is None else (ends[0], ends[1]),
    )


def scalars(job: Job, folder: Path) -> dict[str, float]:
    """Plain numbers known before training, larger meaning worse."""
    found = stored("forecast", job, folder)
    return {} if found is None else {k: _plain(v) for k, v in found["baselines"].items()}


def extrapolated(truth: Line, known: int) -> Line:
    """What `known` real steps say: the loss grows on as the power law of its last half.

    Where fewer than three points of it were measured, the last three points.
    """
    kept = [(s, v) for s, v in zip(truth.steps, truth.values, strict=True) if 0 < s <= known]
    at, last = kept[-1]
    half = sum(s >= known / 2 for s, _ in kept)
    pairs = [(math.log(s), math.log(v)) for s, v in kept[-max(half, 3) :] if v > 0]
    power = 0.0
    if last > 0 and len(pairs) >= 2:
        mean_x = sum(x for x, _ in pairs) / len(pairs)
        mean_y = sum(y for _, y in pairs) / len(pairs)
        power = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)
        power = min(max(power, 0.0), 4.0)
    return Line(truth.steps, [v if s <= at else last * (s / at) ** power for s, v in _pairs(truth)])


def _pairs(line: Line) -> Iterable[tuple[int, float]]:
    return zip(line.steps, line.values, strict=True)


def _plain(value: float | None) -> float:
    """Finite: a diverged or missing value is far up."""
    return DIVERGED if value is None or not math.isfinite(value) else min(value, DIVERGED)


def cases_of(jobs: Sequence[Job], folder: Path, config: ForecastConfig) -> dict[str, list[Case]]:
    """Cases by forecaster, the same jobs in the same order; jobs without results are left out."""
    found: dict[str, list[Case]] = {}
    for job in jobs:
        truth, lines = truth_line(job, folder), said_lines(job, folder, config)
        if truth is None or not lines:
            continue
        lines["20 real steps, loss extrapolated"] = extrapolated(truth, 20)
        lines["30 real steps, loss extrapolated"] = extrapolated(truth, 30)
        for name, line in lines.items():
            found.setdefault(name, []).append(Case(job.data, job.group, truth, line))
    return found


def scalar_cases(jobs: Sequence[Job], folder: Path) -> dict[str, list[Case]]:
    """Baselines that are one number: its value stands for both peak and final change."""
    found: dict[str, list[Case]] = {}
    for job in jobs:
        truth = truth_line(job, folder)
        for name, value in scalars(job, folder).items():
            if truth is not None:
                found.setdefault(name, []).append(Case(job.data, job.group, truth, Line([0], [value])))
    return found


def ceiling_cases(jobs: Sequence[Job], folder: Path) -> list[Case]:
    """A second seed of the same jobs, as if it were a forecast."""
    found: list[Case] = []
    for job in jobs:
        truth, other = truth_line(job, folder), truth_line(replace(job, seed=job.seed + 1), folder)
        if truth is not None and other is not None:
            found.append(Case(job.data, job.group, truth, other))
    return found


def other_seed_cases(jobs: Sequence[Job], folder: Path, config: ForecastConfig, name: str) -> list[Case]:
    """The forecast of one seed against what happened with the other: batches in another order."""
    found: list[Case] = []
    for job in jobs:
        truth, lines = truth_line(replace(job, seed=job.seed + 1), folder), said_lines(job, folder, config)
        if truth is not None and lines:
            found.append(Case(job.data, job.group, truth, lines[name]))
    return found


def ablation_cases(jobs: Sequence[Job], folder: Path, name: str) -> list[Case]:
    """A rollout with one part changed."""
    found: list[Case] = []
    for job in jobs:
        truth, other = truth_line(job, folder), stored(f"ablation/{name}", job, folder)
        if truth is not None and other is not None:
            line = Line(other["steps"], [_plain(v) for v in other["median"]])
            found.append(Case(job.data, job.group, truth, line))
    return found


LEVELS = ("low", "elevated", "high", "inconclusive")


def verdicts(
    jobs: Sequence[Job], folder: Path, config: ForecastConfig, threshold: float
) -> list[tuple[Job, str, bool]]:
    """Of every job that was computed: the verdict's level, and whether it really collapsed."""
    found: list[tuple[Job, str, bool]] = []
    for job in jobs:
        truth, record = truth_line(job, folder), record_of(job, folder)
        if truth is None or record is None:
            continue
        plan = recipe_of(job_config(job, folder).training, job.steps)
        curves = {name: reader(record, plan, config, 0) for name, reader in READERS.items()}
        level = decide(curves, config, job.steps).level
        found.append((job, level, truth.crossing(threshold) is not None))
    return found


def verdict_rows(found: Sequence[tuple[Job, str, bool]]) -> list[Row]:
    """How many jobs collapsed, by the verdict's level."""
    counts = Counter((level, collapsed) for _, level, collapsed in found)
    return [
        {"name": level, "collapsed": counts[level, True], "did not": counts[level, False]} for level in LEVELS
    ]


def verdict_group_rows(found: Sequence[tuple[Job, str, bool]]) -> list[Row]:
    """The same within every mode and optimizer: those that collapsed and those that did not, by level."""
    rows: list[Row] = []
    for group in sorted({job.group for job, _, _ in found}):
        counts = Counter((level, collapsed) for job, level, collapsed in found if job.group == group)
        row: Row = {"name": group}
        for collapsed, word in ((True, "collapsed"), (False, "did not")):
            row[word] = sum(counts[level, collapsed] for level in LEVELS)
            row |= {f"{word}: {level}": counts[level, collapsed] for level in LEVELS}
        rows.append(row)
    return rows


def what_if_cases(jobs: Sequence[Job], folder: Path, config: ForecastConfig) -> dict[str, list[Case]]:
    """The lower learning rate of every pair, forecast from the rollout at the higher one."""
    named = {job.name: job for job in jobs}
    found: dict[str, list[Case]] = {"read off the rollout at the higher rate": [], "its own forecast": []}
    for name, pair in what_if_pairs(stored_records(folder, jobs)).items():
        job = named[name]
        truth, own = truth_line(job, folder), said_lines(job, folder, config)
        if truth is None or not own or not pair["steps"]:
            continue
        read = Line(pair["steps"], [_plain(v) for v in pair["median"]])
        for title, line in zip(found, (read, own["combined"]), strict=True):
            found[title].append(Case(job.data, job.group, truth, line))
    return found


def rows_of(
    cases: Mapping[str, Sequence[Case]],
    columns: Mapping[str, Callable[[Sequence[Case]], float]],
    *,
    draws: int = 1000,
) -> list[Row]:
    """One row per forecaster: every measure with its 90 % interval over data sets."""
    rows: list[Row] = [{"name": name, "jobs": len(list_of)} for name, list_of in cases.items()]
    for column, measure in columns.items():
        drawn = resampled(cases, measure, draws=draws)
        for row, (name, list_of) in zip(rows, cases.items(), strict=True):
            row[column] = measure(list_of)
            row[f"{column} 90 %"] = interval(drawn[name])
    return rows


def group_rows(cases: Mapping[str, Sequence[Case]]) -> list[Row]:
    """ρ within every group of mode and optimizer."""
    groups = sorted({case.group for list_of in cases.values() for case in list_of})
    return [
        {"name": name, **{g: rho([c for c in list_of if c.group == g]) for g in groups}}
        for name, list_of in cases.items()
    ]


def differences(cases: Mapping[str, Sequence[Case]], against: str) -> list[Row]:
    """Paired difference in ρ to one forecaster over data sets drawn with replacement."""
    drawn = resampled(cases, rho)
    rows: list[Row] = []
    for name in cases:
        if name != against:
            gaps = [a - b for a, b in zip(drawn[against], drawn[name], strict=True)]
            low, high = interval(gaps)
            rows.append({"name": name, "Δρ": rho(cases[against]) - rho(cases[name]), "90 %": (low, high)})
    return rows


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table; intervals are put behind their numbers."""
    lines = ["| " + " | ".join(["", *columns]) + " |", "| --- " * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [_cell(row.get(c, math.nan), row.get(f"{c} 90 %")) for c in columns]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines)


def _cell(value: Any, ends: tuple[float, float] | None) -> str:
    if isinstance(value, tuple):
        return "–".join(_number(v) for v in value)
    text = _number(value)
    return text if ends is None or text == "–" else f"{text} ({_number(ends[0])}–{_number(ends[1])})"


def _number(value: float | str) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.2f}"
