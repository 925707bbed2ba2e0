"""What else the fine-tune costs, at every step of the plan: a curve per probe, with a band.

Between measured points the values of the rows are read off straight lines. The band is of the change since
the start: rows are drawn anew, and what a virtual run is known to get wrong is drawn with them, a stretch of
the time after the pilot and a factor on the change of every row. Its widths are those of the safety loss, and
were not calibrated on probes. The luck of the rows at the start is not in it: start and end are of the same
rows. Beyond the last measured point there is no curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arisk.config.plan import ForecastConfig
from arisk.forecast.forecasters import CURVE_POINTS
from arisk.forecast.measured import CHANGE_SPREAD, TIME_SPREAD
from arisk.forecast.record import FEW, ProbeForecast, RolloutResult
from arisk.geometry.dynamics import recorded_steps
from arisk.training.panels import read_between
from arisk.training.probes import ProbeTrack, value_of

__all__ = ["probe_forecast", "probe_forecasts"]


def probe_forecasts(measured: RolloutResult, config: ForecastConfig, *, seed: int) -> list[ProbeForecast]:
    """Every probe of a rollout along the plan.

    Args:
        measured: the rollout.
        config: confidence and draws.
        seed: seeds the draws.
    """
    return [
        probe_forecast(track, config, horizon=measured.horizon, pilot=measured.pilot_steps, seed=seed)
        for track in measured.probes
    ]


def probe_forecast(
    track: ProbeTrack, config: ForecastConfig, *, horizon: int, pilot: int, seed: int
) -> ProbeForecast:
    """One probe along the plan.

    Args:
        track: what was measured of it.
        config: confidence and draws.
        horizon: planned optimizer steps T.
        pilot: real steps at the start of the virtual run; all of them where the plan was carried out.
        seed: seeds the draws.
    """
    known = _finite(track)
    last = track.steps[known - 1] if known else 0
    steps = [step for step in recorded_steps(horizon, CURVE_POINTS) if step <= last] if known else []
    values = track.tensor[:, :known]
    curve = lower = upper = torch.zeros(0, dtype=torch.float64)
    if steps:
        curve, draws = _curves(track, values, steps, config.bootstrap_samples, pilot, seed)
        tail = (1 - config.confidence) / 2
        ends = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        lower, upper = torch.minimum(ends[0], curve), torch.maximum(ends[1], curve)
    notes: list[str] = []
    if len(track.values) < FEW:
        notes.append(f"Only {len(track.values)} rows: few.")
    if last < horizon:
        notes.append(f"Not measured beyond step {last}: the virtual run diverged.")
    return ProbeForecast(
        name=track.name,
        measure=track.measure,
        rows=len(track.values),
        tokens=track.tokens,
        measured_steps=list(track.steps[:known]),
        measured=track.means[:known],
        steps=steps,
        median=curve.tolist(),
        lower=lower.tolist(),
        upper=upper.tolist(),
        horizon=horizon,
        notes=notes,
    )


def _finite(track: ProbeTrack) -> int:
    """How many of its points are numbers, from the first on."""
    fine = track.tensor.isfinite().all(0).tolist()
    return next((i for i, there in enumerate(fine) if not there), len(fine))


def _curves(
    track: ProbeTrack, values: Tensor, steps: Sequence[int], draws: int, pilot: int, seed: int
) -> tuple[Tensor, Tensor]:
    """What is told of the rows at the steps: (S,), and (draws, S) of what it could as well have been."""
    wanted = torch.tensor(steps, dtype=torch.float64)
    at = torch.tensor(track.steps[: values.shape[1]], dtype=torch.float64)
    curve = value_of(track.measure, read_between(at, values, wanted))
    generator = torch.Generator().manual_seed(seed + 4)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    noise = torch.randn(draws, 2, dtype=torch.float64, generator=generator)
    after = (wanted - pilot).clamp(min=0)
    ripe = (after / max(pilot, 1) / 2).clamp(max=1)
    found: list[Tensor] = []
    for rows, (stretch, factor) in zip(picks, noise.tolist(), strict=True):
        moved = wanted.clamp(max=pilot) + after * math.exp(TIME_SPREAD["rollout"] * stretch)
        start, here = values[rows, :1], read_between(at, values[rows], moved)
        changed = start + (here - start) * torch.exp(CHANGE_SPREAD["rollout"] * factor * ripe)
        found.append(value_of(track.measure, changed) - value_of(track.measure, start))
    band = curve[0] + torch.stack(found)
    return curve, band.clamp(0, 1) if track.measure == "choice" else band
