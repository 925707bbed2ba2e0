"""A planned run followed along one straight direction, from losses measured on it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interpolate_rows", "ray_positions", "ray_speeds"]


def ray_speeds(times: Tensor, finetune_change: Tensor, *, slope: float) -> Tensor:
    """Speed in [0, 1] on each interval between measured points: clip(−ΔL_f/Δt / slope, 0, 1).

    Gradient flow along u slows down where the fine-tuning loss stops falling as fast as it did at
    the start, where its slope is −⟨g, D g⟩.

    Args:
        times: (M,) ascending, first 0.
        finetune_change: (M,) measured change of the fine-tuning loss (nats).
        slope: ⟨g, D g⟩ > 0.

    Returns:
        (M − 1,) float64; 0 where the loss is not finite.
    """
    slopes = torch.diff(finetune_change) / torch.diff(times)
    return torch.nan_to_num(-slopes / slope, nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)


def ray_positions(times: Tensor, finetune_change: Tensor, increments: Tensor, *, slope: float) -> Tensor:
    """x_k = x_{k−1} + Δt_k · speed(x_{k−1}), held at the last measured point.

    Args:
        times: (M,) flow times measured, first 0.
        finetune_change: (M,) measured change of the fine-tuning loss.
        increments: (T,) flow time of each planned step.
        slope: ⟨g, D g⟩ at the start.

    Returns:
        (T + 1,) float64 positions in flow time, ascending from 0.
    """
    speeds = ray_speeds(times, finetune_change, slope=slope).tolist()
    ends = times.tolist()
    position, interval, path = 0.0, 0, [0.0]
    for step in increments.tolist():
        left = step
        # A step may cross several measured intervals, each with its own speed.
        while left > 0 and interval < len(speeds) and speeds[interval] > 0:
            room = (ends[interval + 1] - position) / speeds[interval]
            used = min(left, room)
            position += used * speeds[interval]
            left -= used
            if used < room:
                break
            interval += 1
            position = ends[interval]
        path.append(position)
    return torch.tensor(path, dtype=torch.float64)


def interpolate_rows(times: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Piecewise linear interpolation of each row of `values` (N, M) at `positions` (K,) → (N, K)."""
    right = torch.searchsorted(times, positions, right=True).clamp(1, len(times) - 1)
    left = right - 1
    share = ((positions - times[left]) / (times[right] - times[left])).clamp(0, 1)
    return values[:, left] * (1 - share) + values[:, right] * share
