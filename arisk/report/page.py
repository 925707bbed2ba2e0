"""The report page: one HTML string from records, with everything from data escaped.

Three seams: records → figures and sentences (`figures`, `text`) → HTML (here). Nothing is fetched:
plotly.js, style and data are inside the page, and a content policy forbids the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from arisk.comparison import Comparison
from arisk.report.extra import Extra
from arisk.report.figure import Figure
from arisk.report.figures import all_figures
from arisk.report.rollout_section import method, rollout_section
from arisk.report.sections import (
    conditions,
    esc,
    examples,
    items,
    listed,
    provenance_section,
    quality,
    table,
)
from arisk.report.text import NOT_MEASURED, collapse_text, findings, percent
from arisk.report.verified import verified_section
from arisk.report.worth import worth
from arisk.results import (
    CollectResult,
    ForecastResult,
    RolloutResult,
    ScoreResult,
    SubspaceResult,
    Verdict,
)

__all__ = ["ICONS", "figure_section", "page", "render_report", "script_json"]

ICONS = {"low": "✓", "elevated": "▲", "high": "✕", "inconclusive": "?"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def script_json(value: Any) -> str:
    """JSON safe inside a script element: no `<`, and no line ends that JavaScript knows and JSON does not."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def render_report(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    *,
    title: str,
    provenance: Mapping[str, Any],
    show_text: bool,
    max_examples: int,
    measured: RolloutResult,
    check: Comparison | None = None,
    extras: Sequence[Extra] = (),
) -> str:
    """The whole report as one self-contained HTML page; equal records give equal bytes.

    Args:
        collected: safety side.
        space: safety subspace.
        scored: how the update meets it.
        forecast: curves and verdict.
        title: heading of the page.
        provenance: command, versions, stages, config.
        show_text: show prompts and responses, or only their numbers.
        max_examples: rows of the examples table.
        measured: the rollout, for its cost and its table.
        check: a real run of the same plan beside its forecast, where there is one.
        extras: sections of optional stages.
    """
    figures = all_figures(collected, space, scored, forecast, measured, check)
    added = [figure for extra in extras for figure in extra.figures]
    told = [*findings(collected, space, scored, forecast), *(s for extra in extras for s in extra.findings)]
    body = "\n".join(
        [
            _verdict(forecast),
            _findings(told),
            figure_section(figures["forecast"], tall=True),
            verified_section(check, show_text) if check else "",
            figure_section(figures["truth"]) if check else "",
            *(extra.html + "".join(map(figure_section, extra.figures)) for extra in extras),
            figure_section(figures["what-if"], tall=True),
            _pair(figures["drift"], figures["move"]),
            rollout_section(measured, forecast),
            examples(scored, show_text, max_examples),
            _pair(figures["fisher-map"], figures["harm-map"]),
            _pair(figures["spectrum"], figures["overlap"]),
            conditions(scored),
            quality(collected, space, scored, forecast),
            method(),
            worth(),
            provenance_section(collected, provenance),
        ]
    )
    return page(title, body, [*figures.values(), *added])


def page(title: str, body: str, figures: Iterable[Figure]) -> str:
    """One self-contained HTML page: style, script, plotly.js and the figures' data inside.

    Args:
        title: heading of the page, escaped here.
        body: HTML of its sections, with `figure_section` for each figure.
        figures: what is drawn; those that were not measured are passed over.
    """
    shown = [
        {"id": f"fig-{f.id}", "data": list(f.data), "layout": f.layout} for f in figures if not f.missing
    ]
    folder = resources.files("arisk.report")
    return _PAGE.format(
        title=esc(title),
        policy=esc(POLICY),
        style=(folder / "style.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        figures=script_json(shown),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        body=body,
    )


_PAGE = """<!doctype html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the verdict</a>
<header class="top"><p><b>arisk</b> · {title}</p><button id="theme" type="button">Dark</button></header>
<main id="content">
{body}
</main>
<footer><p>Made by arisk from its artifacts alone. The page loads nothing from the network.</p></footer>
<script>{plotly}</script>
<script type="application/json" id="figures">{figures}</script>
<script>
{script}</script>
</body>
</html>
"""


def _tile(term: str, value: str, note: str) -> str:
    return f"<div><dt>{esc(term)}</dt><dd>{esc(value)}<small>{esc(note)}</small></dd></div>"


def _verdict(forecast: ForecastResult) -> str:
    """First screen: does safety survive, until when, how sure, and what to do."""
    v = forecast.verdict
    curve = forecast.forecasters.get(v.basis)
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon}"
    tiles = [
        _tile("Safe-step budget", safe, "steps with the upper interval below the threshold"),
        _tile(
            "P(collapse within the plan)", percent(v.probability), f"at {forecast.confidence:.0%} intervals"
        ),
        _tile(
            "Collapse",
            collapse_text(curve) if curve else NOT_MEASURED,
            f"loss of safe responses +{forecast.threshold:g} nats/token",
        ),
        _tile("Rests on", v.basis, _trust(forecast)),
    ]
    return (
        f'<section class="verdict" data-level="{esc(v.level)}" aria-labelledby="verdict">'
        f'<p class="level"><span aria-hidden="true">{ICONS[v.level]}</span> Risk: {esc(v.level)}</p>'
        f'<h1 id="verdict">{esc(v.sentence)}</h1><dl class="tiles">{"".join(tiles)}</dl>'
        f"{listed('Why', v.reasons)}{listed('What to do', _advice(v))}"
        f"{listed('How far to trust this', v.caveats)}"
        "</section>"
    )


def _trust(forecast: ForecastResult) -> str:
    curve = forecast.forecasters.get(forecast.verdict.basis)
    if curve is None or curve.trusted_until is None:
        return "trust not measured"
    return f"trusted until step {curve.trusted_until}"


def _advice(verdict: Verdict) -> list[str]:
    if verdict.level == "low":
        return ["Keep a safety evaluation at the end of the run; low risk is a forecast, not a proof."]
    if verdict.level == "inconclusive":
        return ["Measure more: more safety rows, more probe points; or watch a short real fine-tune closely."]
    advice = ["Look at the what-if map for a learning rate or length that stays below the threshold."]
    if verdict.safe_steps:
        advice.append(f"Checkpoint and evaluate safety by step {verdict.safe_steps}.")
    return [*advice, "Look through the riskiest rows, and mix in refusals or drop rows that push hardest."]


def _findings(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f'<section><h2>Findings</h2><ul class="plain">{items(sentences)}</ul></section>'


def figure_section(figure: Figure, *, tall: bool = False) -> str:
    """A figure with its reading line, equation and table; what is missing says so."""
    name = esc(figure.id)
    plot = (
        f'<p class="missing">{NOT_MEASURED.capitalize()}: {esc(figure.missing)}. '
        "That is not the same as no risk.</p>"
        if figure.missing
        else f'<div class="plot{" tall" if tall else ""}" id="fig-{name}" role="img" '
        f'aria-label="{esc(figure.title)}; the numbers are in the table below"></div>'
    )
    return (
        f'<section id="{name}"><h2>{esc(figure.title)}</h2>{plot}'
        f'<p class="reading"><b>How to read this.</b> {esc(figure.reading)}</p>'
        f'<p class="equation">{esc(figure.equation)}</p>'
        "<details><summary>The numbers as a table</summary>"
        f"{table(figure.header, figure.rows)}</details></section>"
    )


def _pair(left: Figure, right: Figure) -> str:
    """Two figures beside each other where the screen is wide."""
    return f'<div class="two">{figure_section(left)}{figure_section(right)}</div>'
