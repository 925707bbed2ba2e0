"""`python -m tests.bench.validity.shortcuts`: what the forecast loses by the shortcuts of its evaluation.

Twelve tuning jobs (three data sets, all parameters and LoRA, SGD and AdamW, the higher rate), each rolled
out as shipped and with one shortcut undone. Nothing is compared with a truth: a shortcut is worth taking
where it does not change what is said. A few CPU minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from arisk.config.plan import ForecastConfig, RolloutConfig
from arisk.forecast import leap
from arisk.forecast import rollout as rolled
from arisk.forecast.measured import combined_curve
from arisk.forecast.record import Curve
from arisk.training.recipe import recipe_of
from tests.bench.measure import print_table
from tests.bench.validity.__main__ import FOLDER
from tests.bench.validity.jobs import Job, job_task, standard_jobs

SETS = ("benign_near", "compliance_020", "persona")
#: Twice as many scales of the extrapolated outputs as are shipped.
MANY = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 16.0, 23.0, 32.0)
ALL = 10**6
UNDONE = {
    "as shipped": RolloutConfig(),
    "all safety and control rows at every point": RolloutConfig(leading_samples=ALL),
    "18 scales of the outputs": RolloutConfig(),
    "rare rows sought in every planned row": RolloutConfig(),
    "pilot twice as long": RolloutConfig(pilot_steps=40),
}


@contextmanager
def undone(name: str) -> Generator[None]:
    """Inside, constants that are no setting have their dear value."""
    if name.startswith("18"):
        with patch.object(rolled, "SCALES", MANY):
            yield
    elif name.startswith("rare"):
        with patch.object(leap, "MOST_SCORED", ALL), patch.object(leap, "SCORED_SHARE", 1.0):
            yield
    else:
        yield


def said(job: Job, name: str, folder: Path) -> tuple[Curve, float]:
    """The combined forecast, and CPU seconds of its rollout."""
    config, task = job_task(job, folder)
    began = time.process_time()
    with undone(name):
        record = rolled.rollout(task, config=UNDONE[name], training=config.training, steps=job.steps)
    spent = time.process_time() - began
    return combined_curve(record, recipe_of(config.training, job.steps), ForecastConfig(), 0), spent


def main() -> None:
    """Roll out, compare, print."""
    torch.set_num_threads(1)
    jobs = [job for job in standard_jobs(SETS) if job.learning_rate in (0.02, 2e-4, 0.15, 2e-3)]
    shipped = [said(job, "as shipped", FOLDER) for job in jobs]
    rows: list[list[str]] = []
    for name in list(UNDONE)[1:]:
        changes, steps, spent = list[float](), list[str](), list[float]()
        for job, (plain, cost) in zip(jobs, shipped, strict=True):
            curve, own = said(job, name, FOLDER)
            changes.append(curve.median[-1] - plain.median[-1])
            spent.append(cost / own)
            if curve.collapse_step != plain.collapse_step:
                steps.append(f"{plain.collapse_step or '–'} for {curve.collapse_step or '–'}")
        largest = max(changes, key=abs)
        rows.append(
            [
                name,
                f"{statistics.median(map(abs, changes)):.3f}, {largest:+.3f}",
                ", ".join(steps) or "none",
                f"{statistics.median(spent):.2f}",
            ]
        )
    print_table(
        "What is said with a shortcut undone",
        [
            f"undone ({len(jobs)} jobs)",
            "change of the final rise: median of the sizes, largest (nats)",
            "collapse step shipped for undone, where they differ",
            "CPU time shipped / undone",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
