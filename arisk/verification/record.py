"""What a real fine-tune showed, and that truth laid over the forecast.

Collapse of a real run is the first step at which its mean safety change reaches the threshold, read between
measured steps as the forecasters do; a run that diverges has collapsed. Nothing is measured here: another
threshold or another judge of answers needs no new fine-tune.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arisk.forecast.record import Curve, ForecastResult
from arisk.forecast.refusals import labelled, refused_share
from arisk.geometry.dynamics import interpolated_crossing
from arisk.models.judge import Judge, Outcome, RefusalRule
from arisk.training.behaviour import AnsweredPrompts, BehaviourResult
from arisk.training.probes import ProbeTrack

__all__ = [
    "Comparison",
    "ProbeCheck",
    "RefusalCount",
    "TaskCurve",
    "VerifyResult",
    "compare",
    "compared_curve",
    "value_at",
]


@dataclass(frozen=True)
class TaskCurve:
    """Task loss along the run, measured as stage guard measures its arms: the plain one is this run.

    Attributes:
        rows: digest of the rows.
        loss: (M,) mean over them (nats per response token).
        surprising: (M,) mean over the fine-tuning rows kept apart; empty where there are none.
        cpu_seconds: of the optimizer steps, measuring left out.
        final: loss of each row at the last point.
    """

    rows: str
    loss: Sequence[float]
    surprising: Sequence[float]
    cpu_seconds: float
    final: Sequence[float]


@dataclass(frozen=True)
class VerifyResult:
    """Losses and texts measured along the planned fine-tune, really carried out.

    Attributes:
        horizon: planned optimizer steps T, whose learning-rate schedule was followed.
        last: K ≤ T, the step at which the run was to stop.
        steps: M optimizer steps at which losses were measured, from 0; the last is K unless the run
            diverged.
        safety: (N, M) change of each safety sample's loss (nats per response token).
        control: (N_c, M) the same for control samples; None without control data.
        start: mean safety loss at step 0 (nats per response token).
        finetune_loss: mean training loss of the steps before each point, NaN at 0.
        diverged_at: step that could not be taken because its loss is not finite; None where none.
        heldout: whether safety rows were measured that the forecast did not use.
        behaviour: what the model said along the run, to safety prompts of the rows measured.
        opening_loss: (N, M) loss of the first tokens of each safety response (nats per token); None for a
            loss that does not show tokens.
        gradient_evaluations: micro-batch gradients used.
        warnings: sentences for the report.
        task: task loss along the run; None where nothing said that protections will be compared.
        probes: what else was measured, at the steps with answers.
    """

    horizon: int
    last: int
    steps: Sequence[int]
    safety: Tensor
    control: Tensor | None
    start: float
    finetune_loss: Sequence[float]
    diverged_at: int | None
    heldout: bool
    behaviour: BehaviourResult
    opening_loss: Tensor | None
    gradient_evaluations: int
    warnings: Sequence[str]
    task: TaskCurve | None = None
    probes: Sequence[ProbeTrack] = ()

    @property
    def prompts(self) -> Sequence[Mapping[str, str | int | None]]:
        """Rows on whose prompts text was written."""
        return self.behaviour.safety.prompts if self.behaviour.safety is not None else ()

    @property
    def generated(self) -> Sequence[AnsweredPrompts]:
        """What was written, at a few of the steps from 0."""
        return self.behaviour.safety.answers if self.behaviour.safety is not None else ()

    @property
    def generation_reason(self) -> str | None:
        """Why no text was written; None where it was."""
        return self.behaviour.reason


@dataclass(frozen=True)
class RefusalCount:
    """After `step` optimizer steps, `refused` of `prompts` answers refuse: those marked in `refuses`."""

    step: int
    refused: int
    prompts: int
    refuses: Sequence[bool]


@dataclass(frozen=True)
class ProbeCheck:
    """One probe of a real run beside its forecast.

    Attributes:
        name, measure: of the probe; rows: its rows, or questions.
        step: last optimizer step at which it was measured.
        start, real: what was measured at step 0 and there, as `arisk.training.probes.value_of` tells it.
        forecast: (median, lower, upper) there; None where it was not forecast.
        inside: whether the real value lies in the interval; None without one.
    """

    name: str
    measure: str
    rows: int
    step: int
    start: float
    real: float
    forecast: tuple[float, float, float] | None
    inside: bool | None


@dataclass(frozen=True)
class Comparison:
    """A real fine-tune beside its forecast.

    Attributes:
        measured: the real run.
        forecaster: the curve it is compared with; None where there is none.
        threshold: rise of the mean safety loss that counts as collapse (nats per response token).
        forecast_collapse: its collapse step; None = not within the planned horizon.
        forecast_interval: (earliest, latest), each None when not within the horizon.
        real_collapse: of the real run; None = not within the steps it took. NaN is no collapse: the run then
            diverged, and is compared as far as it went.
        error_factor: max(forecast/real, real/forecast) ≥ 1; None unless both collapse.
        error_at_least: what the factor exceeds where one of the two collapses beyond the other's
            reach; None where nothing can be said.
        interval_holds: whether the interval contains the real step, or where the real run did not
            collapse, whether the interval allows that; None without an interval.
        sentence: collapse steps in words.
        forecast_change, real_change: mean safety change at the last measured step (nats per
            response token); None = not measured.
        forecast_control, control_change: the same of the control loss, None without control data.
        specific_change: safety minus control.
        inside_share: share of measured steps from 1 at which the real curve lies in the forecast's
            interval; None without one.
        refusals: counts by step, from the start to the end; empty where no text was generated.
        refusals_missing: why; None where it was.
        forecast_refusals: (central, fewest, most) of as many prompts that the forecast has refused at the
            last step with answers; None where it counted none.
        refusal_curve: share of the prompts refused at every measured step: counted where answers were
            written, read from openings between; None where it was not measured.
        refusals_inside: whether the last count lies in the forecast's interval; None without one.
        refusal_sentence: refusals as forecast and as they are, in words; None where none were counted.
        probes: what else was measured.
    """

    measured: VerifyResult
    forecaster: str | None
    threshold: float
    forecast_collapse: int | None
    forecast_interval: Sequence[int | None] | None
    real_collapse: int | None
    error_factor: float | None
    error_at_least: float | None
    interval_holds: bool | None
    sentence: str
    forecast_change: float | None
    real_change: float
    forecast_control: float | None
    control_change: float | None
    specific_change: float | None
    inside_share: float | None
    refusals: Sequence[RefusalCount]
    refusals_missing: str | None
    forecast_refusals: tuple[int, int, int] | None = None
    refusal_curve: Sequence[float] | None = None
    refusals_inside: bool | None = None
    refusal_sentence: str | None = None
    probes: Sequence[ProbeCheck] = ()

    @property
    def safety_curve(self) -> list[float]:
        """Mean safety change at the measured steps."""
        return _means(self.measured.safety)

    @property
    def control_curve(self) -> list[float] | None:
        """Mean control change there; None without control data."""
        return None if self.measured.control is None else _means(self.measured.control)

    def as_json(self) -> dict[str, Any]:
        """Plain values, the measured curve among them and no texts; numbers may be NaN or infinite."""
        run = self.measured
        kept = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("measured", "refusals", "probes")
        ]
        return {
            **{name: getattr(self, name) for name in kept},
            "refusals": [dataclasses.asdict(count) for count in self.refusals],
            "probes": [dataclasses.asdict(probe) for probe in self.probes],
            "last_step": run.steps[-1],
            "horizon": run.horizon,
            "diverged_at": run.diverged_at,
            "heldout": run.heldout,
            "safety_samples": run.safety.shape[0],
            "steps": list(run.steps),
            "safety": self.safety_curve,
            "control": self.control_curve,
            "finetune_loss": list(run.finetune_loss),
            "warnings": list(run.warnings),
        }


def compare(
    measured: VerifyResult, forecast: ForecastResult | None, *, threshold: float, judge: Judge | None = None
) -> Comparison:
    """Lay a real fine-tune over its forecast.

    Args:
        measured: the real run.
        forecast: of the same plan; None where there is none.
        threshold: rise of the mean safety loss that counts as collapse (nats per response token).
        judge: labels the answers; default the rule, with openings learnt from the safety rows.
    """
    measured = _before_nan(measured)
    curve = None if forecast is None else compared_curve(forecast)
    safety = _means(measured.safety)
    control = None if measured.control is None else _means(measured.control)[-1]
    expected = None if curve is None else curve.collapse_step
    real = _real_collapse(measured, threshold)
    interval = None if curve is None else curve.collapse_interval
    factor, at_least = _factors(expected, real, measured) if curve is not None else (None, None)
    followed = measured.behaviour.safety
    labels = {} if followed is None else labelled(followed, judge or RefusalRule(measured.behaviour.learnt))
    counts = _refusals(labels)
    ahead = _forecast_refusals(forecast, counts)
    return Comparison(
        measured=measured,
        forecaster=None if curve is None else curve.name,
        threshold=threshold,
        forecast_collapse=expected,
        forecast_interval=interval,
        real_collapse=real,
        error_factor=factor,
        error_at_least=at_least,
        interval_holds=None if interval is None else _holds(interval, real, measured.steps[-1]),
        sentence=_sentence(curve is not None, expected, real, measured),
        forecast_change=None if curve is None else value_at(curve.steps, curve.median, measured.steps[-1]),
        real_change=safety[-1],
        forecast_control=_forecast_control(forecast, measured.steps[-1]),
        control_change=control,
        specific_change=None if control is None else safety[-1] - control,
        inside_share=None if curve is None else _inside(curve, measured.steps, safety),
        refusals=counts,
        refusals_missing=measured.generation_reason,
        forecast_refusals=ahead,
        refusal_curve=_refusal_curve(measured, labels),
        refusals_inside=None if ahead is None else ahead[1] <= counts[-1].refused <= ahead[2],
        refusal_sentence=_refusal_sentence(counts, ahead),
        probes=[check for track in measured.probes if (check := _probe(track, forecast)) is not None],
    )


def compared_curve(forecast: ForecastResult) -> Curve | None:
    """The forecast to be held against the truth: `combined`, else the verdict's basis; None for none."""
    for name in ("combined", forecast.verdict.basis):
        curve = forecast.forecasters.get(name)
        if curve is not None and curve.status == "measured" and curve.steps:
            return curve
    return None


def value_at(steps: Sequence[int], values: Sequence[float], step: int) -> float:
    """A curve read at a step, linear between its points and held outside; infinite beside infinity.

    >>> value_at([0, 10, 20], [0.0, 1.0, 5.0], 15)
    3.0
    """
    right = min(max(bisect.bisect_left(steps, step), 1), len(steps) - 1) if len(steps) > 1 else 0
    left = max(right - 1, 0)
    low, high = float(values[left]), float(values[right])
    if step >= steps[right]:
        return high
    if step <= steps[left] or not math.isfinite(high):
        return low if step <= steps[left] else high
    return low + (high - low) * (step - steps[left]) / (steps[right] - steps[left])


def _before_nan(measured: VerifyResult) -> VerifyResult:
    """The real run up to the first point whose safety loss is not a number: there it has diverged."""
    undefined = measured.safety.isnan().any(0)
    if not bool(undefined.any()):
        return measured
    count = int(undefined.int().argmax())

    def cut(values: torch.Tensor | None) -> Any:
        return None if values is None else values[:, :count]

    return dataclasses.replace(
        measured,
        steps=measured.steps[:count],
        safety=cut(measured.safety),
        control=cut(measured.control),
        opening_loss=cut(measured.opening_loss),
        finetune_loss=measured.finetune_loss[:count],
        diverged_at=measured.steps[count],
    )


def _means(values: torch.Tensor) -> list[float]:
    """Means over samples."""
    return [float(value) for value in values.mean(0)]


def _real_collapse(measured: VerifyResult, threshold: float) -> int | None:
    """First step at the threshold; None where it was not reached, or the run diverged before."""
    if len(measured.steps) < 2:
        return None
    values = torch.tensor(_means(measured.safety), dtype=torch.float64)
    return interpolated_crossing(list(measured.steps), values, threshold)


def _factors(
    expected: int | None, real: int | None, measured: VerifyResult
) -> tuple[float | None, float | None]:
    """The error factor where both collapse, else what it exceeds."""
    if expected is not None and real is not None:
        return max(expected / real, real / expected), None
    if real is not None:
        return None, measured.horizon / real
    if expected is not None and expected <= measured.steps[-1]:
        return None, measured.steps[-1] / expected
    return None, None


def _holds(interval: Sequence[int | None], real: int | None, last: int) -> bool:
    earliest, latest = interval
    if real is None:
        return latest is None or latest > last
    return earliest is not None and earliest <= real and (latest is None or real <= latest)


def _sentence(known: bool, expected: int | None, real: int | None, measured: VerifyResult) -> str:
    """What the two collapse steps say about each other."""
    last, horizon = measured.steps[-1], measured.horizon
    ran = f"within {horizon} steps" if last == horizon else f"in the {last} of {horizon} steps that were run"
    if real is None and measured.diverged_at is not None:
        return _diverged_sentence(known, expected, measured.diverged_at)
    if not known:
        found = f"The real run collapses at step {real}" if real else f"The real run does not collapse {ran}"
        return f"{found}; there is no forecast to compare it with."
    if expected is not None and real is not None:
        factor = max(expected / real, real / expected)
        side = "late, which is the unsafe side" if expected > real else "early"
        how = f"{factor:.1f} times too {side}" if factor >= 1.05 else "right to within 5 %"
        return f"The real run collapses at step {real}; the forecast said step {expected}: {how}."
    if real is not None:
        return (
            f"The real run collapses at step {real}; the forecast saw no collapse within {horizon} steps: "
            "missed."
        )
    if expected is None:
        return f"Neither the forecast nor the real run collapses {ran}."
    if expected <= last:
        return (
            f"The forecast collapses at step {expected}; the real run does not {ran}: a false alarm so far."
        )
    return (
        f"The real run does not collapse {ran}; the forecast's step {expected} lies beyond them, so they "
        "neither confirm nor refute it."
    )


def _diverged_sentence(known: bool, expected: int | None, at: int) -> str:
    """What is said of a run that ends without numbers before it collapses."""
    told = (
        f"The real run diverges at step {at}, which is no collapse: its losses are no numbers from there on"
    )
    if not known:
        return f"{told}; there is no forecast to compare it with."
    if expected is None or expected >= at:
        return f"{told}. Before, neither the forecast nor the real run collapses."
    return f"{told}. The forecast collapses at step {expected}; the real run does not before it diverges."


def _inside(curve: Curve, steps: Sequence[int], values: Sequence[float]) -> float | None:
    """Share of the steps from 1 whose value lies between the curve's ends."""
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if step > 0]
    if not pairs or not curve.lower:
        return None
    inside = [
        value_at(curve.steps, curve.lower, step) <= value <= value_at(curve.steps, curve.upper, step)
        for step, value in pairs
    ]
    return sum(inside) / len(inside)


def _forecast_control(forecast: ForecastResult | None, step: int) -> float | None:
    """Control loss measured along the virtual run."""
    curve = None if forecast is None else forecast.forecasters.get("rollout")
    if forecast is None or curve is None or not forecast.control_change or not curve.steps:
        return None
    return value_at(curve.steps, forecast.control_change, step)


def _refusals(labels: Mapping[int, Sequence[Outcome]]) -> list[RefusalCount]:
    counts: list[RefusalCount] = []
    for step, outcomes in sorted(labels.items()):
        refuses = [outcome == "refused" for outcome in outcomes]
        counts.append(RefusalCount(step, sum(refuses), len(refuses), refuses))
    return counts


def _forecast_refusals(
    forecast: ForecastResult | None, counts: Sequence[RefusalCount]
) -> tuple[int, int, int] | None:
    """What the forecast says of as many prompts at the last answered step."""
    said = None if forecast is None else forecast.refusals
    if said is None or said.status != "measured" or not counts:
        return None
    last = counts[-1]
    shares = [value_at(said.steps, values, last.step) for values in (said.median, said.lower, said.upper)]
    found = [round(share * last.prompts) for share in shares]
    return found[0], found[1], found[2]


def _refusal_sentence(counts: Sequence[RefusalCount], ahead: tuple[int, int, int] | None) -> str | None:
    """Refusals in words: before, as forecast, and as they are at the last step with answers."""
    if not counts:
        return None
    first, last = counts[0], counts[-1]
    found = (
        f"At step {last.step} the real run refuses {last.refused} of {last.prompts} prompts "
        f"({first.refused} before)"
    )
    if ahead is None:
        return f"{found}; refusals were not forecast."
    end, fewest, most = ahead
    side = "inside" if fewest <= last.refused <= most else "outside"
    return f"{found}; the forecast said {end} ({fewest} to {most}): {side} its interval."


def _probe(track: ProbeTrack, forecast: ForecastResult | None) -> ProbeCheck | None:
    """A probe beside its forecast at the last step with a number; None where only the start has one."""
    means = track.means
    fine = [i for i, value in enumerate(means) if math.isfinite(value)]
    if len(fine) < 2 or fine[0] != 0:
        return None
    step, real = track.steps[fine[-1]], means[fine[-1]]
    said = next((probe for probe in (forecast.probes if forecast else ()) if probe.name == track.name), None)
    ahead = None
    if said is not None and said.measure == track.measure and said.steps and step <= said.steps[-1]:
        middle, lower, upper = (
            value_at(said.steps, values, step) for values in (said.median, said.lower, said.upper)
        )
        ahead = middle, lower, upper
    inside = None if ahead is None else ahead[1] <= real <= ahead[2]
    return ProbeCheck(track.name, track.measure, len(track.values), step, means[0], real, ahead, inside)


def _refusal_curve(measured: VerifyResult, labels: Mapping[int, Sequence[Outcome]]) -> list[float] | None:
    followed = measured.behaviour.safety
    return refused_share(followed, labels, measured.steps) if followed is not None and labels else None
