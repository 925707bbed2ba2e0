"""Stage screen: the harm that every fine-tuning row is predicted to push, and which rows to flag.

    s_j = Σ_c w_c ⟨∇L_c(θ_c) − ∇L_s(θ_c), D_c g_j(θ_c)⟩

is, to first order, the rise of the safety loss less that of the control loss when the planned
optimizer steps on row j alone, per unit learning rate, at points θ_c of the planned run. Tracing
influence along a run is the idea of TracIn (arXiv 2002.08484); that the points are chosen by the
rise of the safety loss, and that harm is contrasted with control data, is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arisk.base.progress import Progress, silent
from arisk.base.task import RowBatches, SampleSet, Task
from arisk.config.plan import ScreenConfig, TrainingConfig
from arisk.geometry.correlation import rank_correlation
from arisk.gradients import ParameterLayout, choose_engine, layout_of, measuring, move_batch
from arisk.gradients.layout import parameters_of
from arisk.screening.estimates import worth_estimating
from arisk.screening.explain import explained
from arisk.screening.points import Place, control_groups, places
from arisk.screening.record import ScreenMethod, ScreenResult
from arisk.screening.rows import row_groups
from arisk.screening.screen_flags import NULL_ROWS, flagged_anew
from arisk.screening.screen_head import Estimates, by_estimates
from arisk.screening.screen_passes import Passes, RowTables
from arisk.training.loop import keeping_parameters, put
from arisk.training.schedules import learning_rates

__all__ = ["screen"]


def screen(
    task: Task,
    *,
    config: ScreenConfig,
    training: TrainingConfig,
    steps: int,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> ScreenResult:
    """Score every fine-tuning row, and flag those that leave the null behind.

    Args:
        task: model and data; the model is left as found.
        config: where to score, how to flag.
        training: the planned recipe.
        steps: planned optimizer steps T.
        workspace: finished shards of rows are kept there and found again; None keeps none.
        progress: told of rows scored.

    Returns:
        The record, without files and what-if.

    Raises:
        InputError: the data set gives no row, or every row would be flagged.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    layout = layout_of(task.model, task.parameter_names)
    rates = learning_rates(
        training.learning_rate, steps, schedule=training.schedule, warmup_steps=training.warmup_steps
    )
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        first = next(row_groups(task.finetune, config.batch_size, limit=config.batch_size))
        batch = move_batch(first.batch, start[0].device)
        engine = choose_engine(task.model, batch, task.finetune.loss_fn, layout, "auto").engine
        found = places(
            task,
            layout,
            config,
            training,
            rates,
            start,
            engine=engine,
            workspace=workspace,
            progress=progress,
        )
        passes = Passes(task, layout, found, engine, workspace, progress)
        limit = _limit(task.finetune, training, steps)
        control = None
        if task.control is not None:
            held = control_groups(task.control, config)
            control = passes.exact(task.control, lambda: iter(held), "control rows", metric=True)
        build = partial(_record, task, config, found, control=control, steps=steps)
        method = _method(task, layout, config, limit)
        if method == "exact":
            groups = partial(row_groups, task.finetune, config.batch_size, limit=limit)
            record = build(passes.exact(task.finetune, groups, "finetune rows"))
        else:
            record = by_estimates(passes, task.finetune, config, limit, method, build)
        put(parameters_of(task.model, layout), list(layout.split(found[-1].theta).values()))
        examples = explained(task, layout, found[-1], record, config, engine, progress)
    return replace(record, examples=examples)


def _method(task: Task, layout: ParameterLayout, config: ScreenConfig, limit: int | None) -> ScreenMethod:
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


def _record(
    task: Task,
    config: ScreenConfig,
    found: Sequence[Place],
    rows: RowTables,
    *,
    control: RowTables | None,
    steps: int,
    estimates: Estimates | None = None,
) -> ScreenResult:
    """Scores from products, flags from scores; a row without products has its estimate."""
    weights = [place.point.weight for place in found]
    contrasted = control is not None
    first = _sum(weights, [table[:, 0] for table in rows.tables])
    against = _sum(weights, [table[:, 2] for table in rows.tables]) if contrasted else None
    null = None
    if control is not None:
        null = _sum(weights, [table[:, 0] - _left_out(table) for table in control.tables])
    point = found[-1].point
    reached = point.safety_rise >= config.rise or config.points == "start"
    scores = first if against is None else first - against
    exact = torch.ones(len(scores), dtype=torch.bool)
    if estimates is not None:
        exact = estimates.exact.clone()
        scores = torch.where(exact, scores, estimates.scores)
    record = ScreenResult(
        scores=scores,
        first_order=first,
        control_order=against,
        second_order=_sum(weights, [table[:, 1] for table in rows.tables]),
        losses=rows.tables[-1][:, -1],
        gradient_norms=rows.tables[-1][:, -3],
        null=null,
        method="exact" if estimates is None else estimates.method,
        exact=exact,
        p_values=torch.ones_like(first),
        contrasted=contrasted,
        flagged=[],
        rule="",
        threshold=math.nan,
        null_source="control",
        points=[place.point for place in found],
        rise_reached=reached,
        rise=config.rise,
        planned_steps=steps,
        share=math.nan,
        length_correlation=_length_correlation(task.finetune, scores),
        examples=[],
        what_if={},
        files=[],
        files_missing=None,
        warnings=[],
    )
    record = replace(record, warnings=_warnings(task, record))
    return flagged_anew(record, config)


def _length_correlation(samples: SampleSet, scores: Tensor) -> float:
    """Whether length drives the score; NaN where the rows do not tell their tokens."""
    lengths = [row.get("tokens", math.nan) for row in samples.rows]
    if len(lengths) != len(scores):
        return math.nan
    return rank_correlation(scores, torch.tensor(lengths, dtype=torch.float64))


def _sum(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)


def _left_out(table: Tensor) -> Tensor:
    """−⟨∇L_c without row k, D g_k⟩ of every control row k, so that no row meets itself."""
    count = len(table)
    if count < 2:
        return torch.zeros(count, dtype=torch.float64)
    return (count * table[:, 2] + table[:, -2].square()) / (count - 1)


def _warnings(task: Task, record: ScreenResult) -> list[str]:
    """What a reader must know."""
    found: list[str] = []
    if task.control is None:
        found.append(
            "Harm specific to safety was not measured: without `control` data the scores are plain "
            "first-order harm, and the bulk of the rows serves as the null."
        )
    elif record.null is not None and len(record.null) < NULL_ROWS:
        found.append(
            f"Only {len(record.null)} control rows (of {NULL_ROWS} needed): the bulk of the rows is the null."
        )
    point = record.points[-1]
    if not record.rise_reached:
        found.append(
            f"The planned run did not raise the safety loss by {record.rise:g} nats/token within "
            f"{point.step} of {record.planned_steps} steps ({point.safety_rise:+.3g}): the ranking is mostly "
            "noise and the rule flags no row. That is no finding about later steps."
        )
    if point.step == 0:
        found.append("Scored at the aligned model alone, where a first-order score is mostly noise.")
    return found
