"""Passes over the rows of a data set at every point: exact products, or estimates from a sketch.

Rows are worked through shard by shard. Processes of one run share the shards, and a finished shard
is kept on disk, so that a killed run finds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arisk.artifacts import read_tensors, write_tensors
from arisk.gradients import ParameterLayout
from arisk.gradients.layout import parameters_of
from arisk.progress import Progress
from arisk.ranks import gathered, rank, world
from arisk.stages.planned_run import put
from arisk.stages.screen_points import Place
from arisk.stages.screen_rows import RowGroup, row_products
from arisk.stages.screen_sketch import SketchedDirections, row_estimates, sketched
from arisk.task import SampleSet, Task

__all__ = ["Passes", "RowTables"]

#: Rows of one file that a resumed run finds again.
SHARD_ROWS = 128


@dataclass(frozen=True)
class RowTables:
    """Products of some rows at every point.

    Attributes:
        rows: their numbers, ascending.
        tables: per point (N, m + 3), columns as of `row_products`.
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
        self, samples: SampleSet, groups: Iterator[RowGroup], name: str, *, metric: bool = False
    ) -> RowTables:
        """Exact products with the directions of every point.

        Args:
            samples: the data set.
            groups: its rows.
            name: of the pass, for its files and the display.
            metric: take the D-norm as well.
        """

        def products(group: RowGroup, at: int) -> Tensor:
            place = self.found[at]
            return row_products(
                self.task.model,
                group,
                samples.loss_fn,
                self.layout,
                place.directions,
                place.metric if metric else None,
                engine=self.engine,
            )

        return self._tables(groups, name, len(samples.rows), products)

    def estimated(self, samples: SampleSet, groups: Iterator[RowGroup], name: str, side: int) -> RowTables:
        """Estimates of the same from sketches with `side` entries of each side of a matrix."""
        held: list[SketchedDirections] = [
            sketched(self.layout, place.directions, side, self.parameters[0]) for place in self.found
        ]

        def estimates(group: RowGroup, at: int) -> Tensor:
            model, loss_fn = self.task.model, samples.loss_fn
            return row_estimates(model, group, loss_fn, self.layout, held[at], engine=self.engine)

        return self._tables(groups, name, len(samples.rows), estimates)

    def _tables(
        self, groups: Iterator[RowGroup], name: str, known: int, measure: Callable[[RowGroup, int], Tensor]
    ) -> RowTables:
        own: list[tuple[list[int], list[Tensor]]] = []
        count = seen = 0
        for number, shard in enumerate(_shards(groups)):
            count = number + 1
            rows = [row for group in shard for row in group.rows]
            if number % world() == rank():
                self.progress(name, seen, max(known, seen))
                files = [f"rows-{name}-{at}-{number:06d}" for at in range(len(self.found))]
                made = [self._shard(shard, at, file, measure) for at, file in enumerate(files)]
                own.append((rows, made))
            seen += len(rows)
        everything = gathered(own, count)
        self.progress(name, seen, seen)
        numbers = torch.tensor([row for rows, _ in everything for row in rows])
        order = torch.argsort(numbers)
        points = range(len(self.found))
        tables = [torch.cat([made[at] for _, made in everything])[order] for at in points]
        return RowTables(numbers[order], tables)

    def _shard(
        self, shard: Sequence[RowGroup], at: int, name: str, measure: Callable[[RowGroup, int], Tensor]
    ) -> Tensor:
        path = self.workspace / f"{name.replace(' ', '-')}.safetensors" if self.workspace else None
        if path is not None and path.exists():
            return read_tensors(path)["products"]
        put(self.parameters, list(self.layout.split(self.found[at].theta).values()))
        made = torch.cat([measure(group, at) for group in shard])
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
