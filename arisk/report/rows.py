"""Tables of data rows: sortable columns, the row's own text escaped and folded away.

A long table holds its first rows as HTML and the others as data, which the page turns into rows when they
are asked for: ten thousand rows of HTML would take a browser gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arisk.anatomy.record import ScoreResult
from arisk.report.section import esc, script_json
from arisk.report.text import NOT_MEASURED, number
from arisk.report.worth import worth_line

__all__ = ["Column", "examples", "rows_table"]

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
) -> str:
    """A sortable table in its own scroll box; rows after the first `AT_ONCE` come as data.

    Args:
        columns: headings.
        rows: cells (numbers, None for not measured, or plain text) with the row's `prompt`, `response` and,
            where there is one, `why`: pairs of a label and a text that are shown in any case.
        show_text: show prompts and responses, or only the numbers.
        label: what the table is, for screen readers.
    """
    told = list(rows)
    heads = [_head(column) for column in columns]
    heads.insert(TEXT_AFTER, '<th role="columnheader" scope="col">text</th>')
    names = [column.name for column in columns]
    body = "".join(_row(names, cells, row, show_text) for cells, row in told[:AT_ONCE])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}">'
        '<table class="rows" role="table"><thead role="rowgroup">'
        f'<tr role="row">{"".join(heads)}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></div>{_others(told, show_text)}'
    )


def _others(told: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], show_text: bool) -> str:
    """The rows that are not HTML yet, as data, with the button that brings them."""
    if len(told) <= AT_ONCE:
        return ""
    data: list[list[Any]] = []
    left = TEXT_BUDGET
    for cells, row in told[AT_ONCE:]:
        prompt, response = _texts(row) if show_text else ("", "")
        if len(prompt) + len(response) > left:
            prompt, response = (_clipped(prompt), "") if left >= HEAD else ("", "")
        left -= len(prompt) + len(response)
        data.append([*(_shown(value) for value in cells), prompt, response, row.get("why") or []])
    return (
        f'<script type="application/json" class="others">{script_json(data)}</script>'
        f'<p class="more note"><span aria-live="polite">{AT_ONCE} of {len(told)} rows are shown; a heading '
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


#: Headings of the riskiest rows, with the keys of `ScoreResult.examples` behind them.
COLUMNS = (
    (Column("row"), "line"),
    (Column("second order", "descending"), "second_order"),
    (Column("first order"), "first_order"),
    (Column("loss"), "loss"),
    (Column("gradient norm"), "gradient_norm"),
    (Column("tokens"), "tokens"),
)


def examples(scored: ScoreResult, show_text: bool, limit: int, says: str | None = None) -> str:
    """The riskiest rows, sortable, their text folded away.

    Args:
        scored: has the rows.
        show_text: show prompts and responses, or only their numbers.
        limit: rows shown.
        says: what the ranking shows, in one sentence.
    """
    head = '<section id="examples"><h2>Riskiest training rows</h2>'
    ranked = sorted(scored.examples, key=_harm, reverse=True)
    if not ranked:
        return (
            f'{head}<p class="missing">Not measured: score.examples is 0. '
            "That is not the same as no risk.</p></section>"
        )
    told = [([_value(row, key) for _, key in COLUMNS], row) for row in ranked[:limit]]
    takeaway = f'<p class="says">{esc(says)}</p>' if says else ""
    return (
        f"{head}{takeaway}{rows_table([column for column, _ in COLUMNS], told, show_text, 'riskiest rows')}"
        '<dl class="notes"><div><dt>How to read this.</dt><dd>'
        f"{min(limit, len(ranked))} of the {len(ranked)} rows of the first batches that were scored one by "
        "one, the most harmful first; a heading sorts. Positive means that a step on this row alone pushes "
        "towards harm: first order along the safety gradient, second order along what the whole first update "
        "does to the safety subspace. The ranking is local: it says who pushes, not how far.</dd></div>"
        '<div><dt>Equation</dt><dd class="equation">first order: −⟨ḡ_s, D g_j⟩ (nats / unit learning rate)\n'
        "second order: ⟨F u, −D g_j⟩ (nats² / unit learning rate²)</dd></div>"
        f"<div><dt>Worth</dt><dd>{esc(worth_line('second order', 'This ranking of single rows'))}</dd></div>"
        "</dl></section>"
    )


def _harm(row: Mapping[str, Any]) -> float:
    """Sort key: what was not measured comes last."""
    value = row.get("second_order")
    return float(value) if value is not None and math.isfinite(value) else -math.inf


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key == "line":
        return row.get("line", row.get("index"))
    value = row.get(key)
    return None if value is None else float(value)
