"""The verdict for machines and for pull requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from arisk.comparison import Comparison
from arisk.report.extra import Extra
from arisk.report.findings import findings
from arisk.report.text import NOT_MEASURED, collapse_text, number, percent
from arisk.report.verified import verified_rows
from arisk.results import CollectResult, ForecastResult, RolloutResult, ScoreResult, SubspaceResult

__all__ = ["summary_json", "summary_markdown"]


def summary_json(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    *,
    title: str,
    check: Comparison | None = None,
    extras: Sequence[Extra] = (),
    measured: RolloutResult | None = None,
) -> dict[str, Any]:
    """Plain values: verdict, forecasters, what-if grid, overlap, findings, the check. None: not measured."""
    return {
        "title": title,
        "verdict": dataclasses.asdict(forecast.verdict),
        "threshold": forecast.threshold,
        "confidence": forecast.confidence,
        "training": dict(forecast.training),
        "forecasters": {name: dataclasses.asdict(curve) for name, curve in forecast.forecasters.items()},
        "overlap": dataclasses.asdict(scored.overlap),
        "gamma_hat": scored.gamma_hat,
        "epsilon_hat": scored.epsilon_hat,
        "subspace": {
            "rank": space.rank,
            "explained": space.explained,
            "trace": space.trace,
            "heldout_energy": space.heldout_energy,
        },
        "samples": len(collected.losses),
        "what_if": dataclasses.asdict(forecast.what_if),
        "rollout": {
            "gradient_evaluations": forecast.gradient_evaluations,
            "planned_evaluations": forecast.planned_evaluations,
            "control_change": forecast.control_change[-1] if forecast.control_change else None,
        },
        "findings": findings(collected, space, scored, forecast, measured),
        "warnings": [*collected.warnings, *space.warnings, *scored.warnings, *forecast.warnings],
        "verify": check.as_json() if check else None,
        **{extra.name: dict(extra.summary) for extra in extras},
    }


def summary_markdown(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    *,
    title: str,
    check: Comparison | None = None,
    extras: Sequence[Extra] = (),
    measured: RolloutResult | None = None,
) -> str:
    """A short Markdown text, fit for a pull-request comment."""
    v = forecast.verdict
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon} steps"
    rows = [
        f"| {name}{' (lower bound)' if curve.kind == 'bound' else ''} | {collapse_text(curve)} | "
        f"{percent(curve.probability)} | {number(curve.median[-1] if curve.median else None)} |"
        for name, curve in forecast.forecasters.items()
    ]
    told = findings(collected, space, scored, forecast, measured)
    lines = [
        f"### arisk: {v.level} – {_cell(title)}",
        "",
        v.sentence,
        "",
        f"Safe-step budget: **{safe}** · P(collapse): **{percent(v.probability)}** · basis: {v.basis}",
        "",
        "| forecaster | collapse | P(collapse) | rise at the end (nats/token) |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        *[f"- {sentence}" for sentence in (*v.reasons, *told)],
        *[f"- caveat: {sentence}" for sentence in v.caveats],
        "",
        *(_verified(check) if check else []),
        *(line for extra in extras for line in extra.markdown),
    ]
    return "\n".join(lines)


def _verified(check: Comparison) -> list[str]:
    """The real run beside the forecast."""
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in verified_rows(check)]
    head = ["| verified | forecast | real |", "| --- | --- | --- |"]
    return [f"Verified by a real fine-tune: {check.sentence}", "", *head, *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
