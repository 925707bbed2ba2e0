"""Rank correlation: whether one quantity rises with another, whatever the shape of the curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rank_correlation"]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's ρ in [−1, 1]: Pearson's correlation of ranks, equal values sharing their mean rank.

    NaN where there are fewer than two values, one side is constant, or a value is NaN; infinite values
    have a rank.

    Args:
        first: (N,).
        second: (N,).

    Source: Spearman, The proof and measurement of association between two things (1904).
    """
    if len(first) < 2 or bool(torch.isnan(first).any() or torch.isnan(second).any()):
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
