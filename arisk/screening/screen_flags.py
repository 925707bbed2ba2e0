"""Which of the scored rows are flagged: those that leave harmless rows behind, or a share as asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from arisk.base.errors import InputError
from arisk.config.plan import ScreenConfig
from arisk.geometry.statistics import discoveries, positive_share, tail_probabilities
from arisk.screening.record import ScreenResult

__all__ = ["NULL_ROWS", "flagged_anew"]

#: Control rows from which they serve as the null.
NULL_ROWS = 16


def flagged_anew(record: ScreenResult, config: ScreenConfig) -> ScreenResult:
    """The same scores with flags by the present settings; what-if and files are left empty.

    Only rows that are scored exactly are flagged. Rule: p-values of the null's robust, heavy tail
    (`tail_probabilities`), Benjamini and Hochberg at `false_discovery`, and a positive score above every
    control row; or exactly a share `drop`.

    Raises:
        InputError: no row would be kept.
    """
    scores = record.scores
    enough = record.null is not None and len(record.null) >= NULL_ROWS
    null = record.null if enough and record.null is not None else scores
    # An estimate is no evidence: in the rule its row counts as one that does not stand out.
    p_values = tail_probabilities(scores, null).masked_fill(~record.exact, 1.0)
    if config.drop is not None:
        count = min(len(scores), max(1, round(config.drop * len(scores))))
        chosen = torch.tensor([row for row in record.order if record.exact[row]][:count], dtype=torch.int64)
        rule = f"the {config.drop:.3g} of the rows with the highest scores, as asked for"
    else:
        found = discoveries(p_values, config.false_discovery) if record.rise_reached else torch.arange(0)
        ceiling = max(0.0, float(null.max())) if enough else 0.0
        chosen = found[scores[found] > ceiling]
        chosen = chosen[torch.argsort(scores[chosen], descending=True, stable=True)]
        rule = (
            f"scores beyond the heavy tail of {'control rows' if enough else 'the rows themselves'} at a "
            f"false discovery rate of {config.false_discovery:g}"
            + (", and above every control row" if enough else "")
        )
    _require_kept(len(chosen), len(scores), config)
    marked = set(chosen.tolist())
    return replace(
        record,
        p_values=p_values.masked_fill(~record.exact, math.nan),
        flagged=chosen.tolist(),
        rule=rule,
        threshold=float(scores[chosen].min()) if len(chosen) else math.nan,
        null_source="control" if enough else "rows",
        share=positive_share(scores, chosen),
        examples=[
            {**row, "flagged": row["row"] in marked, "p_value": float(p_values[row["row"]])}
            for row in record.examples
        ],
        what_if={},
        files=[],
        files_missing=None,
    )


def _require_kept(flagged: int, rows: int, config: ScreenConfig) -> None:
    if flagged < rows:
        return
    raise InputError(
        f"all {rows} fine-tuning rows are flagged, so none would be kept",
        where="screen" if config.drop is None else "screen.drop",
        fix="this data as a whole pushes towards harm compared with `control`: choose other data, give "
        "control rows like the harmless part of it, or flag a share only with `--drop 5%`",
    )
