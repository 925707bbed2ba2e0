"""What verify will take, and what every real run takes for its measurements."""

from __future__ import annotations

from arisk.anatomy.cost import numel, samples_in
from arisk.base.task import Task
from arisk.config.plan import Config, planned_steps
from arisk.engine.stage import Cost, CostScene
from arisk.forecast.run import answer_tokens, followed_rows
from arisk.verification.run import measured_steps, writing_steps

__all__ = ["COPIES_OF_A_RUN", "looked", "per_step", "verify_cost"]

#: Copies of the selected parameters beside the model in a plain run.
COPIES_OF_A_RUN = 4


def per_step(config: Config) -> int:
    """Rows of one optimizer step."""
    return config.training.batch_size * config.training.gradient_accumulation


def looked(task: Task, control: int) -> int:
    """Rows whose loss is measured at every point of a real run."""
    held = samples_in(task.heldout or task.safety)
    return held + (min(samples_in(task.control), control))


def verify_cost(scene: CostScene) -> Cost:
    """The planned steps, and the losses and answers along them."""
    task, config, given = scene.task, scene.config, scene.config.verify
    steps = planned_steps(config.training, task.finetune.units)
    points = measured_steps(min(given.steps or steps, steps))
    moving = COPIES_OF_A_RUN * numel(task) * 4 / 1e9
    on_device = scene.device.get("gradients")
    return Cost(
        passes={
            "gradient rows": points[-1] * per_step(config),
            "forward rows": len(points) * (looked(task, given.control_samples) + followed_rows(scene)),
            "answer tokens": answer_tokens(scene, len(writing_steps(points))),
        },
        seconds=scene.loading,
        memory_gb=scene.memory["gradients"] + moving,
        device_gb=None if on_device is None else on_device + moving,
    )
