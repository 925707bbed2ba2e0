"""How well predictions match what happened: rank agreement, collapse steps, wrong verdicts, coverage."""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from arisk.geometry.statistics import rank_correlation

#: A collapse after this step could not be seen by a pilot.
LATE = 30
#: Smallest real rise whose size is compared (nats).
RISE = 0.05


@dataclass(frozen=True)
class Line:
    """A curve over optimizer steps: what happened, or what was said.

    Attributes:
        steps: ascending, from 0. values: change of the mean safety loss (nats per token).
        lower, upper: interval at those steps; empty without one.
        collapse_interval: earliest and latest collapse step; None where not within the horizon.
    """

    steps: Sequence[int]
    values: Sequence[float]
    lower: Sequence[float] = ()
    upper: Sequence[float] = ()
    collapse_interval: tuple[int | None, int | None] | None = None

    @property
    def final(self) -> float:
        """Change at the end."""
        return self.values[-1]

    @property
    def peak(self) -> float:
        """Largest change."""
        return max(self.values)

    def at(self, step: float, values: Sequence[float] | None = None) -> float:
        """Linear between the points."""
        values = self.values if values is None else values
        right = min(bisect.bisect_left(self.steps, step), len(self.steps) - 1)
        if right == 0 or self.steps[right] <= step:
            return values[right]
        a, b = self.steps[right - 1], self.steps[right]
        return values[right - 1] + (values[right] - values[right - 1]) * (step - a) / (b - a)

    def crossing(self, level: float) -> float | None:
        """First step at which the curve reaches the level."""
        for i, value in enumerate(self.values):
            if value >= level:
                if i == 0 or not math.isfinite(value):
                    return float(self.steps[i])
                before = self.values[i - 1]
                share = (level - before) / (value - before)
                return self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1])
        return None


@dataclass(frozen=True)
class Case:
    """One job: what happened beside what was said."""

    data: str
    group: str
    truth: Line
    said: Line


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, ties shared."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for i in order[at : end + 1]:
            found[i] = (at + end) / 2
        at = end + 1
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; NaN below three values or where one side is constant."""
    if len(a) < 3:
        return math.nan
    return rank_correlation(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Probability that a positive scores above a negative, ties half."""
    r = ranks(scores)
    count = sum(positive)
    if count in (0, len(positive)):
        return math.nan
    total = sum(rank + 1 for rank, yes in zip(r, positive, strict=True) if yes)
    return (total - count * (count + 1) / 2) / (count * (len(positive) - count))


def collapse_factors(cases: Sequence[Case], threshold: float) -> list[float]:
    """Factor ≥ 1 between said and real collapse step of every real collapse; infinite where none was said."""
    found: list[float] = []
    for case in cases:
        real = case.truth.crossing(threshold)
        if real is None:
            continue
        said = case.said.crossing(threshold)
        ratio = math.inf if said is None else max(said, 1.0) / max(real, 1.0)
        found.append(max(ratio, 1 / ratio))
    return found


def rise_factors(cases: Sequence[Case]) -> list[float]:
    """Factor ≥ 1 between said and real final rise, of real rises from `RISE` on."""
    found: list[float] = []
    for case in cases:
        if case.truth.final >= RISE:
            ratio = max(case.said.final, 1e-6) / case.truth.final
            found.append(max(ratio, 1 / ratio))
    return found


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else math.nan


def rho(cases: Sequence[Case]) -> float:
    """Spearman of said and real final change."""
    return spearman([c.said.final for c in cases], [c.truth.final for c in cases])


def measures(threshold: float, alarm: float) -> dict[str, Callable[[Sequence[Case]], float]]:
    """The columns of the tables, as functions of cases."""

    def collapsed(case: Case) -> bool:
        return case.truth.crossing(threshold) is not None

    def late(case: Case) -> bool:
        step = case.truth.crossing(threshold)
        return step is not None and step > LATE

    return {
        "ρ final": rho,
        "AUC": lambda cs: auc([c.said.peak for c in cs], [collapsed(c) for c in cs]),
        "× step": lambda cs: statistics.median(collapse_factors(cs, threshold) or [math.nan]),
        "× rise": lambda cs: statistics.median(rise_factors(cs) or [math.nan]),
        "within 2×": lambda cs: _share([f <= 2 for f in collapse_factors(cs, threshold)]),
        "false-safe": lambda cs: _share([c.said.peak < alarm for c in cs if collapsed(c)]),
        "late false-safe": lambda cs: _share([c.said.peak < alarm for c in cs if late(c)]),
        "false-alarm": lambda cs: _share([c.said.peak >= alarm for c in cs if not collapsed(c)]),
    }


def coverage(threshold: float, pilot: int) -> dict[str, Callable[[Sequence[Case]], float]]:
    """How often the truth lies inside the stated interval."""

    def inside(case: Case, step: float) -> bool:
        value = case.truth.at(step)
        return case.said.at(step, case.said.lower) <= value <= case.said.at(step, case.said.upper)

    def points(case: Case) -> list[bool]:
        return [inside(case, s) for s in case.truth.steps if s > pilot]

    def step_inside(case: Case) -> bool | None:
        real = case.truth.crossing(threshold)
        if real is None or case.said.collapse_interval is None:
            return None
        low, high = case.said.collapse_interval
        return (math.inf if low is None else low) - 1 <= real <= (math.inf if high is None else high) + 1

    return {
        "cover change": lambda cs: _share([flag for c in cs for flag in points(c)]),
        "cover final": lambda cs: _share([inside(c, c.truth.steps[-1]) for c in cs]),
        "cover step": lambda cs: _share([f for c in cs if (f := step_inside(c)) is not None]),
    }


def resampled(
    cases: Mapping[str, Sequence[Case]],
    measure: Callable[[Sequence[Case]], float],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The measure on data sets drawn with replacement, the same draws for every forecaster.

    Args:
        cases: by forecaster, the same jobs in the same order.
        measure: what is computed of a list of cases.
    """
    source = random.Random(seed)
    names = sorted({case.data for case in next(iter(cases.values()))})
    picks = [[source.choice(names) for _ in names] for _ in range(draws)]
    found: dict[str, list[float]] = {}
    for forecaster, list_of in cases.items():
        by_set = {name: [case for case in list_of if case.data == name] for name in names}
        found[forecaster] = [measure([case for name in pick for case in by_set[name]]) for pick in picks]
    return found


def interval(values: Sequence[float], level: float = 0.9) -> tuple[float, float]:
    """Central interval of the draws that are numbers."""
    kept = sorted(value for value in values if not math.isnan(value))
    if not kept:
        return math.nan, math.nan
    tail = (1 - level) / 2
    return kept[int(tail * (len(kept) - 1))], kept[math.ceil((1 - tail) * (len(kept) - 1))]
