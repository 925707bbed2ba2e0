"""Passes over the rows of a data set at every point: exact products, or estimates of the score.

Rows are worked through shard by shard. Processes of one run share the shards, and a finished shard
is kept on disk, so that a killed run finds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from arisk.base.artifacts import read_tensors, write_tensors
from arisk.base.processes import gathered, rank, world
from arisk.base.progress import Progress
from arisk.base.task import RowBatches, SampleSet, Task
from arisk.gradients import ParameterLayout
from arisk.gradients.layout import parameters_of
from arisk.screening.estimates import Estimate, by_differences, by_sketches
from arisk.screening.points import Place
from arisk.screening.rows import RowGroup, row_groups, row_products
from arisk.training.loop import put

__all__ = ["Passes", "RowTables"]

#: Rows of one file that a resumed run finds again.
SHARD_ROWS = 128
#: Rows on which the step of differences is set.
PROBED = 32


@dataclass(frozen=True)
class RowTables:
    """Products of some rows at every point.

    Attributes:
        rows: their numbers, ascending.
        tables: per point (N, m + 3), columns as of `row_products`; (N, 2) of estimates: score and loss.
    """

    rows: Tensor
    tables: Sequence[Tensor]


class Passes:
    """What rows are held against, point by point; moves the model's parameters there.

    Args:
        task: model and data, inside `measuring` and `keeping_parameters`.
        layout: the selected parameters.
        found: the points.
        engine: engine of the per-sample gradients.
        workspace: finished shards are kept there; None keeps none.
        progress: told of rows scored.
    """

    def __init__(
        self,
        task: Task,
        layout: ParameterLayout,
        found: Sequence[Place],
        engine: str,
        workspace: Path | None,
        progress: Progress,
    ) -> None:
        self.task, self.layout, self.found = task, layout, found
        self.engine, self.workspace, self.progress = engine, workspace, progress
        self.parameters = parameters_of(task.model, layout)

    def exact(
        self, samples: SampleSet, groups: Callable[[], Iterator[RowGroup]], name: str, *, metric: bool = False
    ) -> RowTables:
        """Exact products with the directions of every point.

        Args:
            samples: the data set.
            groups: gives its rows anew.
            name: of the pass, for its files and the display.
            metric: take the D-norm as well.
        """

        def made(place: Place) -> AbstractContextManager[Estimate]:
            def products(shard: Sequence[RowGroup]) -> Tensor:
                put(self.parameters, list(self.layout.split(place.theta).values()))
                run = partial(row_products, self.task.model, engine=self.engine)
                against = (samples.loss_fn, self.layout, place.directions, place.metric if metric else None)
                return torch.cat([run(group, *against) for group in shard])

            return nullcontext(products)

        return self._tables(groups, name, len(samples.rows), made)

    def estimated(
        self,
        samples: SampleSet,
        groups: Callable[[], Iterator[RowGroup]],
        method: str,
        *,
        side: int,
        size: int,
    ) -> RowTables:
        """Estimates of the score at every point.

        Args:
            samples: the data set.
            groups: gives its rows anew.
            method: `differences` or `sketch`.
            side: entries that a sketch keeps of each side of a matrix.
            size: rows per group.

        Returns:
            Tables (N, 2): score and loss.
        """
        model, layout, loss_fn = self.task.model, self.layout, samples.loss_fn

        def made(place: Place) -> AbstractContextManager[Estimate]:
            if method == "sketch":
                return by_sketches(model, layout, place, loss_fn, side, self.engine)
            probe = list(row_groups(samples, size, rows=_spread(samples), limit=PROBED))
            return by_differences(model, layout, place, loss_fn, probe)

        return self._tables(groups, f"{samples.name} rows by {method}", len(samples.rows), made)

    def _tables(
        self,
        groups: Callable[[], Iterator[RowGroup]],
        name: str,
        known: int,
        made: Callable[[Place], AbstractContextManager[Estimate]],
    ) -> RowTables:
        """One pass over all rows per point, each rank taking its share of the shards."""
        tables: list[Tensor] = []
        numbers = torch.zeros(0, dtype=torch.int64)
        for at, place in enumerate(self.found):
            own: list[tuple[list[int], Tensor]] = []
            count = seen = 0
            with made(place) as measure:
                for number, shard in enumerate(_shards(groups())):
                    rows = [row for group in shard for row in group.rows]
                    if number % world() == rank():
                        self.progress(name, seen, max(known, seen))
                        own.append((rows, self._shard(shard, f"rows-{name}-{at}-{number:06d}", measure)))
                    count, seen = number + 1, seen + len(rows)
            everything = gathered(own, count)
            self.progress(name, seen, seen)
            numbers = torch.tensor([row for rows, _ in everything for row in rows])
            order = torch.argsort(numbers)
            numbers = numbers[order]
            tables.append(torch.cat([table for _, table in everything])[order])
        return RowTables(numbers, tables)

    def _shard(self, shard: Sequence[RowGroup], name: str, measure: Estimate) -> Tensor:
        path = self.workspace / f"{name.replace(' ', '-')}.safetensors" if self.workspace else None
        if path is not None and path.exists():
            return read_tensors(path)["products"]
        made = measure(shard)
        if path is not None:
            write_tensors(path, {"products": made})
        return made


def _spread(samples: SampleSet) -> list[int] | None:
    """Rows that the step of differences is set on: spread evenly, or the first ones of any other loader."""
    if not isinstance(samples.batches, RowBatches):
        return None
    count = samples.batches.row_count
    return sorted({i * count // PROBED for i in range(PROBED)})


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
