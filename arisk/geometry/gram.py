"""Gram matrices of tall rows, accumulated in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COLUMNS", "gram"]

#: Columns multiplied at a time: float32 products of this width summed in float64 cost what float32
#: costs, with less than a hundredth of its error; at N = 128 a block of them stays in the cache.
COLUMNS = 4096
#: Fewest rows of a tile and most tiles a side: smaller ones save up to half of the multiplications and
#: run slower each.
TILE, TILES = 32, 8


def gram(rows: Tensor) -> Tensor:
    """K = G Gᵀ, float32 (or float64) products of column blocks summed in float64.

    Only tiles on and below the diagonal are multiplied, the rest is their mirror image.

    Args:
        rows: (N, p) G, any float dtype; half precision is widened to float32 first.

    Returns:
        (N, N) float64, symmetric, positive semi-definite up to rounding.
    """
    count = rows.shape[0]
    total = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    edges = range(0, max(count, 1), max(TILE, count // TILES))
    for start in range(0, rows.shape[1], COLUMNS):
        block = rows[:, start : start + COLUMNS]
        if block.dtype not in (torch.float32, torch.float64):
            block = block.float()
        for first in edges:
            stop = min(first + edges.step, count)
            total[first:stop, :stop] += block[first:stop] @ block[:stop].T
    return torch.tril(total) + torch.tril(total, -1).T
