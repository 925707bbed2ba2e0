"""Stage screen: the harm that every fine-tuning row is predicted to push, which rows to flag, and the cost.

    s_j = Σ_c w_c ⟨∇L_c(θ_c) − ∇L_s(θ_c), D_c g_j(θ_c)⟩

is, to first order, the rise of the safety loss less that of the control loss when the planned optimizer
steps on row j alone, per unit learning rate, at points θ_c of the planned run. Tracing influence along a
run is the idea of TracIn (arXiv 2002.08484); that the points are chosen by the rise of the safety loss, and
that harm is contrasted with control data, is this project's.

Rows are ranked by an estimate, and the head of that ranking, from which rows are flagged, is scored
exactly. Flagged are those that leave harmless rows behind, or a share as asked for. What screen meets on
its way is not known beforehand (when safety has risen, whether a row is flagged), so its cost is that of a
run that takes all steps it may and drops rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arisk.anatomy.cost import numel, samples_in
from arisk.base.errors import InputError
from arisk.base.task import Progress, RowBatches, SampleSet, Task, silent
from arisk.config.plan import ScreenConfig, TrainingConfig, planned_steps
from arisk.engine.stage import Cost, CostScene
from arisk.forecast.run import rollout_passes
from arisk.geometry.statistics import discoveries, positive_share, rank_correlation, tail_probabilities
from arisk.gradients import ParameterLayout, choose_engine, layout_of, measuring, move_batch
from arisk.gradients.layout import parameters_of
from arisk.screening.estimates import ROW_SCORES, Passes, RowTables, worth_estimating
from arisk.screening.explain import ENTRIES, explained
from arisk.screening.points import COLUMNS, EVERY, Place, control_groups, places, row_groups
from arisk.screening.record import ScreenResult
from arisk.training.loop import keeping_parameters, put
from arisk.training.recipe import recipe_of
from arisk.verification.run import COPIES_OF_A_RUN, per_step

__all__ = [
    "CHECKED",
    "HEAD",
    "HEAD_SHARE",
    "NULL_ROWS",
    "Estimates",
    "by_estimates",
    "flagged_anew",
    "screen",
    "screen_cost",
]


def screen(
    task: Task,
    *,
    config: ScreenConfig,
    training: TrainingConfig,
    steps: int,
    seed: int = 0,
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
        workspace: finished shards of rows are kept there and found again; None keeps none.
        progress: told of rows scored.

    Returns:
        The record, without files and what-if.

    Raises:
        InputError: the data set gives no row, or every row would be flagged.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    layout = layout_of(task.model, task.parameter_names)
    recipe = recipe_of(training, steps)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        first = next(row_groups(task.finetune, config.batch_size, limit=config.batch_size))
        batch = move_batch(first.batch, start[0].device)
        engine = choose_engine(task.model, batch, task.finetune.loss_fn, layout, "auto").engine
        found = places(
            task,
            layout,
            config,
            recipe,
            seed,
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
    against = _sum(weights, [table[:, 1] for table in rows.tables]) if contrasted else None
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
    return (count * table[:, 1] + table[:, -2].square()) / (count - 1)


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


#: Control rows from which they serve as the null.
NULL_ROWS = 16


def flagged_anew(record: ScreenResult, config: ScreenConfig) -> ScreenResult:
    """The same scores with flags by the present settings; what-if and files are left empty.

    Only rows that are scored exactly are flagged. Rule: p-values of the null's robust, heavy tail
    (`tail_probabilities`), Benjamini and Hochberg at `false_discovery`, and a positive score above every
    control row; or exactly a share `drop`.

    Raises:
        InputError: no row would be kept.
    """
    scores = record.scores
    enough = record.null is not None and len(record.null) >= NULL_ROWS
    null = record.null if enough and record.null is not None else scores
    # An estimate is no evidence: in the rule its row counts as one that does not stand out.
    p_values = tail_probabilities(scores, null).masked_fill(~record.exact, 1.0)
    if config.drop is not None:
        count = min(len(scores), max(1, round(config.drop * len(scores))))
        chosen = torch.tensor([row for row in record.order if record.exact[row]][:count], dtype=torch.int64)
        rule = f"the {config.drop:.3g} of the rows with the highest scores, as asked for"
    else:
        found = discoveries(p_values, config.false_discovery) if record.rise_reached else torch.arange(0)
        ceiling = max(0.0, float(null.max())) if enough else 0.0
        chosen = found[scores[found] > ceiling]
        chosen = chosen[torch.argsort(scores[chosen], descending=True, stable=True)]
        rule = (
            f"scores beyond the heavy tail of {'control rows' if enough else 'the rows themselves'} at a "
            f"false discovery rate of {config.false_discovery:g}"
            + (", and above every control row" if enough else "")
        )
    _require_kept(len(chosen), len(scores), config)
    marked = set(chosen.tolist())
    return replace(
        record,
        p_values=p_values.masked_fill(~record.exact, math.nan),
        flagged=chosen.tolist(),
        rule=rule,
        threshold=float(scores[chosen].min()) if len(chosen) else math.nan,
        null_source="control" if enough else "rows",
        share=positive_share(scores, chosen),
        examples=[
            {**row, "flagged": row["row"] in marked, "p_value": float(p_values[row["row"]])}
            for row in record.examples
        ],
        what_if={},
        files=[],
        files_missing=None,
    )


def _require_kept(flagged: int, rows: int, config: ScreenConfig) -> None:
    if flagged < rows:
        return
    raise InputError(
        f"all {rows} fine-tuning rows are flagged, so none would be kept",
        where="screen" if config.drop is None else "screen.drop",
        fix="this data as a whole pushes towards harm compared with `control`: choose other data, give "
        "control rows like the harmless part of it, or flag a share only with `--drop 5%`",
    )


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
    build: Callable[..., ScreenResult],
) -> ScreenResult:
    """Estimate every row, then score exactly from the top until a whole part of the head has no flag.

    Args:
        passes: passes over rows at the points.
        samples: the fine-tuning data.
        config: rows per pass, side of a sketch, how to flag.
        limit: rows read of a loader that cannot be regrouped.
        method: how to estimate.
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
    scores = torch.stack([w * table[:, 0] for w, table in zip(weights, found.tables, strict=True)]).sum(0)
    estimates = Estimates(method, scores, torch.zeros(len(scores), dtype=torch.bool))
    order = torch.argsort(scores, descending=True, stable=True).tolist()
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
    agreement = rank_correlation(scores[checked], record.scores[checked])
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
    if agreement < TELLING:
        told += " That is little, and harmful rows may lie further down: use `screen.method: exact`."
    return told


#: Passes over all safety rows that give the directions of one point.
SAFETY_PASSES = 3
#: Copies of the selected parameters beside the model: θ, the directions, D, θ* and the moments.
COPIES = 10


def screen_cost(scene: CostScene) -> Cost:
    """A walk to the point where safety has risen, the rows scored there, and the what-if of dropping."""
    count = numel(scene.task)
    vector, explained = count * 4 / 1e9, min(ENTRIES, scene.config.screen.examples * count) * 4 / 1e9
    device = None
    if scene.device:
        moving = scene.device["gradients"] + COPIES_OF_A_RUN * vector
        device = max(moving, scene.device["per sample"] + vector)
    return Cost(
        passes=_passes(scene),
        seconds=scene.loading,
        memory_gb=scene.memory["per sample"] + COPIES * vector + explained,
        device_gb=device,
    )


def _passes(scene: CostScene) -> dict[str, float]:
    task, config, rollout = scene.task, scene.config, rollout_passes(scene)
    given, rows = config.screen, samples_in(task.finetune)
    safety, layout = samples_in(task.safety), layout_of(task.model, task.parameter_names)
    control = min(samples_in(task.control), given.control_samples)
    points = 2 if given.points == "both" else 1
    steps = planned_steps(config.training, task.finetune.units)
    walked = 0 if given.points == "start" else min(given.max_steps, steps)
    examples = min(given.examples, rows)
    exact, looked = rows, 0
    estimates = given.method
    if estimates == "auto":
        estimates = "differences" if worth_estimating(task.model, layout, rows) else "exact"
    if estimates != "exact":
        exact = min(rows, CHECKED + max(HEAD, round(HEAD_SHARE * rows)))
        looked = rows * ROW_SCORES[estimates].forwards
    counts: dict[str, float] = {
        "gradient rows": walked * per_step(config)
        + points * (given.batches * config.training.batch_size + control),
        "forward rows": math.ceil(walked / EVERY) * safety + points * (safety + control + looked),
        "single-row gradients": points * (SAFETY_PASSES * safety + exact + control) + 2 * examples + safety,
        "products": points * (exact + control),
        "product columns": points * len(COLUMNS) * (exact + control),
    }
    if given.what_if and config.rollout.enabled:
        counts = {k: counts.get(k, 0.0) + 2 * rollout.get(k, 0.0) for k in {*counts, *rollout}}
    return counts
