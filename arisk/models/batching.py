"""Rows to batches: right-padded tensors, and the order in which the planned fine-tune sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from arisk.models.losses import KEEP
from arisk.models.rendering import IGNORED, Rendered

__all__ = ["FixedBatches", "PlannedBatches", "collate", "first_tokens"]


def collate(rows: Sequence[Rendered], pad: int) -> dict[str, Any]:
    """Right-padded `input_ids`, `attention_mask`, `position_ids` and `labels`, each (B, longest).

    With `logits_to_keep`, the last positions from which a response token is predicted.

    Padding on the right, masks and explicit positions keep a sample the same in any batch.
    """
    longest = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        count = len(row.tokens)
        ids[i, :count] = torch.tensor(row.tokens)
        mask[i, :count] = 1
        labels[i, :count] = torch.tensor(row.labels())
    positions = torch.arange(longest).expand(len(rows), longest).contiguous()
    first = max(1, min((row.spans[0][0] for row in rows if row.spans), default=longest))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
        KEEP: min(longest, longest - first + 1),
    }


def first_tokens(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The batch with labels at the first `count` trained tokens of each row alone, cut after the last one.

    Args:
        batch: as `collate` makes it.
        count: tokens.
    """
    labels = batch["labels"]
    trained = labels != IGNORED
    kept = labels.masked_fill(trained.cumsum(1) > count, IGNORED)
    end = int((kept != IGNORED).any(0).nonzero().max()) + 1 if bool(trained.any()) else labels.shape[1]
    cut = {name: value[:, :end] for name, value in {**batch, "labels": kept}.items() if name != KEEP}
    return cut if KEEP not in batch else cut | {KEEP: batch[KEEP] - (labels.shape[1] - end)}


class FixedBatches:
    """Batches of all rows in file order.

    Args:
        rows: the rendered rows.
        size: rows per batch; the last may be smaller.
        pad: padding token.
    """

    def __init__(self, rows: Sequence[Rendered], size: int, pad: int) -> None:
        self.rows = rows
        self.size = size
        self.pad = pad

    @property
    def row_count(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def per_epoch(self) -> int:
        """Batches."""
        return -(-len(self.rows) // self.size)

    def indices(self, number: int) -> list[int]:
        """Rows of the batch with this number, counted from 0; from the start again after the last."""
        start = number % self.per_epoch * self.size
        return list(range(start, min(start + self.size, len(self.rows))))

    def of(self, rows: Sequence[int]) -> dict[str, Any]:
        """A batch of these rows."""
        return collate([self.rows[i] for i in rows], self.pad)

    def sample(self, count: int) -> list[int]:
        """Numbers of `count` different rows, evenly over the file, or of all where there are no more."""
        total = len(self.rows)
        count = min(count, total)
        return [(2 * i + 1) * total // (2 * count) for i in range(count)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.per_epoch):
            yield self.of(self.indices(number))


class PlannedBatches:
    """Endless micro-batches in the order of the planned fine-tune: every epoch shuffled anew.

    Epoch e (from 0) has the order that `transformers.Trainer` draws with this seed, `randperm` of a
    generator seeded seed + e; its last micro-batch has the rows that are left.

    Args:
        rows: the rendered rows.
        size: rows per micro-batch.
        pad: padding token.
        seed: seed of the shuffles.
        shuffled: off: rows as they stand, in every epoch.
        drop_last: leave out an epoch's last micro-batch where it is not full.
    """

    def __init__(
        self,
        rows: Sequence[Rendered],
        size: int,
        pad: int,
        seed: int,
        *,
        shuffled: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.rows = rows
        self.size = size
        self.pad = pad
        self.seed = seed
        self.shuffled = shuffled
        full, rest = divmod(len(rows), size)
        #: Micro-batches of an epoch.
        self.per_epoch = max(1, full + (rest > 0 and not drop_last))
        self._epoch, self._order = -1, list[int]()

    def indices(self, number: int) -> list[int]:
        """Rows of the micro-batch with this number, counted from 0."""
        epoch, inside = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._drawn(epoch)
        return self._order[inside * self.size : (inside + 1) * self.size]

    def _drawn(self, epoch: int) -> list[int]:
        if not self.shuffled:
            return list(range(len(self.rows)))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def reseeded(self, by: int) -> PlannedBatches:
        """The same rows in the order of another seed."""
        found = PlannedBatches(self.rows, self.size, self.pad, self.seed + by, shuffled=self.shuffled)
        found.per_epoch = self.per_epoch
        return found

    @property
    def row_count(self) -> int:
        """Different rows."""
        return len(self.rows)

    def of(self, rows: Sequence[int]) -> dict[str, Any]:
        """A batch of these rows."""
        return collate([self.rows[i] for i in rows], self.pad)

    def sample(self, count: int) -> list[int]:
        """Numbers of `count` different rows, or of all where there are no more."""
        if count >= len(self.rows):
            return list(range(len(self.rows)))
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.rows), generator=generator)[:count].tolist()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The micro-batch with this number; there is no last one."""
        return self.of(self.indices(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            yield self[number]
            number += 1
