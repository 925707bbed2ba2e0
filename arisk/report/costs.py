"""What each stage cost on the machine that ran it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.report.figure import Figure, axes
from arisk.report.text import number, percent

__all__ = ["stage_costs"]

TITLE = "Cost of the stages"


def stage_costs(provenance: Mapping[str, Any]) -> Figure:
    """Wall-clock seconds of every stage, as its manifest keeps them."""
    reading = (
        "Wall-clock seconds of each stage on the machine that ran it. A fresh stage is not run again, so a "
        "changed threshold or learning rate costs only what depends on it (`arisk status` says which)."
    )
    equation = "seconds from the start of a stage to its commit, reading its inputs included"
    header = ["stage", "seconds", "share", "MB on disk"]
    stages: Mapping[str, Mapping[str, Any]] = provenance.get("stages") or {}
    known = {name: float(s["seconds"]) for name, s in stages.items() if s.get("seconds") is not None}
    total = sum(known.values())
    if not known or total <= 0:
        missing = "no stage times were kept (the Python API writes none)"
        return Figure("costs", TITLE, [], {}, reading, equation, header, [], missing)
    names = list(known)[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [known[name] for name in names],
        "text": [_duration(known[name]) for name in names],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "#0072B2"},
        "hovertemplate": "%{y}: %{x:.3g} s<extra></extra>",
    }
    layout = axes("seconds", "")
    layout["xaxis"]["range"] = [0, 1.18 * max(known.values())]
    worst = max(known, key=lambda name: known[name])
    rows = [
        [
            name,
            number(s.get("seconds")),
            percent(known[name] / total) if name in known else number(None),
            f"{s['bytes'] / 1e6:.1f}",
        ]
        for name, s in stages.items()
    ]
    says = f"{_duration(total)} in all; {worst} took {percent(known[worst] / total)} of it."
    return Figure("costs", TITLE, [bars], layout, reading, equation, header, rows, says=says)


def _duration(seconds: float) -> str:
    """Seconds with three digits up to two minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{number(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
