"""Where a virtual run takes real steps and where it leaps: the segments of the rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from arisk.config.sections import RolloutConfig

__all__ = ["pilot_length", "planned_points", "rollout_cost", "segment_count", "segment_ends"]

#: Steps of the pilot at which losses are measured.
PILOT_POINTS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 45, 70, 100, 150, 200, 300, 500, 700, 1000)
#: Real steps taken at the start at most, and as a share of the run; shorter runs are real throughout.
PILOT_STEPS, PILOT_SHARE, ALL_REAL = 20, 0.2, 20
#: Segments of a 200-step run, more for every factor of ten, and the share of the run they may cost.
SEGMENTS, SEGMENTS_PER_DECADE, COST_SHARE = 8, 12, 0.38


def planned_points(horizon: int, config: RolloutConfig) -> tuple[int, list[int]]:
    """Real steps of the pilot, and the ends of all segments (the pilot's points among them)."""
    inner = config.batches_per_segment
    pilot = pilot_length(horizon, config.pilot_steps, inner)
    points = [p for p in PILOT_POINTS if p < pilot] + [pilot]
    count = config.segments or segment_count(horizon, pilot, inner)
    return pilot, points + segment_ends(pilot, horizon, count, inner)


def rollout_cost(horizon: int, config: RolloutConfig) -> tuple[int, int]:
    """Gradients of a rollout in optimizer steps, and its passes over safety and control samples.

    Every leap is checked by one gradient; rare rows, where there are any, cost one more per leap.
    """
    pilot, points = planned_points(horizon, config)
    gradients, done = pilot, pilot
    for end in points[points.index(pilot) + 1 :]:
        real = min(end - done, config.batches_per_segment)
        gradients += real + (config.speed_control and end - done > real)
        done = end
    return gradients, len(points) + 1


def pilot_length(horizon: int, wanted: int | None, inner: int) -> int:
    """Real steps at the start of a run of `horizon` steps.

    Args:
        horizon: planned optimizer steps T.
        wanted: a fixed number, None to choose: 20 where that is at most 20 % of the run, else that
            share, and the whole run when it is no longer than 20 steps.
        inner: real steps per segment, the least that gives a direction.
    """
    if wanted is not None:
        return min(horizon, max(wanted, inner))
    if horizon <= ALL_REAL:
        return horizon
    return max(inner, min(PILOT_STEPS, int(PILOT_SHARE * horizon)))


def segment_count(horizon: int, pilot: int, inner: int) -> int:
    """Leaps after the pilot: 8 for 200 steps, 12 more per factor of ten, within 38 % of the run's cost.

    A segment costs `inner` gradients and one more that checks its leap.
    """
    wanted = SEGMENTS + SEGMENTS_PER_DECADE * max(0.0, math.log10(horizon / 200))
    affordable = (COST_SHARE * horizon - pilot) / (inner + 1)
    return max(2, min(round(wanted), int(affordable)))


def segment_ends(start: int, horizon: int, count: int, inner: int) -> list[int]:
    """Last steps of `count` segments whose lengths grow geometrically from about `inner`.

    Where the rest of the run is no longer than `count` blocks of real steps, every segment is real.

    Args:
        start: steps done.
        horizon: T.
        count: segments wanted, ≥ 1.
        inner: real steps at the end of each segment.

    Returns:
        Ascending steps, the last of them T; empty when nothing is left.
    """
    rest = horizon - start
    if rest <= 0:
        return []
    if rest <= count * inner:
        return [min(horizon, start + inner * (i + 1)) for i in range(math.ceil(rest / inner))]
    ratio = _growth(rest / inner, count)
    ends, at = [], float(start)
    for i in range(1, count + 1):
        at += inner * ratio**i
        ends.append(round(at))
    ends[-1] = horizon
    return ends


def _growth(total: float, count: int) -> float:
    """R ≥ 1 with r + r² + … + r^count = total, by bisection."""
    low, high = 1.0, total
    for _ in range(80):
        middle = 0.5 * (low + high)
        if _sum(middle, count) < total:
            low = middle
        else:
            high = middle
    return high


def _sum(ratio: float, count: int) -> float:
    powers: Sequence[float] = [ratio**i for i in range(1, count + 1)]
    return sum(powers)
