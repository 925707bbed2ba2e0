"""The tables of the validity benchmark, put together from stored results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.config.plan import ForecastConfig
from arisk.forecast.worth import BY_GROUP
from tests.bench.validity.jobs import FRESH, LOW, REPORT, THRESHOLD, TUNE, Job, long_jobs, standard_jobs
from tests.bench.validity.predict import ABLATIONS
from tests.bench.validity.scores import Case, coverage, measures
from tests.bench.validity.tables import (
    Row,
    ablation_cases,
    cases_of,
    ceiling_cases,
    differences,
    group_rows,
    markdown,
    other_seed_cases,
    record_of,
    rows_of,
    scalar_cases,
    verdict_group_rows,
    verdict_rows,
    verdicts,
    what_if_cases,
)
from tests.bench.validity.work import QUICK, ablation_jobs

CONFIG = ForecastConfig()
ALARM = CONFIG.alarm_fraction * THRESHOLD
#: Whose intervals are stated.
STATED = ("pilot", "rollout", "combined")
SCALAR_COLUMNS = ("ρ final", "AUC")


def all_tables(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Every table as rows, by title; parts without results are left out."""
    tables: dict[str, Any] = {}
    if quick:
        _main(tables, "Three data sets", standard_jobs(QUICK), folder)
        return tables
    report = standard_jobs(REPORT)
    _main(tables, "Fresh mixtures", standard_jobs(FRESH), folder)
    _main(tables, "Data sets not tuned on", report, folder)
    _main(tables, "Data sets tuned on", standard_jobs(TUNE), folder)
    cases = {
        "a second seed of the real run (the ceiling)": ceiling_cases(report, folder),
        "combined, made for the other seed": other_seed_cases(report, folder, CONFIG, "combined"),
    }
    _put(tables, "Ceiling: the same jobs with another seed", cases)
    _main(tables, "Low contamination", standard_jobs(LOW), folder)
    _main(tables, "Long runs", long_jobs(), folder)
    every = [*report, *standard_jobs(FRESH)]
    tables[BY_GROUP] = verdict_group_rows(verdicts(every, folder, CONFIG, THRESHOLD))
    title = "What-if: a third or a quarter of a learning rate, read off its rollout"
    _put(tables, title, what_if_cases(every, folder, CONFIG))
    jobs = ablation_jobs()
    parts = {"as shipped": cases_of(jobs, folder, CONFIG).get("rollout", [])}
    parts |= {name: ablation_cases(jobs, folder, name) for name in ABLATIONS}
    _put(tables, "Ablation: the rollout with one part changed", parts)
    return tables


def _main(tables: dict[str, Any], title: str, jobs: Sequence[Job], folder: Path) -> None:
    """Forecasters, groups, differences, plain numbers, intervals, verdicts and cost of some jobs."""
    cases = cases_of(jobs, folder, CONFIG)
    if not cases:
        return
    _put(tables, title, cases)
    tables[f"{title}: ρ by group"] = group_rows(cases)
    tables[f"{title}: what ρ of `combined` is ahead of"] = differences(cases, "combined")
    columns = {k: v for k, v in measures(THRESHOLD, ALARM).items() if k in SCALAR_COLUMNS}
    numbers = scalar_cases(jobs, folder)
    tables[f"{title}: plain numbers"] = rows_of(numbers, columns) if numbers else []
    stated = {name: cases[name] for name in STATED}
    tables[f"{title}: coverage of 80 % intervals"] = rows_of(stated, coverage(THRESHOLD, 20))
    tables[f"{title}: verdicts"] = verdict_rows(verdicts(jobs, folder, CONFIG, THRESHOLD))
    tables[f"{title}: cost"] = cost_rows(jobs, folder)


def _put(tables: dict[str, Any], title: str, cases: Mapping[str, Sequence[Case]]) -> None:
    present = {name: list_of for name, list_of in cases.items() if list_of}
    lengths = {len(list_of) for list_of in present.values()}
    if present and len(lengths) == 1:
        tables[title] = rows_of(present, measures(THRESHOLD, ALARM))
    elif present:
        tables[title] = [
            row
            for name, list_of in present.items()
            for row in rows_of({name: list_of}, measures(THRESHOLD, ALARM))
        ]


def cost_rows(jobs: Sequence[Job], folder: Path) -> list[Row]:
    """Gradient evaluations of the rollout, pilot included, as a share of the planned run."""
    shares: dict[int, list[float]] = {}
    for job in jobs:
        record = record_of(job, folder)
        if record is not None:
            shares.setdefault(job.steps, []).append(record.gradient_evaluations / job.steps)
    return [
        {
            "name": f"{steps} steps",
            "jobs": len(found),
            "median share": statistics.median(found),
            "largest share": max(found),
        }
        for steps, found in sorted(shares.items())
    ]


def render(tables: Mapping[str, list[Row]]) -> str:
    """All tables as Markdown."""
    parts: list[str] = []
    for title, rows in tables.items():
        columns = [c for c in rows[0] if c != "name" and not c.endswith(" 90 %")] if rows else []
        parts.append(f"### {title}\n\n{markdown(rows, columns)}\n")
    return "\n".join(parts)
