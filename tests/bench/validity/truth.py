"""What really happens: the planned fine-tune with torch's optimizer, safety measured on unseen prompts."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arisk.base.errors import NumericsError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import TrainingConfig
from arisk.gradients import layout_of, measuring
from arisk.training.loop import PlannedRun
from arisk.training.panels import sample_losses
from arisk.training.recipe import recipe_of
from tests.bench.validity.jobs import Job, heldout, job_task

#: What really happened; it changes only with the planned training.
KEPT = Path(__file__).with_name("truths.json")
#: Early steps, and even distances over the whole run. Between two points a curve is taken as straight.
EARLY, PARTS = (0, 1, 2, 3, 5), 24


def measured_steps(steps: int) -> list[int]:
    """The first few steps, then 24 at even distances: about 4 % of the run apart."""
    return sorted(
        {step for step in EARLY if step <= steps} | {round(steps * i / PARTS) for i in range(PARTS + 1)}
    )


@functools.cache
def kept_truths() -> Mapping[str, dict[str, Any]]:
    """Truths of earlier runs of the benchmark, by the name of their job."""
    return json.loads(KEPT.read_text(encoding="utf-8"))["jobs"] if KEPT.exists() else {}


def keep_truths(folder: Path) -> int:
    """Put the truths of a folder into `KEPT`, without training losses; returns how many it holds now."""
    found = dict(kept_truths())
    for path in sorted((folder / "truth").glob("*.json")):
        curve = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: [float(f"{v:.5g}") for v in curve[name]] for name in ("safety", "control")}
        found[path.stem] = {"steps": curve["steps"], **numbers}
    lines = ",\n".join(
        f'"{name}":{json.dumps(curve, separators=(",", ":"))}' for name, curve in sorted(found.items())
    )
    KEPT.write_text(f'{{"version":1,"model":"tiny-aligned","jobs":{{\n{lines}\n}}}}\n', encoding="utf-8")
    return len(found)


def kept_or_real(job: Job, folder: Path) -> dict[str, Any]:
    """The kept truth of a job, or a real fine-tune where none is kept."""
    return kept_truths().get(job.name) or real_run(job, folder)


def real_run(job: Job, folder: Path) -> dict[str, Any]:
    """Change of the held-out safety and control losses along the real fine-tune of a job."""
    config, task = job_task(job, folder)
    sets = {"safety": heldout(), "control": heldout("control", 64)}
    return trained(task, config.training, job.steps, sets, measured_steps(job.steps))


def trained(
    task: Task, training: TrainingConfig, steps: int, sets: Mapping[str, SampleSet], wanted: Sequence[int]
) -> dict[str, Any]:
    """Change of the mean loss of every set at the wanted steps of a real fine-tune; the model keeps it.

    The steps are those of `PlannedRun`, which the tests hold to a loop written with torch alone.
    """
    layout = layout_of(task.model, task.parameter_names)
    curve: dict[str, list[Any]] = {"steps": [0], "train": [], **{name: [0.0] for name in sets}}

    def means() -> dict[str, float]:
        return {n: float(sample_losses(task.model, s.batches, s.loss_fn).mean()) for n, s in sets.items()}

    with measuring(task.model, layout):
        run = PlannedRun(task, layout, recipe_of(training, steps))
        start = means()
        for number in range(1, steps + 1):
            try:
                curve["train"].append(run.step(number))
            except NumericsError:
                break
            if number in wanted:
                curve["steps"].append(number)
                for name, value in means().items():
                    curve[name].append(value - start[name])
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
