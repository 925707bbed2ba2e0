"""Ranking rows by an estimate, and scoring exactly the head of that ranking, from which rows are flagged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from arisk.base.task import SampleSet
from arisk.config.plan import ScreenConfig
from arisk.geometry.correlation import rank_correlation
from arisk.screening.record import ScreenMethod, ScreenResult
from arisk.screening.rows import row_groups
from arisk.screening.screen_passes import Passes, RowTables

__all__ = ["CHECKED", "HEAD", "HEAD_SHARE", "Estimates", "by_estimates"]

#: Rows spread evenly over the ranking that are scored exactly to tell what the estimate is worth.
CHECKED = 64
#: Rows of the head scored exactly at a time: this many at least, and this share of all.
HEAD, HEAD_SHARE = 256, 0.02
#: Rank correlation below which a reader is told that the estimate says little.
TELLING = 0.5


@dataclass(frozen=True)
class Estimates:
    """Estimated scores (N,), and whether a row has exact products in their place, (N,) bool."""

    method: ScreenMethod
    scores: Tensor
    exact: Tensor


def by_estimates(
    passes: Passes,
    samples: SampleSet,
    config: ScreenConfig,
    limit: int | None,
    method: ScreenMethod,
    build: Callable[..., ScreenResult],
) -> ScreenResult:
    """Estimate every row, then score exactly from the top until a whole part of the head has no flag.

    Args:
        passes: passes over rows at the points.
        samples: the fine-tuning data.
        config: rows per pass, side of a sketch, how to flag.
        limit: rows read of a loader that cannot be regrouped.
        method: how to estimate.
        build: ``build(tables, estimates=…)``: the record, with flags among the rows that are exact.

    Returns:
        The record; `exact` tells which scores are, and `agreement` what the others are worth.

    Raises:
        InputError: every row would be flagged.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    groups = partial(row_groups, samples, config.batch_size, limit=limit)
    found = passes.estimated(samples, groups, method, side=config.sketch_side, size=config.batch_size)
    weights = [place.point.weight for place in passes.found]
    scores = torch.stack([w * table[:, 0] for w, table in zip(weights, found.tables, strict=True)]).sum(0)
    estimates = Estimates(method, scores, torch.zeros(len(scores), dtype=torch.bool))
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    width = passes.found[0].directions.shape[1]
    tables = [_unknown(table[:, 1], width) for table in found.tables]

    def rescored(rows: Sequence[int], name: str) -> ScreenResult:
        made = passes.exact(samples, partial(groups, rows=rows), name)
        for table, new in zip(tables, made.tables, strict=True):
            table[made.rows] = new
        estimates.exact[made.rows] = True
        return build(RowTables(found.rows, tables), estimates=estimates)

    checked = sorted({order[i * len(order) // CHECKED] for i in range(CHECKED)})
    record = rescored(checked, f"{samples.name} rows checked")
    agreement = rank_correlation(scores[checked], record.scores[checked])
    size, number = max(HEAD, round(HEAD_SHARE * len(order))), 0
    while part := [row for row in order if not estimates.exact[row]][:size]:
        record = rescored(part, f"{samples.name} rows head {number:03d}")
        number += 1
        if not set(part) & set(record.flagged):
            break
    said = _said(estimates, agreement, len(checked))
    return replace(record, agreement=agreement, warnings=[*record.warnings, said])


def _unknown(losses: Tensor, directions: int) -> Tensor:
    """(N, m + 3) products that are not known yet, beside losses that are."""
    table = torch.full((len(losses), directions + 3), torch.nan, dtype=torch.float64)
    table[:, -1] = losses
    return table


def _said(estimates: Estimates, agreement: float, checked: int) -> str:
    """What a reader must know of the scores that are estimates."""
    how = {"differences": "differences of their loss", "sketch": "a sketch of their gradient"}
    told = (
        f"{int(estimates.exact.sum())} of {len(estimates.exact)} rows are scored exactly, the others by "
        f"{how[estimates.method]}; only exact scores are flagged."
    )
    if bool(estimates.exact.all()):
        told = f"Ranked by {how[estimates.method]} first; in the end every row is scored exactly."
    told += (
        f" On {checked} rows spread over the ranking the order of the estimates agrees with the exact one at "
        f"ρ = {agreement:+.2f}."
    )
    if agreement < TELLING:
        told += " That is little, and harmful rows may lie further down: use `screen.method: exact`."
    return told
