"""Arms that need no penalty: a smaller learning rate or fewer steps, and replay of rows at risk.

* smaller: the plan at a share of its rate, or of its steps with the schedule stretched to them. The share
  is the largest that leaves half of the drift, read off the plain run by flow time, as `arisk what-if` does.
* drift_replay: replay of those safety rows whose loss rises most, along the forecast of the plain run or
  under its first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, ShapeError
from arisk.base.task import RowBatches, SampleSet
from arisk.config.plan import TrainingConfig
from arisk.config.sections import GuardSettings
from arisk.gradients import ParameterLayout, batch_size, evaluating
from arisk.guard.in_loop import trained_layout
from arisk.guard.plan import ArmName, ArmPlan, Method, Protection, by_strength, replayed
from arisk.models.loaders import keeping_random_state
from arisk.training.loop import follow, keeping_parameters
from arisk.training.panels import panel_of, read_between
from arisk.training.recipe import Recipe, recipe_of

__all__ = [
    "DRIFT_REPLAY",
    "SMALLER",
    "loss_rises",
    "rises_under_first_steps",
    "rows_at_risk",
    "share_left",
    "smaller_share",
]

#: Shares of the plan that are tried, largest first, and the drift that may be left of the plain run's.
SHARES, LEFT = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15, 0.1), 0.5


def _arms(config: GuardSettings) -> list[ArmName]:
    kinds = dict.fromkeys(config.smaller.kinds)
    return [ArmName(f"smaller {kind}", "smaller", config.smaller.share, kind) for kind in kinds]


def _recipe(recipe: Recipe, kind: str, share: float) -> Recipe:
    """The plan at this share of its rate, or of its steps."""
    training = recipe.training
    if kind == "steps":
        return recipe_of(training, max(1, round(share * recipe.horizon)))
    slower = training.model_copy(update={"learning_rate": share * training.learning_rate})
    return recipe_of(slower, recipe.horizon)


def share_left(plan: ArmPlan, kind: str) -> float:
    """The largest share of rate or steps at which the plain run's curve says that half its drift is left.

    ΔL of the other run at its end is read off the plain run where that has the same flow time, see
    `arisk.forecast.what_if`. Where the plain run is not known, or does not drift, it is 1/2; where no share
    will do, the smallest that was tried.
    """
    curve = [] if plan.plain is None else list(zip(plan.plain.steps, plan.plain.safety, strict=True))
    return _share_left(curve, plan.recipe, kind, plan.last)


def smaller_share(
    history: Sequence[tuple[int, float]],
    training: TrainingConfig,
    steps: int,
    kind: Literal["rate", "steps"] = "rate",
) -> float:
    """The largest share of rate or steps at which half of a plain run's drift is left, see `share_left`.

    Args:
        history: (step, rise of the safety loss in nats) of the plain run, ascending, such as `history` of
            `arisk.models.trainer.drift_watch`, up to its last step.
        training: how that run trains, its schedule with it; `Trainer` decays linearly unless told otherwise.
        steps: its optimizer steps.
        kind: whether the learning rate or the steps become fewer.

    Returns:
        One of 0.8 … 0.1; 1/2 where the run does not drift.

    Raises:
        ConfigError: the history does not reach the last step, as of a run that was stopped, or goes past it.
    """
    end = history[-1][0] if history else 0
    if end != steps:
        raise ConfigError(
            f"the history ends at step {end}, and the run has {steps} optimizer steps",
            where="smaller_share(history, …, steps)",
            fix="watch a plain run to its end, without a threshold, and give its own number of steps",
        )
    return _share_left([(0, 0.0), *history], recipe_of(training, steps), kind, steps)


def _share_left(curve: Sequence[tuple[int, float]], recipe: Recipe, kind: str, last: int) -> float:
    if not curve or not curve[-1][1] > 0:
        return LEFT
    times = recipe.times[torch.tensor([step for step, _ in curve])]
    values = torch.tensor([drift for _, drift in curve], dtype=torch.float64)
    for share in SHARES:
        other = _recipe(recipe, kind, share)
        end = other.times[[min(last, other.horizon)]]
        if float(read_between(times, values, end)) <= LEFT * float(values[-1]):
            return share
    return SHARES[-1]


def _smaller_plan(plan: ArmPlan, arm: ArmName) -> ArmPlan:
    recipe = _recipe(plan.recipe, arm.kind, arm.strength or share_left(plan, arm.kind))
    return replace(plan, recipe=recipe, last=min(plan.last, recipe.horizon))


def _smaller(plan: ArmPlan, arm: ArmName) -> Protection:
    """Nothing is added: the plan itself is another."""
    value = plan.recipe.horizon if arm.kind == "steps" else plan.recipe.peak
    told = f"{value} steps" if arm.kind == "steps" else f"Learning rate {value:.3g}"
    return Protection(
        None, {arm.kind: float(value)}, f"{told} in place of the plan's; nothing else is guarded."
    )


def rises_under_first_steps(plan: ArmPlan, steps: int) -> Tensor:
    """(N,) rise of every safety row's loss under so many plain steps (nats); the parameters are put back.

    Raises:
        NumericsError: the run diverges.
    """
    model, run = plan.task.model, plan.fresh()
    train = lambda: follow(run, 1, min(steps, plan.last), [])  # noqa: E731
    return _rises(model, plan.layout, plan.task.safety, train, run.reading)


def loss_rises(model: nn.Module, samples: SampleSet, train: Callable[[], object]) -> Tensor:
    """(N,) rise of every row's loss while the model trains (nats); then parameters and buffers are put back.

    Args:
        model: the model before it trains.
        samples: N safety rows.
        train: takes a few steps of the plain run, such as `Trainer(…).train` with a small `max_steps`.

    Raises:
        ConfigError: no parameter trains.
    """

    @contextmanager
    def reading() -> Generator[None]:
        with evaluating(model), torch.no_grad():
            yield

    with keeping_random_state():
        return _rises(model, trained_layout(model), samples, train, reading)


def _rises(
    model: nn.Module,
    layout: ParameterLayout,
    samples: SampleSet,
    train: Callable[[], object],
    reading: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    panel = panel_of(samples, None, next(model.parameters()).device)
    with keeping_parameters(model, layout):
        with reading():
            before = panel.losses(model)
        train()
        with reading():
            return panel.losses(model) - before


def rows_at_risk(samples: SampleSet, rises: Tensor, share: float = 0.25, rows: int = 8) -> SampleSet:
    """The rows whose loss rises most, in minibatches; whole batches where rows cannot be regrouped.

    Args:
        samples: N rows.
        rises: (N,) rise of each row's loss (nats), such as of `loss_rises`; a row whose rise is not finite
            comes last, and a batch counts by its other rows.
        share: share of the rows that is kept, one at least.
        rows: rows of a minibatch.

    Raises:
        ShapeError: there are more or fewer rises than rows.
    """
    rises = rises.double().where(rises.isfinite(), math.nan)
    batches: Any = samples.batches
    if isinstance(batches, RowBatches):
        _require_length(rises, batches.row_count)
        rises = rises.nan_to_num(-math.inf)
        count = max(1, math.ceil(share * len(rises)))
        chosen = sorted(torch.argsort(rises, descending=True, stable=True)[:count].tolist())
        kept = [batches.of(chosen[i : i + rows]) for i in range(0, count, rows)]
        own = [samples.rows[i] for i in chosen] if samples.rows else []
        return SampleSet(samples.name, kept, samples.loss_fn, own)
    listed = list(batches)
    sizes = [batch_size(batch) for batch in listed]
    _require_length(rises, sum(sizes))
    means = [float(part.nanmean().nan_to_num(-math.inf)) for part in rises.split(sizes)]
    order = sorted(range(len(listed)), key=lambda i: -means[i])[: max(1, math.ceil(share * len(listed)))]
    return SampleSet(samples.name, [listed[i] for i in sorted(order)], samples.loss_fn)


def _require_length(rises: Tensor, rows: int) -> None:
    if rises.shape != (rows,):
        raise ShapeError(
            f"rises have the shape {tuple(rises.shape)}, and there are {rows} rows",
            where="rows_at_risk(samples, rises)",
            fix="give one rise for each row, in their order, as `loss_rises` of the same rows does",
        )


def _drift_replay(plan: ArmPlan, arm: ArmName) -> Protection:
    settings, safety = plan.config.drift_replay, plan.task.safety
    rises = plan.rises
    told = "along the plain forecast"
    if rises is None:
        rises, told = (
            rises_under_first_steps(plan, plan.config.calibration_steps),
            "under the first plain steps",
        )
    chosen = rows_at_risk(safety, rises, settings.share, settings.rows)
    count = sum(batch_size(batch) for batch in chosen.batches)
    note = f"Trains on the {count} of {len(rises)} safety rows whose loss rises most {told}."
    return replayed(plan, chosen, arm.strength or 0.0, settings.rows, note)


SMALLER = Method(_arms, _smaller, planned=_smaller_plan)
DRIFT_REPLAY = Method(
    by_strength("drift_replay"),
    _drift_replay,
    rows=lambda _, config: config.drift_replay.rows,
    calibrated=lambda _: True,
)
