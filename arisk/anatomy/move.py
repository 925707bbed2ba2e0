"""Losses measured along a straight virtual move: where local theory ends."""

from __future__ import annotations

import math

from arisk.anatomy.record import ScoreResult
from arisk.report.figure import LEGEND, Figure, axes, clean, reference_line, thin
from arisk.report.text import number
from arisk.report.worth import worth_line

__all__ = ["virtual_move"]


def virtual_move(scored: ScoreResult, threshold: float) -> Figure:
    """Measured losses of safety, control and fine-tuning data along the first update direction."""
    title, reading = (
        "Measured along the first update direction",
        "The model was moved along the planned optimizer's first direction and put back; the losses are "
        "measured. The quadratic model is what local theory predicts for the same move: where it leaves the "
        "measured safety line, theory ends.",
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
    layout["xaxis"].update(type="log", dtick=1, exponentformat="power")
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
    return Figure(
        "move",
        title,
        data,
        layout,
        reading,
        equation,
        header,
        thin(rows),
        says=_says(times, curves["safety"][0], threshold),
        worth=worth_line("ray"),
    )


def _says(times: list[float], safety: list[float], threshold: float) -> str:
    """Where along the move safety goes."""
    first = next((t for t, value in zip(times, safety, strict=True) if value >= threshold), None)
    if first is None:
        return f"Along this one direction safety does not lose {threshold:g} nats/token as far as measured."
    return f"Along this one direction safety has lost {threshold:g} nats/token by flow time {number(first)}."
