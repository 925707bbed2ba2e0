"""arisk: will this fine-tune break the model's safety, when, and because of which data and layers?

The public names load torch when they are first used; `import arisk` does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arisk.api import AlignmentRiskPipeline
    from arisk.assessment import assess, protect, screen, verify
    from arisk.comparison import Comparison
    from arisk.config import Config
    from arisk.errors import AriskError
    from arisk.guard import AlignGuardConfig, LoRAMitigator
    from arisk.guarded import GuardResult
    from arisk.peer_results import (
        CurvatureCouplingResult,
        InitialRiskScore,
        ParameterSlice,
        SafetyForecast,
        SensitivitySubspace,
    )
    from arisk.python_config import FisherConfig, PipelineConfig
    from arisk.risk_report import RiskReport
    from arisk.screened import ScreenResult
    from arisk.task import LoraPair, SampleSet, Task
    from arisk.verified import VerifyResult

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
    "RiskReport",
    "SafetyForecast",
    "SampleSet",
    "ScreenResult",
    "SensitivitySubspace",
    "Task",
    "VerifyResult",
    "assess",
    "protect",
    "screen",
    "verify",
]

_HOME = {
    "AlignGuardConfig": "arisk.guard.settings",
    "AlignmentRiskPipeline": "arisk.api",
    "AriskError": "arisk.errors",
    "Comparison": "arisk.comparison",
    "Config": "arisk.config",
    "CurvatureCouplingResult": "arisk.peer_results",
    "FisherConfig": "arisk.python_config",
    "GuardResult": "arisk.guarded",
    "InitialRiskScore": "arisk.peer_results",
    "LoRAMitigator": "arisk.guard.mitigator",
    "LoraPair": "arisk.task",
    "ParameterSlice": "arisk.peer_results",
    "PipelineConfig": "arisk.python_config",
    "RiskReport": "arisk.risk_report",
    "SafetyForecast": "arisk.peer_results",
    "SampleSet": "arisk.task",
    "ScreenResult": "arisk.screened",
    "SensitivitySubspace": "arisk.peer_results",
    "Task": "arisk.task",
    "VerifyResult": "arisk.verified",
    "assess": "arisk.assessment",
    "protect": "arisk.assessment",
    "screen": "arisk.assessment",
    "verify": "arisk.assessment",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'arisk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
