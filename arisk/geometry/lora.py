"""Adapter gradients in ΔW space: orthonormal coordinates of the tangent space of ΔW = s B A.

A fresh adapter has B = 0, so ∇_A is exactly zero and lengths and angles in raw (A, B) coordinates
depend on how A was drawn. The tangent space {s(Y A + B X)} of matrices has an orthonormal basis
from A = R_a Q_a and B = Q_b R_b: coordinates M Q_aᵀ (out, r) and Q_bᵀ M (I − Q_aᵀQ_a) (r, in) of a
tangent matrix M. Gradients and displacements in these coordinates have true ΔW lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TangentFrame", "displacement_coordinates", "gradient_coordinates", "tangent_frame"]

#: B columns shorter than this share of the largest are zero: a fresh adapter has none left.
RANK_TOLERANCE = 1e-7


@dataclass(frozen=True)
class TangentFrame:
    """Frame of the tangent space of ΔW = s B A at (A, B), in float64.

    Attributes:
        row_basis: (k, in) Q_a, orthonormal rows spanning those of A; k = r unless A is of lower rank.
        row_factor: (r, k) R_a with A = R_a Q_a.
        column_basis: (out, q) Q_b, orthonormal columns spanning those of B; q = 0 for B = 0.
        column_pinv: (q, r) the map W with Wᵀ ∇_A = s Q_bᵀ ∇_ΔW, up to `scaling`.
        a, b: the adapter itself; scaling: s.
    """

    row_basis: Tensor
    row_factor: Tensor
    column_basis: Tensor
    column_pinv: Tensor
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def dimension(self) -> int:
        """Dimension of the tangent space: out·k + q·(in − k)."""
        k, width = self.row_basis.shape
        return self.column_basis.shape[0] * k + self.column_basis.shape[1] * (width - k)


def tangent_frame(a: Tensor, b: Tensor, scaling: float) -> TangentFrame:
    """Frame at A (r, in) and B (out, r).

    B may be zero, and the rows of A may depend on each other: those of a rank above the module's width do.
    """
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    basis, factor = _rows(a)
    left, singular, right = torch.linalg.svd(b, full_matrices=False)
    keep = singular > RANK_TOLERANCE * max(float(a.norm()), float(singular.max()), 1e-300)
    pinv = right[keep] / singular[keep, None]
    return TangentFrame(basis, factor, left[:, keep], pinv, a, b, scaling)


def _rows(a: Tensor) -> tuple[Tensor, Tensor]:
    """Q_a (k, in) and R_a (r, k) with A = R_a Q_a."""
    q, r = torch.linalg.qr(a.T)
    ends = r.diagonal().abs()
    if r.shape[0] == r.shape[1] and bool(ends.min() > RANK_TOLERANCE * ends.max()):
        return q.T, r.T
    left, singular, right = torch.linalg.svd(a, full_matrices=False)
    keep = singular > RANK_TOLERANCE * singular.max()
    return right[keep], left[:, keep] * singular[keep]


def gradient_coordinates(frame: TangentFrame, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """Coordinates of ∇_ΔW (projected on the tangent space) from ∇_A and ∇_B.

    ∇_B = s ∇_ΔW Aᵀ gives ∇_ΔW Q_aᵀ = ∇_B R_a^{−ᵀ}/s (the pseudo-inverse where R_a is not square),
    and ∇_A = s Bᵀ ∇_ΔW gives Q_bᵀ ∇_ΔW = W ∇_A/s, of which the part orthogonal to the rows of A is new.

    Args:
        frame: the adapter's frame.
        grad_a: (N, r, in) per-sample gradients.
        grad_b: (N, out, r).

    Returns:
        (N, dimension') float64: out·k + q·in numbers whose dot products are those of the
        projected ∇_ΔW.
    """
    grad_a, grad_b = grad_a.to(torch.float64), grad_b.to(torch.float64)
    r, k = frame.row_factor.shape
    inverse = (torch.linalg.inv if r == k else torch.linalg.pinv)(frame.row_factor).T
    first = grad_b @ inverse / frame.scaling
    second = frame.column_pinv @ grad_a / frame.scaling
    second = second - (second @ frame.row_basis.T) @ frame.row_basis
    return torch.cat([first.flatten(1), second.flatten(1)], dim=1)


def displacement_coordinates(frame: TangentFrame, step_a: Tensor, step_b: Tensor) -> Tensor:
    """Coordinates of the first-order displacement s(δB A + B δA) of ΔW.

    Args:
        frame: the adapter's frame.
        step_a: (r, in) δA.
        step_b: (out, r) δB.

    Returns:
        (out·k + q·in,) float64 with the Frobenius norm of the displacement.
    """
    step_a, step_b = step_a.to(torch.float64), step_b.to(torch.float64)
    matrix = frame.scaling * (step_b @ frame.a + frame.b @ step_a)
    first = matrix @ frame.row_basis.T
    second = frame.column_basis.T @ matrix
    second = second - (second @ frame.row_basis.T) @ frame.row_basis
    return torch.cat([first.flatten(), second.flatten()])
