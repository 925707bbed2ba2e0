"""The what-if grid as plain records: whole runs at other learning rates and lengths.

No torch. A cell that was not measured is its own state, never 0 and never "safe".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["WhatIfCell", "WhatIfGrid", "WhatIfRow"]


@dataclass(frozen=True)
class WhatIfCell:
    """One whole run of `steps` optimizer steps at one peak learning rate.

    Attributes:
        steps: its optimizer steps, the schedule stretched to them.
        state: `measured`: known to its end; `collapses`: reaches the threshold where it is known, its
            end lies beyond; `diverges`; `not_measured`.
        basis: forecaster that filled it: `rollout` (the combined curve), `local`, or `none`.
        rough: far above the planned learning rate, and rather too low; or from the local model with
            the optimizer's preconditioner frozen. See `arisk.forecast.what_if`.
        change: ΔL_s at its end, lower and upper its interval (nats per response token); None where
            the end is not known.
        peak: largest ΔL_s on the way, peak_upper that of the upper interval; None as above.
        collapse_step: first step at or above the threshold; None = not within what is known.
        note: why it is rough or not known; empty where there is nothing to say.
    """

    steps: int
    state: Literal["measured", "collapses", "diverges", "not_measured"]
    basis: Literal["rollout", "local", "none"]
    rough: bool = False
    change: float | None = None
    lower: float | None = None
    upper: float | None = None
    peak: float | None = None
    peak_upper: float | None = None
    collapse_step: int | None = None
    note: str = ""

    def text(self, threshold: float) -> str:
        """The cell in a few characters: `~0.31!` is rough, ends at +0.31 nats/token and collapses.

        `!` alone collapses with its end not measured, `×` diverges, `?` is not measured.
        """
        if self.state == "not_measured":
            return "?"
        rough = "~" if self.rough else ""
        if self.change is None:
            return rough + ("×" if self.state == "diverges" else "!")
        digits = max(0, 1 - math.floor(math.log10(threshold)))
        # Adding 0 takes the sign off a zero that was rounded.
        rounded = round(self.change, digits) + 0.0
        shown = f"{rounded:.{digits}f}".replace("-", "−") if abs(rounded) < 1e3 else "> 1e3"
        return f"{rough}{shown}{'!' if self.collapse_step is not None else ''}"

    def stays_below(self, level: float) -> bool | None:
        """Whether the upper interval stays below a level (nats, ≤ threshold) all the way; None = unknown."""
        if self.state == "measured" and self.peak_upper is not None:
            return self.peak_upper < level
        return None if self.state == "not_measured" else False


@dataclass(frozen=True)
class WhatIfRow:
    """All lengths at one learning rate.

    Attributes:
        learning_rate: peak; factor: as a multiple of the planned one.
        cells: one per entry of the grid's `steps`.
        at_plan: the run of the planned number of steps.
        safe_steps: longest run whose upper interval stays below the threshold; None = not measured.
        at_least: the measured range ends before safety does: `safe_steps` is a lower limit.
        rough: the learning rate is far above the plan, or a cell is rough.
    """

    learning_rate: float
    factor: float
    cells: Sequence[WhatIfCell]
    at_plan: WhatIfCell
    safe_steps: int | None
    at_least: bool
    rough: bool = False

    def budget_text(self) -> str:
        """`safe_steps` in words; a measured range that ends first says so."""
        if self.safe_steps is None:
            return "not measured"
        return f"{'≥ ' if self.at_least else ''}{'~' if self.rough else ''}{self.safe_steps}"


@dataclass(frozen=True)
class WhatIfGrid:
    """Learning rates × steps.

    Attributes:
        planned_rate, planned_steps: the plan.
        threshold: rise that counts as collapse; alarm: level of concern below it (nats per token).
        steps: columns, ascending; rows: one per learning rate, ascending.
        notes: how it was filled, and how far.
    """

    planned_rate: float
    planned_steps: int
    threshold: float
    alarm: float
    steps: Sequence[int]
    rows: Sequence[WhatIfRow]
    notes: Sequence[str]

    def is_plan(self, row: WhatIfRow, steps: int) -> bool:
        """Whether a row and a length are the planned run."""
        return row.factor == 1.0 and steps == self.planned_steps

    def safest_rate(self) -> WhatIfRow | None:
        """Row of the largest learning rate whose planned number of steps stays below the alarm level."""
        below = [row for row in self.rows if row.at_plan.stays_below(self.alarm)]
        return max(below, key=lambda row: row.learning_rate, default=None)

    def rate_sentence(self) -> str:
        """`safest_rate` in words, with what was not measured above it."""
        best = self.safest_rate()
        level = f"below the alarm level (+{self.alarm:.2g} nats/token, upper interval)"
        unknown = [row for row in self.rows if row.at_plan.stays_below(self.alarm) is None]
        if best is None:
            known = len(self.rows) - len(unknown)
            if not known:
                return f"No learning rate of the grid was measured for {self.planned_steps} steps."
            return f"No learning rate measured for {self.planned_steps} steps stays {level}."
        above = [row for row in unknown if row.learning_rate > best.learning_rate]
        rest = f"; {above[0].learning_rate:.3g} and above were not measured" if above else ""
        return (
            f"{self.planned_steps} steps stay {level} up to a learning rate of {best.learning_rate:.3g} "
            f"({best.factor:.3g} × the plan){rest}."
        )
