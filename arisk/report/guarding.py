"""Protected fine-tunes on the page."""

from __future__ import annotations

from arisk.config import Config
from arisk.guarded import GuardResult, guard_summary
from arisk.report.extra import Extra

__all__ = ["guard_extra"]


def guard_extra(result: GuardResult, config: Config) -> Extra:
    """Section, figures and summary of stage guard."""
    body = guard_summary(
        result,
        threshold=config.forecast.collapse_threshold,
        tolerated=config.guard.tolerated_task_loss,
        wanted=config.guard.wanted_drift,
    )
    return Extra("guard", "", summary=body)
