"""The verdict for machines and for pull requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast.first_screen import findings
from arisk.forecast.record import Curve, ForecastResult, RolloutResult
from arisk.forecast.text import collapse_text
from arisk.report.page import Extra
from arisk.report.text import NOT_MEASURED, bounded, literal, number, percent
from arisk.verification.page import verified_rows
from arisk.verification.truth import Comparison

__all__ = ["summary_json", "summary_markdown"]

#: Name of the page beside the summaries.
PAGE = "report.html"
#: Findings in the Markdown text; all of them are in the JSON and on the page.
MOST_FINDINGS = 6


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
        "finetune_rows": scored.finetune_rows or None,
        "what_if": dataclasses.asdict(forecast.what_if),
        "rollout": {
            "gradient_evaluations": forecast.gradient_evaluations,
            "planned_evaluations": forecast.planned_evaluations,
            "control_change": forecast.control_change[-1] if forecast.control_change else None,
        },
        "findings": _told(collected, space, scored, forecast, extras, measured),
        "report": PAGE,
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
    told = _told(collected, space, scored, forecast, extras, measured)
    lines = [
        f"### arisk: {v.level} – {literal(title)}",
        "",
        literal(v.sentence),
        "",
        f"Safe-step budget: **{safe}** · P(collapse): **{percent(v.probability)}** · basis: {v.basis}",
        "",
        *[f"- why: {literal(sentence)}" for sentence in v.reasons],
        *[f"- {literal(sentence)}" for sentence in told[:MOST_FINDINGS]],
        *[f"- caveat: {literal(sentence)}" for sentence in v.caveats],
        "",
        "| forecaster | collapse | P(collapse) | rise at the end (nats/token) |",
        "| --- | --- | --- | --- |",
        *map(_forecaster, forecast.forecasters.values()),
        "",
        *(_verified(check) if check else []),
        *(line for extra in extras for line in extra.markdown),
    ]
    return bounded(lines, f"Everything else is in `{PAGE}`, beside this text in the run directory.")


def _told(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    extras: Sequence[Extra],
    measured: RolloutResult | None,
) -> list[str]:
    """Findings of the run and of its optional stages, as on the page."""
    own = findings(collected, space, scored, forecast, measured)
    return [*own, *(s for extra in extras for s in extra.findings)]


def _forecaster(curve: Curve) -> str:
    """Table row of one forecaster; a bound says that it is one."""
    bound = curve.kind == "bound"
    name = f"{literal(curve.name)}{' (lower bound)' if bound else ''}"
    chance = "bound only" if bound else percent(curve.probability)
    rise = number(curve.median[-1] if curve.median else None)
    return f"| {name} | {collapse_text(curve)} | {chance} | {rise} |"


def _verified(check: Comparison) -> list[str]:
    """The real run beside the forecast."""
    rows = [f"| {' | '.join(map(literal, row))} |" for row in verified_rows(check)]
    head = ["| verified | forecast | real |", "| --- | --- | --- |"]
    return [f"Verified by a real fine-tune: {literal(check.sentence)}", "", *head, *rows, ""]
