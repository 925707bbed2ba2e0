"""Packing as TRL does it: which rows share a step, and where a row is cut.

`bfd` fills sequences with whole rows. A packed row attends to itself alone and its first token is predicted
from nothing, so a pack is computed here as the rows it holds, side by side: the same losses, the same
gradient. `wrapped` writes all rows one after the other and cuts every `max_length` tokens; a cut takes no
notice of rows, and tokens attend across them.

Rows are packed a thousand at a time, as `datasets` hands them over. A trainer that pads nothing
(`padding_free`) has the same losses as one that pads.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from arisk.models.batching import PlannedBatches
from arisk.models.rendering import Rendered

__all__ = ["PackedBatches", "packs", "wrapped"]

#: Rows that are packed together.
AT_ONCE = 1000


def packs(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows by sequence: best fit, longest first, within every thousand rows.

    A row goes into the fullest sequence that still has room for it, the older one of two that are alike.

    Args:
        lengths: tokens of each row, 1 to `limit`.
        limit: tokens of a sequence.

    Returns:
        Row numbers of every sequence; each row is in one.

    Source: Ding et al., Fewer Truncations Improve Language Modeling (arXiv 2404.10830), section 3.
    """
    found: list[list[int]] = []
    for start in range(0, len(lengths), AT_ONCE):
        part = range(start, min(start + AT_ONCE, len(lengths)))
        found += _best_fit(sorted(part, key=lambda row: -lengths[row]), lengths, limit)
    return found


def _best_fit(rows: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    by_room: dict[int, deque[list[int]]] = {}
    rooms: list[int] = []
    for row in rows:
        place = bisect.bisect_left(rooms, lengths[row])
        if place < len(rooms):
            room = rooms[place]
            sequence = by_room[room].popleft()
            if not by_room[room]:
                rooms.pop(place)
        else:
            room, sequence = limit, []
            sequences.append(sequence)
        sequence.append(row)
        left = room - lengths[row]
        if left:
            waiting = by_room.setdefault(left, deque())
            if not waiting:
                bisect.insort(rooms, left)
            waiting.append(sequence)
    return sequences


def wrapped(rows: Sequence[Rendered], limit: int) -> list[Rendered]:
    """Stretches of `limit` tokens of all rows written one after the other; the last of a thousand is shorter.

    Args:
        rows: whole rows.
        limit: tokens of a sequence.

    Returns:
        The stretches; each is of the row in which it begins.
    """
    found: list[Rendered] = []
    for start in range(0, len(rows), AT_ONCE):
        found += _stretches(rows[start : start + AT_ONCE], limit)
    return found


def _stretches(rows: Sequence[Rendered], limit: int) -> Iterator[Rendered]:
    tokens = list(itertools.chain.from_iterable(row.tokens for row in rows))
    begins = [0, *itertools.accumulate(len(row.tokens) for row in rows)]
    spans = [
        (begin + first, begin + last)
        for begin, row in zip(begins, rows, strict=False)
        for first, last in row.spans
    ]
    ends = [last for _, last in spans]
    for start in range(0, len(tokens), limit):
        end = min(start + limit, len(tokens))
        inside: list[tuple[int, int]] = []
        for first, last in itertools.islice(spans, bisect.bisect_right(ends, start), None):
            if first >= end:
                break
            inside.append((max(first, start) - start, min(last, end) - start))
        row = rows[bisect.bisect_right(begins, start) - 1]
        yield replace(
            row,
            tokens=tuple(tokens[start:end]),
            spans=tuple(inside),
            response_start=max(1, inside[0][0]) if inside else end - start,
            prompt_cut=0,
            response_cut=0,
        )


class PackedBatches:
    """Planned micro-batches of packed sequences, given by the rows that they hold.

    Args:
        rows: the rendered rows in batches of their own, as they would be without packing.
        order: micro-batches of sequences by number.
        sequences: rows of each sequence.
    """

    def __init__(
        self, rows: PlannedBatches, order: PlannedBatches, sequences: Sequence[Sequence[int]]
    ) -> None:
        self.sequences = sequences
        #: Rows of a micro-batch in the mean.
        self.size = max(1, round(order.size * rows.row_count / len(sequences)))
        self._rows, self._order = rows, order

    def reseeded(self, by: int) -> PackedBatches:
        """The same sequences in the order of another seed."""
        return PackedBatches(self._rows, self._order.reseeded(by), self.sequences)

    @property
    def row_count(self) -> int:
        """Different rows."""
        return self._rows.row_count

    @property
    def per_epoch(self) -> int:
        """Micro-batches of an epoch."""
        whole = -(-len(self.sequences) // self._order.size)
        return int(getattr(self._order, "per_epoch", whole))

    def indices(self, number: int) -> list[int]:
        """Rows of the micro-batch with this number, counted from 0."""
        return [row for sequence in self._order.indices(number) for row in self.sequences[sequence]]

    def of(self, rows: Sequence[int]) -> dict[str, Any]:
        """A batch of these rows."""
        return self._rows.of(rows)

    def sample(self, count: int) -> list[int]:
        """Numbers of `count` different rows, or of all where there are no more."""
        return self._rows.sample(count)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The micro-batch with this number; there is no last one."""
        return self.of(self.indices(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, itertools.count())
