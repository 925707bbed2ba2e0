"""Sections of the page that are words and tables; everything from data is escaped.

Tables of data rows: sortable columns, the row's own text escaped and folded away.

A long table holds its first rows as HTML and the others as data, which the page turns into rows when they
are asked for: ten thousand rows of HTML would take a browser gigabytes.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arisk.report.text import NOT_MEASURED, number

__all__ = [
    "Column",
    "coded",
    "esc",
    "folded",
    "items",
    "listed",
    "notes",
    "provenance_section",
    "quality_section",
    "rows_table",
    "script_json",
    "table",
]


def esc(value: Any) -> str:
    """Text safe inside HTML elements and double-quoted attributes."""
    return html.escape(str(value), quote=True)


def coded(text: str) -> str:
    """Escaped text in which what stands between backticks is code.

    >>> coded("`arisk run my.yaml` & more")
    '<code>arisk run my.yaml</code> &amp; more'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", esc(text))


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


def notes(reading: str, equation: str = "", worth: str = "") -> str:
    """How to read something, its equation and what it was worth elsewhere, folded away together."""
    told = f"<p>{coded(reading)}</p>" if reading else ""
    told += f'<p class="equation">{esc(equation)}</p>' if equation else ""
    told += f"<p><b>Worth.</b> {esc(worth)}</p>" if worth else ""
    return folded("How to read this", f'<div class="reading">{told}</div>') if told else ""


def quality_section(rows: Sequence[tuple[str, str, str]], warnings: Sequence[str]) -> str:
    """What was checked about the measurements, as (what, value, note), and every warning."""
    return (
        '<section id="quality"><h2>Quality of the measurements</h2>'
        f"{table(('what', 'value', 'note'), rows)}{listed('Warnings', warnings)}</section>"
    )


def provenance_section(provenance: Mapping[str, Any]) -> str:
    """Where everything came from, and the command that makes it again.

    Args:
        provenance: `task`, `versions`, `command`, `stages` and `config`, as far as they are known.
    """
    facts = [(key, _plain(value)) for key, value in provenance.get("task", {}).items()]
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


#: The text stands after this many columns, so that a phone shows it beside the number that matters.
TEXT_AFTER = 2
#: Characters of the prompt that stay visible.
HEAD = 72
#: Rows that are HTML from the start; characters of prompts and responses that all others may carry.
AT_ONCE, TEXT_BUDGET = 100, 600_000


@dataclass(frozen=True)
class Column:
    """A heading, and the direction in which the rows come sorted by it."""

    name: str
    order: Literal["ascending", "descending"] | None = None


def rows_table(
    columns: Sequence[Column],
    rows: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    show_text: bool,
    label: str,
    first: int = AT_ONCE,
) -> str:
    """A sortable table in its own scroll box; rows after the first come as data.

    Args:
        columns: headings.
        rows: cells (numbers, None for not measured, or plain text) with the row's `prompt`, `response` and,
            where there is one, `why`: pairs of a label and a text that are shown in any case.
        show_text: show prompts and responses, or only the numbers.
        label: what the table is, for screen readers.
        first: rows that are shown before somebody asks for more.
    """
    told = list(rows)
    heads = [_head(column) for column in columns]
    heads.insert(TEXT_AFTER, '<th role="columnheader" scope="col">text</th>')
    names = [column.name for column in columns]
    body = "".join(_row(names, cells, row, show_text) for cells, row in told[:first])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}">'
        '<table class="rows" role="table"><thead role="rowgroup">'
        f'<tr role="row">{"".join(heads)}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></div>{_others(told, show_text, first)}'
    )


def _others(told: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], show_text: bool, first: int) -> str:
    """The rows that are not HTML yet, as data, with the button that brings them."""
    if len(told) <= first:
        return ""
    data: list[list[Any]] = []
    left = TEXT_BUDGET
    for cells, row in told[first:]:
        prompt, response = _texts(row) if show_text else ("", "")
        if len(prompt) + len(response) > left:
            prompt, response = (_clipped(prompt), "") if left >= HEAD else ("", "")
        left -= len(prompt) + len(response)
        data.append([*(_shown(value) for value in cells), prompt, response, row.get("why") or []])
    return (
        f'<script type="application/json" class="others">{script_json(data)}</script>'
        f'<p class="more note"><span aria-live="polite">{first} of {len(told)} rows are shown; a heading '
        "sorts all of them.</span> "
        '<button type="button">Show more</button></p>'
    )


def _head(column: Column) -> str:
    mark = f' aria-sort="{column.order}"' if column.order else ""
    return f'<th role="columnheader" scope="col"{mark}><button type="button">{esc(column.name)}</button></th>'


def _row(names: Sequence[str], cells: Sequence[Any], row: Mapping[str, Any], show_text: bool) -> str:
    made = [_cell(name, value) for name, value in zip(names, cells, strict=True)]
    made.insert(TEXT_AFTER, _text(row, show_text))
    return f'<tr role="row">{"".join(made)}</tr>'


def _shown(value: Any) -> str:
    """A cell as it is read."""
    if value is None:
        return NOT_MEASURED
    return number(value) if isinstance(value, float) else str(value)


def _cell(name: str, value: Any) -> str:
    """A cell with its heading, for a phone, and the number it sorts by; what was not measured sorts last."""
    if isinstance(value, float) or value is None:
        key = "" if value is None or not math.isfinite(value) else f"{value:.9g}"
    else:
        key = value if isinstance(value, int) else ""
    return f'<td role="cell" data-label="{esc(name)}" data-value="{esc(key)}">{esc(_shown(value))}</td>'


def _texts(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row.get("prompt") or ""), str(row.get("response") or "")


def _clipped(prompt: str) -> str:
    return prompt if len(prompt) <= HEAD else prompt[: HEAD - 1] + "…"


def _text(row: Mapping[str, Any], show_text: bool) -> str:
    prompt, response = _texts(row) if show_text else ("", "")
    parts = [("prompt", prompt), ("response", response)] if prompt or response else []
    head = _clipped(prompt) or "(no prompt)" if parts else "why"
    parts += row.get("why") or []
    if not parts:
        return '<td role="cell" class="text note">not shown</td>'
    told = "".join(f'<p dir="auto"><b>{esc(label)}</b> {esc(text)}</p>' for label, text in parts)
    return (
        f'<td role="cell" class="text" dir="auto"><details><summary>{esc(head)}</summary>'
        f"{told}</details></td>"
    )
