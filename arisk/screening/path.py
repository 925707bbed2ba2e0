"""Path scores: what every row does to the end of the planned run, taken back through its steps.

    s_j = Σ_k ⟨c_k, ∇(term of row j in step k)⟩

with c_k from `arisk.training.unroll`, K steps taken back from ∇M, M the measured harm after them. Were c_k
exact, s_j would be ∂M(θ_K)/∂ε_j at ε = 1, ε_j a weight on row j wherever the plan trains on it. It is not, as
AdamW's scale is levelled in it: the exact derivative foretold real runs far worse. So scores are to be read
as a ranking and in sums over rows, not as what leaving one row out does. (SGD has no scale: with
`screen.curvature` its scores are exact.)

Rows that these steps do not meet are scored as guests of one step, drawn from a few spread evenly, and so are
control rows, as often as a row is met: the null. K is the plan's own length, at most `screen.max_steps`;
later steps are not looked at.

Without `screen.curvature` c_k leaves out that a step bends the gradients of later ones. With it a step's own
rows are read with its dropout and noise; else they are read without, as guests always are.
`tests/bench/README.md` shows what both foretell, measured without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import LossFn, Progress, RowBatches, Task
from arisk.config.plan import ScreenConfig
from arisk.gradients import ParameterLayout, batch_size, mean_gradient, move_batch
from arisk.gradients.layout import parameters_of
from arisk.screening.points import RowGroup, beside, control_groups, precision_of, row_groups, row_products
from arisk.training.loop import PlannedRun, put
from arisk.training.panels import Panel, panel_of, sample_losses, spread
from arisk.training.recipe import Recipe
from arisk.training.unroll import Unrolled, Walk

__all__ = ["SMOOTHING", "PathScores", "path_scores"]

#: Multiple of its root mean square by which AdamW's scale is levelled on the way back.
SMOOTHING = 2.0


@dataclass(frozen=True)
class PathScores:
    """Scores of rows and of control rows, and what the walk did.

    Attributes:
        scores: (N,) s_j, nats per unit of a row's weight; positive is harmful.
        visited: (N,) how often the steps train on a row; 0 for guests.
        null: (N_c,) the same of control rows; None without control data.
        steps: K.
        safety_rise: M(θ_K) − M(θ*). control_rise: of the mean control loss; None without control data.
    """

    scores: Tensor
    visited: Tensor
    null: Tensor | None
    steps: int
    safety_rise: float
    control_rise: float | None


def path_scores(
    task: Task,
    layout: ParameterLayout,
    config: ScreenConfig,
    recipe: Recipe,
    seed: int,
    start: Sequence[Tensor],
    *,
    engine: str,
    progress: Progress,
) -> PathScores:
    """Scores along the first K steps of the plan; the model is put back to θ*.

    Args:
        task: model and data, inside `measuring` and `keeping_parameters`; `safety` is what is measured.
        layout: the selected parameters.
        config: steps, memory, rows per pass, control rows.
        recipe: how the plan trains.
        seed: seeds dropout and noise of the steps, and which guest meets which step.
        start: θ* by parameter.
        engine: engine of the per-sample gradients of guests.
        progress: told of steps.

    Raises:
        ConfigError: the data, the optimizer or the memory do not allow it.
        NumericsError: a loss, gradient or score is not finite.
    """
    batches = task.finetune.batches
    if not isinstance(batches, RowBatches):
        raise ConfigError(
            "path scores need fine-tuning data that can be regrouped by row",
            where="screen.score",
            fix="give rows by a file, or set `screen.score: point`",
        )
    run = PlannedRun(task, layout, recipe, seed)
    device, last = run.stream.device, min(config.max_steps, recipe.horizon)
    measured = panel_of(task.safety, None, device)
    control = (
        control_groups(task.control, config.model_copy(update={"batch_size": 1})) if task.control else []
    )
    before = _losses(task, measured, control)
    memory = config.memory_gb * 1e9
    walk = Walk(run, last, memory, smoothing=SMOOTHING, curvature=config.curvature, progress=progress)
    after = _losses(task, measured, control)
    met = [row for k in range(1, last + 1) for place in run.batches_of(k) for row in batches.indices(place)]
    visited = torch.bincount(torch.tensor(met), minlength=batches.row_count)
    met_rows = _MetRows(task, run, layout, config, control, visited, seed, engine)
    for step in walk.backwards(_slopes(task, layout, measured)):
        for place, terms in step.rows:
            met_rows.scores.index_add_(0, torch.tensor(batches.indices(place)), terms)
        own = [] if config.curvature else [batches.indices(place) for place in run.batches_of(step.number)]
        met_rows.meet(step, own)
    put(parameters_of(task.model, layout), start)
    _require_finite(met_rows.scores, met_rows.null)
    control_rise = None if after[1] is None or before[1] is None else after[1] - before[1]
    null = met_rows.null if control else None
    return PathScores(met_rows.scores, visited, null, last, after[0] - before[0], control_rise)


def _losses(task: Task, measured: Panel, control: Sequence[RowGroup]) -> tuple[float, float | None]:
    """Mean measure and control loss here.

    Raises:
        NumericsError: the measure is not finite.
    """
    safety = float(measured.losses(task.model).mean())
    if not torch.isfinite(torch.tensor(safety)):
        raise NumericsError(
            "what harm is measured by is not finite along the planned run",
            where="screen.score: path",
            fix="check the safety rows, lower `training.learning_rate`, or load the model in float32",
        )
    if task.control is None:
        return safety, None
    device = next(task.model.parameters()).device
    groups = [move_batch(group.batch, device) for group in control]
    return safety, float(sample_losses(task.model, groups, task.control.loss_fn).mean())


def _slopes(task: Task, layout: ParameterLayout, measured: Panel) -> list[Tensor]:
    """∇M here, by parameter."""
    total = torch.zeros(layout.numel, dtype=torch.float64)
    count = 0
    for batch in measured.batches:
        size = batch_size(batch)
        total += mean_gradient(task.model, batch, measured.loss_fn, layout)[1].to("cpu", torch.float64) * size
        count += size
    like = parameters_of(task.model, layout)[0]
    return list(layout.split((total / count).to(like.device, like.dtype)).values())


class _MetRows:
    """Scores by products of a step's pull with rows: its own, and guests, which it does not train on."""

    def __init__(
        self,
        task: Task,
        run: PlannedRun,
        layout: ParameterLayout,
        config: ScreenConfig,
        control: Sequence[RowGroup],
        visited: Tensor,
        seed: int,
        engine: str,
    ) -> None:
        self.task, self.run, self.layout, self.config, self.engine = task, run, layout, config, engine
        chosen = sorted(row for group in control for row in group.rows)
        self.place = {row: place for place, row in enumerate(chosen)}
        self.scores = torch.zeros(len(visited), dtype=torch.float64)
        self.null = torch.zeros(len(chosen), dtype=torch.float64)
        last = min(config.max_steps, run.recipe.horizon)
        often = max(1, round(float(visited[visited > 0].double().mean())))
        generator = torch.Generator().manual_seed(seed)
        unmet = (visited == 0).nonzero()[:, 0].tolist()
        self.rows = _by_step(unmet, last, generator)
        self.controls = [_by_step(chosen, last, generator) for _ in range(often)]

    def meet(self, step: Unrolled, own: Sequence[Sequence[int]]) -> None:
        """Score the guests of a step; the run stands before it.

        Args:
            step: the step.
            own: rows of its micro-batches, where these are scored here too.
        """
        pull: Tensor | None = None
        finetune = self.task.finetune
        for samples, rows, among in (
            *((finetune, rows, len(rows)) for rows in own),
            (finetune, self.rows.get(step.number), None),
            *((self.task.control, often.get(step.number), None) for often in self.controls),
        ):
            if not rows or samples is None:
                continue
            if pull is None:
                pull = torch.cat([c.reshape(-1) for c in step.pull])[:, None]
                pull = beside(pull, self.run.parameters[0])
            for group in row_groups(samples, self.config.batch_size, rows=rows, limit=max(rows) + 1):
                found = self._products(step.number, pull, group, samples.loss_fn, among)
                if samples is self.task.finetune:
                    # A row may stand twice in a step.
                    self.scores.index_add_(0, torch.tensor(group.rows), found)
                else:
                    self.null[[self.place[row] for row in group.rows]] += found

    def _products(
        self, number: int, pull: Tensor, group: RowGroup, loss_fn: LossFn, among: int | None
    ) -> Tensor:
        precision = precision_of(self.run.training)
        found = row_products(
            self.task.model, group, loss_fn, self.layout, pull, engine=self.engine, precision=precision
        )[:, 0]
        return found * self.run.terms_per_loss(number, group.batch, among)


#: Steps that have guests, evenly over the run: a few rows together cost less than each alone.
GUEST_STEPS = 16


def _by_step(guests: Sequence[int], last: int, generator: torch.Generator) -> dict[int, list[int]]:
    """Guests of some steps from 1 to the last, drawn evenly."""
    steps = [step + 1 for step in spread(last, GUEST_STEPS)]
    drawn = torch.randint(len(steps), (len(guests),), generator=generator).tolist()
    found: dict[int, list[int]] = {}
    for guest, place in zip(guests, drawn, strict=True):
        found.setdefault(steps[place], []).append(guest)
    return found


def _require_finite(scores: Tensor, null: Tensor) -> None:
    """Refuse scores that are beyond the numbers, or none at all.

    Raises:
        NumericsError: one is not finite, and the row is named; or all are zero.
    """
    for name, values in (("row", scores), ("control row", null)):
        finite = values.isfinite()
        if not bool(finite.all()):
            row = int((~finite).to(torch.int64).argmax())
            raise NumericsError(
                f"the path score of {name} {row} is not finite: derivatives overflow along the run",
                where=f"screen.score: path ({name} {row}, counted from 0)",
                fix="lower `screen.max_steps` or `training.learning_rate`, or set `screen.score: point`",
            )
    if not bool(scores.any()):
        raise NumericsError(
            "the path scores of all rows are exactly zero: nothing that the plan trains on moves its end",
            where="screen.score: path",
            fix="lower `training.learning_rate`: gradients vanish where a run has destroyed its model",
        )
