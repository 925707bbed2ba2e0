"""Screened fine-tuning rows on the page: ranked rows, scores beside their null, what dropping changes.

What `arisk screen` prints: the most harmful rows, what dropping them changes, and the files.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arisk.base.terminal import table as text_table
from arisk.report.figure import Figure, axes, reference_line, thin
from arisk.report.page import Advice, Finding, Part, Piece, Section
from arisk.report.section import Column, esc, listed, notes, rows_table, table
from arisk.report.text import NOT_MEASURED, number, percent
from arisk.screening.record import MEASURES, UNITS, ScreenResult

__all__ = ["screen_text", "section"]

#: Dropping rows is advice where it leaves less than this share of the forecast's highest rise.
WORTH_DROPPING = 0.75
#: Rows shown at once.
FIRST = 5
#: Bars of the score distribution, points of the share curve.
BINS, CURVE = 40, 200
#: Headings of the ranked rows, with the keys of `ScreenResult.examples` behind them.
COLUMNS = (
    (Column("rank", "ascending"), "rank"),
    (Column("score"), "score"),
    (Column("row"), "row"),
    (Column("flagged"), "flagged"),
    (Column("safety"), "first_order"),
    (Column("control"), "control_order"),
    (Column("at mean length"), "at_mean_length"),
    (Column("p (control rows)"), "p_value"),
    (Column("loss"), "loss"),
)
#: The scores of a kind without parts, as an equation.
EQUATIONS = {
    "path": "s_j = Σ_k ⟨c_k, ∇(term of row j in step k)⟩",
    "anchors": "s_j = mean cos(h_j, answered) − mean cos(h_j, refused)",
}
#: What the ranking is worth; points by `just bench screen` on the fixture language.
WORTH = {
    "point": "Measured by the benchmark on mixtures with harmful rows known by label: where the planned run "
    "is harmless but for those rows, they rank first and are flagged; where the other rows are new to the "
    "model and move safety themselves, dropping the labelled rows changed nothing, and dropping the "
    "flagged ones, most of them, about halved the real drift. On a real SmolLM2 with a tenth of rows that "
    "comply, 39 and 38 of 48 prompts were still refused without its first 24 rows, 27 and 25 with them, and "
    "24 to 29 without 24 random ones (`just bench removal`, two seeds). A score at the aligned model itself "
    "(points: start) is little better than chance.",
    "path": "Measured by `just bench lds` on three mixtures of the fixture language: sums of path scores "
    "foretell 160 real runs on half of the rows at rank correlations of .86, .74 and .70, scores at a point "
    "at .67, .60 and .71. On a real SmolLM2 leaving out its first rows kept fewer refusals than those of a "
    "point where a tenth of the rows complied (34 and 35 of 48 against 39 and 38), on a real gemma more (48 "
    "and 47 against 41 and 39; `just bench removal`, two seeds).",
    "anchors": "At chance on the fixture language (`just bench lds`); on a real SmolLM2 its first rows, left "
    "out, did no more than random ones (`just bench removal`). Take it as a first look.",
}


def section(found: ScreenResult, *, show_text: bool, max_examples: int, kept: str = "") -> Section:
    """All that a screening shows: ranked rows, scores beside their null, what dropping rows changes.

    Args:
        found: the record.
        show_text: show prompts and responses, or only their numbers.
        max_examples: rows of the table.
        kept: file with the rows that are not flagged, where a plan may name it.
    """
    shown = list(found.examples[:max_examples])
    body = (
        '<section id="screen"><h2>Screened fine-tuning rows</h2>'
        f"<p><b>{esc(found.sentence)}</b></p>"
        f"{_ranked(shown, show_text, by_length=found.lengths is not None)}{_what_if(found)}"
        f"{listed('About this screening', [found.rule_sentence, *found.warnings])}"
        f"{notes(_reading(found), '', WORTH[found.score])}</section>"
    )
    return Section(
        "screen",
        pieces=[
            Piece(Part.ROWS, body),
            Piece(Part.METHOD + 40, figure=_distribution(found), shape="half"),
            Piece(Part.METHOD + 41, figure=_share_curve(found), shape="half"),
        ],
        summary={"screen": _summary(found, show_text)},
        markdown=[
            "",
            f"Screened rows: {_plain(found.sentence)}",
            *[f"- {_plain(s)}" for s in found.findings()],
        ],
        findings=[
            Finding("Training rows", sentence, "screen", 30 + i, cause=i == 0)
            for i, sentence in enumerate((found.sentence, *found.findings()))
        ],
        advice=_advice(found, kept),
    )


def _advice(found: ScreenResult, kept: str) -> list[Advice]:
    """Dropping rows, where the forecast without them is clearly lower and no fewer prompts are refused."""
    curves = found.what_if
    if curves.get("status") != "measured":
        return []
    before, after = (max(curves[key]["safety"]) for key in ("before", "after"))
    if not after < WORTH_DROPPING * before:
        return []
    count = len(found.flagged)
    refused = [curves[key].get("refusals") for key in ("before", "after")]
    fewer = f"the loss of safe responses is forecast to rise by {number(after)}, not {number(before)}"
    if all(refused):
        with_all, without = (round(told["end"] * told["prompts"]) for told in refused)
        if without < with_all:
            return []
        if without > with_all:
            prompts = refused[1]["prompts"]
            told = f"{without} of {prompts} prompts are forecast to be refused at the end, not {with_all}"
            fewer = f"{told} ({fewer})"
    told = f"Drop the {count} flagged row{'' if count == 1 else 's'}: {fewer}."
    return [Advice(told, "run" if kept else "", f"--set finetune.path={shlex.quote(kept)}", 0)]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


#: What the scores of a kind without parts are, for a reader.
READING = {
    "path": "The score of a row estimates how {measure} changes at the end of these steps per unit more of "
    "the row's weight in training, taken back through every step and the optimizer's state. The scale of an "
    "adaptive optimizer is levelled on the way: its exact derivative foretold real runs far worse. So read "
    "scores as a ranking, and in sums over rows, not as what leaving out one row does. {measure_first} "
    "changed by {rise} nats/token. Rows that are alike share what they do together: one of many may be left "
    "out at no gain. Control rows are scored at steps drawn at random; where the plan's loss counts tokens, "
    "they and the rows are compared at mean length, by score over relative length t_j.",
    "anchors": "The score of a row is the mean cosine of its answer's hidden state to answers that comply "
    "less that to the model's own refusals, of the same safety prompts. It says what the answer begins like, "
    "not what training on it does.",
}


def _reading(found: ScreenResult) -> str:
    point = found.points[-1]
    if found.score in READING:
        measure = MEASURES[found.measure]
        text = READING[found.score].format(
            measure=measure,
            measure_first=measure[0].upper() + measure[1:],
            rise=number(point.safety_rise),
        )
        return f"{text} The rank correlation of that and length is {number(found.length_correlation, 2)}."
    where = "at the aligned model" if point.step == 0 else f"after {point.step} real steps of the planned run"
    against = (
        "less what it does to the control loss: harm to safety alone"
        if found.contrasted
        else "; what it does to other abilities was not measured"
    )
    estimates = (
        f"Rows below the head of the ranking have estimates ({found.method}). "
        if not bool(found.exact.all())
        else ""
    )
    return (
        f"The score of a row is the rise of {MEASURES[found.measure]}, per unit learning rate, that its part "
        f"of a planned step brings, {where}, {against}. There it had changed by "
        f"{number(point.safety_rise)} and the control loss by {number(point.control_rise)} nats/token. "
        "Above zero is harmful: all such scores together are the harm that shares are of. `safety` and "
        "`control` are the two parts of the score; p is how often a control row of its length would score "
        "as high. The ranking says who pushes, not how far. " + estimates + "A row counts by t, its trained "
        "tokens over their mean, where the plan's loss does; whether it stands out is asked of its score at "
        f"mean length, s/t. The rank correlation of that and length is {number(found.length_correlation, 2)}."
    )


def _ranked(rows: Sequence[Mapping[str, Any]], show_text: bool, *, by_length: bool) -> str:
    """The most harmful rows, their text folded away; at mean length where that is another number."""
    if not rows:
        return '<p class="missing">Rows explained: not measured (screen.examples is 0).</p>'
    columns = [(c, key) for c, key in COLUMNS if by_length or key != "at_mean_length"]
    told = [([_value(row, key) for _, key in columns], {**row, "why": _why(row, show_text)}) for row in rows]
    return rows_table([column for column, _ in columns], told, show_text, "screened rows", first=FIRST)


def _value(row: Mapping[str, Any], key: str) -> Any:
    """What a cell holds: numbers to sort by, and yes or no."""
    if key == "flagged":
        return "yes" if row["flagged"] else "no"
    if key in {"rank", "row"}:
        return int(row["rank"] if key == "rank" else row.get("line", row["row"]))
    value = row[key]
    return None if value is None else float(value)


def _why(row: Mapping[str, Any], show_text: bool) -> list[tuple[str, str]]:
    """The safety samples a row hurts most and the modules it does it through."""
    if row.get("modules") is None:
        return [("hurts most, modules", "not told by this kind of score")]
    modules = ", ".join(f"{m['module']} {percent(m['share'])}" for m in row.get("modules") or [])
    hurts = row.get("hurts")
    if hurts is None:
        named = f"{NOT_MEASURED} (memory)"
    else:
        named = "; ".join(
            f"sample {h['sample']} {number(h['rise'])}" + (f": {h['prompt']}" if show_text else "")
            for h in hurts
        )
    return [
        ("hurts most", named or "no safety sample on its own"),
        ("share of its safety part by module", modules or "none"),
    ]


def _what_if(found: ScreenResult) -> str:
    """Forecast with and without the flagged rows, in a table."""
    curves = found.what_if
    rows = [
        ("rows", str(len(found.scores)), str(len(found.scores) - len(found.flagged))),
        ("harm left, as a share of all scores above zero", "all", percent(1 - found.share)),
    ]
    if curves.get("status") == "measured":
        before, after = curves["before"], curves["after"]
        last = before["steps"][-1]
        rows += [
            (f"forecast rise of the safety loss at step {last}", _end(before), _end(after)),
            ("highest rise on the way", number(max(before["safety"])), number(max(after["safety"]))),
            ("control loss at the end", _end(before, "control"), _end(after, "control")),
            ("refusals forecast at the end of the plan", _refused(before), _refused(after)),
        ]
    else:
        rows.append(("forecast rise of the safety loss", NOT_MEASURED, str(curves.get("reason", ""))))
    head = ("what if the flagged rows are dropped", "all rows", "without them")
    return f"<h3>Dropping the flagged rows</h3>{table(head, rows)}"


def _end(curve: Mapping[str, Any], which: str = "safety") -> str:
    return number(curve[which][-1] if curve[which] else None)


def _refused(curve: Mapping[str, Any]) -> str:
    """Refusals at the end of the plan with their band."""
    told = curve.get("refusals")
    if not told:
        return NOT_MEASURED
    count = told["prompts"]
    low, high = round(told["low"] * count), round(told["high"] * count)
    return f"{round(told['end'] * count)} of {count} ({percent(told['confidence'])}: {low} to {high})"


def _distribution(found: ScreenResult) -> Figure:
    """Scores at mean length, linear near zero and logarithmic far out."""
    null = found.null if found.null is not None else torch.zeros(0)
    what, symbol = ("score", "s_j") if found.lengths is None else ("score at mean length", "s_j/t_j")
    both = torch.cat([found.at_mean_length, null.to(found.at_mean_length)])
    unit = max(float(both.abs().median()), 1e-30)
    spread = torch.asinh(both / unit)
    edges = torch.linspace(float(spread.min()), float(spread.max()) + 1e-9, BINS + 1, dtype=spread.dtype)
    middle = (torch.sinh((edges[1:] + edges[:-1]) / 2) * unit).tolist()
    traces: list[dict[str, Any]] = []
    table_rows: list[list[str]] = [[number(value)] for value in middle]
    for name, values, colour in (
        ("fine-tuning rows", found.at_mean_length, "#D55E00"),
        ("control rows (null)", null, "#0072B2"),
    ):
        if len(values) == 0:
            table_rows = [[*row, NOT_MEASURED] for row in table_rows]
            continue
        counts = torch.histogram(torch.asinh(values.to(edges) / unit).cpu(), edges).hist / len(values)
        traces.append(
            {
                "type": "bar",
                "name": name,
                "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
                "y": counts.tolist(),
                "customdata": middle,
                "hovertemplate": what + " %{customdata:.3g}<br>%{y:.1%} of rows",
                "marker": {"color": colour},
                "opacity": 0.75,
            }
        )
        table_rows = [[*row, percent(float(c))] for row, c in zip(table_rows, counts, strict=True)]
    # The longer word leaves no room for the unit, which the text names.
    unit_of = f"{UNITS[found.score]}, " if found.lengths is None else ""
    layout = axes(f"{what} ({unit_of}asinh scale)", "share of rows", barmode="overlay")
    ends = [float(edges[0]), 0.0, float(edges[-1])]
    layout["xaxis"] |= {"tickvals": ends, "ticktext": [number(math.sinh(v) * unit) for v in ends]}
    if not math.isnan(found.threshold):
        at = math.asinh(found.threshold / unit)
        line = reference_line(step=0, text="flagged from here")
        line["shape"] |= {"x0": at, "x1": at}
        line["annotation"] |= {"x": at}
        layout |= {"shapes": [line["shape"]], "annotations": [line["annotation"]]}
    return Figure(
        "screen-scores",
        "Scores and their null" if found.lengths is None else "Scores at mean length and their null",
        traces,
        layout,
        "Control rows are scored as if they were fine-tuning rows"
        + (", each left out of the control gradient" if found.score == "point" else "")
        + ": what harmless rows look like. Rows to the right of them stand out."
        if found.null is not None
        else "No control rows: the null was not measured, and the bulk of the rows serves in its place.",
        EQUATIONS.get(found.score, f"{symbol} = −⟨∇L_s, D g_j⟩")
        if not found.contrasted
        else f"{symbol} = ⟨∇L_c − ∇L_s, D g_j⟩",
        [what, "fine-tuning rows", "control rows"],
        thin([row for row in table_rows if any(c not in ("0 %", NOT_MEASURED) for c in row[1:])]),
    )


def _share_curve(found: ScreenResult) -> Figure:
    """Share of all scores above zero that the highest rows carry."""
    positive = found.scores.clamp(min=0).sort(descending=True).values
    total = float(positive.sum())
    missing = None if total > 0 else "no row has a positive score"
    running = (positive.cumsum(0) / total).tolist() if total > 0 else []
    count = len(running)
    step = max(1, count // CURVE)
    places = {i for i in range(count) if i % step == 0 or i < 40 or i == count - 1}
    kept: list[int] = sorted(places)
    x, y = [(i + 1) / count for i in kept], [running[i] for i in kept]
    layout = axes("share of rows dropped, most harmful first", "share of all scores above zero")
    layout["xaxis"]["tickformat"] = layout["yaxis"]["tickformat"] = ".0%"
    line = {"color": "#D55E00", "width": 2}
    return Figure(
        "screen-share",
        "How few rows carry the harm",
        [{"type": "scatter", "mode": "lines", "name": "share", "x": x, "y": y, "line": line}],
        layout,
        "A curve that shoots up says that few rows do most of it: dropping them is cheap. A straight one "
        "says that no small part of the data is to blame.",
        "Σ_{j ≤ k} max(s_j, 0) / Σ_j max(s_j, 0), rows by falling score",
        ["rows dropped", "share of all scores above zero"],
        thin([[percent(a), percent(b)] for a, b in zip(x, y, strict=True)]),
        missing,
    )


def _summary(found: ScreenResult, show_text: bool) -> dict[str, Any]:
    """`ScreenResult.as_json`, without texts where they may not be shown."""
    body = found.as_json()
    if show_text:
        return body
    for row in body["examples"]:
        row.pop("prompt", None)
        row.pop("response", None)
        row["hurts"] = [{**h, "prompt": ""} for h in row["hurts"]] if row.get("hurts") else row.get("hurts")
    return body


#: Rows of the terminal's table, and characters of a row's text there.
SHOWN, WIDTH = 12, 60


def screen_text(outcome: Any) -> str:
    """The most harmful rows, what dropping them changes, and the files; the report's path comes last."""
    found = outcome.found
    lines = [found["sentence"], "", text_table(*_rows(found)), "", found["rule_sentence"]]
    lines += [f"finding: {sentence}" for sentence in found["findings"]]
    lines += [f"caveat: {sentence}" for sentence in found["warnings"]]
    files = [str(outcome.folder / name) for name in found["files"]]
    lines += [f"files: {', '.join(files)}" if files else f"no files: {found['files_missing']}"]
    return "\n".join([*lines, outcome.last_line])


def _rows(found: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    header = ["rank", "row", "flagged", "score", "safety", "control", "p", "text"]
    lengths = found["at_mean_length"]
    if lengths:
        header.insert(-2, "at mean length")
    rows = [
        [
            str(row["rank"]),
            str(row.get("line", row["row"])),
            "yes" if row["flagged"] else "no",
            _signed(row["score"]),
            _signed(row["first_order"]),
            _signed(row["control_order"]),
            *([_signed(row["at_mean_length"])] if lengths else []),
            "not measured" if row["p_value"] is None else f"{row['p_value']:.1e}",
            _short(f"{row.get('prompt', '')} → {row.get('response', '')}" if "prompt" in row else ""),
        ]
        for row in found["examples"][:SHOWN]
    ]
    return rows, header


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3g}"


def _short(text: str) -> str:
    flat = "".join(c if c.isprintable() else " " for c in text)
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
