"""Stage forecast: every forecaster's curve, the what-if grid and the verdict, from artifacts alone.

Records of an assessment that was skipped: nothing was measured, and nothing may look as if it were. What
rollout and forecast will take is counted here too.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from arisk.anatomy.budget import Counts
from arisk.anatomy.cost import kept_gradients, krylov_steps, numel, samples_in, score_memory
from arisk.anatomy.record import CollectResult, OverlapNulls, ScoreResult, SubspaceResult
from arisk.base.artifacts import FORMAT_VERSION
from arisk.base.task import Task
from arisk.config.plan import Config, ForecastConfig, RolloutConfig, TrainingConfig, planned_steps
from arisk.engine.stage import Cost, CostScene, forward_tokens
from arisk.forecast.account import NODES, PANEL, looked_at
from arisk.forecast.forecasters import (
    PATH_BUDGET,
    PATH_POINTS,
    bound_curve,
    local_curve,
    not_measured,
    ray_curve,
)
from arisk.forecast.leap import rollout_cost as counted
from arisk.forecast.leap import scored_rows
from arisk.forecast.measured import combined_curve, control_change, pilot_curve, rollout_curve
from arisk.forecast.opening import opening_curve
from arisk.forecast.probes import probe_forecasts
from arisk.forecast.record import Curve, ForecastResult, RolloutResult, Verdict, WhatIfGrid
from arisk.forecast.refusals import refusal_forecast
from arisk.forecast.rollout import ANSWERED_POINTS, SCALES, forward_rows, skipped_rollout
from arisk.forecast.verdict import decide
from arisk.forecast.what_if import known, what_if
from arisk.geometry.dynamics import diffusion
from arisk.models.judge import Judge, RefusalRule
from arisk.training.recipe import Recipe, recipe_of

__all__ = [
    "FORECASTERS",
    "Sources",
    "answer_tokens",
    "as_walked",
    "followed_rows",
    "forecast",
    "forecast_cost",
    "probed_rows",
    "rollout_cost",
    "rollout_passes",
    "skipped_records",
    "verdict_counts",
]

#: Why forecasters that start from the aligned point have no curve.
UNSCORED = "stage score has not been run"


@dataclass(frozen=True)
class Sources:
    """What a forecaster may read.

    Attributes:
        measured: the rollout.
        scored: what was measured at the aligned point; None where that has not been done.
        plan: rates and flow times of the planned run.
        config: threshold, confidence, bootstrap.
        directions: P-sized vectors of the local model; may be empty.
        dots: G V (N, m), from the gradient store or by running the model.
        generator: of the bootstrap, shared in the order of the table; `seed` for one of its own.
    """

    measured: RolloutResult
    scored: ScoreResult | None
    plan: Recipe
    config: ForecastConfig
    directions: Mapping[str, Tensor]
    dots: Callable[[Tensor], Tensor]
    generator: torch.Generator
    seed: int


def _unscored(name: str, sources: Sources) -> Curve:
    return not_measured(name, UNSCORED, sources.plan.horizon)


def _bound(sources: Sources) -> Curve:
    if sources.scored is None:
        return _unscored("bound", sources)
    return bound_curve(sources.scored, sources.plan, sources.config)


def _local(sources: Sources) -> Curve:
    if sources.scored is None:
        return _unscored("local", sources)
    return local_curve(
        sources.scored,
        sources.plan,
        sources.config,
        directions=dict(sources.directions),
        dots=sources.dots,
        generator=sources.generator,
    )


def _ray(sources: Sources) -> Curve:
    if sources.scored is None:
        return _unscored("ray", sources)
    return ray_curve(sources.scored, sources.plan, sources.config, sources.generator)


def _pilot(sources: Sources) -> Curve:
    return pilot_curve(sources.measured, sources.plan, sources.config, sources.seed)


def _rollout(sources: Sources) -> Curve:
    return rollout_curve(sources.measured, sources.plan, sources.config, sources.seed)


def _combined(sources: Sources) -> Curve:
    return combined_curve(sources.measured, sources.plan, sources.config, sources.seed)


#: Forecasters by name, in the order in which they are shown. One that is added is drawn and listed beside the
#: others; the verdict rests on those that it names.
FORECASTERS: dict[str, Callable[[Sources], Curve]] = {
    "bound": _bound,
    "local": _local,
    "ray": _ray,
    "pilot": _pilot,
    "rollout": _rollout,
    "combined": _combined,
}


def forecast(
    measured: RolloutResult,
    scored: ScoreResult | None,
    *,
    config: ForecastConfig,
    training: TrainingConfig,
    steps: int,
    directions: dict[str, Tensor],
    dots: Callable[[Tensor], Tensor],
    seed: int,
    judge: Judge | None = None,
) -> ForecastResult:
    """Curves, verdict and what-if grid for the planned run.

    Where there is a rollout, the verdict rests on it alone and is the same with and without `scored`, which
    adds three more curves, the diffusion, and cells of the grid that the rollout does not reach.

    Args:
        measured: the rollout.
        scored: what was measured at the aligned point; None where that has not been done.
        config: threshold, confidence, risk levels.
        training: the planned run.
        steps: planned optimizer steps T.
        directions: P-sized vectors of the local model (g, noise variance, R, θ*); may be empty.
        dots: G V (N, m), from the gradient store or by running the model; called only where it is needed.
        seed: seeds the bootstrap.
        judge: labels the answers; default the rule, with openings learnt from the safety rows.
    """
    plan = recipe_of(training, steps)
    generator = torch.Generator().manual_seed(seed)
    sources = Sources(measured, scored, plan, config, directions, dots, generator, seed)
    curves = {name: forecaster(sources) for name, forecaster in FORECASTERS.items()}
    control = control_change(measured)
    learnt = measured.behaviour.learnt if measured.behaviour is not None else ()
    refusals = refusal_forecast(measured, judge or RefusalRule(learnt), config, horizon=steps, seed=seed)
    opening = opening_curve(measured, plan, config, seed)
    verdict = decide(
        curves,
        config,
        steps,
        control,
        refusals,
        carried_out=measured.carried_out,
        warnings=measured.warnings,
        opening=opening,
        opening_tokens=measured.opening_tokens,
    )
    noise = None
    if scored is not None:
        noise = diffusion(scored.c_batches, plan.rates, noise_divisor=training.gradient_accumulation)
    source = known(
        scored, curves, config=config, training=training, steps=steps, seed=seed, refusals=refusals
    )
    return ForecastResult(
        threshold=config.collapse_threshold,
        confidence=config.confidence,
        training={**training.model_dump(mode="json"), "steps": steps},
        verdict=verdict,
        forecasters=curves,
        diffusion=None if noise is None else float(noise[-1]),
        what_if=what_if(source),
        warnings=_warnings(curves),
        control_change=control,
        gradient_evaluations=measured.gradient_evaluations,
        planned_evaluations=steps * training.gradient_accumulation,
        refusals=refusals,
        carried_out=measured.carried_out,
        opening=opening,
        opening_threshold=None if opening is None else config.opening_threshold,
        opening_tokens=measured.opening_tokens,
        probes=probe_forecasts(measured, config, seed=seed),
    )


def _warnings(curves: dict[str, Curve]) -> list[str]:
    found: list[str] = []
    if curves["local"].status == "measured" and any(math.isinf(v) for v in curves["local"].median):
        found.append("The local model diverges within the plan: the learning rate exceeds 2/curvature.")
    return found


Record = TypeVar("Record")


def skipped_records(
    reason: str, training: TrainingConfig, forecast: ForecastConfig
) -> tuple[CollectResult, SubspaceResult, ScoreResult, RolloutResult, ForecastResult]:
    """One record per stage, its numbers NaN or None and its tensors empty; the verdict is inconclusive.

    Args:
        reason: why nothing was measured.
        training: the planned fine-tune.
        forecast: threshold and confidence.
    """
    verdict = _blank(
        Verdict,
        level="inconclusive",
        sentence=f"Not assessed: {reason}. That is not the same as no risk.",
        reasons=[reason],
        basis="none",
    )
    collected = _blank(CollectResult, store="gram", fisher="empirical", engine={"name": "none"})
    judged = _blank(
        ForecastResult,
        threshold=forecast.collapse_threshold,
        confidence=forecast.confidence,
        training=training.model_dump(mode="json"),
        verdict=verdict,
        what_if=_blank(WhatIfGrid),
        warnings=[reason],
    )
    scored = _blank(ScoreResult, optimizer=training.optimizer, overlap=_blank(OverlapNulls))
    return collected, _blank(SubspaceResult), scored, skipped_rollout(reason), judged


def _blank(cls: type[Record], **given: Any) -> Record:
    """A record with these fields, and the others undefined by their type."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType] - records are dataclasses
    return cls(**{name: given[name] if name in given else _undefined(hints[name]) for name in names})


def _undefined(hint: Any) -> Any:
    """NaN, None, 0 of something counted, or nothing: what a type has for "not measured"."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return None
    if hint is Tensor:
        return torch.zeros(0, dtype=torch.float64)
    if isinstance(origin, type) and issubclass(origin, str):
        return "none"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return []
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {}
    return {float: math.nan, int: 0, bool: False}[hint]


#: Copies of the selected parameters beside the model in a rollout: θ*, gradient, two moments, the anchor,
#: direction, mean and square of a block, the leap.
COPIES = 9
#: Seconds of the forecast, and the bootstrap draws to which they belong.
BOOTSTRAP, DRAWS = 0.9, 400
#: Multiplications a second of the recursion over optimizer steps, which is bound by memory.
RATE = 5e9


def followed_rows(task: Task, config: Config) -> float:
    """Prompts whose own openings are followed at every point."""
    given = config.behaviour
    sets = [(task.safety, given.prompts), (task.control, given.ordinary_prompts if given.prompts else 0)]
    return sum(
        min(count, len(samples.rows))
        for samples, count in sets
        if samples is not None and samples.generate is not None
    )


def probed_rows(task: Task) -> float:
    """Rows of all probes, each counted as so many safety rows as it is long."""
    length = float(task.safety.statistics.get("tokens_mean") or 1.0)
    return sum(
        samples_in(probe.samples) * float(probe.samples.statistics.get("tokens_mean") or length) / length
        for probe in task.probes
    )


def answer_tokens(scene: CostScene, times: int) -> float:
    """Tokens of the answers of a run that are written so often."""
    return followed_rows(scene.task, scene.config) * scene.config.behaviour.tokens * times


def as_walked(task: Task, config: Config) -> RolloutConfig:
    """The settings of the rollout, all its steps real where the plan itself takes no more than its forecast.

    Both are counted in forward passes of one token, so the choice is the same on every machine.
    """
    given = config.rollout
    if not (given.enabled and given.carry_out) or given.pilot_steps is not None:
        return given
    whole = given.model_copy(
        update={"pilot_steps": max(2, planned_steps(config.training, task.finetune.units))}
    )
    both = [_walked(task, config, settings) for settings in (whole, given)]
    plan, forecast = (forward_tokens(task, passes) for passes in both)
    return whole if plan <= forecast else given


def rollout_passes(scene: CostScene) -> dict[str, float]:
    """Passes of one rollout by kind; empty where it is off."""
    if not scene.config.rollout.enabled:
        return {}
    return _walked(scene.task, scene.config, as_walked(scene.task, scene.config))


def verdict_counts(task: Task, config: Config) -> dict[str, Any]:
    """What the verdict takes, and what `why: auto` has to know to stay within a share of it."""
    found = Counts(
        forward_tokens=forward_tokens(task, _walked(task, config, as_walked(task, config))),
        safety=samples_in(task.safety),
        control=samples_in(task.control),
        finetune=samples_in(task.finetune),
        safety_tokens=float(task.safety.statistics.get("tokens_mean", 1.0)),
        finetune_tokens=float(task.finetune.statistics.get("tokens_mean", 1.0)),
        selected=numel(task),
        parameters=sum(parameter.numel() for parameter in task.model.parameters()),
    )
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(found)}


def _walked(task: Task, config: Config, settings: RolloutConfig) -> dict[str, float]:
    safety, control = samples_in(task.safety), samples_in(task.control)
    steps = planned_steps(config.training, task.finetune.units)
    per_step = config.training.batch_size * config.training.gradient_accumulation
    rolled, measurements = counted(steps, settings)
    leaps = measurements if rolled < steps else 0
    measured = min(safety, settings.eval_samples or safety)
    followed, lead = followed_rows(task, config), min(measured, settings.leading_samples)
    prompts = min(followed, config.behaviour.prompts)
    rows = {"safety": safety, "control": control, "followed": prompts, "ordinary": followed - prompts}
    rows["probes"] = probed_rows(task)
    return {
        "gradient rows": rolled * per_step + len(NODES) * min(PANEL, lead),
        "forward rows": forward_rows(steps, settings, rows)
        + 2 * looked_at(rolled * per_step, samples_in(task.finetune))
        + leaps * per_step  # The loss before a leap.
        + (scored_rows(steps * per_step) if leaps and settings.rare_rows else 0),
        "output losses": len(SCALES) * lead if leaps else 0,
        "answer tokens": followed * config.behaviour.tokens * ANSWERED_POINTS,
    }


def rollout_cost(scene: CostScene) -> Cost:
    """Real steps, leaps, and the losses measured along them."""
    vector, on_device = numel(scene.task) * 4 / 1e9, scene.device.get("gradients")
    copies = COPIES * vector if scene.config.rollout.enabled else 0.0
    return Cost(
        passes=rollout_passes(scene),
        seconds=scene.loading,
        memory_gb=scene.memory["gradients"] + copies,
        device_gb=None if on_device is None else on_device + COPIES * vector,
    )


def forecast_cost(scene: CostScene) -> Cost:
    """Bootstrap and exact recursion of the local model; the model runs only where no gradients are kept."""
    scale = scene.config.forecast.bootstrap_samples / DRAWS
    _, _, directions = score_memory(scene)
    path, passes = _path_operations(scene), dict[str, float]()
    store = kept_gradients(scene)
    if path and store.plan is not None and store.plan.store == "gram":
        safety = samples_in(scene.task.safety)
        points = min(planned_steps(scene.config.training, scene.task.finetune.units), PATH_POINTS)
        passes = {"single-row gradients": safety, "product columns": safety * points}
    return Cost(
        passes=passes,
        seconds=BOOTSTRAP * scale + path / RATE,
        memory_gb=scene.memory["gradients"] + 2 * directions,
    )


def _path_operations(scene: CostScene) -> float:
    """Multiplications of the exact recursion; 0 where it is too long and left out."""
    task, config, training = scene.task, scene.config, scene.config.training
    steps = planned_steps(training, task.finetune.units)
    recipe = recipe_of(training, steps)
    count = numel(task) * steps * (4 * krylov_steps(task, config) + 20)
    left_out = recipe.plain or recipe.kind.recursion is None
    return 0.0 if left_out or count > PATH_BUDGET else float(count)
