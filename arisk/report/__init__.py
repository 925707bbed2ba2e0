"""The report: records → figures and sentences → one HTML page, a JSON summary and a Markdown one."""

from __future__ import annotations

from arisk.report.extra import Extra
from arisk.report.page import render_report
from arisk.report.summary import summary_json, summary_markdown

__all__ = ["Extra", "render_report", "summary_json", "summary_markdown"]
