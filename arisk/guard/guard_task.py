"""On which rows the task loss of a protected fine-tune is measured.

A protection must keep what the fine-tune is for. Rows of `guard.task` (`Task.clean`) say this best:
clean, and not trained on. Without them the fine-tuning rows serve; those that the aligned model finds
far outside the rest (the rule of the rollout's rare rows) are left out and measured apart, since a
protection that keeps a model from learning a handful of harmful rows does its work. Where more than a
twentieth of the rows are such, nothing tells harm from task and all rows count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from arisk.anatomy.probe import sample_losses
from arisk.base.task import Batch, LossFn, RowBatches, SampleSet, Task
from arisk.forecast.rare import LARGEST_SHARE, outliers
from arisk.forecast.rollout import limited
from arisk.gradients import batch_size, move_batch
from arisk.training.loop import BatchStream

__all__ = ["TaskRows", "task_rows"]


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
    batches = limited(clean, limit, device)
    count = sum(batch_size(batch) for batch in batches)
    seen: int | None = None
    warnings: list[str] = []
    if clean.rows and trained:
        known = {(row.get("prompt"), row.get("response")) for row in trained}
        seen = sum((row.get("prompt"), row.get("response")) in known for row in clean.rows[:count])
    if seen:
        warnings.append(f"{seen} of {count} clean task rows stand in the fine-tuning data as well.")
    return TaskRows(batches, [], clean.loss_fn, count, 0, seen, "clean rows of their own", warnings)


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
