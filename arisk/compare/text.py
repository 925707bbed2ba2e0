"""A comparison for the terminal, for machines and for pull requests."""

from __future__ import annotations

import dataclasses
from typing import Any

from arisk.base.tables import table
from arisk.compare.record import RULE, Ranked
from arisk.compare.words import COLUMNS, MEANING, Comparative, cells, compare_findings, headline
from arisk.report.markdown import bounded, literal

__all__ = ["compare_json", "compare_markdown", "compare_text"]


def compare_text(told: Comparative, page: str) -> str:
    """The ranked table, what was measured beside it, findings and notes; the page's path as the last line."""
    return "\n".join(
        [
            headline(told),
            "",
            table(
                [_outcome(entry) for entry in told.ranked],
                ["rank", "run", "verdict", "safe steps", "collapse", "P", "safety drift (nats/token)"],
            ),
            "",
            table(
                [_measured(entry) for entry in told.ranked],
                ["run", "control drift", "overlap", "gradients", "time", "data"],
            ),
            "",
            *[f"- {sentence}" for sentence in compare_findings(told)],
            *[f"care: {sentence}" for sentence in told.notes],
            f"ranking: {RULE}",
            f"report: {page}",
        ]
    )


def _outcome(entry: Ranked) -> list[str]:
    """The row of one run in the first table; a collapse step never without its horizon."""
    row = cells(entry)
    if entry.run.curve is not None:
        step = entry.run.collapse_step
        row[4] = f"none in {entry.run.horizon}" if step is None else f"{step} of {entry.run.horizon}"
    return row[:7]


def _measured(entry: Ranked) -> list[str]:
    run = entry.run
    _, name, *_, control, overlap, _, data = cells(entry)
    spent = f"{run.seconds:.0f} s" + (f" + {run.shared_seconds:.0f} s shared" if run.shared_seconds else "")
    share = f"{run.gradient_evaluations} of {run.planned_evaluations}"
    return [name, control, overlap, share if run.gradient_evaluations else "no rollout", spent, data]


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
    rows = run.finetune_rows or None
    return {
        "rank": entry.rank,
        "place": run.place,
        **values,
        "finetune_rows": rows,
        "final": final,
        "curve": curve,
    }


def compare_markdown(told: Comparative) -> str:
    """A short Markdown text, fit for a pull-request comment."""
    rows = [f"| {' | '.join(map(literal, cells(entry)))} |" for entry in told.ranked]
    lines = [
        f"### arisk: {literal(told.title)}",
        "",
        literal(headline(told)),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join('---' for _ in COLUMNS)} |",
        *rows,
        "",
        *[f"- {literal(sentence)}" for sentence in compare_findings(told)],
        *[f"- care: {literal(sentence)}" for sentence in told.notes],
        "",
        f"{MEANING} {RULE}",
        "",
    ]
    return bounded(lines, "Curves and differences are in `compare.html`, beside this text.")
