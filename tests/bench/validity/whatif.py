"""What-if against the truth: the rollout at the higher learning rate answers for the lower one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.artifacts import read_record
from arisk.config.plan import ForecastConfig, TrainingConfig
from arisk.forecast.measured import combined_curve
from arisk.forecast.record import RolloutResult
from arisk.forecast.what_if import curve_at_rate, over_flow_time
from arisk.training.recipe import recipe_of
from tests.bench.validity.jobs import Job

#: The central curve needs no draws.
CONFIG = ForecastConfig(bootstrap_samples=1)


Records = Mapping[str, tuple[Job, RolloutResult]]


def what_if_pairs(records: Records) -> dict[str, dict[str, Any]]:
    """Curves of jobs at a lower learning rate, each read off the rollout at a higher one by flow time.

    Args:
        records: jobs with their rollout records, by job name. Jobs that differ in nothing but the
            learning rate make pairs; of several higher rates the nearest answers.

    Returns:
        By the name of the job at the lower rate: `source` (name of the job at the higher rate),
        `factor` (lower over higher rate), `steps` and `median` (nats), cut where the rollout's flow
        time ends.
    """
    made: dict[str, dict[str, Any]] = {}
    for name, (job, _) in records.items():
        higher = [pair for pair in records.values() if _same_but_faster(job, pair[0])]
        if higher:
            source, measured = min(higher, key=lambda pair: pair[0].learning_rate)
            steps, median = predicted(job, source, measured)
            factor = job.learning_rate / source.learning_rate
            made[name] = {"source": source.name, "factor": factor, "steps": steps, "median": median}
    return made


def predicted(job: Job, source: Job, measured: RolloutResult) -> tuple[list[int], list[float]]:
    """Steps and median curve of `job` from the rollout of `source`."""
    settings = {**source.extra, "optimizer": source.optimizer, "learning_rate": source.learning_rate}
    training = TrainingConfig(**settings, max_steps=source.steps)
    combined = combined_curve(measured, recipe_of(training, source.steps), CONFIG, source.seed)
    over = over_flow_time(combined, training, source.steps)
    if over is None:
        return [], []
    steps, values = curve_at_rate(over, training, job.learning_rate, job.steps)
    told = [
        (step, value) for step, value in zip(steps, values[0].tolist(), strict=True) if not math.isnan(value)
    ]
    return [step for step, _ in told], [value for _, value in told]


def stored_records(folder: Path, jobs: Sequence[Job]) -> Records:
    """The rollout records that `predict.forecasts` has kept below `folder`, by job name."""
    return {
        job.name: (job, read_record(path, RolloutResult))
        for job in jobs
        if (path := folder / "rollouts" / job.name).exists()
    }


def _same_but_faster(job: Job, other: Job) -> bool:
    same = all(
        getattr(job, name) == getattr(other, name)
        for name in ("data", "mode", "optimizer", "steps", "seed", "extra")
    )
    return same and other.learning_rate > job.learning_rate
