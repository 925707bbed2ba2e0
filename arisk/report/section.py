"""Sections of the page that are words and tables; everything from data is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast.record import ForecastResult
from arisk.report.text import NOT_MEASURED, number, percent

__all__ = [
    "conditions",
    "esc",
    "folded",
    "items",
    "listed",
    "provenance_section",
    "quality",
    "script_json",
    "table",
]


def esc(value: Any) -> str:
    """Text safe inside HTML elements and double-quoted attributes."""
    return html.escape(str(value), quote=True)


def script_json(value: Any) -> str:
    """JSON safe inside a script element: no `<`, and no line ends that JavaScript knows and JSON does not."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def items(sentences: Iterable[str]) -> str:
    """List items, escaped."""
    return "".join(f"<li>{esc(sentence)}</li>" for sentence in sentences)


def listed(heading: str, sentences: Sequence[str]) -> str:
    """A headed list; nothing where there is no sentence."""
    return f'<h3>{esc(heading)}</h3><ul class="plain">{items(sentences)}</ul>' if sentences else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls inside its own box, cells escaped."""
    head = "".join(f'<th scope="col">{esc(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """HTML that opens on demand; open from the start where no script runs, and on paper."""
    return f"<details open data-fold><summary>{esc(summary)}</summary>{content}</details>"


def conditions(scored: ScoreResult) -> str:
    """The three conditions of the theory, with what was measured for each."""
    words = {True: "holds", False: "does not hold", None: NOT_MEASURED}
    rows = [(c["name"], words[c["holds"]], c["evidence"]) for c in scored.aic_conditions]
    facts = f"γ̂ = {number(scored.gamma_hat)}, ε̂ = {number(scored.epsilon_hat)}"
    return (
        '<section id="conditions"><h2>Alignment Instability Condition</h2>'
        '<p class="reading"><b>How to read this.</b> Where all three hold, theory says that safety decays '
        "like t⁴ even though training starts almost orthogonal to it. Theory and measurement are shown side "
        f"by side; the verdict follows measurement. {esc(facts)}.</p>"
        f"{table(('condition', 'here', 'evidence'), rows)}</section>"
    )


def quality(
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
        ("gradient store", _store(collected), "per-sample safety gradients"),
    ]
    warnings = [*collected.warnings, *space.warnings, *scored.warnings, *forecast.warnings]
    return (
        '<section id="quality"><h2>Quality of the measurements</h2>'
        f"{table(('what', 'value', 'note'), rows)}{listed('Warnings', warnings)}</section>"
    )


def _parity(collected: CollectResult) -> str:
    parity = collected.engine.get("parity", {}).get(collected.engine.get("name"))
    return number(parity, 2)


def _store(collected: CollectResult) -> str:
    """The store, and its dtype where that is not the gradients' own."""
    return collected.store + ("" if collected.store_dtype == "float32" else f", {collected.store_dtype}")


def provenance_section(collected: CollectResult, provenance: Mapping[str, Any]) -> str:
    """Where everything came from, and the command that makes it again."""
    task = dict(collected.task)
    if task.get("data") and provenance.get("data"):
        task["data"] = {**task["data"], **provenance["data"]}
    facts = [(key, _plain(value)) for key, value in task.items()]
    versions = provenance.get("versions", {})
    facts += [(f"{name} version", version) for name, version in versions.items()]
    parts = [f'<section id="provenance"><h2>Provenance</h2>{table(("what", "value"), facts)}']
    if provenance.get("command"):
        parts.append(f"<h3>Made by</h3><pre><code>{esc(provenance['command'])}</code></pre>")
    stages = provenance.get("stages", {})
    if stages:
        rows = [(name, _spent(s), f"{s['bytes'] / 1e6:.1f} MB", s["key"]) for name, s in stages.items()]
        parts.append(table(("stage", "time", "size", "key"), rows))
    if provenance.get("config"):
        parts.append(
            folded(
                "The resolved config",
                f'<pre tabindex="0"><code>{esc(provenance["config"])}</code></pre>',
            )
        )
    return "".join(parts) + "</section>"


def _spent(stage: Mapping[str, Any]) -> str:
    """Wall time of a stage, and who spent it where that is another run."""
    taken = f", taken from {stage['taken_from']}" if stage.get("taken_from") else ""
    return f"{number(stage['seconds'])} s{taken}"


def _plain(value: Any) -> str:
    """A value in one line: mappings as `key value`, joined; numbers to four digits."""
    if isinstance(value, Mapping):
        nested = any(isinstance(part, Mapping) for part in value.values())
        parts = (f"{key}{':' if nested else ''} {_plain(part)}" for key, part in value.items())
        return ("; " if nested else " · ").join(parts)
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
