"""Settings of the AlignGuard regulariser; no torch is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from arisk.config.python import PythonSettings
from arisk.config.sections import NonNegativeFloat, PositiveInt

__all__ = ["AlignGuardConfig"]


class AlignGuardConfig(PythonSettings):
    """Weights and form of the penalty; the defaults of the weights are those of the peer package."""

    lambda_a: NonNegativeFloat = 0.25
    """λ_A of the Fisher term ‖F^½ΔW_A‖²: drift that safety is sensitive to."""
    lambda_t: NonNegativeFloat = 0.5
    """λ_T of the task term ‖H^½ΔW_T‖²: the rest of the drift."""
    lambda_nc: NonNegativeFloat = 0.1
    """λ_NC of the two collision terms, overlap and geodesic."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of λ_NC that the overlap term has; 0 skips this, the one costly term."""
    beta: NonNegativeFloat = 4.0
    """β in η_j = 1 + βσ(|ΔW_j| − τ), the extra weight of large entries in the overlap term."""
    tau: NonNegativeFloat = 0.01
    """τ in η_j, in units of a weight."""
    overlap_rows: PositiveInt | None = None
    """Output rows per matrix on which the overlap term is estimated, other ones at every call: unbiased,
    and cheap. null: all of them, exactly."""
    task_metric: Literal["identity", "fisher_diagonal"] | Callable[..., Any] = "identity"
    """H. identity: plain ‖ΔW_T‖²; fisher_diagonal: of the fine-tuning loss, rank one per matrix, mean 1;
    or `(weight name, ΔW_T as arisk.guard.Factored) -> scalar tensor` in its place."""
    split: Literal["subspace", "blocks"] = "subspace"
    """ΔW_A. subspace: PΔW with the projector on the safety subspace; blocks: output rows by Fisher mass."""
    rank: PositiveInt | None = None
    """Directions of the safety subspace in ΔW space; default that of the report's subspace, else 32."""
    width: PositiveInt = 32
    """Rows and columns of the core into which each matrix's safety gradients are compressed."""
    metric_batches: PositiveInt = 8
    """Fine-tuning batches that `fisher_diagonal` is measured on."""
    chunk_size: PositiveInt = 8
    """Samples per backward pass while the directions are measured; memory grows with it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random compression; the global random state is not used."""
