"""Scores of rows that the benches of real trainings judge, and where these keep what is made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.task import Task
from arisk.config.plan import Config, ScreenConfig, planned_steps
from arisk.screening.run import screen

FOLDER = Path("runs/bench-removal")
#: Scores by name: settings of `screen`.
SCORES: dict[str, dict[str, Any]] = {
    "path, opening": {"score": "path", "measure": "opening"},
    "path, loss": {"score": "path", "measure": "loss"},
    "point, opening": {"score": "point", "measure": "opening"},
    "point, loss": {"score": "point", "measure": "loss"},
    "anchors": {"score": "anchors"},
    "point, opening +.1": {"score": "point", "measure": "opening", "rise": 0.1},
    "path, opening, curvature": {"score": "path", "measure": "opening", "curvature": True},
    # No rise is as large: rows are scored at the end of the plan.
    "end, opening": {"score": "point", "measure": "opening", "rise": 1e6},
}


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """The stored value of this file, made and stored when absent."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = make()
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(made), encoding="utf-8")
        part.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def by_line(task: Task, values: Sequence[float], rows: int) -> list[float]:
    """Values of all rows of the file; rows that arisk leaves out, whose prompt is too long, rank last."""
    found = [min(values)] * rows
    for row, value in zip(task.finetune.rows, values, strict=True):
        found[int(row["line"]) - 1] = value
    return found


def scored(task: Task, config: Config, settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Scores of all rows of the file, how many have one, what is flagged, and CPU seconds."""
    given = ScreenConfig.model_validate({**config.screen.model_dump(), "examples": 0, **settings})
    steps = planned_steps(config.training, len(task.finetune.rows))
    started = time.process_time()
    made = screen(task, config=given, training=config.training, steps=steps)
    return {
        "scores": by_line(task, made.scores.tolist(), rows),
        "scored": len(made.scores),
        "flagged": [int(task.finetune.rows[row]["line"]) - 1 for row in made.flagged],
        "sentence": made.sentence,
        "excess": made.excess,
        "seconds": time.process_time() - started,
    }
