"""Safety against control drift along the rollout: what part of the harm is specific to safety."""

from __future__ import annotations

import math

from arisk.forecast.record import ForecastResult
from arisk.report.figure import LEGEND, Figure, axes, clean, thin, threshold_line
from arisk.report.text import drift_sentence, number
from arisk.report.worth import worth_line

__all__ = ["drift_map"]

TITLE = "Safety against ordinary answers"
HEADER = ("step", "safety", "control", "specific to safety")


def drift_map(forecast: ForecastResult) -> Figure:
    """Mean safety change of the rollout, control change, and their difference."""
    curve, control = forecast.forecasters.get("rollout"), forecast.control_change
    reading = (
        "Changes of mean losses along the virtual run: refusals (safety), ordinary answers (control), and "
        "the difference. A model that gets worse at everything loses both alike; what the safety line has "
        "beyond the control line is specific to safety."
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
        "safety": (safety, "#D55E00", "solid"),
        "control": (list(control), "#CC79A7", "dot"),
        "specific to safety": (specific, "#0072B2", "dash"),
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
