"""The sections of the report, composed: each may use what those of later stages share."""

from __future__ import annotations

from collections.abc import Sequence

from arisk.anatomy import page as anatomy_page
from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.forecast import page as forecast_page
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.report.page import Section
from arisk.verification import page as verification_page
from arisk.verification.truth import Comparison

__all__ = ["sections_of"]


def sections_of(
    collected: CollectResult,
    space: SubspaceResult,
    scored: ScoreResult,
    forecast: ForecastResult,
    measured: RolloutResult,
    *,
    show_text: bool,
    max_examples: int,
    check: Comparison | None = None,
    more: Sequence[Section] = (),
) -> list[Section]:
    """What every capability shows, in the order of the stages.

    Args:
        collected: safety side.
        space: safety subspace.
        scored: how the first update meets it.
        forecast: curves and verdict.
        measured: the rollout behind them.
        show_text: show prompts and responses, or only their numbers.
        max_examples: rows of tables of examples.
        check: a real run beside the forecast, where there is one.
        more: sections of stages after verify.
    """
    truth = verification_page.section(check, forecast, show_text=show_text)
    answer = forecast_page.section(
        forecast,
        measured,
        task=collected.task,
        collected=collected,
        real=truth.shared.get("real_run"),
        show_text=show_text,
        max_examples=max_examples,
    )
    why = anatomy_page.section(
        collected,
        space,
        scored,
        threshold=answer.shared["threshold"],
        specificity_told=answer.shared["specificity_told"],
        worth=answer.shared["worth"],
        show_text=show_text,
        max_examples=max_examples,
    )
    return [why, answer, truth, *more]
