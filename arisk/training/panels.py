"""Rows that are measured along a run: chosen once, exact in number, spread over their set, none twice.

Sets come sorted by length, and data orders are endless, so the first batches of a set would be its shortest
rows, or some rows several times. Which rows are chosen depends on the set and the number alone, not on how
it is cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError
from arisk.base.processes import gathered, share
from arisk.base.task import Batch, LossFn, RowBatches, SampleSet
from arisk.gradients import batch_size, map_tensors, move_batch, slice_batch

__all__ = ["Panel", "batch_losses", "panel_of", "sample_losses", "spread"]


@dataclass(frozen=True)
class Panel:
    """Rows of one data set on a device.

    Attributes:
        name: of the data set.
        batches: the rows, in the order of their losses.
        rows: their places in the data set.
        loss_fn: their loss.
    """

    name: str
    batches: Sequence[Batch]
    rows: Sequence[int]
    loss_fn: LossFn

    def __len__(self) -> int:
        return len(self.rows)

    def losses(self, model: nn.Module) -> Tensor:
        """ℓ_i of every row, (N,) float64 (nats). Shared over ranks."""
        return sample_losses(model, self.batches, self.loss_fn)


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` places, evenly over them and ascending; all where there are no more."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def panel_of(samples: SampleSet, limit: int | None, device: torch.device) -> Panel:
    """The rows of a set that are measured.

    Rows that can be regrouped, and lists of batches, are chosen evenly over the set. Any other loader is
    read from its start: its first rows, in the order it gives them.

    Args:
        samples: the data set.
        limit: rows at most; None for all.
        device: where they go.

    Raises:
        InputError: the data set gives no row.
    """
    batches: Any = samples.batches
    if isinstance(batches, RowBatches):
        rows = spread(batches.row_count, limit)
        size = batches.size
        cut = [batches.of(rows[i : i + size]) for i in range(0, len(rows), size)]
    elif hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        rows, cut = _of_list([batches[i] for i in range(len(batches))], limit)
    else:
        cut = list(_first(batches, limit))
        rows = list(range(sum(batch_size(batch) for batch in cut)))
    if not rows:
        raise InputError(
            "the data set gives no batch",
            where=f"data set {samples.name!r}",
            fix="give at least one row",
        )
    return Panel(samples.name, [move_batch(batch, device) for batch in cut], rows, samples.loss_fn)


def _of_list(batches: Sequence[Batch], limit: int | None) -> tuple[list[int], list[Batch]]:
    """Evenly spread rows of a list of batches; a batch that is wanted whole stays as it is."""
    sizes = [batch_size(batch) for batch in batches]
    rows = spread(sum(sizes), limit)
    cut: list[Batch] = []
    start, place = 0, 0
    for batch, size in zip(batches, sizes, strict=True):
        inside: list[int] = []
        while place < len(rows) and rows[place] < start + size:
            inside.append(rows[place] - start)
            place += 1
        if inside:
            cut.append(batch if len(inside) == size else _picked(batch, inside))
        start += size
    return rows, cut


def _picked(batch: Batch, inside: Sequence[int]) -> Batch:
    wanted = torch.tensor(inside)
    return map_tensors(batch, lambda t: t[wanted.to(t.device)] if t.ndim > 0 else t)


def _first(batches: Any, limit: int | None) -> Iterator[Batch]:
    """Batches of the first rows, exact in number."""
    left = limit
    for batch in batches:
        size = batch_size(batch)
        if left is not None and size >= left:
            yield batch if size == left else slice_batch(batch, 0, left)
            return
        yield batch
        left = None if left is None else left - size


def batch_losses(model: nn.Module, batch: Batch, loss_fn: LossFn) -> Tensor:
    """ℓ_i of a batch's samples, (B,) float64; a scalar loss is asked one sample at a time. No gradient."""
    with torch.no_grad():
        loss = loss_fn(model, batch)
        size = batch_size(batch)
        if loss.ndim == 0 and size > 1:
            loss = torch.stack([loss_fn(model, slice_batch(batch, i, i + 1)) for i in range(size)])
        return loss.reshape(-1).to("cpu", torch.float64)


def sample_losses(model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn) -> Tensor:
    """ℓ_i of every sample, (N,) float64, as of `batch_losses`. Shared over ranks."""
    losses = [batch_losses(model, batches[number], loss_fn) for number in share(len(batches))]
    return torch.cat(gathered(losses, len(batches)))
