"""Rows to batches: right-padded tensors, and the order in which the planned fine-tune sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from arisk.models.losses import KEEP
from arisk.models.rendering import IGNORED, Rendered

__all__ = ["FixedBatches", "PlannedBatches", "collate"]


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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.rows), self.size):
            yield collate(self.rows[start : start + self.size], self.pad)


class PlannedBatches:
    """Endless micro-batches in the order of the planned fine-tune: every epoch shuffled anew.

    Epochs follow each other without a break, so a data set smaller than a batch fills one from
    several epochs.

    Args:
        rows: the rendered rows.
        size: rows per micro-batch.
        pad: padding token.
        seed: seed of the shuffles.
    """

    def __init__(self, rows: Sequence[Rendered], size: int, pad: int, seed: int) -> None:
        self.rows = rows
        self.size = size
        self.pad = pad
        self.seed = seed
        self._order: list[int] = []
        self._generator = torch.Generator().manual_seed(seed)

    def indices(self, number: int) -> list[int]:
        """Rows of the micro-batch with this number, counted from 0."""
        while len(self._order) < (number + 1) * self.size:
            self._order += torch.randperm(len(self.rows), generator=self._generator).tolist()
        return self._order[number * self.size : (number + 1) * self.size]

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
