"""Curves from values and draws: quantiles, collapse steps and probability, alike for every forecaster."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arisk.config.plan import ForecastConfig
from arisk.forecast.record import Curve
from arisk.geometry.local_model import interpolated_crossing

__all__ = ["CURVE_POINTS", "curve_of", "not_measured", "plain_values"]

#: Points of a curve that are kept, drawn and resampled.
CURVE_POINTS = 240


def not_measured(name: str, reason: str, horizon: int) -> Curve:
    """A forecaster that has no curve, with the reason."""
    return Curve(
        name=name,
        status="not_measured",
        reason=reason,
        kind="forecast",
        steps=[],
        median=[],
        lower=[],
        upper=[],
        collapse_step=None,
        collapse_interval=None,
        probability=None,
        horizon=horizon,
        trusted_until=None,
        notes=[],
    )


def curve_of(
    name: str,
    steps: Sequence[int],
    values: Tensor,
    draws: Tensor,
    config: ForecastConfig,
    *,
    collapse: int | None,
    horizon: int,
    trusted_until: int | None,
    notes: Sequence[str],
) -> Curve:
    """A measured curve with the quantiles of its draws.

    Args:
        name: the forecaster.
        steps: M optimizer steps from 0.
        values: (M,) its central curve (nats).
        draws: (K, M) what it could as well have been.
        config: threshold and confidence.
        collapse: step at which the central curve reaches the threshold.
        horizon: last step looked at.
        trusted_until: last step up to which it may be trusted.
        notes: how it was computed.
    """
    tail = (1 - config.confidence) / 2
    quantiles = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    lower, upper = torch.quantile(torch.nan_to_num(draws, nan=math.inf, posinf=1e300), quantiles, dim=0)
    crossings = [interpolated_crossing(list(steps), draw, config.collapse_threshold) for draw in draws]
    reached = sorted(math.inf if step is None else float(step) for step in crossings)
    ends = [reached[min(len(reached) - 1, int(q * len(reached)))] for q in (tail, 1 - tail)]
    return Curve(
        name=name,
        status="measured",
        reason=None,
        kind="forecast",
        steps=list(steps),
        median=plain_values(values),
        lower=plain_values(lower),
        upper=plain_values(upper),
        collapse_step=collapse,
        collapse_interval=[None if math.isinf(end) else int(end) for end in ends],
        probability=sum(step is not None for step in crossings) / len(crossings),
        horizon=horizon,
        trusted_until=trusted_until,
        notes=list(notes),
    )


def plain_values(values: Tensor) -> list[float]:
    """Plain floats; a diverged value stays infinite."""
    return [float(v) for v in torch.nan_to_num(values, nan=math.inf, posinf=math.inf, neginf=-math.inf)]
