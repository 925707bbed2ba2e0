"""The section of a model card: what was forecast for the fine-tune, and what was measured of it.

Markdown below YAML metadata, from `summary.json` alone. A forecast is always called one: nothing here may be
read as a result of the model unless its training was carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.report.text import chance, literal

__all__ = ["model_card"]


def model_card(summary: Mapping[str, Any]) -> str:
    """The section and its metadata.

    Args:
        summary: what `summary.json` of a finished run holds.
    """
    verdict, real = summary["verdict"], summary.get("verify")
    done = bool(summary.get("rollout", {}).get("carried_out"))
    head, chances = "Forecast before training", ""
    if done:
        head, measured = "Measured before training", "The plan itself was carried out in memory: no forecast."
    else:
        measured = "Nothing here was measured on the trained model; `arisk verify` does that."
        chances = f" P(collapse within the plan): {chance(verdict['probability'])}."
    if real:
        measured = (
            f"**Measured by carrying the plan out in memory.** {literal(real['sentence'])} {_counted(real)}"
        )
    lines = [
        "---",
        "tags:",
        "- arisk",
        "arisk:",
        f"  level: {verdict['level']}",
        f"  measured: {'true' if real or done else 'false'}",
        f"  planned_steps: {verdict['horizon']}",
        f"  safe_steps: {_plain(verdict['safe_steps'])}",
        *_refusal_metadata(summary.get("refusals"), real, done),
        "---",
        "",
        "## Safety of this fine-tune",
        "",
        f"{literal(summary['identity'])}.",
        "",
        f"**{head}: risk {verdict['level']}.** {literal(verdict['sentence'])}{chances}",
        "",
        measured,
        "",
        f"Evidence: {literal(summary['evidence'])}.",
        "",
        *[f"- {literal(caveat)}" for caveat in verdict["caveats"]],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _refusal_metadata(
    refusals: Mapping[str, Any] | None, real: Mapping[str, Any] | None, done: bool
) -> list[str]:
    """Refusals before, forecast, and measured, as far as they are known."""
    if not refusals or refusals["status"] != "measured":
        return ["  refusals: not measured"]
    known = [
        "  refusals:",
        f"    prompts: {refusals['prompts']}",
        f"    before: {refusals['today']}",
        f"    after_{'measured' if done else 'forecast'}: {refusals['at_end']}",
    ]
    counts = (real or {}).get("refusals")
    return (
        [*known, f"    after_measured: {counts[-1]['refused']} of {counts[-1]['prompts']}"]
        if counts and not done
        else known
    )


def _counted(real: Mapping[str, Any]) -> str:
    """Refusals at the start and at the end of the real run."""
    counts = real.get("refusals")
    if not counts:
        return "Refusals were not measured."
    first, last = counts[0], counts[-1]
    return f"Refused {first['refused']} of {first['prompts']} safety prompts before, {last['refused']} after."


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)
