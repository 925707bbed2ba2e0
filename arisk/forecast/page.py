"""The forecast on the page: its fan of curves, safety against ordinary answers, and all else it shows.

The first screen, the rollout and the what-if map have modules of their own.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from arisk.forecast.first_screen import advice_of, evidence_text, verdict_section
from arisk.forecast.probes_page import probe_markdown, probe_sentence, probe_summary, probes_section
from arisk.forecast.record import Curve, DriftAccount, ForecastResult, RealRun, RolloutResult
from arisk.forecast.refusals_page import (
    EQUATION as REFUSAL_EQUATION,
)
from arisk.forecast.refusals_page import (
    READING as REFUSAL_READING,
)
from arisk.forecast.refusals_page import (
    end_text,
    lost_section,
    lost_text,
    refusal_notes,
    refusal_sentence,
    refusal_summary,
    refusal_traces,
)
from arisk.forecast.rollout_page import (
    account_findings,
    account_section,
    method,
    rollout_section,
    sample_drift,
    sample_table,
)
from arisk.forecast.text import collapse_text, drift_sentence, rests_on, sample_sentence
from arisk.forecast.what_if_page import what_if_map
from arisk.forecast.witnesses_page import opening_summary, opening_trace, witnesses
from arisk.forecast.worth import worth, worth_line, worth_rows
from arisk.report.figure import LEGEND, Figure, axes, clean, reference_line, step_lines, thin, threshold_line
from arisk.report.page import Answer, Finding, Part, Piece, Section
from arisk.report.text import NOT_MEASURED, chance, literal, number, percent

__all__ = ["STYLE", "drift_map", "forecast_figure", "real_trace", "section"]

#: Colours that stay apart for the colour-blind (after Okabe and Ito 2008), and dashes beside them.
STYLE = {
    "bound": ("#8a8a8a", "dot"),
    "local": ("#0072B2", "dash"),
    "ray": ("#B8860B", "longdash"),
    "pilot": ("#CC79A7", "dashdot"),
    "rollout": ("#009E73", "solid"),
    "combined": ("#D55E00", "solid"),
}
#: Opacity of a line beyond its trust horizon.
FADED = 0.35
#: Shares of the height that the two panels take, refusals above loss.
UPPER, LOWER = [0.56, 1.0], [0.0, 0.44]

EQUATION = """rollout: measured L_s(θ_k) − L_s(θ*) along the virtual run
pilot: outputs extrapolated, z₀ + (z_k − z₀)(τ/τ_k)^p
combined: their mean in log space, the pilot's weight ∝ τ_pilot/τ
local: ⟨ḡ_s, δ_k⟩ + ½ δ_kᵀF δ_k
ray: measured L_s(θ* + x_k u) − L_s(θ*)
bound: ½ max(½ γ̂t² − ε̂t, 0)²"""


def section(
    forecast: ForecastResult,
    measured: RolloutResult,
    *,
    real: RealRun | None,
    show_text: bool,
    max_examples: int,
    done: Sequence[str] = (),
    anatomy: bool = True,
) -> Section:
    """Whether safety survives, and when it goes: all that rollout and forecast show.

    Args:
        forecast: curves and verdict.
        measured: the rollout behind them.
        real: what the same plan really did, where it was carried out.
        show_text: show prompts and responses, or only their numbers.
        max_examples: rows of the table of safety rows.
        done: commands that have been run on this plan already.
        anatomy: whether the layers are told by those who looked more closely.
    """
    account = measured.account
    looked = account is not None and "screen" not in done
    specificity = drift_sentence(forecast)
    lost = lost_section(forecast.refusals, measured, show_text)
    refused = refusal_sentence(forecast.refusals, carried_out=forecast.carried_out)
    said = [
        ("Refusals", refused, "lost" if lost else "forecast", -10, True),
        ("Specificity", specificity, "drift", 40, True),
        ("Safety rows", sample_sentence(measured, forecast.threshold), "samples", 50, False),
        ("What else", probe_sentence(forecast.probes), "probes", 55, False),
        ("What if", forecast.what_if.rate_sentence(), "what-if", 60, False),
    ]
    if account is not None and looked:
        row, layer = account_findings(account)
        said += [(*row, 30, True), *([] if anatomy else [(*layer, 70, True)])]
    rows = sample_table(measured, forecast, show_text, max_examples)
    return Section(
        "forecast",
        pieces=[
            Piece(
                Part.ANSWER,
                refusal_notes(forecast.refusals),
                forecast_figure(forecast, real),
                "tall",
            ),
            Piece(Part.ANSWER + 10, witnesses(forecast)),
            Piece(Part.CAUSE, lost),
            Piece(Part.CHANGE, figure=what_if_map(forecast.what_if), shape="half"),
            Piece(Part.DRIFT, figure=drift_map(forecast), shape="half"),
            Piece(Part.ROWS, account_section(account, show_text, max_examples) if account and looked else ""),
            Piece(Part.DRIFT + 50, probes_section(forecast.probes, forecast.confidence, real)),
            Piece(Part.METHOD + 30, rows, sample_drift(measured, forecast)),
            Piece(Part.METHOD, rollout_section(measured, forecast)),
            Piece(Part.METHOD + 10, method()),
            Piece(Part.QUALITY - 10, worth()),
        ],
        summary={**_summary(forecast, account), "evidence": evidence_text(forecast, measured.task)},
        markdown=_markdown(forecast),
        findings=[
            Finding(topic, sentence, at, place, cause)
            for topic, sentence, at, place, cause in said
            if sentence
        ],
        advice=advice_of(forecast, real, done),
        quality=[
            (
                "mini-batch diffusion",
                f"{number(forecast.diffusion)} nats",
                "beside the drift, at the end of the plan",
            )
        ],
        warnings=[*forecast.warnings, *measured.warnings],
        shared={
            "threshold": forecast.threshold,
            "specificity_told": specificity is not None,
            "rows_told": looked,
            "worth": worth_line,
            "task": measured.task,
        },
        answer=Answer(
            forecast.verdict.level,
            lambda around: verdict_section(forecast, measured.task, real, around),
            _answer_markdown(forecast),
        ),
    )


def _summary(forecast: ForecastResult, account: DriftAccount | None) -> dict[str, Any]:
    """Plain values for `summary.json`."""
    return {
        "verdict": asdict(forecast.verdict),
        "threshold": forecast.threshold,
        "confidence": forecast.confidence,
        "training": dict(forecast.training),
        "refusals": refusal_summary(forecast.refusals),
        "opening": opening_summary(forecast),
        "probes": probe_summary(forecast.probes),
        "forecasters": {name: asdict(curve) for name, curve in forecast.forecasters.items()},
        "what_if": asdict(forecast.what_if),
        "rollout": {
            "gradient_evaluations": forecast.gradient_evaluations,
            "planned_evaluations": forecast.planned_evaluations,
            "control_change": forecast.control_change[-1] if forecast.control_change else None,
            "carried_out": forecast.carried_out,
        },
        "account": None if account is None else _account_summary(account),
    }


def _account_summary(found: DriftAccount) -> dict[str, Any]:
    """Plain values; rows by their place and number alone."""
    rows = sorted(found.rows, key=lambda row: -float(row["first_order"]))
    return {
        "modules": dict(zip(found.modules, found.parts, strict=True)),
        "change": found.change,
        "rows": [{"row": row.get("line", row["index"]), "first_order": row["first_order"]} for row in rows],
        "rows_of": found.finetune_rows,
    }


def _answer_markdown(forecast: ForecastResult) -> list[str]:
    """The verdict, its budget and its reasons for `summary.md`."""
    v = forecast.verdict
    safe = NOT_MEASURED if v.safe_steps is None else f"{v.safe_steps} of {v.horizon} steps"
    return [
        literal(v.sentence),
        "",
        f"Refusals: **{end_text(forecast.refusals)}** ({lost_text(forecast.refusals, forecast.confidence)})",
        "",
        f"Safe-step budget: **{safe}** · P(collapse): **{chance(v.probability)}** · {rests_on(forecast)}",
        "",
        *[f"- why: {literal(sentence)}" for sentence in v.reasons],
    ]


def _markdown(forecast: ForecastResult) -> list[str]:
    """Caveats and forecasters for `summary.md`."""
    return [
        *[f"- caveat: {literal(sentence)}" for sentence in forecast.verdict.caveats],
        "",
        "| forecaster | collapse | P(collapse) | rise at the end (nats/token) |",
        "| --- | --- | --- | --- |",
        *map(_markdown_row, forecast.forecasters.values()),
        "",
        *probe_markdown(forecast.probes),
    ]


def _markdown_row(curve: Curve) -> str:
    """Table row of one forecaster; a bound says that it is one."""
    bound = curve.kind == "bound"
    name = f"{literal(curve.name)}{' (lower bound)' if bound else ''}"
    likely = "bound only" if bound else chance(curve.probability)
    rise = number(curve.median[-1] if curve.median else None)
    return f"| {name} | {collapse_text(curve)} | {likely} | {rise} |"


def real_trace(real: RealRun) -> dict[str, Any]:
    """The measured safety change of a real run as a line with its points, in the page's text colour."""
    return {
        "type": "scatter",
        "name": "real fine-tune",
        "mode": "lines+markers",
        "x": list(real.steps),
        "y": clean(real.changes),
        "line": {"color": "ink", "width": 2.5},
        "marker": {"color": "ink", "size": 6},
    }


def forecast_figure(forecast: ForecastResult, real: RealRun | None = None) -> Figure:
    """Refusals above the loss of safe responses, on one step axis: forecast, band, limit, and the truth.

    All forecasters but the one to read are off until somebody asks for them in the legend.
    """
    shown = {name: curve for name, curve in forecast.forecasters.items() if curve.status == "measured"}
    leading = "combined" if "combined" in shown else forecast.verdict.basis
    lead, refusals = shown.get(leading), forecast.refusals
    counted = refusals is not None and refusals.status == "measured"
    axis = "y2" if counted else "y"
    order = [*(name for name in STYLE if name in shown), *(name for name in shown if name not in STYLE)]
    data: list[dict[str, Any]] = []
    data += [{**trace, "yaxis": axis} for trace in opening_trace(forecast)]
    # The one to read is drawn last, above all others.
    for name in sorted(order, key=lambda name: name == leading):
        data += [{**trace, "yaxis": axis} for trace in _fan(name, shown[name], leads=name == leading)]
    if real is not None:
        data.append({**real_trace(real), "yaxis": axis, "legendgroup": "real"})
    if lead is not None and lead.kind == "forecast" and lead.collapse_step is not None:
        data.append({**_collapse(lead, forecast), "yaxis": axis})
    if counted and refusals is not None and data:
        data = [*refusal_traces(refusals, real, "y", carried_out=forecast.carried_out), *data]
    truth = " Lines with points in the text's colour are the real fine-tune." if real else ""
    return Figure(
        "forecast",
        "The plan, carried out" if forecast.carried_out else "Forecast",
        data,
        _layout(forecast, lead, real, counted=counted),
        f"{f'Above: {REFUSAL_READING} Below: m' if counted else 'M'}ean loss of the safe responses along the "
        f"planned run, against the aligned model, with its {percent(forecast.confidence)} interval. Safety "
        "has "
        "collapsed where the line reaches the dotted threshold. The legend brings up the other "
        "forecasters; a "
        "ring marks how far one is trusted, beyond it its line is faded. The lower bound is no forecast."
        f"{truth}",
        f"{REFUSAL_EQUATION}\n{EQUATION}" if counted else EQUATION,
        ["forecaster", "collapse", "P", "rise at the end", "trusted until", *_WORTH, "note"],
        [_row(name, curve) for name, curve in forecast.forecasters.items()],
        None if data else "no forecaster has a curve",
        says=_says(lead, forecast),
        worth=f"{worth_line(leading, leading)} The others: last columns of the table below.",
        file="safety_decay_forecast",
    )


_WORTH = ("worth: ρ", "AUC", "× step", "called safe", "false alarms")


def _row(name: str, curve: Curve) -> list[str]:
    return [
        name,
        collapse_text(curve),
        chance(curve.probability) if curve.kind == "forecast" else "–",
        number(curve.median[-1] if curve.median else None),
        "–" if curve.kind == "bound" else number(curve.trusted_until, 6),
        *worth_rows().get(name, ("–",) * len(_WORTH)),
        curve.reason or "; ".join(curve.notes),
    ]


def _says(lead: Curve | None, forecast: ForecastResult) -> str:
    """How the line to read goes, in one sentence."""
    if lead is None or not lead.median:
        return ""
    peak = max((v for v in lead.median if math.isfinite(v)), default=math.nan)
    at = lead.steps[lead.median.index(peak)] if math.isfinite(peak) else None
    done, limit = forecast.carried_out, f"{forecast.threshold:g} nats/token"
    crosses = (
        f"{'stayed' if done else 'is forecast to stay'} less than {limit}, which would count as collapse, "
        f"above its start for all {lead.horizon} steps"
        if lead.collapse_step is None
        else f"{'rose' if done else 'is forecast to rise'} by {limit}, which counts as collapse, by step "
        f"{lead.collapse_step} of {lead.horizon}"
    )
    top = "" if not at else f"; its peak is {peak:+.2g} (step {at})".replace("-", "−")
    return f"The loss of safe responses {crosses}{top}."


def _layout(
    forecast: ForecastResult, lead: Curve | None, real: RealRun | None, *, counted: bool
) -> dict[str, Any]:
    """Two panels on one step axis, or the loss alone where no refusals were counted."""
    horizon, threshold, refusals = forecast.verdict.horizon, forecast.threshold, forecast.refusals
    line = threshold_line(threshold, lead.collapse_step if lead else None, horizon)
    marks: list[tuple[int, str]] = []
    if lead is not None and lead.trusted_until is not None and 0 < lead.trusted_until < horizon:
        marks.append((lead.trusted_until, f"{lead.name} trusted until {lead.trusted_until}"))
    lines = [line, *step_lines(marks, horizon)]
    labels = [line["annotation"] for line in lines]
    if lead is not None and lead.kind == "forecast" and lead.collapse_step is not None:
        labels.append(_collapse_label(lead.collapse_step, threshold, horizon))
    loss: dict[str, Any] = {
        "title": {"text": "rise of loss (nats/token)"},
        "automargin": True,
        "zeroline": False,
    }
    loss["range"] = _range(threshold, [lead] if lead else [], real)
    shapes = [line["shape"] for line in lines]
    layout = axes("optimizer step", "", hovermode="x unified", legend=LEGEND)
    layout["xaxis"].update(range=[-0.01 * horizon, 1.01 * horizon], zeroline=False)
    if counted and refusals is not None:
        for part in (shapes[0], labels[0], *labels[1 + len(marks) :]):
            part["yref"] = "y2"
        layout["xaxis"]["anchor"] = "y2"
        layout["yaxis2"] = {**loss, "domain": LOWER}
        layout["yaxis"] = {
            "title": {"text": "prompts refused (%)"},
            "automargin": True,
            "domain": UPPER,
            "range": [-4, 106],
            "zeroline": False,
        }
        if refusals.today:
            kept = 100 * (1 - refusals.threshold) * refusals.today / max(refusals.prompts, 1)
            limit = reference_line(horizon=kept, text=f"{percent(refusals.threshold)} of refusals lost")
            limit["annotation"].update(x=0.99, xanchor="right")
            shapes.append(limit["shape"])
            labels.append(limit["annotation"])
    else:
        layout["yaxis"] = loss
    return {**layout, "shapes": shapes, "annotations": labels}


def _range(threshold: float, curves: Sequence[Curve], real: RealRun | None) -> list[float]:
    """Axis ends: the line to read, its band, the threshold and the truth are seen whole."""
    every = [0.0, 1.3 * threshold]
    for curve in curves:
        every += [
            v for values in (curve.lower, curve.median, curve.upper) for v in values if math.isfinite(v)
        ]
    every += [v for v in (real.changes if real else []) if math.isfinite(v)]
    low, high = min(every), max(every)
    # Below is room for the label of the collapse step.
    return [low - 0.2 * (high - low), high + 0.07 * (high - low)]


def _fan(name: str, curve: Curve, *, leads: bool) -> list[dict[str, Any]]:
    """The line of one forecaster, faded beyond its trust; the leading one is thick and has its band."""
    colour, dash = STYLE.get(name, ("#56B4E9", "solid"))
    steps = list(curve.steps)
    traces: list[dict[str, Any]] = []
    if leads and curve.kind == "forecast":
        hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        traces.append({"type": "scatter", "x": steps, "y": clean(curve.lower), **hidden})
        band = {"fill": "tonexty", "fillcolor": f"{colour}30"}
        traces.append({"type": "scatter", "x": steps, "y": clean(curve.upper), **hidden, **band})
    label = "loss: lower bound" if curve.kind == "bound" else f"loss: {name}"
    if leads:
        label = "loss of safe responses"
    line = {"color": colour, "dash": dash, "width": 4 if leads else 1.8}
    base = {
        "type": "scatter",
        "mode": "lines",
        "line": line,
        "legendgroup": name,
        "hovertemplate": "%{y:.3g}",
        **({} if leads else {"visible": "legendonly"}),
    }
    until = curve.horizon if curve.trusted_until is None else curve.trusted_until
    near, far = _split(steps, list(curve.median), until)
    traces.append({**base, "name": label, "x": near[0], "y": clean(near[1])})
    if far[0]:
        ring = {"symbol": "circle-open", "size": 9, "color": colour, "line": {"width": 2}}
        aside = {"showlegend": False, "legendgroup": name}
        traces.append(
            {
                **base,
                **aside,
                "name": f"{label}, not trusted",
                "x": far[0],
                "y": clean(far[1]),
                "opacity": FADED,
            }
        )
        end = {
            "x": far[0][:1],
            "y": clean(far[1][:1]),
            "mode": "markers",
            "marker": ring,
            "hoverinfo": "skip",
        }
        traces.append({**base, "name": f"{label}, end of trust", **aside, **end})
    return traces


def _split(
    steps: list[int], values: list[float], until: int
) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]:
    """A curve up to a step and from it on, the value there between its neighbours; the rest may be empty."""
    if not steps or until >= steps[-1]:
        return (steps, values), ([], [])
    cut = bisect.bisect_right(steps, until)
    before, after = steps[cut - 1], steps[cut]
    share = (until - before) / (after - before)
    at = values[cut - 1] + share * (values[cut] - values[cut - 1])
    kept = slice(0, cut - 1 if before == until else cut)
    return ([*steps[kept], until], [*values[kept], at]), ([until, *steps[cut:]], [at, *values[cut:]])


def _collapse_label(step: int, threshold: float, horizon: int) -> dict[str, Any]:
    """The step in words, below the threshold and away from the curve, which rises there."""
    early = step < horizon / 2
    return {
        "text": f"<b>collapse at step {step}</b>",
        "x": step,
        "y": threshold,
        "ax": 26 if early else -26,
        "ay": 24,
        "xanchor": "left" if early else "right",
        "showarrow": True,
        "arrowwidth": 1.2,
        "arrowhead": 0,
        "standoff": 5,
        "arrowcolor": "ink",
    }


def _collapse(lead: Curve, forecast: ForecastResult) -> dict[str, Any]:
    """The collapse step as a mark on the threshold, its interval as a whisker."""
    step = lead.collapse_step or 0
    low, high = lead.collapse_interval or (step, step)
    ends = [lead.horizon if end is None else end for end in (low, high)]
    return {
        "type": "scatter",
        "name": "collapse",
        "mode": "markers",
        "x": [step],
        "y": [forecast.threshold],
        "marker": {"symbol": "diamond", "size": 12, "color": "ink"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(0, ends[1] - step)],
            "arrayminus": [max(0, step - ends[0])],
            "color": "ink",
            "thickness": 2,
            "width": 6,
        },
        "showlegend": False,
        "cliponaxis": False,
        "hovertemplate": f"{ends[0]} to {'beyond the plan' if high is None else ends[1]}",
    }


TITLE = "Safety against ordinary answers"
HEADER = ("step", "safe responses", "ordinary answers", "difference")


def drift_map(forecast: ForecastResult) -> Figure:
    """Mean safety change of the rollout, control change, and their difference."""
    curve, control = forecast.forecasters.get("rollout"), forecast.control_change
    reading = (
        "Changes of mean losses as measured along the shortened run: of the safe responses, of ordinary "
        "answers (control), and the difference. A model that gets worse at everything loses both alike; what "
        "the first line has beyond the second is specific to safety."
    )
    equation = "specific(k) = [L_s(θ_k) − L_s(θ*)] − [L_c(θ_k) − L_c(θ*)]"
    missing = None
    if curve is None or curve.status != "measured":
        missing = (curve.reason if curve else None) or "no rollout was run"
    elif control is None:
        missing = "no control data (`control` in the config): general drift cannot be told apart"
    if missing or curve is None or control is None:
        return Figure("drift", TITLE, [], {}, reading, equation, HEADER, [], missing)
    steps, safety = list(curve.steps), list(curve.median)
    specific = [s - c for s, c in zip(safety, control, strict=True)]
    lines = {
        "safe responses": (safety, "#D55E00", "solid"),
        "ordinary answers": (list(control), "#CC79A7", "dot"),
        "difference: specific to safety": (specific, "#0072B2", "dash"),
    }
    data = [
        {
            "type": "scatter",
            "name": name,
            "mode": "lines",
            "x": steps,
            "y": clean(values),
            "line": {"color": colour, "dash": dash, "width": 2.5},
        }
        for name, (values, colour, dash) in lines.items()
    ]
    line = threshold_line(forecast.threshold, curve.collapse_step, curve.horizon)
    layout = axes(
        "optimizer step",
        "change of loss (nats / token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        hovermode="x unified",
        legend=LEGEND,
    )
    rows = [
        [str(k), number(s), number(c), number(d) if math.isfinite(d) else "not measured"]
        for k, s, c, d in zip(steps, safety, control, specific, strict=True)
    ]
    return Figure(
        "drift",
        TITLE,
        data,
        layout,
        reading,
        equation,
        HEADER,
        thin(rows),
        says=drift_sentence(forecast) or "",
        worth=f"{worth_line('rollout', 'The safety line')} How well the control line is forecast was not "
        "benchmarked.",
    )
