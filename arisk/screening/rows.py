"""The rows of a data set one by one, and the products of their gradients with a few directions.

No N × P matrix is ever held: blocks of per-sample gradients are multiplied with the directions as
the backward pass makes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError, NumericsError
from arisk.base.task import Batch, LossFn, RowBatches, SampleSet
from arisk.gradients import ParameterLayout, batch_size, move_batch, per_sample_parts, slice_batch
from arisk.gradients.factors import Outer, Part, block_of

__all__ = ["RowGroup", "overflowing", "row_groups", "row_products", "with_row"]

#: Entries of a row's gradient multiplied at a time.
COLUMNS = 1 << 15
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
) -> Tensor:
    """⟨v_m, g_j⟩ of every row with every direction, with the row's norms and loss.

    Args:
        model: the model, inside `measuring`.
        group: B rows.
        loss_fn: their loss.
        layout: the selected parameters.
        directions: (P, m).
        metric: (P,) D of the optimizer; None where the D-norm is not needed.
        engine: engine of the per-sample gradients.
        by_module: keep the products apart by module.

    Returns:
        (B, m + 3) float64: products, ‖g_j‖, √⟨g_j, D g_j⟩ (NaN without a metric) and ℓ_j (nats per
        response token); or (B, L, m) products by module.

    Raises:
        NumericsError: a loss or gradient is not finite; names the row.
    """
    size, width = len(group.rows), directions.shape[1]
    modules = len(layout.modules) if by_module else 1
    place = dict(zip(layout.names, layout.module_of_parameter, strict=True))
    products = torch.zeros(size, modules, width, dtype=torch.float64)
    squares = torch.zeros(size, 2, dtype=torch.float64)

    def sink(name: str, parts: Sequence[Part]) -> None:
        where = layout.slice_of(name)
        target = products[:, place[name] if by_module else 0]
        for first, part in _pieces(parts):
            columns = slice(where.start + first, where.start + first + part.shape[1])
            target += (part @ directions[columns].to(part.dtype)).to(torch.float64)
            if not by_module:
                squares[:, 0] += torch.linalg.vector_norm(part, dim=1).to(torch.float64).square()
                if metric is not None:
                    squares[:, 1] += (part.square() @ metric[columns].to(part.dtype)).to(torch.float64)

    batch = move_batch(group.batch, next(model.parameters()).device)
    try:
        losses = per_sample_parts(model, batch, loss_fn, layout, sink, engine=engine)
    except NumericsError as err:
        raise with_row(err, group) from err
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
            yield start * width, piece.flatten(1).cpu()
        return
    whole = sum((block_of(part) for part in parts[1:]), block_of(parts[0])).flatten(1).cpu()
    for start in range(0, whole.shape[1], COLUMNS):
        yield start, whole[:, start : start + COLUMNS]


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
