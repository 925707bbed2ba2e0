"""Stage verify: the planned fine-tune, really carried out, with safety measured along it, and its cost.

The same batches, optimizer, schedule, clipping and accumulation as the forecast assumes, on the model in
place; its parameters are put back to the bit afterwards. Losses are taken in evaluation mode, as
everywhere. Also here: which prompts are answered in text along a real fine-tune, when, and why none are.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arisk.anatomy.cost import numel, samples_in
from arisk.base.errors import NumericsError
from arisk.base.processes import barrier, is_first
from arisk.base.task import Batch, Generate, LossFn, Progress, RowBatches, SampleSet, Task, silent
from arisk.config.plan import Config, TrainingConfig, VerifyConfig, planned_steps
from arisk.config.sections import BehaviourConfig
from arisk.engine.stage import Cost, CostScene
from arisk.forecast.leap import LARGEST_SHARE, outliers
from arisk.forecast.record import RolloutResult
from arisk.forecast.rollout import OPENING, watched
from arisk.forecast.run import answer_tokens, followed_rows, probed_rows
from arisk.geometry.dynamics import recorded_steps
from arisk.gradients import batch_size, layout_of, map_tensors, measuring, move_batch
from arisk.training.loop import BatchStream, PlannedRun, StepDone, follow, keeping_parameters
from arisk.training.panels import panel_of, sample_losses
from arisk.training.probes import measure_probes, probe_panels, probe_tracks
from arisk.training.recipe import recipe_of
from arisk.training.state import Pauses, Track, load_state
from arisk.verification.record import TaskCurve, VerifyResult

__all__ = [
    "COPIES_OF_A_RUN",
    "CPU",
    "SURPRISING",
    "TASK",
    "TaskRows",
    "Writer",
    "looked",
    "measure_task",
    "measured_steps",
    "measures_task",
    "per_step",
    "taken_over",
    "task_rows",
    "verify",
    "verify_cost",
    "writer",
    "writing_steps",
]

NOT_HELD_OUT = "The safety rows are those that the forecast used: they are not held out."
#: Losses are measured at about this many steps: every one at the start, then geometrically fewer.
POINTS = 40


def measured_steps(last: int) -> list[int]:
    """Ascending steps 0 … `last` at which losses are measured, late ones a constant factor apart.

    25 to 41 of them (all steps of a shorter run); the factor is about 1.16 for 200 steps, 1.27 for 10 000.
    """
    return recorded_steps(last, POINTS)


def verify(
    task: Task,
    *,
    config: VerifyConfig,
    training: TrainingConfig,
    steps: int,
    seed: int = 0,
    behaviour: BehaviourConfig | None = None,
    workspace: Path | None = None,
    keep: Callable[[nn.Module], None] | None = None,
    task_samples: int = 0,
    progress: Progress = silent,
) -> VerifyResult:
    """Fine-tune as planned and measure ΔL_i = ℓ_i(θ_k) − ℓ_i(θ*) of every safety and control sample.

    Safety samples are those of `task.heldout` where it is given, else `task.safety`.

    Args:
        task: model and data; the model is left as found.
        config: how far to go, what to measure.
        training: the planned recipe.
        steps: planned optimizer steps T; the schedule is theirs however early the run stops.
        seed: seeds dropout.
        behaviour: prompts that are followed and answered, as along the rollout; None: none.
        workspace: folder for the state of an unfinished run; None keeps none.
        keep: is handed the tuned model, before it is put back; not one that has diverged.
        task_samples: rows on which the task loss is measured too, as stage guard does; 0: it is not.
        progress: told of optimizer steps done.

    Returns:
        The record; a divergence ends the run and is recorded.

    Raises:
        NumericsError: the safety loss at the aligned point is not finite.
        InputError: a data set gives no batch.
    """
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout), keeping_parameters(task.model, layout):
        planned = PlannedRun(task, layout, recipe_of(training, steps), seed)
        run = _RealRun(task, planned, config, progress, behaviour, task_samples)
        run.resume(workspace)
        run.to_the_end(workspace)
        if keep is not None and run.track.diverged_at is None and is_first():
            keep(task.model)
    return run.result()


def taken_over(rolled: RolloutResult) -> VerifyResult:
    """The record of a plan that the rollout carried out, at the points that it measured."""
    behaviour = rolled.behaviour
    assert behaviour is not None
    assert rolled.start is not None
    return VerifyResult(
        horizon=rolled.horizon,
        last=rolled.horizon,
        steps=rolled.steps,
        safety=rolled.safety,
        control=rolled.control,
        start=rolled.start,
        finetune_loss=rolled.finetune_loss,
        diverged_at=rolled.diverged_at,
        heldout=False,
        behaviour=behaviour,
        opening_loss=rolled.opening_loss,
        probes=rolled.probes,
        gradient_evaluations=rolled.gradient_evaluations,
        warnings=[NOT_HELD_OUT, *rolled.warnings],
    )


class _RealRun:
    """One real fine-tune under way."""

    def __init__(
        self,
        task: Task,
        planned: PlannedRun,
        config: VerifyConfig,
        progress: Progress,
        behaviour: BehaviourConfig | None,
        task_samples: int,
    ) -> None:
        self.task = task
        self.planned = planned
        self.progress = progress
        self.horizon = planned.recipe.horizon
        self.last = min(config.steps or self.horizon, self.horizon)
        self.points = measured_steps(self.last)
        device = planned.stream.device
        self.samples = task.heldout or task.safety
        self.safety = panel_of(self.samples, None, device)
        self.control = panel_of(task.control, config.control_samples, device) if task.control else None
        self.behaviour = watched(task, behaviour, heldout=True)
        self.opening_tokens = (behaviour or BehaviourConfig()).opening_tokens
        self.writing = writing_steps(self.points)
        self.probes = probe_panels(task.probes, self.opening_tokens, device)
        self.track = Track()
        reached = planned.batches_of(self.last).stop
        self.judged = task_rows(task, planned.stream, task_samples, reached) if task_samples else None
        self.started = 0.0

    def resume(self, workspace: Path | None) -> None:
        """Go on from a saved state, or measure the start."""
        found = load_state(workspace, self.planned) if workspace else None
        barrier()  # No rank may save before every one has read.
        if found is not None:
            self.track = found[0]
            self.behaviour.restore(self.track.behaviour)
            return
        self.measure(0)
        if not bool(torch.isfinite(self.track.safety[0]).all()):
            raise NumericsError(
                "the safety loss of the aligned model is not finite",
                where="verify: step 0",
                fix="check the safety rows, or load the model in float32",
            )

    def to_the_end(self, workspace: Path | None) -> None:
        """All optimizer steps that are left; a divergence ends the run."""
        done = self.track.at
        self.progress("real fine-tune", done, self.last)
        self.started = time.process_time()
        try:
            saving = Pauses(workspace, self.planned, self.track)
            follow(self.planned, done + 1, self.last, [self.looked_at, saving])
        except NumericsError:
            self.track.diverged_at = self.track.at + 1
        self.progress("real fine-tune", self.last, self.last)

    def looked_at(self, done: StepDone) -> None:
        """Take down a step, and measure where it is due."""
        self.track.pending.append(done.loss)
        self.track.notes.append({CPU: time.process_time() - self.started})
        if done.number in self.points:
            self.measure(done.number)
        self.progress("real fine-tune", done.number, self.last)
        self.started = time.process_time()

    def measure(self, step: int) -> None:
        """Record every sample's loss here, and answers where they are due."""
        track, model = self.track, self.task.model
        losses = track.pending
        track.steps.append(step)
        track.finetune_loss.append(sum(losses) / len(losses) if losses else float("nan"))
        track.kept_share.append(1.0)
        track.pending = []
        with self.planned.reading():
            safety, openings = self.safety.losses_and_openings(model, self.opening_tokens)
            track.safety.append(safety)
            if openings is not None:
                track.others.setdefault(OPENING, []).append(openings)
            if self.control is not None:
                track.control.append(self.control.losses(model))
            if self.judged is not None:
                measure_task(track, model, self.judged)
            if step in self.writing:
                measure_probes(track, model, self.probes, step)
            self.behaviour.measure(model, step, answer=step in self.writing)
        track.behaviour = self.behaviour.state()

    def result(self) -> VerifyResult:
        """The record: changes against the start."""
        track = self.track
        safety = torch.stack(track.safety, dim=1)
        control = torch.stack(track.control, dim=1) if track.control else None
        shared, openings = self.shared_prompts(), track.others.get(OPENING)
        return VerifyResult(
            horizon=self.horizon,
            last=self.last,
            steps=track.steps,
            safety=safety - safety[:, :1],
            control=None if control is None else control - control[:, :1],
            start=float(track.safety[0].mean()),
            finetune_loss=track.finetune_loss,
            diverged_at=track.diverged_at,
            heldout=self.task.heldout is not None and shared < len(safety),
            behaviour=self.behaviour.result(),
            opening_loss=None if openings is None else torch.stack(openings, dim=1),
            probes=probe_tracks(track, self.probes),
            gradient_evaluations=self.planned.gradient_evaluations,
            warnings=self.warnings(shared),
            task=self.task_curve(),
        )

    def task_curve(self) -> TaskCurve | None:
        """The task loss along the run, where it was measured."""
        if self.judged is None:
            return None
        means = {
            name: [float(losses.mean()) for losses in self.track.others.get(name, [])]
            for name in (TASK, SURPRISING)
        }
        seconds = sum(note[CPU] for note in self.track.notes)
        final = self.track.others[TASK][-1].tolist()
        return TaskCurve(self.judged.digest, means[TASK], means[SURPRISING], seconds, final)

    def shared_prompts(self) -> int:
        """Held-out rows whose prompt the forecast used, as far as the task names its rows."""
        if self.task.heldout is None:
            return 0
        used = {row.get("prompt") for row in self.task.safety.rows} - {None, ""}
        return sum(row.get("prompt") in used for row in self.task.heldout.rows)

    def warnings(self, shared: int) -> list[str]:
        """Sentences for the report."""
        found: list[str] = []
        if self.task.heldout is None:
            found.append(NOT_HELD_OUT)
        elif shared:
            rows = len(self.task.heldout.rows)
            found.append(f"{shared} of {rows} held-out rows have a prompt that the forecast used as well.")
        if self.task.control is None:
            found.append("No control data: a general drift cannot be told from a loss of safety.")
        if self.track.diverged_at is not None:
            found.append(f"Training diverged: step {self.track.diverged_at} has no finite loss.")
        return [*found, *self.planned.recipe.notes]


#: Shares of the run after which text is generated; losses are measured far more often.
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Writer:
    """Answers the same prompts at every call.

    Attributes:
        prompts: their rows: `prompt`, `response`, `line`.
        rows: their indices in the sample set.
        reason: why there are none; None where there are.
    """

    prompts: Sequence[Mapping[str, str | int | None]]
    rows: Sequence[int]
    max_new_tokens: int
    generate: Generate | None
    reason: str | None

    def texts(self, model: nn.Module) -> list[str]:
        """One greedy answer per prompt; none where nothing can be written."""
        if self.generate is None:
            return []
        return [str(text) for text in self.generate(model, self.rows, self.max_new_tokens)]


def writer(samples: SampleSet, count: int, max_new_tokens: int, *, setting: str) -> Writer:
    """Evenly spread rows of a sample set to be answered, or the reason why none can be.

    Args:
        samples: prompts with safe responses, with their `generate`.
        count: prompts wanted; 0 switches it off.
        max_new_tokens: length of an answer at most.
        setting: name of the setting that gave the count.
    """
    reason = None
    if count == 0:
        reason = f"{setting} is 0"
    elif samples.generate is None:
        reason = "the safety rows have no prompt or no tokenizer to answer it with"
    elif not samples.rows:
        reason = "the task does not name its safety rows"
    if reason is not None:
        return Writer([], [], max_new_tokens, None, reason)
    # Rows lie in order of length: the first ones would all be short.
    taken = min(count, len(samples.rows))
    rows = [i * len(samples.rows) // taken for i in range(taken)]
    prompts = [_prompt(samples.rows[i]) for i in rows]
    return Writer(prompts, rows, max_new_tokens, samples.generate, None)


def _prompt(row: Mapping[str, object]) -> dict[str, str | int | None]:
    line = row.get("line")
    return {
        "prompt": str(row.get("prompt") or ""),
        "response": str(row.get("response") or ""),
        "line": line if isinstance(line, int) else None,
    }


def writing_steps(points: Sequence[int]) -> list[int]:
    """The measured steps nearest to 0, 1/8, 1/4, 1/2 and all of the run, without repeats.

    >>> writing_steps([0, 1, 2, 5, 10, 24, 50, 90, 200])
    [0, 24, 50, 90, 200]
    """
    wanted = [share * points[-1] for share in SHARES]
    return sorted({min(points, key=lambda point: abs(point - want)) for want in wanted})


#: Names of further losses along a run, and of the CPU time among a step's notes.
TASK, SURPRISING, CPU = "task", "surprising", "cpu_seconds"


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

    A protection must keep what the fine-tune is for. Rows of `guard.task` (`Task.clean`) say this best:
    clean, and not trained on. Without them the fine-tuning rows serve; those that the aligned model finds
    far outside the rest (the rule of the rollout's rare rows) are left out and measured apart, since a
    protection that keeps a model from learning a handful of harmful rows does its work. Where more than a
    twentieth of the rows are such, nothing tells harm from task and all rows count.
    """

    batches: Sequence[Batch]
    surprising: Sequence[Batch]
    loss_fn: LossFn
    count: int
    surprising_count: int
    trained: int | None
    source: str
    warnings: Sequence[str]

    @property
    def digest(self) -> str:
        """sha256 of all tensors of the rows."""
        found = hashlib.sha256()

        def add(tensor: Tensor) -> Tensor:
            found.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            return tensor

        for batches in (self.batches, self.surprising):
            found.update(f"{len(batches)} batches ".encode())
            for batch in batches:
                map_tensors(batch, add)
        return found.hexdigest()


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


def measure_task(track: Track, model: nn.Module, judged: TaskRows) -> None:
    """Take down the task loss here, and the loss of the rows kept apart."""
    for name, batches in ((TASK, judged.batches), (SURPRISING, judged.surprising)):
        if batches:
            track.others.setdefault(name, []).append(sample_losses(model, batches, judged.loss_fn))


#: Copies of the selected parameters beside the model in a plain run.
COPIES_OF_A_RUN = 4


def measures_task(config: Config) -> bool:
    """Whether verify measures the task loss too: the config says that protections will be compared."""
    return "guard" in config.model_fields_set


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
    judged = config.guard.task_samples if measures_task(config) else 0
    moving = COPIES_OF_A_RUN * numel(task) * 4 / 1e9
    written, followed = len(writing_steps(points)), followed_rows(task, config)
    prompts = min(followed, config.behaviour.prompts)
    on_device = scene.device.get("gradients")
    return Cost(
        passes={
            "gradient rows": points[-1] * per_step(config),
            "forward rows": len(points) * (looked(task, given.control_samples) + judged + prompts)
            + written * (followed - prompts + probed_rows(task)),
            "answer tokens": answer_tokens(scene, written),
        },
        seconds=scene.loading,
        memory_gb=scene.memory["gradients"] + moving,
        device_gb=None if on_device is None else on_device + moving,
    )
