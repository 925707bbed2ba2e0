"""Where on the planned run rows are scored, and the directions their gradients are held against there.

At the aligned point the mean safety gradient is that of a minimum: noise. A few real steps later,
where the planned run has just begun to raise the safety loss, it points away from what those steps
did, and rows that keep pushing stand out. Much later the rows that did it are learned and their
gradients fade. So the plan is followed until the safety loss has risen by a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arisk.anatomy.safety_side import recomputed_side
from arisk.anatomy.update import first_batches, measure_update
from arisk.base.artifacts import read_tensors, write_tensors
from arisk.base.errors import NumericsError
from arisk.base.processes import from_first, is_first, share, summed
from arisk.base.task import Progress, RowBatches, SampleSet, Task
from arisk.config.plan import ScreenConfig
from arisk.gradients import ParameterLayout, mean_gradient, move_batch
from arisk.screening.record import ScreenPoint
from arisk.screening.rows import RowGroup, row_groups
from arisk.training.loop import PlannedRun, StepDone, follow, put
from arisk.training.panels import panel_of, sample_losses, spread
from arisk.training.recipe import Recipe

__all__ = ["COLUMNS", "EVERY", "Place", "control_groups", "places"]

#: The safety loss is measured every so many steps.
EVERY = 5
#: Directions of a place, in column order: −D ∇L_s, and −D ∇L_c where there is control data.
COLUMNS = ("safety", "control")


@dataclass(frozen=True)
class Place:
    """One point of the planned run with what rows are held against there.

    Attributes:
        point: step, rises and weight.
        theta: (P,) the selected parameters there.
        directions: (P, 1 or 2), see `COLUMNS`.
        metric: (P,) D.
    """

    point: ScreenPoint
    theta: Tensor
    directions: Tensor
    metric: Tensor


def control_groups(samples: SampleSet, config: ScreenConfig) -> list[RowGroup]:
    """Control rows that serve as the null: spread over the set, or the first ones of any other loader."""
    batches = samples.batches
    rows = None
    if isinstance(batches, RowBatches):
        rows = spread(batches.row_count, config.control_samples)
    return list(row_groups(samples, config.batch_size, rows=rows, limit=config.control_samples))


class _PointWalk:
    """The planned run under way, with the losses at its start."""

    def __init__(
        self,
        task: Task,
        layout: ParameterLayout,
        config: ScreenConfig,
        recipe: Recipe,
        seed: int,
        engine: str,
        progress: Progress,
    ) -> None:
        self.task, self.layout, self.config, self.training = task, layout, config, recipe.training
        self.engine, self.progress = engine, progress
        self.run = PlannedRun(task, layout, recipe, seed)
        self.device = self.run.stream.device
        self.safety = panel_of(task.safety, None, self.device)
        self.control = control_groups(task.control, config) if task.control else []
        self.start = self._losses()
        if not torch.isfinite(torch.tensor(self.start[0])):
            raise NumericsError(
                "the safety loss of the aligned model is not finite",
                where="screen: step 0",
                fix="check the safety rows, or load the model in float32",
            )

    def _losses(self) -> tuple[float, float | None]:
        """Mean safety and control loss here."""
        safety = float(self.safety.losses(self.task.model).mean())
        if self.task.control is None:
            return safety, None
        batches = [move_batch(group.batch, self.device) for group in self.control]
        return safety, float(sample_losses(self.task.model, batches, self.task.control.loss_fn).mean())

    def until_risen(self) -> int:
        """Take real steps until the safety loss has risen; the number taken."""
        last = min(self.config.max_steps, self.run.recipe.horizon)

        def risen(done: StepDone) -> bool:
            self.progress("planned steps", done.number, last)
            if done.number % EVERY and done.number != last:
                return False
            safety = float(self.safety.losses(self.task.model).mean())
            return safety - self.start[0] >= self.config.rise

        self.progress("planned steps", 0, last)
        taken = follow(self.run, 1, last, [risen])
        self.progress("planned steps", taken, taken)
        return taken

    def place(self, step: int, weight: float) -> Place:
        """Directions at the present parameters."""
        task, layout = self.task, self.layout
        safety, control = self._losses()
        batches = first_batches(task.finetune, self.config.batches, self.device)
        update = measure_update(task, task.finetune, layout, self.training, batches, self.progress)
        d = update.preconditioner
        side = recomputed_side(task, layout, self.engine, self.config.batch_size)
        samples = len(self.safety)
        columns = [side.weighted_sum(torch.full((samples,), 1 / samples, dtype=torch.float64))]
        if task.control is not None:
            columns.append(self._control_gradient())
        point = ScreenPoint(
            step=step,
            safety_rise=safety - self.start[0],
            control_rise=None if control is None or self.start[1] is None else control - self.start[1],
            weight=weight,
        )
        theta = torch.cat([p.detach().reshape(-1) for p in self.run.parameters]).cpu()
        # Each direction lies in one piece of memory, as products with rows read it.
        directions = torch.stack([-d * column.to(d) for column in columns]).T
        return Place(point, theta, directions, d)

    def _control_gradient(self) -> Tensor:
        """∇L_c (P,), float64, over the control rows."""
        assert self.task.control is not None
        total = torch.zeros(self.layout.numel, dtype=torch.float64)
        for number in share(len(self.control)):
            group = self.control[number]
            batch = move_batch(group.batch, self.device)
            _, gradient = mean_gradient(self.task.model, batch, self.task.control.loss_fn, self.layout)
            total += gradient.to("cpu", torch.float64) * len(group.rows)
        return summed(total) / sum(len(group.rows) for group in self.control)


def places(
    task: Task,
    layout: ParameterLayout,
    config: ScreenConfig,
    recipe: Recipe,
    seed: int,
    start: Sequence[Tensor],
    *,
    engine: str,
    workspace: Path | None,
    progress: Progress,
) -> list[Place]:
    """The points at which rows are scored; the model is put back to θ*.

    Args:
        task: model and data, inside `measuring` and `keeping_parameters`.
        layout: the selected parameters.
        config: which points, how far to go.
        recipe: how the plan trains.
        seed: seeds dropout and noise of its steps.
        start: θ* by parameter.
        engine: engine of the per-sample gradients.
        workspace: finished points are kept there and found again.
        progress: told of steps taken.

    Raises:
        NumericsError: a loss or gradient is not finite.
    """
    wanted = 2 if config.points == "both" else 1
    if workspace and from_first((workspace / f"point-{wanted - 1}.safetensors").exists):
        return [_read(workspace / f"point-{i}.safetensors") for i in range(wanted)]
    walk = _PointWalk(task, layout, config, recipe, seed, engine, progress)
    found: list[Place] = []
    if config.points != "risen":
        found.append(walk.place(0, 1.0))
    if config.points != "start":
        step = walk.until_risen()
        rates = recipe.rates
        late = float(rates[step // 2 :].sum() / rates.sum()) if found else 1.0
        if found:
            found = [_weighed(found[0], 1 - late)]
        found.append(walk.place(step, late))
        put(walk.run.parameters, start)
    for i, place in enumerate(found):
        if workspace and is_first():
            _write(workspace / f"point-{i}.safetensors", place)
    return found


def _weighed(place: Place, weight: float) -> Place:
    old = place.point
    point = ScreenPoint(old.step, old.safety_rise, old.control_rise, weight)
    return Place(point, place.theta, place.directions, place.metric)


def _write(path: Path, place: Place) -> None:
    point = place.point
    control = float("nan") if point.control_rise is None else point.control_rise
    numbers = torch.tensor([point.step, point.safety_rise, control, point.weight], dtype=torch.float64)
    parts = {"theta": place.theta, "directions": place.directions.T, "metric": place.metric, "point": numbers}
    write_tensors(path, parts)


def _read(path: Path) -> Place:
    held = read_tensors(path)
    step, safety, control, weight = held["point"].tolist()
    point = ScreenPoint(int(step), safety, None if math.isnan(control) else control, weight)
    return Place(point, held["theta"], held["directions"].T, held["metric"])
