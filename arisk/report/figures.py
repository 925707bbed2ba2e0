"""Figures as plotly specifications, each with its reading line, equation and table alternative."""

from __future__ import annotations

import math
from typing import Any

from arisk.comparison import Comparison
from arisk.report.drift import drift_map
from arisk.report.figure import LEGEND, Figure, axes, clean, reference_line, step_lines, thin, threshold_line
from arisk.report.subspace_figures import module_map, overlap, spectrum
from arisk.report.text import collapse_text, number
from arisk.report.verified import measured_trace, truth_figure
from arisk.report.what_if_figure import what_if_map
from arisk.results import (
    CollectResult,
    Curve,
    ForecastResult,
    RolloutResult,
    ScoreResult,
    SubspaceResult,
)

__all__ = ["all_figures"]

#: Colours that stay apart for the colour-blind (after Okabe and Ito 2008), and dashes beside them.
STYLE = {
    "bound": ("#8a8a8a", "dot"),
    "local": ("#0072B2", "dash"),
    "ray": ("#B8860B", "longdash"),
    "pilot": ("#CC79A7", "dashdot"),
    "rollout": ("#009E73", "solid"),
    "combined": ("#D55E00", "solid"),
}


def all_figures(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    measured: RolloutResult,
    check: Comparison | None = None,
) -> dict[str, Figure]:
    """Every figure by id, in the order of the page; `truth` only where a real run was measured."""
    made = [
        forecast_fan(forecast, measured, check),
        *([truth_figure(check, forecast)] if check else []),
        what_if_map(forecast.what_if),
        drift_map(forecast),
        virtual_move(scored, forecast.threshold),
        spectrum(space),
        module_map(
            collected,
            space.module_traces,
            "fisher-map",
            "Where safety lives",
            "tr F by module",
            "nats² per unit of θ²",
        ),
        module_map(
            collected,
            scored.module_second_order,
            "harm-map",
            "Where the first update does harm",
            "⟨F u, u⟩ by module",
            "nats² per unit of flow time squared",
        ),
        overlap(scored),
    ]
    return {figure.id: figure for figure in made}


def forecast_fan(
    forecast: ForecastResult, measured: RolloutResult, check: Comparison | None = None
) -> Figure:
    """Every forecaster's curve, the interval of the one to read, threshold, trust horizons, and the truth."""
    data: list[dict[str, Any]] = []
    cap = max(4 * forecast.threshold, 1e-12)
    shown = {name: c for name, c in forecast.forecasters.items() if c.status == "measured"}
    leading = "combined" if "combined" in shown else forecast.verdict.basis
    order = [name for name in STYLE if name in shown]
    order += [name for name in shown if name not in STYLE]
    # The one to read is drawn last, above all others.
    for name in sorted(order, key=lambda name: name == leading):
        data += _fan(name, shown[name], leads=name == leading)
    if check is not None:
        data.append(measured_trace(check))
    horizon = forecast.verdict.horizon
    marks = [
        (curve.trusted_until, f"{name} trusted until {curve.trusted_until}")
        for name, curve in shown.items()
        if curve.trusted_until is not None and 0 < curve.trusted_until < horizon
    ]
    if measured.status == "measured" and 0 < measured.pilot_steps < horizon:
        marks.append((measured.pilot_steps, f"pilot ends at {measured.pilot_steps}"))
    lines = [
        threshold_line(
            forecast.threshold, shown[leading].collapse_step if leading in shown else None, horizon
        ),
        *step_lines(marks, horizon),
    ]
    tops = [v for c in shown.values() for v in c.median if math.isfinite(v)]
    tops += [v for v in (check.safety_curve if check else []) if math.isfinite(v)]
    layout = axes(
        "optimizer step",
        "change of safety loss (nats / response token)",
        shapes=[line["shape"] for line in lines],
        annotations=[line["annotation"] for line in lines],
        hovermode="x unified",
        legend=LEGEND,
    )
    lowest = min([0.0, *tops])
    layout["yaxis"]["range"] = [1.1 * lowest - 0.05 * cap, min(cap, max([forecast.threshold, *tops]) * 1.15)]
    rows = [
        [name, collapse_text(c), number(c.median[-1] if c.median else None), c.reason or "; ".join(c.notes)]
        for name, c in forecast.forecasters.items()
    ]
    truth = " The line with points is the real fine-tune." if check else ""
    return Figure(
        "forecast",
        "Forecast",
        data,
        layout,
        "Each line is one forecaster's safety loss along the planned run, in nats per response token over "
        f"optimizer steps. The thick line is the one to read; its band is its {forecast.confidence:.0%} "
        "interval over safety samples and what the method is known to get wrong. Safety has collapsed where "
        "a line reaches the threshold. Right of its trust line a thin line no longer agrees with measured "
        "losses or was not measured. The bound is a lower bound, not a forecast. The axis ends at four "
        "thresholds."
        f"{truth}",
        "rollout: measured L_s(θ_k) − L_s(θ*) along the virtual run · pilot: outputs extrapolated, "
        "z₀ + (z_k − z₀)(τ/τ_k)^p · combined: their mean in log space, the pilot's weight ∝ τ_pilot/τ · "
        "local: ⟨ḡ_s, δ_k⟩ + ½ δ_kᵀF δ_k · ray: measured L_s(θ* + x_k u) − L_s(θ*) · "
        "bound: ½ max(½ γ̂t² − ε̂t, 0)²",
        ["forecaster", "collapse", "rise at the end", "note"],
        rows,
        None if data else "no forecaster has a curve",
    )


def _fan(name: str, curve: Curve, *, leads: bool) -> list[dict[str, Any]]:
    """The line of one forecaster; the leading one is thick and has its band."""
    colour, dash = STYLE.get(name, ("#56B4E9", "solid"))
    steps = list(curve.steps)
    label = "lower bound" if curve.kind == "bound" else name
    traces: list[dict[str, Any]] = []
    if leads and curve.kind == "forecast":
        hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        traces.append({"type": "scatter", "x": steps, "y": clean(curve.lower), **hidden})
        band = {"fill": "tonexty", "fillcolor": f"{colour}30"}
        traces.append({"type": "scatter", "x": steps, "y": clean(curve.upper), **hidden, **band})
    line = {"color": colour, "dash": dash, "width": 4 if leads else 1.5}
    traces.append(
        {
            "type": "scatter",
            "name": label,
            "mode": "lines",
            "x": steps,
            "y": clean(curve.median),
            "line": line,
        }
    )
    return traces


def virtual_move(scored: ScoreResult, threshold: float) -> Figure:
    """Measured losses of safety, control and fine-tuning data along the first update direction."""
    title, reading = (
        "Measured along the first update direction",
        "The model was really moved along the planned optimizer's first direction (on a copy of the "
        "numbers; it is put back) and the losses were measured. A safety loss that rises with the control "
        "loss is general damage; one that rises alone is lost safety. The quadratic model is what local "
        "theory predicts for the same move: where it leaves the measured line, theory ends.",
    )
    equation = "L(θ* + t u) − L(θ*), with u = −D g and t in units of Σ η"
    header = ["flow time t", "safety", "quadratic model", "control", "fine-tuning"]
    if scored.probe_times is None or scored.probe_safety is None or scored.probe_finetune is None:
        return Figure("move", title, [], {}, reading, equation, header, [], "score.probe_points is 0")
    times = scored.probe_times.tolist()
    c = scored.c_update[:, None] * scored.probe_times[None]
    curves = {
        "safety": (scored.probe_safety.mean(0).tolist(), "#D55E00", "solid"),
        "quadratic model": ((c + 0.5 * c**2).mean(0).tolist(), "#0072B2", "dash"),
        "fine-tuning": (scored.probe_finetune.tolist(), "#009E73", "dashdot"),
    }
    control = scored.probe_control
    if control is not None:
        curves["control"] = (control.tolist(), "#CC79A7", "dot")
    data = [
        {
            "type": "scatter",
            "name": name,
            "mode": "lines+markers",
            "x": times[1:],
            "y": clean(values[1:]),
            "line": {"color": colour, "dash": dash},
        }
        for name, (values, colour, dash) in curves.items()
    ]
    line = reference_line(horizon=threshold, text=f"collapse threshold +{threshold:g}")
    layout = axes(
        "flow time t = Σ η (log)",
        "change of loss (nats / token)",
        shapes=[line["shape"]],
        annotations=[line["annotation"]],
        hovermode="x unified",
        legend=LEGEND,
    )
    layout["xaxis"]["type"] = "log"
    measured = [v for values, _, _ in curves.values() for v in values if math.isfinite(v)]
    low = min([0.0, *measured])
    high = max([threshold * 2, *[v for v in curves["safety"][0] if math.isfinite(v)]])
    layout["yaxis"]["range"] = [max(1.1 * low, -2 * high), 1.15 * high]
    rows = [
        [
            number(times[i]),
            number(curves["safety"][0][i]),
            number(curves["quadratic model"][0][i]),
            "not measured" if control is None else number(float(control[i])),
            number(curves["fine-tuning"][0][i]),
        ]
        for i in range(len(times))
    ]
    return Figure("move", title, data, layout, reading, equation, header, thin(rows))
