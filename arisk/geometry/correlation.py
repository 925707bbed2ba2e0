"""Rank correlation: whether one quantity rises with another, whatever the shape of the curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rank_correlation"]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's ρ in [−1, 1]: Pearson's correlation of ranks, equal values sharing their mean rank.

    NaN where there are fewer than two values, one is constant, or one is not finite.

    Args:
        first: (N,).
        second: (N,).
    """
    if len(first) < 2 or not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return math.nan
    ranks = [_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / scale if scale > 0 else math.nan


def _ranks(values: Tensor) -> Tensor:
    """(N,) float64 ranks from 0; equal values get the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts + 1) / 2)[place]
