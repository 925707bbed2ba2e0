"""Matrices as products of thin factors, and the few products the penalty needs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factored"]


@dataclass(frozen=True)
class Factored:
    """M = left · right, (out, in); `right` is None where M = left is dense.

    No method but `dense` forms the (out, in) product of a factored matrix: with inner size q the others
    cost O(q²(out + in)).

    Attributes:
        left: (out, q), or (out, in) where dense.
        right: (q, in), or None.
    """

    left: Tensor
    right: Tensor | None = None

    @property
    def entries(self) -> int:
        """Number of entries, out · in."""
        width = self.left.shape[1] if self.right is None else self.right.shape[1]
        return self.left.shape[0] * width

    def dense(self) -> Tensor:
        """M itself (out, in)."""
        return self.left if self.right is None else self.left @ self.right

    def core(self, u: Tensor, v: Tensor) -> Tensor:
        """UᵀMV (p, p') for U (out, p) and V (in, p')."""
        left = u.T @ self.left
        return left @ v if self.right is None else left @ (self.right @ v)

    def rows(self, index: Tensor) -> Factored:
        """The rows of M with these numbers, (m, in)."""
        return Factored(self.left[index], self.right)

    def with_rows(self, weights: Tensor) -> Factored:
        """diag(weights) M."""
        return Factored(weights[:, None] * self.left, self.right)

    def minus(self, other: Factored) -> Factored:
        """M − M' for a factored M'; dense where M is."""
        if self.right is None:
            return Factored(self.left - other.dense())
        if other.right is None:
            return Factored(self.dense() - other.left)
        return Factored(torch.cat([self.left, -other.left], dim=1), torch.cat([self.right, other.right]))

    def inner(self, other: Factored) -> Tensor:
        """⟨M, M'⟩ = Σ_jk M_jk M'_jk, from the two small products of the factors."""
        if self.right is None:
            return (self.left * other.dense()).sum()
        if other.right is None:
            return other.inner(self)
        return ((self.left.T @ other.left) * (self.right @ other.right.T)).sum()

    def squared_norm(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Σ_jk rows_j M_jk² columns_k; without weights ‖M‖²_F.

        Args:
            rows: (out,) non-negative weights, or None for ones.
            columns: (in,), likewise.
        """
        if self.right is None:
            square = self.left.square()
            square = square if rows is None else rows[:, None] * square
            return (square if columns is None else square * columns).sum()
        left = self.left if rows is None else rows[:, None] * self.left
        right = self.right if columns is None else self.right * columns
        return ((self.left.T @ left) * (right @ self.right.T)).sum()
