"""What `arisk guard` prints: the arms side by side, the recommendation, and what was only forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.base.terminal import table
from arisk.guard.choice import NOTHING
from arisk.guard.summary import ended, forecast_ended, judged_by

__all__ = ["guard_text"]


def guard_text(outcome: Any) -> str:
    """The arms side by side, the recommendation, and the report's path (or what it waits for) last."""
    found = outcome.found
    if found["rule"] == NOTHING:
        return "\n".join([found["sentence"], *_caveats(found), outcome.last_line])
    rows = [
        [
            ("* " if arm["label"] == found["recommended"] else "  ") + arm["label"],
            *(
                [f"{ended(arm)}: {arm['reason']}", *[""] * 6]
                if arm["diverged_at"] is not None
                else [
                    _signed(arm["safety"]),
                    _share(arm["drift_share"]),
                    _signed(arm["control"]),
                    _task(arm),
                    _refused(arm["refusals"], found["answered_prompts"]) + _interval(arm, found),
                    _refused(arm["ordinary_refusals"], found["ordinary_prompts"]),
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
        table(rows, [*header, "task loss", "refuses (more than plain)", "ordinary", "CPU time"]),
        "",
        *([f"each number is a mean of {found['seeds']} runs (guard.seeds)"] if found["seeds"] > 1 else []),
        f"safety: change of the loss of {found['safety_rows']} safety rows (nats/token), "
        + ("held out" if found["heldout"] else "NOT held out"),
        f"task loss: {found['task_rows']} {found['task_source']} (nats/token), with the change against plain "
        "± its standard error",
        _answers(found),
        *_forecasts(found),
        *_caveats(found),
    ]
    return "\n".join([*lines, outcome.last_line])


def _caveats(found: Mapping[str, Any]) -> list[str]:
    return [f"caveat: {warning}" for warning in found["warnings"]]


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3f}"


def _refused(count: float | None, prompts: int) -> str:
    return "–" if count is None else f"{count:g} of {prompts}"


def _interval(arm: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Of the refusals kept more than plain; of plain itself there is none."""
    lower, upper = arm["refusals_more"]
    return "" if lower is None or arm is found["arms"][0] else f" ({lower:+g} to {upper:+g})"


def _answers(found: Mapping[str, Any]) -> str:
    """What the refusals are counted on, or why they are not."""
    if found["refusals_missing"]:
        return f"refusals not measured: {found['refusals_missing']}"
    before = f"the aligned model refuses {_refused(found['aligned_refusals'], found['answered_prompts'])}"
    return (
        f"refuses: answers to safety prompts after the last step, told by {judged_by(found)}; {before}; in "
        f"brackets the {found['confidence']:.0%} interval of the difference to plain"
    )


def _forecasts(found: Mapping[str, Any]) -> list[str]:
    """Which arms were only forecast, and what that said; nothing where all were trained."""
    left = [one for one in found["forecasts"][1:] if not one["chosen"]]
    if not left:
        return []
    rows = [
        [
            f"  {one['label']}",
            *(
                [forecast_ended(one), "", ""]
                if one["diverged_at"] is not None
                else [_share(one["kept"]), _more(one["task_cost"]), _signed(one["safety"])]
            ),
        ]
        for one in left
    ]
    chosen = sum(one["chosen"] for one in found["forecasts"])
    header = ["  forecast only (--all trains them)", "openings kept", "task loss", "safety"]
    return [
        "",
        table(rows, header),
        "",
        f"trained are the {chosen} of {len(found['forecasts']) - 1} arms that by their forecasts keep most "
        f"openings, then drift least; those above {found['tolerated_task_loss']:.0%} more task loss come "
        "last, the cheaper ones first",
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _more(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"× {value:.2f}"


def _task(arm: Mapping[str, Any]) -> str:
    error = f" ± {100 * arm['task_error']:.1f}" if arm["task_error"] else ""
    cost = "" if arm["task_cost"] is None else f" ({_more(arm['task_cost'])}{error})"
    return f"{arm['task']:.3f}{cost}" if arm["task"] is not None else "not measured"
