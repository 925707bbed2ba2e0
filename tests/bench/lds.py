"""Row scores against retrainings on random halves of the rows: `just bench lds`.

On the embedded model. Again and again a random half of the rows is left out of the planned batches and the
model really trained; a score is worth the rank correlation (LDS, Spearman) of what its sums foretell with
what came out, and the AUC of its ranking against the labels. Beside it stand the labels themselves as a
score, and a fit to real trainings: weights of the labelled rows that foretell others. All is kept below
`runs/bench-removal` and found again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from arisk.base.task import Task
from arisk.config.plan import Config, ScreenConfig
from arisk.geometry.statistics import rank_correlation
from arisk.gradients import layout_of, measuring
from arisk.models import load_task
from arisk.screening import path
from arisk.screening.measure import measured_by
from arisk.training.loop import PlannedRun, keeping_parameters, put
from arisk.training.panels import panel_of
from arisk.training.recipe import recipe_of
from tests.bench.measure import print_table
from tests.bench.row_scores import FOLDER, SCORES, kept, scored
from tests.bench.screening import auc, fixture_config, mixture

#: Half-data retrainings, rows and steps.
HALVES, LDS_ROWS, LDS_STEPS = 160, 480, 60
#: Share of rows that comply and seed of the embedded model's mixtures; settings were chosen on the first.
LDS_CASES = ((0.05, 1), (0.10, 2), (0.02, 3))
#: Ridge of the fit, in trainings, and parts of them, each foretold by a fit to the others.
RIDGE, FOLDS = 1.0, 4


def main() -> None:
    """Print what scores foretell of half-data retrainings, and how they rank the labelled rows."""
    for share, seed in LDS_CASES:
        folder = FOLDER / f"lds-{share:g}-{seed}"
        rows, labels = mixture("benign_near", share, seed, LDS_ROWS)
        config = fixture_config(rows, "lora", f"removal-{share:g}-{seed}")
        training = config.training.model_copy(update={"max_steps": LDS_STEPS})
        config = config.model_copy(update={"training": training})
        task = load_task(config, device=torch.device("cpu"))
        ends = [kept(folder / f"half-{n}.json", partial(_half, task, config, n)) for n in range(HALVES)]
        whole = kept(folder / "whole.json", partial(_half, task, config, None))
        found = {
            name: kept(folder / f"{name}.json", partial(scored, task, config, settings, len(rows)))
            for name, settings in SCORES.items()
        }
        found["path, opening, exact"] = kept(folder / "exact.json", partial(_exact, task, config, len(rows)))
        table = [_lds_row(name, made, ends, whole, labels) for name, made in found.items()]
        table.append(["the labels", *_lds_of(torch.tensor(labels), ends), "1.000", "–", "–"])
        reached = [f"{rank_correlation(*_fitted(ends, m, labels)):.2f}" for m in MEASURED]
        table.append(
            ["fitted to the other halves", *reached, "–", "–", f"{HALVES * (1 - 1 / FOLDS) / 2:.0f}"]
        )
        header = [
            "score",
            "LDS, opening",
            "LDS, safety loss",
            "AUC",
            "flagged (labelled)",
            "cost, plain runs",
        ]
        print_table(f"{LDS_ROWS} rows, {share:.0%} complying, {HALVES} halves", header, table)


#: What ends are measured by, as columns of the table.
MEASURED = ("opening", "loss")


def _fitted(ends: Sequence[Mapping[str, Any]], measure: str, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ends as sums of weights of labelled rows, which are fitted to other ends; and the real ends."""
    there = torch.ones(len(ends), len(labels), dtype=torch.float64)
    for place, end in enumerate(ends):
        there[place, end["dropped"]] = 0
    rows = there[:, torch.tensor(labels).bool()] - 0.5
    real = torch.tensor([end[measure] for end in ends], dtype=torch.float64)
    part, told = torch.arange(len(ends)) % FOLDS, torch.zeros_like(real)
    for fold in range(FOLDS):
        own, others = part == fold, part != fold
        given, middle = rows[others], real[others].mean()
        square = given.T @ given + RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
        told[own] = rows[own] @ torch.linalg.solve(square, given.T @ (real[others] - middle)) + middle
    return told, real


def _exact(task: Task, config: Config, rows: int) -> dict[str, Any]:
    """Path scores without smoothing."""
    usual = path.SMOOTHING
    path.SMOOTHING = 0.0
    try:
        return scored(task, config, SCORES["path, opening, curvature"], rows)
    finally:
        path.SMOOTHING = usual


def _half(task: Task, config: Config, number: int | None) -> dict[str, Any]:
    """Both measures after the plan with a random half of the rows left out of its batches."""
    count = len(task.finetune.rows)
    dropped = [] if number is None else Random(number).sample(range(count), count // 2)
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        sets = {m: measured_by(task, ScreenConfig(measure=m)).task.safety for m in ("opening", "loss")}
        panels = {name: panel_of(samples, None, start[0].device) for name, samples in sets.items()}
        run = PlannedRun(task, layout, recipe_of(config.training, LDS_STEPS))
        put(run.parameters, start)
        run.stream.without = frozenset(dropped)
        started = time.process_time()
        for step in range(1, LDS_STEPS + 1):
            run.step(step)
        seconds = time.process_time() - started
        ends = {name: float(panel.losses(task.model).mean()) for name, panel in panels.items()}
    return {"dropped": sorted(dropped), "seconds": seconds, **ends}


def _lds_row(
    name: str,
    made: Mapping[str, Any],
    ends: Sequence[Mapping[str, Any]],
    whole: Mapping[str, Any],
    labels: Sequence[int],
) -> list[str]:
    scores = torch.tensor(made["scores"], dtype=torch.float64)
    hits = sum(labels[row] for row in made["flagged"])
    return [
        name,
        *_lds_of(scores, ends),
        f"{auc(scores, labels):.3f}",
        f"{len(made['flagged'])} ({hits} of {sum(labels)})",
        f"{made['seconds'] / whole['seconds']:.1f}",
    ]


def _lds_of(scores: Tensor, ends: Sequence[Mapping[str, Any]]) -> list[str]:
    """LDS of a score for each of `MEASURED`."""
    told = torch.stack([-scores[torch.tensor(end["dropped"])].double().sum() for end in ends])
    real = (torch.tensor([end[measure] for end in ends], dtype=torch.float64) for measure in MEASURED)
    return [f"{rank_correlation(told, column):.2f}" for column in real]
