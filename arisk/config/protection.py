"""Settings of stage guard: which protected fine-tunes are run, and how hard each protects. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from arisk.config.sections import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

__all__ = [
    "AlignGuardArm",
    "EwcArm",
    "GuardSettings",
    "Method",
    "ProjectionArm",
    "ReplayArm",
]

Method = Literal["plain", "alignguard", "ewc", "projection", "replay"]
Relaxation = Annotated[float, Field(gt=0, lt=4)]


class AlignGuardArm(Section):
    """The AlignGuard penalty, in ΔW coordinates."""

    strengths: Annotated[list[PositiveFloat | Literal["as_given"]], Field(min_length=1)] = Field(
        default=["as_given", 3.0]
    )
    """One arm each: the penalty's gradient over the task's after the calibration steps; as_given: the
    weights λ of `AlignGuardConfig` and directions of rank 32 at temperature 1."""
    relaxations: list[Relaxation] = Field(default=[1.5])
    """One arm each: the Fisher term applied after each optimizer step instead of in the loss, by this share
    of Polyak's step; needs no λ."""
    repeats: PositiveInt = 3
    """Relaxation steps per optimizer step."""
    temperature: PositiveFloat | None = None
    """Directions are those of the safety loss at logits / this: at 1 the gradients of a well aligned model
    have all but vanished, and with them most directions. Default 4, or 1 for a loss given from Python."""
    task_share: NonNegativeFloat = 0.0
    """Gradient of the task term ‖ΔW_T‖² over that of the Fisher term, set at calibration."""
    overlap_share: NonNegativeFloat = 0.0
    """Gradient of the overlap term over that of the Fisher term, set at calibration."""
    rank: PositiveInt = 96
    """Directions of the safety subspace in ΔW space."""
    width: PositiveInt = 32
    """Rows and columns of the core into which each matrix's safety gradients are compressed."""
    overlap_rows: PositiveInt | None = 64
    """Output rows per matrix and step on which the overlap term is estimated (unbiased); null: all."""
    split: Literal["subspace", "blocks"] = "subspace"
    """ΔW_A. subspace: PΔW, whose geodesic term is zero; blocks: output rows by Fisher mass."""


class EwcArm(Section):
    """Elastic weight consolidation: λ Σ_j F_jj (θ_j − θ*_j)², F of the safety data, θ what trains."""

    strengths: Annotated[list[PositiveFloat], Field(min_length=1)] = Field(default=[10.0])
    """One arm each: the penalty's gradient over the task's after the calibration steps."""
    relaxations: list[Relaxation] = Field(default=[1.5])
    """One arm each: the penalty applied after each optimizer step, as for alignguard."""
    repeats: PositiveInt = 3
    """Relaxation steps per optimizer step."""
    temperature: PositiveFloat = 1.0
    """The Fisher diagonal is that of the safety loss at logits / this."""


class ProjectionArm(Section):
    """Fine-tuning gradients without what is against safety, before clipping and optimizer."""

    kinds: Annotated[list[Literal["conflict", "subspace"]], Field(min_length=1)] = Field(default=["conflict"])
    """One arm each. conflict: the component against a safety minibatch's gradient here, where there is
    one; subspace: every component in the leading safety directions at the aligned point."""
    rank: PositiveInt = 32
    """Directions of `subspace`, in the coordinates that train."""
    rows: PositiveInt = 8
    """Safety rows of each minibatch of `conflict`."""


class ReplayArm(Section):
    """A small safety minibatch's loss, mixed into every step: the plain remedy."""

    strengths: Annotated[list[PositiveFloat], Field(min_length=1)] = Field(default=[0.1, 0.3])
    """One arm each: λ of L = L_task + λ L_safety."""
    rows: PositiveInt = 8
    """Safety rows per optimizer step."""


class GuardSettings(Section):
    """The planned fine-tune with and without protection (`arisk guard`)."""

    methods: Annotated[list[Method], Field(min_length=1)] = Field(
        default=["plain", "alignguard", "ewc", "projection", "replay"]
    )
    """What is run, in this order; plain, against which all is measured, always comes first."""
    steps: PositiveInt | None = None
    """Stop after this many optimizer steps, on the schedule of the whole plan; default all of them."""
    alignguard: AlignGuardArm = AlignGuardArm()
    """Settings of the AlignGuard arms."""
    ewc: EwcArm = EwcArm()
    """Settings of the EWC arms."""
    projection: ProjectionArm = ProjectionArm()
    """Settings of the projection arms."""
    replay: ReplayArm = ReplayArm()
    """Settings of the replay arms."""
    calibration_steps: PositiveInt = 10
    """Plain steps after which penalty and task gradients are compared, to set λ from a strength."""
    task_samples: PositiveInt = 64
    """Rows on which the task loss is measured."""
    control_samples: PositiveInt = 64
    """Control samples measured at every point."""
    generate: Annotated[int, Field(ge=0)] = 16
    """Safety prompts that are answered in text at the start and by every arm at its end; 0 is off."""
    max_new_tokens: PositiveInt = 24
    """Tokens of each answer; a refusal shows in its opening."""
    tolerated_task_loss: NonNegativeFloat = 0.05
    """A recommended arm's task loss is at most this share above the plain arm's."""
    wanted_drift: Fraction = 0.5
    """A recommended arm's safety drift is at most this share of the plain arm's."""

    @field_validator("methods")
    @classmethod
    def _plain_first(cls, methods: list[Method]) -> list[Method]:
        if len(set(methods)) != len(methods):
            raise ValueError("a method stands twice")
        return ["plain", *(method for method in methods if method != "plain")]
