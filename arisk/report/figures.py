"""Figures as plotly specifications, each with its reading line, equation and table alternative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arisk.report.text import collapse_text, layer_and_type, number
from arisk.results import CollectResult, Curve, ForecastResult, ScoreResult, SubspaceResult

__all__ = ["Figure", "all_figures"]

#: Rows of a table alternative; longer series are thinned.
TABLE_ROWS = 24
#: Colours that stay apart for the colour-blind (Okabe and Ito 2008), and dashes beside them.
STYLE = {
    "bound": ("#999999", "dot"),
    "local": ("#0072B2", "dash"),
    "ray": ("#D55E00", "solid"),
    "rollout": ("#009E73", "solid"),
    "pilot": ("#CC79A7", "dashdot"),
    "combined": ("#E69F00", "solid"),
}


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        id: fixed element id.
        title: heading.
        data, layout: plotly's two halves; None data for a figure that was not measured.
        reading: how to read it.
        equation: the formula behind it.
        header, rows: the same numbers as a table.
        missing: why there is nothing to show; None when there is.
    """

    id: str
    title: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    reading: str
    equation: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    missing: str | None = None


def all_figures(
    collected: CollectResult, space: SubspaceResult, scored: ScoreResult, forecast: ForecastResult
) -> dict[str, Figure]:
    """Every figure by id, in the order of the page."""
    made = [
        forecast_fan(forecast),
        what_if_map(forecast),
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


def _clean(values: Sequence[float | None]) -> list[float | None]:
    """JSON has no NaN or infinity; plotly leaves a gap at null."""
    return [v if v is not None and math.isfinite(v) else None for v in values]


def _thin(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    step = max(1, math.ceil(len(rows) / TABLE_ROWS))
    kept = list(rows[::step])
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]


def _axes(x: str, y: str, **extra: Any) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
        **extra,
    }


def forecast_fan(forecast: ForecastResult) -> Figure:
    """Every forecaster's curve and interval, the threshold, and where it may be trusted."""
    data: list[dict[str, Any]] = []
    cap = max(4 * forecast.threshold, 1e-12)
    for name, curve in forecast.forecasters.items():
        if curve.status == "measured":
            data += _fan(name, curve)
    horizon = forecast.verdict.horizon
    lines = [
        _line(horizon=forecast.threshold, text=f"collapse threshold +{forecast.threshold:g}"),
        *[
            _line(step=curve.trusted_until, text=f"{name} trusted until {curve.trusted_until}")
            for name, curve in forecast.forecasters.items()
            if curve.trusted_until is not None and 0 < curve.trusted_until < horizon
        ],
    ]
    tops = [v for c in forecast.forecasters.values() for v in c.median if math.isfinite(v)]
    layout = _axes(
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
        traces.append({"type": "scatter", "x": steps, "y": _clean(curve.lower), **hidden})
        band = {"fill": "tonexty", "fillcolor": f"{colour}2e"}
        traces.append({"type": "scatter", "x": steps, "y": _clean(curve.upper), **hidden, **band})
    line = {"color": colour, "dash": dash, "width": 2.5}
    traces.append(
        {
            "type": "scatter",
            "name": label,
            "mode": "lines",
            "x": steps,
            "y": _clean(curve.median),
            "line": line,
        }
    )
    return traces


def _line(*, horizon: float | None = None, step: int | None = None, text: str) -> dict[str, Any]:
    """A labelled reference line across the plot, horizontal or vertical."""
    style = {"type": "line", "line": {"color": "#8a8a8a", "width": 1.2, "dash": "dot"}}
    note = {"text": text, "showarrow": False, "font": {"size": 11}}
    if horizon is not None:
        shape = {**style, "xref": "paper", "x0": 0, "x1": 1, "y0": horizon, "y1": horizon}
        where = {"xref": "paper", "x": 0.01, "xanchor": "left", "y": horizon, "yanchor": "bottom"}
    else:
        shape = {**style, "yref": "paper", "y0": 0, "y1": 1, "x0": step, "x1": step}
        where = {"x": step, "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "top"}
    return {"shape": shape, "annotation": {**note, **where}}


def what_if_map(forecast: ForecastResult) -> Figure:
    """Safety loss at the end of other plans: learning rate × steps."""
    rate = float(forecast.training.get("learning_rate", 1.0))
    rates = [number(rate * factor) for factor in forecast.learning_rate_grid]
    steps = [str(step) for step in forecast.what_if_steps]
    top = 2 * forecast.threshold
    text = [
        [number(value, 2) if value is not None else "diverges" for value in row] for row in forecast.what_if
    ]
    heat = {
        "type": "heatmap",
        "x": steps,
        "y": rates,
        "z": [[top if v is None else v for v in row] for row in forecast.what_if],
        "text": text,
        "texttemplate": "%{text}",
        "zmin": 0,
        "zmax": top,
        "colorscale": [[0, "#f7fbff"], [0.5, "#fdae6b"], [1, "#a63603"]],
        "colorbar": {"title": {"text": "nats / token"}, "thickness": 12},
        "hovertemplate": "learning rate %{y}<br>%{x} steps<br>%{text} nats/token<extra></extra>",
    }
    data: list[dict[str, Any]] = [heat]
    planned = str(forecast.training.get("steps"))
    if planned in steps:
        plan = {"symbol": "square-open", "size": 26, "color": "#0072B2", "line": {"width": 3}}
        data.append(
            {
                "type": "scatter",
                "x": [planned],
                "y": [number(rate)],
                "mode": "markers",
                "marker": plan,
                "name": "the plan",
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    layout = _axes("optimizer steps", "peak learning rate")
    layout["xaxis"]["type"] = layout["yaxis"]["type"] = "category"
    return Figure(
        "what-if",
        "What if",
        data,
        layout,
        "Each cell is a whole run of that many steps at that learning rate, its schedule stretched to it; "
        "the number is the safety loss it ends with. The blue square is the plan. Values from the threshold "
        f"(+{forecast.threshold:g}) on mean collapse. Filled by the {forecast.what_if_basis} forecast.",
        "the forecaster of the verdict with η and T replaced",
        ["learning rate", *steps],
        [[r, *cells] for r, cells in zip(rates, text, strict=True)],
    )


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
            "y": _clean(values[1:]),
            "line": {"color": colour, "dash": dash},
        }
        for name, (values, colour, dash) in curves.items()
    ]
    line = _line(horizon=threshold, text=f"collapse threshold +{threshold:g}")
    layout = _axes(
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
    return Figure("move", title, data, layout, reading, equation, header, _thin(rows))


def spectrum(space: SubspaceResult) -> Figure:
    """Eigenvalues of the safety Fisher matrix, and the share of the trace they reach."""
    values = space.spectrum.tolist()
    shares = (torch.cumsum(space.spectrum, 0) / space.trace).tolist()
    index = list(range(1, len(values) + 1))
    data = [
        {
            "type": "bar",
            "name": "eigenvalue λ_j",
            "x": index,
            "y": values,
            "marker": {"color": ["#0072B2" if i <= space.rank else "#9fb8c8" for i in index]},
        },
        {
            "type": "scatter",
            "name": "cumulative share of tr F",
            "x": index,
            "y": shares,
            "yaxis": "y2",
            "mode": "lines",
            "line": {"color": "#D55E00", "width": 2},
        },
    ]
    layout = _axes(
        "direction j",
        "eigenvalue λ_j (nats² / θ²)",
        yaxis2={
            "title": {"text": "share of tr F"},
            "overlaying": "y",
            "side": "right",
            "range": [0, 1.02],
            "showgrid": False,
            "automargin": True,
        },
        legend={"orientation": "h", "y": -0.25},
    )
    layout["yaxis"]["type"] = "log"
    rows = [[str(i), number(v), number(s)] for i, v, s in zip(index, values, shares, strict=True)]
    return Figure(
        "spectrum",
        "Safety subspace",
        data,
        layout,
        f"Dark bars are the {space.rank} directions kept; they hold {space.explained:.0%} of the whole "
        f"trace (effective rank {space.effective_rank:.1f}). Few tall bars mean that safety hangs on few "
        "directions; a flat spectrum means that no small subspace protects it.",
        "F = GᵀG/N, K = GGᵀ = N U Λ Uᵀ; rank: smallest k with Σ_{j≤k} λ_j ≥ target · tr F",
        ["direction", "eigenvalue", "cumulative share"],
        _thin(rows),
    )


def module_map(
    collected: CollectResult, values: torch.Tensor, figure_id: str, title: str, quantity: str
) -> Figure:
    """A quantity by module: layers × module types where names tell layers, else bars."""
    named = [
        (*layer_and_type(m), m, float(v)) for m, v in zip(collected.modules, values.tolist(), strict=True)
    ]
    layered = [entry for entry in named if entry[0] is not None]
    reading = (
        f"{quantity.capitalize()}; darker is more. Rows of the map are layers, columns are kinds of "
        "modules; modules outside the layers are in the table."
    )
    rows = [[m, number(v)] for _, _, m, v in sorted(named, key=lambda e: -abs(e[3]))]
    if len({entry[0] for entry in layered}) >= 2:
        data, layout = _heat(layered, quantity)
    else:
        top = sorted(named, key=lambda e: -abs(e[3]))[:30][::-1]
        data = [
            {"type": "bar", "orientation": "h", "x": _clean([e[3] for e in top]), "y": [e[2] for e in top]}
        ]
        layout = _axes(quantity, "")
    return Figure(
        figure_id,
        title,
        data,
        layout,
        reading,
        "tr F^(l) = (1/N) Σ_i ‖G_i^(l)‖²; harm ⟨F u, u⟩ = Σ_l ⟨(F u)^(l), u^(l)⟩",
        ["module", quantity],
        rows[: 2 * TABLE_ROWS],
    )


def _heat(
    layered: Sequence[tuple[int | None, str, str, float]], quantity: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Heatmap of layers × module types; an absent module is a gap."""
    layers = sorted({entry[0] for entry in layered if entry[0] is not None})
    kinds = list(dict.fromkeys(entry[1] for entry in layered))
    cells: dict[tuple[int | None, str], float] = {(e[0], e[1]): e[3] for e in layered}
    heat = {
        "type": "heatmap",
        "x": kinds,
        "y": layers,
        "z": [_clean([cells.get((layer, kind)) for kind in kinds]) for layer in layers],
        "colorscale": [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]],
        "colorbar": {"title": {"text": quantity}, "thickness": 12},
        "hovertemplate": "layer %{y}<br>%{x}<br>%{z:.3g}<extra></extra>",
    }
    layout = _axes("module", "layer")
    layout["xaxis"]["type"] = "category"
    layout["xaxis"]["tickangle"] = -40
    return [heat], layout


def overlap(scored: ScoreResult) -> Figure:
    """The overlap of the first update with the safety subspace, beside every null it has."""
    o = scored.overlap
    bars = [
        ("this fine-tune", o.ratio, "#D55E00"),
        ("control data", o.control, "#CC79A7"),
        ("permuted update, largest", o.permuted_max, "#999999"),
        ("permuted update, mean", o.permuted_mean, "#bbbbbb"),
        ("random direction √(k/P)", o.random, "#bbbbbb"),
        ("this fine-tune in ΔW space", o.delta_w, "#E69F00"),
        ("random in ΔW space", o.delta_w_random, "#dddddd"),
    ]
    shown = [bar for bar in bars if bar[1] is not None and math.isfinite(bar[1])][::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [bar[1] for bar in shown],
            "y": [bar[0] for bar in shown],
            "marker": {"color": [bar[2] for bar in shown]},
            "hovertemplate": "%{y}: %{x:.3g}<extra></extra>",
        }
    ]
    return Figure(
        "overlap",
        "Overlap and its nulls",
        data,
        _axes("‖P u‖ / ‖u‖", ""),
        "Share of the first update that lies in the safety subspace. Alone it says nothing: compare it with "
        "ordinary data and with the same update shuffled inside each tensor. In the prototype benchmark "
        "overlap ranked real harm with ρ = .23 only.",
        "‖P u‖² = Σ_j (u_jᵀ G u)² / (N λ_j); p = (1 + #{permuted ≥ observed}) / (1 + permutations)",
        ["direction", "overlap"],
        [[label, number(value)] for label, value, _ in bars] + [["permutation p", number(o.p_value, 2)]],
    )
