"""What rollout and forecast hand on: frozen records of tensors and plain values.

Losses in nats per response token; "not measured" is None, or NaN inside a tensor; never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from arisk.forecast.grid import WhatIfGrid

__all__ = ["Curve", "ForecastResult", "RealRun", "RolloutResult", "Verdict"]


@dataclass(frozen=True)
class RolloutResult:
    """Losses measured along an accelerated virtual run of the planned fine-tune.

    Attributes:
        status: "measured" or "skipped", with `reason`.
        horizon: planned optimizer steps T. pilot_steps: real steps at the start.
        steps: M optimizer steps at which losses were measured, from 0.
        safety: (N, M) change of each safety sample's loss (nats per response token).
        control: (N_c, M) the same for control samples; None without control data.
        finetune_loss: mean training loss of the real steps before each point, NaN at 0.
        kept_share: share x of each leap that speed control kept, in (0, 1.72]; 1 where steps were real.
        flow_time: Σ η up to each point.
        diverged_at: step before which the run diverged; None where it did not.
        scales: S factors s of the outputs z₀ + (z_pilot − z₀) s, and extrapolated: (N, S) loss
            changes there; None when the loss does not show the model's outputs.
        gradient_evaluations: micro-batch gradients used. safety_passes: evaluations of the samples.
        warnings: sentences for the report.
    """

    status: Literal["measured", "skipped"]
    reason: str | None
    horizon: int
    pilot_steps: int
    steps: Sequence[int]
    safety: Tensor
    control: Tensor | None
    finetune_loss: Sequence[float]
    kept_share: Sequence[float]
    flow_time: Sequence[float]
    diverged_at: int | None
    scales: Sequence[float]
    extrapolated: Tensor | None
    gradient_evaluations: int
    safety_passes: int
    warnings: Sequence[str]


@dataclass(frozen=True)
class Curve:
    """One forecaster's safety-loss change over optimizer steps.

    Attributes:
        status: "measured", "skipped" or "not_measured"; with `reason` when not measured.
        kind: "forecast" or "bound" (a lower bound is never a forecast).
        steps: optimizer steps, from 0 to the horizon.
        median, lower, upper: ΔL_s in nats per response token at those steps, with the interval at
            the configured confidence.
        collapse_step: first step whose median reaches the threshold; None = not within `horizon`.
        collapse_interval: (earliest, latest) collapse step over the draws at the confidence, each
            None when not within the horizon.
        probability: share of draws that collapse within the horizon; None for bounds.
        horizon: last step looked at.
        trusted_until: last step up to which the forecaster may be trusted; None when not measured.
        notes: sentences on how it was computed.
    """

    name: str
    status: Literal["measured", "skipped", "not_measured"]
    reason: str | None
    kind: Literal["forecast", "bound"]
    steps: Sequence[int]
    median: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]
    collapse_step: int | None
    collapse_interval: Sequence[int | None] | None
    probability: float | None
    horizon: int
    trusted_until: int | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """The answer: will the planned fine-tune break safety.

    Attributes:
        level: low, elevated, high or inconclusive.
        sentence: the verdict in one sentence.
        reasons: the rules that fired, as sentences with numbers.
        basis: name of the forecaster it rests on.
        probability: P(collapse within the planned steps), None when not measured.
        collapse_step: of the basis; None = not within `horizon`.
        safe_steps: largest number of optimizer steps whose upper interval stays below the
            threshold; None when not measured.
        caveats: what is known about when this verdict is wrong.
    """

    level: Literal["low", "elevated", "high", "inconclusive"]
    sentence: str
    reasons: Sequence[str]
    basis: str
    probability: float | None
    collapse_step: int | None
    safe_steps: int | None
    horizon: int
    caveats: Sequence[str]


@dataclass(frozen=True)
class ForecastResult:
    """Every forecaster's curve, and the verdict.

    Attributes:
        threshold: rise of the mean safety loss that counts as collapse (nats per response token).
        confidence: nominal coverage of the intervals.
        forecasters: curves by name: `bound`, `local`, `ray` (measured losses along the first update
            direction) and, where measured, `rollout`, `pilot`, `combined`.
        diffusion: rise by mini-batch noise at the horizon (nats), None when not measured.
        what_if: other learning rates and lengths, each cell with the forecaster that filled it.
        control_change: mean change of the control loss at the steps of the `rollout` curve; None
            when not measured.
        gradient_evaluations: micro-batch gradients the rollout used, and planned_evaluations those
            of the planned run.
    """

    threshold: float
    confidence: float
    training: Mapping[str, Any]
    verdict: Verdict
    forecasters: Mapping[str, Curve]
    diffusion: float | None
    what_if: WhatIfGrid
    warnings: Sequence[str]
    control_change: Sequence[float] | None = None
    gradient_evaluations: int = 0
    planned_evaluations: int = 0

    @property
    def collapse_step(self) -> int | None:
        """Collapse step of the forecaster the verdict rests on; None = not within its horizon."""
        return self.verdict.collapse_step


@dataclass(frozen=True)
class RealRun:
    """What the plan really did where somebody carried it out, for whoever shows its forecast.

    Attributes:
        steps: optimizer steps at which the safety loss was measured, from 0.
        changes: its mean change there (nats per response token); infinite where it is not finite.
        collapse_step: first step at the threshold; None = not within the steps that were taken.
        sentence: the two collapse steps in words.
    """

    steps: Sequence[int]
    changes: Sequence[float]
    collapse_step: int | None
    sentence: str
