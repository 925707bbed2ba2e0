"""The verdict for machines and for pull requests, from the sections of every capability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arisk.report.page import Section, findings_of, warnings_of
from arisk.report.text import bounded, literal

__all__ = ["summary_json", "summary_markdown"]

#: Name of the page beside the summaries.
PAGE = "report.html"
#: Findings in the Markdown text; all of them are in the JSON and on the page.
MOST_FINDINGS = 6


def summary_json(title: str, sections: Sequence[Section]) -> dict[str, Any]:
    """Plain values of every section at the top level, findings and warnings. None: not measured.

    Raises:
        ValueError: two sections use one key.
    """
    body: dict[str, Any] = {
        "title": title,
        "findings": [finding.sentence for finding in findings_of(sections)],
        "report": PAGE,
        "warnings": warnings_of(sections),
    }
    for section in sections:
        if twice := body.keys() & section.summary.keys():
            raise ValueError(f"section {section.name}: {', '.join(sorted(twice))} is in the summary already")
        body |= section.summary
    return body


def summary_markdown(title: str, sections: Sequence[Section]) -> str:
    """A short Markdown text, fit for a pull-request comment: the answer, findings, then each section's."""
    answers = [section.answer for section in sections if section.answer]
    findings = findings_of(sections)[:MOST_FINDINGS]
    lines = [
        f"### arisk: {''.join(f'{answer.level} – ' for answer in answers)}{literal(title)}",
        "",
        *(line for answer in answers for line in answer.markdown),
        *[f"- {literal(finding.sentence)}" for finding in findings],
        *(line for section in sections for line in section.markdown),
    ]
    return bounded(lines, f"Everything else is in `{PAGE}`, beside this text in the run directory.")
