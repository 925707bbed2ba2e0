"""Spectra from products alone: the Fisher matrix by its Gram matrix, overlaps with it, Krylov spaces.

F = GᵀG/N (P, P) and K/N = GGᵀ/N (N, N) share their non-zero eigenvalues: K/N = U Λ Uᵀ. The basis vectors
b_j = Gᵀu_j/√(Nλ_j) are never formed here. All work is in float64: float32 eigenvalues of Gram matrices go
wrong silently. A direction v meets the subspace through its c-vector c = G v alone: ⟨b_j, v⟩ =
u_jᵀc/√(Nλ_j), ‖Pv‖² = Σ_j ⟨b_j, v⟩², vᵀFv = ‖c‖²/N (exact, without eigenvectors).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.base.errors import NumericsError
from arisk.geometry.vectors import VectorStack

__all__ = [
    "Krylov",
    "dual_coefficients",
    "effective_rank",
    "eigenpairs",
    "fisher_norm",
    "fisher_norm_in_subspace",
    "heldout_energy",
    "lanczos",
    "permutation_p_value",
    "projection_ratio",
    "random_overlap",
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


#: A new direction shorter than this many units of rounding, relative to the operator's scale, is
#: noise: the space is closed.
ROUNDING_UNITS = 16.0


@dataclass(frozen=True)
class Krylov:
    """Krylov space of a symmetric operator S and a start vector s.

    Attributes:
        basis: (P, J) orthonormal columns Q, s = beta q₁.
        projected: (J, J) float64 T = Qᵀ S Q, symmetrised.
        beta: ‖s‖.
    """

    basis: VectorStack
    projected: Tensor
    beta: float


def lanczos(
    operator: Callable[[Tensor], Tensor], start: Tensor, dimension: int, *, basis: VectorStack | None = None
) -> Krylov:
    """Orthonormal Q of span{s, Ss, …, S^{J−1}s} and T = QᵀSQ.

    T is taken as the full projection, not the three-term recurrence, so that an operator that is
    symmetric only up to noise (finite differences) still gives the best quadratic model on the
    space. S q_j lies in the span of q₁ … q_{j+1}, so its products with those are the whole column of
    T, and no image of the operator is kept.

    Args:
        operator: v (P,) → S v, symmetric.
        start: (P,) s, not zero.
        dimension: J wanted; fewer when the space closes earlier.
        basis: an empty stack for Q; default: one in memory.

    Returns:
        The Krylov space; J ≤ min(dimension, P).
    """
    most = min(dimension, start.numel())
    beta = float(start.to(torch.float64).norm())
    basis = VectorStack(start.numel(), start.dtype) if basis is None else basis
    vector = start / beta
    projected = torch.zeros(most, most, dtype=torch.float64)
    scale, taken = 0.0, 0
    for j in range(most):
        basis.append(vector)
        image = operator(vector)
        taken = j + 1
        scale = max(scale, float(image.norm()))
        precision = torch.finfo(image.dtype).eps
        # Two passes of classical Gram-Schmidt: one leaves rounding errors that grow with J.
        for _ in range(2):
            products = basis.dots(image)
            projected[:taken, j] += products
            image = image - basis.combine(products).to(image)
        residual = float(image.norm())
        if residual <= ROUNDING_UNITS * precision * max(scale, 1e-300):
            break
        if taken < most:
            projected[taken, j] = residual
            vector = image / residual
    square = projected[:taken, :taken]
    return Krylov(basis, (square + square.T) / 2, beta)
