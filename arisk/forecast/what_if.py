"""What if: whole runs at other learning rates and lengths, from what was measured for the plan.

To first order in η, training follows a flow: a run with learning rates η'_k passes at step k the position
that the plan passes at the same flow time, so ΔL_s(k) = combined(τ'_k) with τ'_k = Σ_{i≤k} η'_i and the
`combined` curve read as a function of τ. AdamW follows its preconditioned flow in the same way; weight
decay and clipping are part of the path. Momentum lengthens every flow time alike but for its lag of the
first steps, which counts: τ' = Σ η'_i (1 − μ^i)/(1 − μ).

What this does not know:

* Flow times beyond the rollout. They are not measured, and nothing is extrapolated. Only where the
  local model is trusted that far, and does not contradict the rollout, it fills the cell.
* Batch noise, which grows with η, and the stability limit. A smaller rate wanders less than the plan, so
  its cells err on the safe side; a larger one wanders more, and its cells are rather too low: above
  `ROUGH_FACTOR` times the planned rate they are marked rough.
* Whether a smaller learning rate survives where the plan diverges: not measured.

Refusals are read in the same way: a run keeps them as far as it stays within the flow time at which the
lower end of the plan's own interval has lost the share that counts.

What is known of the loss comes from two sources, each with the flow time up to which it may be read: the
rollout's combined curve, and the quadratic local model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from arisk.anatomy.record import ScoreResult
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.forecasters import CURVE_POINTS, TRUST_FLOOR, TRUST_SHARE, trusted_time
from arisk.forecast.record import Curve, RefusalForecast, WhatIfCell, WhatIfGrid, WhatIfRow
from arisk.geometry.dynamics import (
    bootstrap_means,
    interpolated_crossing,
    krylov_path,
    local_change,
    quadratic_path,
    read_at_flow,
    recorded_steps,
)
from arisk.training.panels import read_between
from arisk.training.recipe import recipe_of

__all__ = [
    "Known",
    "Local",
    "Refusals",
    "Rolled",
    "curve_at_rate",
    "known",
    "local_run",
    "over_flow_time",
    "what_if",
]

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
        refusals: of the plan; None where no refusal was counted.
    """

    training: TrainingConfig
    horizon: int
    config: ForecastConfig
    seed: int
    rolled: Rolled | None
    local: Local | None
    refusals: Refusals | None = None


@dataclass(frozen=True)
class Refusals:
    """Refusals of the plan over flow time.

    Attributes:
        kept: flow time up to which the plan keeps them, interval included; lost: whether they go then.
        share: of today's refusals whose loss counts.
        curve: flow times (M,) and shares of the prompts refused there (3, M), median, lower and upper; None:
            only its limit is known.
        prompts, today: safety prompts, and those refused by the aligned model.
    """

    kept: float
    lost: bool
    share: float
    curve: tuple[Tensor, Tensor] | None = None
    prompts: int = 0
    today: int = 0


def known(
    scored: ScoreResult | None,
    curves: Mapping[str, Curve],
    *,
    config: ForecastConfig,
    training: TrainingConfig,
    steps: int,
    seed: int,
    refusals: RefusalForecast | None = None,
) -> Known:
    """Collect what runs at other learning rates and lengths can be read from.

    Args:
        scored: the local model and the probe that says how far to trust it; None where there is none.
        curves: the plan's forecasts; `combined` and `local` are used.
        config: threshold, confidence, draws.
        training: the planned recipe.
        steps: planned optimizer steps T.
        seed: seeds the draws of local cells.
        refusals: of the plan.
    """
    rolled = over_flow_time(curves["combined"], training, steps)
    local = None if scored is None else _local(scored, config, training)
    if rolled is not None and not _agree(curves, config.collapse_threshold):
        local = None
    return Known(training, steps, config, seed, rolled, local, _refusals(refusals, training, steps))


def _refusals(found: RefusalForecast | None, training: TrainingConfig, steps: int) -> Refusals | None:
    if found is None or found.status != "measured" or found.safe_steps is None:
        return None
    rate = training.learning_rate
    kept = float(_flow(training, rate, [found.safe_steps], steps)[0])
    # A virtual run that diverged was counted as far as it went.
    last = steps if found.trusted_until is None else found.trusted_until
    count = sum(step <= last for step in found.steps)
    shares = torch.tensor([found.median, found.lower, found.upper], dtype=torch.float64)
    times = _flow(training, rate, list(found.steps[:count]), steps)
    return Refusals(
        kept,
        found.safe_steps < steps,
        found.threshold,
        (times, shares[:, :count]),
        found.prompts,
        found.today,
    )


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


#: Multiples of the planned learning rate and of the planned steps in the default grid.
RATE_GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
STEP_GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
#: Multiple of the planned learning rate above which a cell is rough: batch noise, which the flow does
#: not carry, grows with the rate, and so does the risk of leaving the stable range.
ROUGH_FACTOR = 2.0
#: Longest run a step budget is looked for.
LONGEST = 10_000_000

BEYOND = "beyond the flow time that was measured"


def what_if(
    source: Known, *, rates: Sequence[float] | None = None, lengths: Sequence[int] | None = None
) -> WhatIfGrid:
    """The grid of learning rates × steps.

    Args:
        source: what is known.
        rates: peak learning rates; default multiples of the planned one.
        lengths: optimizer steps; default multiples of the planned number.
    """
    planned, steps = source.training.learning_rate, source.horizon
    rates = sorted(set(rates or [planned * factor for factor in RATE_GRID]))
    lengths = sorted(set(lengths or [max(1, round(steps * factor)) for factor in STEP_GRID]))
    return WhatIfGrid(
        planned_rate=planned,
        planned_steps=steps,
        threshold=source.config.collapse_threshold,
        alarm=source.config.alarm_fraction * source.config.collapse_threshold,
        steps=lengths,
        rows=[_row(source, rate, lengths) for rate in rates],
        notes=_notes(source),
        refusals_lost=None if source.refusals is None else source.refusals.share,
        prompts=0 if source.refusals is None else source.refusals.prompts,
        today=0 if source.refusals is None else source.refusals.today,
    )


def _row(source: Known, rate: float, lengths: Sequence[int]) -> WhatIfRow:
    cells = [_cell(source, rate, steps) for steps in lengths]
    safe, at_least = _budget(source, rate, cells)
    return WhatIfRow(
        learning_rate=rate,
        factor=rate / source.training.learning_rate,
        cells=cells,
        at_plan=_cell(source, rate, source.horizon),
        safe_steps=safe,
        at_least=at_least,
        rough=rate / source.training.learning_rate > ROUGH_FACTOR or any(cell.rough for cell in cells),
    )


def _cell(source: Known, rate: float, steps: int) -> WhatIfCell:
    """One run: its loss, and whether it keeps the refusals."""
    cell = replace(_loss(source, rate, steps), refusals_kept=_keeps(source, rate, steps))
    return replace(cell, **_refused(source, rate, steps)) if cell.state != "diverges" else cell


def _refused(source: Known, rate: float, steps: int) -> dict[str, float]:
    """Shares refused at the end of a run, read at its flow time; nothing where that was not counted."""
    if source.refusals is None or source.refusals.curve is None:
        return {}
    times, shares = source.refusals.curve
    end = float(_flow(source.training, rate, [steps], steps)[0])
    if end > float(times[-1]) * (1 + 1e-9):
        return {}
    found = read_between(times, shares, torch.tensor([end], dtype=torch.float64))[:, 0].tolist()
    return dict(zip(("refused", "refused_lower", "refused_upper"), found, strict=True))


def _keeps(source: Known, rate: float, steps: int) -> bool | None:
    """Whether a run ends before the flow time at which refusals go; None where nobody looked that far."""
    if source.refusals is None:
        return None
    end = float(_flow(source.training, rate, [steps], steps)[0])
    if end <= source.refusals.kept * (1 + 1e-9):
        return True
    return False if source.refusals.lost else None


def _loss(source: Known, rate: float, steps: int) -> WhatIfCell:
    """The loss of one run, by the rollout where it reaches, else by the local model where that is trusted."""
    factor, threshold = rate / source.training.learning_rate, source.config.collapse_threshold
    rough = factor > ROUGH_FACTOR
    note = f"{factor:.3g} times the planned learning rate: rather too low" if rough else ""
    why = "the rollout was not run, and the local model is not trusted here"
    rolled = source.rolled
    if rolled is not None:
        at, values = curve_at_rate(rolled, source.training, rate, steps)
        found = _judged(at, values, threshold)
        if rolled.diverged and factor >= 1 and bool(torch.isnan(values[0, -1])):
            step = found.collapse_step or at[int(torch.isnan(values[0]).to(torch.int64).argmax())]
            return WhatIfCell(steps, "diverges", "rollout", rough, collapse_step=step, note=note)
        if found.state != "not_measured":
            return _marked(found, "rollout", rough, note)
        why = "the planned run diverged here; a smaller learning rate may not" if rolled.diverged else BEYOND
    if source.local is not None:
        found = _judged(*local_run(source, source.local, rate, steps), threshold)
        if found.state != "not_measured":
            frozen = "" if source.local.plain else "the optimizer's preconditioner frozen at the start"
            return _marked(found, "local", rough or not source.local.plain, note or frozen)
    return WhatIfCell(steps, "not_measured", "none", note=why)


def _judged(steps: Sequence[int], values: Tensor, threshold: float) -> WhatIfCell:
    """What median, lower and upper (3, M) say; NaN from where they are not known."""
    unknown = torch.isnan(values[0])
    count = int(unknown.to(torch.int64).argmax()) if bool(unknown.any()) else len(steps)
    median, total = values[0, :count], steps[-1]
    if count < 2:
        return WhatIfCell(total, "not_measured", "none")
    collapse = interpolated_crossing(list(steps[:count]), median, threshold)
    if bool(torch.isinf(median).any()):
        return WhatIfCell(total, "diverges", "none", collapse_step=collapse)
    if count < len(steps):
        state = "not_measured" if collapse is None else "collapses"
        return WhatIfCell(total, state, "none", collapse_step=collapse)
    return WhatIfCell(
        total,
        "measured",
        "none",
        change=float(values[0, -1]),
        lower=float(values[1, -1]),
        upper=float(values[2, -1]),
        peak=float(values[0].max()),
        peak_upper=float(values[2].max()),
        collapse_step=collapse,
    )


def _marked(cell: WhatIfCell, basis: Literal["rollout", "local"], rough: bool, note: str) -> WhatIfCell:
    return replace(cell, basis=basis, rough=rough, note=note)


def _budget(source: Known, rate: float, cells: Sequence[WhatIfCell]) -> tuple[int | None, bool]:
    """Longest run that keeps refusals and threshold, and whether only the measurement ends it."""
    threshold = source.config.collapse_threshold

    def safe(steps: int) -> bool | None:
        return _cell(source, rate, steps).stays_below(threshold)

    low, high = 0, 0
    for cell in cells:
        if not cell.stays_below(threshold):
            high = cell.steps
            break
        low = cell.steps
    while not high:
        if low >= LONGEST:
            return low, True
        tried = max(1, 2 * low)
        low, high = (tried, 0) if safe(tried) else (low, tried)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if safe(middle) else (low, middle)
    at_least = safe(high) is None
    return (None if at_least and low == 0 else low), at_least


def _notes(source: Known) -> list[str]:
    """How the grid was filled, and how far."""
    notes: list[str] = []
    if source.rolled is None:
        notes.append("No rollout was measured: cells come from the local model, where it is trusted.")
    else:
        notes.append(
            "Cells read the combined rollout curve at their own flow time (sum of learning rates), "
            f"measured up to {float(source.rolled.times[-1]):.3g}."
        )
        if source.rolled.diverged:
            notes.append(
                "The planned run diverges there; so does every larger learning rate, while smaller ones are "
                "not measured beyond it."
            )
    if source.local is None:
        why = "was not probed" if source.rolled is None else "was not probed, or the rollout contradicts it"
        notes.append(f"The local model fills no cell: it {why}.")
    else:
        notes.append(f"The local model is trusted up to a flow time of {source.local.trusted:.3g}.")
    return notes
