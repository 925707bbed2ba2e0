"""Figures as plotly specifications, each with its reading line, equation and table alternative."""

from __future__ import annotations

import math
from typing import Any

from arisk.report.figure import Figure, axes, clean, reference_line, thin
from arisk.report.subspace_figures import module_map, overlap, spectrum
from arisk.report.text import collapse_text, number
from arisk.report.what_if_figure import what_if_map
from arisk.results import CollectResult, Curve, ForecastResult, ScoreResult, SubspaceResult

__all__ = ["all_figures"]

#: Colours that stay apart for the colour-blind (Okabe and Ito 2008), and dashes beside them.
STYLE = {
    "bound": ("#999999", "dot"),
    "local": ("#0072B2", "dash"),
    "ray": ("#D55E00", "solid"),
    "rollout": ("#009E73", "solid"),
    "pilot": ("#CC79A7", "dashdot"),
    "combined": ("#E69F00", "solid"),
}


def all_figures(
    collected: CollectResult, space: SubspaceResult, scored: ScoreResult, forecast: ForecastResult
) -> dict[str, Figure]:
    """Every figure by id, in the order of the page."""
    made = [
        forecast_fan(forecast),
        what_if_map(forecast.what_if),
        virtual_move(scored, forecast.threshold),
        spectrum(space),
        module_map(collected, space.module_traces, "fisher-map", "Where safety lives", "tr F by module"),
        module_map(
            collected,
            scored.module_second_order,
            "harm-map",
            "Where the first update does harm",
            "⟨F u, u⟩ by module",
        ),
        overlap(scored),
    ]
    return {figure.id: figure for figure in made}


def forecast_fan(forecast: ForecastResult) -> Figure:
    """Every forecaster's curve and interval, the threshold, and where it may be trusted."""
    data: list[dict[str, Any]] = []
    cap = max(4 * forecast.threshold, 1e-12)
    for name, curve in forecast.forecasters.items():
        if curve.status == "measured":
            data += _fan(name, curve)
    horizon = forecast.verdict.horizon
    lines = [
        reference_line(horizon=forecast.threshold, text=f"collapse threshold +{forecast.threshold:g}"),
        *[
            reference_line(step=curve.trusted_until, text=f"{name} trusted until {curve.trusted_until}")
            for name, curve in forecast.forecasters.items()
            if curve.trusted_until is not None and 0 < curve.trusted_until < horizon
        ],
    ]
    tops = [v for c in forecast.forecasters.values() for v in c.median if math.isfinite(v)]
    layout = axes(
        "optimizer step",
        "change of safety loss (nats / response token)",
        shapes=[line["shape"] for line in lines],
        annotations=[line["annotation"] for line in lines],
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.25},
    )
    lowest = min([0.0, *tops])
    layout["yaxis"]["range"] = [1.1 * lowest - 0.05 * cap, min(cap, max([forecast.threshold, *tops]) * 1.15)]
    rows = [
        [name, collapse_text(c), number(c.median[-1] if c.median else None), c.reason or "; ".join(c.notes)]
        for name, c in forecast.forecasters.items()
    ]
    return Figure(
        "forecast",
        "Forecast",
        data,
        layout,
        "Each line is one forecaster's safety loss along the planned run; the band is its "
        f"{forecast.confidence:.0%} interval over safety samples and fine-tuning batches. Safety has "
        "collapsed where a line reaches the threshold. Left of its trust line the local model agrees with "
        "measured losses. The bound is a lower bound, not a forecast. The axis ends at four thresholds.",
        "local: ⟨ḡ_s, δ_k⟩ + ½ δ_kᵀF δ_k · ray: measured L_s(θ* + x_k u) − L_s(θ*) · "
        "bound: ½ max(½ γ̂t² − ε̂t, 0)²",
        ["forecaster", "collapse", "rise at the end", "note"],
        rows,
        None if data else "no forecaster has a curve",
    )


def _fan(name: str, curve: Curve) -> list[dict[str, Any]]:
    colour, dash = STYLE.get(name, ("#56B4E9", "solid"))
    steps = list(curve.steps)
    label = f"{name} (lower bound)" if curve.kind == "bound" else name
    traces: list[dict[str, Any]] = []
    if curve.kind == "forecast":
        hidden = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        traces.append({"type": "scatter", "x": steps, "y": clean(curve.lower), **hidden})
        band = {"fill": "tonexty", "fillcolor": f"{colour}2e"}
        traces.append({"type": "scatter", "x": steps, "y": clean(curve.upper), **hidden, **band})
    line = {"color": colour, "dash": dash, "width": 2.5}
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
        "quadratic model of safety": ((c + 0.5 * c**2).mean(0).tolist(), "#0072B2", "dash"),
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
        legend={"orientation": "h", "y": -0.25},
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
            number(curves["quadratic model of safety"][0][i]),
            "not measured" if control is None else number(float(control[i])),
            number(curves["fine-tuning"][0][i]),
        ]
        for i in range(len(times))
    ]
    return Figure("move", title, data, layout, reading, equation, header, thin(rows))
