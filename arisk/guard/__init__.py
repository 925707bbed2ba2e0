"""Fine-tuning with protection: penalties on drift along what the model's safety is sensitive to.

The public names load torch when they are first used, so that stage and record do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arisk.guard.build import build_mitigator, matched_sites
    from arisk.guard.directions import FisherMass, SafetyDirections, fisher_mass, safety_directions
    from arisk.guard.factored import Factored
    from arisk.guard.mitigator import LoRAMitigator, PenaltyTerms, RegularizedLoss
    from arisk.guard.projection import leading_directions, outside, without_conflict
    from arisk.guard.relaxation import relax
    from arisk.guard.replay import SafetyBatches
    from arisk.guard.rivals import ewc_penalty, fisher_diagonals, per_sample_rows
    from arisk.guard.settings import AlignGuardConfig
    from arisk.guard.sites import Site, adapter_sites, weight_sites
    from arisk.guard.watch import mean_loss

__all__ = [
    "AlignGuardConfig",
    "Factored",
    "FisherMass",
    "LoRAMitigator",
    "PenaltyTerms",
    "RegularizedLoss",
    "SafetyBatches",
    "SafetyDirections",
    "Site",
    "adapter_sites",
    "build_mitigator",
    "ewc_penalty",
    "fisher_diagonals",
    "fisher_mass",
    "leading_directions",
    "matched_sites",
    "mean_loss",
    "outside",
    "per_sample_rows",
    "relax",
    "safety_directions",
    "weight_sites",
    "without_conflict",
]

_HOME = {
    **dict.fromkeys(("build_mitigator", "matched_sites"), "build"),
    **dict.fromkeys(("FisherMass", "SafetyDirections", "fisher_mass", "safety_directions"), "directions"),
    "Factored": "factored",
    **dict.fromkeys(("LoRAMitigator", "PenaltyTerms", "RegularizedLoss"), "mitigator"),
    **dict.fromkeys(("leading_directions", "outside", "without_conflict"), "projection"),
    "relax": "relaxation",
    "SafetyBatches": "replay",
    **dict.fromkeys(("ewc_penalty", "fisher_diagonals", "per_sample_rows"), "rivals"),
    "AlignGuardConfig": "settings",
    **dict.fromkeys(("Site", "adapter_sites", "weight_sites"), "sites"),
    "mean_loss": "watch",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name in _HOME:
        return getattr(import_module(f"arisk.guard.{_HOME[name]}"), name)
    raise AttributeError(f"module 'arisk.guard' has no attribute {name!r}")
