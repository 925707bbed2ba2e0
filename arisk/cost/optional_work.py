"""How much work the stages have that run only when asked for: verify, screen and guard.

What screen meets on the way is not known beforehand (when safety has risen, whether a row is flagged), so
its counts are those of a run that takes all steps it may and drops rows. What a penalty costs beside a
step is not counted in guard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from arisk.base.task import SampleSet, Task
from arisk.config.plan import Config, planned_steps
from arisk.gradients import layout_of
from arisk.guard.methods import arm_names
from arisk.screening.estimates import worth_estimating
from arisk.screening.explain import ENTRIES
from arisk.screening.points import COLUMNS, EVERY
from arisk.screening.run import CHECKED, HEAD, HEAD_SHARE
from arisk.verification.run import measured_steps, writing_steps

__all__ = [
    "COPIES_OF_A_RUN",
    "OPTIONAL_STAGES",
    "answer_tokens",
    "followed_rows",
    "optional_passes",
    "optional_sizes",
]

OPTIONAL_STAGES = ("verify", "screen", "guard")
#: Passes over all safety rows that give the directions of one point of stage screen.
SAFETY_PASSES = 3
#: Copies of the selected parameters beside the model: of a plain run, of screen (θ, the directions, D, θ* and
#: the moments), of guard (a run, the reference and a Fisher diagonal).
COPIES_OF_A_RUN, COPIES_OF_SCREEN, COPIES_OF_GUARD = 4, 10, 6
#: Forward passes that an estimate of one row takes; a backward pass counts as two.
ESTIMATE = {"differences": 2, "sketch": 3}


def optional_passes(task: Task, config: Config, rollout: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Passes of every optional stage by kind.

    Args:
        task: the model with its data.
        config: the resolved config.
        rollout: those of one rollout, of which the what-if of screen takes two.
    """
    return {
        "verify": _verify(task, config),
        "screen": _screen(task, config, rollout),
        "guard": _guard(task, config),
    }


def optional_sizes(task: Task, config: Config, seen: Mapping[str, float]) -> dict[str, float]:
    """Peak memory of every optional stage in GB.

    Args:
        task: the model with its data.
        config: the resolved config.
        seen: peak memory of this process (GB) by kind of pass.
    """
    count = layout_of(task.model, task.parameter_names).numel
    vector, explained = count * 4 / 1e9, min(ENTRIES, config.screen.examples * count) * 4 / 1e9
    return {
        "verify": seen["gradients"] + COPIES_OF_A_RUN * vector,
        "screen": seen["per sample"] + COPIES_OF_SCREEN * vector + explained,
        "guard": seen["gradients"] + COPIES_OF_GUARD * vector,
    }


def _per_step(config: Config) -> int:
    return config.training.batch_size * config.training.gradient_accumulation


def _looked(task: Task, control: int) -> int:
    """Rows whose loss is measured at every point of a real run."""
    held = len(task.heldout.rows) if task.heldout else len(task.safety.rows)
    return held + (min(len(task.control.rows), control) if task.control else 0)


def _answers(task: Task, prompts: int, tokens: int, times: int) -> float:
    samples = task.heldout or task.safety
    return 0.0 if samples.generate is None else float(min(prompts, len(samples.rows)) * tokens * times)


def followed_rows(task: Task, config: Config) -> float:
    """Prompts whose own openings are followed at every point."""
    return sum(count for _, count in _followed(task, config))


def answer_tokens(task: Task, config: Config, times: int) -> float:
    """Tokens of the answers of a run that are written so often."""
    return followed_rows(task, config) * config.behaviour.tokens * times


def _followed(task: Task, config: Config) -> list[tuple[SampleSet, int]]:
    given = config.behaviour
    sets = [(task.safety, given.prompts), (task.control, given.ordinary_prompts if given.prompts else 0)]
    return [
        (samples, min(count, len(samples.rows)))
        for samples, count in sets
        if samples is not None and samples.generate is not None and count
    ]


def _verify(task: Task, config: Config) -> dict[str, float]:
    steps, given = planned_steps(config.training, len(task.finetune.rows)), config.verify
    points = measured_steps(min(given.steps or steps, steps))
    return {
        "gradient rows": points[-1] * _per_step(config),
        "forward rows": len(points) * (_looked(task, given.control_samples) + followed_rows(task, config)),
        "answer tokens": answer_tokens(task, config, len(writing_steps(points))),
    }


def _screen(task: Task, config: Config, rollout: Mapping[str, float]) -> dict[str, float]:
    given, rows = config.screen, len(task.finetune.rows)
    safety, layout = len(task.safety.rows), layout_of(task.model, task.parameter_names)
    control = min(len(task.control.rows), given.control_samples) if task.control else 0
    points = 2 if given.points == "both" else 1
    steps = planned_steps(config.training, rows)
    walked = 0 if given.points == "start" else min(given.max_steps, steps)
    examples = min(given.examples, rows)
    exact, looked = rows, 0
    estimates = given.method
    if estimates == "auto":
        estimates = "differences" if worth_estimating(task.model, layout, rows) else "exact"
    if estimates != "exact":
        exact = min(rows, CHECKED + max(HEAD, round(HEAD_SHARE * rows)))
        looked = rows * ESTIMATE[estimates]
    counts: dict[str, float] = {
        "gradient rows": walked * _per_step(config)
        + points * (given.batches * config.training.batch_size + control),
        "forward rows": math.ceil(walked / EVERY) * safety + points * (safety + control + looked),
        "single-row gradients": points * (SAFETY_PASSES * safety + exact + control) + 2 * examples + safety,
        "products": points * (exact + control),
        "product columns": points * len(COLUMNS) * (exact + control),
    }
    if given.what_if and config.rollout.enabled:
        counts = {k: counts.get(k, 0.0) + 2 * rollout.get(k, 0.0) for k in {*counts, *rollout}}
    return counts


def _guard(task: Task, config: Config) -> dict[str, float]:
    given, safety, arms = config.guard, len(task.safety.rows), arm_names(config.guard)
    steps = planned_steps(config.training, len(task.finetune.rows))
    points = measured_steps(min(given.steps or steps, steps))
    counts = {
        "gradient rows": 0.0,
        "forward rows": 0.0,
        "single-row gradients": 0.0,
        "answer tokens": _answers(task, given.generate, given.max_new_tokens, len(arms) + 1),
    }
    for arm in arms:
        counts["gradient rows"] += points[-1] * _per_step(config)
        counts["forward rows"] += len(points) * (_looked(task, given.control_samples) + given.task_samples)
        if arm.method in ("alignguard", "ewc") or arm.kind == "subspace":
            counts["single-row gradients"] += safety
        if arm.method in ("alignguard", "ewc") and arm.kind == "loss":
            counts["gradient rows"] += given.calibration_steps * _per_step(config)
        if arm.method == "replay" or arm.kind == "conflict":
            rows = given.replay.rows if arm.method == "replay" else given.projection.rows
            counts["gradient rows"] += points[-1] * rows
    return counts
