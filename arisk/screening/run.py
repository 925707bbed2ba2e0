"""Stage screen: the harm that every fine-tuning row is predicted to push, which rows to flag, and the cost.

    s_j = t_j Σ_c w_c ⟨∇L_c(θ_c) − ∇L_s(θ_c), D_c g_j(θ_c)⟩

is, to first order, the rise of the safety loss less that of the control loss that row j's term of a planned
step brings, per unit learning rate, at points θ_c of the planned run. t_j is the row's trained tokens over
their mean where the loss of a step is a mean over tokens, so that a long row weighs more in it. Rows are
ranked by it; whether one stands out is asked of s_j/t_j, since control rows are long as well. Tracing
influence along a run is the idea of TracIn (arXiv 2002.08484); that the points are chosen by the rise of the
safety loss, and that harm is contrasted with control data, is this project's.

`screen.score` may ask for path scores or anchor scores in its place (`arisk.screening.path`, `.anchors`).
`auto` takes scores at a point, or path scores where the control loss still falls before it, and ranks no rows
where none stands out though the planned run does harm: then the whole set does it, which is a finding.

Rows are ranked by an estimate, and the head of that ranking, from which rows are flagged, is scored
exactly. `arisk.screening.flags` says which are flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import Progress, RowBatches, SampleSet, Task, silent
from arisk.config.plan import BehaviourConfig, ScreenConfig, TrainingConfig
from arisk.geometry.statistics import (
    rank_correlation,
)
from arisk.gradients import ParameterLayout, choose_engine, layout_of, measuring, move_batch
from arisk.gradients.layout import parameters_of
from arisk.screening.anchors import anchor_scores
from arisk.screening.estimates import ROW_SCORES, Passes, RowTables, worth_estimating
from arisk.screening.explain import explained, listed
from arisk.screening.flags import NULL_ROWS, flagged_anew
from arisk.screening.measure import MeasuredTask, measured_by
from arisk.screening.path import path_scores
from arisk.screening.points import (
    Place,
    RowGroup,
    control_groups,
    places,
    precision_of,
    row_groups,
    trained_tokens_of,
)
from arisk.screening.record import LEAST_LENGTH, MEASURES, ScreenPoint, ScreenResult
from arisk.training.loop import keeping_parameters, put, running_statistics
from arisk.training.recipe import Recipe, recipe_of

__all__ = [
    "CHECKED",
    "HEAD",
    "HEAD_SHARE",
    "Estimates",
    "by_estimates",
    "screen",
    "unsettled",
]


def screen(
    task: Task,
    *,
    config: ScreenConfig,
    training: TrainingConfig,
    steps: int,
    seed: int = 0,
    behaviour: BehaviourConfig | None = None,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> ScreenResult:
    """Score every fine-tuning row, and flag those that leave the null behind.

    Args:
        task: model and data; the model is left as found.
        config: where to score, how to flag.
        training: the planned recipe.
        steps: planned optimizer steps T.
        seed: seeds dropout and noise of the planned steps.
        behaviour: the judge that tells which prompts are refused; default the rule.
        workspace: finished shards of rows are kept there and found again; None keeps none.
        progress: told of rows scored.

    Returns:
        The record, without files and what-if.

    Raises:
        InputError: the data set gives no row, or every row would be flagged.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        scene = _Scene(task, layout, config, training, steps, seed, behaviour, start, workspace, progress)
        return KINDS[config.score](scene)


@dataclass(frozen=True)
class _Scene:
    """What rows are scored from: the arguments of `screen`, inside `measuring` and `keeping_parameters`."""

    task: Task
    layout: ParameterLayout
    config: ScreenConfig
    training: TrainingConfig
    steps: int
    seed: int
    behaviour: BehaviourConfig | None
    start: Sequence[Tensor]
    workspace: Path | None
    progress: Progress

    def measured(self) -> tuple[_Scene, MeasuredTask]:
        """The same on what harm is measured by."""
        measured = measured_by(self.task, self.config, self.behaviour)
        return replace(self, task=measured.task), measured

    @property
    def recipe(self) -> Recipe:
        """How the plan trains."""
        return recipe_of(self.training, self.steps)

    def lengths(
        self, groups: Iterable[RowGroup], control: Iterable[RowGroup] = ()
    ) -> tuple[Tensor | None, Tensor | None]:
        """Relative lengths t of all rows (N,), and of control rows; None where rows count alike."""
        samples = self.task.finetune
        tokens = trained_tokens_of(samples, groups) if self.training.loss == "tokens" else None
        if tokens is None:
            return None, None
        mean = tokens.mean().clamp(min=1.0)
        beside = trained_tokens_of(samples, control)
        return tokens / mean, None if beside is None else beside / mean

    @cached_property
    def engine(self) -> str:
        """Engine of the per-sample gradients."""
        samples = self.task.finetune
        first = next(row_groups(samples, self.config.batch_size, limit=self.config.batch_size))
        batch = move_batch(first.batch, self.start[0].device)
        return choose_engine(self.task.model, batch, samples.loss_fn, self.layout, "auto").engine


def _by_auto(scene: _Scene) -> ScreenResult:
    """Scores at a point, or along the path where the plan still teaches the model how to answer there."""
    scene, measured = scene.measured()
    buffers = running_statistics(scene.task.model)
    before = [buffer.clone() for buffer in buffers]
    found = _places(scene)
    point = found[-1].point
    risen = point.safety_rise >= scene.config.rise or scene.config.drop is not None
    if not risen or point.control_fall <= UNSETTLED:
        return _at_points(scene, measured, found)
    after = [buffer.clone() for buffer in buffers]
    put(buffers, before)
    try:
        made = _along_path(scene, measured)
    except (ConfigError, NumericsError) as err:
        # Not every plan can be taken backwards.
        put(buffers, after)
        made = _at_points(scene, measured, found)
        told = f"Path scores were tried, and failed: {err.what} ({err.fix})."
    else:
        told = f"{_in_words(point)}, so path scores were taken."
    return replace(made, warnings=[*made.warnings, told])


def _by_point(scene: _Scene) -> ScreenResult:
    """Scores at one point of the plan, or two."""
    scene, measured = scene.measured()
    return _at_points(scene, measured, _places(scene))


def _by_path(scene: _Scene) -> ScreenResult:
    """Scores along the first steps of the plan."""
    return _along_path(*scene.measured())


def _places(scene: _Scene) -> list[Place]:
    return places(
        scene.task,
        scene.layout,
        scene.config,
        scene.recipe,
        scene.seed,
        scene.start,
        engine=scene.engine,
        workspace=scene.workspace,
        progress=scene.progress,
    )


def _at_points(scene: _Scene, measured: MeasuredTask, found: Sequence[Place]) -> ScreenResult:
    task, layout, config = scene.task, scene.layout, scene.config
    precision = precision_of(scene.training)
    passes = Passes(task, layout, found, scene.engine, scene.workspace, scene.progress, precision)
    limit = _limit(task.finetune, scene.training, scene.steps)
    control = None
    if task.control is not None:
        held = control_groups(task.control, config)
        control = passes.exact(task.control, lambda: iter(held), "control rows", metric=True)
    groups = partial(row_groups, task.finetune, config.batch_size, limit=limit)
    lengths = scene.lengths(groups())[0]
    build = partial(_of_products, scene, measured, found, lengths, control=control)
    method = _method(task, layout, config, limit)
    if method == "exact":
        record = build(passes.exact(task.finetune, groups, "finetune rows"))
    else:
        record = by_estimates(passes, task.finetune, config, limit, method, lengths, build)
    put(parameters_of(task.model, layout), list(layout.split(found[-1].theta).values()))
    examples = explained(task, layout, found[-1], record, config, scene.engine, scene.progress)
    return replace(record, examples=examples)


def _along_path(scene: _Scene, measured: MeasuredTask) -> ScreenResult:
    made = path_scores(
        scene.task,
        scene.layout,
        scene.config,
        scene.recipe,
        scene.seed,
        scene.start,
        engine=scene.engine,
        progress=scene.progress,
    )
    point = ScreenPoint(made.steps, made.safety_rise, made.control_rise, 1.0)
    task, config = scene.task, scene.config
    control = control_groups(task.control, config) if task.control else []
    lengths, beside = scene.lengths(row_groups(task.finetune, config.batch_size), control)
    null = made.null if made.null is None or beside is None else made.null / beside.clamp(min=LEAST_LENGTH)
    record = _built(scene, measured, "path", made.scores, null, point, lengths)
    guests, told = int((made.visited == 0).sum()), list[str]()
    if guests:
        told.append(f"{guests} rows are not met within these steps: they are scored as guests of one.")
    if made.steps < scene.steps:
        told.append(
            f"Path scores end at step {made.steps} of {scene.steps}: later steps are not looked at "
            "(`screen.max_steps` takes more)."
        )
    return replace(record, warnings=[*record.warnings, *told])


def _by_anchors(scene: _Scene) -> ScreenResult:
    """Scores of hidden states at the aligned model."""
    made = anchor_scores(scene.task, scene.config, scene.progress, scene.behaviour)
    record = _built(
        scene,
        MeasuredTask(scene.task, "loss"),
        "anchors",
        made.scores,
        made.null,
        ScreenPoint(0, math.nan, None, 1.0),
    )
    told = (
        f"Anchor scores say what an answer begins like, by {made.anchors} prompts at layer {made.layer}; "
        "whether the planned run does harm was not measured."
    )
    return replace(record, warnings=[*record.warnings, told])


#: Kinds of scores by name; auto is the one whose first rows, left out of real runs, kept most refusals
#: (`tests/bench/README.md`).
KINDS: Mapping[str, Callable[[_Scene], ScreenResult]] = {
    "point": _by_point,
    "path": _by_path,
    "anchors": _by_anchors,
    "auto": _by_auto,
}


def _method(task: Task, layout: ParameterLayout, config: ScreenConfig, limit: int | None) -> str:
    """How all rows are scored first."""
    if config.method != "auto":
        return config.method
    batches = task.finetune.batches
    rows = batches.row_count if isinstance(batches, RowBatches) else limit
    return "differences" if worth_estimating(task.model, layout, rows) else "exact"


def _limit(samples: SampleSet, training: TrainingConfig, steps: int) -> int | None:
    """Rows read of a loader that has no known end: those of the planned run."""
    if isinstance(samples.batches, RowBatches) or hasattr(samples.batches, "__len__"):
        return None
    return steps * training.gradient_accumulation * training.batch_size


def _of_products(
    scene: _Scene,
    measured: MeasuredTask,
    found: Sequence[Place],
    lengths: Tensor | None,
    rows: RowTables,
    *,
    control: RowTables | None,
    estimates: Estimates | None = None,
) -> ScreenResult:
    """Scores from products, flags from scores; a row without products has its estimate."""
    weights = [place.point.weight for place in found]
    contrasted = control is not None
    counted = 1.0 if lengths is None else lengths
    first = counted * _sum(weights, [table[:, 0] for table in rows.tables])
    against = counted * _sum(weights, [table[:, 1] for table in rows.tables]) if contrasted else None
    null = None
    if control is not None:
        null = _sum(weights, [table[:, 0] - _left_out(table) for table in control.tables])
    scores = first if against is None else first - against
    exact = torch.ones(len(scores), dtype=torch.bool)
    if estimates is not None:
        exact = estimates.exact.clone()
        scores = torch.where(exact, scores, estimates.scores)
    record = replace(
        _unflagged(scene, measured, "point", scores, null, [place.point for place in found]),
        first_order=first,
        control_order=against,
        losses=rows.tables[-1][:, -1],
        gradient_norms=rows.tables[-1][:, -3],
        method="exact" if estimates is None else estimates.method,
        exact=exact,
        contrasted=contrasted,
    )
    record = _with_lengths(record, scene.task.finetune, lengths)
    record = replace(record, warnings=[*record.warnings, *_warnings(scene.task, record)])
    return flagged_anew(record, scene.config)


def _built(
    scene: _Scene,
    measured: MeasuredTask,
    score: str,
    scores: Tensor,
    null: Tensor | None,
    point: ScreenPoint,
    lengths: Tensor | None = None,
) -> ScreenResult:
    """Flags from scores that have no parts, with the highest rows as examples."""
    record = _unflagged(scene, measured, score, scores, null, [point])
    record = _with_lengths(record, scene.task.finetune, lengths)
    record = replace(record, warnings=[*record.warnings, *_warnings(scene.task, record)])
    record = flagged_anew(record, scene.config)
    return replace(record, examples=listed(scene.task, record, scene.config.examples))


def _unflagged(
    scene: _Scene,
    measured: MeasuredTask,
    score: str,
    scores: Tensor,
    null: Tensor | None,
    points: Sequence[ScreenPoint],
) -> ScreenResult:
    """The record before flags; parts of the scores and what rows were scored on are not measured."""
    config, point = scene.config, points[-1]
    unknown = torch.full_like(scores, math.nan)
    # Anchors look at no run; a score at the aligned model alone was asked for.
    reached = score == "anchors" or (score == "point" and config.points == "start")
    return ScreenResult(
        scores=scores,
        first_order=scores,
        control_order=None,
        losses=unknown,
        gradient_norms=unknown,
        null=null,
        method="exact",
        exact=torch.ones(len(scores), dtype=torch.bool),
        p_values=torch.ones_like(scores),
        contrasted=False,
        flagged=[],
        rule="",
        threshold=math.nan,
        null_source="control",
        points=points,
        rise_reached=reached or point.safety_rise >= config.rise,
        rise=config.rise,
        planned_steps=scene.steps,
        share=math.nan,
        length_correlation=math.nan,
        examples=[],
        what_if={},
        files=[],
        files_missing=None,
        warnings=[measured.note] if measured.note else [],
        score=score,
        measure=measured.measure,
    )


def _with_lengths(record: ScreenResult, samples: SampleSet, lengths: Tensor | None) -> ScreenResult:
    """With relative lengths, and whether length drives scores that are rid of it; NaN where none is told."""
    record = replace(record, lengths=lengths)
    told = [row.get("tokens", math.nan) for row in samples.rows]
    if len(told) != len(record.scores):
        return record
    tokens = torch.tensor(told, dtype=torch.float64)
    return replace(record, length_correlation=rank_correlation(record.at_mean_length, tokens))


def _sum(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)


def _left_out(table: Tensor) -> Tensor:
    """−⟨∇L_c without row k, D g_k⟩ of every control row k, so that no row meets itself."""
    count = len(table)
    if count < 2:
        return torch.zeros(count, dtype=torch.float64)
    return (count * table[:, 1] + table[:, -2].square()) / (count - 1)


def _warnings(task: Task, record: ScreenResult) -> list[str]:
    """What a reader must know."""
    found: list[str] = []
    if unread := task.finetune.statistics.get("dropped"):
        found.append(
            f"{unread} rows keep no token that trains within `finetune.max_length`: they are left out, and "
            "are in neither file."
        )
    if task.control is None:
        told = (
            "Harm specific to safety was not measured: without `control` data the scores are plain "
            "first-order harm, and the bulk"
            if record.score == "point"
            else "Without `control` data the bulk"
        )
        found.append(f"{told} of the rows serves as the null.")
    elif record.null is not None and len(record.null) < NULL_ROWS:
        found.append(
            f"Only {len(record.null)} control rows (of {NULL_ROWS} needed): the bulk of the rows is the null."
        )
    point = record.points[-1]
    if not record.rise_reached:
        found.append(
            f"The planned run did not raise {MEASURES[record.measure]} by {record.rise:g} nats/token within "
            f"{point.step} of {record.planned_steps} steps ({point.safety_rise:+.3g}): the ranking is mostly "
            "noise and the rule flags no row. That is no finding about later steps."
        )
    if point.step == 0 and record.score == "point":
        found.append("Scored at the aligned model alone, where a first-order score is mostly noise.")
    if record.score == "point" and point.control_fall > UNSETTLED:
        told = "`screen.score: path` ranked and flagged rows on such a model."
        found.append(f"{_in_words(point)}, and scores at one point tell little. {told}")
    return found


def _in_words(point: ScreenPoint) -> str:
    """What a point is that lies too early, in words."""
    return (
        f"Within the {point.step} steps before rows are scored at a point, the loss of ordinary answers "
        f"falls by {point.control_fall:.2g} nats/token: the plan still teaches this model how to "
        "answer"
    )


#: Fall of the control loss (nats per token) from which a point is too early: it was 0.02 on a SmolLM2, where
#: points told the rows, and 1.0 on a gemma, where they did not.
UNSETTLED = 0.2


def unsettled(record: ScreenResult) -> bool:
    """Whether `auto` may choose otherwise for the plan of this record, by whether a share is asked for."""
    return record.score == "path" or record.points[-1].control_fall > UNSETTLED


#: Rows spread evenly over the ranking that are scored exactly to tell what the estimate is worth.
CHECKED = 64
#: Rows of the head scored exactly at a time: this many at least, and this share of all.
HEAD, HEAD_SHARE = 256, 0.02
#: Rank correlation below which a reader is told that the estimate says little.
TELLING = 0.5


@dataclass(frozen=True)
class Estimates:
    """Estimated scores (N,), and whether a row has exact products in their place, (N,) bool."""

    method: str
    scores: Tensor
    exact: Tensor


def by_estimates(
    passes: Passes,
    samples: SampleSet,
    config: ScreenConfig,
    limit: int | None,
    method: str,
    lengths: Tensor | None,
    build: Callable[..., ScreenResult],
) -> ScreenResult:
    """Estimate every row, then score exactly from the top until a whole part of the head has no flag.

    Args:
        passes: passes over rows at the points.
        samples: the fine-tuning data.
        config: rows per pass, side of a sketch, how to flag.
        limit: rows read of a loader that cannot be regrouped.
        method: how to estimate.
        lengths: (N,) t_j; None where all rows count alike.
        build: ``build(tables, estimates=…)``: the record, with flags among the rows that are exact.

    Returns:
        The record; `exact` tells which scores are, and `agreement` what the others are worth.

    Raises:
        InputError: every row would be flagged.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    groups = partial(row_groups, samples, config.batch_size, limit=limit)
    found = passes.estimated(samples, groups, method, side=config.sketch_side, size=config.batch_size)
    weights = [place.point.weight for place in passes.found]
    at_mean = _sum(weights, [table[:, 0] for table in found.tables])
    scores = at_mean if lengths is None else lengths * at_mean
    estimates = Estimates(method, scores, torch.zeros(len(scores), dtype=torch.bool))
    # What the rule flags, or what `drop` takes.
    by_rule = config.drop is None
    lead = at_mean if by_rule else scores
    order = torch.argsort(lead, descending=True, stable=True).tolist()
    width = passes.found[0].directions.shape[1]
    tables = [_unknown(table[:, 1], width) for table in found.tables]

    def rescored(rows: Sequence[int], name: str) -> ScreenResult:
        made = passes.exact(samples, partial(groups, rows=rows), name)
        for table, new in zip(tables, made.tables, strict=True):
            table[made.rows] = new
        estimates.exact[made.rows] = True
        return build(RowTables(found.rows, tables), estimates=estimates)

    checked = sorted({order[i * len(order) // CHECKED] for i in range(CHECKED)})
    record = rescored(checked, f"{samples.name} rows checked")
    exact = record.at_mean_length if by_rule else record.scores
    agreement = rank_correlation(lead[checked], exact[checked])
    size, number = max(HEAD, round(HEAD_SHARE * len(order))), 0
    while part := [row for row in order if not estimates.exact[row]][:size]:
        record = rescored(part, f"{samples.name} rows head {number:03d}")
        number += 1
        if not set(part) & set(record.flagged):
            break
    said = _said(estimates, agreement, len(checked))
    return replace(record, agreement=agreement, warnings=[*record.warnings, said])


def _unknown(losses: Tensor, directions: int) -> Tensor:
    """(N, m + 3) products that are not known yet, beside losses that are."""
    table = torch.full((len(losses), directions + 3), torch.nan, dtype=torch.float64)
    table[:, -1] = losses
    return table


def _said(estimates: Estimates, agreement: float, checked: int) -> str:
    """What a reader must know of the scores that are estimates."""
    told = (
        f"{int(estimates.exact.sum())} of {len(estimates.exact)} rows are scored exactly, the others by "
        f"{ROW_SCORES[estimates.method].said}; only exact scores are flagged."
    )
    if bool(estimates.exact.all()):
        told = f"Ranked by {ROW_SCORES[estimates.method].said} first; in the end every row is scored exactly."
    told += (
        f" On {checked} rows spread over the ranking the order of the estimates agrees with the exact one at "
        f"ρ = {agreement:+.2f}."
    )
    if agreement < TELLING and not bool(estimates.exact.all()):
        told += " That is little, and harmful rows may lie further down: use `screen.method: exact`."
    return told
