"""What if: whole runs at other learning rates and lengths, from what was measured for the plan.

To first order in η, training follows a flow: a run with learning rates η'_k passes at step k the
position that the plan passes at the same flow time, so ΔL_s(k) = combined(τ'_k) with τ'_k = Σ_{i≤k} η'_i
and the `combined` curve read as a function of τ. AdamW follows its preconditioned flow in the same way;
weight decay and clipping are part of the path. Momentum lengthens every flow time alike but for its lag
of the first steps, which counts: τ' = Σ η'_i (1 − μ^i)/(1 − μ).

What this does not know:

* Flow times beyond the rollout. They are not measured, and nothing is extrapolated. Only where the
  local model is trusted that far, and does not contradict the rollout, it fills the cell.
* Batch noise, which grows with η, and the stability limit. A smaller rate wanders less than the plan, so
  its cells err on the safe side; a larger one wanders more, and its cells are rather too low: above
  `ROUGH_FACTOR` times the planned rate they are marked rough.
* Whether a smaller learning rate survives where the plan diverges: not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from arisk.forecast.known import Known, curve_at_rate, local_run
from arisk.forecast.record import WhatIfCell, WhatIfGrid, WhatIfRow
from arisk.geometry.dynamics import interpolated_crossing

__all__ = ["what_if"]

#: Multiples of the planned learning rate and of the planned steps in the default grid.
RATE_GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
STEP_GRID = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
#: Multiple of the planned learning rate above which a cell is rough: batch noise, which the flow does
#: not carry, grows with the rate, and so does the risk of leaving the stable range.
ROUGH_FACTOR = 2.0
#: Longest run a step budget is looked for.
LONGEST = 10_000_000

BEYOND = "beyond the flow time that was measured"


def what_if(
    source: Known, *, rates: Sequence[float] | None = None, lengths: Sequence[int] | None = None
) -> WhatIfGrid:
    """The grid of learning rates × steps.

    Args:
        source: what is known.
        rates: peak learning rates; default multiples of the planned one.
        lengths: optimizer steps; default multiples of the planned number.
    """
    planned, steps = source.training.learning_rate, source.horizon
    rates = sorted(set(rates or [planned * factor for factor in RATE_GRID]))
    lengths = sorted(set(lengths or [max(1, round(steps * factor)) for factor in STEP_GRID]))
    return WhatIfGrid(
        planned_rate=planned,
        planned_steps=steps,
        threshold=source.config.collapse_threshold,
        alarm=source.config.alarm_fraction * source.config.collapse_threshold,
        steps=lengths,
        rows=[_row(source, rate, lengths) for rate in rates],
        notes=_notes(source),
    )


def _row(source: Known, rate: float, lengths: Sequence[int]) -> WhatIfRow:
    cells = [_cell(source, rate, steps) for steps in lengths]
    safe, at_least = _budget(source, rate, cells)
    return WhatIfRow(
        learning_rate=rate,
        factor=rate / source.training.learning_rate,
        cells=cells,
        at_plan=_cell(source, rate, source.horizon),
        safe_steps=safe,
        at_least=at_least,
        rough=rate / source.training.learning_rate > ROUGH_FACTOR or any(cell.rough for cell in cells),
    )


def _cell(source: Known, rate: float, steps: int) -> WhatIfCell:
    """One run, by the rollout where it reaches, else by the local model where that is trusted."""
    factor, threshold = rate / source.training.learning_rate, source.config.collapse_threshold
    rough = factor > ROUGH_FACTOR
    note = f"{factor:.3g} times the planned learning rate: rather too low" if rough else ""
    why = "the rollout was not run, and the local model is not trusted here"
    rolled = source.rolled
    if rolled is not None:
        at, values = curve_at_rate(rolled, source.training, rate, steps)
        found = _judged(at, values, threshold)
        if rolled.diverged and factor >= 1 and bool(torch.isnan(values[0, -1])):
            step = found.collapse_step or at[int(torch.isnan(values[0]).to(torch.int64).argmax())]
            return WhatIfCell(steps, "diverges", "rollout", rough, collapse_step=step, note=note)
        if found.state != "not_measured":
            return _marked(found, "rollout", rough, note)
        why = "the planned run diverged here; a smaller learning rate may not" if rolled.diverged else BEYOND
    if source.local is not None:
        found = _judged(*local_run(source, source.local, rate, steps), threshold)
        if found.state != "not_measured":
            frozen = "" if source.local.plain else "the optimizer's preconditioner frozen at the start"
            return _marked(found, "local", rough or not source.local.plain, note or frozen)
    return WhatIfCell(steps, "not_measured", "none", note=why)


def _judged(steps: Sequence[int], values: Tensor, threshold: float) -> WhatIfCell:
    """What median, lower and upper (3, M) say; NaN from where they are not known."""
    unknown = torch.isnan(values[0])
    count = int(unknown.to(torch.int64).argmax()) if bool(unknown.any()) else len(steps)
    median, total = values[0, :count], steps[-1]
    if count < 2:
        return WhatIfCell(total, "not_measured", "none")
    collapse = interpolated_crossing(list(steps[:count]), median, threshold)
    if bool(torch.isinf(median).any()):
        return WhatIfCell(total, "diverges", "none", collapse_step=collapse)
    if count < len(steps):
        state = "not_measured" if collapse is None else "collapses"
        return WhatIfCell(total, state, "none", collapse_step=collapse)
    return WhatIfCell(
        total,
        "measured",
        "none",
        change=float(values[0, -1]),
        lower=float(values[1, -1]),
        upper=float(values[2, -1]),
        peak=float(values[0].max()),
        peak_upper=float(values[2].max()),
        collapse_step=collapse,
    )


def _marked(cell: WhatIfCell, basis: Literal["rollout", "local"], rough: bool, note: str) -> WhatIfCell:
    return replace(cell, basis=basis, rough=rough, note=note)


def _budget(source: Known, rate: float, cells: Sequence[WhatIfCell]) -> tuple[int | None, bool]:
    """Longest run that stays below the threshold, and whether only the measurement ends it."""
    threshold = source.config.collapse_threshold

    def safe(steps: int) -> bool | None:
        return _cell(source, rate, steps).stays_below(threshold)

    low, high = 0, 0
    for cell in cells:
        if not cell.stays_below(threshold):
            high = cell.steps
            break
        low = cell.steps
    while not high:
        if low >= LONGEST:
            return low, True
        tried = max(1, 2 * low)
        low, high = (tried, 0) if safe(tried) else (low, tried)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if safe(middle) else (low, middle)
    at_least = safe(high) is None
    return (None if at_least and low == 0 else low), at_least


def _notes(source: Known) -> list[str]:
    """How the grid was filled, and how far."""
    notes: list[str] = []
    if source.rolled is None:
        notes.append("No rollout was measured: cells come from the local model, where it is trusted.")
    else:
        notes.append(
            "Cells read the combined rollout curve at their own flow time (sum of learning rates), "
            f"measured up to {float(source.rolled.times[-1]):.3g}."
        )
        if source.rolled.diverged:
            notes.append(
                "The planned run diverges there; so does every larger learning rate, while smaller ones are "
                "not measured beyond it."
            )
    if source.local is None:
        why = "was not probed" if source.rolled is None else "was not probed, or the rollout contradicts it"
        notes.append(f"The local model fills no cell: it {why}.")
    else:
        notes.append(f"The local model is trusted up to a flow time of {source.local.trusted:.3g}.")
    return notes
