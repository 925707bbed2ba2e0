"""Fine-tuning with protection: penalties on drift along what the model's safety is sensitive to.

The public names load torch when they are first used, so that stage and record do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arisk.guard.afterwards import Averages, between
    from arisk.guard.directions import (
        FisherMass,
        SafetyDirections,
        Site,
        adapter_sites,
        fisher_mass,
        safety_directions,
        weight_sites,
    )
    from arisk.guard.in_loop import (
        Addition,
        MovePart,
        Relaxation,
        RunAverage,
        consolidation,
        divergence,
        projection,
        replay,
        subspace_projection,
    )
    from arisk.guard.minibatches import SafetyBatches, mean_loss
    from arisk.guard.mitigator import (
        AlignGuardConfig,
        LoRAMitigator,
        PenaltyTerms,
        RegularizedLoss,
        build_mitigator,
        matched_sites,
    )
    from arisk.guard.relaxation import relax
    from arisk.guard.rivals import (
        ewc_penalty,
        fisher_diagonals,
        leading_directions,
        outside,
        per_sample_rows,
        safety_subspace,
        without_conflict,
    )
    from arisk.guard.smaller import loss_rises, rows_at_risk, smaller_share
    from arisk.guard.terms import Factored
    from arisk.models.answers import own_refusals

__all__ = [
    "Addition",
    "AlignGuardConfig",
    "Averages",
    "Factored",
    "FisherMass",
    "LoRAMitigator",
    "MovePart",
    "PenaltyTerms",
    "RegularizedLoss",
    "Relaxation",
    "RunAverage",
    "SafetyBatches",
    "SafetyDirections",
    "Site",
    "adapter_sites",
    "between",
    "build_mitigator",
    "consolidation",
    "divergence",
    "ewc_penalty",
    "fisher_diagonals",
    "fisher_mass",
    "leading_directions",
    "loss_rises",
    "matched_sites",
    "mean_loss",
    "outside",
    "own_refusals",
    "per_sample_rows",
    "projection",
    "relax",
    "replay",
    "rows_at_risk",
    "safety_directions",
    "safety_subspace",
    "smaller_share",
    "subspace_projection",
    "weight_sites",
    "without_conflict",
]

_NAMES = {
    "afterwards": (
        "Averages",
        "between",
    ),
    "directions": (
        "FisherMass",
        "SafetyDirections",
        "Site",
        "adapter_sites",
        "fisher_mass",
        "safety_directions",
        "weight_sites",
    ),
    "in_loop": (
        "Addition",
        "MovePart",
        "Relaxation",
        "RunAverage",
        "consolidation",
        "divergence",
        "projection",
        "replay",
        "subspace_projection",
    ),
    "minibatches": (
        "SafetyBatches",
        "mean_loss",
    ),
    "mitigator": (
        "AlignGuardConfig",
        "LoRAMitigator",
        "PenaltyTerms",
        "RegularizedLoss",
        "build_mitigator",
        "matched_sites",
    ),
    "references": ("own_refusals",),
    "relaxation": ("relax",),
    "rivals": (
        "ewc_penalty",
        "fisher_diagonals",
        "leading_directions",
        "outside",
        "per_sample_rows",
        "safety_subspace",
        "without_conflict",
    ),
    "smaller": ("loss_rises", "rows_at_risk", "smaller_share"),
    "terms": ("Factored",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name in _HOME:
        return getattr(import_module(f"arisk.guard.{_HOME[name]}"), name)
    raise AttributeError(f"module 'arisk.guard' has no attribute {name!r}")
