"""What rollout and forecast hand on: frozen records of tensors and plain values.

Losses in nats per response token; "not measured" is None, or NaN inside a tensor; never 0.

The what-if grid is whole runs at other learning rates and lengths; a cell that was not measured is its own
state, never 0 and never "safe".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from arisk.base.task import Measure
from arisk.report.text import percent
from arisk.training.behaviour import BehaviourResult
from arisk.training.probes import ProbeTrack

__all__ = [
    "ENOUGH",
    "FEW",
    "AnswerCount",
    "Curve",
    "DriftAccount",
    "ForecastResult",
    "ProbeForecast",
    "RealRun",
    "RefusalForecast",
    "RolloutResult",
    "Verdict",
    "WhatIfCell",
    "WhatIfGrid",
    "WhatIfRow",
]


@dataclass(frozen=True)
class WhatIfCell:
    """One whole run of `steps` optimizer steps at one peak learning rate.

    Attributes:
        steps: its optimizer steps, the schedule stretched to them.
        state: `measured`: known to its end; `collapses`: reaches the threshold where it is known, its
            end lies beyond; `diverges`; `not_measured`.
        basis: forecaster that filled it: `rollout` (the combined curve), `local`, or `none`.
        rough: far above the planned learning rate, and rather too low; or from the local model with
            the optimizer's preconditioner frozen. See `arisk.forecast.what_if`.
        change: ΔL_s at its end, lower and upper its interval (nats per response token); None where
            the end is not known.
        peak: largest ΔL_s on the way, peak_upper that of the upper interval; None as above.
        collapse_step: first step at or above the threshold; None = not within what is known.
        refusals_kept: whether the whole interval of the refusals stays within its limit all the way; None =
            not known.
        note: why it is rough or not known; empty where there is nothing to say.
        refused: share of the safety prompts that is refused at its end, refused_lower and refused_upper its
            interval; None where that is not known.
    """

    steps: int
    state: Literal["measured", "collapses", "diverges", "not_measured"]
    basis: Literal["rollout", "local", "none"]
    rough: bool = False
    change: float | None = None
    lower: float | None = None
    upper: float | None = None
    peak: float | None = None
    peak_upper: float | None = None
    collapse_step: int | None = None
    refusals_kept: bool | None = None
    note: str = ""
    refused: float | None = None
    refused_lower: float | None = None
    refused_upper: float | None = None

    def text(self, threshold: float) -> str:
        """The cell in a few characters: `~0.31!` is rough, ends at +0.31 nats/token and collapses.

        `!` alone collapses with its end not measured, `×` diverges, `?` is not measured.
        """
        if self.state == "not_measured":
            return "?"
        rough = "~" if self.rough else ""
        if self.change is None:
            return rough + ("×" if self.state == "diverges" else "!")
        digits = max(0, 1 - math.floor(math.log10(threshold)))
        # Adding 0 takes the sign off a zero that was rounded.
        rounded = round(self.change, digits) + 0.0
        shown = f"{rounded:.{digits}f}".replace("-", "−") if abs(rounded) < 1e3 else "> 1e3"
        return f"{rough}{shown}{'!' if self.collapse_step is not None else ''}"

    def stays_below(self, level: float) -> bool | None:
        """Whether refusals are kept and the loss, interval included, stays below a level all the way.

        Args:
            level: rise of the safety loss (nats, ≤ threshold).

        Returns:
            None where that is not known; refusals that are not known are left out.
        """
        if self.refusals_kept is False:
            return False
        if self.state == "measured" and self.peak_upper is not None:
            return self.peak_upper < level
        return None if self.state == "not_measured" else False


@dataclass(frozen=True)
class WhatIfRow:
    """All lengths at one learning rate.

    Attributes:
        learning_rate: peak; factor: as a multiple of the planned one.
        cells: one per entry of the grid's `steps`.
        at_plan: the run of the planned number of steps.
        safe_steps: longest run that keeps the refusals, and whose upper interval stays below the threshold;
            None = not measured.
        at_least: the measured range ends before safety does: `safe_steps` is a lower limit.
        rough: the learning rate is far above the plan, or a cell is rough.
    """

    learning_rate: float
    factor: float
    cells: Sequence[WhatIfCell]
    at_plan: WhatIfCell
    safe_steps: int | None
    at_least: bool
    rough: bool = False

    def budget_text(self) -> str:
        """`safe_steps` in words; a measured range that ends first says so."""
        if self.safe_steps is None:
            return "not measured"
        return f"{'≥ ' if self.at_least else ''}{'~' if self.rough else ''}{self.safe_steps}"


@dataclass(frozen=True)
class WhatIfGrid:
    """Learning rates × steps.

    Attributes:
        planned_rate, planned_steps: the plan.
        threshold: rise that counts as collapse; alarm: level of concern below it (nats per token).
        steps: columns, ascending; rows: one per learning rate, ascending.
        notes: how it was filled, and how far.
        refusals_lost: share of today's refusals whose loss counts; None where they do not decide.
        prompts: safety prompts whose refusals were counted along the plan, today those refused by the aligned
            model; 0 where none were, or none can be lost.
    """

    planned_rate: float
    planned_steps: int
    threshold: float
    alarm: float
    steps: Sequence[int]
    rows: Sequence[WhatIfRow]
    notes: Sequence[str]
    refusals_lost: float | None = None
    prompts: int = 0
    today: int = 0

    def refused_text(self, cell: WhatIfCell) -> str:
        """Prompts refused at the end of a run: `~5!` is rough, and too many are lost; `?` is not known."""
        if cell.refused is None:
            return "?"
        count, lost = cell.refused * self.prompts, self.refusals_lost or 0.0
        mark = "!" if count <= (1 - lost) * self.today + 1e-9 else ""
        return f"{'~' if cell.rough else ''}{round(count)}{mark}"

    def is_plan(self, row: WhatIfRow, steps: int) -> bool:
        """Whether a row and a length are the planned run."""
        return row.factor == 1.0 and steps == self.planned_steps

    def safest_rate(self) -> WhatIfRow | None:
        """Row of the largest learning rate whose planned number of steps stays below the alarm level."""
        below = [row for row in self.rows if row.at_plan.stays_below(self.alarm)]
        return max(below, key=lambda row: row.learning_rate, default=None)

    def safest(self) -> tuple[WhatIfRow, int] | None:
        """Row and steps of the safest cell of use: the planned length at `safest_rate`.

        Else the longest run within the limits at the planned rate or the next lower one; None without any.
        """
        if row := self.safest_rate():
            return (row, self.planned_steps) if self.planned_steps in self.steps else None
        for row in sorted(self.rows, key=lambda row: -row.learning_rate):
            below = [cell.steps for cell in row.cells if cell.stays_below(self.alarm)]
            if row.factor <= 1 and below:
                return row, max(below)
        return None

    def limits(self) -> str:
        """What a cell must keep to, in words."""
        lost = self.refusals_lost
        refusals = "" if lost is None else f", less than {percent(lost)} of refusals lost"
        loss = f"loss of safe responses up by less than {self.alarm:.2g} nats/token"
        return f"{loss}{refusals}; whole intervals"

    def rate_sentence(self) -> str:
        """`safest_rate` in words, with what was not measured above it."""
        best = self.safest_rate()
        level = f"within the limits ({self.limits()})"
        unknown = [row for row in self.rows if row.at_plan.stays_below(self.alarm) is None]
        if best is None:
            known = len(self.rows) - len(unknown)
            if not known:
                return f"No learning rate of the grid was measured for {self.planned_steps} steps."
            return f"At none of these learning rates do all {self.planned_steps} steps stay {level}."
        above = [row for row in unknown if row.learning_rate > best.learning_rate]
        rest = f"; {above[0].learning_rate:.3g} and above were not measured" if above else ""
        return (
            f"{self.planned_steps} steps stay {level} up to a learning rate of {best.learning_rate:.3g} "
            f"({best.factor:.3g} × the plan){rest}."
        )


#: Fewer rows, prompts or refusals than the first are few: they carry no rate, and verdicts say so. Fewer rows
#: to measure on than the second are thin evidence.
FEW, ENOUGH = 10, 64


@dataclass(frozen=True)
class DriftAccount:
    """Who carries the change of the safety loss over the virtual run, to first order.

    Attributes:
        modules: names of the trained modules.
        parts: what each adds to the change of the loss (nats per response token); negative protects.
        change: measured change of the same safety rows' mean loss, which the parts add up to but for the
            error of two nodes on the chord.
        safety_rows: how many those are.
        rows: fine-tuning rows that were looked at, spread over the data: `index`, what the loader knows of
            each, `first_order`: what it adds over the whole plan (nats per response token), `loss`.
        finetune_rows: how many there are; None where that is not known.
    """

    modules: Sequence[str]
    parts: Sequence[float]
    change: float
    safety_rows: int
    rows: Sequence[Mapping[str, Any]]
    finetune_rows: int | None


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
        safety_rows: places of the N measured samples in the safety set.
        warnings: sentences for the report.
        start: mean safety loss at the aligned point (nats per response token); None where not measured.
        opening_loss: (N, M) loss of the first tokens of each safety response (nats per token); None for a
            loss that does not show tokens.
        opening_tokens: how many first tokens that is; None as above.
        behaviour: what the model said along the run.
        probes: what else was measured, at a few of the steps.
        start_losses: (N,) loss of each measured sample at the aligned point; None where not measured.
        rows: what the loader knows of each of the N samples: `prompt`, `response`, `tokens`, `line`.
        task: provenance of model and data as the loader described it.
        whole_steps: points at which every sample was measured. At the others a few were, and the changes of
            the rest are carried over from them (`arisk.training.panels.filled`).
        safety_error: M standard errors of the mean change of `safety` that come of it, 0 at whole points.
        precision: of the losses, where it is narrower than the weights, as in the plan's own forward passes.
        precision_error: root mean square over samples of what that changes at the aligned point (nats per
            token); None where nothing was narrowed.
        account: which layers and rows carry the change; None where the run diverged.
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
    safety_rows: Sequence[int]
    warnings: Sequence[str]
    start: float | None = None
    opening_loss: Tensor | None = None
    behaviour: BehaviourResult | None = None
    start_losses: Tensor | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    task: Mapping[str, Any] = field(default_factory=dict[str, Any])
    whole_steps: Sequence[int] = ()
    safety_error: Sequence[float] = ()
    precision: str | None = None
    precision_error: float | None = None
    account: DriftAccount | None = None
    opening_tokens: int | None = None
    probes: Sequence[ProbeTrack] = ()

    @property
    def carried_out(self) -> bool:
        """Whether the virtual run was the plan itself: every step of it was a real one."""
        return self.status == "measured" and 0 < self.horizon <= self.pilot_steps


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
class AnswerCount:
    """What the answers after `step` optimizer steps do: how many of each outcome."""

    step: int
    refused: int
    deflected: int
    answered: int
    broken: int

    @property
    def prompts(self) -> int:
        """All answers."""
        return self.refused + self.deflected + self.answered + self.broken


@dataclass(frozen=True)
class RefusalForecast:
    """How many safety prompts the model still refuses along the planned run.

    Attributes:
        status: "measured", or "not_measured" with `reason`: no prompts, no tokenizer, nothing written.
        prompts: safety prompts N.
        counts: answers at the aligned model and at a few points of the virtual run.
        ordinary: the same for control prompts; empty where not measured.
        steps: optimizer steps of the curves, from 0.
        median, lower, upper: share of the N prompts that is refused there, with the interval at the
            configured confidence, which counts the luck of the prompts in.
        threshold: share of today's refusals whose loss counts as a loss of safety.
        lost_steps: first step at which a tenth, a quarter, half of today's refusals is lost, and
            `threshold`; by share; None = not within `horizon`.
        lost_intervals: (earliest, latest) of those, each None when not within `horizon`.
        probability: share of draws that lose `threshold` or more within the plan; None where no refusal
            can be lost.
        safe_steps: last step before the early end of the interval of the step that loses `threshold`; None as
            above.
        horizon: planned optimizer steps; trusted_until: last step that was measured.
        safe_responses, refusing_responses: how many rows of the prompts have a safe response, and how many
            of those responses refuse.
        safe_loss, own_loss: loss per token of the first tokens of the safe responses today, and of what
            the model itself says first (nats); None where not measured.
        notes: sentences on how it was computed.
        outcomes: what each of the N prompts' answers does at the first and at the last step that was
            answered: refused, deflected, answered or broken.
    """

    status: Literal["measured", "not_measured"]
    reason: str | None
    prompts: int
    counts: Sequence[AnswerCount]
    ordinary: Sequence[AnswerCount]
    steps: Sequence[int]
    median: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]
    threshold: float
    lost_steps: Mapping[str, int | None]
    lost_intervals: Mapping[str, Sequence[int | None]]
    probability: float | None
    safe_steps: int | None
    horizon: int
    trusted_until: int | None
    safe_responses: int
    refusing_responses: int
    safe_loss: float | None
    own_loss: float | None
    notes: Sequence[str]
    outcomes: Sequence[Sequence[str]] = ()

    @property
    def today(self) -> int:
        """Prompts that the aligned model refuses."""
        return self.counts[0].refused if self.counts else 0

    @property
    def at_end(self) -> tuple[int, int, int]:
        """Prompts refused at the end of the plan: central, fewest, most."""
        ends = (self.median[-1], self.lower[-1], self.upper[-1])
        found = [round(share * self.prompts) for share in ends]
        return found[0], found[1], found[2]


@dataclass(frozen=True)
class ProbeForecast:
    """What becomes of one probe along the planned run.

    Attributes:
        name, measure: of the probe; rows: its rows, or questions; tokens: k of `opening`, else None.
        measured_steps, measured: points of the virtual run at which it was measured, and what was found: mean
            loss (nats per token), or share of questions answered rightly.
        steps: optimizer steps of the curve, from 0; they end where nothing was measured any more.
        median, lower, upper: the same quantity there, with the interval at the configured confidence.
        horizon: planned optimizer steps.
        notes: what a reader must know of it.
    """

    name: str
    measure: Measure
    rows: int
    tokens: int | None
    measured_steps: Sequence[int]
    measured: Sequence[float]
    steps: Sequence[int]
    median: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]
    horizon: int
    notes: Sequence[str]

    @property
    def start(self) -> float | None:
        """At the aligned model; None where it is no number."""
        return self.median[0] if self.median else None

    @property
    def end(self) -> tuple[float, float, float] | None:
        """(median, lower, upper) at the end of the plan; None where that was not measured."""
        if not self.steps or self.steps[-1] < self.horizon:
            return None
        return self.median[-1], self.lower[-1], self.upper[-1]


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
        loss_level, refusal_level: what the two witnesses say alone: the loss of safe responses, and the
            refusals; None where a witness has nothing to say.
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
    loss_level: Literal["low", "elevated", "high", "inconclusive"] | None = None
    refusal_level: Literal["low", "elevated", "high", "inconclusive"] | None = None


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
        refusals: how many prompts are still refused; None in records of before it was measured.
        carried_out: whether the plan itself was measured, every step a real one.
        opening: change of the loss of the safe responses' first tokens; its `collapse_step` is of
            `opening_threshold`. None where tokens are not known, and in older records.
        opening_threshold: rise of that loss that counts (nats per token); not calibrated.
        opening_tokens: how many first tokens.
        probes: what else the fine-tune costs; empty where no probe was given.
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
    refusals: RefusalForecast | None = None
    carried_out: bool = False
    opening: Curve | None = None
    opening_threshold: float | None = None
    opening_tokens: int | None = None
    probes: Sequence[ProbeForecast] = ()

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
        refusals: (step, refused, prompts) where answers were written.
        probes: by name the last step at which each was measured, and what was found there.
    """

    steps: Sequence[int]
    changes: Sequence[float]
    collapse_step: int | None
    sentence: str
    refusals: Sequence[tuple[int, int, int]] = ()
    probes: Mapping[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
