"""The witnesses of a verdict side by side: refusals, mean loss, first tokens' loss, ordinary answers."""

from __future__ import annotations

import math
from typing import Any

from arisk.forecast.record import Curve, ForecastResult
from arisk.report.figure import clean
from arisk.report.section import folded, table
from arisk.report.text import NOT_MEASURED, number, percent

__all__ = ["opening_name", "opening_summary", "opening_trace", "witnesses"]

HEADER = ("witness", "at the end of the plan", "limit", "reaches it", "decides")
NOTE = (
    "Losses are changes against the aligned model in nats per token. The first tokens' loss comes from the "
    "same forward passes as the mean; its limit is a default that was not calibrated, so it decides no "
    "level. Where it disagrees with the mean, or the refusals with the loss, the verdict says so."
)


def opening_name(forecast: ForecastResult) -> str:
    """`first 5 tokens`; without the number where it is not known."""
    return f"first {forecast.opening_tokens} tokens" if forecast.opening_tokens else "first tokens"


def witnesses(forecast: ForecastResult) -> str:
    """A table of all witnesses, folded away; what was not measured says so."""
    rows = [
        _refusals(forecast),
        _loss("mean loss of the safe responses", _basis(forecast), forecast.threshold, forecast, "level"),
        _loss(
            f"loss of their {opening_name(forecast)}",
            forecast.opening,
            forecast.opening_threshold,
            forecast,
            "what is said",
        ),
        _ordinary_loss(forecast),
        _ordinary_refusals(forecast),
    ]
    body = f'{table(HEADER, rows)}<p class="note">{NOTE}</p>'
    return f'<div class="folds">{folded("The witnesses side by side", body)}</div>'


def _basis(forecast: ForecastResult) -> Curve | None:
    curve = forecast.forecasters.get(forecast.verdict.basis)
    return curve if curve is not None and curve.status == "measured" else None


def _refusals(forecast: ForecastResult) -> list[str]:
    said, name = forecast.refusals, "safety prompts refused"
    if said is None or said.status != "measured":
        return [name, NOT_MEASURED, "–", "–", "level"]
    end, fewest, most = said.at_end
    step = said.lost_steps.get(f"{said.threshold:g}")
    reached = "none is refused today" if not said.today else _step(step, said.horizon)
    told = f"{end} of {said.prompts} ({fewest} to {most}; {said.today} before)"
    return [name, told, f"{percent(said.threshold)} of them lost", reached, "level"]


def _loss(
    name: str, curve: Curve | None, limit: float | None, forecast: ForecastResult, decides: str
) -> list[str]:
    if curve is None or not curve.median or limit is None:
        return [name, NOT_MEASURED, "–", "–", decides]
    ends = [_signed(values[-1]) for values in (curve.median, curve.lower, curve.upper)]
    known = f"{ends[0]} ({ends[1]} to {ends[2]})"
    calibrated = "" if curve is not forecast.opening else ", not calibrated"
    return [name, known, f"+{limit:g}{calibrated}", _step(curve.collapse_step, curve.horizon), decides]


def _ordinary_loss(forecast: ForecastResult) -> list[str]:
    change = forecast.control_change
    return [
        "loss of ordinary answers",
        _signed(change[-1]) if change else NOT_MEASURED,
        "–",
        "–",
        "what is said",
    ]


def _ordinary_refusals(forecast: ForecastResult) -> list[str]:
    name, said = "ordinary prompts refused", forecast.refusals
    if said is None or not said.ordinary:
        return [name, NOT_MEASURED, "–", "–", "what is said"]
    first, last = said.ordinary[0], said.ordinary[-1]
    told = f"{last.refused} of {last.prompts} at step {last.step} ({first.refused} before)"
    return [name, told, "–", "–", "what is said"]


def _step(step: int | None, horizon: int) -> str:
    return f"not within {horizon} steps" if step is None else f"at step {step} of {horizon}"


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−") if math.isfinite(value) else number(value)


def opening_trace(forecast: ForecastResult) -> list[dict[str, Any]]:
    """The first tokens' loss as a line that the legend brings up; none where it was not measured."""
    curve = forecast.opening
    if curve is None or not curve.median:
        return []
    return [
        {
            "type": "scatter",
            "name": f"{opening_name(forecast)}, loss",
            "mode": "lines",
            "x": list(curve.steps),
            "y": clean(curve.median),
            "line": {"color": "#56B4E9", "dash": "dash", "width": 2},
            "visible": "legendonly",
        }
    ]


def opening_summary(forecast: ForecastResult) -> dict[str, Any] | None:
    """Plain values for `summary.json`; None where it was not measured."""
    curve = forecast.opening
    if curve is None or not curve.median:
        return None
    return {
        "tokens": forecast.opening_tokens,
        "threshold": forecast.opening_threshold,
        "calibrated": False,
        "at_end": curve.median[-1],
        "at_end_interval": [curve.lower[-1], curve.upper[-1]],
        "reached_step": curve.collapse_step,
        "horizon": curve.horizon,
        "steps": list(curve.steps),
        "median": list(curve.median),
        "lower": list(curve.lower),
        "upper": list(curve.upper),
    }
