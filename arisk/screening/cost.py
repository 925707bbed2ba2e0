"""What screen will take.

What it meets on the way is not known beforehand (when safety has risen, whether a row is flagged), so its
counts are those of a run that takes all steps it may and drops rows.
"""

from __future__ import annotations

import math

from arisk.anatomy.cost import numel, samples_in
from arisk.config.plan import planned_steps
from arisk.engine.stage import Cost, CostScene
from arisk.forecast.cost import rollout_passes
from arisk.gradients import layout_of
from arisk.screening.estimates import ROW_SCORES, worth_estimating
from arisk.screening.explain import ENTRIES
from arisk.screening.points import COLUMNS, EVERY
from arisk.screening.run import CHECKED, HEAD, HEAD_SHARE
from arisk.verification.cost import COPIES_OF_A_RUN, per_step

__all__ = ["screen_cost"]

#: Passes over all safety rows that give the directions of one point.
SAFETY_PASSES = 3
#: Copies of the selected parameters beside the model: θ, the directions, D, θ* and the moments.
COPIES = 10


def screen_cost(scene: CostScene) -> Cost:
    """A walk to the point where safety has risen, the rows scored there, and the what-if of dropping."""
    count = numel(scene.task)
    vector, explained = count * 4 / 1e9, min(ENTRIES, scene.config.screen.examples * count) * 4 / 1e9
    device = None
    if scene.device:
        moving = scene.device["gradients"] + COPIES_OF_A_RUN * vector
        device = max(moving, scene.device["per sample"] + vector)
    return Cost(
        passes=_passes(scene),
        seconds=scene.loading,
        memory_gb=scene.memory["per sample"] + COPIES * vector + explained,
        device_gb=device,
    )


def _passes(scene: CostScene) -> dict[str, float]:
    task, config, rollout = scene.task, scene.config, rollout_passes(scene)
    given, rows = config.screen, samples_in(task.finetune)
    safety, layout = samples_in(task.safety), layout_of(task.model, task.parameter_names)
    control = min(samples_in(task.control), given.control_samples)
    points = 2 if given.points == "both" else 1
    steps = planned_steps(config.training, task.finetune.units)
    walked = 0 if given.points == "start" else min(given.max_steps, steps)
    examples = min(given.examples, rows)
    exact, looked = rows, 0
    estimates = given.method
    if estimates == "auto":
        estimates = "differences" if worth_estimating(task.model, layout, rows) else "exact"
    if estimates != "exact":
        exact = min(rows, CHECKED + max(HEAD, round(HEAD_SHARE * rows)))
        looked = rows * ROW_SCORES[estimates].forwards
    counts: dict[str, float] = {
        "gradient rows": walked * per_step(config)
        + points * (given.batches * config.training.batch_size + control),
        "forward rows": math.ceil(walked / EVERY) * safety + points * (safety + control + looked),
        "single-row gradients": points * (SAFETY_PASSES * safety + exact + control) + 2 * examples + safety,
        "products": points * (exact + control),
        "product columns": points * len(COLUMNS) * (exact + control),
    }
    if given.what_if and config.rollout.enabled:
        counts = {k: counts.get(k, 0.0) + 2 * rollout.get(k, 0.0) for k in {*counts, *rollout}}
    return counts
