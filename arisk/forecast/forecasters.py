"""The forecasters: each turns artifacts into one curve of safety loss over optimizer steps.

* `bound`: the lower bound of the Alignment Instability Condition. Never a forecast.
* `local`: the quadratic model at θ* under the planned optimizer. Exact on quadratics.
* `ray`: measured losses along the first update direction, with the speed at which the measured
  fine-tuning loss still pays off. Knows cliffs that no quadratic sees, not later turns.

Curves from values and draws: quantiles, collapse steps and probability, alike for every forecaster.

The planned run on the local model: displacements at recorded steps, projected on the safety gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arisk.anatomy.record import ScoreResult
from arisk.config.plan import ForecastConfig
from arisk.forecast.record import Curve
from arisk.geometry.dynamics import (
    LocalModel,
    Recursion,
    aic_lower_bound,
    first_crossing,
    interpolate_rows,
    interpolated_crossing,
    krylov_path,
    local_change,
    optimizer_path,
    ray_positions,
    recorded_steps,
)
from arisk.training.recipe import Recipe

__all__ = [
    "CURVE_POINTS",
    "bound_curve",
    "curve_of",
    "local_curve",
    "local_path",
    "not_measured",
    "plain_values",
    "ray_curve",
    "trusted_time",
]

#: The local model is trusted while it is this close to the measured loss (share, and share of the
#: threshold for changes that are small themselves).
TRUST_SHARE, TRUST_FLOOR = 0.2, 0.1


def bound_curve(scored: ScoreResult, plan: Recipe, config: ForecastConfig) -> Curve:
    """½ max(½γ̂t² − ε̂t, 0)² over the flow time t of the plan."""
    steps = recorded_steps(plan.horizon, CURVE_POINTS)
    values = aic_lower_bound(plan.times, scored.gamma_hat, scored.epsilon_hat)
    shown = plain_values(values[steps])
    return Curve(
        name="bound",
        status="measured",
        reason=None,
        kind="bound",
        steps=steps,
        median=shown,
        lower=shown,
        upper=shown,
        collapse_step=first_crossing(list(range(plan.horizon + 1)), values, config.collapse_threshold),
        collapse_interval=None,
        probability=None,
        horizon=plan.horizon,
        trusted_until=None,
        notes=["A lower bound to leading order: it may say 0 where safety collapses. Not a forecast."],
    )


def local_curve(
    scored: ScoreResult,
    plan: Recipe,
    config: ForecastConfig,
    *,
    directions: dict[str, Tensor],
    dots: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Curve:
    """⟨ḡ_s, δ_k⟩ + ½ δ_kᵀFδ_k along the planned optimizer on the quadratic model of the loss.

    Args:
        scored: Krylov model and c-vectors.
        plan: the planned run.
        config: threshold, confidence and draws.
        directions: P-sized vectors of the local model; empty to use the Krylov recursion.
        dots: G V (N, m), from the gradient store or by running the model.
        generator: source of the bootstrap.
    """
    steps, c, notes = local_path(scored, plan, directions, dots)
    values = local_change(c).mean(0)
    shown = recorded_steps(len(steps) - 1, CURVE_POINTS)
    draws = _resampled_local(scored, plan, steps, c, shown, config, generator)
    kept = [steps[i] for i in shown]
    trusted = trusted_time(scored, config.collapse_threshold)
    return curve_of(
        "local",
        kept,
        values[shown],
        draws,
        config,
        collapse=interpolated_crossing(steps, values, config.collapse_threshold),
        horizon=plan.horizon,
        trusted_until=_steps_within(plan, trusted),
        notes=notes,
    )


def ray_curve(scored: ScoreResult, plan: Recipe, config: ForecastConfig, generator: torch.Generator) -> Curve:
    """Measured safety loss at the position the planned run reaches along its first direction.

    It slows down where the fine-tuning loss along this direction stops falling. A real run turns to
    new directions there and goes on, so on real fine-tunes this comes late; at full speed instead it
    raised the same alarm on harmless data as on harmful (both measured on the embedded model).
    """
    if scored.probe_times is None or scored.probe_safety is None or scored.probe_finetune is None:
        return not_measured("ray", "score.probe_points is 0", plan.horizon)
    if not bool(torch.isfinite(scored.probe_safety[:, 1]).all()):
        return not_measured("ray", "the first point of the virtual move has no finite loss", plan.horizon)
    positions = ray_positions(
        scored.probe_times, scored.probe_finetune, torch.diff(plan.times), slope=scored.krylov_beta**2
    )
    steps = recorded_steps(plan.horizon, CURVE_POINTS)
    all_values = interpolate_rows(scored.probe_times, scored.probe_safety.mean(0)[None], positions)[0]
    rows = interpolate_rows(scored.probe_times, scored.probe_safety, positions[steps])
    draws = _resample_rows(rows, config.bootstrap_samples, generator)
    far = float(scored.probe_times[-1])
    outside = positions >= far
    beyond = int(outside.to(torch.int64).argmax()) if bool(outside.any()) else None
    return curve_of(
        "ray",
        steps,
        all_values[steps],
        draws,
        config,
        collapse=first_crossing(list(range(plan.horizon + 1)), all_values, config.collapse_threshold),
        horizon=plan.horizon,
        trusted_until=plan.horizon if beyond is None else beyond,
        notes=[] if beyond is None else [f"The measured range ends at step {beyond}; held from there."],
    )


def trusted_time(scored: ScoreResult, threshold: float) -> float | None:
    """Flow time up to which the quadratic safety model follows the measured loss along u.

    Args:
        scored: probe and c-vector of the update direction.
        threshold: collapse threshold (nats), the scale of a change that matters.

    Returns:
        The last probed time before the model leaves the measurement by more than 20 %; infinite
        when it never does; None without a probe.
    """
    if scored.probe_times is None or scored.probe_safety is None:
        return None
    times = scored.probe_times
    predicted = local_change(scored.c_update[:, None] * times[None]).mean(0)
    measured = scored.probe_safety.mean(0)
    allowed = TRUST_SHARE * measured.abs() + TRUST_FLOOR * threshold
    bad = ~((predicted - measured).abs() <= allowed)
    if not bool(bad.any()):
        return math.inf
    return float(times[max(0, int(bad.to(torch.int64).argmax()) - 1)])


def _resampled_local(
    scored: ScoreResult,
    plan: Recipe,
    steps: Sequence[int],
    c: Tensor,
    shown: Sequence[int],
    config: ForecastConfig,
    generator: torch.Generator,
) -> Tensor:
    """(draws, M) mean changes with safety samples and fine-tuning batches drawn anew.

    A redrawn set of batches changes the mean gradient; to first order it shifts the c-vectors by
    s_k (mean of the drawn c_b − mean c_b), with s_k the flow time the path has used along u.
    """
    c = c[:, list(shown)]
    n, batches = c.shape[0], scored.c_batches.shape[1]
    base = scored.c_update
    used = (base @ c) / (base @ base).clamp(min=1e-300)
    used = torch.minimum(used.clamp(min=0), plan.times[[steps[i] for i in shown]])
    draws: list[Tensor] = []
    for _ in range(config.bootstrap_samples):
        moved = c
        if batches > 1:
            picked = torch.randint(batches, (batches,), generator=generator)
            shift = scored.c_batches[:, picked].mean(1) - scored.c_batches.mean(1)
            moved = c + shift[:, None] * used[None]
        rows = torch.randint(n, (n,), generator=generator)
        draws.append(local_change(moved).index_select(0, rows).mean(0))
    return torch.stack(draws)


def _resample_rows(values: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    n = values.shape[0]
    rows = [torch.randint(n, (n,), generator=generator) for _ in range(draws)]
    return torch.stack([values[row].mean(0) for row in rows])


def _steps_within(plan: Recipe, time: float | None) -> int | None:
    """Last step whose flow time is at most `time`; None when the time was not measured."""
    if time is None:
        return None
    return int((plan.times <= time).sum()) - 1


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


#: Steps kept where a step costs J numbers, and where it costs a product with every safety gradient.
DENSE_POINTS, PATH_POINTS = 4800, 64
#: Parameters up to which the second kind is as cheap as the first.
FEW_PARAMETERS = 4096
#: Floating-point operations above which the true recursion gives way to the frozen preconditioner.
PATH_BUDGET = 2e11


def local_path(
    scored: ScoreResult,
    plan: Recipe,
    directions: dict[str, Tensor],
    dots: Callable[[Tensor], Tensor],
) -> tuple[list[int], Tensor, list[str]]:
    """Steps, c-vectors (N, M) of the displacements there, and how they were got.

    Args:
        scored: the Krylov model.
        plan: the planned run.
        directions: P-sized vectors of the local model; empty where they are too large to be kept.
        dots: G V (N, m), called where the exact recursion is wanted and short enough.
    """
    training = plan.training
    if not plan.plain and plan.kind.recursion is not None and directions:
        parameters, krylov = directions["curvature_basis"].shape
        if parameters * plan.horizon * (4 * krylov + 20) <= PATH_BUDGET:
            return _vector_path(plan, scored, directions, dots)
    path = krylov_path(scored.krylov_t, scored.krylov_beta, plan.rates, momentum=plan.momentum)
    notes: list[str] = []
    if not plan.plain:
        long = "the exact recursion is too long for this plan"
        why = long if directions else "the vectors of the exact recursion are too large to keep"
        if plan.kind.recursion is None:
            why = "it has no recursion on the local model"
        notes.append(
            f"{training.optimizer} with its preconditioner frozen at the start ({why}); weight decay "
            "and clipping are left out."
        )
    steps = recorded_steps(plan.horizon, DENSE_POINTS)
    return steps, scored.c_krylov @ path[steps].T, notes


def _vector_path(
    plan: Recipe, scored: ScoreResult, directions: dict[str, Tensor], dots: Callable[[Tensor], Tensor]
) -> tuple[list[int], Tensor, list[str]]:
    """The true optimizer recursion on P-sized vectors, projected on G in chunks."""
    training = plan.training
    model = LocalModel(
        gradient=directions["gradient"],
        curvature_basis=directions["curvature_basis"],
        curvature=scored.krylov_t,
        noise_variance=directions["noise_variance"],
        theta=directions.get("theta"),
    )
    recursion = Recursion(
        rates=plan.rates,
        optimizer=plan.kind.recursion or "sgd",
        momentum=plan.momentum,
        betas=training.betas,
        eps=training.eps,
        weight_decay=directions.get("weight_decay", training.weight_decay),
        ratios=directions.get("ratios"),
        max_grad_norm=training.max_grad_norm,
        noise_divisor=training.gradient_accumulation,
    )
    small = len(model.gradient) <= FEW_PARAMETERS
    steps = recorded_steps(plan.horizon, DENSE_POINTS if small else PATH_POINTS)
    chunk = max(1, int(1e8 / len(model.gradient)))
    columns: list[Tensor] = []
    pending: list[Tensor] = []
    for step, delta in optimizer_path(model, recursion, steps):
        pending.append(delta)
        if len(pending) == chunk or step == steps[-1]:
            columns.append(dots(torch.stack(pending, dim=1)))
            pending = []
    return steps, torch.cat(columns, dim=1), []
