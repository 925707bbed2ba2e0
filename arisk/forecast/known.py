"""What the plan's measurements say about other learning rates and lengths of the same training.

Two sources, each with the flow time up to which it may be read: the rollout's combined curve, and the
quadratic local model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.anatomy.record import ScoreResult
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.forecasters import CURVE_POINTS, TRUST_FLOOR, TRUST_SHARE, trusted_time
from arisk.forecast.record import Curve
from arisk.geometry.dynamics import (
    bootstrap_means,
    krylov_path,
    local_change,
    quadratic_path,
    read_at_flow,
    recorded_steps,
)
from arisk.training.recipe import recipe_of

__all__ = ["Known", "Local", "Rolled", "curve_at_rate", "known", "local_run", "over_flow_time"]

#: Steps (without momentum: groups of steps) of one run of the local model.
LOCAL_STEPS = 1200


@dataclass(frozen=True)
class Rolled:
    """The combined curve over flow time: times (M,), median, lower and upper (3, M), all finite."""

    times: Tensor
    values: Tensor
    diverged: bool


@dataclass(frozen=True)
class Local:
    """The quadratic model, and the flow time up to which it is trusted."""

    scored: ScoreResult
    trusted: float
    plain: bool


@dataclass(frozen=True)
class Known:
    """What the plan's measurements say about runs of the same data and optimizer.

    Attributes:
        training: the planned recipe. horizon: its steps T.
        config: threshold, confidence, draws. seed: seeds the draws of local cells.
        rolled: the rollout's combined curve; local: the local model; None where there is none.
    """

    training: TrainingConfig
    horizon: int
    config: ForecastConfig
    seed: int
    rolled: Rolled | None
    local: Local | None


def known(
    scored: ScoreResult,
    curves: Mapping[str, Curve],
    *,
    config: ForecastConfig,
    training: TrainingConfig,
    steps: int,
    seed: int,
) -> Known:
    """Collect what runs at other learning rates and lengths can be read from.

    Args:
        scored: the local model and the probe that says how far to trust it.
        curves: the plan's forecasts; `combined` and `local` are used.
        config: threshold, confidence, draws.
        training: the planned recipe.
        steps: planned optimizer steps T.
        seed: seeds the draws of local cells.
    """
    rolled = over_flow_time(curves["combined"], training, steps)
    local = _local(scored, config, training)
    if rolled is not None and not _agree(curves, config.collapse_threshold):
        local = None
    return Known(training, steps, config, seed, rolled, local)


def curve_at_rate(
    rolled: Rolled, training: TrainingConfig, rate: float, steps: int
) -> tuple[list[int], Tensor]:
    """The rollout's curve for another learning rate and length: combined(τ'_k), τ'_k its flow time.

    Args:
        rolled: the curve over flow time.
        training: the planned recipe.
        rate: peak learning rate.
        steps: optimizer steps, the schedule stretched to them.

    Returns:
        Recorded steps from 0, and (3, M) median, lower and upper (nats); NaN beyond the measured
        flow time.
    """
    at = recorded_steps(steps, CURVE_POINTS)
    return at, read_at_flow(rolled.times, rolled.values, _flow(training, rate, at, steps))


def _flow(training: TrainingConfig, rate: float, steps: Sequence[int], total: int) -> Tensor:
    """Flow times at steps of a run of `total` steps with this peak learning rate."""
    return recipe_of(training, total, scale=rate / training.learning_rate).times[torch.tensor(steps)]


def over_flow_time(curve: Curve, training: TrainingConfig, steps: int) -> Rolled | None:
    """A measured curve of the plan as a function of flow time; None where it was not measured.

    It ends where it was measured: from there on a run that diverged is infinite.
    """
    if curve.status != "measured":
        return None
    count = next((i for i, v in enumerate(curve.median) if not math.isfinite(v)), len(curve.median))
    times = _flow(training, training.learning_rate, curve.steps, steps)
    values = torch.tensor([curve.median, curve.lower, curve.upper], dtype=torch.float64)
    return Rolled(times[:count], values[:, :count], count < len(curve.median))


def _local(scored: ScoreResult, config: ForecastConfig, training: TrainingConfig) -> Local | None:
    trusted = trusted_time(scored, config.collapse_threshold)
    if trusted is None or scored.probe_times is None:
        return None
    plain = recipe_of(training, 1).plain
    # Beyond the probe nobody looked, even where the model fitted it all the way.
    return Local(scored, min(trusted, float(scored.probe_times[-1])), plain)


def _agree(curves: Mapping[str, Curve], threshold: float) -> bool:
    """Whether the local model's curve stays close to the rollout's over the whole plan."""
    local, rolled = curves["local"], curves["combined"]
    other = dict(zip(rolled.steps, rolled.median, strict=True))
    pairs = [(a, other[s]) for s, a in zip(local.steps, local.median, strict=True) if s in other]
    # A run that diverged is infinite, and no number is close to that.
    return all(
        math.isfinite(b) and abs(a - b) <= TRUST_SHARE * abs(b) + TRUST_FLOOR * threshold for a, b in pairs
    )


def local_run(source: Known, local: Local, rate: float, steps: int) -> tuple[list[int], Tensor]:
    """Steps, and median, lower, upper of the local model; NaN beyond its trust.

    The interval is over safety samples alone.
    """
    scored, training, config = local.scored, source.training, source.config
    ends = recorded_steps(steps, LOCAL_STEPS)
    flow = _flow(training, rate, ends, steps)
    kept = recorded_steps(len(ends) - 1, CURVE_POINTS)
    at = [ends[i] for i in kept]
    trusted = flow[kept] <= local.trusted
    path = _local_path(local, training, rate, steps, ends, flow)
    if path is None or int(trusted.sum()) < 2:
        return at, torch.full((3, len(at)), math.nan, dtype=torch.float64)
    changes = local_change(scored.c_krylov @ path[kept].T)
    generator = torch.Generator().manual_seed(source.seed)
    draws = bootstrap_means(changes, config.bootstrap_samples, generator)
    tail = (1 - config.confidence) / 2
    ends_of = torch.quantile(draws.nan_to_num(math.inf), torch.tensor([tail, 1 - tail], dtype=draws.dtype), 0)
    values = torch.cat([changes.mean(0)[None], ends_of]).nan_to_num(nan=math.inf, posinf=math.inf)
    values[:, ~trusted] = math.nan
    return at, values


def _local_path(
    local: Local, training: TrainingConfig, rate: float, steps: int, ends: Sequence[int], flow: Tensor
) -> Tensor | None:
    """Krylov coordinates (len(ends), J) at the ends of groups of steps; None where it cannot say."""
    recipe = recipe_of(training, steps, scale=rate / training.learning_rate)
    scored, momentum = local.scored, recipe.momentum
    counts = torch.diff(torch.tensor(ends, dtype=torch.float64))
    if momentum and len(ends) == steps + 1:
        return krylov_path(scored.krylov_t, scored.krylov_beta, recipe.rates, momentum=momentum)
    rates = torch.diff(flow) / counts
    stiffest = float(torch.linalg.eigvalsh(scored.krylov_t.to(torch.float64)).abs().max())
    if momentum and float(rates.max()) * stiffest > 1:
        # A heavy ball is stable further than its plain equivalent, which would say it diverges.
        return None
    return quadratic_path(scored.krylov_t, scored.krylov_beta, rates, counts)
