"""Which scores leave a null behind: robust tail probabilities and a false discovery rate.

Rank correlation: whether one quantity rises with another, whatever the shape of the curve.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["discoveries", "positive_share", "rank_correlation", "tail_probabilities", "upper_tail_excess"]


def tail_probabilities(scores: Tensor, null: Tensor) -> Tensor:
    """p_j = P(T₃ > z_j), z_j = (s_j − median)/(1.4826 MAD) by the null: a robust, heavy-tailed fit.

    Few null scores cannot resolve the small probabilities that thousands of rows ask for, so the
    tail is that of Student's t with three degrees of freedom, heavier than what control rows showed
    on the tuning sets of the benchmark. In closed form,
    P(T₃ > z) = ½ − (arctan(z/√3) + (z/√3)/(1 + z²/3))/π.

    Args:
        scores: (N,).
        null: (M,) scores of harmless rows; may be `scores` themselves where most are harmless.

    Returns:
        (N,) float64 in [0, 1]; ones where the null has no spread and a score does not exceed it, and
        zeros where it does.
    """
    center = null.to(torch.float64).median()
    scale = 1.4826 * (null.to(torch.float64) - center).abs().median()
    away = scores.to(torch.float64) - center
    if float(scale) == 0:
        return (away <= 0).to(torch.float64)
    x = away / scale / math.sqrt(3)
    # Far out the difference cancels; there the tail is 2·3√3/(3π z³) = 2/(3π x³).
    exact = 0.5 - (torch.arctan(x) + x / (1 + x.square())) / math.pi
    return torch.where(x > 1e3, 2 / (3 * math.pi * x.clamp(min=1).pow(3)), exact).clamp(0, 1)


def discoveries(p_values: Tensor, rate: float) -> Tensor:
    """Positions rejected by Benjamini and Hochberg: the largest k with p_(k) ≤ k rate / N.

    Args:
        p_values: (N,).
        rate: accepted false discovery rate, in (0, 1).

    Returns:
        (k,) positions by rising p; empty where none.

    Source: Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995), 289.
    """
    order = torch.argsort(p_values, stable=True)
    count = len(p_values)
    limits = rate * torch.arange(1, count + 1, dtype=torch.float64) / count
    below = (p_values[order] <= limits).nonzero()
    return order[: int(below.max()) + 1] if len(below) else order[:0]


def upper_tail_excess(
    scores: Tensor, null: Tensor, *, share: float = 0.05, draws: int = 199, seed: int = 0
) -> float:
    """P-value that scores have no heavier upper tail than a null: means of the top shares, permuted.

    Both are centred by their medians, so that a shift of all scores is no tail. The statistic is the mean of
    the highest `share` of the scores less that of the null; values change sides at random for its null.

    Args:
        scores: (N,).
        null: (M,).
        share: of each side that is its tail; one value at least.
        draws: permutations; the smallest p-value is 1/(draws + 1).
        seed: of the permutations.

    Returns:
        In (0, 1]; 1 where no value differs.
    """
    sides = [values.to(torch.float64) - values.to(torch.float64).median() for values in (scores, null)]
    pooled, first = torch.cat(sides), len(scores)
    generator = torch.Generator().manual_seed(seed)

    def excess(values: Tensor) -> float:
        tops = [
            part.topk(max(1, round(share * len(part)))).values for part in values.split([first, len(null)])
        ]
        return float(tops[0].mean() - tops[1].mean())

    seen = excess(pooled)
    above = sum(
        excess(pooled[torch.randperm(len(pooled), generator=generator)]) >= seen for _ in range(draws)
    )
    return (1 + above) / (1 + draws)


def positive_share(scores: Tensor, chosen: Tensor) -> float:
    """Σ_chosen max(s, 0) / Σ max(s, 0), in [0, 1]; NaN where no score is positive."""
    positive = scores.clamp(min=0).to(torch.float64)
    total = float(positive.sum())
    return float(positive[chosen].sum()) / total if total > 0 else math.nan


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
