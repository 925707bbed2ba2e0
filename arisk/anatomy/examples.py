"""Which fine-tuning rows push the model towards harm, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arisk.anatomy.update import Update
from arisk.base.processes import gathered, share
from arisk.base.task import Batch, Task
from arisk.gradients import ParameterLayout, batch_size, choose_engine, per_sample_gradients

__all__ = ["score_examples"]


def score_examples(
    task: Task,
    layout: ParameterLayout,
    update: Update,
    safety_gradient: Tensor,
    pull: Tensor,
    *,
    limit: int,
    batches: Sequence[Batch],
) -> list[dict[str, Any]]:
    """First-order −⟨ḡ_s, D g_j⟩ and second-order ⟨F u, −D g_j⟩ of the rows in the first batches.

    Positive means harmful: a step along −D g_j raises the safety loss at that rate.

    Args:
        task: the model, inside `measuring`, with the fine-tuning data.
        layout: the selected parameters.
        update: the planned update, whose preconditioner D is used for every row.
        safety_gradient: (P,) ḡ_s.
        pull: (P,) F u.
        limit: rows scored; a row met twice is scored once.
        batches: the fine-tuning batches in planned order.

    Returns:
        One mapping per row, in data order.
    """
    if limit == 0:
        return []
    loss_fn = task.finetune.loss_fn
    engine = choose_engine(task.model, batches[0], loss_fn, layout, "auto").engine
    targets = torch.stack([-update.preconditioner * safety_gradient, -update.preconditioner * pull], dim=1)
    which = _rows_until(task, batches, limit)
    own = [_batch_scores(task, layout, batches[i], targets, engine) for i in share(len(which))]
    rows: dict[int, dict[str, Any]] = {}
    for numbers, (scores, norms, losses) in zip(which, gathered(own, len(which)), strict=True):
        for j, index in enumerate(numbers):
            if index in rows or len(rows) >= limit:
                continue
            rows[index] = {
                **_text(task, index),
                "index": index,
                "loss": float(losses[j]),
                "gradient_norm": float(norms[j]),
                "first_order": float(scores[j, 0]),
                "second_order": float(scores[j, 1]),
            }
    return [rows[index] for index in sorted(rows)]


def _rows_until(task: Task, batches: Sequence[Batch], limit: int) -> list[Sequence[int]]:
    """Row numbers of the first batches, as many batches as hold `limit` different rows."""
    indices: Callable[[int], Sequence[int]] | None = getattr(task.finetune.batches, "indices", None)
    which: list[Sequence[int]] = []
    met: set[int] = set()
    seen = 0
    for number, batch in enumerate(batches):
        size = batch_size(batch)
        which.append(indices(number) if indices else range(seen, seen + size))
        seen += size
        met.update(which[-1])
        if len(met) >= limit:
            break
    return which


def _batch_scores(
    task: Task, layout: ParameterLayout, batch: Batch, targets: Tensor, engine: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Dot products with the targets (B, 2), gradient norms (B,) and losses (B,) of one batch."""
    size = batch_size(batch)
    scores = torch.zeros(size, targets.shape[1], dtype=torch.float64)
    squares = torch.zeros(size, dtype=torch.float64)

    def sink(name: str, block: Tensor) -> None:
        flat = block.flatten(1).cpu()
        part = flat @ targets[layout.slice_of(name)].to(flat.dtype)
        scores.add_(part.to(torch.float64))
        squares.add_(flat.square().sum(1).to(torch.float64))

    losses = per_sample_gradients(task.model, batch, task.finetune.loss_fn, layout, sink, engine=engine)
    return scores, squares.sqrt(), losses


def _text(task: Task, index: int) -> dict[str, Any]:
    """What the loader knows of a row, for display."""
    if index >= len(task.finetune.rows):
        return {}
    row = task.finetune.rows[index]
    return {key: row[key] for key in ("prompt", "response", "tokens", "line") if key in row}
