"""Tables of data rows: sortable columns, the row's own text escaped and folded away."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arisk.report.sections import esc
from arisk.report.text import NOT_MEASURED, number
from arisk.report.worth import worth_line
from arisk.results import ScoreResult

__all__ = ["Column", "examples", "rows_table"]

#: The text stands after this many columns, so that a phone shows it beside the number that matters.
TEXT_AFTER = 2
#: Characters of the prompt that stay visible.
HEAD = 72


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
    """A sortable table in its own scroll box.

    Args:
        columns: headings.
        rows: cells (numbers, None for not measured, or plain text) with the row's `prompt`, `response`.
        show_text: show prompts and responses, or only the numbers.
        label: what the table is, for screen readers.
    """
    heads = [_head(column) for column in columns]
    heads.insert(TEXT_AFTER, '<th scope="col">text</th>')
    body = "".join(_row(cells, row, show_text) for cells, row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}"><table class="rows">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _head(column: Column) -> str:
    mark = f' aria-sort="{column.order}"' if column.order else ""
    return f'<th scope="col"{mark}><button type="button">{esc(column.name)}</button></th>'


def _row(cells: Sequence[Any], row: Mapping[str, Any], show_text: bool) -> str:
    made = [_cell(value) for value in cells]
    made.insert(TEXT_AFTER, _text(row, show_text))
    return f"<tr>{''.join(made)}</tr>"


def _cell(value: Any) -> str:
    """A cell with the number it sorts by; what was not measured sorts last."""
    if isinstance(value, float) or value is None:
        shown = number(value)
        key = "" if value is None or not math.isfinite(value) else f"{value:.9g}"
        return f'<td data-value="{key}">{NOT_MEASURED if value is None else shown}</td>'
    key = value if isinstance(value, int) else ""
    return f'<td data-value="{esc(key)}">{esc(value)}</td>'


def _text(row: Mapping[str, Any], show_text: bool) -> str:
    prompt, response = str(row.get("prompt") or ""), str(row.get("response") or "")
    if not show_text or not (prompt or response):
        return '<td class="text note">not shown</td>'
    head = prompt if len(prompt) <= HEAD else prompt[: HEAD - 1] + "…"
    return (
        f'<td class="text" dir="auto"><details><summary>{esc(head) or "(no prompt)"}</summary>'
        f'<p dir="auto"><b>prompt</b> {esc(prompt)}</p><p dir="auto"><b>response</b> {esc(response)}</p>'
        "</details></td>"
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
