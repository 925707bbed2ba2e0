"""What guard will take; what a penalty costs beside a step is not counted."""

from __future__ import annotations

from arisk.anatomy.cost import numel, samples_in
from arisk.base.task import Task
from arisk.config.plan import planned_steps
from arisk.engine.stage import Cost, CostScene
from arisk.guard.methods import METHODS, arm_names
from arisk.verification.cost import COPIES_OF_A_RUN, looked, per_step
from arisk.verification.run import measured_steps

__all__ = ["guard_cost"]

#: Copies of the selected parameters beside the model: a run, the reference and a Fisher diagonal.
COPIES = 6


def guard_cost(scene: CostScene) -> Cost:
    """Every arm's real run, measured as verify measures, and what its protection needs beforehand."""
    vector, on_device = numel(scene.task) * 4 / 1e9, scene.device.get("gradients")
    return Cost(
        passes=_passes(scene),
        seconds=scene.loading,
        memory_gb=scene.memory["gradients"] + COPIES * vector,
        device_gb=None if on_device is None else on_device + (COPIES_OF_A_RUN + 2) * vector,
    )


def _answers(task: Task, prompts: int, tokens: int, times: int) -> float:
    """Generated tokens of a run: prompts × tokens × times; 0 where the task cannot answer."""
    samples = task.heldout or task.safety
    return 0.0 if samples.generate is None else float(min(prompts, len(samples.rows)) * tokens * times)


def _passes(scene: CostScene) -> dict[str, float]:
    task, config = scene.task, scene.config
    given, safety, arms = config.guard, samples_in(task.safety), arm_names(config.guard)
    steps = planned_steps(config.training, task.finetune.units)
    points = measured_steps(min(given.steps or steps, steps))
    counts = {
        "gradient rows": 0.0,
        "forward rows": 0.0,
        "single-row gradients": 0.0,
        "answer tokens": _answers(task, given.generate, given.max_new_tokens, len(arms) + 1),
    }
    for arm in arms:
        counts["gradient rows"] += points[-1] * per_step(config)
        counts["forward rows"] += len(points) * (looked(task, given.control_samples) + given.task_samples)
        method = METHODS[arm.method]
        if method.safety_gradients(arm):
            counts["single-row gradients"] += safety
        if method.calibrated(arm):
            counts["gradient rows"] += given.calibration_steps * per_step(config)
        counts["gradient rows"] += points[-1] * method.rows(arm, given)
    return counts
