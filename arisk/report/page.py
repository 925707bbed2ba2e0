"""The report page: one HTML string from records, with everything from data escaped.

Three seams: records → figures and sentences (`figures`, `findings`, `text`) → HTML (here). Nothing is
fetched: plotly.js, style and data are inside the page, and a content policy forbids the network.

Sections that optional stages add to the page, and what they add to the summaries.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from arisk.anatomy.page import conditions, examples
from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast.first_screen import ICONS, findings_section, found, row_sentence, verdict_section
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.forecast.rollout_page import method, rollout_section, sample_table
from arisk.report.figure import Figure
from arisk.report.figures import all_figures
from arisk.report.section import (
    esc,
    folded,
    provenance_section,
    quality,
    script_json,
    table,
)
from arisk.report.text import NOT_MEASURED
from arisk.report.worth import worth
from arisk.verification.page import verified_section
from arisk.verification.truth import Comparison

__all__ = ["ICONS", "Extra", "figure_section", "page", "render_report"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
#: Sections with a heading, as the table of contents takes them from the body.
HEADING = re.compile(r'<section [^>]*?id="([^"]+)"[^>]*>\s*<h2>(.*?)</h2>')


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
    figures = all_figures(collected, space, scored, forecast, measured, check, provenance)
    added = [figure for extra in extras for figure in extra.figures]
    told = [(extra.name.capitalize(), sentence) for extra in extras for sentence in extra.findings]
    rows = sample_table(measured, forecast, collected, show_text, max_examples)
    body = "\n".join(
        [
            verdict_section(forecast, collected.task, check, [a for extra in extras for a in extra.advice]),
            figure_section(figures["forecast"], tall=True),
            findings_section(found(collected, space, scored, forecast, measured), told),
            verified_section(check, show_text) if check else "",
            figure_section(figures["truth"]) if check else "",
            figure_section(figures["what-if"], tall=True),
            *(extra.html + "".join(map(figure_section, extra.figures)) for extra in extras),
            _pair(figures["drift"], figures["move"]),
            figure_section(figures["samples"], below=rows),
            examples(scored, show_text, max_examples, row_sentence(scored.examples)),
            _pair(figures["fisher-map"], figures["harm-map"]),
            _pair(figures["spectrum"], figures["overlap"]),
            conditions(scored),
            rollout_section(measured, forecast),
            method(),
            worth(),
            quality(collected, space, scored, forecast),
            figure_section(figures["costs"]),
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
        early=(folder / "early.js").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        contents=_contents(body),
        body=body,
    )


def _contents(body: str) -> str:
    """Links to every section that has an id and a heading, the verdict first."""
    links = [("content", "Verdict"), *HEADING.findall(body)]
    items = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading in links)
    return f'<nav class="contents" aria-label="Contents"><ol>{items}</ol></nav>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
<noscript><style>.plot, #theme, .more button, th button::after {{ display: none; }}</style></noscript>
<script>
{early}</script>
</head>
<body>
<a class="skip" href="#content">Skip to the verdict</a>
<header class="top"><p><b>arisk</b> · <bdi>{title}</bdi></p>
<button id="theme" type="button">Dark</button></header>
<div class="layout">
{contents}
<main id="content" tabindex="-1">
<noscript><p class="missing">Figures need JavaScript; their tables hold the same numbers.</p></noscript>
{body}
</main>
</div>
<footer><p>Made by arisk from its artifacts alone. The page loads nothing from the network.</p></footer>
<script>{plotly}</script>
<script type="application/json" id="figures">{figures}</script>
<script>
{script}</script>
</body>
</html>
"""


def figure_section(figure: Figure, *, tall: bool = False, below: str = "") -> str:
    """A figure with what it shows, its reading line, equation, worth and table; what is missing says so.

    Args:
        figure: what is shown.
        tall: on the full width of the page.
        below: HTML that belongs to it, after its table.
    """
    name = esc(figure.id)
    plot = (
        f'<p class="missing">{NOT_MEASURED.capitalize()}: {esc(figure.missing)}. '
        "That is not the same as no risk.</p>"
        if figure.missing
        else f'<div class="plot{" tall" if tall else ""}" id="fig-{name}" role="img" '
        f'aria-label="{esc(figure.title)}; the numbers are in the table below"></div>'
    )
    says = f'<p class="says">{esc(figure.says)}</p>' if figure.says and not figure.missing else ""
    notes = [("How to read this.", "", figure.reading), ("Equation", ' class="equation"', figure.equation)]
    notes += [("Worth", "", figure.worth)] if figure.worth else []
    told = "".join(f"<div><dt>{term}</dt><dd{mark}>{esc(text)}</dd></div>" for term, mark, text in notes)
    numbers = folded("The numbers as a table", table(figure.header, figure.rows)) if figure.rows else ""
    return (
        f'<section id="{name}"><h2>{esc(figure.title)}</h2>{says}{plot}<dl class="notes">{told}</dl>'
        f"{numbers}{below}</section>"
    )


def _pair(left: Figure, right: Figure) -> str:
    """Two figures beside each other where the screen is wide."""
    return f'<div class="two">{figure_section(left)}{figure_section(right)}</div>'


@dataclass(frozen=True)
class Extra:
    """What one optional stage shows beside the forecast.

    Attributes:
        name: the stage; its key in `summary.json`.
        html: its section, everything from data escaped.
        figures: drawn below the section, in order.
        summary: plain values for `summary.json`.
        markdown: lines for `summary.md`.
        findings: sentences for the page's list of findings.
        advice: what to do by its measurements, for the first screen.
    """

    name: str
    html: str
    figures: Sequence[Figure] = ()
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    markdown: Sequence[str] = ()
    findings: Sequence[str] = ()
    advice: Sequence[str] = ()
