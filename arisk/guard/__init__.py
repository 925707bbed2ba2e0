"""Fine-tuning with protection: penalties on drift along what the model's safety is sensitive to."""

from __future__ import annotations

from arisk.guard.build import build_mitigator, matched_sites
from arisk.guard.directions import FisherMass, SafetyDirections, fisher_mass, safety_directions
from arisk.guard.ewc import ewc_penalty, fisher_diagonals, per_sample_rows
from arisk.guard.factored import Factored
from arisk.guard.mitigator import LoRAMitigator, PenaltyTerms, RegularizedLoss
from arisk.guard.projection import leading_directions, outside, without_conflict
from arisk.guard.relaxation import relax
from arisk.guard.replay import SafetyBatches
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
