"""Fine-tuning with protection: penalties on drift along what the model's safety is sensitive to."""

from __future__ import annotations

from arisk.guard.build import build_mitigator, matched_sites
from arisk.guard.directions import FisherMass, SafetyDirections, fisher_mass, safety_directions
from arisk.guard.factored import Factored
from arisk.guard.mitigator import LoRAMitigator, PenaltyTerms, RegularizedLoss
from arisk.guard.settings import AlignGuardConfig
from arisk.guard.sites import Site, adapter_sites, weight_sites

__all__ = [
    "AlignGuardConfig",
    "Factored",
    "FisherMass",
    "LoRAMitigator",
    "PenaltyTerms",
    "RegularizedLoss",
    "SafetyDirections",
    "Site",
    "adapter_sites",
    "build_mitigator",
    "fisher_mass",
    "matched_sites",
    "safety_directions",
    "weight_sites",
]
