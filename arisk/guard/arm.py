"""One arm of stage guard: the planned fine-tune under one protection, measured as `verify` measures.

On which rows the task loss of a protected fine-tune is measured.

A protection must keep what the fine-tune is for. Rows of `guard.task` (`Task.clean`) say this best:
clean, and not trained on. Without them the fine-tuning rows serve; those that the aligned model finds
far outside the rest (the rule of the rollout's rare rows) are left out and measured apart, since a
protection that keeps a model from learning a handful of harmful rows does its work. Where more than a
twentieth of the rows are such, nothing tells harm from task and all rows count.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arisk.base.errors import NumericsError
from arisk.base.processes import barrier
from arisk.base.task import Batch, LossFn, Progress, RowBatches, SampleSet, Task
from arisk.forecast.leap import LARGEST_SHARE, outliers
from arisk.gradients import batch_size, move_batch
from arisk.guard.methods import ArmName, ArmPlan, Protection, protection
from arisk.guard.record import NEVER_BEGUN, Arm
from arisk.training.loop import BatchStream, StepDone, follow
from arisk.training.panels import panel_of, sample_losses
from arisk.training.state import Pauses, Track, load_state
from arisk.verification.run import Writer

__all__ = ["ArmRun", "TaskRows", "task_rows"]

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
        plan: ArmPlan,
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
        self.safety = panel_of(self.samples, None, device)
        self.control = panel_of(task.control, plan.config.control_samples, device) if task.control else None
        self.track = Track()
        self.reason: str | None = None
        self.started = 0.0

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
        done, last = self.track.at, self.points[-1]
        self.progress(f"{self.said}: {self.name.label}", done, last)
        self.started = time.process_time()
        try:
            follow(self.run, done + 1, last, [self.looked_at, Pauses(folder, self.run, self.track)])
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


@dataclass(frozen=True)
class TaskRows:
    """The rows of the task loss, and those kept apart.

    Attributes:
        batches: of the task loss.
        surprising: batches of the rows left out; empty where there are none.
        loss_fn: of both.
        count, surprising_count: rows.
        trained: rows of the task loss that the run trains on; None where that is not known.
        source: where the rows come from, in words.
        warnings: sentences for the report.
    """

    batches: Sequence[Batch]
    surprising: Sequence[Batch]
    loss_fn: LossFn
    count: int
    surprising_count: int
    trained: int | None
    source: str
    warnings: Sequence[str]


def task_rows(task: Task, stream: BatchStream, limit: int, micro_batches: int) -> TaskRows:
    """Choose them, inside `measuring` and at the aligned point.

    Args:
        task: with `clean` rows or without.
        stream: the planned batches.
        limit: rows of the task loss at most (whole batches for data that cannot be regrouped).
        micro_batches: that the run trains on.
    """
    if task.clean is not None:
        return _clean(task.clean, task.finetune.rows, stream.device, limit)
    if isinstance(task.finetune.batches, RowBatches):
        return _planned(task, task.finetune.batches, stream.device, limit, micro_batches)
    batches = [
        move_batch(b, stream.device) for b in islice(iter(task.finetune.batches), _whole(stream, limit))
    ]
    count = sum(batch_size(batch) for batch in batches)
    warning = "The task loss is taken on fine-tuning rows, harmful ones among them where there are some."
    return TaskRows(
        batches, [], task.finetune.loss_fn, count, 0, None, "the first fine-tuning batches", [warning]
    )


def _whole(stream: BatchStream, limit: int) -> int:
    """Batches that hold about `limit` rows."""
    return max(1, -(-limit // batch_size(stream.at(0))))


def _clean(
    clean: SampleSet, trained: Sequence[Mapping[str, Any]], device: torch.device, limit: int
) -> TaskRows:
    panel = panel_of(clean, limit, device)
    count = len(panel)
    seen: int | None = None
    warnings: list[str] = []
    if clean.rows and trained:
        known = {(row.get("prompt"), row.get("response")) for row in trained}
        rows = [clean.rows[i] for i in panel.rows]
        seen = sum((row.get("prompt"), row.get("response")) in known for row in rows)
    if seen:
        warnings.append(f"{seen} of {count} clean task rows stand in the fine-tuning data as well.")
    return TaskRows(panel.batches, [], clean.loss_fn, count, 0, seen, "clean rows of their own", warnings)


def _planned(
    task: Task, batches: RowBatches, device: torch.device, limit: int, micro_batches: int
) -> TaskRows:
    """Fine-tuning rows, first those that the run does not reach; surprising ones apart."""
    met = {row for number in range(micro_batches) for row in batches.indices(number)}
    order = batches.sample(batches.row_count)
    order = sorted(order, key=lambda row: row in met)[: 4 * limit]

    def of(rows: Sequence[int]) -> list[Batch]:
        size = batches.size
        return [move_batch(batches.of(rows[i : i + size]), device) for i in range(0, len(rows), size)]

    losses = sample_losses(task.model, of(order), task.finetune.loss_fn)
    outside = outliers(losses) if len(losses) == len(order) else []
    rare = len(outside) <= LARGEST_SHARE * len(order)
    apart = {order[i] for i in outside} if rare else set[int]()
    rows = [row for row in order if row not in apart][:limit]
    trained = sum(row in met for row in rows)
    source = "fine-tuning rows" + (" without the surprising ones" if apart else "")
    warnings: list[str] = []
    if trained:
        warnings.append(f"{trained} of {len(rows)} rows of the task loss are trained on.")
    if not apart:
        warnings.append(
            "Where the fine-tuning data is itself harmful, a protection shows as a worse task loss: give "
            "`guard.task`."
        )
    kept = sorted(apart)[:limit]
    return TaskRows(
        of(rows), of(kept), task.finetune.loss_fn, len(rows), len(kept), trained, source, warnings
    )
