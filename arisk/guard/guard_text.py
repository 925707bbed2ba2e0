"""What `arisk guard` prints: the arms side by side, and the recommendation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.base.tables import table
from arisk.guard.record import ending

__all__ = ["guard_text"]


def guard_text(outcome: Any) -> str:
    """The arms side by side, the recommendation, and the report's path (or what it waits for) last."""
    found = outcome.found
    rows = [
        [
            ("* " if arm["label"] == found["recommended"] else "  ") + arm["label"],
            *(
                [ending(arm["diverged_at"]), "", "", "", "", ""]
                if arm["diverged_at"] is not None
                else [
                    _signed(arm["safety"]),
                    _share(arm["drift_share"]),
                    _signed(arm["control"]),
                    _task(arm),
                    _refused(arm["refusals"], found["answered_prompts"]),
                    _ratio(arm["cost"]),
                ]
            ),
        ]
        for arm in found["arms"]
    ]
    header = [f"  after {found['last']} of {found['horizon']} steps", "safety", "of plain", "control"]
    lines = [
        found["sentence"],
        "",
        table(rows, [*header, "task loss", "refuses", "CPU time"]),
        "",
        f"safety: change of the loss of {found['safety_rows']} safety rows (nats/token), "
        + ("held out" if found["heldout"] else "NOT held out"),
        f"task loss: {found['task_rows']} {found['task_source']} (nats/token), with the change against plain",
        _answers(found),
        *[f"caveat: {warning}" for warning in found["warnings"]],
    ]
    return "\n".join([*lines, outcome.last_line])


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3f}"


def _refused(count: int | None, prompts: int) -> str:
    return "–" if count is None else f"{count} of {prompts}"


def _answers(found: Mapping[str, Any]) -> str:
    """What the refusals are counted on, or why they are not."""
    if found["refusals_missing"]:
        return f"refusals not measured: {found['refusals_missing']}"
    before = f"the aligned model refuses {_refused(found['aligned_refusals'], found['answered_prompts'])}"
    return f"refuses: answers to safety prompts after the last step, told by their opening; {before}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"× {value:.2f}"


def _task(arm: Mapping[str, Any]) -> str:
    cost = "" if arm["task_cost"] is None else f" ({arm['task_cost']:+.1%})"
    return f"{arm['task']:.3f}{cost}" if arm["task"] is not None else "not measured"
