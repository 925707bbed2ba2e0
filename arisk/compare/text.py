"""A comparison for the terminal, for machines and for pull requests."""

from __future__ import annotations

import dataclasses
from typing import Any

from arisk.ranking import RULE, Ranked
from arisk.report.compare_text import COLUMNS, Comparative, cells, compare_findings, headline
from arisk.report.summary import markdown_text
from arisk.terminal import table

__all__ = ["compare_json", "compare_markdown", "compare_text"]

#: Columns of the terminal, which is narrower than the page.
NARROW = {
    "rank": "rank",
    "run": "run",
    "verdict": "verdict",
    "safe-step budget": "safe steps",
    "collapse": "collapse",
    "P(collapse)": "P(collapse)",
    "safety drift at the end (nats/token)": "safety drift",
    "control drift (nats/token)": "control drift",
}


def compare_text(told: Comparative, page: str) -> str:
    """The ranked table, findings and notes; the page's path as the last line."""
    return "\n".join(
        [
            headline(told),
            "",
            table([_narrow(entry) for entry in told.ranked], list(NARROW.values())),
            "",
            *[f"- {sentence}" for sentence in compare_findings(told)],
            *[f"care: {sentence}" for sentence in told.notes],
            f"ranking: {RULE}",
            f"report: {page}",
        ]
    )


def _narrow(entry: Ranked) -> list[str]:
    return [cell for name, cell in zip(COLUMNS, cells(entry), strict=True) if name in NARROW]


def compare_json(told: Comparative) -> dict[str, Any]:
    """Plain values: the runs in their order, findings, notes, settings. None: not measured."""
    return {
        "title": told.title,
        "headline": headline(told),
        "rule": RULE,
        "runs": [_run_json(entry) for entry in told.ranked],
        "findings": compare_findings(told),
        "notes": list(told.notes),
        "settings": {
            key: {run.name: value for run, value in zip(told.runs, values, strict=True)}
            for key, values in told.settings.items()
        },
        "command": told.command,
    }


def _run_json(entry: Ranked) -> dict[str, Any]:
    run = entry.run
    values = {
        field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "curve"
    }
    final = None if run.final is None else dict(zip(("median", "lower", "upper"), run.final, strict=True))
    curve = None if run.curve is None else dataclasses.asdict(run.curve)
    return {"rank": entry.rank, "place": run.place, **values, "final": final, "curve": curve}


def compare_markdown(told: Comparative) -> str:
    """A short Markdown text, fit for a pull-request comment."""
    rows = [f"| {' | '.join(map(markdown_text, cells(entry)))} |" for entry in told.ranked]
    return "\n".join(
        [
            f"### arisk: {markdown_text(told.title)}",
            "",
            markdown_text(headline(told)),
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"| {' | '.join('---' for _ in COLUMNS)} |",
            *rows,
            "",
            *[f"- {markdown_text(sentence)}" for sentence in compare_findings(told)],
            *[f"- care: {markdown_text(sentence)}" for sentence in told.notes],
            "",
            f"Ranking: {RULE}",
            "",
        ]
    )
