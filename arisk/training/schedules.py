"""Learning rates of the planned run, one per optimizer step, by the conventions of `transformers.Trainer`.

One table, `SCHEDULES`: name → function of (i, span, **arguments). i = k − 1 counts the steps done before
step k, as the trainer's schedulers count them: step k of w warm-up steps has (k − 1)/w of the peak, so the
first step of a warm-up does not move. Schedules that follow measured losses are refused: they are no plan.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arisk.base.errors import ConfigError
from arisk.config import names
from arisk.config.names import Table

__all__ = ["SCHEDULES", "Span", "flow_times", "learning_rates", "schedule_named", "unit_rates"]


@dataclass(frozen=True)
class Span:
    """The run a schedule is stretched over: T steps, w of them warm-up, and the peak η."""

    steps: int
    warmup: int
    peak: float


#: (i, span, **arguments) → factors of the peak at i = 0 … T − 1, float64.
Schedule = Callable[..., Tensor]


def _warmed(i: Tensor, span: Span, after: Tensor) -> Tensor:
    """i/w during the warm-up, `after` from then on."""
    return torch.where(i < span.warmup, i / max(1, span.warmup), after)


def _progress(i: Tensor, span: Span) -> Tensor:
    """P = (i − w)/(T − w); negative during the warm-up."""
    return (i - span.warmup) / max(1, span.steps - span.warmup)


def constant(i: Tensor, span: Span) -> Tensor:
    """The peak from the first step on; a warm-up is ignored, as the trainer ignores it."""
    del span
    return torch.ones_like(i)


def constant_with_warmup(i: Tensor, span: Span) -> Tensor:
    """The peak after the warm-up."""
    return _warmed(i, span, torch.ones_like(i))


def linear(i: Tensor, span: Span) -> Tensor:
    """1 − p."""
    return _warmed(i, span, ((span.steps - i) / max(1, span.steps - span.warmup)).clamp(min=0))


def cosine(i: Tensor, span: Span, *, num_cycles: float = 0.5) -> Tensor:
    """(1 + cos 2πcp)/2 with c cycles; half of one falls to zero."""
    wave = 0.5 * (1 + torch.cos(math.pi * num_cycles * 2 * _progress(i, span)))
    return _warmed(i, span, wave.clamp(min=0))


def cosine_with_restarts(i: Tensor, span: Span, *, num_cycles: int = 1) -> Tensor:
    """(1 + cos π(cp mod 1))/2: c falls, each from the peak."""
    progress = _progress(i, span)
    wave = 0.5 * (1 + torch.cos(math.pi * ((num_cycles * progress) % 1.0)))
    return _warmed(i, span, torch.where(progress >= 1, 0.0, wave.clamp(min=0)))


def cosine_with_min_lr(
    i: Tensor,
    span: Span,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Tensor:
    """M + (1 − m)(1 + cos 2πcp)/2 with m the smallest share of the peak.

    Raises:
        ConfigError: neither or both of `min_lr` and `min_lr_rate`.
    """
    low = _least(span, min_lr, min_lr_rate)
    wave = 0.5 * (1 + torch.cos(math.pi * num_cycles * 2 * _progress(i, span)))
    return _warmed(i, span, (wave * (1 - low) + low).clamp(min=0))


def cosine_warmup_with_min_lr(
    i: Tensor,
    span: Span,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Tensor:
    """`cosine_with_min_lr`, one step ahead, whose warm-up starts at (i + 1)/w or at `warmup_lr_rate`.

    Raises:
        ConfigError: neither or both of `min_lr` and `min_lr_rate`.
    """
    low = _least(span, min_lr, min_lr_rate)
    if warmup_lr_rate is None:
        warm = (i + 1) / max(1, span.warmup)
    else:
        warm = warmup_lr_rate + (1 - warmup_lr_rate) * i / max(1, span.warmup - 1)
    progress = (i - span.warmup + 1) / max(1, span.steps - span.warmup)
    wave = 0.5 * (1 + torch.cos(math.pi * num_cycles * 2 * progress))
    return torch.where(i < span.warmup, warm, (wave * (1 - low) + low).clamp(min=0))


def polynomial(i: Tensor, span: Span, *, lr_end: float = 1e-7, power: float = 1.0) -> Tensor:
    """E + (1 − e)(1 − p)^power with e = lr_end/η.

    Raises:
        ConfigError: `lr_end` is not below the peak.
    """
    if not lr_end < span.peak:
        raise _wrong(f"`lr_end` ({lr_end:g}) is not below the peak {span.peak:g}", "give a smaller `lr_end`")
    left = (1 - _progress(i, span)).clamp(0, 1)
    return _warmed(i, span, ((span.peak - lr_end) * left**power + lr_end) / span.peak)


def inverse_sqrt(i: Tensor, span: Span, *, timescale: int | None = None) -> Tensor:
    """1/√((i + s − w)/s) with the time scale s, which is w where it is not given, 10 000 without warm-up."""
    scale = timescale or span.warmup or 10_000
    return _warmed(i, span, (((i + scale - span.warmup) / scale).clamp(min=1e-12)).rsqrt())


#: Rise over a warm-up and fall over a decay by progress p in [0, 1].
_RISES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1 - torch.cos(math.pi * p)),
    "1-sqrt": lambda p: 1 - torch.sqrt(1 - p),
}
_FALLS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda p, _: 1 - p,
    "cosine": lambda p, cycles: 0.5 * (1 + torch.cos(math.pi * cycles * 2 * p)),
    "1-sqrt": lambda p, _: 1 - torch.sqrt(p),
}


def warmup_stable_decay(
    i: Tensor,
    span: Span,
    *,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Tensor:
    """A warm-up from m, the peak, and a decay to m, with m = `min_lr_ratio`.

    Raises:
        ConfigError: no `num_decay_steps`, or a shape that is not known.
    """
    if num_decay_steps is None:
        raise _wrong("`warmup_stable_decay` needs `num_decay_steps`", "give the steps of its decay")
    for kind, shapes in ((warmup_type, _RISES), (decay_type, _FALLS)):
        if kind not in shapes:
            raise _wrong(f"the shape {kind!r} is not known", f"give one of {', '.join(shapes)}")
    stable = span.steps - span.warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    start = span.warmup + stable
    warm = _RISES[warmup_type]((i / max(1, span.warmup)).clamp(0, 1))
    fall = _FALLS[decay_type](((i - start) / max(1, num_decay_steps)).clamp(0, 1), num_cycles)
    factors = torch.where(i < start, 1.0, (fall * (1 - min_lr_ratio) + min_lr_ratio).clamp(min=0))
    factors = torch.where(i < start + num_decay_steps, factors, min_lr_ratio)
    return torch.where(i < span.warmup, (warm * (1 - min_lr_ratio) + min_lr_ratio).clamp(min=0), factors)


#: All schedules by the trainer's names. A further one is one more entry.
SCHEDULES: Table[Schedule] = Table(
    names.SCHEDULES,
    {
        "constant": constant,
        "constant_with_warmup": constant_with_warmup,
        "linear": linear,
        "cosine": cosine,
        "cosine_with_restarts": cosine_with_restarts,
        "cosine_with_min_lr": cosine_with_min_lr,
        "cosine_warmup_with_min_lr": cosine_warmup_with_min_lr,
        "polynomial": polynomial,
        "inverse_sqrt": inverse_sqrt,
        "warmup_stable_decay": warmup_stable_decay,
    },
)


def _least(span: Span, rate: float | None, share: float | None) -> float:
    if (rate is None) == (share is None):
        raise _wrong("this schedule needs `min_lr` or `min_lr_rate`", "give one of the two")
    return share if share is not None else float(rate or 0.0) / span.peak


def _wrong(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="training.schedule_args", fix=fix)


def schedule_named(name: str, arguments: Mapping[str, Any]) -> Schedule:
    """The schedule of a name, whose arguments are known to it.

    Raises:
        ConfigError: the name or an argument is not known.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"the schedule {name!r} is not known",
            where="training.schedule",
            fix=f"give one of {', '.join(SCHEDULES)}",
        )
    known = list(inspect.signature(SCHEDULES[name]).parameters)[2:]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise _wrong(f"the schedule {name!r} has no argument {unknown[0]!r}", f"leave it out: {takes}")
    return SCHEDULES[name]


def unit_rates(name: str, span: Span, arguments: Mapping[str, Any] | None = None) -> Tensor:
    """η_k/η for k = 1 … T.

    Args:
        name: a schedule of the table.
        span: steps, warm-up steps and peak.
        arguments: the schedule's own, as in `lr_scheduler_kwargs`.

    Returns:
        (T,) float64.

    Raises:
        ConfigError: the name or an argument is not known.
    """
    arguments = dict(arguments or {})
    i = torch.arange(span.steps, dtype=torch.float64)
    return schedule_named(name, arguments)(i, span, **arguments)


def learning_rates(
    learning_rate: float,
    steps: int,
    *,
    schedule: str = "constant",
    warmup_steps: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Tensor:
    """η_k for k = 1 … T: the peak times `unit_rates`.

    Args:
        learning_rate: peak η.
        steps: T, planned optimizer steps.
        schedule: a schedule of the table.
        warmup_steps: w; a warm-up longer than the run is cut by the run's end.
        arguments: the schedule's own.

    Returns:
        (T,) float64.

    Raises:
        ConfigError: the schedule or an argument is not known.
    """
    span = Span(steps, warmup_steps, learning_rate)
    return learning_rate * unit_rates(schedule, span, arguments)


def flow_times(rates: Tensor, *, momentum: float = 0.0) -> Tensor:
    """Flow time t_k = Σ_{i≤k} η_i (1 − μ^i)/(1 − μ), the displacement of unit gradients.

    Without momentum this is the running sum of the learning rates; with momentum μ it is what a
    constant unit gradient would have moved after k steps of torch's SGD.

    Args:
        rates: (T,) learning rates.
        momentum: μ in [0, 1).

    Returns:
        (T + 1,) float64, starting with 0.
    """
    rates = rates.to(torch.float64)
    if momentum:
        count = len(rates)
        # The buffer holds (1 − μ^i)/(1 − μ) after i unit gradients.
        steps = torch.arange(1, count + 1, dtype=torch.float64)
        rates = rates * (1 - momentum**steps) / (1 - momentum)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(rates, 0)])
