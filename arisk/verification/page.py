"""The truth over the forecast on the page: what a real fine-tune showed, in words, table and figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.base.terminal import fitted, said
from arisk.forecast.page import real_trace
from arisk.forecast.probes_page import probe_value
from arisk.forecast.record import ForecastResult, RealRun
from arisk.report.figure import LEGEND, Figure, axes, clean, reference_line, thin
from arisk.report.page import Part, Piece, Section
from arisk.report.section import esc, listed, notes, table
from arisk.report.text import NOT_MEASURED, literal, number, percent
from arisk.verification.record import Comparison, ProbeCheck, compared_curve

__all__ = [
    "real_run",
    "refusal_text",
    "section",
    "truth_figure",
    "verified_rows",
    "verified_section",
    "verify_text",
]


def section(check: Comparison | None, forecast: ForecastResult, *, show_text: bool) -> Section:
    """What the plan really did beside its forecast; without a real run only that there was none.

    Args:
        check: the real run over its forecast.
        forecast: curves and verdict.
        show_text: show prompts and generated texts.
    """
    if check is None:
        return Section("verify", summary={"verify": None})
    rows = [f"| {' | '.join(map(literal, row))} |" for row in verified_rows(check)]
    head = ["| verified | forecast | real |", "| --- | --- | --- |"]
    return Section(
        "verify",
        pieces=[
            Piece(Part.TRUTH, verified_section(check, show_text)),
            Piece(Part.METHOD + 50, figure=truth_figure(check, forecast)),
        ],
        summary={"verify": check.as_json()},
        markdown=[f"Verified by a real fine-tune: {literal(_both(check))}", "", *head, *rows, ""],
        shared={"real_run": real_run(check)},
    )


def real_run(check: Comparison) -> RealRun:
    """What pages of the forecast need to know of a real run."""
    counts = [(count.step, count.refused, count.prompts) for count in check.refusals]
    probes = {probe.name: (probe.step, probe.real) for probe in check.probes}
    return RealRun(
        check.measured.steps, check.safety_curve, check.real_collapse, check.sentence, counts, probes
    )


def truth_figure(check: Comparison, forecast: ForecastResult) -> Figure:
    """Measured safety and control losses and refusals along the real run, over the forecast's band."""
    run, curve = check.measured, compared_curve(forecast)
    data: list[dict[str, Any]] = []
    if curve is not None:
        hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        steps, band = list(curve.steps), {"fill": "tonexty", "fillcolor": "#E69F002e"}
        data += [
            {"type": "scatter", "x": steps, "y": clean(curve.lower), **hidden},
            {"type": "scatter", "x": steps, "y": clean(curve.upper), **hidden, **band},
            _line(f"forecast ({curve.name})", steps, curve.median, "#E69F00", "solid"),
        ]
    data.append(real_trace(real_run(check)))
    control = check.control_curve
    if control is not None:
        data.append(_line("real control loss", run.steps, control, "#CC79A7", "dot"))
    if check.refusals:
        shares = [count.refused / count.prompts for count in check.refusals]
        marks = {"symbol": "diamond", "size": 10, "color": "#0072B2"}
        trace = _line("refusals", [c.step for c in check.refusals], shares, "#0072B2", "dashdot")
        data.append({**trace, "mode": "lines+markers", "marker": marks, "yaxis": "y2"})
    line = reference_line(horizon=check.threshold, text=f"collapse threshold +{check.threshold:g}")
    layout = axes(
        "optimizer step",
        "change of loss (nats / response token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        hovermode="x unified",
        legend=LEGEND,
    )
    real = [value for value in [*check.safety_curve, *(control or [])] if math.isfinite(value)]
    top, low = max([2 * check.threshold, *real]), min([0.0, *real])
    # The forecast is seen whole unless it would flatten the truth.
    ahead = [value for value in (curve.median if curve else []) if math.isfinite(value)]
    top = max(top, min(max(ahead, default=0.0), 3 * top))
    layout["yaxis"]["range"] = [1.1 * low - 0.03 * top, 1.15 * top]
    if check.refusals:
        layout["yaxis2"] = {
            "title": {"text": "share of answers that refuse"},
            "overlaying": "y",
            "side": "right",
            "range": [-0.03, 1.05],
            "tickvals": [0, 0.25, 0.5, 0.75, 1],
            "tickformat": ".0%",
            "showgrid": False,
            "automargin": True,
        }
    return Figure(
        "truth",
        "The real run",
        data,
        layout,
        "The model was really fine-tuned as planned (its files are untouched) and the losses measured along "
        "the way. A safety loss that rises with the control loss is general damage; one that rises alone is "
        "lost safety. Diamonds, on the right axis, are the share of safety prompts whose generated answer "
        "still refuses.",
        "mean_i ℓ_i(θ_k) − ℓ_i(θ*), θ_k after k steps of the planned optimizer on its planned batches",
        ["step", "safety", "control", "fine-tuning loss", "refusals"],
        thin(_points(check, control)),
        says=check.sentence,
        worth="This is the truth the forecast is judged by, for one seed and one data order: a second seed "
        "of the same job moves the collapse step too.",
    )


def _line(name: str, x: Sequence[int], y: Sequence[float], colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "dash": dash, "width": 2}
    return {"type": "scatter", "name": name, "mode": "lines", "x": list(x), "y": clean(y), "line": line}


def _points(check: Comparison, control: Sequence[float] | None) -> list[list[str]]:
    counts = {count.step: count for count in check.refusals}
    run = check.measured
    return [
        [
            str(step),
            number(check.safety_curve[i]),
            NOT_MEASURED if control is None else number(control[i]),
            number(run.finetune_loss[i]),
            f"{counts[step].refused} of {counts[step].prompts}" if step in counts else "–",
        ]
        for i, step in enumerate(run.steps)
    ]


def verified_rows(check: Comparison) -> list[tuple[str, str, str]]:
    """(what, forecast, real) of the comparison; what was not measured says so."""
    run = check.measured
    last, horizon = run.steps[-1], run.horizon
    expected = NOT_MEASURED
    if check.forecaster is not None:
        step = check.forecast_collapse
        expected = f"none within {horizon} steps" if step is None else f"step {step} of {horizon}"
        if check.forecast_interval is not None:
            low, high = (f"beyond {horizon}" if end is None else str(end) for end in check.forecast_interval)
            expected += f" ({low} to {high})"
    real = f"none within {last} steps" if check.real_collapse is None else f"step {check.real_collapse}"
    if check.real_collapse is None and run.diverged_at is not None:
        real = f"none before it diverged at step {run.diverged_at}"
    inside = NOT_MEASURED if check.inside_share is None else f"at {percent(check.inside_share)} of the points"
    return [
        ("collapse step", expected, real),
        ("error factor of the collapse step", "", _factor(check)),
        (
            f"rise of the loss of safe responses after {last} of {horizon} steps (nats/token)",
            number(check.forecast_change),
            number(check.real_change),
        ),
        (
            "rise of the loss of ordinary answers there",
            number(check.forecast_control),
            number(check.control_change),
        ),
        (
            "difference: specific to safety",
            number(_minus(check.forecast_change, check.forecast_control)),
            number(check.specific_change),
        ),
        ("real curve inside the forecast's interval", "", inside),
        ("refusals, start → end", forecast_refusals(check), refusal_text(check)),
        *map(_probe_row, check.probes),
        (
            "safety rows measured",
            "",
            f"{run.safety.shape[0]}, {'held out' if run.heldout else 'not held out'}",
        ),
    ]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _factor(check: Comparison) -> str:
    if check.error_factor is not None:
        return f"× {number(check.error_factor)}"
    if check.error_at_least is not None:
        return f"more than × {number(check.error_at_least)}"
    return "–" if check.forecaster is not None else NOT_MEASURED


def refusal_text(check: Comparison) -> str:
    """Refusals before and after, or why they were not counted."""
    if not check.refusals:
        return f"{NOT_MEASURED}: {check.refusals_missing}"
    first, last = check.refusals[0], check.refusals[-1]
    end = "" if last.step == check.measured.last else f" (at step {last.step})"
    return f"{first.refused} → {last.refused} of {last.prompts}{end}"


def forecast_refusals(check: Comparison) -> str:
    """What the forecast says of the last count: of as many prompts, with its band."""
    if check.forecast_refusals is None:
        return NOT_MEASURED if check.refusals else ""
    end, fewest, most = check.forecast_refusals
    return f"{end} ({fewest} to {most}) of {check.refusals[-1].prompts}"


def _both(check: Comparison) -> str:
    """Refusals first, where they were counted, then the loss."""
    return " ".join(sentence for sentence in (check.refusal_sentence, check.sentence) if sentence)


def _probe_row(probe: ProbeCheck) -> tuple[str, str, str]:
    """A probe as forecast and as it is."""
    ahead = NOT_MEASURED
    if probe.forecast is not None:
        middle, lower, upper = (probe_value(probe.measure, value) for value in probe.forecast)
        ahead = f"{middle} ({lower} to {upper})"
    unit = "right" if probe.measure == "choice" else "nats/token"
    real = f"{probe_value(probe.measure, probe.start)} → {probe_value(probe.measure, probe.real)}"
    return f"probe {probe.name} ({probe.measure}, {unit}) at step {probe.step}", ahead, real


def verified_section(check: Comparison, show_text: bool) -> str:
    """The comparison in words and as a table, and the generated texts folded away."""
    held = (
        "The rows are held out: the forecast never saw them."
        if check.measured.heldout
        else "The rows are not held out: the forecast used the same ones."
    )
    basis = f"the forecast “{check.forecaster}”" if check.forecaster else "no forecast"
    reading = (
        f"The plan was really carried out, on the model in memory, and is set beside {basis}. Collapse is "
        "the first "
        f"step at which the mean safety loss has risen by {check.threshold:g} nats/token. {held} An answer "
        "counts as "
        "a refusal when it begins with one, or as the judge model says. One run is one draw: another data "
        "order "
        "moves the step too."
    )
    return (
        '<section id="verify"><h2>Verified by a real fine-tune</h2>'
        f'<p class="says">{esc(_both(check))}</p>'
        f"{table(('what', 'forecast', 'real'), verified_rows(check))}"
        f"{listed('About this run', check.measured.warnings)}"
        f'<div class="folds">{notes(reading)}{_texts(check, show_text)}</div></section>'
    )


def _texts(check: Comparison, show_text: bool) -> str:
    """Answers at the start and at the end, prompt by prompt."""
    if not check.refusals:
        return ""
    if not show_text or not check.measured.generated[0].texts:
        return '<p class="note">Generated texts are not shown (report.show_text is off).</p>'
    made = check.measured.generated
    body = "".join(
        _text(
            row,
            made[0].texts[i],
            made[-1].texts[i],
            check.refusals[0].refuses[i],
            check.refusals[-1].refuses[i],
        )
        for i, row in enumerate(check.measured.prompts)
    )
    return (
        f"<details><summary>What the model wrote at step {made[0].step} and at step {made[-1].step}</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="generated texts"><table><thead><tr>'
        f'<th scope="col">prompt</th><th scope="col">step {made[0].step}</th>'
        f'<th scope="col">step {made[-1].step}</th></tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _text(row: Mapping[str, Any], start: str, end: str, refused_first: bool, refused_last: bool) -> str:
    cells = f'<td class="text" dir="auto">{esc(row.get("prompt") or "(no prompt)")}</td>'
    for text, refused in ((start, refused_first), (end, refused_last)):
        label = "refuses" if refused else "does not refuse"
        cells += f'<td class="text" dir="auto"><b>{label}</b><br>{esc(text) or "(nothing)"}</td>'
    return f"<tr>{cells}</tr>"


def _forecast_fraction(found: Mapping[str, Any]) -> str:
    """Refusals at the last answers as forecast, with their band."""
    said = found.get("forecast_refusals")
    return f"{said[0]} ({said[1]} to {said[2]})" if said else ""


def verify_text(outcome: Any) -> str:
    """Forecast and truth side by side, and the report's path (or what it waits for) as the last line."""
    found = outcome.found
    inside, counts = found["inside_share"], found["refusals"]
    expected, real = _step(found, "forecast"), _step(found, "real")
    refusals = [_fraction(counts[0]), _fraction(counts[-1])] if counts else ["not measured"] * 2
    rows = [
        ["collapse step", expected + _between(found), real],
        ["safety change", _change(found["forecast_change"]), _change(found["real_change"], "diverged")],
        ["control change", _change(found["forecast_control"]), _change(found["control_change"])],
        ["safety minus control", _change(_specific(found)), _change(found["specific_change"])],
        ["refusals at the start", "", refusals[0]],
        ["refusals at the end", _forecast_fraction(found), refusals[1]],
    ]
    reach = f"after {found['last_step']} of {found['horizon']} steps"
    factor = "–" if found["error_factor"] is None else f"× {found['error_factor']:.2f}"
    if found["error_factor"] is None and found["error_at_least"] is not None:
        factor = f"more than × {found['error_at_least']:.2f}"
    rows += [_probe_cells(probe) for probe in found["probes"]]
    lines = [
        *([said(found["refusal_sentence"])] if found["refusal_sentence"] else []),
        said(found["sentence"]),
        "",
        fitted(rows, [reach, "forecast", "real"]),
        "",
        f"error factor of the collapse step: {factor}",
        "real curve inside the forecast's interval: "
        + ("not measured" if inside is None else f"{inside:.0%} of the measured steps"),
        *([f"refusals not measured: {found['refusals_missing']}"] if found["refusals_missing"] else []),
        *[said(f"caveat: {warning}", " " * 8) for warning in found["warnings"]],
    ]
    return "\n".join([*lines, outcome.last_line])


def _probe_cells(probe: Mapping[str, Any]) -> list[str]:
    """A probe's row for a terminal, from plain values."""
    return list(_probe_row(ProbeCheck(**probe)))


def _step(found: Mapping[str, Any], which: str) -> str:
    """A collapse step, never without how far was looked."""
    step = found[f"{which}_collapse"]
    if which == "forecast" and found["forecaster"] is None:
        return "not measured"
    if step is None and which == "real" and found["diverged_at"] is not None:
        return f"none before it diverged at {found['diverged_at']}"
    reach = found["horizon"] if which == "forecast" else found["last_step"]
    return f"none within {reach}" if step is None else str(step)


def _between(found: Mapping[str, Any]) -> str:
    if found["forecast_interval"] is None:
        return ""
    ends = [f"beyond {found['horizon']}" if end is None else end for end in found["forecast_interval"]]
    return f" ({ends[0]} to {ends[1]})"


def _specific(found: Mapping[str, Any]) -> float | None:
    """The forecast's safety change minus its control change."""
    safety, control = found["forecast_change"], found["forecast_control"]
    return None if safety is None or control is None else safety - control


def _change(value: float | None, missing: str = "not measured") -> str:
    return missing if value is None else f"{value:+.3g}"


def _fraction(count: Mapping[str, Any]) -> str:
    return f"{count['refused']} of {count['prompts']}"
