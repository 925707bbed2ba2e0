"""One arm of stage guard: the planned fine-tune under one protection, measured as `verify` measures.

The plain arm is the run of `verify`: where that was carried out and measured, it is taken over.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from arisk.base.errors import NumericsError
from arisk.base.processes import barrier
from arisk.base.task import Progress
from arisk.guard.afterwards import Averages
from arisk.guard.methods import METHODS, protection
from arisk.guard.plan import ArmName, ArmPlan, PlainRun, Protection, measured_points
from arisk.guard.record import NEVER_BEGUN, Arm
from arisk.training.behaviour import FollowedPrompts
from arisk.training.loop import StepDone, follow, put
from arisk.training.panels import panel_of
from arisk.training.state import Pauses, Track, load_state
from arisk.verification.record import VerifyResult
from arisk.verification.run import CPU, SURPRISING, TASK, TaskRows, Writer, measure_task

__all__ = ["ArmRun", "Looks"]


@dataclass(frozen=True)
class Looks:
    """What every arm measures.

    Attributes:
        judged: rows of the task loss.
        writes: safety prompts that are answered after the last step.
        ordinary: control prompts that are.
    """

    judged: TaskRows
    writes: Writer
    ordinary: Writer


class ArmRun:
    """One fine-tune under way; the model's parameters move, so wrap in `keeping_parameters`.

    Args:
        plan: model, data, recipe.
        looks: what is measured.
        name: which arm.
        said: the arm for the progress display.
        progress: told of optimizer steps done.
        repeat: number of the seed, from 0.
        averages: shares of the run whose running means are kept.
    """

    def __init__(
        self,
        plan: ArmPlan,
        looks: Looks,
        name: ArmName,
        said: str,
        progress: Progress,
        *,
        repeat: int = 0,
        averages: Sequence[float] = (),
    ) -> None:
        self.plan, self.looks, self.name = plan, looks, name
        self.judged, self.writes = looks.judged, looks.writes
        self.points = measured_points(plan.last)
        self.said, self.progress, self.repeat = said, progress, repeat
        task = plan.task
        self.run = plan.fresh()
        device = self.run.stream.device
        self.samples = task.heldout or task.safety
        self.safety = panel_of(self.samples, None, device)
        self.control = panel_of(task.control, plan.config.control_samples, device) if task.control else None
        self.track = Track()
        self.reason: str | None = None
        self.started = 0.0
        self.averages = Averages(self.run.parameters, averages, plan.last)

    def carry_out(self, folder: Path | None) -> Arm:
        """Build the protection, take all steps that are left, and give the record.

        Raises:
            NumericsError: the safety loss of the aligned model is not finite.
            ConfigError: the method cannot be used on this model.
        """
        self.progress(f"{self.said}: {self.name.label}", 0, self.points[-1])
        started, shared = time.process_time(), self.plan.shared
        saved = shared.saved
        try:
            self.plan = plan = METHODS[self.name.method].planned(self.plan, self.name)
            made = protection(plan, self.name)
        except self.plan.set_up_errors as err:
            # The other arms still say something: this one is recorded, and never as a low drift.
            made = Protection(None, {}, f"not run: {err.what}")
            self.track.diverged_at, self.reason = NEVER_BEGUN, err.what
            self.measure(0)
            return self.arm(made, time.process_time() - started)
        self.run, self.points = plan.fresh(), measured_points(plan.last)
        self.run.protect, self.run.correct = made.protect, made.correct
        # What this arm would take alone: what others measured for it counts.
        setup = time.process_time() - started + shared.saved - saved
        self.resume(folder)
        self.to_the_end(folder)
        return self.arm(made, setup)

    def taken_over(self, measured: VerifyResult) -> Arm | None:
        """This arm, the plain one, from the same run of `verify`; None where that did not measure the same.

        Equal to the bit but for the CPU time: the same rows, losses and answers, at an arm's steps.
        """
        said = measured.behaviour
        curve, answers = measured.task, _answers(measured, self.writes, said.safety)
        ordinary = _answers(measured, self.looks.ordinary, said.ordinary)
        control = 0 if self.control is None else len(self.control)
        if (
            curve is None
            or answers is None
            or ordinary is None
            or measured.diverged_at is not None
            or measured.steps[-1] != self.points[-1]
            or not set(self.points) <= set(measured.steps)
            or curve.rows != self.judged.digest
            or (0 if measured.control is None else len(measured.control)) != control
        ):
            return None
        places = [list(measured.steps).index(step) for step in self.points]
        safety = measured.safety.T[places].contiguous()
        made = protection(self.plan, self.name)
        return Arm(
            label=self.name.label,
            method=self.name.method,
            strength=self.name.strength,
            weights=dict(made.weights),
            note=made.note,
            steps=list(self.points),
            safety_start=measured.start,
            safety=safety.mean(1).tolist(),
            control=[] if measured.control is None else _means(list(measured.control.T[places].contiguous())),
            task=[curve.loss[place] for place in places],
            surprising=[curve.surprising[place] for place in places] if curve.surprising else [],
            final_safety=safety[-1].tolist(),
            final_task=list(curve.final),
            terms={},
            cpu_seconds=curve.cpu_seconds,
            setup_seconds=0.0,
            diverged_at=None,
            reason=None,
            answers=answers,
            ordinary_answers=ordinary,
            seed=self.repeat,
        )

    def resume(self, folder: Path | None) -> None:
        """Go on from a saved state, or measure the start."""
        found = load_state(folder, self.run) if folder else None
        barrier()  # No process may save before every one has read.
        if found is not None:
            self.track = found[0]
            self.averages.restore(found[1].tensors)
            return
        self.measure(0)
        if not bool(torch.isfinite(self.track.safety[0]).all()):
            raise NumericsError(
                "the safety loss of the aligned model is not finite",
                where="guard: step 0",
                fix="check the safety rows, or load the model in float32",
            )

    def to_the_end(self, folder: Path | None) -> None:
        """All optimizer steps that are left; a divergence ends the arm."""
        done, last = self.track.at, self.points[-1]
        self.progress(f"{self.said}: {self.name.label}", done, last)
        self.started = time.process_time()
        try:
            pauses = Pauses(folder, self.run, self.track)
            saving = lambda _: pauses.saved(self.averages.kept())  # noqa: E731
            follow(self.run, done + 1, last, [self.averages, self.looked_at, saving])
        except NumericsError as err:
            self.track.diverged_at, self.reason = self.track.at + 1, err.what
        self.progress(f"{self.said}: {self.name.label}", last, last)

    def looked_at(self, done: StepDone) -> bool:
        """Take down a step with its CPU time, and measure where it is due; True ends the arm."""
        self.track.pending.append(done.loss)
        self.track.notes.append({CPU: time.process_time() - self.started, **done.notes})
        ended = done.number in self.points and not self.measure(done.number)
        self.progress(f"{self.said}: {self.name.label}", done.number, self.points[-1])
        self.started = time.process_time()
        return ended

    def measure(self, step: int) -> bool:
        """Record every loss here; False where the safety loss is not finite, which ends the arm."""
        with self.run.reading():
            return self._measure(step)

    def _measure(self, step: int) -> bool:
        track, model = self.track, self.plan.task.model
        safety = self.safety.losses(model)
        if step and not bool(torch.isfinite(safety).all()):
            track.diverged_at, self.reason = step, "the safety loss is not finite"
            return False
        track.steps.append(step)
        track.finetune_loss.append(math.nan)
        track.kept_share.append(1.0)
        track.pending = []
        track.safety.append(safety)
        if self.control is not None:
            track.control.append(self.control.losses(model))
        measure_task(track, model, self.judged)
        return True

    def plain_run(self, start: Sequence[Tensor]) -> PlainRun:
        """What is left of this run, the plain one, at its end."""
        end = [p.detach().clone() for p in self.run.parameters]
        return PlainRun(start, end, self.averages.means)

    def read_off(self, name: ArmName, values: Sequence[Tensor]) -> Arm:
        """Another arm: these weights, measured at the end of this run; its start is this run's."""
        whole, own = self.track, self.name
        first = {key: losses[:1] for key, losses in whole.others.items()}
        self.track = Track([0], [math.nan], [1.0], whole.safety[:1], whole.control[:1], others=first)
        self.name = name
        put(self.run.parameters, values)
        torch.clear_autocast_cache()
        self.measure(self.points[-1])
        found = self.arm(protection(self.plan, name), 0.0)
        self.track, self.name, self.reason = whole, own, None
        return replace(found, cpu_seconds=sum(note[CPU] for note in whole.notes))

    def arm(self, made: Protection, setup: float) -> Arm:
        """The record: changes against the start, and the notes of the steps as means between points."""
        track, task = self.track, self.plan.task
        safety = torch.stack(track.safety)
        return Arm(
            label=self.name.label,
            method=self.name.method,
            strength=self.name.strength,
            weights=dict(made.weights),
            note=made.note,
            steps=track.steps,
            safety_start=float(safety[0].mean()),
            safety=(safety - safety[0]).mean(1).tolist(),
            control=_changes(track.control),
            task=_means(track.others.get(TASK, [])),
            surprising=_means(track.others.get(SURPRISING, [])),
            final_safety=(safety[-1] - safety[0]).tolist(),
            final_task=track.others[TASK][-1].tolist() if track.others.get(TASK) else [],
            terms=_between(track.steps, track.notes),
            cpu_seconds=sum(note[CPU] for note in track.notes),
            setup_seconds=setup,
            diverged_at=track.diverged_at,
            reason=self.reason,
            answers=self.writes.texts(task.model) if track.diverged_at is None else [],
            ordinary_answers=self.looks.ordinary.texts(task.model) if track.diverged_at is None else [],
            seed=self.repeat,
        )


def _answers(measured: VerifyResult, writes: Writer, said: FollowedPrompts | None) -> list[str] | None:
    """The answers of `verify` to these prompts after the last step; None where it lacks one."""
    if writes.generate is None:
        return []
    if said is None or measured.behaviour.tokens != writes.max_new_tokens or not said.answers:
        return None
    last = said.answers[-1]
    if last.step != measured.steps[-1] or len(last.texts) != len(said.prompts):
        return None
    told = {tuple(row.items()): text for row, text in zip(said.prompts, last.texts, strict=True)}
    found = [told.get(tuple(row.items())) for row in writes.prompts]
    return [text for text in found if text is not None] if None not in found else None


def _means(losses: Sequence[Tensor]) -> list[float]:
    return [float(values.mean()) for values in losses]


def _changes(losses: Sequence[Tensor]) -> list[float]:
    return [float((values - losses[0]).mean()) for values in losses]


def _between(steps: Sequence[int], notes: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Each note's mean over the steps since the point before, NaN at 0 and where there is none."""
    names = sorted({name for note in notes for name in note} - {CPU})
    found: dict[str, list[float]] = {}
    for name in names:
        series = [math.nan]
        for first, end in itertools.pairwise(steps):
            values = [note[name] for note in notes[first:end] if name in note]
            values = [value for value in values if math.isfinite(value)]
            series.append(sum(values) / len(values) if values else math.nan)
        found[name] = series
    return found
