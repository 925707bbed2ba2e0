"""Stage rollout: safety measured along an accelerated virtual run of the planned fine-tune.

The run starts with a pilot of real optimizer steps and goes on in segments: a leap that stands for
many steps, then a few real ones (`arisk.forecast.leap`). At the end of every segment each safety and
control sample is measured. Cost: O(log T) gradients. The model is put back to the bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arisk.base.errors import NumericsError
from arisk.base.processes import barrier, gathered, share, world
from arisk.base.task import Batch, Progress, RowBatches, Task, silent
from arisk.config.plan import RolloutConfig, TrainingConfig
from arisk.config.sections import BehaviourConfig
from arisk.forecast.leap import Block, Leaper, RareRows, block_from, kept_block, planned_points
from arisk.forecast.record import RolloutResult
from arisk.gradients import ParameterLayout, layout_of, measuring
from arisk.gradients.curvature import losses_between, outputs_of
from arisk.models.losses import per_sample_nll, response_logits
from arisk.models.openings import losses_at_scales
from arisk.training.behaviour import Behaviour
from arisk.training.loop import PlannedRun, keeping_parameters, put
from arisk.training.panels import panel_of
from arisk.training.recipe import Recipe, recipe_of
from arisk.training.state import Pauses, Track, load_state

__all__ = ["OPENING", "rollout", "skipped_rollout", "watched"]

#: Scales s of the extrapolated outputs; below 1 they fit the exponent of the growth.
SCALES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.3, 16.0, 22.6, 32.0)
#: Name of the losses of first tokens in the state of a run.
OPENING = "opening"


def skipped_rollout(reason: str, task: Task | None = None, steps: int = 0) -> RolloutResult:
    """The record of a rollout that was not asked for.

    Args:
        reason: why there is none.
        task: what it would have been of; None where that is not known.
        steps: planned optimizer steps.
    """
    empty = torch.zeros(0, 0, dtype=torch.float64)
    return RolloutResult(
        status="skipped",
        reason=reason,
        horizon=steps,
        pilot_steps=0,
        steps=[],
        safety=empty,
        control=None,
        finetune_loss=[],
        kept_share=[],
        flow_time=[],
        diverged_at=None,
        scales=[],
        extrapolated=None,
        gradient_evaluations=0,
        safety_passes=0,
        safety_rows=[],
        warnings=[],
        task={} if task is None else _provenance(task),
    )


def _provenance(task: Task) -> dict[str, Any]:
    """How the loader described model and data; its warnings have a place of their own."""
    return {key: value for key, value in task.description.items() if key != "data_warnings"}


def rollout(
    task: Task,
    *,
    config: RolloutConfig,
    training: TrainingConfig,
    steps: int,
    seed: int = 0,
    behaviour: BehaviourConfig | None = None,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> RolloutResult:
    """Measure losses, and what the model says, along the virtual run of `steps` optimizer steps.

    Args:
        task: model and data; the model is left as found.
        config: pilot, segments, samples.
        training: the planned recipe.
        steps: planned optimizer steps T.
        seed: seeds dropout and noise of the real steps.
        behaviour: prompts that are followed and answered; None: none.
        workspace: folder for the state of an unfinished run; None keeps none.
        progress: told of gradient evaluations done.

    Raises:
        NumericsError: the safety loss at the aligned point is not finite.
        InputError: a data set gives no batch.
    """
    layout = layout_of(task.model, task.parameter_names)
    recipe = recipe_of(training, steps)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        walk = _Walk(task, layout, config, recipe, seed, start, progress, behaviour)
        walk.resume(workspace)
        walk.run(workspace)
    return walk.result()


class _Walk:
    """One rollout under way."""

    def __init__(
        self,
        task: Task,
        layout: ParameterLayout,
        config: RolloutConfig,
        recipe: Recipe,
        seed: int,
        start: Sequence[Tensor],
        progress: Progress,
        behaviour: BehaviourConfig | None,
    ) -> None:
        self.task = task
        self.config = config
        self.behaviour = watched(task, behaviour)
        self.opening_tokens = (behaviour or BehaviourConfig()).opening_tokens
        self.start = start
        self.progress = progress
        self.horizon = recipe.horizon
        self.pilot, self.points = planned_points(self.horizon, config)
        self.planned = PlannedRun(task, layout, recipe, seed)
        self.leaper = Leaper(
            self.planned,
            speed_control=config.speed_control,
            distance_correction=config.distance_correction,
            rare=self._rare_rows(),
        )
        device = self.planned.stream.device
        self.safety = panel_of(task.safety, config.eval_samples, device)
        self.control = panel_of(task.control, config.control_samples, device) if task.control else None
        self.track = Track()
        self.block: Block | None = None

    def _rare_rows(self) -> RareRows | None:
        """The stratum of rare rows, where leaps will need it and the data can be regrouped."""
        batches = self.task.finetune.batches
        leaps = self.points[-1] > self.pilot
        if not (self.config.rare_rows and leaps and isinstance(batches, RowBatches)):
            return None
        found = RareRows(self.planned, batches)
        return found if found.rows else None

    def resume(self, workspace: Path | None) -> None:
        """Go on from a saved state, or measure the start."""
        found = load_state(workspace, self.planned) if workspace else None
        barrier()  # No rank may save before every one has read.
        if found is not None:
            self.track = found[0]
            self.block = block_from(found[1], self.planned.parameters)
            self.behaviour.restore(self.track.behaviour)
            return
        self.measure(0, float("nan"), 1.0)
        if not bool(torch.isfinite(self.track.safety[0]).all()):
            raise NumericsError(
                "the safety loss of the aligned model is not finite",
                where="rollout: step 0",
                fix="check the safety rows, or load the model in float32",
            )

    def run(self, workspace: Path | None) -> None:
        """All segments that are left; a divergence ends the walk and is recorded."""
        total = self.pilot + (len(self.points) - self.points.index(self.pilot) - 1) * (
            self.config.batches_per_segment + 1
        )
        saving = Pauses(workspace, self.planned, self.track)
        for end in self.points:
            done = self.track.steps[-1]
            if end <= done:
                continue
            self.progress("rollout", min(self.planned.gradient_evaluations, total), total)
            try:
                self.segment(done, end)
            except NumericsError:
                self.track.diverged_at = done + 1
                break
            saving.saved(kept_block(self.block))
        self.progress("rollout", total, total)

    def segment(self, done: int, end: int) -> None:
        """Leap where there is room for one, then real steps to `end`, then measure."""
        # Without a leap to come, a block describes all steps since the last point.
        inner = end - done if self.pilot == self.horizon else self.config.batches_per_segment
        length, share = end - done - inner, 1.0
        leaps = self.block.leaps if self.block is not None else 0
        if end > self.pilot and length > 0 and self.block is not None:
            self.planned.stream.without = self.leaper.left_out
            share = self.leaper.leap(self.block, done, length)
            done, leaps = done + length, leaps + 1
        self.block = self.leaper.real(done, end - done, inner, leaps)
        self.planned.stream.without = frozenset()
        self.measure(end, self.block.loss, share)
        if end == self.pilot and end < self.horizon:
            self.track.extrapolated = self.extrapolate()

    def measure(self, step: int, finetune_loss: float, share: float) -> None:
        """Record every sample's loss here."""
        track = self.track
        track.steps.append(step)
        track.finetune_loss.append(finetune_loss)
        track.kept_share.append(share)
        model = self.task.model
        with self.planned.reading():
            losses, openings = self.safety.losses_and_openings(model, self.opening_tokens)
            track.safety.append(losses)
            if openings is not None:
                track.others.setdefault(OPENING, []).append(openings)
            if self.control is not None:
                track.control.append(self.control.losses(model))
            self.behaviour.measure(model, step, answer=step in (self.pilot, self.horizon))
        track.behaviour = self.behaviour.state()

    def extrapolate(self) -> Tensor | None:
        """(N, S) safety losses at outputs extrapolated from the start through here; None if it cannot."""
        parts: list[Tensor | None] = []
        for number in share(len(self.safety.batches)):
            with self.planned.reading():
                parts.append(self._extrapolated(self.safety.batches[number]))
            if parts[-1] is None and world() == 1:
                return None
        found = [part for part in gathered(parts, len(self.safety.batches)) if part is not None]
        whole = len(found) == len(self.safety.batches)
        return self.safety.in_order(torch.cat(found)) if whole else None

    def _extrapolated(self, batch: Batch) -> Tensor | None:
        """(B, S) of one batch; response logits alone where the loss is the one over response tokens."""
        loss_fn, model = self.task.safety.loss_fn, self.task.model
        if loss_fn is per_sample_nll:
            last, where = response_logits(model, batch)
            with self.at_start():
                first, _ = response_logits(model, batch)
            return losses_at_scales(first, last, where, batch, SCALES)
        last = outputs_of(model, batch, loss_fn)
        with self.at_start():
            first = outputs_of(model, batch, loss_fn)
        known = first is not None and last is not None
        return losses_between(model, batch, loss_fn, first, last, SCALES) if known else None

    @contextmanager
    def at_start(self) -> Generator[None]:
        """The aligned parameters for a moment."""
        parameters = self.planned.parameters
        here = [p.detach().clone() for p in parameters]
        put(parameters, self.start)
        torch.clear_autocast_cache()
        yield
        put(parameters, here)
        torch.clear_autocast_cache()

    def result(self) -> RolloutResult:
        """The record: changes against the start."""
        track = self.track
        safety = torch.stack(track.safety, dim=1)
        control = torch.stack(track.control, dim=1) if track.control else None
        openings = track.others.get(OPENING)
        return RolloutResult(
            status="measured",
            reason=None,
            horizon=self.horizon,
            pilot_steps=self.pilot,
            steps=track.steps,
            safety=safety - safety[:, :1],
            control=None if control is None else control - control[:, :1],
            finetune_loss=track.finetune_loss,
            kept_share=track.kept_share,
            flow_time=[float(sum(self.planned.rates[:step])) for step in track.steps],
            diverged_at=track.diverged_at,
            scales=list(SCALES) if track.extrapolated is not None else [],
            extrapolated=None if track.extrapolated is None else track.extrapolated - safety[:, :1],
            gradient_evaluations=self.planned.gradient_evaluations,
            safety_passes=len(track.steps),
            safety_rows=list(self.safety.rows),
            warnings=self.warnings(),
            start=float(safety[:, 0].mean()),
            opening_loss=None if openings is None else torch.stack(openings, dim=1),
            behaviour=self.behaviour.result(),
            start_losses=safety[:, 0],
            rows=[dict(self.task.safety.rows[i]) for i in self.safety.rows if self.task.safety.rows],
            task=_provenance(self.task),
        )

    def warnings(self) -> list[str]:
        """Sentences for the report."""
        shared = [str(note) for note in self.task.description.get("data_warnings", ())]
        found = [*shared, *self.planned.recipe.notes]
        if self.task.finetune.tokens is None and self.planned.training.loss == "tokens":
            found.append(
                "Trained tokens are not known for losses given from Python: the steps take means over rows."
            )
        if self.task.control is None:
            found.append("No control data: a general drift cannot be told from a loss of safety.")
        if self.track.diverged_at is not None:
            found.append(f"The virtual run diverges after step {self.track.steps[-1]}.")
        return found


def watched(task: Task, config: BehaviourConfig | None, *, heldout: bool = False) -> Behaviour:
    """The observer of what the model says about this task's prompts.

    Args:
        task: safety rows and control rows.
        config: how many prompts, how far; None: nothing is watched.
        heldout: watch the held-out safety rows in place of those of the forecast.
    """
    wanted = config or BehaviourConfig(prompts=0)
    return Behaviour(
        task.heldout if heldout and task.heldout is not None else task.safety,
        task.control,
        prompts=wanted.prompts,
        ordinary_prompts=wanted.ordinary_prompts,
        tokens=wanted.tokens,
        opening_tokens=wanted.opening_tokens,
    )
