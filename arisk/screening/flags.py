"""Which scored rows are flagged: those that leave the null behind, or a share as asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from arisk.base.errors import InputError
from arisk.config.plan import ScreenConfig
from arisk.geometry.statistics import discoveries, positive_share, tail_probabilities, upper_tail_excess
from arisk.screening.record import MEASURES, ScreenResult

__all__ = ["NULL_ROWS", "flagged_anew"]

#: Control rows from which they serve as the null.
NULL_ROWS = 16
#: Level of the test whether rows stand out at all, and of the null beyond which a row counts as above it.
STANDS_OUT = 0.05
#: Share of the rows above the null from which the whole set is to blame.
WHOLE_SET = 0.5
#: Share of the rows that control rows may flag alone. Of more flags more than this share must stand out among
#: the rows themselves: control rows of another kind flag the upper part of one cloud.
ALONE, AMONG_ROWS = 0.05, 1 / 3


def flagged_anew(record: ScreenResult, config: ScreenConfig) -> ScreenResult:
    """The same scores with flags by the present settings; what-if and files are left empty.

    Only rows that are scored exactly are flagged. Rule: p-values of the null's robust, heavy tail
    (`tail_probabilities`), Benjamini and Hochberg at `false_discovery`, and a positive score above every
    control row; or exactly a share `drop` by score. All of the rule is asked at mean length: a row does not
    stand out because it is long.

    Raises:
        InputError: no row would be kept.
    """
    scores, at_mean = record.scores, record.at_mean_length
    enough = record.null is not None and len(record.null) >= NULL_ROWS
    null = record.null if enough and record.null is not None else at_mean
    # An estimate is no evidence: in the rule its row counts as one that does not stand out.
    p_values = tail_probabilities(at_mean, null).masked_fill(~record.exact, 1.0)
    ceiling = float(null.max()) if enough else math.nan
    record = replace(
        record,
        ceiling=ceiling,
        excess=upper_tail_excess(at_mean, null) if enough else None,
        beyond=float((p_values <= STANDS_OUT).double().mean()) if enough else math.nan,
    )
    found = discoveries(p_values, config.false_discovery)
    found = found[at_mean[found] > max(0.0, ceiling if enough else 0.0)]
    unranked = _unranked(record, found, config) if config.score == "auto" and config.drop is None else None
    if config.drop is not None:
        count = min(len(scores), max(1, round(config.drop * len(scores))))
        chosen = torch.tensor([row for row in record.order if record.exact[row]][:count], dtype=torch.int64)
        rule = f"the {config.drop:.3g} of the rows with the highest scores, as asked for"
    else:
        chosen = found if record.rise_reached and not unranked else found[:0]
        chosen = chosen[torch.argsort(scores[chosen], descending=True, stable=True)]
        what = "scores" if record.lengths is None else "scores at mean length"
        rule = (
            f"{what} beyond the heavy tail of {'control rows' if enough else 'the rows themselves'} at a "
            f"false discovery rate of {config.false_discovery:g}"
            + (", and above every control row" if enough else "")
        )
    _require_kept(len(chosen), len(scores), config)
    # A share goes by score, of which the null's axis knows nothing.
    by_one_number = config.drop is None or record.lengths is None
    marked = set(chosen.tolist())
    return replace(
        record,
        p_values=p_values.masked_fill(~record.exact, math.nan),
        flagged=chosen.tolist(),
        rule=rule,
        threshold=float(at_mean[chosen].min()) if len(chosen) and by_one_number else math.nan,
        asked=config.drop is not None,
        null_source="control" if enough else "rows",
        unranked=unranked,
        share=positive_share(scores, chosen),
        examples=[
            {**row, "flagged": row["row"] in marked, "p_value": float(p_values[row["row"]])}
            for row in record.examples
        ],
        what_if={},
        files=[],
        files_missing=None,
    )


def _unranked(record: ScreenResult, found: Tensor, config: ScreenConfig) -> str | None:
    """Why no row is to blame though the run does harm; None where rows stand out, or there is no null."""
    # At the aligned model alone nobody has looked at what the run does.
    if not record.rise_reached or record.excess is None or record.points[-1].step == 0:
        return None
    whole, scores = "the whole set moves " + MEASURES[record.measure], record.at_mean_length
    among = tail_probabilities(scores, scores).masked_fill(~record.exact, 1.0)
    standing = int((scores[discoveries(among, config.false_discovery)] > 0).sum())
    one_cloud = standing <= AMONG_ROWS * len(found)
    if record.beyond > WHOLE_SET and one_cloud:
        return f"No rows to blame, {whole}: {record.beyond:.0%} of the rows score above what control rows do."
    if len(found) > ALONE * len(scores) and one_cloud:
        return (
            f"No rows to blame, {whole}: {len(found)} of {len(scores)} rows score above every control row, "
            f"but {standing} of them stand out among the rows themselves. Control rows are of another kind: "
            "give `control` rows like the harmless part of your data."
        )
    if not len(found) and record.excess > STANDS_OUT:
        p = f"{record.excess:.2g}"
        return f"No rows to blame, {whole}: the highest scores are no higher than control rows' (p = {p})."
    return None


def _require_kept(flagged: int, rows: int, config: ScreenConfig) -> None:
    if flagged < rows:
        return
    if config.drop is not None:
        raise InputError(
            f"a share of {config.drop:g} is all of the {rows} fine-tuning rows, so none would be kept",
            where="screen.drop",
            fix="ask for a smaller share, of more rows",
        )
    raise InputError(
        f"all {rows} fine-tuning rows are flagged, so none would be kept",
        where="screen",
        fix="this data as a whole pushes towards harm compared with `control`: choose other data, give "
        "control rows like the harmless part of it, or flag a share only with `--drop 5%`",
    )
