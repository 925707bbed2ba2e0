"""Sections that optional stages add to the page, and what they add to the summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arisk.report.figure import Figure

__all__ = ["Extra"]


@dataclass(frozen=True)
class Extra:
    """What one optional stage shows beside the forecast.

    Attributes:
        name: the stage; its key in `summary.json`.
        html: its section, everything from data escaped.
        figures: drawn below the section, in order.
        summary: plain values for `summary.json`.
        markdown: lines for `summary.md`.
        findings: sentences for the page's list of findings.
        advice: what to do by its measurements, for the first screen.
    """

    name: str
    html: str
    figures: Sequence[Figure] = ()
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    markdown: Sequence[str] = ()
    findings: Sequence[str] = ()
    advice: Sequence[str] = ()
