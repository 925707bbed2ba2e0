"""Passes over the rows of a data set at every point: exact products, or estimates that cost less.

The score is the slope of the row's loss along one direction v, the same for all rows:

    s_j = ⟨v, g_j⟩ = (ℓ_j(θ + εv) − ℓ_j(θ − εv))/2ε + O(ε²)

`differences` takes two forward passes and no backward pass. `first_tokens` takes the exact product of the
first tokens of the response, which is their part of s_j, and never reads the rest. `sketch` takes one forward
and backward pass in which no weight gradient is multiplied out, and projects the factors with random sides.

Rows are worked through shard by shard. Processes of one run share the shards, and a finished shard
is kept on disk, so that a killed run finds it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from arisk.base.artifacts import read_tensors, write_tensors
from arisk.base.errors import ConfigError, NumericsError
from arisk.base.processes import gathered, rank, world
from arisk.base.task import LossFn, Progress, RowBatches, SampleSet, Task
from arisk.config import names
from arisk.config.names import Table
from arisk.gradients import ParameterLayout, move_batch
from arisk.gradients.layout import in_float32, is_narrow, parameters_of, widened
from arisk.gradients.store import Sketch, balanced, per_sample_sketches, sketch_of
from arisk.models.batching import first_tokens
from arisk.models.losses import per_sample_nll, trained_tokens
from arisk.screening.points import Place, RowGroup, beside, overflowing, row_groups, row_products, with_row
from arisk.training.loop import put
from arisk.training.panels import batch_losses

__all__ = [
    "ROW_SCORES",
    "Estimate",
    "EstimateScene",
    "Passes",
    "RowScore",
    "RowTables",
    "by_differences",
    "by_first_tokens",
    "by_sketches",
    "contrast",
    "worth_estimating",
]

#: ``estimate(groups)``: (B, 2) float64, every row's estimated score (nats per unit learning rate) and loss
#: (nats per response token).
Estimate = Callable[[Sequence[RowGroup]], Tensor]

#: Rows from which `screen.method: auto` estimates, where at least this share of the model is selected:
#: a gradient of few parameters costs no more than two forward passes.
ROWS, SELECTED = 5_000, 0.5
#: Share of ‖θ‖ (of 1 where that is less) from which the search for ε starts, its rounds, and the root mean
#: square of ℓ(θ + εv) − ℓ(θ − εv) that it ends at (nats per token): a step at which losses already bend.
START, ROUNDS, RISE = 1e-4, 4, 2e-2
#: Response tokens that `first_tokens` reads.
FIRST = 8
#: From there ε falls by this factor so many times: at the bottom losses are mostly rounding.
FACTOR, RUNGS = 4.0, 7


def worth_estimating(model: nn.Module, layout: ParameterLayout, rows: int | None) -> bool:
    """Whether `auto` estimates before it multiplies: many rows, and gradients of most of the model.

    Args:
        model: the model.
        layout: the selected parameters.
        rows: rows to be scored; None where that is not known.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    return rows is not None and rows >= ROWS and layout.numel >= SELECTED * every


def contrast(place: Place) -> Tensor:
    """The direction v (P,): −D(∇L_s − ∇L_c), or −D∇L_s without control data."""
    directions = place.directions
    return directions[:, 0] - directions[:, 1] if directions.shape[1] > 1 else directions[:, 0]


@contextmanager
def by_differences(
    model: nn.Module, layout: ParameterLayout, place: Place, loss_fn: LossFn, probe: Sequence[RowGroup]
) -> Generator[Estimate]:
    """Slopes along v by central differences; a narrow model is float32 inside.

    An AdamW direction is long where gradients are small, so losses bend early along it, while bulk rows
    have slopes near the rounding of their loss. ε is the one of a ladder at which slopes change least.

    Args:
        model: the model, inside `measuring`; stands anywhere, and is moved.
        layout: the selected parameters.
        place: the point.
        loss_fn: per-sample losses.
        probe: rows on which ε is set, best spread over the data.

    Raises:
        NumericsError: a loss is not finite; names the row.
    """
    narrow = any(is_narrow(parameter) for parameter in model.parameters())
    with in_float32(model) if narrow else nullcontext():
        parameters = parameters_of(model, layout)
        along, at = contrast(place), place.theta.to(torch.promote_types(place.theta.dtype, torch.float32))
        along = along.to(at.dtype)

        def losses(groups: Sequence[RowGroup], step: float) -> Tensor:
            put(parameters, list(layout.split(at + step * along).values()))
            return torch.cat([_losses(model, group, loss_fn) for group in groups])

        def slopes(step: float) -> Tensor:
            return (losses(probe, step) - losses(probe, -step)) / (2 * step)

        size = float(along.norm())
        step = _step(slopes, START * max(float(at.norm()), 1.0) / size if size else 1.0)

        def estimate(groups: Sequence[RowGroup]) -> Tensor:
            up, down = losses(groups, step), losses(groups, -step)
            _require_finite(groups, up + down)
            # The loss itself to O(ε²), from passes that are made anyway.
            return torch.stack([(up - down) / (2 * step), (up + down) / 2], dim=1)

        yield estimate


def _step(slopes: Callable[[float], Tensor], step: float) -> float:
    """ε at which slopes (B,) change least from one rung to the next, measured by the median row.

    Slopes beyond the numbers are those of a step that is too long.
    """
    for _ in range(ROUNDS):
        rise = 2 * step * float(slopes(step).square().mean().sqrt())
        # Beyond what the losses bear, or below their rounding, the ratio says nothing: no wild leaps.
        if not math.isfinite(rise):
            step *= 1e-2
        else:
            step *= min(max(RISE / rise, 1e-2), 1e2) if rise else 1e2
    best, least = step, math.inf
    before = slopes(step)
    for _ in range(RUNGS):
        step /= FACTOR
        now = slopes(step)
        known = now.isfinite()
        size = now.abs() + now[known].abs().median() if bool(known.any()) else now
        # Slopes that are all 0 do not change.
        changes = ((now - before).abs() / size)[known & (size > 0)]
        change = float(changes.median()) if len(changes) else (0.0 if bool(known.all()) else math.inf)
        if change < least:
            best, least = step, change
        before = now
    return best


def _losses(model: nn.Module, group: RowGroup, loss_fn: LossFn) -> Tensor:
    """(B,) losses of a group, finite or not."""
    batch = widened(move_batch(group.batch, next(model.parameters()).device))
    return batch_losses(model, batch, loss_fn)


def _require_finite(groups: Sequence[RowGroup], losses: Tensor) -> None:
    """Name the first row whose loss is not finite."""
    finite = losses.isfinite()
    if bool(finite.all()):
        return
    row = [row for group in groups for row in group.rows][int((~finite).to(torch.int64).argmax())]
    raise NumericsError(
        f"the loss of row {row} is not finite beside the point at which rows are scored",
        where=f"row {row} (counted from 0, in data order)",
        fix="check the row, load the model in float32 or float64, or set `screen.method: exact`, which takes "
        "no step away from the point",
    )


@contextmanager
def by_first_tokens(
    model: nn.Module,
    layout: ParameterLayout,
    place: Place,
    loss_fn: LossFn,
    engine: str,
    precision: torch.dtype | None = None,
) -> Generator[Estimate]:
    """⟨v, (1/S) Σ_{s ≤ 8} ∇(−log p(y_s))⟩ of a row of S response tokens; its loss is not known.

    A row is not read any further, so a long response costs no more than a short one. What a row does to
    refusals shows in how its answer begins; a row that does harm later on only is ranked too low.

    Args:
        model: the model, inside `measuring`; is moved to the point.
        layout: the selected parameters.
        place: the point.
        loss_fn: the mean loss per response token of a causal LM.
        engine: engine of the per-sample gradients.
        precision: autocast, as of `row_products`.

    Raises:
        ConfigError: another loss, whose tokens are not known.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    if loss_fn is not per_sample_nll:
        raise ConfigError(
            "the first tokens of a row cannot be told from the others: its loss is no causal LM's",
            where="screen.method: first_tokens",
            fix="use `exact` or `differences`",
        )
    parameters = parameters_of(model, layout)
    direction = beside(contrast(place)[:, None], parameters[0])

    def estimate(groups: Sequence[RowGroup]) -> Tensor:
        put(parameters, list(layout.split(place.theta).values()))
        made: list[Tensor] = []
        for group in groups:
            cut = RowGroup(group.rows, first_tokens(group.batch, FIRST))
            found = row_products(model, cut, loss_fn, layout, direction, engine=engine, precision=precision)
            share = trained_tokens(cut.batch) / trained_tokens(group.batch).clamp(min=1)
            made.append(torch.stack([found[:, 0] * share, torch.full_like(share, torch.nan)], dim=1))
        return torch.cat(made)

    yield estimate


@contextmanager
def by_sketches(
    model: nn.Module, layout: ParameterLayout, place: Place, loss_fn: LossFn, side: int, engine: str
) -> Generator[Estimate]:
    """Unbiased estimates ⟨L(G∘s)Rᵀ, L(V/s)Rᵀ⟩ from sketches whose sides are balanced for v.

    See `arisk.gradients.store` for L, R and s; V is v as a matrix, parameter by parameter.

    Args:
        model: the model, inside `measuring`; is moved to the point.
        layout: the selected parameters.
        place: the point.
        loss_fn: per-sample losses.
        side: entries kept of each side of a matrix.
        engine: engine of the per-sample gradients; only hooks has factors, which make a sketch cheap.

    Raises:
        NumericsError: a loss or gradient is not finite; names the row.
    """
    parameters = parameters_of(model, layout)
    like = parameters[0]
    sketch = Sketch(layout, side=side, dtype=like.dtype, device=like.device)
    direction = contrast(place)
    values = torch.empty(sketch.numel, dtype=like.dtype, device=like.device)
    for name in layout.names:
        where, plain = layout.slice_of(name), sketch.sides[name]
        own = direction[where].to(torch.float64).reshape(plain.rows, plain.columns)
        # 1/D is the root mean square of the optimizer's gradients, where it has one.
        ratio = own.abs() * place.metric[where].to(torch.float64).reshape(own.shape)
        sketch.sides[name], scale = balanced(plain, ratio) if bool(own.any()) else (plain, 1.0)
        values[sketch.places[name]] = sketch_of([(own / scale)[None].to(like)], plain)[0]

    def estimate(groups: Sequence[RowGroup]) -> Tensor:
        put(parameters, list(layout.split(place.theta).values()))
        made: list[Tensor] = []
        for group in groups:
            batch = move_batch(group.batch, like.device)
            try:
                losses, rows = per_sample_sketches(model, batch, loss_fn, layout, sketch, engine=engine)
            except NumericsError as err:
                raise with_row(err, group) from err
            found = (rows @ values).to("cpu", torch.float64)
            if not bool(found.isfinite().all()):
                raise overflowing(group, found.isfinite())
            made.append(torch.stack([found, losses.detach().to("cpu", torch.float64)], dim=1))
        return torch.cat(made)

    yield estimate


#: Rows of one file that a resumed run finds again.
SHARD_ROWS = 128
#: Rows on which the step of differences is set.
PROBED = 32


@dataclass(frozen=True)
class EstimateScene:
    """What an estimate of row scores is made from.

    Attributes:
        model: inside `measuring`; may be moved.
        layout: the selected parameters.
        place: the point of the planned run, with its directions.
        loss_fn: per-sample losses.
        probe: rows to set a step on, best spread over the data.
        side: entries that a sketch keeps of each side of a matrix.
        engine: engine of the per-sample gradients.
        precision: autocast of gradients.
    """

    model: nn.Module
    layout: ParameterLayout
    place: Place
    loss_fn: LossFn
    probe: Callable[[], Iterator[RowGroup]]
    side: int
    engine: str
    precision: torch.dtype | None = None


@dataclass(frozen=True)
class RowScore:
    """One way to estimate what a row's exact score would be, for less than its gradient.

    Attributes:
        made: from a scene to `estimate(groups)` → (rows, 2): score and loss.
        said: what rows are scored by, in words.
        forwards: forward passes of the model that a whole row takes; a backward pass counts as two.
    """

    made: Callable[[EstimateScene], AbstractContextManager[Estimate]]
    said: str
    forwards: float


def _differences(scene: EstimateScene) -> AbstractContextManager[Estimate]:
    return by_differences(scene.model, scene.layout, scene.place, scene.loss_fn, list(scene.probe()))


def _first_tokens(scene: EstimateScene) -> AbstractContextManager[Estimate]:
    return by_first_tokens(
        scene.model, scene.layout, scene.place, scene.loss_fn, scene.engine, scene.precision
    )


def _sketches(scene: EstimateScene) -> AbstractContextManager[Estimate]:
    return by_sketches(scene.model, scene.layout, scene.place, scene.loss_fn, scene.side, scene.engine)


#: Ways to rank rows before their scores are exact, by name.
ROW_SCORES: Table[RowScore] = Table(
    names.ROW_SCORES,
    {
        "differences": RowScore(_differences, "differences of their loss", 2),
        "first_tokens": RowScore(_first_tokens, f"the first {FIRST} tokens of their responses", 3),
        "sketch": RowScore(_sketches, "a sketch of their gradient", 3),
    },
)


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
        precision: autocast of exact products.
    """

    def __init__(
        self,
        task: Task,
        layout: ParameterLayout,
        found: Sequence[Place],
        engine: str,
        workspace: Path | None,
        progress: Progress,
        precision: torch.dtype | None = None,
    ) -> None:
        self.task, self.layout, self.found = task, layout, found
        self.engine, self.workspace, self.progress = engine, workspace, progress
        self.precision = precision
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
            directions = beside(place.directions, self.parameters[0])
            # Either both are there or none: they are multiplied with the same pieces.
            d = place.metric.to(directions.device) if metric else None

            def products(shard: Sequence[RowGroup]) -> Tensor:
                put(self.parameters, list(self.layout.split(place.theta).values()))
                run = partial(row_products, self.task.model, engine=self.engine, precision=self.precision)
                return torch.cat([run(g, samples.loss_fn, self.layout, directions, d) for g in shard])

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
            method: its name in `ROW_SCORES`.
            side: entries that a sketch keeps of each side of a matrix.
            size: rows per group.

        Returns:
            Tables (N, 2): score and loss.
        """
        model, layout, loss_fn = self.task.model, self.layout, samples.loss_fn

        def made(place: Place) -> AbstractContextManager[Estimate]:
            probe = partial(row_groups, samples, size, rows=_spread(samples), limit=PROBED)
            return ROW_SCORES[method].made(
                EstimateScene(model, layout, place, loss_fn, probe, side, self.engine, self.precision)
            )

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
        if path is None:
            return measure(shard)
        if not path.exists():
            write_tensors(path, {"products": measure(shard)})
        return read_tensors(path)["products"]


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
