"""Rows that are measured along a run: chosen once, exact in number, spread over their set, none twice.

Sets come sorted by length, and data orders are endless, so the first batches of a set would be its shortest
rows, or some rows several times. Which rows are chosen depends on the set and the number alone, not on how
it is cut into batches. Rows of like length are measured together, as many as a budget of tokens allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError
from arisk.base.processes import gathered, share
from arisk.base.task import Batch, LossFn, RowBatches, SampleSet
from arisk.gradients import batch_size, map_tensors, move_batch, slice_batch
from arisk.models.losses import per_sample_nll
from arisk.models.openings import response_losses

__all__ = [
    "LEAD_SHARE",
    "Panel",
    "SplitPanel",
    "batch_losses",
    "filled",
    "panel_of",
    "panel_of_rows",
    "read_between",
    "sample_losses",
    "split_panel",
    "spread",
]

#: Tokens of the rows that are measured at once: without a graph they take less memory than a training step.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Panel:
    """Rows of one data set on a device.

    Attributes:
        name: of the data set.
        batches: the rows, in an order that is quick to measure.
        rows: their places in the data set, ascending.
        loss_fn: their loss.
        order: for each sample of the batches, which of `rows` it is.
    """

    name: str
    batches: Sequence[Batch]
    rows: Sequence[int]
    loss_fn: LossFn
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def losses(self, model: nn.Module) -> Tensor:
        """ℓ_i of every row in the order of `rows`, (N,) float64 (nats). Shared over ranks."""
        if self.loss_fn is per_sample_nll:
            return self.losses_and_openings(model, 1)[0]
        return self.in_order(sample_losses(model, self.batches, self.loss_fn))

    def losses_and_openings(self, model: nn.Module, first: int) -> tuple[Tensor, Tensor | None]:
        """ℓ_i of every row and the loss of its first tokens, from the same forward passes. No gradient.

        Args:
            model: in evaluation mode.
            first: k, tokens of an opening.

        Returns:
            Two (N,) float64 tensors (nats per token), shared over ranks; the second is None for a loss that
            is not the one over response tokens.
        """
        if self.loss_fn is not per_sample_nll:
            return self.losses(model), None
        parts = [_both(model, self.batches[number], first) for number in share(len(self.batches))]
        found = torch.cat(gathered(parts, len(self.batches)), 1)
        return self.in_order(found[0]), self.in_order(found[1])

    def in_order(self, values: Tensor) -> Tensor:
        """Values (N, …) of the batches' samples, one after the other, in the order of `rows`."""
        sorted_values = torch.empty_like(values)
        sorted_values[torch.tensor(self.order)] = values
        return sorted_values


def _both(model: nn.Module, batch: Batch, first: int) -> Tensor:
    with torch.no_grad():
        mean, opening = response_losses(model, batch, first)
    return torch.stack([mean, opening]).to("cpu", torch.float64)


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
    rows, batches = _chosen(samples, limit)
    return _panel(samples, rows, batches, device)


def panel_of_rows(samples: SampleSet, rows: Sequence[int], device: torch.device) -> Panel:
    """These rows of a set that can be regrouped, in this order.

    Raises:
        TypeError: the set cannot be regrouped.
    """
    if not isinstance(samples.batches, RowBatches):
        raise TypeError("rows can be named only where batches know them")
    return _panel(samples, rows, samples.batches, device)


def _chosen(samples: SampleSet, limit: int | None) -> tuple[list[int], RowBatches | list[Batch]]:
    """Places of the rows that are measured, and what they are cut from."""
    batches: Any = samples.batches
    if isinstance(batches, RowBatches):
        rows, source = spread(batches.row_count, limit), batches
    elif hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        source = [batches[i] for i in range(len(batches))]
        rows = spread(sum(batch_size(batch) for batch in source), limit)
    else:
        source = list(_first(batches, limit))
        rows = list(range(sum(batch_size(batch) for batch in source)))
    if not rows:
        raise InputError(
            "the data set gives no batch",
            where=f"data set {samples.name!r}",
            fix="give at least one row",
        )
    return rows, source


def _panel(
    samples: SampleSet, rows: Sequence[int], source: RowBatches | list[Batch], device: torch.device
) -> Panel:
    """These rows, ascending."""
    groups = [list(range(len(rows)))]
    if isinstance(source, RowBatches):
        groups = _by_length(source, rows)
        cut = [source.of([rows[i] for i in group]) for group in groups]
    else:
        cut = _of_list(source, rows)
    moved = [move_batch(batch, device) for batch in cut]
    return Panel(samples.name, moved, list(rows), samples.loss_fn, [i for group in groups for i in group])


@dataclass(frozen=True)
class SplitPanel:
    """Rows of one data set, a few of which lead: those alone are measured at most points of a run.

    Attributes:
        rows: places of all of them in the data set, ascending.
        lead: some of them, spread evenly; all where the others are too few to be worth it.
        rest: the others; None where all lead.
    """

    rows: Sequence[int]
    lead: Panel
    rest: Panel | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def places(self) -> list[int]:
        """Where the leading rows stand in `rows`."""
        known = {row: place for place, row in enumerate(self.rows)}
        return [known[row] for row in self.lead.rows]

    def leading(self, model: nn.Module, first: int) -> tuple[Tensor, Tensor | None]:
        """`Panel.losses_and_openings` of the leading rows in the place of each, NaN for the others."""
        return self._placed(self.lead, model, first)

    def others(self, model: nn.Module, first: int) -> tuple[Tensor, Tensor | None]:
        """The same for the rows that do not lead."""
        if self.rest is None:
            nothing = torch.full((len(self),), math.nan, dtype=torch.float64)
            return nothing, nothing if self.lead.loss_fn is per_sample_nll else None
        return self._placed(self.rest, model, first)

    def _placed(self, panel: Panel, model: nn.Module, first: int) -> tuple[Tensor, Tensor | None]:
        losses, openings = panel.losses_and_openings(model, first)
        known = {row: place for place, row in enumerate(self.rows)}
        at = torch.tensor([known[row] for row in panel.rows])

        def put(values: Tensor) -> Tensor:
            wide = torch.full((len(self),), math.nan, dtype=torch.float64)
            wide[at] = values
            return wide

        return put(losses), None if openings is None else put(openings)


#: Rows are split where at most this share of them would lead.
LEAD_SHARE = 0.5


def split_panel(samples: SampleSet, limit: int | None, lead: int, device: torch.device) -> SplitPanel:
    """The rows of a set that are measured, as of `panel_of`, and `lead` of them that are measured everywhere.

    Raises:
        InputError: the data set gives no row.
    """
    rows, source = _chosen(samples, limit)
    if lead >= LEAD_SHARE * len(rows):
        return SplitPanel(rows, _panel(samples, rows, source, device), None)
    leading = {rows[i] for i in spread(len(rows), lead)}
    parts = [[row for row in rows if (row in leading) == wanted] for wanted in (True, False)]
    first, rest = (_panel(samples, part, source, device) for part in parts)
    return SplitPanel(rows, first, rest)


def filled(
    values: Tensor, whole: Sequence[bool], lead: Sequence[int], steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Values of all rows from points where only the leading ones were measured: a control variate.

    Between two whole points a and b every row i has the straight line ℓ̂_i(t) through its own values. The
    leading rows tell how far the truth is from theirs, r_i = ℓ_i − ℓ̂_i, and their mean is added to the
    others: the mean over all rows is then the leading rows' mean, corrected by the difference full − leading
    interpolated between whole measurements. Its error is the sampling error of the mean of r alone.

    Args:
        values: (N, M), NaN where a row was not measured.
        whole: M times, whether every row was; true at the first point.
        lead: places of the n leading rows.
        steps: the points, ascending.

    Returns:
        (N, M) without gaps, and (M,) standard error of the mean over the rows: s(r) √(1/n − 1/N), 0 at whole
        points. After the last whole point lines are level.
    """
    count, error = len(values), torch.zeros(len(steps), dtype=torch.float64)
    known = [i for i, every in enumerate(whole) if every]
    complete = values.clone()
    leading = torch.zeros(count, dtype=torch.bool)
    leading[torch.tensor(lead)] = True
    for i, every in enumerate(whole):
        if every:
            continue
        a = max(j for j in known if j < i)
        b = next((j for j in known if j > i), a)
        share = (steps[i] - steps[a]) / (steps[b] - steps[a]) if b > a else 0.0
        line = torch.lerp(values[:, a], values[:, b], share)
        gone = values[leading, i] - line[leading]
        complete[~leading, i] = line[~leading] + gone.mean()
        if len(gone) > 1:
            error[i] = float(gone.std().nan_to_num()) * math.sqrt(1 / len(gone) - 1 / count)
    return complete, error


def read_between(at: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Rows (K, M) known at ascending `at` (M,), read at `wanted` (S,): straight lines, level outside."""
    if len(at) == 1:
        return values.expand(*values.shape[:-1], len(wanted)).clone()
    right = torch.searchsorted(at, wanted).clamp(1, len(at) - 1)
    # Points may coincide, where the learning rate is 0.
    apart = (at[right] - at[right - 1]).clamp(min=torch.finfo(at.dtype).tiny)
    share = ((wanted - at[right - 1]) / apart).clamp(0, 1)
    return values[..., right - 1] * (1 - share) + values[..., right] * share


def _by_length(batches: RowBatches, rows: Sequence[int]) -> list[list[int]]:
    """Indices of `rows` that are measured together: of like length, within `TOKENS_AT_ONCE` with padding.

    Rows that do not tell their length keep their order and the size of their batches.
    """
    every: Any = batches.of(rows) if rows else None
    if not isinstance(every, dict) or "attention_mask" not in every:
        return [list(range(len(rows)))[i : i + batches.size] for i in range(0, len(rows), batches.size)]
    lengths: list[int] = every["attention_mask"].sum(1).tolist()
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > TOKENS_AT_ONCE:
            groups.append([])
        groups[-1].append(i)
    return groups


def _of_list(batches: Sequence[Batch], rows: Sequence[int]) -> list[Batch]:
    """Rows of a list of batches, ascending; a batch that is wanted whole stays as it is."""
    sizes = [batch_size(batch) for batch in batches]
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
    return cut


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
