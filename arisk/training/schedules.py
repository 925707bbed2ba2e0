"""Learning rates of the planned run, one per optimizer step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["flow_times", "learning_rates", "unit_rates"]


def learning_rates(
    learning_rate: float,
    steps: int,
    *,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    warmup_steps: int = 0,
) -> Tensor:
    """η_k for k = 1 … T: linear warm-up to the peak η, then the decay.

    η_k = η k/w for k ≤ w. Afterwards, with p = (k − 1 − w)/(T − w): η (constant), η(1 − p)
    (linear), or η(1 + cos πp)/2 (cosine). Step k is the k-th update, so step 1 already moves.

    Args:
        learning_rate: peak η.
        steps: T, planned optimizer steps.
        schedule: decay after the warm-up.
        warmup_steps: w; a warm-up longer than the run is cut by the run's end.

    Returns:
        (T,) float64, each in [0, η].
    """
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    return learning_rate * unit_rates(k, steps, schedule=schedule, warmup_steps=warmup_steps)


def unit_rates(
    k: Tensor,
    steps: int,
    *,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    warmup_steps: int = 0,
) -> Tensor:
    """η_k/η of `learning_rates` at any step numbers k ≥ 1 of a run of `steps` steps; float64 in [0, 1]."""
    progress = ((k - 1 - warmup_steps) / max(steps - warmup_steps, 1)).clamp(0, 1)
    decay = {
        "constant": torch.ones_like(k),
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + torch.cos(math.pi * progress)),
    }[schedule]
    warm = (k / warmup_steps).clamp(max=1) if warmup_steps else torch.ones_like(k)
    return torch.where(k <= warmup_steps, warm, decay)


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
    velocity, position = 0.0, 0.0
    times = [0.0]
    for rate in rates.tolist():
        velocity = momentum * velocity + 1.0
        position += rate * velocity
        times.append(position)
    return torch.tensor(times, dtype=torch.float64)
