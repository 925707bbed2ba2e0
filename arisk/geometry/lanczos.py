"""Lanczos tridiagonalisation with full re-orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Krylov", "lanczos"]

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
        residual: norm of the part of S q_J outside the basis; 0 when the space is closed under S.
    """

    basis: Tensor
    projected: Tensor
    beta: float
    residual: float


def lanczos(operator: Callable[[Tensor], Tensor], start: Tensor, dimension: int) -> Krylov:
    """Orthonormal Q of span{s, Ss, …, S^{J−1}s} and T = QᵀSQ.

    T is taken as the full projection, not the three-term recurrence, so that an operator that is
    symmetric only up to noise (finite differences) still gives the best quadratic model on the
    space.

    Args:
        operator: v (P,) → S v, symmetric.
        start: (P,) s, not zero.
        dimension: J wanted; fewer when the space closes earlier.

    Returns:
        The Krylov space; J ≤ min(dimension, P).
    """
    beta = float(start.to(torch.float64).norm())
    vectors = [start / beta]
    images: list[Tensor] = []
    residual, scale = 0.0, 0.0
    for j in range(min(dimension, start.numel())):
        image = operator(vectors[j])
        images.append(image)
        scale = max(scale, float(image.norm()))
        residual_vector = _orthogonalise(image, vectors)
        residual = float(residual_vector.norm())
        if residual <= ROUNDING_UNITS * torch.finfo(image.dtype).eps * max(scale, 1e-300):
            residual = 0.0
            break
        if j + 1 < min(dimension, start.numel()):
            vectors.append(residual_vector / residual)
    basis = torch.stack(vectors[: len(images)], dim=1)
    projected = (basis.T @ torch.stack(images, dim=1)).to(torch.float64)
    return Krylov(basis, (projected + projected.T) / 2, beta, residual)


def _orthogonalise(vector: Tensor, against: list[Tensor]) -> Tensor:
    """Two passes of classical Gram-Schmidt: one leaves rounding errors that grow with J."""
    basis = torch.stack(against, dim=1)
    for _ in range(2):
        vector = vector - basis @ (basis.T @ vector)
    return vector
