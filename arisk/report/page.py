"""The report page: one HTML string from records, with everything from data escaped.

Three seams: records → figures and sentences (`figures`, `text`) → HTML (here). Nothing is fetched:
plotly.js, style and data are inside the page, and a content policy forbids the network.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from arisk.report.figures import Figure, all_figures
from arisk.report.text import NOT_MEASURED, collapse_text, findings, number, percent
from arisk.results import CollectResult, ForecastResult, ScoreResult, SubspaceResult, Verdict

__all__ = ["render_report"]

ICONS = {"low": "✓", "elevated": "▲", "high": "✕", "inconclusive": "?"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

#: What each predictor was worth on 128 real fine-tunes of a small aligned model.
WORTH = (
    ("overlap ‖Pg‖/‖g‖", ".23", ".63", "–", "–"),
    ("curvature coupling γ̂", ".35", ".71", "–", "–"),
    ("gradient conflict −cos(ḡ_s, g)", ".03", ".54", "–", "–"),
    ("quartic forecast of the one earlier package", ".37", ".71", ".67", ".05"),
    ("local model (second order, F)", ".57", ".88", ".31", ".12"),
    ("local model (Krylov, F)", ".29", ".70", ".06", ".72"),
    ("learning rate × steps × ‖g‖", ".64", ".88", "–", "–"),
    ("one measured direction with speed control (ray)", ".81", ".97", ".15", ".09"),
    ("20 real steps, loss extrapolated", ".81", ".97", ".20", ".02"),
)


def esc(value: Any) -> str:
    """Text safe inside HTML elements and double-quoted attributes."""
    return html.escape(str(value), quote=True)


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
    """
    figures = all_figures(collected, space, scored, forecast)
    shown = [
        {"id": f"fig-{f.id}", "data": list(f.data), "layout": f.layout}
        for f in figures.values()
        if not f.missing
    ]
    body = "\n".join(
        [
            _verdict(forecast),
            _findings(findings(collected, space, scored, forecast)),
            _figure(figures["forecast"], tall=True),
            f'<div class="two">{_figure(figures["what-if"])}{_figure(figures["move"])}</div>',
            _examples(scored, show_text, max_examples),
            f'<div class="two">{_figure(figures["fisher-map"])}{_figure(figures["harm-map"])}</div>',
            f'<div class="two">{_figure(figures["spectrum"])}{_figure(figures["overlap"])}</div>',
            _conditions(scored),
            _quality(collected, space, scored, forecast),
            _worth(),
            _provenance(collected, provenance),
        ]
    )
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


def _items(sentences: Iterable[str]) -> str:
    return "".join(f"<li>{esc(sentence)}</li>" for sentence in sentences)


def _list(heading: str, sentences: Sequence[str]) -> str:
    return f'<h3>{esc(heading)}</h3><ul class="plain">{_items(sentences)}</ul>' if sentences else ""


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
        f"{_list('Why', v.reasons)}{_list('What to do', _advice(v))}"
        f"{_list('How far to trust this', v.caveats)}"
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
    return f'<section><h2>Findings</h2><ul class="plain">{_items(sentences)}</ul></section>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{esc(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(figure: Figure, *, tall: bool = False) -> str:
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
        f"{_table(figure.header, figure.rows)}</details></section>"
    )


def _examples(scored: ScoreResult, show_text: bool, limit: int) -> str:
    """The riskiest rows, sortable, their text folded away."""
    ranked = sorted(scored.examples, key=lambda row: -(row.get("second_order") or 0.0))
    if not ranked:
        missing = '<p class="missing">Not measured: score.examples is 0. That is not the same as no risk.</p>'
        return f'<section id="examples"><h2>Riskiest fine-tuning rows</h2>{missing}</section>'
    columns = ("row", "second order", "first order", "loss", "gradient norm", "tokens")
    mark = ' aria-sort="descending"'
    head = "".join(
        f'<th scope="col"{mark if name == "second order" else ""}><button type="button">{name}</button></th>'
        for name in columns
    )
    body = "".join(_example(row, show_text) for row in ranked[:limit])
    return (
        '<section id="examples"><h2>Riskiest fine-tuning rows</h2>'
        f'<p class="reading"><b>How to read this.</b> The {len(ranked)} rows of the first batches that were '
        f"scored one by one, the {min(limit, len(ranked))} most harmful shown. Positive means that a step on "
        "this row alone pushes towards harm: first order along the safety gradient, second order along what "
        "the whole first update does to the safety subspace. The ranking is local; it says who pushes, not "
        "how far.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="riskiest rows"><table><thead><tr>'
        f'{head}<th scope="col">text</th></tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _example(row: Mapping[str, Any], show_text: bool) -> str:
    keys = ("second_order", "first_order", "loss", "gradient_norm", "tokens")
    line = row.get("line", row.get("index"))
    cells = f'<td data-value="{esc(line)}">{esc(line)}</td>'
    for key in keys:
        value = row.get(key)
        shown = number(None if value is None else float(value))
        cells += f'<td data-value="{"" if shown == NOT_MEASURED else esc(value)}">{shown}</td>'
    prompt, response = str(row.get("prompt", "")), str(row.get("response", ""))
    if not show_text or not (prompt or response):
        return f'<tr>{cells}<td class="text note">not shown</td></tr>'
    head = prompt if len(prompt) <= 80 else prompt[:77] + "…"
    return (
        f'<tr>{cells}<td class="text" dir="auto"><details><summary>{esc(head) or "(no prompt)"}</summary>'
        f'<p dir="auto"><b>prompt</b> {esc(prompt)}</p><p dir="auto"><b>response</b> {esc(response)}</p>'
        "</details></td></tr>"
    )


def _conditions(scored: ScoreResult) -> str:
    words = {True: "holds", False: "does not hold", None: NOT_MEASURED}
    rows = [(c["name"], words[c["holds"]], c["evidence"]) for c in scored.aic_conditions]
    facts = f"γ̂ = {number(scored.gamma_hat)}, ε̂ = {number(scored.epsilon_hat)}"
    return (
        '<section id="conditions"><h2>Alignment Instability Condition</h2>'
        '<p class="reading"><b>How to read this.</b> Where all three hold, theory says that safety decays '
        "like t⁴ even though training starts almost orthogonal to it. Theory and measurement are shown side "
        f"by side; the verdict follows measurement. {esc(facts)}.</p>"
        f"{_table(('condition', 'here', 'evidence'), rows)}</section>"
    )


def _quality(
    collected: CollectResult, space: SubspaceResult, scored: ScoreResult, forecast: ForecastResult
) -> str:
    """What was checked about the measurements, and every warning."""
    held = space.heldout_energy
    rows = [
        ("safety samples", str(len(collected.losses)), f"{collected.dropped_duplicates} duplicates dropped"),
        ("mean safety loss", f"{number(float(collected.losses.mean()))} nats/token", "at the aligned point"),
        (
            "Fisher matrix",
            collected.fisher,
            "labels of the data" if collected.fisher == "empirical" else "own labels",
        ),
        ("gradient engine", str(collected.engine.get("name")), f"error against loop {_parity(collected)}"),
        ("batch invariance", number(collected.batch_invariance, 6), "cosine, wanted ≥ .999"),
        (
            "coverage",
            percent(collected.coverage.get("parameters")),
            "of selected parameters have a gradient yet",
        ),
        ("held-out energy", percent(held), f"± {number(space.heldout_energy_std, 2)} over random halves"),
        ("Hessian products", scored.hvp_method, f"relative error {number(scored.hvp_error, 2)}"),
        (
            "mini-batch diffusion",
            f"{number(forecast.diffusion)} nats",
            "beside the drift, at the end of the plan",
        ),
        ("gradient store", collected.store, "per-sample safety gradients"),
    ]
    warnings = [*collected.warnings, *space.warnings, *scored.warnings, *forecast.warnings]
    return (
        '<section id="quality"><h2>Quality of the measurements</h2>'
        f"{_table(('what', 'value', 'note'), rows)}{_list('Warnings', warnings)}</section>"
    )


def _parity(collected: CollectResult) -> str:
    parity = collected.engine.get("parity", {}).get(collected.engine.get("name"))
    return number(parity, 2)


def _worth() -> str:
    header = (
        "predictor",
        "ρ with final safety drift",
        "AUC for collapse",
        "collapses called safe",
        "false alarms",
    )
    return (
        '<section id="worth"><h2>What each predictor is worth</h2>'
        '<p class="reading"><b>How to read this.</b> Prototype benchmark, not this run: predictions made '
        "before 128 real fine-tunes of a small aligned model (16 data sets; full and LoRA; SGD and AdamW), "
        "against what then happened. ρ is the rank correlation; a second seed of the same fine-tunes reaches "
        f"ρ = .905.</p>{_table(header, WORTH)}"
        '<p class="note">Sources: Alignment Instability Condition, arXiv 2602.15799; AlignGuard-LoRA, arXiv '
        "2508.02079; prior package: alignment-risk.</p></section>"
    )


def _provenance(collected: CollectResult, provenance: Mapping[str, Any]) -> str:
    """Where everything came from, and the command that makes it again."""
    facts = [(key, _plain(value)) for key, value in collected.task.items()]
    versions = provenance.get("versions", {})
    facts += [(f"{name} version", version) for name, version in versions.items()]
    parts = [f'<section id="provenance"><h2>Provenance</h2>{_table(("what", "value"), facts)}']
    if provenance.get("command"):
        parts.append(f"<h3>Made by</h3><pre><code>{esc(provenance['command'])}</code></pre>")
    stages = provenance.get("stages", {})
    if stages:
        rows = [
            (name, f"{number(s['seconds'])} s", f"{s['bytes'] / 1e6:.1f} MB", s["key"])
            for name, s in stages.items()
        ]
        parts.append(_table(("stage", "time", "size", "key"), rows))
    if provenance.get("config"):
        parts.append(
            "<details><summary>The resolved config</summary>"
            f"<pre><code>{esc(provenance['config'])}</code></pre></details>"
        )
    return "".join(parts) + "</section>"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
