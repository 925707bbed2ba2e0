"""Every figure of the report by id; one module each makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.anatomy.page import fisher_map, harm_map, overlap, spectrum, virtual_move
from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast.page import drift_map, forecast_fan
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.forecast.rollout_page import sample_drift
from arisk.forecast.what_if_page import what_if_map
from arisk.report.costs import stage_costs
from arisk.report.figure import Figure
from arisk.verification.page import truth_figure
from arisk.verification.truth import Comparison

__all__ = ["all_figures"]


def all_figures(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    measured: RolloutResult,
    check: Comparison | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Figure]:
    """Every figure by id, in the order of the page; `truth` only where a real run was measured."""
    made = [
        forecast_fan(forecast, measured, check),
        *([truth_figure(check, forecast)] if check else []),
        what_if_map(forecast.what_if),
        drift_map(forecast),
        virtual_move(scored, forecast.threshold),
        sample_drift(measured, forecast, collected),
        spectrum(space),
        fisher_map(collected, space),
        harm_map(collected, scored),
        overlap(scored),
        stage_costs(provenance or {}),
    ]
    return {figure.id: figure for figure in made}
