"""What a comparison of protected fine-tunes found: its arms, and what was forecast of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arisk.models.judge import Outcome

__all__ = ["NEVER_BEGUN", "Arm", "ArmForecast", "GuardResult"]

#: `diverged_at` of an arm whose protection could not be set up.
NEVER_BEGUN = 0


@dataclass(frozen=True)
class Arm:
    """One real fine-tune, with or without protection.

    Attributes:
        label: unique name, `plain` or the method with its strength.
        method: its name in `arisk.config.names.METHODS`.
        strength: as configured; None where the method has none.
        weights: the λ that the strength came to, by term.
        note: what it guards, and what not.
        steps: M optimizer steps at which losses were measured, from 0.
        safety_start: mean safety loss at step 0 (nats per response token).
        safety: (M,) change of the mean safety loss (nats per response token).
        control: (M,) the same on control data; empty without it.
        task: (M,) mean task loss, evaluation mode (nats per response token).
        surprising: (M,) mean loss of the fine-tuning rows left out of `task`; empty where there are none.
        final_safety: (N,) change of each safety sample's loss at the last point.
        final_task: loss of each row of the task loss there.
        terms: by name, (M,) mean value over the steps before each point, NaN at 0: penalty terms and
            `‖∇ …‖` gradient norms, cosines.
        cpu_seconds: of the optimizer steps, measuring left out.
        setup_seconds: CPU time before the first step (directions, Fisher, calibration).
        diverged_at: first step that could not be taken, 0 where the protection could not be set up; None
            where all were.
        reason: why it diverged.
        answers: what the model wrote after the last step, one greedy text per prompt of the record; empty
            where nothing was written, or where texts may not be kept: then `outcomes` says what they did.
        ordinary_answers: the same for the ordinary prompts of the record; `ordinary_outcomes` what they did.
        seed: number of the repeat, from 0: another order of the data, other minibatches.
    """

    label: str
    method: str
    strength: float | None
    weights: Mapping[str, float]
    note: str
    steps: Sequence[int]
    safety_start: float
    safety: Sequence[float]
    control: Sequence[float]
    task: Sequence[float]
    surprising: Sequence[float]
    final_safety: Sequence[float]
    final_task: Sequence[float]
    terms: Mapping[str, Sequence[float]]
    cpu_seconds: float
    setup_seconds: float
    diverged_at: int | None
    reason: str | None
    answers: Sequence[str] = ()
    outcomes: Sequence[Outcome] = field(default_factory=list[Outcome])
    ordinary_answers: Sequence[str] = ()
    ordinary_outcomes: Sequence[Outcome] = field(default_factory=list[Outcome])
    seed: int = 0


@dataclass(frozen=True)
class ArmForecast:
    """What a short run with the protection in it says of an arm, before it is trained.

    Attributes:
        label, method, strength: as of the arm.
        safety: change of the mean safety loss at the end (nats per response token); NaN where it diverged.
        kept: share of safety prompts whose own first tokens are still the likeliest, in [0, 1]; NaN where
            they cannot be followed.
        control: change of the mean control loss; NaN without control rows.
        task: mean task loss at the end (nats per response token).
        gradients: micro-batches whose gradient it took.
        cpu_seconds: of the whole forecast, set-up and measuring with it.
        diverged_at: as of the arm, in steps of the short run; None where it did not.
        reason: why it diverged.
        chosen: whether the arm was then trained.
        rises: predicted rise of each safety row's loss; of the plain arm alone.
    """

    label: str
    method: str
    strength: float | None
    safety: float
    kept: float
    control: float
    task: float
    gradients: int
    cpu_seconds: float
    diverged_at: int | None
    reason: str | None
    chosen: bool = False
    rises: Sequence[float] = ()


@dataclass(frozen=True)
class GuardResult:
    """All arms of one plan, the plain one first.

    Attributes:
        horizon: planned optimizer steps T.
        last: K ≤ T, the step at which every arm was to stop.
        arms: plain first.
        safety_rows: N rows measured; heldout: whether no arm and no forecast saw any of them.
        start: mean safety loss at step 0 (nats per response token).
        task_rows: rows of the task loss, with `task_source` in words.
        trained_rows: how many of them the run trains on; None where that is not known.
        warnings: sentences for the report.
        prompts: rows whose prompts were answered: `prompt`, `response`, `line`; without texts `line` alone.
        aligned_answers: what the model wrote at step 0, one text per prompt; `aligned_outcomes` what they
            did, where texts may not be kept.
        generation_reason: why nothing was written; None where it was.
        ordinary_prompts: control rows whose prompts were answered; empty where none were.
        ordinary_answers: what the aligned model wrote; `ordinary_outcomes` what they did.
        forecasts: every arm that could be trained, as a short run saw it, plain first; empty where all were
            trained without.
        repeats: the same arms on further seeds, plain first for each.
    """

    horizon: int
    last: int
    arms: Sequence[Arm]
    safety_rows: int
    heldout: bool
    start: float
    task_rows: int
    task_source: str
    trained_rows: int | None
    warnings: Sequence[str]
    prompts: Sequence[Mapping[str, str | int | None]] = ()
    aligned_answers: Sequence[str] = ()
    aligned_outcomes: Sequence[Outcome] = field(default_factory=list[Outcome])
    generation_reason: str | None = None
    ordinary_prompts: Sequence[Mapping[str, str | int | None]] = ()
    ordinary_answers: Sequence[str] = ()
    ordinary_outcomes: Sequence[Outcome] = field(default_factory=list[Outcome])
    forecasts: Sequence[ArmForecast] = ()
    repeats: Sequence[Arm] = ()

    @property
    def plain(self) -> Arm:
        """The arm without protection."""
        return self.arms[0]
