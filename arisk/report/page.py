"""The report page: one HTML string from the sections that the capabilities hand in.

Three seams: records → sections of words, numbers and figures (each capability's own `page`) → HTML (here).
Nothing is fetched: plotly.js, style and data are inside the page, and a content policy forbids the network.

Beside the page: what each stage cost on its machine, and the verdict for machines and for pull requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from importlib import resources
from typing import Any, Literal

from arisk.report.figure import Figure, axes
from arisk.report.identity import identity
from arisk.report.section import esc, folded, notes, provenance_section, quality_section, script_json, table
from arisk.report.text import NOT_MEASURED, bounded, duration, literal, number, percent

__all__ = [
    "Advice",
    "Answer",
    "Around",
    "Finding",
    "Part",
    "Piece",
    "Section",
    "figures_of",
    "findings_of",
    "notebook",
    "page",
    "render",
    "stage_costs",
    "summary_json",
    "summary_markdown",
    "warnings_of",
]

TITLE = "Cost of the stages"


def stage_costs(provenance: Mapping[str, Any]) -> Figure:
    """Wall-clock seconds of every stage, as its manifest keeps them."""
    reading = (
        "Wall-clock seconds of each stage on the machine that ran it. A stage that is up to date is not run "
        "again, so a changed threshold or learning rate costs only what depends on it (`arisk status` says "
        "which)."
    )
    equation = "seconds from the start of a stage to its commit, reading its inputs included"
    header = ["stage", "seconds", "share", "MB on disk"]
    stages: Mapping[str, Mapping[str, Any]] = provenance.get("stages") or {}
    known = {name: float(s["seconds"]) for name, s in stages.items() if s.get("seconds") is not None}
    total = sum(known.values())
    if not known or total <= 0:
        missing = "no stage times were kept (the Python API writes none)"
        return Figure("costs", TITLE, [], {}, reading, equation, header, [], missing)
    names = list(known)[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [known[name] for name in names],
        "text": [duration(known[name]) for name in names],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "#0072B2"},
        "hovertemplate": "%{y}: %{x:.3g} s<extra></extra>",
    }
    layout = axes("seconds", "")
    layout["xaxis"]["range"] = [0, 1.18 * max(known.values())]
    worst = max(known, key=lambda name: known[name])
    rows = [
        [
            name,
            number(s.get("seconds")),
            percent(known[name] / total) if name in known else number(None),
            f"{s['bytes'] / 1e6:.1f}",
        ]
        for name, s in stages.items()
    ]
    says = f"{duration(total)} in all; {worst} took {percent(known[worst] / total)} of it."
    return Figure("costs", TITLE, [bars], layout, reading, equation, header, rows, says=says)


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
#: Sections with a heading, as the table of contents takes them from the body.
HEADING = re.compile(r'<section [^>]*?id="([^"]+)"[^>]*>\s*<h2>(.*?)</h2>')


class Part(IntEnum):
    """Where a piece stands. Up to `METHOD` is what a decision needs, from there on how it was measured.

    Pieces between two of these take a number between them.
    """

    ANSWER = 0
    CAUSE = 100
    CHANGE = 200
    DRIFT = 300
    TRUTH = 400
    ROWS = 500
    PROTECTION = 600
    METHOD = 700
    SPACE = 800
    QUALITY = 900
    PROVENANCE = 1000


@dataclass(frozen=True)
class Piece:
    """One piece of the page: words and tables, or one figure.

    Attributes:
        place: pieces of all sections are sorted by it.
        html: everything from data escaped; with a figure, what belongs below its table.
        figure: drawn with its notes and its table.
        shape: a tall figure has the full width of the page; two halves that follow one another share a row.
    """

    place: int
    html: str = ""
    figure: Figure | None = None
    shape: Literal["normal", "tall", "half"] = "normal"


@dataclass(frozen=True)
class Finding:
    """One sentence made from the numbers.

    Attributes:
        topic: what it is about, in a word or two.
        sentence: what it says.
        section: id of the section that shows it; empty where there is none to lead to.
        place: findings of all sections are sorted by it.
        cause: it says why; the first screen shows the first three.
    """

    topic: str
    sentence: str
    section: str = ""
    place: int = 100
    cause: bool = False


@dataclass(frozen=True)
class Advice:
    """Something to do about it.

    Attributes:
        sentence: what it brings, with its numbers.
        verb: the command of arisk that does it.
        options: what the command takes besides its config, such as `--set training.max_steps=15`.
        place: advice of all sections is sorted by it.
    """

    sentence: str
    verb: str = ""
    options: str = ""
    place: int = 100

    def command(self, plan: str, elsewhere: str = "") -> str:
        """The whole command for a plan (`my.yaml --run-dir …`); empty where nothing is to be run.

        Args:
            plan: what every command takes to work on this run.
            elsewhere: run directory for another plan, so that this report stays as it is.
        """
        if not self.verb:
            return ""
        apart = f"--run-dir {elsewhere}" if elsewhere and self.verb == "run" and self.options else ""
        return " ".join(part for part in ("arisk", self.verb, plan, self.options, apart) if part)


@dataclass(frozen=True)
class Around:
    """What the first screen takes from everything else.

    Attributes:
        causes: findings that say why, strongest first.
        advice: sentences, each with the command that does it, or an empty one.
    """

    causes: Sequence[Finding] = ()
    advice: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Answer:
    """What the report opens with, from the one section that answers its question.

    Attributes:
        level: the answer in one word.
        screen: HTML of the first screen, given what all sections say.
        markdown: lines below the heading of `summary.md`, before the findings.
    """

    level: str
    screen: Callable[[Around], str]
    markdown: Sequence[str]


@dataclass(frozen=True)
class Section:
    """All that one capability shows of its records.

    Attributes:
        name: the capability.
        pieces: its pieces of the page.
        summary: plain values at the top level of `summary.json`, under keys that no other section has.
        markdown: lines of `summary.md`, after the findings.
        findings: sentences for the list of findings.
        advice: what to do by its measurements, for the first screen.
        quality: (what, value, note) of its measurements.
        warnings: sentences beside the quality of the measurements.
        shared: what sections of earlier stages may use, by name.
        answer: the answer to the report's question, from the section that has it.
    """

    name: str
    pieces: Sequence[Piece] = ()
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    markdown: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    advice: Sequence[Advice] = ()
    quality: Sequence[tuple[str, str, str]] = ()
    warnings: Sequence[str] = ()
    shared: Mapping[str, Any] = field(default_factory=dict[str, Any])
    answer: Answer | None = None


#: Causes and pieces of advice on the first screen.
MOST = 3


def render(title: str, sections: Sequence[Section], provenance: Mapping[str, Any], summary: str = "") -> str:
    """The whole report as one self-contained HTML page; equal sections give equal bytes.

    Args:
        title: heading of the page.
        sections: of every capability that has something to show.
        provenance: command, versions, stages, task, config.
        summary: Markdown that a button copies.
    """
    first = identity(provenance) if provenance.get("task") else title
    return page(title, _pieces(sections, provenance), first=first, summary=summary)


def notebook(sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    """The first screen alone in a frame of its own: small enough to stand in a notebook.

    Args:
        sections: of every capability that has something to show.
        provenance: as of `render`.
    """
    around = _around(sections, provenance)
    screens = "".join(section.answer.screen(around) for section in sections if section.answer)
    style = (resources.files("arisk.report") / "style.css").read_text(encoding="utf-8")
    inside = (
        '<!doctype html><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(POLICY)}">'
        f"<style>{style} .copy {{ display: none; }}</style>"
        f'<header class="top"><p id="identity">{esc(identity(provenance))}</p></header>'
        f'<div style="padding: 0 20px">{screens}</div>'
    )
    return (
        f'<iframe srcdoc="{esc(inside)}" title="arisk" sandbox '
        'style="width: 100%; height: 700px; border: 0"></iframe>'
    )


def figures_of(sections: Sequence[Section], provenance: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of the whole report by id, in the order of the page."""
    pieces = sorted(_pieces(sections, provenance), key=_place)
    return {piece.figure.id: piece.figure for piece in pieces if piece.figure}


def _pieces(sections: Sequence[Section], provenance: Mapping[str, Any]) -> list[Piece]:
    """Pieces of the sections, and those that are made of all of them together."""
    rows = [row for section in sections for row in section.quality]
    around = _around(sections, provenance)
    return [
        *(Piece(-1, section.answer.screen(around)) for section in sections if section.answer),
        *(piece for section in sections for piece in section.pieces),
        Piece(Part.QUALITY, quality_section(rows, warnings_of(sections))),
        Piece(Part.PROVENANCE, figure=stage_costs(provenance)),
        Piece(Part.PROVENANCE + 10, provenance_section(provenance)),
    ]


def _around(sections: Sequence[Section], provenance: Mapping[str, Any]) -> Around:
    """The strongest causes, and what to do first."""
    return Around(
        [finding for finding in findings_of(sections) if finding.cause][:MOST],
        _advice(sections, str(provenance.get("again") or ""), str(provenance.get("elsewhere") or "")),
    )


def _advice(sections: Sequence[Section], plan: str, elsewhere: str = "") -> list[tuple[str, str]]:
    """The first pieces of advice, each with its command where there is one."""
    advice = sorted((a for section in sections for a in section.advice), key=lambda advice: advice.place)
    return [(told.sentence, told.command(plan, elsewhere) if plan else "") for told in advice[:MOST]]


def _place(piece: Piece) -> int:
    return piece.place


def findings_of(sections: Sequence[Section]) -> list[Finding]:
    """The findings of all sections, what a reader acts on first."""
    return sorted((f for section in sections for f in section.findings), key=lambda finding: finding.place)


def warnings_of(sections: Sequence[Section]) -> list[str]:
    """The warnings of all sections; what several stages say stands once."""
    return list(dict.fromkeys(sentence for section in sections for sentence in section.warnings))


def page(title: str, pieces: Iterable[Piece], *, first: str = "", summary: str = "") -> str:
    """One self-contained HTML page: style, script, plotly.js and the figures' data inside.

    Args:
        title: heading of the page, escaped here.
        pieces: its pieces; figures that were not measured say so and are not drawn.
        first: its first line, the title by default.
        summary: text that a button copies; without it there is no button.
    """
    from plotly.offline import get_plotlyjs

    placed = sorted(pieces, key=_place)
    shown = [
        {"id": f"fig-{piece.figure.id}", "data": list(piece.figure.data), "layout": piece.figure.layout}
        for piece in placed
        if piece.figure and not piece.figure.missing
    ]
    decision = _body([piece for piece in placed if piece.place < Part.METHOD])
    method = _body([piece for piece in placed if piece.place >= Part.METHOD])
    body = decision + (_METHOD.format(method=method) if method else "")
    folder = resources.files("arisk.report")
    return _PAGE.format(
        title=esc(title),
        first=esc(first or title),
        policy=esc(POLICY),
        style=(folder / "style.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        figures=script_json(shown),
        summary=script_json(summary),
        copy='<button id="copy" type="button">Copy summary</button>' if summary else "",
        early=(folder / "early.js").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        contents=_contents(decision, method),
        body=body,
    )


def _body(placed: Sequence[Piece]) -> str:
    """The pieces one below the other, and two halves that follow one another in one row."""
    parts: list[str] = []
    left = ""
    for piece, after in zip(placed, [*placed[1:], None], strict=False):
        html = piece.html if piece.figure is None else _figure_section(piece.figure, piece)
        if left:
            parts.append(f'<div class="two">{left}{html}</div>')
            left = ""
        elif piece.shape == "half" and after is not None and after.shape == "half":
            left = html
        elif html:
            parts.append(html)
    return "\n".join(parts)


def _contents(decision: str, method: str) -> str:
    """Links to every section that has an id and a heading, the verdict first, those of the method apart."""
    items = _links([("content", "Verdict"), *HEADING.findall(decision)])
    if method:
        items += f'<li class="apart">Method</li>{_links(HEADING.findall(method))}'
    return f'<nav class="contents" aria-label="Contents"><ol>{items}</ol></nav>'


def _links(headings: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading in headings)


_METHOD = """
<details class="level-two" open data-fold><summary><b>Method</b> How this was measured, what the theory says,
and what the forecast was worth elsewhere</summary>
{method}
</details>"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>arisk: {title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
<noscript><style>.plot, .tools, .copy, .more button, th button::after {{ display: none; }}</style></noscript>
<script>
{early}</script>
</head>
<body>
<a class="skip" href="#content">Skip to the verdict</a>
<header class="top"><p id="identity"><bdi>{first}</bdi></p>
<p class="tools">{copy}<button id="print" type="button">Print</button>
<button id="theme" type="button">Dark</button></p></header>
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
<script type="application/json" id="summary">{summary}</script>
<script>
{script}</script>
</body>
</html>
"""


def _figure_section(figure: Figure, piece: Piece) -> str:
    """A figure with what it shows, its reading line, equation, worth and table; what is missing says so."""
    name = esc(figure.id)
    plot = (
        f'<p class="missing">{NOT_MEASURED.capitalize()}: {esc(figure.missing)}. '
        "That is not the same as no risk.</p>"
        if figure.missing
        else f'<div class="plot{" tall" if piece.shape == "tall" else ""}" id="fig-{name}" role="img" '
        f'aria-label="{esc(figure.title)}; the numbers are in the table below"></div>'
    )
    says = f'<p class="says">{esc(figure.says)}</p>' if figure.says and not figure.missing else ""
    numbers = folded("The numbers as a table", table(figure.header, figure.rows)) if figure.rows else ""
    return (
        f'<section id="{name}"><h2>{esc(figure.title)}</h2>{says}{plot}'
        f'<div class="folds">{notes(figure.reading, figure.equation, figure.worth)}{numbers}</div>'
        f"{piece.html}</section>"
    )


#: Name of the page beside the summaries.
PAGE = "report.html"
#: Findings in the Markdown text; all of them are in the JSON and on the page.
MOST_FINDINGS = 6


def summary_json(
    title: str, sections: Sequence[Section], first: str = "", plan: str = "", elsewhere: str = ""
) -> dict[str, Any]:
    """Plain values of every section at the top level, findings and warnings. None: not measured.

    Args:
        title: heading of the report.
        sections: what the capabilities show.
        first: what the report is about, in one line; the title by default.
        plan: what commands take to work on this run; empty where there is no such command.
        elsewhere: run directory for another plan, so that this report stays as it is.

    Raises:
        ValueError: two sections use one key.
    """
    body: dict[str, Any] = {
        "title": title,
        "identity": first or title,
        "advice": [{"sentence": told, "command": line} for told, line in _advice(sections, plan, elsewhere)],
        "findings": [finding.sentence for finding in findings_of(sections)],
        "report": PAGE,
        "warnings": warnings_of(sections),
    }
    for section in sections:
        if twice := body.keys() & section.summary.keys():
            raise ValueError(f"section {section.name}: {', '.join(sorted(twice))} is in the summary already")
        body |= section.summary
    return body


def summary_markdown(title: str, sections: Sequence[Section], first: str = "") -> str:
    """A short Markdown text, fit for a pull-request comment: the answer, findings, then each section's.

    Args:
        title: heading.
        sections: what the capabilities show.
        first: what the report is about, in one line, where the title does not say it all.
    """
    answers = [section.answer for section in sections if section.answer]
    findings = findings_of(sections)[:MOST_FINDINGS]
    lines = [
        f"### arisk: {''.join(f'{answer.level} – ' for answer in answers)}{literal(title)}",
        "",
        *([literal(first), ""] if first else []),
        *(line for answer in answers for line in answer.markdown),
        *[f"- {literal(finding.sentence)}" for finding in findings],
        *(line for section in sections for line in section.markdown),
    ]
    return bounded(lines, f"Everything else is in `{PAGE}`, beside this text in the run directory.")
