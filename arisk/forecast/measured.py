"""Forecasters that read the rollout: `rollout`, `pilot` and `combined`.

* `rollout`: the measured mean safety loss along the virtual run.
* `pilot`: the first real steps only, outputs extrapolated as z₀ + (z_k − z₀)(τ/τ_k)^p with p fitted
  on the pilot, τ the flow time.
* `combined`: the rollout, pulled towards the pilot where that still says something: a weighted
  mean of the two in log space whose weight of the pilot falls as τ_k/τ.

Intervals: the safety samples are drawn anew, with what those that were left out at a point could have said,
and what the virtual run is known to get wrong is drawn
with it: a stretch of the time after the pilot and a factor on the change, both log-normal, and a
small shift that other prompts would show; centre and widths were chosen on the tuning half of the
validity benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.config.plan import ForecastConfig
from arisk.forecast.forecasters import CURVE_POINTS, curve_of, not_measured, plain_values
from arisk.forecast.record import Curve, RolloutResult
from arisk.geometry.dynamics import bootstrap_means, interpolated_crossing, recorded_steps
from arisk.training.panels import read_between
from arisk.training.recipe import Recipe

__all__ = ["combined_curve", "control_change", "pilot_curve", "rollout_curve"]

#: Standard deviations of log time and log change, and the centre of the latter, by forecaster: the
#: pilot's extrapolation comes out far too high (validity benchmark, tuning half).
TIME_SPREAD = {"rollout": 0.2, "combined": 0.2, "pilot": 0.25}
CHANGE_SPREAD = {"rollout": 0.45, "combined": 0.4, "pilot": 2.2}
CHANGE_CENTRE = {"rollout": 0.0, "combined": 0.0, "pilot": -1.0}
#: Standard deviation of the shift (nats).
SHIFT = 0.004
#: Share of the pilot in the combination just after the pilot's end.
PILOT_WEIGHT = 0.3
#: The pilot is trusted up to this many times its length: on harmless data it overshoots by then.
PILOT_TRUST = 2
#: Changes below this count as this in log space (nats).
LOG_FLOOR = 1e-3
#: Stands for a change that is not finite (nats).
HUGE = 1e6
#: Exponents tried for the growth of the outputs.
EXPONENTS = tuple(0.5 + 0.1 * i for i in range(21))


@dataclass(frozen=True)
class _Path:
    """Mean safety change at `steps` of every draw; row 0 is the mean over all samples."""

    steps: Tensor
    values: Tensor
    pilot: int


def rollout_curve(measured: RolloutResult, plan: Recipe, config: ForecastConfig, seed: int) -> Curve:
    """The measured safety loss along the virtual run."""
    if measured.status != "measured":
        return not_measured("rollout", measured.reason or "not run", plan.horizon)
    return _finished("rollout", _rollout_path(measured, config, seed), config, seed, measured)


def pilot_curve(measured: RolloutResult, plan: Recipe, config: ForecastConfig, seed: int) -> Curve:
    """The first real steps, extrapolated through the model's outputs."""
    if measured.status != "measured":
        return not_measured("pilot", measured.reason or "not run", plan.horizon)
    path = _pilot_path(measured, config, seed)
    if path is None:
        why = "the loss does not show the model's outputs, or the run ended in its pilot"
        return not_measured("pilot", why, plan.horizon)
    return _finished("pilot", path, config, seed, measured)


def combined_curve(measured: RolloutResult, plan: Recipe, config: ForecastConfig, seed: int) -> Curve:
    """Rollout and pilot in log space; the rollout alone where there is no pilot to extrapolate."""
    if measured.status != "measured":
        return not_measured("combined", measured.reason or "not run", plan.horizon)
    path, pilot = _rollout_path(measured, config, seed), _pilot_path(measured, config, seed)
    notes: list[str] = []
    if pilot is None and not measured.carried_out:
        notes.append("No pilot to extrapolate: the combination is the rollout.")
    elif pilot is not None:
        mixed = _log_mean(path.values, pilot.values, _pilot_weights(measured, path.steps))
        path = _Path(path.steps, mixed, path.pilot)
    return _finished("combined", path, config, seed, measured, notes)


def control_change(measured: RolloutResult) -> list[float] | None:
    """Mean change of the control loss at the curves' steps; None without control data."""
    if measured.status != "measured" or measured.control is None:
        return None
    return plain_values(_between(measured.steps, measured.control.mean(0)[None], _kept(measured))[0])


def _kept(measured: RolloutResult) -> Tensor:
    """Steps of every curve."""
    return torch.tensor(recorded_steps(measured.horizon, CURVE_POINTS), dtype=torch.float64)


def _between(points: Sequence[int], values: Tensor, steps: Tensor) -> Tensor:
    """Values (K, M) at points to other steps (K, S), linear in the signed root of the change.

    Beyond the last point (a run that diverged) the value is infinite.
    """
    at = torch.tensor(points, dtype=torch.float64)
    if len(at) == 1:
        filled = values.expand(-1, len(steps)).clone()
    else:
        filled = read_between(at, values.sign() * values.abs().sqrt(), steps)
        filled = filled * filled.abs()
    filled[:, steps > at[-1]] = math.inf
    return filled


def _rollout_path(measured: RolloutResult, config: ForecastConfig, seed: int) -> _Path:
    """Measured changes, all samples first, then redrawn."""
    steps = _kept(measured)
    values = _between(measured.steps, _redrawn(measured.safety, config, seed), steps)
    if any(measured.safety_error):
        # What the rows that were left out at a point could have said: one draw for the whole curve.
        at, error = (torch.tensor(v, dtype=torch.float64) for v in (measured.steps, measured.safety_error))
        generator = torch.Generator().manual_seed(seed + 3)
        z = torch.randn(len(values) - 1, 1, dtype=torch.float64, generator=generator)
        values[1:] += z * read_between(at, error[None], steps)
    return _Path(steps, values, min(measured.pilot_steps, measured.steps[-1]))


def _pilot_path(measured: RolloutResult, config: ForecastConfig, seed: int) -> _Path | None:
    """Pilot measured, then extrapolated; None when there is nothing to extrapolate."""
    if measured.extrapolated is None or measured.pilot_steps not in measured.steps:
        return None
    last = measured.steps.index(measured.pilot_steps)
    steps = _kept(measured)
    ahead = _flow_at(measured, steps) / measured.flow_time[last]
    scales = torch.tensor(measured.scales, dtype=torch.float64)
    drawn = _redrawn(measured.extrapolated, config, seed)
    values = read_between(scales, _root(drawn), ahead ** _exponent(measured, last))
    values = values * values.abs()
    early = _between(
        measured.steps[: last + 1], _redrawn(measured.safety, config, seed)[:, : last + 1], steps
    )
    return _Path(steps, torch.where(steps <= measured.pilot_steps, early, values), measured.pilot_steps)


def _exponent(measured: RolloutResult, last: int) -> float:
    """Exponent p that makes the extrapolated losses agree with those measured inside the pilot."""
    assert measured.extrapolated is not None
    if last < 2:
        return 1.0
    scales = torch.tensor(measured.scales, dtype=torch.float64)
    mean = _root(measured.extrapolated.mean(0))
    seen = _root(measured.safety.mean(0)[1:last])
    share = torch.tensor(measured.flow_time[1:last], dtype=torch.float64) / measured.flow_time[last]

    def error(p: float) -> float:
        return float((read_between(scales, mean[None], share**p)[0] - seen).square().sum())

    return min(EXPONENTS, key=error)


def _root(values: Tensor) -> Tensor:
    return values.sign() * values.abs().sqrt()


def _redrawn(samples: Tensor, config: ForecastConfig, seed: int) -> Tensor:
    """(1 + draws, M): the mean over all samples, then over samples drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    finite = samples.nan_to_num(nan=HUGE, posinf=HUGE, neginf=-HUGE)
    return torch.cat([finite.mean(0)[None], bootstrap_means(finite, config.bootstrap_samples, generator)])


def _flow_at(measured: RolloutResult, steps: Tensor) -> Tensor:
    """Σ η up to each step, linear between the measured points."""
    at = torch.tensor(measured.steps, dtype=torch.float64)
    flow = torch.tensor(measured.flow_time, dtype=torch.float64)
    return read_between(at, flow[None], steps)[0]


def _pilot_weights(measured: RolloutResult, steps: Tensor) -> Tensor:
    """Weight of the pilot at every step, falling after its end."""
    end = measured.flow_time[measured.steps.index(measured.pilot_steps)]
    return PILOT_WEIGHT / (_flow_at(measured, steps) / end).clamp(min=1.0)


def _log_mean(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """A weighted mean through asinh: in log space for large changes, linear for small ones."""
    x, y = torch.asinh(a / LOG_FLOOR), torch.asinh(b.clamp(max=HUGE) / LOG_FLOOR)
    mixed = LOG_FLOOR * torch.sinh(x + (y - x) * weight)
    return torch.where(torch.isinf(a), a, mixed)


def _finished(
    name: str,
    path: _Path,
    config: ForecastConfig,
    seed: int,
    measured: RolloutResult,
    notes: Sequence[str] = (),
) -> Curve:
    """The curve with intervals from its draws."""
    steps = [int(step) for step in path.steps]
    diverged = measured.diverged_at is not None
    return curve_of(
        name,
        steps,
        path.values[0],
        _perturbed(name, path, config, seed),
        config,
        collapse=interpolated_crossing(steps, path.values[0], config.collapse_threshold),
        horizon=measured.horizon,
        trusted_until=_trusted_until(name, measured),
        notes=[*notes, *(measured.warnings if diverged else [])],
    )


def _trusted_until(name: str, measured: RolloutResult) -> int:
    """The last measured step; for the pilot a small multiple of its length."""
    end = measured.horizon if measured.diverged_at is None else measured.steps[-1]
    return min(end, PILOT_TRUST * measured.pilot_steps) if name == "pilot" else end


def _perturbed(name: str, path: _Path, config: ForecastConfig, seed: int) -> Tensor:
    """(draws, S): redrawn samples, stretched in time after the pilot and scaled."""
    generator = torch.Generator().manual_seed(seed + 1)
    z = torch.randn(3, config.bootstrap_samples, dtype=torch.float64, generator=generator)
    after = (path.steps - path.pilot).clamp(min=0)
    ripe = (after / max(path.pilot, 1) / 2).clamp(max=1)
    draws: list[Tensor] = []
    for row, stretch, factor, shift in zip(path.values[1:], *z, strict=True):
        wanted = path.steps.clamp(max=path.pilot) + after * torch.exp(TIME_SPREAD[name] * stretch)
        moved = read_between(path.steps, row.clamp(max=HUGE)[None], wanted)[0]
        scale = torch.exp((CHANGE_CENTRE[name] + CHANGE_SPREAD[name] * factor) * ripe)
        draws.append(moved * scale + SHIFT * shift * ripe)
    return torch.stack(draws)
