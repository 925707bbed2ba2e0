"""Why a row is harmful: the safety samples it hurts most, and the modules that carry it. All exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arisk.anatomy.subspace import recomputed_side
from arisk.base.task import Progress, Task
from arisk.config.plan import ScreenConfig
from arisk.gradients import ParameterLayout, move_batch, per_sample_gradients
from arisk.screening.points import Place, RowGroup, row_groups, row_products
from arisk.screening.record import ScreenResult

__all__ = ["ENTRIES", "explained", "listed"]

#: Entries of D g_j held at a time (4 bytes each), and the most passes over the safety samples.
ENTRIES, PASSES = 250_000_000, 4
#: Safety samples and modules named per row.
SAMPLES_NAMED, MODULES_NAMED = 3, 4


def explained(
    task: Task,
    layout: ParameterLayout,
    place: Place,
    record: ScreenResult,
    config: ScreenConfig,
    engine: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The most harmful rows with K_ij = t_j ⟨G_i, D g_j⟩ by safety sample and the first order by module.

    Args:
        task: the model, standing at the last point, inside `measuring`.
        layout: the selected parameters.
        place: that point.
        record: the scores.
        config: how many rows.
        engine: engine of the per-sample gradients.
        progress: told of rows explained.

    Returns:
        One mapping per row that is scored exactly, the most harmful first. `hurts`: safety samples with
        −K_ij > 0, nats per unit learning rate; None beyond what the memory allows. `modules`: shares of
        the row's first order, which sum to 1 over all modules.
    """
    head = [row for row in record.order if record.exact[row]][: config.examples]
    if not head:
        return []
    flagged = set(record.flagged)
    made = {row: {**_text(task, row), "row": row, "flagged": row in flagged} for row in head}
    columns: dict[int, Tensor] = {}
    most = PASSES * max(1, ENTRIES // layout.numel)
    for done, group in enumerate(
        row_groups(task.finetune, config.batch_size, rows=head, limit=_last(task, head))
    ):
        progress("explaining rows", done, len(head))
        products = row_products(
            task.model,
            group,
            task.finetune.loss_fn,
            layout,
            place.directions[:, :1],
            engine=engine,
            by_module=True,
        )
        for j, row in enumerate(group.rows):
            made[row]["modules"] = _modules(layout, products[j, :, 0])
    for part in _parts([row for row in head if len(head) <= most or row in head[:most]], layout.numel):
        columns.update(_against(task, layout, place, part, config, engine))
    for rank, row in enumerate(head, start=1):
        made[row].update(
            rank=rank,
            score=float(record.scores[row]),
            at_mean_length=float(record.at_mean_length[row]),
            first_order=float(record.first_order[row]),
            control_order=None if record.control_order is None else float(record.control_order[row]),
            p_value=float(record.p_values[row]),
            loss=float(record.losses[row]),
            gradient_norm=float(record.gradient_norms[row]),
            hurts=_hurt(task, record.length_of(row) * columns[row]) if row in columns else None,
        )
    return [made[row] for row in head]


def listed(task: Task, record: ScreenResult, count: int) -> list[dict[str, Any]]:
    """The highest rows of scores that have no parts: neither `hurts` nor `modules` was measured."""
    flagged = set(record.flagged)
    return [
        {
            **_text(task, row),
            "row": row,
            "flagged": row in flagged,
            "rank": rank,
            "score": float(record.scores[row]),
            "at_mean_length": float(record.at_mean_length[row]),
            "first_order": None,
            "control_order": None,
            "p_value": float(record.p_values[row]),
            "loss": None,
            "gradient_norm": None,
            "hurts": None,
            "modules": None,
        }
        for rank, row in enumerate(record.order[:count], start=1)
    ]


def _last(task: Task, head: Sequence[int]) -> int:
    """Rows of a loader that must be read to meet all of these."""
    del task
    return max(head) + 1


def _parts(rows: Sequence[int], numel: int) -> list[list[int]]:
    size = max(1, ENTRIES // numel)
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _against(
    task: Task, layout: ParameterLayout, place: Place, rows: list[int], config: ScreenConfig, engine: str
) -> dict[int, Tensor]:
    """−K_ij (N,) of these rows: one pass over them, one over the safety samples."""
    steps = torch.zeros(layout.numel, len(rows))
    if place.metric.dtype == torch.float64:
        steps = steps.double()
    column = {row: i for i, row in enumerate(rows)}

    def keep(group: RowGroup) -> None:
        where = [column[row] for row in group.rows]

        def sink(name: str, block: Tensor) -> None:
            part = layout.slice_of(name)
            flat = block.flatten(1).cpu().to(steps.dtype)
            steps[part, where] = (-place.metric[part].to(steps.dtype) * flat).T

        batch = move_batch(group.batch, next(task.model.parameters()).device)
        per_sample_gradients(task.model, batch, task.finetune.loss_fn, layout, sink, engine=engine)

    for group in row_groups(task.finetune, config.batch_size, rows=rows, limit=_last(task, rows)):
        keep(group)
    dots = recomputed_side(task, layout, engine, config.batch_size).dots(steps)
    return {row: dots[:, i] for row, i in column.items()}


def _hurt(task: Task, rises: Tensor) -> list[Mapping[str, Any]]:
    """The safety samples whose loss rises most."""
    order = torch.argsort(rises, descending=True, stable=True)[:SAMPLES_NAMED].tolist()
    return [
        {
            "sample": i,
            "rise": float(rises[i]),
            "prompt": str(task.safety.rows[i].get("prompt", "")) if i < len(task.safety.rows) else "",
        }
        for i in order
        if rises[i] > 0
    ]


def _modules(layout: ParameterLayout, parts: Tensor) -> list[Mapping[str, Any]]:
    """The modules with the largest part of the first order, as shares of it."""
    total = float(parts.sum())
    order = torch.argsort(parts.abs(), descending=True, stable=True)[:MODULES_NAMED].tolist()
    if total == 0:
        return []
    return [{"module": layout.modules[i], "share": float(parts[i]) / total} for i in order]


def _text(task: Task, row: int) -> dict[str, Any]:
    """What the loader knows of a row."""
    if row >= len(task.finetune.rows):
        return {}
    held = task.finetune.rows[row]
    return {key: held[key] for key in ("prompt", "response", "tokens", "line") if key in held}
