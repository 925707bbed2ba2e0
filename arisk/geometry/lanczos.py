"""Lanczos tridiagonalisation with full re-orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.geometry.vectors import VectorStack

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

    basis: VectorStack
    projected: Tensor
    beta: float
    residual: float


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
    residual, scale, taken = 0.0, 0.0, 0
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
            residual = 0.0
            break
        if taken < most:
            projected[taken, j] = residual
            vector = image / residual
    square = projected[:taken, :taken]
    return Krylov(basis, (square + square.T) / 2, beta, residual)
