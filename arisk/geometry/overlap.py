"""What a direction v has to do with the safety subspace, from its c-vector c = G v alone.

⟨b_j, v⟩ = u_jᵀc/√(Nλ_j) · ‖Pv‖² = Σ_j ⟨b_j, v⟩² · vᵀFv = ‖c‖²/N (exact, without eigenvectors).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "dual_coefficients",
    "fisher_norm",
    "fisher_norm_in_subspace",
    "permutation_p_value",
    "projection_ratio",
    "random_overlap",
]


def dual_coefficients(c: Tensor, eigenvalues: Tensor, dual_vectors: Tensor) -> Tensor:
    """Coordinates ⟨b_j, v⟩ = u_jᵀ(G v)/√(Nλ_j) of a direction in the safety basis.

    Args:
        c: (N,) or (N, m) c-vectors G v.
        eigenvalues: (k,) λ_j > 0.
        dual_vectors: (N, k) orthonormal columns u_j.

    Returns:
        (k,) or (k, m), in the unit of v.
    """
    scale = torch.sqrt(dual_vectors.shape[0] * eigenvalues)
    coefficients = dual_vectors.T @ c.to(torch.float64)
    return coefficients / (scale if c.ndim == 1 else scale[:, None])


def projection_ratio(coefficients: Tensor, norm: float) -> float:
    """‖Pv‖/‖v‖ in [0, 1], from the coordinates of v in an orthonormal basis; NaN when v = 0."""
    if norm <= 0:
        return math.nan
    # Rounding may push the ratio of a vector inside the subspace past 1 by parts in 1e-7 (float32).
    return min(float(coefficients.norm()) / norm, 1.0)


def fisher_norm_in_subspace(coefficients: Tensor, eigenvalues: Tensor) -> float:
    """‖F^½ P v‖ = √(Σ_j λ_j ⟨b_j, v⟩²) ≥ 0."""
    return float(torch.sqrt((eigenvalues * coefficients**2).sum()))


def fisher_norm(c: Tensor) -> float:
    """‖F^½ v‖ = ‖G v‖/√N ≥ 0, over the whole Fisher matrix."""
    return float(c.to(torch.float64).norm() / math.sqrt(len(c)))


def random_overlap(rank: int, dimension: int) -> float:
    """√(k/P): root mean square overlap of a random direction with k of P dimensions, in [0, 1]."""
    return math.sqrt(min(rank / dimension, 1.0))


def permutation_p_value(observed: float, permuted: Tensor) -> float | None:
    """(1 + #{permuted ≥ observed})/(1 + n) in (0, 1]; None without permutations.

    Source: Phipson and Smyth 2010 (a permutation p-value is never 0).
    """
    if permuted.numel() == 0:
        return None
    return (1 + int((permuted >= observed).sum())) / (1 + permuted.numel())
