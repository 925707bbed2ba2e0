"""Arms forecast before they are trained: each is really run, in fewer and larger steps.

A fifth of the steps at five times the rate, with the moving averages of AdamW as much shorter, goes as far as
the plan. Unlike the leaps of a rollout, every step meets the protection, which pulls back where the model has
drifted: a leap along the pull of its start forecasts that replay does not hold. How far a run drifts, such a
short one tells badly (the verdict rests on a rollout); it ranks arms, so that the best can be trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from arisk.guard.methods import METHODS, protection
from arisk.guard.plan import ArmName, ArmPlan
from arisk.guard.record import NEVER_BEGUN, ArmForecast
from arisk.models.answers import GreedyAnswers
from arisk.training.behaviour import DECIDING, spread_rows
from arisk.training.loop import keeping_parameters
from arisk.training.panels import Panel, panel_of, sample_losses
from arisk.training.recipe import recipe_of
from arisk.verification.run import TaskRows

__all__ = ["CONTROL_ROWS", "ROWS", "ForecastRows", "forecast_arm", "saves", "short_steps", "shortened"]

#: Safety and control rows that an arm's forecast measures at most: openings and the task rank arms first.
ROWS, CONTROL_ROWS = 32, 16
#: Share of the steps that a forecast takes, and so many at least.
SHARE, LEAST = 0.2, 10
#: Share of the steps up to which a forecast saves time.
WORTH = 0.35


def short_steps(last: int) -> int:
    """Steps that the forecast of an arm of `last` steps takes."""
    return min(last, max(LEAST, math.ceil(SHARE * last)))


def saves(last: int, arms: int, best: int) -> bool:
    """Whether forecasting so many arms and training the best takes fewer steps than training them all."""
    steps = short_steps(last)
    return arms > best and steps <= WORTH * last and arms * steps + best * last < arms * last


def shortened(plan: ArmPlan, steps: int) -> ArmPlan:
    """The plan carried out in so many steps, each as much larger: rates, schedule, averages of AdamW.

    Args:
        plan: an arm's.
        steps: n of the K steps that are to be taken; the rate becomes η·K/n, each β becomes β^(K/n).
    """
    recipe, factor = plan.recipe, plan.last / steps
    training = recipe.training
    larger = training.model_copy(
        update={
            "learning_rate": training.learning_rate * factor,
            "betas": tuple(beta**factor for beta in training.betas),
            "warmup_steps": math.ceil(training.warmup_steps / factor),
        }
    )
    horizon = max(steps, round(recipe.horizon / factor))
    return replace(plan, recipe=recipe_of(larger, horizon), last=steps)


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
            panel_of(task.control, min(CONTROL_ROWS, plan.config.control_samples), device)
            if task.control
            else None
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
    """What an arm would come to, by a short run with its protection; the model is left as found.

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
    done, diverged_at, reason = 0, None, None
    begun = False
    with keeping_parameters(plan.task.model, plan.layout):
        try:
            own = METHODS[name.method].planned(plan, name)
            made = protection(own, name)  # As strong as in the plan itself.
            # A plan of fewer steps, as `smaller` makes one, is shortened by the same factor.
            short = shortened(own, max(1, round(own.last * short_steps(plan.last) / plan.last)))
            run = short.fresh()
            run.protect, run.correct = made.protect, made.correct
            begun = True
            for number in range(1, short.last + 1):
                run.step(number)
                done = number
            with run.reading():
                found.update(_measured(plan.task.model, rows))
                if rises:
                    risen.append(rows.own.losses(plan.task.model) - rows.own_start)
        except plan.set_up_errors as err:
            diverged_at, reason = done + 1 if begun else NEVER_BEGUN, err.what
    if diverged_at is None and not math.isfinite(found.get("safety", math.nan)):
        diverged_at, reason = done, "its loss is not finite"
    told = found if diverged_at is None else {}
    return ArmForecast(
        label=name.label,
        method=name.method,
        strength=name.strength,
        safety=told.get("safety", math.nan),
        kept=told.get("kept", math.nan),
        control=told.get("control", math.nan),
        task=told.get("task", math.nan),
        gradients=done * plan.recipe.training.gradient_accumulation,
        cpu_seconds=time.process_time() - started,
        diverged_at=diverged_at,
        reason=reason,
        rises=risen[0].tolist() if risen and diverged_at is None else [],
    )


def _measured(model: nn.Module, rows: ForecastRows) -> dict[str, float]:
    return {
        "safety": float(rows.safety.losses(model).mean()) - rows.start,
        "control": math.nan
        if rows.control is None
        else float(rows.control.losses(model).mean()) - rows.control_start,
        "task": float(sample_losses(model, rows.judged.batches, rows.judged.loss_fn).mean()),
        "kept": rows.kept(model),
    }
