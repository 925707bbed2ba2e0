"""What rollout and forecast will take."""

from __future__ import annotations

from arisk.anatomy.cost import kept_gradients, krylov_steps, numel, samples_in, score_memory
from arisk.config.plan import planned_steps
from arisk.engine.stage import Cost, CostScene
from arisk.forecast.forecasters import PATH_BUDGET, PATH_POINTS
from arisk.forecast.leap import SCORED_SHARE
from arisk.forecast.leap import rollout_cost as counted
from arisk.forecast.rollout import SCALES
from arisk.training.recipe import recipe_of

__all__ = ["answer_tokens", "followed_rows", "forecast_cost", "rollout_cost", "rollout_passes"]

#: Points of a rollout at which answers are written, about: the start, the pilot's end, the end, one between.
ANSWERED_POINTS = 4

#: Copies of the selected parameters beside the model in a rollout: θ*, gradient, two moments, the anchor,
#: direction, mean and square of a block, the leap.
COPIES = 9
#: Seconds of the forecast, and the bootstrap draws to which they belong.
BOOTSTRAP, DRAWS = 0.9, 400
#: Multiplications a second of the recursion over optimizer steps, which is bound by memory.
RATE = 5e9


def followed_rows(scene: CostScene) -> float:
    """Prompts whose own openings are followed at every point."""
    task, given = scene.task, scene.config.behaviour
    sets = [(task.safety, given.prompts), (task.control, given.ordinary_prompts if given.prompts else 0)]
    return sum(
        min(count, len(samples.rows))
        for samples, count in sets
        if samples is not None and samples.generate is not None
    )


def answer_tokens(scene: CostScene, times: int) -> float:
    """Tokens of the answers of a run that are written so often."""
    return followed_rows(scene) * scene.config.behaviour.tokens * times


def rollout_passes(scene: CostScene) -> dict[str, float]:
    """Passes of one rollout by kind; empty where it is off."""
    task, config = scene.task, scene.config
    if not config.rollout.enabled:
        return {}
    safety, control = samples_in(task.safety), samples_in(task.control)
    steps = planned_steps(config.training, task.finetune.units)
    per_step = config.training.batch_size * config.training.gradient_accumulation
    rolled, measurements = counted(steps, config.rollout)
    measured = min(safety, config.rollout.eval_samples or safety)
    both = measured + min(control, config.rollout.control_samples)
    return {
        "gradient rows": rolled * per_step,
        "forward rows": measurements * (both + followed_rows(scene))
        + 2 * measured
        + measurements * per_step  # The loss before a leap.
        + (SCORED_SHARE * steps * per_step if config.rollout.rare_rows else 0),
        "output losses": len(SCALES) * measured,
        "answer tokens": answer_tokens(scene, ANSWERED_POINTS),
    }


def rollout_cost(scene: CostScene) -> Cost:
    """Real steps, leaps, and the losses measured along them."""
    vector, on_device = numel(scene.task) * 4 / 1e9, scene.device.get("gradients")
    copies = COPIES * vector if scene.config.rollout.enabled else 0.0
    return Cost(
        passes=rollout_passes(scene),
        memory_gb=scene.memory["gradients"] + copies,
        device_gb=None if on_device is None else on_device + COPIES * vector,
    )


def forecast_cost(scene: CostScene) -> Cost:
    """Bootstrap and exact recursion of the local model; the model runs only where no gradients are kept."""
    scale = scene.config.forecast.bootstrap_samples / DRAWS
    _, _, directions = score_memory(scene)
    path, passes = _path_operations(scene), dict[str, float]()
    store = kept_gradients(scene.task, scene.config, scene.run_dir)
    if path and store.plan is not None and store.plan.store == "gram":
        safety = samples_in(scene.task.safety)
        points = min(planned_steps(scene.config.training, scene.task.finetune.units), PATH_POINTS)
        passes = {"single-row gradients": safety, "product columns": safety * points}
    return Cost(
        passes=passes,
        seconds=BOOTSTRAP * scale + path / RATE,
        memory_gb=scene.memory["gradients"] + 2 * directions,
    )


def _path_operations(scene: CostScene) -> float:
    """Multiplications of the exact recursion; 0 where it is too long and left out."""
    task, config, training = scene.task, scene.config, scene.config.training
    steps = planned_steps(training, task.finetune.units)
    recipe = recipe_of(training, steps)
    count = numel(task) * steps * (4 * krylov_steps(task, config) + 20)
    left_out = recipe.plain or recipe.kind.recursion is None
    return 0.0 if left_out or count > PATH_BUDGET else float(count)
