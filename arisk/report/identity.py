"""What a report is about in one line: model, adapter, data, what judges it, when, by which version.

Numbers that nobody knows are left out; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

from arisk.report.text import duration

__all__ = ["identity", "subject"]


def subject(provenance: Mapping[str, Any]) -> str:
    """Model, adapter and data: `SmolLM2-135M-Instruct + LoRA r = 8 on train.jsonl`.

    Args:
        provenance: `task` as the loader describes it, and `plan` with the names of the data (`finetune`:
            several, `safety`: one), as far as they are known.
    """
    task, plan = provenance.get("task") or {}, provenance.get("plan") or {}
    data = [_named(name) for name in plan.get("finetune") or []]
    shown = " + ".join(data[:2]) + (f" + {len(data) - 2} more" if len(data) > 2 else "")
    return f"{_model(task)}{_adapter(task)}{f' on {shown}' if shown else ''}"


def identity(provenance: Mapping[str, Any]) -> str:
    """The whole first line of a report.

    Args:
        provenance: as for `subject`; `stages` with when they finished and how long they took, `versions`.

    Returns:
        `SmolLM2 + LoRA r = 8 on train.jsonl, 200 rows · judged on 64 safety rows · 26 Nov 2026 · arisk 0.1.0
        · took 41 s`.
    """
    task, plan = provenance.get("task") or {}, provenance.get("plan") or {}
    stages: Sequence[Mapping[str, Any]] = list((provenance.get("stages") or {}).values())
    version = (provenance.get("versions") or {}).get("arisk")
    # What was measured beside the forecast is not its duration.
    spent = [float(s["seconds"]) for s in stages if s.get("seconds") is not None and not s.get("optional")]
    parts = [
        _counted(subject(provenance), task, "finetune"),
        _judged(task, plan),
        _day(stages),
        f"arisk {version}" if version else "",
        f"took {duration(sum(spent))}" if spent else "",
    ]
    return " · ".join(part for part in parts if part)


def _named(path: str) -> str:
    """The end of a path, or of a hub id."""
    return PurePath(path.replace("\\", "/")).name or path


def _model(task: Mapping[str, Any]) -> str:
    """The folder or hub id of the model without what leads to it, else its class."""
    path = str(task.get("model") or "")
    return _named(path) if path else str(task.get("architecture") or "a model")


def _adapter(task: Mapping[str, Any]) -> str:
    adapter = task.get("adapter")
    if not adapter:
        return " (all weights)" if task.get("parameters_selected") == task.get("parameters_total", -1) else ""
    if isinstance(adapter, Mapping) and adapter.get("r") and not adapter.get("path"):
        return f" + {'DoRA' if adapter.get('use_dora') else 'LoRA'} r = {adapter['r']}"
    return " + its adapter"


def _counted(text: str, task: Mapping[str, Any], name: str) -> str:
    rows = ((task.get("data") or {}).get(name) or {}).get("rows")
    return f"{text}, {rows} rows" if rows else text


def _judged(task: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    rows = ((task.get("data") or {}).get("safety") or {}).get("rows")
    if not rows:
        return ""
    by = f" by {_named(str(plan['judge']))}" if plan.get("judge") else ""
    return f"judged on {rows} safety rows{by}"


def _day(stages: Sequence[Mapping[str, Any]]) -> str:
    """The day on which the last stage ended (UTC)."""
    ends = [str(stage["finished"]) for stage in stages if stage.get("finished")]
    try:
        last = datetime.fromisoformat(max(ends, default="").replace("Z", "+00:00"))
    except ValueError:
        return ""
    return f"{last.day} {last:%b %Y}"
