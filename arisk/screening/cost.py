"""What stage screen takes, by the kind of its scores.

What screen meets on its way is not known beforehand (when safety has risen, whether a row is flagged), so its
cost is that of a run that takes all steps it may and drops rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from arisk.anatomy.cost import numel, samples_in
from arisk.base.task import RowBatches
from arisk.config.plan import planned_steps
from arisk.engine.stage import Cost, CostScene
from arisk.forecast.run import rollout_passes
from arisk.gradients import layout_of
from arisk.screening.estimates import ROW_SCORES, worth_estimating
from arisk.screening.explain import ENTRIES
from arisk.screening.measure import PROMPTS, TOKENS
from arisk.screening.points import COLUMNS, EVERY
from arisk.screening.run import CHECKED, HEAD, HEAD_SHARE
from arisk.verification.run import COPIES_OF_A_RUN, per_step

__all__ = ["screen_cost"]

#: Passes over all safety rows that give the directions of one point.
SAFETY_PASSES = 3
#: Copies of the selected parameters beside the model: θ, the directions, D, θ* and the moments.
COPIES = 10


def screen_cost(scene: CostScene) -> Cost:
    """What the scores take by their kind, and the what-if of dropping rows."""
    count, score = numel(scene.task), scene.config.screen.score
    vector, explained = count * 4 / 1e9, min(ENTRIES, scene.config.screen.examples * count) * 4 / 1e9
    unrolled = score == "path" or (score == "auto" and _may_unroll(scene))
    stored, device = scene.config.screen.memory_gb if unrolled else 0.0, None
    if scene.device:
        moving = scene.device["gradients"] + COPIES_OF_A_RUN * vector + stored
        device = max(moving, scene.device["per sample"] + vector)
    passes = PASSES[score](scene)
    if scene.config.screen.what_if and scene.config.rollout.enabled:
        rollout = rollout_passes(scene)
        passes = {k: passes.get(k, 0.0) + 2 * rollout.get(k, 0.0) for k in {*passes, *rollout}}
    return Cost(
        passes=passes,
        seconds=scene.loading,
        memory_gb=scene.memory["per sample"] + COPIES * vector + explained + stored,
        device_gb=device,
    )


def _point_passes(scene: CostScene) -> dict[str, float]:
    """A walk to the point where safety has risen, and the rows scored there."""
    task, config = scene.task, scene.config
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
    return {
        "gradient rows": walked * per_step(config)
        + points * (given.batches * config.training.batch_size + control),
        "forward rows": math.ceil(walked / EVERY) * safety + points * (safety + control + looked),
        "single-row gradients": points * (SAFETY_PASSES * safety + exact + control) + 2 * examples + safety,
        "products": points * (exact + control),
        "product columns": points * len(COLUMNS) * (exact + control),
        "answer tokens": 0.0 if given.measure == "loss" else min(PROMPTS, safety) * TOKENS,
    }


def _path_passes(scene: CostScene) -> dict[str, float]:
    """The steps, the same taken back, and the rows that products score: theirs, others, and control rows."""
    task, config = scene.task, scene.config
    rows, given = samples_in(task.finetune), config.screen
    control = min(samples_in(task.control), given.control_samples)
    met = min(given.max_steps, planned_steps(config.training, task.finetune.units)) * per_step(config)
    often = max(1, round(met / max(1, rows)))
    guests = max(0, rows - met) + often * control
    products = guests if given.curvature else met + guests
    prompts = min(PROMPTS, samples_in(task.safety))
    return {
        # Where steps do not fit into the memory, they are taken twice.
        "gradient rows": 2 * met + samples_in(task.safety),
        "curvature rows": met if given.curvature else 0,
        "forward rows": 2 * (samples_in(task.safety) + control),
        "single-row gradients": products,
        "products": products,
        "product columns": products,
        "answer tokens": prompts * TOKENS,
    }


def _may_unroll(scene: CostScene) -> bool:
    """Whether `auto` could take path scores."""
    task = scene.task
    told = task.control is not None and scene.config.screen.points != "start"
    return told and isinstance(task.finetune.batches, RowBatches)


def _auto_passes(scene: CostScene) -> dict[str, float]:
    """Those of a point; or of the walk there and the path, where that is more."""
    point = _point_passes(scene)
    if not _may_unroll(scene):
        return point
    config, safety = scene.config, samples_in(scene.task.safety)
    steps = min(config.screen.max_steps, planned_steps(config.training, scene.task.finetune.units))
    path = _path_passes(scene)
    path["gradient rows"] += steps * per_step(config)
    path["forward rows"] += math.ceil(steps / EVERY) * safety
    return {kind: max(point.get(kind, 0.0), path.get(kind, 0.0)) for kind in {*point, *path}}


def _anchor_passes(scene: CostScene) -> dict[str, float]:
    """The openings of all rows, and the prompts answered and read twice."""
    task = scene.task
    prompts = min(PROMPTS, samples_in(task.safety))
    control = min(samples_in(task.control), scene.config.screen.control_samples)
    return {
        "forward rows": samples_in(task.finetune) + control + 2 * prompts,
        "answer tokens": prompts * TOKENS,
    }


#: What the kinds of scores take, by name.
PASSES: Mapping[str, Callable[[CostScene], dict[str, float]]] = {
    "point": _point_passes,
    "path": _path_passes,
    "anchors": _anchor_passes,
    "auto": _auto_passes,
}
