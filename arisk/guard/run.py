"""Stage guard: the planned fine-tune really carried out, plain and protected, and its cost.

All arms start from the same model and see the same batches in the same order; the model is put back to the
bit after each. Every arm is forecast first, and the best are trained. A finished arm is kept on disk, and an
unfinished one goes on where it was saved. Counted beforehand is everything but what a penalty costs beside a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arisk.anatomy.cost import numel, samples_in
from arisk.base.artifacts import RECORD_FILE, read_record, read_tensors, write_record, write_tensors
from arisk.base.processes import from_first, is_first
from arisk.base.task import Progress, Task, silent
from arisk.config.plan import TrainingConfig, planned_steps
from arisk.config.sections import BehaviourConfig, GuardSettings
from arisk.engine.stage import Cost, CostScene
from arisk.gradients import layout_of, measuring
from arisk.gradients.layout import parameters_of
from arisk.guard.arm import ArmRun, Looks
from arisk.guard.choice import best_forecasts
from arisk.guard.methods import METHODS, arm_names, methods_of, protection
from arisk.guard.outlook import CONTROL_ROWS, ROWS, ForecastRows, forecast_arm, saves, short_steps
from arisk.guard.plan import ArmName, ArmPlan, measured_points
from arisk.guard.record import NEVER_BEGUN, Arm, ArmForecast, GuardResult
from arisk.guard.references import kept_gb
from arisk.training.loop import draws_noise, keeping_parameters, put
from arisk.verification.record import VerifyResult
from arisk.verification.run import (
    COPIES_OF_A_RUN,
    Writer,
    looked,
    per_step,
    task_rows,
    writer,
)

__all__ = ["ArmComparison", "Keep", "guard", "guard_cost"]


@dataclass(frozen=True)
class Keep:
    """What becomes of the recommended arm's weights.

    Attributes:
        choose: the label of the arm that is kept, from the record; None keeps none.
        save: is handed the model with its weights.
    """

    choose: Callable[[GuardResult], str | None]
    save: Callable[[nn.Module], None]


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
    keep: Keep | None = None,
    progress: Progress = silent,
) -> GuardResult:
    """Fine-tune as planned, plain and protected, and measure safety, control and task losses along the way.

    The plain arm is trained first. Then every other arm is forecast by a short run with its protection in it,
    and the best two are trained; all are, where `config.all` says so or forecasts would save nothing.

    Args:
        task: model and data; the model is left as found.
        config: arms and their settings.
        training: the planned recipe.
        steps: planned optimizer steps T; the schedule is theirs however early the arms stop.
        seed: seeds dropout, directions and safety minibatches.
        behaviour: the judge that tells own refusals; default the rule.
        workspace: folder for finished arms and the state of an unfinished one; None keeps none.
        measured: the same plan as `verify` carried it out; the plain arm, where it measured the same.
        keep: what becomes of the recommended arm's weights; None: they go.
        progress: told of optimizer steps done.

    Returns:
        The record; an arm that diverges is recorded as such. Where the plain arm diverges, the others
        are not run: there is nothing to compare them with. On a further seed that leaves out the seed, on
        the plan's own all of them.

    Raises:
        NumericsError: the safety loss at the aligned point is not finite, or no strength can be set.
        ConfigError: a method that the config names cannot be used on this model.
        InputError: a data set gives no batch.
    """
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        plan = ArmPlan.of(
            task, layout, config=config, training=training, steps=steps, seed=seed, behaviour=behaviour
        )
        found = ArmComparison(plan, workspace, measured, keep, progress)
        arms, forecasts = found.first()
        repeats = list[Arm]()
        if arms[0].diverged_at is None:
            for number in range(1, config.seeds):
                repeats += found.repeated(number, arms, forecasts)
        result = _result(plan, found, arms, forecasts, repeats)
        if keep is not None:
            found.keep_chosen(result, keep)
    return result


class ArmComparison:
    """All arms of one plan, at the aligned point and inside `measuring`.

    Args:
        plan: the planned run without protection.
        workspace, measured, keep, progress: see `guard`.

    Raises:
        InputError: a data set gives no batch.
    """

    def __init__(
        self,
        plan: ArmPlan,
        workspace: Path | None,
        measured: VerifyResult | None = None,
        keep: Keep | None = None,
        progress: Progress = silent,
    ) -> None:
        self.plan, self.workspace, self.measured = plan, workspace, measured
        self.progress, self.keeps = progress, keep is not None
        task, config, tokens = plan.task, plan.config, plan.config.max_new_tokens
        first = plan.fresh()
        samples = task.heldout or task.safety
        writes = writer(samples, config.generate, tokens, setting="guard.generate")
        ordinary = _ordinary(task, config)
        judged = task_rows(task, first.stream, config.task_samples, first.batches_of(plan.last).stop)
        self.looks = Looks(judged, writes, ordinary)
        self.aligned, self.aligned_ordinary = writes.texts(task.model), ordinary.texts(task.model)
        self.names = arm_names(config, task)
        self.numbers = {name.label: number for number, name in enumerate(self.names)}
        self.derived = [name for name in self.names if METHODS[name.method].read_off is not None]
        self.others = [name for name in self.names[1:] if name not in self.derived]
        #: Weights of finished arms, where there is no workspace to keep them in.
        self.ends: dict[str, list[Tensor]] = {}

    def first(self) -> tuple[list[Arm], list[ArmForecast]]:
        """The arms of the plan's own seed, and the forecasts that chose them."""
        plain = self.plain(self.plan, 0)
        if plain[0].diverged_at is not None:
            return plain[:1], []
        forecasts = list[ArmForecast]()
        chosen = self.others
        if not self.plan.config.all and saves(self.plan.last, len(self.others), BEST):
            forecasts = self.forecasts(plain[0])
            labels = self.best(forecasts, plain[0])
            forecasts = [replace(one, chosen=one.label in labels) for one in forecasts]
            chosen = [name for name in self.others if name.label in labels]
        plan = replace(self.plan, plain=plain[0], rises=_at_risk(forecasts))
        arms = [*plain, *self.trained(plan, chosen, 0)]
        return sorted(arms, key=lambda arm: self.numbers[arm.label]), forecasts

    def best(self, forecasts: Sequence[ArmForecast], plain: Arm) -> list[str]:
        """Labels of the arms that are trained: all, where larger steps diverge though the plan does not."""
        whole = [one for one in forecasts if one.diverged_at is None]
        if forecasts[0].diverged_at is not None or len(whole) <= BEST:
            return [name.label for name in self.others]
        return best_forecasts(forecasts, self.plan.config.tolerated_task_loss, BEST, plain)

    def repeated(self, number: int, arms: Sequence[Arm], forecasts: Sequence[ArmForecast]) -> list[Arm]:
        """The same arms once more, on the data in another order; rows at risk are those of the forecasts."""
        plan = self.plan_of(number)
        plain = self.plain(plan, number)
        labels = {arm.label for arm in arms if arm.diverged_at != NEVER_BEGUN}
        chosen = [name for name in self.others if name.label in labels]
        if plain[0].diverged_at is not None:
            return plain[:1]
        return [
            *plain,
            *self.trained(replace(plan, plain=plain[0], rises=_at_risk(forecasts)), chosen, number),
        ]

    def plan_of(self, number: int) -> ArmPlan:
        """The plan of a seed; 0 is the plan's own."""
        if number == 0:
            return self.plan
        finetune = self.plan.task.finetune
        batches: Any = finetune.batches
        if hasattr(batches, "reseeded"):
            finetune = replace(finetune, batches=batches.reseeded(STRIDE * number))
        task = replace(self.plan.task, finetune=finetune)
        return replace(self.plan, task=task, seed=self.plan.seed + STRIDE * number)

    def plain(self, plan: ArmPlan, repeat: int) -> list[Arm]:
        """The plain arm, and those that are read off it."""
        found = [self.finished(name, repeat) for name in (self.names[0], *self.derived)]
        if None not in found:
            return [arm for arm in found if arm is not None]
        if not repeat:
            self.check_named()
        name, config = self.names[0], plan.config
        shares = [
            s for method in {one.method for one in self.derived} for s in METHODS[method].shares(config)
        ]
        with keeping_parameters(plan.task.model, plan.layout) as start:
            run = ArmRun(
                plan, self.looks, name, self.said(name, 1, 1), self.progress, repeat=repeat, averages=shares
            )
            whole = self.measured is not None and not (self.derived or self.keeps or repeat)
            arm = run.taken_over(self.measured) if whole and self.measured is not None else None
            arm = arm or run.carry_out(self.folder(name, repeat))
            arms = [arm]
            self.ended(arm, repeat)
            if arm.diverged_at is None and self.derived:
                left = run.plain_run(start)
                for other in self.derived:
                    read_off = METHODS[other.method].read_off
                    assert read_off is not None
                    arms.append(run.read_off(other, read_off(other, left)))
                    self.ended(arms[-1], repeat)
        for each in arms[::-1]:
            _keep(self.folder(self.name_of(each), repeat), each)
        return arms

    def check_named(self) -> None:
        """Set up what the config names and what may find nothing to train on, before anything is trained.

        Raises:
            InputError: the judge takes no answer of the aligned model for a refusal.
            ConfigError: the method cannot be used on this task.
        """
        if OWN in (self.plan.config.methods or ()):
            protection(self.plan, next(name for name in self.others if name.method == OWN))

    def forecasts(self, plain: Arm) -> list[ArmForecast]:
        """Every arm that trains, as a short run sees it, plain first."""
        names = [self.names[0], *self.others]
        plan = replace(self.plan, plain=plain)
        found: list[ArmForecast] = []
        for number, name in enumerate(names):
            self.progress(f"forecast: {name.label}", number, len(names))
            done = self.forecast(plan, name)
            found.append(done)
            if number == 0:
                plan = replace(plan, rises=_at_risk(found))
        self.progress("forecast", len(names), len(names))
        return found

    def forecast(self, plan: ArmPlan, name: ArmName) -> ArmForecast:
        """One arm, as a short run sees it."""
        folder = self.folder(name, 0, "forecast")
        done = from_first(lambda: _read(folder, ArmForecast))
        if done is None:
            done = forecast_arm(plan, name, self.forecast_rows, rises=name is self.names[0])
            if folder is not None and is_first():
                write_record(folder, done)
        return done

    @cached_property
    def forecast_rows(self) -> ForecastRows:
        """What every forecast measures."""
        return ForecastRows.of(self.plan, self.looks.judged)

    def trained(self, plan: ArmPlan, names: Sequence[ArmName], repeat: int) -> list[Arm]:
        """These arms, one after the other from the same start."""
        arms: list[Arm] = []
        for number, name in enumerate(names):
            folder = self.folder(name, repeat)
            done = self.finished(name, repeat)
            if done is None:
                with keeping_parameters(plan.task.model, plan.layout):
                    said = self.said(name, number + 2, len(names) + 1)
                    run = ArmRun(plan, self.looks, name, said, self.progress, repeat=repeat)
                    done = run.carry_out(folder)
                    self.ended(done, repeat)
                _keep(folder, done)
            arms.append(done)
        return arms

    def said(self, name: ArmName, number: int, count: int) -> str:
        """An arm for the progress display."""
        return f"arm {number} of {count}" if len(self.names) > 1 else name.label

    def name_of(self, arm: Arm) -> ArmName:
        """The name of an arm that was carried out."""
        return self.names[self.numbers[arm.label]]

    def folder(self, name: ArmName, repeat: int, kind: str = "") -> Path | None:
        """Where an arm is kept; None where none are."""
        parts = ["arm", f"{self.numbers[name.label]:02d}", *([f"seed{repeat}"] if repeat else []), kind]
        return None if self.workspace is None else self.workspace / "-".join(part for part in parts if part)

    def finished(self, name: ArmName, repeat: int) -> Arm | None:
        """An arm that an earlier process finished; None as well where its weights are wanted and gone."""
        folder = self.folder(name, repeat)
        done = from_first(lambda: _read(folder, Arm))
        if done is None or not self.keeps or repeat or done.diverged_at is not None:
            return done
        assert folder is not None
        return done if from_first((folder / END).exists) else None

    def ended(self, arm: Arm, repeat: int) -> None:
        """Keep the weights of an arm that stands at its end: on disk, as all arms' would fill the memory."""
        if not self.keeps or repeat or arm.diverged_at is not None:
            return
        parameters = parameters_of(self.plan.task.model, self.plan.layout)
        folder = self.folder(self.name_of(arm), repeat)
        if folder is None:
            self.ends[arm.label] = [p.detach().cpu().clone() for p in parameters]
        elif is_first():
            write_tensors(folder / END, {str(i): p.detach().cpu() for i, p in enumerate(parameters)})

    def keep_chosen(self, result: GuardResult, keep: Keep) -> None:
        """Hand over the model with the weights of the recommended arm."""
        label = keep.choose(result)
        if label is None or not is_first():
            return
        folder = self.folder(self.names[self.numbers[label]], 0)
        parameters = parameters_of(self.plan.task.model, self.plan.layout)
        if folder is None:
            values = self.ends[label]
        else:
            kept = read_tensors(folder / END)
            values = [kept[str(i)] for i in range(len(parameters))]
        with keeping_parameters(self.plan.task.model, self.plan.layout):
            put(parameters, values)
            keep.save(self.plan.task.model)


def _at_risk(forecasts: Sequence[ArmForecast]) -> Tensor | None:
    """(N,) rise of each safety row's loss, as the plain arm's forecast tells it; None where none does."""
    rises = forecasts[0].rises if forecasts else []
    return torch.tensor(rises, dtype=torch.float64) if rises else None


def _ordinary(task: Task, config: GuardSettings) -> Writer:
    """Control prompts that are answered, or why none are."""
    if task.control is None:
        return Writer([], [], config.max_new_tokens, None, "there is no control data")
    count = config.ordinary if config.generate else 0
    return writer(task.control, count, config.max_new_tokens, setting="guard.ordinary")


#: From the seed of one repeat to that of the next. Epoch e is shuffled, and step t draws its noise, by
#: seed + e or t: so near seeds would share nearly all of both.
STRIDE = 1_000_000
#: The method whose rows the aligned model writes itself.
OWN = "own_replay"
#: Arms that are trained after all have been forecast.
BEST = 2
#: Weights of a finished arm, where the recommended one is to be kept.
END = "end.safetensors"
Record = TypeVar("Record")


def _read(folder: Path | None, kind: type[Record]) -> Record | None:
    """A record that an earlier process wrote."""
    if folder is None or not (folder / RECORD_FILE).exists():
        return None
    return read_record(folder, kind)


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
    found: ArmComparison,
    arms: list[Arm],
    forecasts: list[ArmForecast],
    repeats: list[Arm],
) -> GuardResult:
    task, looks, plain = plan.task, found.looks, arms[0]
    shared = _shared_prompts(task)
    return GuardResult(
        horizon=plan.recipe.horizon,
        last=plan.last,
        arms=arms,
        safety_rows=len(plain.final_safety),
        heldout=task.heldout is not None and shared < len(plain.final_safety),
        start=plain.safety_start,
        task_rows=looks.judged.count,
        task_source=looks.judged.source,
        trained_rows=looks.judged.trained,
        warnings=[*looks.judged.warnings, *_warnings(plan, plain, shared, repeats)],
        prompts=looks.writes.prompts,
        aligned_answers=found.aligned,
        generation_reason=looks.writes.reason,
        ordinary_prompts=looks.ordinary.prompts,
        ordinary_answers=found.aligned_ordinary,
        forecasts=forecasts,
        repeats=repeats,
    )


def _warnings(plan: ArmPlan, plain: Arm, shared: int, repeats: Sequence[Arm]) -> list[str]:
    """Sentences for the report."""
    task = plan.task
    warnings: list[str] = []
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
    gone = [arm for arm in repeats if arm.label == plain.label and arm.diverged_at is not None]
    if gone:
        steps = ", ".join(str(arm.diverged_at) for arm in gone)
        warnings.append(
            f"The plain run diverged on {len(gone)} of {plan.config.seeds} seeds (at step {steps}): arms are "
            "compared on the others."
        )
    if draws_noise(task.model):
        warnings.append("Training used the model's dropout; directions and calibration leave it out.")
    batches: Any = task.finetune.batches
    if repeats and not (hasattr(batches, "reseeded") and plan.recipe.training.order == "shuffled"):
        warnings.append(
            "The data has one order: further seeds change dropout and minibatches of safety rows alone."
        )
    warnings += [f"{method} is left out: {why}." for method, why in methods_of(plan.config, task)[1].items()]
    return warnings


def _shared_prompts(task: Task) -> int:
    """Held-out rows whose prompt the protections use, as far as the task names its rows."""
    if task.heldout is None:
        return 0
    used = {row.get("prompt") for row in task.safety.rows} - {None, ""}
    return sum(row.get("prompt") in used for row in task.heldout.rows)


#: Copies of the selected parameters beside the model: a run, two references and a Fisher diagonal.
COPIES = 7


def guard_cost(scene: CostScene) -> Cost:
    """Every arm's real run, measured as verify measures, and what its protection needs beforehand."""
    vector, on_device = numel(scene.task) * 4 / 1e9, scene.device.get("gradients")
    arms = arm_names(scene.config.guard, scene.task)
    kept = kept_gb(scene.task) if any(arm.method == "kl" for arm in arms) else 0.0
    return Cost(
        passes=_passes(scene),
        seconds=scene.loading,
        memory_gb=scene.memory["gradients"] + COPIES * vector + kept,
        device_gb=None if on_device is None else on_device + (COPIES_OF_A_RUN + 2) * vector + kept,
    )


def _answers(task: Task, config: GuardSettings) -> float:
    """Generated tokens of an arm's answers; 0 where the task cannot answer."""
    sets = [(task.heldout or task.safety, config.generate)]
    sets += [(task.control, config.ordinary if config.generate else 0)] if task.control else []
    prompts = sum(min(count, len(s.rows)) for s, count in sets if s.generate is not None)
    return float(prompts * config.max_new_tokens)


#: Passes of the model that are counted.
KINDS: tuple[str, ...] = ("gradient rows", "forward rows", "single-row gradients", "answer tokens")


def _passes(scene: CostScene) -> dict[str, float]:
    task, config = scene.task, scene.config
    given, arms = config.guard, arm_names(config.guard, task)
    steps = planned_steps(config.training, task.finetune.units)
    last = min(given.steps or steps, steps)
    points = len(measured_points(last))
    derived = [arm for arm in arms if METHODS[arm.method].read_off is not None]
    others = [arm for arm in arms[1:] if arm not in derived]
    measuring_rows = looked(task, given.control_samples) + given.task_samples
    written = _answers(task, given)
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    total["answer tokens"] = written * (1 + given.seeds * len(derived))
    total["forward rows"] = float(given.seeds * len(derived) * measuring_rows)
    whole = [_arm_passes(scene, arm, last) for arm in others]
    _add(total, _setting_up(scene, others, last))
    if not given.all and saves(last, len(others), BEST):
        for arm in (arms[0], *others):
            _add(total, _arm_passes(scene, arm, short_steps(last)))
            total["forward rows"] += ROWS + CONTROL_ROWS + given.task_samples + given.generate
        # Which are trained is not known beforehand: no dearer ones than these.
        whole = sorted(whole, key=lambda passes: -passes["gradient rows"])[:BEST]
    for passes in given.seeds * [_arm_passes(scene, arms[0], last), *whole]:
        _add(total, passes)
        total["forward rows"] += points * measuring_rows
        total["answer tokens"] += written
    return total


def _add(total: dict[str, float], passes: Mapping[str, float]) -> None:
    for kind, count in passes.items():
        total[kind] += count


def _arm_passes(scene: CostScene, arm: ArmName, steps: int) -> dict[str, float]:
    """Passes of so many steps of an arm, setting up and measuring left out."""
    method, config = METHODS[arm.method], scene.config
    rows = steps * (per_step(config) + method.rows(arm, config.guard))
    return {**dict.fromkeys(KINDS, 0.0), "gradient rows": rows}


def _setting_up(scene: CostScene, arms: Sequence[ArmName], last: int) -> dict[str, float]:
    """Passes at the aligned point, which arms and forecasts share."""
    task, config = scene.task, scene.config
    measuring_safety = {
        (a.method, a.kind == "as_given") for a in arms if METHODS[a.method].safety_gradients(a)
    }
    passes: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    passes["single-row gradients"] = len(measuring_safety) * samples_in(task.safety)
    if any(METHODS[arm.method].references for arm in arms):
        passes["forward rows"] = min(samples_in(task.finetune), last * per_step(config))
    if any(METHODS[arm.method].calibrated(arm) for arm in arms):
        passes["gradient rows"] = config.guard.calibration_steps * per_step(config)
    return passes
