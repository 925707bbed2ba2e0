"""One arm of stage guard: the planned fine-tune under one protection, measured as `verify` measures."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from arisk.anatomy.probe import sample_losses
from arisk.base.errors import NumericsError
from arisk.base.processes import barrier, is_first
from arisk.base.progress import Progress
from arisk.forecast.rollout import limited
from arisk.forecast.run_state import Pauses, Track, load_state, save_state
from arisk.guard.guard_task import TaskRows
from arisk.guard.methods import ArmName, Plan, Protection, protection
from arisk.guard.record import NEVER_BEGUN, Arm
from arisk.verification.generation import Writer
from arisk.verification.run import active_dropouts, dropping_out

__all__ = ["ArmRun"]

#: Names of the further data sets, and of the CPU time among a step's notes.
TASK, SURPRISING, CPU = "task", "surprising", "cpu_seconds"


class ArmRun:
    """One fine-tune under way; the model's parameters move, so wrap in `keeping_parameters`.

    Args:
        plan: model, data, recipe.
        judged: rows of the task loss.
        writes: prompts that are answered after the last step.
        points: steps at which losses are measured, from 0.
        name: which arm.
        said: the arm for the progress display.
        progress: told of optimizer steps done.
    """

    def __init__(
        self,
        plan: Plan,
        judged: TaskRows,
        writes: Writer,
        points: Sequence[int],
        name: ArmName,
        said: str,
        progress: Progress,
    ) -> None:
        self.plan, self.judged, self.writes = plan, judged, writes
        self.points, self.name = list(points), name
        self.said, self.progress = said, progress
        task = plan.task
        self.run = plan.fresh()
        device = self.run.stream.device
        self.samples = task.heldout or task.safety
        self.safety = limited(self.samples, None, device)
        self.control = limited(task.control, plan.config.control_samples, device) if task.control else []
        self.dropouts = active_dropouts(task.model)
        # Processes that share a batch would drop other units than one.
        self.run.shared = not self.dropouts
        self.track = Track()
        self.reason: str | None = None
        self.pauses = Pauses()

    def carry_out(self, folder: Path | None) -> Arm:
        """Build the protection, take all steps that are left, and give the record.

        Raises:
            NumericsError: the safety loss of the aligned model is not finite.
            ConfigError: the method cannot be used on this model.
        """
        self.progress(f"{self.said}: {self.name.label}", 0, self.points[-1])
        started = time.process_time()
        try:
            made = protection(self.plan, self.name)
        except NumericsError as err:
            # The other arms still say something: this one is recorded, and never as a low drift.
            made = Protection(None, {}, f"not run: {err.what}")
            self.track.diverged_at, self.reason = NEVER_BEGUN, f"it cannot be set up: {err.what}"
            self.measure(0)
            return self.arm(made, time.process_time() - started)
        self.run.protect, self.run.correct = made.protect, made.correct
        setup = time.process_time() - started
        self.resume(folder)
        self.to_the_end(folder)
        return self.arm(made, setup)

    def resume(self, folder: Path | None) -> None:
        """Go on from a saved state, or measure the start."""
        found = load_state(folder, self.run) if folder else None
        barrier()  # No process may save before every one has read.
        if found is not None:
            self.track = found[0]
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
        last = self.points[-1]
        for number in range(self.track.at + 1, last + 1):
            self.progress(f"{self.said}: {self.name.label}", number - 1, last)
            started = time.process_time()
            try:
                with dropping_out(self.dropouts, self.plan.seed + number):
                    self.track.pending.append(self.run.step(number))
            except NumericsError as err:
                self.track.diverged_at, self.reason = number, err.what
                break
            self.track.notes.append({CPU: time.process_time() - started, **self.run.notes})
            if number in self.points and not self.measure(number):
                break
            if folder and is_first() and self.pauses.over():
                with self.pauses.saving():
                    save_state(folder, self.run, self.track, None)
        self.progress(f"{self.said}: {self.name.label}", last, last)

    def measure(self, step: int) -> bool:
        """Record every loss here; False where the safety loss is not finite, which ends the arm."""
        track, task, model = self.track, self.plan.task, self.plan.task.model
        safety = sample_losses(model, self.safety, self.samples.loss_fn)
        if step and not bool(torch.isfinite(safety).all()):
            track.diverged_at, self.reason = step, "the safety loss is not finite"
            return False
        track.steps.append(step)
        track.finetune_loss.append(math.nan)
        track.kept_share.append(1.0)
        track.pending = []
        track.safety.append(safety)
        if self.control and task.control is not None:
            track.control.append(sample_losses(model, self.control, task.control.loss_fn))
        for name, batches in ((TASK, self.judged.batches), (SURPRISING, self.judged.surprising)):
            if batches:
                losses = sample_losses(model, batches, self.judged.loss_fn)
                track.others.setdefault(name, []).append(losses)
        return True

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
            terms=_between(track.steps, track.notes),
            cpu_seconds=sum(note[CPU] for note in track.notes),
            setup_seconds=setup,
            diverged_at=track.diverged_at,
            reason=self.reason,
            answers=self.writes.texts(task.model) if track.diverged_at is None else [],
        )


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
