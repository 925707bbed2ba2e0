"""What the Python API returns: every stage's record, with the peer package's names beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arisk.comparison import Comparison, compare
from arisk.refusals import DEFAULT_MARKERS
from arisk.results import (
    CollectResult,
    ForecastResult,
    OverlapNulls,
    RolloutResult,
    ScoreResult,
    SubspaceResult,
    Verdict,
)
from arisk.verified import VerifyResult

__all__ = ["RiskReport"]


@dataclass(frozen=True, repr=False)
class RiskReport:
    """What was found: the records of every stage, with the peer package's names beside them.

    Attributes:
        collected: per-sample safety gradients through their inner products.
        subspace: the safety subspace.
        scored: how the planned update meets it.
        rollout: losses measured along the virtual run.
        forecast: curves and verdict; `forecast.collapse_step`, `forecast.forecasters["local"]`.
    """

    collected: CollectResult
    subspace: SubspaceResult
    scored: ScoreResult
    rollout: RolloutResult
    forecast: ForecastResult

    @property
    def verdict(self) -> Verdict:
        """Level, sentence and reasons."""
        return self.forecast.verdict

    @property
    def warning(self) -> str:
        """The verdict in one line, level first."""
        return f"{self.verdict.level}: {self.verdict.sentence}"

    @property
    def initial_risk(self) -> OverlapNulls:
        """Overlap of the update with the safety subspace, with its nulls."""
        return self.scored.overlap

    @property
    def curvature(self) -> Mapping[str, float]:
        """γ̂ and ε̂ of the Alignment Instability Condition."""
        return {"gamma_hat": self.scored.gamma_hat, "epsilon_hat": self.scored.epsilon_hat}

    def compare(self, measured: VerifyResult, markers: Sequence[str] = DEFAULT_MARKERS) -> Comparison:
        """A real run of the same plan beside this forecast."""
        return compare(measured, self.forecast, threshold=self.forecast.threshold, markers=markers)

    def html(self, *, title: str = "arisk", show_text: bool = True, check: Comparison | None = None) -> str:
        """The report as one self-contained HTML page, with the real run where `check` has one."""
        from arisk.report import render_report

        return render_report(
            self.collected,
            self.subspace,
            self.scored,
            self.forecast,
            title=title,
            provenance={"source": "Python API"},
            show_text=show_text,
            max_examples=25,
            check=check,
            measured=self.rollout,
        )

    def __repr__(self) -> str:
        return f"RiskReport({self.warning!r})"
