"""Plain forecasts to be beaten, made from the records of the runs themselves.

Those that look at k real steps use only points up to step k: a straight line through the points at
k/2 and k, in the sum of the learning rates, carried on to the end of the plan. What is not itself a
refusal rate is turned into one by a straight line fitted on the odd jobs of `SETTINGS_MODEL`. Never
on the job's own end. The second seed is no forecast: it is the ceiling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.real.score import (
    OPENING,
    QUARTER,
    Forecast,
    Forecasts,
    Truth,
    crossing,
    level_of,
    own_opening,
    still_refused,
)

GEOMETRY = Path(__file__).parent.parent / "truths" / "geometry.json"
#: Answers that "20 steps and 32 answers" reads.
ANSWERS = 32


def baselines(truths: Sequence[Truth]) -> dict[str, Forecasts]:
    """Every baseline's forecasts, by name."""
    made = {
        "nothing is lost": _each(truths, lambda t: _flat(t, t.start)),
        "mean of the odd jobs": _fitted(truths, lambda t: 1.0, 0.0),
        "lr × steps × ‖Dg‖": _fitted(truths, lambda t: math.log(_reach(t)), _steps_cost(5)),
        "initial loss": _fitted(truths, lambda t: float(np.mean(t.job["train"]["loss"][:5])), _steps_cost(5)),
        "overlap of the first update": _fitted(truths, _overlap, None),
        "the peer's formula": _fitted(truths, _peer, None),
        "20 real steps and 32 answers": _each(truths, lambda t: _answers(t, 20)),
    }
    for k in (20, 30):
        made[f"{k} real steps, line of own openings"] = _each(truths, lambda t, k=k: _openings(t, k))
        for name, read in (("opening loss", _opening_loss), ("safety loss", _safety_loss)):
            line = _lined(read, k)
            made[f"{k} real steps, line of {name}"] = _fitted(
                truths, line, _steps_cost(k), safety=_safety_line(k)
            )
    made["a second seed (the ceiling)"] = _second_seeds(truths)
    return made


def _each(truths: Sequence[Truth], forecast: Callable[[Truth], Forecast | None]) -> Forecasts:
    return {(t.model, t.number): said for t in truths if (said := forecast(t)) is not None}


def _flat(truth: Truth, refused: float) -> Forecast:
    return Forecast(refused, level=level_of(truth, refused), cpu_seconds=0.0)


def _steps_cost(k: int) -> Callable[[Truth], float]:
    """CPU seconds of k of the plan's steps."""
    return lambda truth: truth.cpu_seconds * k / truth.steps


def _fitted(
    truths: Sequence[Truth],
    value: Callable[[Truth], float | None],
    cost: float | Callable[[Truth], float] | None,
    safety: Callable[[Truth], float | None] = lambda _: None,
) -> Forecasts:
    """Share of the refusals that is lost = a + b × value, fitted on the odd jobs, within 0 and 1.

    A cost of None: it was measured on another machine than the truths.
    """
    known = [(v, t.lost / t.start) for t in truths if t.settings and t.start and (v := value(t)) is not None]
    if not known:
        return {}
    x, y = np.array(known).T
    slope = float(np.polyfit(x, y, 1)[0]) if len(known) > 2 and np.ptp(x) > 0 else 0.0
    offset = float(y.mean() - slope * x.mean())

    def forecast(truth: Truth) -> Forecast | None:
        if (at := value(truth)) is None:
            return None
        refused = truth.start * (1 - min(1.0, max(0.0, offset + slope * at)))
        seconds = cost(truth) if callable(cost) else cost
        level = level_of(truth, refused)
        return Forecast(refused, level=level, safety_rise=safety(truth), cpu_seconds=seconds)

    return _each(truths, forecast)


def learning_rates(job: dict[str, Any]) -> np.ndarray:
    """Sum of the learning rates of the first k steps, as a share of the peak; (steps + 1,), 0 first.

    Step k of w warm-up steps has (k − 1)/w of the peak, as the Trainer counts.
    """
    steps = int(job["steps"])
    warm = math.ceil(steps * job["warmup_ratio"])
    at = np.arange(steps)
    done = np.clip((at - warm) / max(1, steps - warm), 0, 1)
    falling = 1 - done if job["schedule"] == "linear" else (1 + np.cos(np.pi * done)) / 2
    return np.concatenate([[0.0], np.cumsum(np.where(at < warm, at / max(1, warm), falling))])


def _reach(truth: Truth) -> float:
    """Learning rates of the plan together, times the length of an AdamW move."""
    job = truth.job
    return float(job["job"]["learning_rate"] * learning_rates(job["job"])[-1] * job["train"]["adam_move"])


@cache
def _geometry() -> dict[tuple[str, str, str], dict[str, float]]:
    """Numbers of the aligned model by model, data set and mode, see `geometry.py`."""
    found = json.loads(GEOMETRY.read_text(encoding="utf-8"))["geometry"]
    return {(one["model"], one["source"], one["mode"]): one for one in found}


def _at_start(truth: Truth) -> dict[str, float] | None:
    return _geometry().get((truth.model, truth.source, truth.job["job"]["mode"]))


def _overlap(truth: Truth) -> float | None:
    found = _at_start(truth)
    return None if found is None else found["overlap"]


def _peer(truth: Truth) -> float | None:
    """½ λ max(½ γ t² − ε t, 0)², t the learning rates together: what the package alignment-risk forecasts."""
    found, job = _at_start(truth), truth.job["job"]
    if found is None:
        return None
    t = float(job["learning_rate"] * learning_rates(job)[-1])
    drift = max(0.5 * found["gamma"] * t**2 - found["epsilon"] * t, 0.0)
    return 0.5 * found["eigenvalue"] * drift**2


def _points(truth: Truth, last: int) -> dict[int, dict[str, Any]]:
    return {point["step"]: point for point in truth.job["points"] if point["step"] <= last}


def _line(truth: Truth, read: Callable[[dict[str, Any]], float], k: int) -> Callable[[float], float] | None:
    """Value at any step, from the points at k/2 and k; None where the plan ends before k."""
    points, position = _points(truth, k), learning_rates(truth.job["job"])
    if k not in points or k // 2 not in points or position[k] == position[k // 2]:
        return None
    early, late = read(points[k // 2]), read(points[k])
    slope = (late - early) / (position[k] - position[k // 2])
    return lambda step: late + slope * (np.interp(step, np.arange(len(position)), position) - position[k])


def _safety_loss(point: dict[str, Any]) -> float:
    return float(point["safety_nll"])


def _opening_loss(point: dict[str, Any]) -> float:
    return float(point["opening_nll"][OPENING])


def _lined(read: Callable[[dict[str, Any]], float], k: int) -> Callable[[Truth], float | None]:
    """Rise at the end of the plan, by the line."""

    def rise(truth: Truth) -> float | None:
        line = _line(truth, read, k)
        return None if line is None else line(truth.steps) - read(truth.job["points"][0])

    return rise


def _safety_line(k: int) -> Callable[[Truth], float | None]:
    return _lined(_safety_loss, k)


def _kept(truth: Truth) -> Callable[[dict[str, Any]], float]:
    """Share of the prompts refused at the start whose opening is still what the model says."""
    labels = truth.job["points"][0]["answers_harmful"]["labels"]

    def share(point: dict[str, Any]) -> float:
        kept = point["own_harmful"][OPENING]["prompts_kept"]
        refused = [bit == "1" for bit, label in zip(kept, labels, strict=True) if label == "r"]
        return sum(refused) / max(1, len(refused))

    return share


def _openings(truth: Truth, k: int) -> Forecast | None:
    read = _kept(truth)
    line = _line(truth, read, k)
    if line is None:
        return None
    known = [(step, read(point)) for step, point in _points(truth, k).items()]
    ahead = [(step, min(1.0, max(0.0, line(step)))) for step in range(k + 1, truth.steps + 1)]
    curve = [(step, truth.start * share) for step, share in [*known, *ahead]]
    opening = _lined(own_opening, k)(truth)
    return _along(truth, curve, _steps_cost(k)(truth), opening)


def _answers(truth: Truth, k: int) -> Forecast | None:
    """The refusal rate of 32 prompts falls on as it did from the start to step k."""
    points = _points(truth, k)
    if k not in points or "answers_harmful" not in points[k]:
        return None
    # Prompts stand file by file: at even distances all files are among them.
    start, now = (
        "".join(said[i * len(said) // ANSWERS] for i in range(ANSWERS))
        for said in (points[step]["answers_harmful"]["labels"] for step in (0, k))
    )
    first, last = still_refused(start, start), still_refused(start, now)
    position = learning_rates(truth.job["job"])
    slope = (last - first) / position[k]
    curve = [
        (step, min(1.0, max(0.0, first + slope * float(position[step])))) for step in range(truth.steps + 1)
    ]
    return _along(truth, curve, _steps_cost(k)(truth))


def _along(
    truth: Truth, curve: Sequence[tuple[float, float]], seconds: float, opening: float | None = None
) -> Forecast:
    refused, step = curve[-1][1], crossing(curve, (1 - QUARTER) * curve[0][1])
    return Forecast(refused, None, step, True, level_of(truth, refused), None, opening, seconds)


def _second_seeds(truths: Sequence[Truth]) -> Forecasts:
    """The other seed of the same job as if it were a forecast."""

    def plan(truth: Truth) -> tuple[Any, ...]:
        job = truth.job["job"]
        return truth.model, *(job[key] for key in sorted(job) if key not in {"number", "seed"})

    def other(truth: Truth) -> Forecast | None:
        twins = [t for t in truths if plan(t) == plan(truth) and t.seed != truth.seed]
        if not twins:
            return None
        twin = twins[0]
        return Forecast(
            twin.refused, None, twin.quarter_step, True, level_of(twin, twin.refused), twin.safety_rise,
            twin.opening_rise, twin.cpu_seconds,
        )  # fmt: skip

    return _each(truths, other)
