"""Arms forecast before they are trained: a rollout of each with the protection in it.

All rollouts measure the same rows. They are shorter than the one that a verdict rests on: here arms are only
ranked, so that the best can be trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from arisk.base.task import Task
from arisk.config.sections import RolloutConfig
from arisk.forecast.leap import rollout_cost
from arisk.forecast.rollout import rollout
from arisk.guard.methods import METHODS, protection
from arisk.guard.plan import ArmName, ArmPlan
from arisk.guard.record import NEVER_BEGUN, ArmForecast
from arisk.models.answers import GreedyAnswers
from arisk.training.behaviour import DECIDING, spread_rows
from arisk.training.loop import PlannedRun, keeping_parameters
from arisk.training.panels import Panel, panel_of, sample_losses
from arisk.verification.run import TaskRows

__all__ = ["FOLLOWED", "ROWS", "ForecastRows", "forecast_arm", "saves", "settings_of"]

#: Safety and control rows that an arm's forecast measures at most.
ROWS = 64
#: Rows that the rollout itself follows, to see where it diverges.
FOLLOWED = 8
#: Real steps of the pilot and at the end of a leap, leaps, and share of the run they may take.
PILOT_SHARE, LONGEST_PILOT, INNER, LEAPS = 0.1, 12, 3, 3
#: Share of the steps up to which a forecast saves time.
WORTH = 0.6


def settings_of(last: int) -> RolloutConfig:
    """The rollout of an arm that takes `last` steps."""
    pilot = max(INNER, min(LONGEST_PILOT, math.ceil(PILOT_SHARE * last)))
    return RolloutConfig(
        pilot_steps=pilot,
        segments=LEAPS,
        batches_per_segment=INNER,
        eval_samples=FOLLOWED,
        leading_samples=FOLLOWED,
    )


def saves(last: int, arms: int, best: int) -> bool:
    """Whether forecasting so many arms and training the best takes fewer steps than training them all."""
    gradients, _ = rollout_cost(last, settings_of(last))
    return arms > best and gradients <= WORTH * last and arms * gradients + best * last < arms * last


@dataclass(frozen=True)
class ForecastRows:
    """What every forecast measures at its end.

    Attributes:
        safety, control: rows; control None without.
        judged: rows of the task loss.
        own: safety rows that the protections may use, which are none of `safety` where rows are held out.
        prompts: rows of `writes` whose own openings are followed; empty where there are none.
        openings: what the aligned model says first to each.
        writes: follows them.
        start: mean safety loss of the aligned model; own_start: (N,) of each own row.
    """

    safety: Panel
    control: Panel | None
    judged: TaskRows
    own: Panel
    prompts: Sequence[int]
    openings: Sequence[Sequence[int]]
    writes: GreedyAnswers | None
    start: float
    control_start: float
    own_start: Tensor

    @classmethod
    def of(cls, plan: ArmPlan, judged: TaskRows) -> ForecastRows:
        """Choose them, at the aligned point."""
        task, model, device = plan.task, plan.task.model, plan.device
        samples = task.heldout or task.safety
        safety = panel_of(samples, ROWS, device)
        control = (
            panel_of(task.control, min(ROWS, plan.config.control_samples), device) if task.control else None
        )
        own = panel_of(task.safety, None, device)
        writes = samples.generate if isinstance(samples.generate, GreedyAnswers) else None
        prompts = (
            spread_rows(len(samples.rows), plan.config.generate) if writes and plan.config.generate else []
        )
        with plan.fresh().reading():
            return cls(
                safety,
                control,
                judged,
                own,
                prompts,
                [] if writes is None or not prompts else writes.tokens(model, prompts, DECIDING),
                writes,
                float(safety.losses(model).mean()),
                math.nan if control is None else float(control.losses(model).mean()),
                own.losses(model),
            )

    def kept(self, model: nn.Module) -> float:
        """Share of prompts whose deciding first tokens are still the likeliest; NaN without prompts."""
        if self.writes is None or not self.prompts:
            return math.nan
        kept = self.writes.followed(model, self.prompts, self.openings).kept
        whole = torch.tensor([min(DECIDING, len(opening)) for opening in self.openings])
        return float((kept >= whole).double().mean())


def forecast_arm(plan: ArmPlan, name: ArmName, rows: ForecastRows, *, rises: bool = False) -> ArmForecast:
    """What an arm would come to, by a rollout with its protection; the model is left as found.

    Args:
        plan: model, data, recipe; inside `measuring`.
        name: the arm.
        rows: what is measured at the end.
        rises: also measure the rows that protections may use.

    Returns:
        The forecast; with `rises` it holds the rise of each of those rows' losses, unless it diverged.
    """
    started = time.process_time()
    found: dict[str, float] = {}
    risen: list[Tensor] = []
    evaluations = 0
    diverged_at, reason = None, None
    with keeping_parameters(plan.task.model, plan.layout):
        try:
            own = METHODS[name.method].planned(plan, name)
            made = protection(own, name)

            def prepare(run: PlannedRun) -> None:
                run.protect, run.correct = made.protect, made.correct

            def ended(model: nn.Module) -> None:
                found.update(_measured(model, rows))
                if rises:
                    risen.append(rows.own.losses(model) - rows.own_start)

            rolled = rollout(
                _measuring(own.task),
                config=settings_of(own.last),
                training=own.recipe.training,
                steps=own.recipe.horizon,
                seed=plan.seed,
                last=own.last,
                prepare=prepare,
                ended=ended,
            )
            evaluations, diverged_at = rolled.gradient_evaluations, rolled.diverged_at
            reason = None if diverged_at is None else "its forecast diverges"
        except plan.set_up_errors as err:
            diverged_at, reason = NEVER_BEGUN, err.what
    if diverged_at is None and not math.isfinite(found.get("safety", math.nan)):
        diverged_at, reason = plan.last, "its forecast loss is not finite"
    told = found if diverged_at is None else {}
    return ArmForecast(
        label=name.label,
        method=name.method,
        strength=name.strength,
        safety=told.get("safety", math.nan),
        kept=told.get("kept", math.nan),
        control=told.get("control", math.nan),
        task=told.get("task", math.nan),
        gradients=evaluations,
        cpu_seconds=time.process_time() - started,
        diverged_at=diverged_at,
        reason=reason,
        rises=risen[0].tolist() if risen and diverged_at is None else [],
    )


def _measuring(task: Task) -> Task:
    """The task with the rows that a forecast follows on its way."""
    return replace(task, safety=task.heldout or task.safety, control=None)


def _measured(model: nn.Module, rows: ForecastRows) -> dict[str, float]:
    return {
        "safety": float(rows.safety.losses(model).mean()) - rows.start,
        "control": math.nan
        if rows.control is None
        else float(rows.control.losses(model).mean()) - rows.control_start,
        "task": float(sample_losses(model, rows.judged.batches, rows.judged.loss_fn).mean()),
        "kept": rows.kept(model),
    }
