"""Ranking rows by a sketch, and scoring exactly the head of that ranking, from which rows are flagged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from arisk.config import ScreenConfig
from arisk.geometry.correlation import rank_correlation
from arisk.screened import ScreenResult
from arisk.stages.screen_passes import Passes
from arisk.stages.screen_rows import row_groups
from arisk.task import SampleSet

__all__ = ["by_sketch"]

#: Rows spread evenly over the ranking that are scored exactly to tell what the sketch is worth.
CHECKED = 64
#: Rows of the head scored exactly at a time: this many at least, and this share of all.
HEAD, HEAD_SHARE = 256, 0.02
#: Rank correlation below which a reader is told that the sketch says little.
TELLING = 0.5


def by_sketch(
    passes: Passes,
    samples: SampleSet,
    config: ScreenConfig,
    limit: int | None,
    build: Callable[..., ScreenResult],
) -> ScreenResult:
    """Estimate every row, then score exactly from the top until a whole part of the head has no flag.

    Args:
        passes: passes over rows at the points.
        samples: the fine-tuning data.
        config: rows per pass, side of the sketch, how to flag.
        limit: rows read of a loader that cannot be regrouped.
        build: ``build(tables, exact=mask)``: record with flags among the rows of the mask.

    Returns:
        The record; `exact` tells which scores are, and `sketch_agreement` what the others are worth.

    Raises:
        InputError: every row would be flagged.
        NumericsError: a loss or gradient is not finite; names the row.
    """
    groups = row_groups(samples, config.batch_size, limit=limit)
    found = passes.estimated(samples, groups, "finetune rows by sketch", config.sketch_side)
    exact = torch.zeros(len(found.rows), dtype=torch.bool)
    estimated = build(found, exact=exact)
    order = estimated.order

    def rescored(rows: Sequence[int], name: str) -> ScreenResult:
        groups = row_groups(samples, config.batch_size, rows=rows, limit=limit)
        made = passes.exact(samples, groups, name)
        for table, new in zip(found.tables, made.tables, strict=True):
            table[made.rows] = new
        exact[made.rows] = True
        return build(found, exact=exact)

    checked = sorted({order[i * len(order) // CHECKED] for i in range(CHECKED)})
    record = rescored(checked, "finetune rows checked")
    agreement = rank_correlation(estimated.scores[checked], record.scores[checked])
    size, number = max(HEAD, round(HEAD_SHARE * len(order))), 0
    while part := [row for row in order if not exact[row]][:size]:
        record = rescored(part, f"finetune rows head {number:03d}")
        number += 1
        if not set(part) & set(record.flagged):
            break
    return replace(
        record,
        sketch_agreement=agreement,
        warnings=[*record.warnings, _said(exact, agreement, len(checked))],
    )


def _said(exact: Tensor, agreement: float, checked: int) -> str:
    """What a reader must know of the scores that are estimates."""
    told = (
        f"{int(exact.sum())} of {len(exact)} rows are scored exactly, the others by a sketch of their "
        f"gradient; only exact scores are flagged. On {checked} rows spread over the ranking the sketch's "
        f"order agrees with the exact one at ρ = {agreement:+.2f}."
    )
    if agreement < TELLING:
        told += " That is little, and harmful rows may lie further down: use `screen.method: exact`."
    return told
