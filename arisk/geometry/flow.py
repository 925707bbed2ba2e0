"""Flow time without summing, and what is known along it.

Under gradient flow (or the preconditioned flow of AdamW) a run with other learning rates passes the
same positions at the same flow times, to first order in η. A curve measured once therefore answers
for every learning rate, length and schedule, up to the largest flow time that was measured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["quadratic_path", "read_at_flow"]

#: Numbers above this are as good as infinite and would spoil an interpolation.
LARGEST = 1e300
#: |λ τ| below which a direction is flat.
FLAT = 1e-8


def read_at_flow(times: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Curves known at some flow times, read at others; linear in the signed root of the change.

    Args:
        times: (M,) ascending flow times from 0.
        values: (K, M) curves there.
        wanted: (S,) flow times ≥ 0.

    Returns:
        (K, S) float64; NaN beyond the last known time (rounding apart): nothing is extrapolated.
    """
    root = values.to(torch.float64).clamp(-LARGEST, LARGEST)
    root = root.sign() * root.abs().sqrt()
    if len(times) == 1:
        read = root.expand(-1, len(wanted)).clone()
    else:
        right = torch.searchsorted(times, wanted).clamp(1, len(times) - 1)
        width = (times[right] - times[right - 1]).clamp(min=1e-300)
        share = ((wanted - times[right - 1]) / width).clamp(0, 1)
        read = root[:, right - 1] * (1 - share) + root[:, right] * share
    read = read * read.abs()
    read[:, wanted > times[-1] * (1 + 1e-9)] = math.nan
    return read


def quadratic_path(curvature: Tensor, beta: float, rates: Tensor, counts: Tensor) -> Tensor:
    """`krylov_path` without momentum in closed form, for groups of equal learning rates.

    In the eigenbasis of T (eigenvalues λ): z = −(b/λ)(1 − Π_j (1 − η_j λ)^{m_j}), and −b Σ m_j η_j
    where λ is 0. Exact for any rates with m_j = 1.

    Args:
        curvature: (J, J) T.
        beta: ‖D^½ g‖.
        rates: (S,) learning rate η_j of each group.
        counts: (S,) steps m_j of each group.

    Returns:
        (S + 1, J) float64 positions after each group, from 0; infinite where the recursion diverges.
    """
    eigenvalues, vectors = torch.linalg.eigh(curvature.to(torch.float64))
    start = beta * vectors[0]
    factors = (1 - rates[:, None] * eigenvalues[None]) ** counts.to(torch.float64)[:, None]
    left = torch.cat([torch.ones(1, len(eigenvalues), dtype=torch.float64), torch.cumprod(factors, 0)])
    flow = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(rates * counts, 0)])[:, None]
    flat = (eigenvalues.abs() * flow[-1]) < FLAT
    safe = torch.where(flat, torch.ones_like(eigenvalues), eigenvalues)
    z = torch.where(flat, -start * flow, -(start / safe) * (1 - left))
    return z @ vectors.T
