"""The loss of the first tokens of the safe responses along the plan: a witness beside the mean.

A mean over fifty tokens of a refusal hardly notices that the first three have turned. Values come from the
forward passes of the rollout, interval and widths are those of the mean loss. Its limit
(`forecast.opening_threshold`) is a default and was not calibrated; it decides no level, and where it says
something else than the mean, the verdict says so.
"""

from __future__ import annotations

from dataclasses import replace

from arisk.config.plan import ForecastConfig
from arisk.forecast.measured import rollout_curve
from arisk.forecast.record import Curve, RolloutResult
from arisk.training.recipe import Recipe

__all__ = ["OPENING_CURVE", "opening_curve"]

#: Name of the curve.
OPENING_CURVE = "first tokens"


def opening_curve(measured: RolloutResult, plan: Recipe, config: ForecastConfig, seed: int) -> Curve | None:
    """The first tokens' loss as the `rollout` curve shows the mean; None where no tokens are known.

    Args:
        measured: the rollout, with `opening_loss`.
        plan: the planned recipe.
        config: limit, confidence, draws.
        seed: seeds the draws.
    """
    if measured.status != "measured" or measured.opening_loss is None:
        return None
    own = replace(measured, safety=measured.opening_loss - measured.opening_loss[:, :1], safety_error=())
    limit = config.model_copy(update={"collapse_threshold": config.opening_threshold})
    return replace(rollout_curve(own, plan, limit, seed), name=OPENING_CURVE)
