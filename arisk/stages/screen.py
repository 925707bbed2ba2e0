"""Stage screen: the harm that every fine-tuning row is predicted to push, and which rows to flag.

    s_j = Σ_c w_c ⟨∇L_c(θ_c) − ∇L_s(θ_c), D_c g_j(θ_c)⟩

is, to first order, the rise of the safety loss less that of the control loss when the planned
optimizer steps on row j alone, per unit learning rate, at points θ_c of the planned run. Tracing
influence along a run is the idea of TracIn (arXiv 2002.08484); that the points are chosen by the
rise of the safety loss, and that harm is contrasted with control data, is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from arisk.artifacts import read_tensors, write_tensors
from arisk.config import ScreenConfig, TrainingConfig
from arisk.errors import InputError
from arisk.geometry.correlation import rank_correlation
from arisk.geometry.outlying import discoveries, positive_share, tail_probabilities
from arisk.geometry.schedule import learning_rates
from arisk.gradients import ParameterLayout, choose_engine, layout_of, measuring, move_batch
from arisk.gradients.layout import parameters_of
from arisk.progress import Progress, silent
from arisk.screened import ScreenResult
from arisk.stages.planned_run import keeping_parameters, put
from arisk.stages.screen_explain import explained
from arisk.stages.screen_points import Place, control_groups, places
from arisk.stages.screen_rows import RowGroup, row_groups, row_products
from arisk.task import RowBatches, SampleSet, Task

__all__ = ["flagged_anew", "screen"]

#: Rows of one file that a resumed run finds again.
SHARD_ROWS = 256
#: Control rows from which they serve as the null.
NULL_ROWS = 16


@dataclass(frozen=True)
class _Scored:
    """Products of all rows of one data set at every point: each (N, m + 3)."""

    tables: Sequence[Tensor]


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
        run = _Scoring(task, layout, config, found, engine, workspace, progress)
        limit = _limit(task.finetune, training, steps)
        rows = run.tables(task.finetune, row_groups(task.finetune, config.batch_size, limit=limit))
        control = task.control and run.tables(task.control, iter(control_groups(task.control, config)))
        record = _record(task, config, found, rows, control, steps)
        put(parameters_of(task.model, layout), _parts(layout, found[-1].theta))
        examples = explained(task, layout, found[-1], record, config, engine, progress)
    return replace(record, examples=examples)


def _limit(samples: SampleSet, training: TrainingConfig, steps: int) -> int | None:
    """Rows read of a loader that has no known end: those of the planned run."""
    if isinstance(samples.batches, RowBatches) or hasattr(samples.batches, "__len__"):
        return None
    return steps * training.gradient_accumulation * training.batch_size


def _parts(layout: ParameterLayout, flat: Tensor) -> list[Tensor]:
    return list(layout.split(flat).values())


class _Scoring:
    """Passes over rows at every point, resumable shard by shard."""

    def __init__(
        self,
        task: Task,
        layout: ParameterLayout,
        config: ScreenConfig,
        found: Sequence[Place],
        engine: str,
        workspace: Path | None,
        progress: Progress,
    ) -> None:
        self.task, self.layout, self.config, self.found = task, layout, config, found
        self.engine, self.workspace, self.progress = engine, workspace, progress
        self.parameters = parameters_of(task.model, layout)

    def tables(self, samples: SampleSet, groups: Iterator[RowGroup]) -> _Scored:
        """(N, m + 3) products at every point, in data order."""
        shards: list[list[Tensor]] = [[] for _ in self.found]
        numbers: list[int] = []
        known = len(samples.rows)
        for number, shard in enumerate(_shards(groups)):
            for at, place in enumerate(self.found):
                self.progress(f"{samples.name} rows", len(numbers), max(known, len(numbers)))
                shards[at].append(self._shard(samples, shard, place, f"{samples.name}-{at}-{number:06d}"))
            numbers += [row for group in shard for row in group.rows]
        self.progress(f"{samples.name} rows", len(numbers), len(numbers))
        order = torch.argsort(torch.tensor(numbers))
        return _Scored([torch.cat(parts)[order] for parts in shards])

    def _shard(self, samples: SampleSet, shard: Sequence[RowGroup], place: Place, name: str) -> Tensor:
        path = self.workspace / f"rows-{name}.safetensors" if self.workspace else None
        if path is not None and path.exists():
            return read_tensors(path)["products"]
        put(self.parameters, _parts(self.layout, place.theta))
        made = torch.cat(
            [
                row_products(
                    self.task.model,
                    group,
                    samples.loss_fn,
                    self.layout,
                    place.directions,
                    # Only control rows are left out of a mean, which takes their D-norm.
                    place.metric if samples is self.task.control else None,
                    engine=self.engine,
                )
                for group in shard
            ]
        )
        if path is not None:
            write_tensors(path, {"products": made})
        return made


def _shards(groups: Iterator[RowGroup]) -> Iterator[list[RowGroup]]:
    """Groups gathered to about `SHARD_ROWS` rows."""
    shard: list[RowGroup] = []
    rows = 0
    for group in groups:
        shard.append(group)
        rows += len(group.rows)
        if rows >= SHARD_ROWS:
            yield shard
            shard, rows = [], 0
    if shard:
        yield shard


def _record(
    task: Task,
    config: ScreenConfig,
    found: Sequence[Place],
    rows: _Scored,
    control: _Scored | None,
    steps: int,
) -> ScreenResult:
    """Scores from products, flags from scores."""
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
    record = ScreenResult(
        scores=scores,
        first_order=first,
        control_order=against,
        second_order=_sum(weights, [table[:, 1] for table in rows.tables]),
        losses=rows.tables[-1][:, -1],
        gradient_norms=rows.tables[-1][:, -3],
        null=null,
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


def flagged_anew(record: ScreenResult, config: ScreenConfig) -> ScreenResult:
    """The same scores with flags by the present settings; what-if and files are left empty.

    Rule: p-values of the null's robust, heavy tail (`tail_probabilities`), Benjamini and Hochberg at
    `false_discovery`, and a positive score above every control row; or exactly a share `drop`.

    Raises:
        InputError: no row would be kept.
    """
    scores = record.scores
    enough = record.null is not None and len(record.null) >= NULL_ROWS
    null = record.null if enough and record.null is not None else scores
    p_values = tail_probabilities(scores, null)
    if config.drop is not None:
        count = min(len(scores), max(1, round(config.drop * len(scores))))
        chosen = torch.tensor(record.order[:count])
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
        p_values=p_values,
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
