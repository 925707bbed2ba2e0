"""arisk: will this fine-tune break the model's safety, when, and because of which data and layers?

The public names load torch when they are first used; `import arisk` does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arisk.api import AlignmentRiskPipeline, assess, protect, screen, verify
    from arisk.base.errors import AriskError
    from arisk.base.task import LoraPair, ProbeRows, SampleSet, Task
    from arisk.config.plan import Config
    from arisk.config.python import FisherConfig, PipelineConfig
    from arisk.guard import AlignGuardConfig, LoRAMitigator
    from arisk.guard.record import GuardResult
    from arisk.in_trainer import PreflightCallback, preflight
    from arisk.peer import (
        CurvatureCouplingResult,
        InitialRiskScore,
        ParameterSlice,
        SafetyForecast,
        SensitivitySubspace,
    )
    from arisk.risk_report import RiskReport
    from arisk.screening.record import ScreenResult
    from arisk.verification.record import Comparison, VerifyResult

__all__ = [
    "AlignGuardConfig",
    "AlignmentRiskPipeline",
    "AriskError",
    "Comparison",
    "Config",
    "CurvatureCouplingResult",
    "FisherConfig",
    "GuardResult",
    "InitialRiskScore",
    "LoRAMitigator",
    "LoraPair",
    "ParameterSlice",
    "PipelineConfig",
    "PreflightCallback",
    "ProbeRows",
    "RiskReport",
    "SafetyForecast",
    "SampleSet",
    "ScreenResult",
    "SensitivitySubspace",
    "Task",
    "VerifyResult",
    "assess",
    "preflight",
    "protect",
    "screen",
    "verify",
]

_HOME = {
    "AlignGuardConfig": "arisk.guard.mitigator",
    "AlignmentRiskPipeline": "arisk.api",
    "AriskError": "arisk.base.errors",
    "Comparison": "arisk.verification.record",
    "Config": "arisk.config.plan",
    "CurvatureCouplingResult": "arisk.peer",
    "FisherConfig": "arisk.config.python",
    "GuardResult": "arisk.guard.record",
    "InitialRiskScore": "arisk.peer",
    "LoRAMitigator": "arisk.guard.mitigator",
    "LoraPair": "arisk.base.task",
    "ParameterSlice": "arisk.peer",
    "PipelineConfig": "arisk.config.python",
    "PreflightCallback": "arisk.in_trainer",
    "ProbeRows": "arisk.base.task",
    "RiskReport": "arisk.risk_report",
    "SafetyForecast": "arisk.peer",
    "SampleSet": "arisk.base.task",
    "ScreenResult": "arisk.screening.record",
    "SensitivitySubspace": "arisk.peer",
    "Task": "arisk.base.task",
    "VerifyResult": "arisk.verification.record",
    "assess": "arisk.api",
    "preflight": "arisk.in_trainer",
    "protect": "arisk.api",
    "screen": "arisk.api",
    "verify": "arisk.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'arisk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
