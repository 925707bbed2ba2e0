"""Where on the planned run rows are scored, and the directions their gradients are held against there.

At the aligned point the mean safety gradient is that of a minimum: noise. A few real steps later, where the
planned run has just begun to raise the safety loss, it points away from what those steps did, and rows that
keep pushing stand out. Much later the rows that did it are learned and their gradients fade. So the plan is
followed until the safety loss has risen by a little.

Rows are met one by one: blocks of per-sample gradients are multiplied with the directions as the backward
pass makes them, and no N × P matrix is ever held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from arisk.anatomy.subspace import recomputed_side
from arisk.anatomy.update import first_batches, measure_update
from arisk.base.artifacts import read_tensors, write_tensors
from arisk.base.errors import InputError, NumericsError
from arisk.base.processes import barrier, from_first, is_first, share, summed
from arisk.base.task import Batch, LossFn, Progress, RowBatches, SampleSet, Task
from arisk.config.plan import ScreenConfig, TrainingConfig
from arisk.gradients import (
    ParameterLayout,
    batch_size,
    mean_gradient,
    move_batch,
    per_sample_parts,
    slice_batch,
)
from arisk.gradients.factors import Outer, Part, block_of, widened
from arisk.screening.record import ScreenPoint
from arisk.training.loop import PlannedRun, StepDone, follow, put
from arisk.training.panels import panel_of, sample_losses, spread
from arisk.training.recipe import Recipe

__all__ = [
    "COLUMNS",
    "EVERY",
    "Place",
    "RowGroup",
    "beside",
    "control_groups",
    "overflowing",
    "places",
    "precision_of",
    "row_groups",
    "row_products",
    "trained_tokens_of",
    "with_row",
]

#: Entries of a row's gradient multiplied at a time.
CHUNK = 1 << 15
#: The same of factors, per position: more positions pay for a larger product, that needs no cache.
PER_POSITION = 1 << 11


@dataclass(frozen=True)
class RowGroup:
    """Rows of one forward and backward pass: their numbers in data order, and their batch."""

    rows: Sequence[int]
    batch: Batch


def row_groups(
    samples: SampleSet, size: int, *, rows: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[RowGroup]:
    """Every row once, in groups of at most `size`.

    Rows that can be regrouped come in order of their length, so that little padding is wasted; any
    other loader is read once from its start, and its rows are numbered as they come.

    Args:
        samples: the data set.
        size: rows per group.
        rows: these rows only; default all.
        limit: stop after this many rows of a loader that cannot be regrouped; None reads to its end.

    Raises:
        InputError: the data set gives no row.
    """
    batches = samples.batches
    if isinstance(batches, RowBatches):
        lengths = [row.get("tokens", 0) for row in samples.rows] or [0] * batches.row_count
        wanted = sorted(range(batches.row_count) if rows is None else rows, key=lambda j: (lengths[j], j))
        for start in range(0, len(wanted), size):
            chosen = wanted[start : start + size]
            yield RowGroup(chosen, batches.of(chosen))
        return
    yield from _read_through(samples, size, None if rows is None else frozenset(rows), limit)


def _read_through(
    samples: SampleSet, size: int, rows: frozenset[int] | None, limit: int | None
) -> Iterator[RowGroup]:
    seen = 0
    for batch in samples.batches:
        count = batch_size(batch)
        if limit is not None:
            count = min(count, limit - seen)
        for start in range(0, count, size):
            stop = min(start + size, count)
            places = [i for i in range(start, stop) if rows is None or seen + i in rows]
            for first, last in _runs(places):
                yield RowGroup(list(range(seen + first, seen + last)), slice_batch(batch, first, last))
        seen += count
        if limit is not None and seen >= limit:
            return
    if seen == 0:
        raise InputError(
            "the data set gives no batch",
            where=f"data set {samples.name!r}",
            fix="give at least one row",
        )


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring places as (first, last + 1)."""
    for _, run in itertools.groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        members = [place for _, place in run]
        yield members[0], members[-1] + 1


def row_products(
    model: nn.Module,
    group: RowGroup,
    loss_fn: LossFn,
    layout: ParameterLayout,
    directions: Tensor,
    metric: Tensor | None = None,
    *,
    engine: str,
    by_module: bool = False,
    precision: torch.dtype | None = None,
) -> Tensor:
    """⟨v_m, g_j⟩ of every row with every direction, with the row's norms and loss.

    Args:
        model: the model, inside `measuring`.
        group: B rows.
        loss_fn: their loss.
        layout: the selected parameters.
        directions: (P, m); products are made on their device (see `beside`).
        metric: (P,) D of the optimizer, there too; None where the D-norm is not needed.
        engine: engine of the per-sample gradients.
        by_module: keep the products apart by module.
        precision: autocast of the passes; None computes in the weights' own. Products are float32 at least.

    Returns:
        (B, m + 3) float64: products, ‖g_j‖, √⟨g_j, D g_j⟩ (NaN without a metric) and ℓ_j (nats per
        response token); or (B, L, m) products by module.

    Raises:
        NumericsError: a loss or gradient is not finite; names the row.
    """
    size, width = len(group.rows), directions.shape[1]
    modules = len(layout.modules) if by_module else 1
    place = dict(zip(layout.names, layout.module_of_parameter, strict=True))
    device = directions.device
    products = torch.zeros(size, modules, width, dtype=torch.float64, device=device)
    squares = torch.zeros(size, 2, dtype=torch.float64, device=device)

    def sink(name: str, parts: Sequence[Part]) -> None:
        where = layout.slice_of(name)
        target = products[:, place[name] if by_module else 0]
        for first, piece in _pieces([widened(part) for part in parts]):
            part = piece.to(device)
            columns = slice(where.start + first, where.start + first + part.shape[1])
            target += (part @ directions[columns].to(part.dtype)).to(torch.float64)
            if not by_module:
                squares[:, 0] += torch.linalg.vector_norm(part, dim=1).to(torch.float64).square()
                if metric is not None:
                    squares[:, 1] += (part.square() @ metric[columns].to(part.dtype)).to(torch.float64)

    own = next(model.parameters()).device
    batch = move_batch(group.batch, own)
    try:
        with torch.autocast(own.type, dtype=precision, enabled=precision is not None):
            losses = per_sample_parts(model, batch, loss_fn, layout, sink, engine=engine)
    except NumericsError as err:
        raise with_row(err, group) from err
    products, squares = products.cpu(), squares.cpu()
    finite = products.isfinite().flatten(1).all(1) & squares.isfinite().all(1)
    if not bool(finite.all()):
        raise overflowing(group, finite)
    if by_module:
        return products
    if metric is None:
        squares[:, 1] = torch.nan
    loss = losses.detach().reshape(-1, 1).to("cpu", torch.float64)
    return torch.cat([products[:, 0], squares.sqrt(), loss], dim=1)


def _pieces(parts: Sequence[Part]) -> Iterator[tuple[int, Tensor]]:
    """A parameter's gradients a few columns at a time, with the number of the first: (B, columns).

    A product of factors is multiplied out piece by piece and read while it is still in the cache; the
    whole block would travel to memory and back once for every use.
    """
    if len(parts) == 1 and isinstance(parts[0], Outer):
        left, right = parts[0].left.transpose(1, 2), parts[0].right
        width = right.shape[2]
        step = max(1, PER_POSITION * right.shape[1] // width)
        for start in range(0, left.shape[1], step):
            piece = torch.bmm(left[:, start : start + step], right)
            yield start * width, piece.flatten(1)
        return
    whole = sum((block_of(part) for part in parts[1:]), block_of(parts[0])).flatten(1)
    for start in range(0, whole.shape[1], CHUNK):
        yield start, whole[:, start : start + CHUNK]


def precision_of(training: TrainingConfig) -> torch.dtype | None:
    """Autocast in which rows are scored: that of the plan in bfloat16; float16 needs a loss scale."""
    return torch.bfloat16 if training.precision == "bf16" else None


#: Share of the free memory of a device that directions may take there.
ROOM = 0.25


def beside(vectors: Tensor, parameter: Tensor) -> Tensor:
    """Vectors on the device of the gradients, where they are few enough; else as they are.

    Args:
        vectors: (P, …).
        parameter: one of the model's.
    """
    # Other devices know no float64, or are not asked what is free.
    if parameter.device.type != "cuda":
        return vectors.cpu()
    free = torch.cuda.mem_get_info(parameter.device)[0]
    return vectors.to(parameter.device) if vectors.nbytes <= ROOM * free else vectors


def overflowing(group: RowGroup, finite: Tensor) -> NumericsError:
    """Finite factors, whose product is beyond the numbers of their dtype; names the first such row.

    Args:
        group: B rows.
        finite: (B,) whether a row's products are finite.
    """
    row = group.rows[int((~finite).to(torch.int64).argmax())]
    return NumericsError(
        f"the gradient of row {row} overflows",
        where=f"row {row} (counted from 0, in data order)",
        fix="check the row, or load the model in float32 or float64",
    )


def with_row(err: NumericsError, group: RowGroup) -> NumericsError:
    """The same error, naming the row in the data instead of its place in the batch."""
    place = int("".join(filter(str.isdigit, err.where.partition("(")[0])) or 0)
    row = group.rows[min(place, len(group.rows) - 1)]
    return NumericsError(
        err.what.replace(f"sample {place}", f"row {row}"),
        where=f"row {row} (counted from 0, in data order)",
        fix=err.fix,
    )


#: The safety loss is measured every so many steps.
EVERY = 5
#: Directions of a place, in column order: −D ∇L_s, and −D ∇L_c where there is control data.
COLUMNS = ("safety", "control")


@dataclass(frozen=True)
class Place:
    """One point of the planned run with what rows are held against there.

    Attributes:
        point: step, rises and weight.
        theta: (P,) the selected parameters there.
        directions: (P, 1 or 2), see `COLUMNS`.
        metric: (P,) D.
    """

    point: ScreenPoint
    theta: Tensor
    directions: Tensor
    metric: Tensor


def control_groups(samples: SampleSet, config: ScreenConfig) -> list[RowGroup]:
    """Control rows that serve as the null: spread over the set, or the first ones of any other loader."""
    batches = samples.batches
    rows = None
    if isinstance(batches, RowBatches):
        rows = spread(batches.row_count, config.control_samples)
    return list(row_groups(samples, config.batch_size, rows=rows, limit=config.control_samples))


def trained_tokens_of(samples: SampleSet, groups: Iterable[RowGroup]) -> Tensor | None:
    """Trained tokens of rows in the order of their numbers, (N,) float64; the model is not asked.

    Args:
        samples: the fine-tuning data, by whose loss tokens are counted; None where it has none by tokens.
        groups: the rows, of any data set.
    """
    if samples.tokens is None:
        return None
    found = list[tuple[int, float]]()
    for group in groups:
        found += zip(group.rows, samples.tokens.counts(group.batch).tolist(), strict=True)
    return torch.tensor([count for _, count in sorted(found)], dtype=torch.float64)


class _PointWalk:
    """The planned run under way, with the losses at its start."""

    def __init__(
        self,
        task: Task,
        layout: ParameterLayout,
        config: ScreenConfig,
        recipe: Recipe,
        seed: int,
        engine: str,
        progress: Progress,
    ) -> None:
        self.task, self.layout, self.config, self.training = task, layout, config, recipe.training
        self.engine, self.progress = engine, progress
        self.run = PlannedRun(task, layout, recipe, seed)
        self.device = self.run.stream.device
        self.safety = panel_of(task.safety, None, self.device)
        self.control = control_groups(task.control, config) if task.control else []
        self.start = self._losses()
        if not torch.isfinite(torch.tensor(self.start[0])):
            raise NumericsError(
                "the safety loss of the aligned model is not finite",
                where="screen: step 0",
                fix="check the safety rows, or load the model in float32",
            )

    def _losses(self) -> tuple[float, float | None]:
        """Mean safety and control loss here."""
        with self.run.reading():
            safety = float(self.safety.losses(self.task.model).mean())
            if self.task.control is None:
                return safety, None
            batches = [move_batch(group.batch, self.device) for group in self.control]
            return safety, float(sample_losses(self.task.model, batches, self.task.control.loss_fn).mean())

    def until_risen(self) -> int:
        """Take real steps until the safety loss has risen; the number taken."""
        last = min(self.config.max_steps, self.run.recipe.horizon)

        def risen(done: StepDone) -> bool:
            self.progress("planned steps", done.number, last)
            if done.number % EVERY and done.number != last:
                return False
            with self.run.reading():
                safety = float(self.safety.losses(self.task.model).mean())
            return safety - self.start[0] >= self.config.rise

        self.progress("planned steps", 0, last)
        taken = follow(self.run, 1, last, [risen])
        self.progress("planned steps", taken, taken)
        return taken

    def place(self, step: int, weight: float) -> Place:
        """Directions at the present parameters."""
        task, layout = self.task, self.layout
        safety, control = self._losses()
        batches = first_batches(task.finetune, self.config.batches, self.device)
        update = measure_update(task, task.finetune, layout, self.training, batches, self.progress)
        d = update.preconditioner
        side = recomputed_side(task, layout, self.engine, self.config.batch_size)
        samples = len(self.safety)
        columns = [side.weighted_sum(torch.full((samples,), 1 / samples, dtype=torch.float64))]
        if task.control is not None:
            columns.append(self._control_gradient())
        point = ScreenPoint(
            step=step,
            safety_rise=safety - self.start[0],
            control_rise=None if control is None or self.start[1] is None else control - self.start[1],
            weight=weight,
        )
        theta = torch.cat([p.detach().reshape(-1) for p in self.run.parameters]).cpu()
        # Each direction lies in one piece of memory, as products with rows read it.
        directions = torch.stack([-d * column.to(d) for column in columns]).T
        return Place(point, theta, directions, d)

    def _control_gradient(self) -> Tensor:
        """∇L_c (P,), float64, over the control rows."""
        assert self.task.control is not None
        total = torch.zeros(self.layout.numel, dtype=torch.float64)
        for number in share(len(self.control)):
            group = self.control[number]
            batch = move_batch(group.batch, self.device)
            _, gradient = mean_gradient(self.task.model, batch, self.task.control.loss_fn, self.layout)
            total += gradient.to("cpu", torch.float64) * len(group.rows)
        return summed(total) / sum(len(group.rows) for group in self.control)


def places(
    task: Task,
    layout: ParameterLayout,
    config: ScreenConfig,
    recipe: Recipe,
    seed: int,
    start: Sequence[Tensor],
    *,
    engine: str,
    workspace: Path | None,
    progress: Progress,
) -> list[Place]:
    """The points at which rows are scored; the model is put back to θ*.

    Args:
        task: model and data, inside `measuring` and `keeping_parameters`.
        layout: the selected parameters.
        config: which points, how far to go.
        recipe: how the plan trains.
        seed: seeds dropout and noise of its steps.
        start: θ* by parameter.
        engine: engine of the per-sample gradients.
        workspace: finished points are kept there and found again.
        progress: told of steps taken.

    Raises:
        NumericsError: a loss or gradient is not finite.
    """
    wanted = 2 if config.points == "both" else 1
    if workspace and from_first((workspace / f"point-{wanted - 1}.safetensors").exists):
        return [_read(workspace / f"point-{i}.safetensors") for i in range(wanted)]
    walk = _PointWalk(task, layout, config, recipe, seed, engine, progress)
    found: list[Place] = []
    if config.points != "risen":
        found.append(walk.place(0, 1.0))
    if config.points != "start":
        step = walk.until_risen()
        rates = recipe.rates
        late = float(rates[step // 2 :].sum() / rates.sum()) if found else 1.0
        if found:
            found = [_weighed(found[0], 1 - late)]
        found.append(walk.place(step, late))
        put(walk.run.parameters, start)
    if workspace is None:
        return found
    files = [workspace / f"point-{i}.safetensors" for i in range(len(found))]
    for file, place in zip(files, found, strict=True):
        if is_first():
            _write(file, place)
    barrier()
    # As a run that was killed finds them.
    return [_read(file) for file in files]


def _weighed(place: Place, weight: float) -> Place:
    old = place.point
    point = ScreenPoint(old.step, old.safety_rise, old.control_rise, weight)
    return Place(point, place.theta, place.directions, place.metric)


def _write(path: Path, place: Place) -> None:
    point = place.point
    control = float("nan") if point.control_rise is None else point.control_rise
    numbers = torch.tensor([point.step, point.safety_rise, control, point.weight], dtype=torch.float64)
    parts = {"theta": place.theta, "directions": place.directions.T, "metric": place.metric, "point": numbers}
    write_tensors(path, parts)


def _read(path: Path) -> Place:
    held = read_tensors(path)
    step, safety, control, weight = held["point"].tolist()
    point = ScreenPoint(int(step), safety, None if math.isnan(control) else control, weight)
    return Place(point, held["theta"], held["directions"].T, held["metric"])
