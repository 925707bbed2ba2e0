"""Records of an assessment that was skipped: nothing was measured, and nothing may look as if it were."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from arisk.anatomy.record import CollectResult, OverlapNulls, ScoreResult, SubspaceResult
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.grid import WhatIfGrid
from arisk.forecast.record import ForecastResult, RolloutResult, Verdict
from arisk.forecast.rollout import skipped_rollout

__all__ = ["skipped_records"]

Record = TypeVar("Record")


def skipped_records(
    reason: str, training: TrainingConfig, forecast: ForecastConfig
) -> tuple[CollectResult, SubspaceResult, ScoreResult, RolloutResult, ForecastResult]:
    """One record per stage, its numbers NaN or None and its tensors empty; the verdict is inconclusive.

    Args:
        reason: why nothing was measured.
        training: the planned fine-tune.
        forecast: threshold and confidence.
    """
    verdict = _blank(
        Verdict,
        level="inconclusive",
        sentence=f"Not assessed: {reason}. That is not the same as no risk.",
        reasons=[reason],
        basis="none",
    )
    collected = _blank(CollectResult, store="gram", fisher="empirical", engine={"name": "none"})
    judged = _blank(
        ForecastResult,
        threshold=forecast.collapse_threshold,
        confidence=forecast.confidence,
        training=training.model_dump(mode="json"),
        verdict=verdict,
        what_if=_blank(WhatIfGrid),
        warnings=[reason],
    )
    scored = _blank(ScoreResult, optimizer=training.optimizer, overlap=_blank(OverlapNulls))
    return collected, _blank(SubspaceResult), scored, skipped_rollout(reason), judged


def _blank(cls: type[Record], **given: Any) -> Record:
    """A record with these fields, and the others undefined by their type."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType] - records are dataclasses
    return cls(**{name: given[name] if name in given else _undefined(hints[name]) for name in names})


def _undefined(hint: Any) -> Any:
    """NaN, None, 0 of something counted, or nothing: what a type has for "not measured"."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return None
    if hint is Tensor:
        return torch.zeros(0, dtype=torch.float64)
    if isinstance(origin, type) and issubclass(origin, str):
        return "none"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return []
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {}
    return {float: math.nan, int: 0, bool: False}[hint]
