"""Stage rollout: safety measured along an accelerated virtual run of the planned fine-tune.

The run starts with a pilot of real optimizer steps and goes on in segments: a leap that stands for
many steps, then a few real ones (`arisk.forecast.leap`). At the end of every segment some safety and control
samples are measured, and all of them where the decision hangs: at the start, the pilot's end, where the loss
has moved, and at the end. Passes without a gradient have the precision of the plan's own. Cost: O(log T)
gradients. The model is put back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import NumericsError
from arisk.base.processes import barrier, gathered, share, world
from arisk.base.task import Batch, Progress, RowBatches, Task, silent
from arisk.config.plan import RolloutConfig, TrainingConfig
from arisk.config.sections import BehaviourConfig
from arisk.forecast.account import PANEL, account
from arisk.forecast.leap import Block, Leaper, RareRows, block_from, kept_block, planned_points
from arisk.forecast.record import DriftAccount, RolloutResult
from arisk.gradients import ParameterLayout, layout_of, measuring
from arisk.gradients.curvature import losses_between, outputs_of
from arisk.models.losses import per_sample_nll, response_logits
from arisk.models.openings import losses_at_scales
from arisk.training.behaviour import TURNED, Behaviour
from arisk.training.loop import PlannedRun, keeping_parameters, put
from arisk.training.panels import LEAD_SHARE, SplitPanel, filled, read_between, sample_losses, split_panel
from arisk.training.probes import measure_probes, probe_panels, probe_points, probe_tracks
from arisk.training.recipe import Recipe, recipe_of
from arisk.training.state import Pauses, Track, load_state

__all__ = ["ANSWERED_POINTS", "OPENING", "SCALES", "forward_rows", "rollout", "skipped_rollout", "watched"]

#: Scales s of the extrapolated outputs; below 1 they fit the exponent of the growth. Losses between them are
#: read off a straight line in their signed root.
SCALES = (0.0, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: Inner points at which every sample is measured, at most, and the change of the root of the mean rise
#: (nats^½) since the last such point from which it is due: rises of .014, .058, .13.
WHOLE_BETWEEN, MOVED = 3, 0.12
#: First inner point at which openings are followed.
FOLLOWED_FROM = 8
#: Points at which answers are written, about: the start, the end, and where openings have turned.
ANSWERED_POINTS = 3
#: Share of openings that must have turned for answers at the pilot's end.
PILOT_TURNED = 0.04
#: Name of the losses of first tokens in the state of a run.
OPENING = "opening"
#: Names of the sets in the state of a run, and of the control rows that lead.
SAFETY, CONTROL, LEADING = "safety", "control", "leading control"


def forward_rows(horizon: int, config: RolloutConfig, rows: Mapping[str, float]) -> float:
    """Rows measured without a gradient along a rollout, with one inner point at which all of them are.

    Args:
        horizon: planned optimizer steps T.
        config: its settings.
        rows: how many there are of `safety`, `control`, prompts `followed`, and `ordinary` ones, and of
            `probes`.
    """
    pilot, points = planned_points(horizon, config)
    count = len(points) + 1
    safety = min(rows["safety"], config.eval_samples or rows["safety"])
    control = min(rows["control"], config.control_samples)
    whole = min(count, 3 + (pilot < horizon))
    leads = [
        config.leading_samples if config.leading_samples < LEAD_SHARE * measured else measured
        for measured in (safety, control)
    ]
    total = leads[0] * count + (safety - leads[0]) * whole
    total += leads[1] * (whole if leads[0] < safety else count) + (control - leads[1]) * min(count, 2)
    if pilot < horizon:
        total += 2 * leads[0]  # The extrapolated outputs.
    total += rows.get("probes", 0) * len(probe_points(points, pilot))
    followed = 1 + sum(point >= min(FOLLOWED_FROM, pilot) for point in points)
    return total + rows["followed"] * followed + rows["ordinary"] * min(count, ANSWERED_POINTS)


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
        found = walk.account(layout)
    return replace(walk.result(), account=found)


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
        lead = config.leading_samples
        self.safety = split_panel(task.safety, config.eval_samples, lead, device)
        self.control = (
            split_panel(task.control, config.control_samples, lead, device) if task.control else None
        )
        self.probes = probe_panels(task.probes, self.opening_tokens, device)
        self.probed = probe_points(self.points, self.pilot)
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
        finite = torch.isfinite(self.track.safety[0])
        if not bool(finite.all()):
            raise NumericsError(
                f"the safety loss of the aligned model is not finite (sample {int((~finite).nonzero()[0])})",
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
            self._losses(model, step)
            if step in self.probed:
                measure_probes(track, model, self.probes, step)
            if step == 0 or step >= min(FOLLOWED_FROM, self.pilot):
                # Where the pilot leaves openings as they were, its answers are those of the start.
                due = PILOT_TURNED if step == self.pilot else TURNED
                self.behaviour.measure(model, step, answer=step == self.horizon, turned=due)
        track.behaviour = self.behaviour.state()
        if step == 0 and self.planned.autocast is not None:
            track.precision_error = self._precision_error(model)

    def _losses(self, model: nn.Module, step: int) -> None:
        """Losses of the leading rows here, and of all rows where the decision hangs."""
        track, ends, whole = self.track, (0, self.horizon), list[str]()
        losses, openings = self.safety.leading(model, self.opening_tokens)
        if self.safety.rest is None or step in (*ends, self.pilot) or self._has_moved(losses):
            losses, openings = _joined((losses, openings), self.safety.others(model, self.opening_tokens))
            whole.append(SAFETY)
        track.safety.append(losses)
        if openings is not None:
            track.others.setdefault(OPENING, []).append(openings)
        if self.control is not None:
            # Elsewhere a straight line does.
            nothing = torch.full((len(self.control),), math.nan, dtype=torch.float64)
            ordinary: tuple[Tensor, Tensor | None] = (nothing, None)
            if whole:
                ordinary = self.control.leading(model, 1)
                whole.append(LEADING)
            if whole and (self.control.rest is None or step in ends):
                ordinary = _joined(ordinary, self.control.others(model, 1))
                whole.append(CONTROL)
            track.control.append(ordinary[0])
        track.whole.append(whole)

    def _has_moved(self, losses: Tensor) -> bool:
        """Whether the leading rows' mean has moved enough since all rows were measured."""
        track, lead = self.track, torch.tensor(self.safety.places)
        known = [i for i, sets in enumerate(track.whole) if SAFETY in sets]
        inner = [i for i in known if track.steps[i] not in (0, self.pilot)]
        if len(inner) >= WHOLE_BETWEEN:
            return False
        here, last = (
            _root(float((v - track.safety[0])[lead].mean())) for v in (losses, track.safety[known[-1]])
        )
        return not abs(here - last) < MOVED

    def _precision_error(self, model: nn.Module) -> float:
        """Root mean square over some leading rows of what the plan's precision changes (nats per token)."""
        panel = self.safety.lead
        few = replace(panel, batches=panel.batches[:1])
        with torch.no_grad():
            plain = sample_losses(model, few.batches, few.loss_fn)
        with self.planned.reading():
            own = sample_losses(model, few.batches, few.loss_fn)
        return float((own - plain).square().mean().sqrt())

    def extrapolate(self) -> Tensor | None:
        """(N, S) safety losses at outputs extrapolated from the start through here; None if it cannot.

        Of the leading rows; the others keep their distance to these, which grows with s up to here.
        """
        panel, parts = self.safety.lead, list[Tensor | None]()
        for number in share(len(panel.batches)):
            with self.planned.reading():
                parts.append(self._extrapolated(panel.batches[number]))
            if parts[-1] is None and world() == 1:
                return None
        found = [part for part in gathered(parts, len(panel.batches)) if part is not None]
        if len(found) < len(panel.batches):
            return None
        lead, leading = torch.tensor(self.safety.places), panel.in_order(torch.cat(found))
        start, here = self.track.safety[0], self.track.safety[-1]
        scales = torch.tensor(SCALES, dtype=torch.float64)
        grown = leading.mean(0) - start[lead].mean()
        apart = (here - start) - (here - start)[lead].mean()
        every = start[:, None] + grown + apart[:, None] * scales.clamp(max=1)
        every[lead] = leading
        return every

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

    def account(self, layout: ParameterLayout) -> DriftAccount | None:
        """Who carries the change up to the end; None where the run did not get there."""
        track = self.track
        if track.diverged_at is not None or track.steps[-1] < self.horizon:
            return None
        few = split_panel(self.task.safety, self.config.eval_samples, PANEL, self.planned.stream.device)
        # At both ends every row has been measured.
        change = (track.safety[-1] - track.safety[0])[few.places].mean()
        return account(self.planned, layout, self.start, few.lead, float(change))

    def result(self) -> RolloutResult:
        """The record: changes against the start."""
        track = self.track
        safety, error = self._filled(self.safety, track.safety, SAFETY)
        control = self._filled(self.control, track.control, CONTROL)[0] if self.control else None
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
            opening_loss=None if openings is None else self._filled(self.safety, openings, SAFETY)[0],
            opening_tokens=None if openings is None else self.opening_tokens,
            behaviour=self.behaviour.result(),
            probes=probe_tracks(track, self.probes),
            start_losses=safety[:, 0],
            rows=[dict(self.task.safety.rows[i]) for i in self.safety.rows if self.task.safety.rows],
            task=_provenance(self.task),
            whole_steps=[step for step, sets in zip(track.steps, track.whole, strict=True) if SAFETY in sets],
            safety_error=error.tolist(),
            precision=None if self.planned.autocast is None else self.planned.training.precision,
            precision_error=track.precision_error,
        )

    def _filled(self, panel: SplitPanel, values: Sequence[Tensor], name: str) -> tuple[Tensor, Tensor]:
        """(N, M) of all rows at all points, and the error of their mean."""
        whole = [name in sets for sets in self.track.whole]
        looked = [name == SAFETY or LEADING in sets for sets in self.track.whole]
        at = [i for i, there in enumerate(looked) if there]
        steps = torch.tensor(self.track.steps, dtype=torch.float64)
        found, error = filled(
            torch.stack([values[i] for i in at], dim=1),
            [whole[i] for i in at],
            panel.places,
            [self.track.steps[i] for i in at],
        )
        return (found, error) if all(looked) else (read_between(steps[at], found, steps), error)

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


def _joined(
    leading: tuple[Tensor, Tensor | None], others: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Values of two sets of rows in one, where each has NaN in the other's place."""
    losses, openings = (
        None if a is None or b is None else torch.where(b.isnan(), a, b)
        for a, b in zip(leading, others, strict=True)
    )
    assert losses is not None
    return losses, openings


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


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
