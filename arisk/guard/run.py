"""Stage guard: the planned fine-tune really carried out, plain and with every protection, and its cost.

All arms start from the same model and see the same batches in the same order; the model is put back to the
bit after each. A finished arm is kept on disk, and an unfinished one goes on where it was saved. Counted
beforehand is everything but what a penalty costs beside a step.
"""

from __future__ import annotations

from pathlib import Path

from arisk.anatomy.cost import numel, samples_in
from arisk.base.artifacts import read_record, write_record
from arisk.base.processes import from_first, is_first
from arisk.base.task import Progress, Task, silent
from arisk.config.plan import TrainingConfig, planned_steps
from arisk.config.sections import BehaviourConfig, GuardSettings
from arisk.engine.stage import Cost, CostScene
from arisk.gradients import layout_of, measuring
from arisk.guard.arm import ArmRun
from arisk.guard.methods import METHODS, ArmPlan, arm_names
from arisk.guard.record import Arm, GuardResult
from arisk.training.loop import PlannedRun, draws_noise, keeping_parameters
from arisk.training.recipe import recipe_of
from arisk.verification.record import VerifyResult
from arisk.verification.run import (
    COPIES_OF_A_RUN,
    TaskRows,
    Writer,
    looked,
    measured_steps,
    per_step,
    task_rows,
    writer,
)

__all__ = ["guard", "guard_cost"]


def guard(
    task: Task,
    *,
    config: GuardSettings,
    training: TrainingConfig,
    steps: int,
    seed: int = 0,
    behaviour: BehaviourConfig | None = None,
    workspace: Path | None = None,
    measured: VerifyResult | None = None,
    progress: Progress = silent,
) -> GuardResult:
    """Fine-tune as planned, once per arm, and measure safety, control and task losses along the way.

    Args:
        task: model and data; the model is left as found.
        config: arms and their settings.
        training: the planned recipe.
        steps: planned optimizer steps T; the schedule is theirs however early the arms stop.
        seed: seeds dropout, directions and safety minibatches.
        behaviour: the judge that tells own refusals; default the rule.
        workspace: folder for finished arms and the state of an unfinished one; None keeps none.
        measured: the same plan as `verify` carried it out; the plain arm, where it measured the same.
        progress: told of optimizer steps done.

    Returns:
        The record; an arm that diverges is recorded as such. Where the plain arm diverges, the others
        are not run: there is nothing to compare them with.

    Raises:
        NumericsError: the safety loss at the aligned point is not finite, or no strength can be set.
        ConfigError: a method cannot be used on this model.
        InputError: a data set gives no batch.
    """
    layout = layout_of(task.model, task.parameter_names)
    recipe = recipe_of(training, steps)
    last = min(config.steps or steps, steps)
    points = measured_steps(last)
    arms: list[Arm] = []
    with measuring(task.model, layout):
        samples = task.heldout or task.safety
        writes = writer(samples, config.generate, config.max_new_tokens, setting="guard.generate")
        aligned = writes.texts(task.model)
        first = PlannedRun(task, layout, recipe, seed)
        judged = task_rows(task, first.stream, config.task_samples, first.batches_of(last).stop)
        plan = ArmPlan(
            task, layout, recipe, config, behaviour or BehaviourConfig(), last, frozenset(points), seed
        )
        names = arm_names(config)
        for number, name in enumerate(names):
            folder = workspace / f"arm-{number:02d}" if workspace else None
            done = from_first(lambda folder=folder: _finished(folder))
            if done is None:
                with keeping_parameters(task.model, layout):
                    run = ArmRun(
                        plan, judged, writes, points, name, f"arm {number + 1} of {len(names)}", progress
                    )
                    done = run.taken_over(measured) if number == 0 and measured is not None else None
                    done = done or run.carry_out(folder)
                _keep(folder, done)
            arms.append(done)
            if number == 0 and done.diverged_at is not None:
                break
    return _result(plan, judged, writes, aligned, arms, steps, last)


def _finished(folder: Path | None) -> Arm | None:
    """An arm that an earlier process finished."""
    if folder is None or not (folder / "record.json").exists():
        return None
    return read_record(folder, Arm)


def _keep(folder: Path | None, arm: Arm) -> None:
    """Write a finished arm; the state it was resumed from is then of no more use."""
    if folder is None or not is_first():
        return
    write_record(folder, arm)
    (folder / "state.json").unlink(missing_ok=True)
    for state in folder.glob("state-*.safetensors"):
        state.unlink()


def _result(
    plan: ArmPlan,
    judged: TaskRows,
    writes: Writer,
    aligned: list[str],
    arms: list[Arm],
    steps: int,
    last: int,
) -> GuardResult:
    task = plan.task
    shared = _shared_prompts(task)
    plain = arms[0]
    warnings: list[str] = list(judged.warnings)
    if task.heldout is None:
        warnings.append(
            "The safety rows measured are those that the protections use: their drift is too favourable. "
            "Give `verify.safety`."
        )
    elif shared:
        warnings.append(
            f"{shared} of {len(task.heldout.rows)} held-out rows have a prompt of the safety data."
        )
    if task.control is None:
        warnings.append("No control data: a general drift cannot be told from a loss of safety.")
    if plain.diverged_at is not None:
        warnings.append(f"The plain run diverged at step {plain.diverged_at}: no other arm was run.")
    if draws_noise(task.model):
        warnings.append("Training used the model's dropout; directions and calibration leave it out.")
    return GuardResult(
        horizon=steps,
        last=last,
        arms=arms,
        safety_rows=len(plain.final_safety),
        heldout=task.heldout is not None and shared < len(plain.final_safety),
        start=plain.safety_start,
        task_rows=judged.count,
        task_source=judged.source,
        trained_rows=judged.trained,
        warnings=warnings,
        prompts=writes.prompts,
        aligned_answers=aligned,
        generation_reason=writes.reason,
    )


def _shared_prompts(task: Task) -> int:
    """Held-out rows whose prompt the protections use, as far as the task names its rows."""
    if task.heldout is None:
        return 0
    used = {row.get("prompt") for row in task.safety.rows} - {None, ""}
    return sum(row.get("prompt") in used for row in task.heldout.rows)


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
        if method.references:
            counts["forward rows"] += min(samples_in(task.finetune), points[-1] * per_step(config))
        if method.calibrated(arm):
            counts["gradient rows"] += given.calibration_steps * per_step(config)
        counts["gradient rows"] += points[-1] * method.rows(arm, given)
    return counts
