"""What a real fine-tune showed: the record of stage verify, in the terms of `arisk.forecast.record`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from arisk.training.behaviour import AnsweredPrompts, BehaviourResult

__all__ = ["TaskCurve", "VerifyResult"]


@dataclass(frozen=True)
class TaskCurve:
    """Task loss along the run, measured as stage guard measures its arms: the plain one is this run.

    Attributes:
        rows: digest of the rows.
        loss: (M,) mean over them (nats per response token).
        surprising: (M,) mean over the fine-tuning rows kept apart; empty where there are none.
        cpu_seconds: of the optimizer steps, measuring left out.
    """

    rows: str
    loss: Sequence[float]
    surprising: Sequence[float]
    cpu_seconds: float


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
