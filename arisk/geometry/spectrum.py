"""Eigenpairs of the Fisher matrix F = GᵀG/N from the Gram matrix K = GGᵀ, and what they say.

F (P, P) and K/N (N, N) share their non-zero eigenvalues: K/N = U Λ Uᵀ. The basis vectors
b_j = Gᵀu_j/√(Nλ_j) are never formed here. All work is in float64: float32 eigenvalues of Gram
matrices go wrong silently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arisk.base.errors import NumericsError

__all__ = [
    "effective_rank",
    "eigenpairs",
    "heldout_energy",
    "randomized_eigenpairs",
    "rank_for_variance",
]

#: Eigenvalues below this share of the largest are rounding noise of (near) duplicate samples.
RELATIVE_FLOOR = 1e-10


def eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of K/N above the floor, descending.

    Args:
        gram: (N, N) symmetric positive semi-definite K = GGᵀ.

    Returns:
        eigenvalues (m,) float64 > 0 and dual vectors U (N, m) with orthonormal columns; m ≤ N
        counts the eigenvalues above 1e-10 of the largest.

    Raises:
        NumericsError: K has a non-finite entry, or is zero.
    """
    gram = gram.to(torch.float64)
    if not bool(torch.isfinite(gram).all()):
        raise NumericsError(
            "the safety Gram matrix has a NaN or infinite entry",
            where="subspace: gram",
            fix="re-run `arisk collect`; if it stays, load the model in float32",
        )
    values, vectors = torch.linalg.eigh((gram + gram.T) / (2 * gram.shape[0]))
    values, vectors = values.flip(0), vectors.flip(1)
    if float(values[0]) <= 0:
        raise NumericsError(
            "every safety gradient is zero, so there is no safety subspace",
            where="subspace: gram",
            fix="check that the loss depends on the selected parameters, that the responses are not "
            "empty, or use `collect.fisher: sampled` when the model already fits them perfectly",
        )
    keep = values > RELATIVE_FLOOR * values[0]
    return values[keep], vectors[:, keep]


def randomized_eigenpairs(
    gram: Tensor, rank: int, *, generator: torch.Generator, oversample: int = 8, iterations: int = 2
) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of K/N by a randomised range finder (Halko, Martinsson, Tropp 2011).

    Args:
        gram: (N, N) K = GGᵀ.
        rank: eigenpairs wanted; at most N.
        generator: source of the Gaussian test matrix.
        oversample: extra columns of the test matrix.
        iterations: power iterations with re-orthogonalisation.

    Returns:
        eigenvalues (m,) descending and dual vectors (N, m), m ≤ rank, above the floor.
    """
    n = gram.shape[0]
    k = gram.to(torch.float64) / n
    width = min(n, rank + oversample)
    test = torch.randn(n, width, dtype=torch.float64, generator=generator).to(k.device)
    basis = torch.linalg.qr(k @ test).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(k @ basis).Q
    values, small = eigenpairs(width * (basis.T @ k @ basis))
    return values[:rank], (basis @ small)[:, :rank]


def rank_for_variance(eigenvalues: Tensor, trace: float, target: float, max_rank: int) -> int:
    """Smallest k with Σ_{j≤k} λ_j ≥ target · tr F, at most `max_rank` and the number given.

    The share is of the whole trace, not of the retained sum: dividing by the retained sum calls
    41 % of the energy "90 %".

    Args:
        eigenvalues: descending λ_j.
        trace: tr F.
        target: share in (0, 1].
        max_rank: upper limit.

    Returns:
        k ≥ 1.
    """
    reached = torch.cumsum(eigenvalues, 0) >= target * trace * (1 - 1e-12)
    wanted = int(reached.to(torch.int64).argmax()) + 1 if bool(reached.any()) else len(eigenvalues)
    return max(1, min(wanted, max_rank, len(eigenvalues)))


def effective_rank(eigenvalues: Tensor) -> float:
    """exp(−Σ p_j ln p_j) with p = λ/Σλ (Roy and Vetterli 2007): 1 for one direction, m for m equal."""
    p = eigenvalues / eigenvalues.sum()
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def heldout_energy(gram: Tensor, rank: int, *, splits: int, generator: torch.Generator) -> Tensor:
    """Share of held-out gradient energy inside a subspace fitted on the other half of the samples.

    For halves A and B: Σ_{i∈B} ‖P_A G_i‖² / Σ_{i∈B} ‖G_i‖² with P_A the projector on the leading
    `rank` directions of A, from K alone: P_A G_i has coordinates K_iA u_j/√(|A| λ_j).

    Args:
        gram: (N, N) K = GGᵀ, N ≥ 4.
        rank: directions kept on A, at most |A|.
        splits: random half splits.
        generator: source of the splits.

    Returns:
        (splits,) float64 in [0, 1]; NaN where B has no energy.
    """
    n = gram.shape[0]
    gram = gram.to(torch.float64)
    shares = []
    for _ in range(splits):
        order = torch.randperm(n, generator=generator)
        a, b = order[: n // 2], order[n // 2 :]
        if not bool((gram[a, a] > 0).any()):
            shares.append(torch.tensor(float("nan"), dtype=torch.float64))
            continue
        values, vectors = eigenpairs(gram[a][:, a])
        values, vectors = values[:rank], vectors[:, :rank]
        inside = (gram[b][:, a] @ vectors) ** 2 / (len(a) * values)
        shares.append(inside.sum() / gram[b, b].sum())
    return torch.stack(shares)
