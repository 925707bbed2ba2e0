"""What really happens: the planned fine-tune with torch's optimizer, safety measured on unseen prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from arisk.errors import NumericsError
from arisk.geometry.dynamics import recorded_steps
from arisk.geometry.schedule import learning_rates
from arisk.gradients import layout_of, measuring
from arisk.stages.planned_run import PlannedRun
from arisk.stages.probe import sample_losses
from tests.bench.validity.jobs import Job, heldout, job_task

POINTS = 56


def measured_steps(steps: int) -> list[int]:
    """Every step at first, then geometrically, at most 5 % of the run apart."""
    spread = {round(steps * i / 24) for i in range(25)}
    return sorted(spread | set(recorded_steps(steps, POINTS)))


def real_run(job: Job, folder: Path) -> dict[str, Any]:
    """Change of the held-out safety and control losses along the real fine-tune."""
    config, task = job_task(job, folder)
    layout = layout_of(task.model, task.parameter_names)
    training = config.training
    rates = learning_rates(
        training.learning_rate, job.steps, schedule=training.schedule, warmup_steps=training.warmup_steps
    )
    sets = (heldout(), heldout("control", 64))
    wanted = measured_steps(job.steps)
    with measuring(task.model, layout):
        run = PlannedRun(task, layout, training, rates)
        start = [sample_losses(task.model, s.batches, s.loss_fn).mean() for s in sets]
        curve: dict[str, list[Any]] = {"steps": [0], "safety": [0.0], "control": [0.0], "train": []}
        for number in range(1, job.steps + 1):
            try:
                curve["train"].append(run.step(number))
            except NumericsError:
                break
            if number in wanted:
                change = [
                    float(sample_losses(task.model, s.batches, s.loss_fn).mean() - b)
                    for s, b in zip(sets, start, strict=True)
                ]
                curve["steps"].append(number)
                curve["safety"].append(change[0])
                curve["control"].append(change[1])
    return curve


def cached(kind: str, job: Job, folder: Path, make: Any) -> Any:
    """The stored result of this kind for this job, made and stored when absent."""
    path = folder / kind / f"{job.name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    made = make(job, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made), encoding="utf-8")
    partial.rename(path)
    return made
