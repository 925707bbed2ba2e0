"""The four terms of the AlignGuard penalty, as functions of a drift that is already split.

ΔW = ΔW_A + ΔW_T over all guarded matrices together: ΔW_A is what safety is sensitive to, ΔW_T the
rest. The functions take matrices as `Factored`, one per guarded weight, and return scalars with
gradient. Source: arXiv 2508.02079, in the form that the peer package documents.

Matrices as products of thin factors, and the few products the penalty needs of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Factored",
    "SplitDrift",
    "block_split",
    "fisher_term",
    "geodesic_term",
    "overlap_term",
    "subspace_split",
]


@dataclass(frozen=True)
class SplitDrift:
    """The drift and its two parts, one matrix per guarded weight.

    Attributes:
        drift: ΔW.
        safety: ΔW_A.
        task: ΔW_T = ΔW − ΔW_A.
        coefficients: (k,) ⟨b_j, ΔW_A⟩ along the safety directions.
    """

    drift: Sequence[Factored]
    safety: Sequence[Factored]
    task: Sequence[Factored]
    coefficients: Tensor


def _cores(matrices: Sequence[Factored], frames: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(C,) the cores UᵀMV of all matrices, one after the other."""
    return torch.cat([m.core(u, v).reshape(-1) for m, (u, v) in zip(matrices, frames, strict=True)])


def subspace_split(
    drift: Sequence[Factored], frames: Sequence[tuple[Tensor, Tensor]], basis: Tensor
) -> SplitDrift:
    """ΔW_A = PΔW = Σ_j b_j⟨b_j, ΔW⟩ with P the orthogonal projector over all matrices together.

    Args:
        drift: ΔW by guarded weight.
        frames: U (out, p) and V (in, p') with orthonormal columns, by guarded weight.
        basis: (k, C) orthonormal rows; b_j has the blocks U b_j^(l) Vᵀ, C = Σ p p'.
    """
    coefficients = basis @ _cores(drift, frames)
    sizes = [u.shape[1] * v.shape[1] for u, v in frames]
    parts = (coefficients @ basis).split(sizes)
    safety = [
        Factored(u @ part.view(u.shape[1], v.shape[1]), v.T)
        for part, (u, v) in zip(parts, frames, strict=True)
    ]
    task = [whole.minus(part) for whole, part in zip(drift, safety, strict=True)]
    return SplitDrift(drift, safety, task, coefficients)


def block_split(
    drift: Sequence[Factored],
    frames: Sequence[tuple[Tensor, Tensor]],
    basis: Tensor,
    shares: Sequence[Tensor],
) -> SplitDrift:
    """ΔW_A = diag(m) ΔW and ΔW_T = diag(1 − m) ΔW, with a share m in [0, 1] per output row.

    A share strictly between 0 and 1 lies in both parts, so ⟨ΔW_A, ΔW_T⟩ = Σ m(1 − m)ΔW² > 0. Shares
    of 0 and 1 alone would be an orthogonal projector again, and the geodesic term 0.

    Args:
        drift: ΔW by guarded weight.
        frames: as in `subspace_split`.
        basis: as in `subspace_split`.
        shares: (out,) m by guarded weight.
    """
    safety = [whole.with_rows(m) for whole, m in zip(drift, shares, strict=True)]
    task = [whole.with_rows(1 - m) for whole, m in zip(drift, shares, strict=True)]
    return SplitDrift(drift, safety, task, basis @ _cores(safety, frames))


def fisher_term(coefficients: Tensor, eigenvalues: Tensor) -> Tensor:
    """‖F^½ΔW_A‖² = Σ_j λ_j⟨b_j, ΔW_A⟩², F taken on the k safety directions (nats²)."""
    return (eigenvalues * coefficients.square()).sum()


def overlap_term(
    split: SplitDrift,
    beta: float,
    tau: float,
    *,
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over all P entries of η_j|ΔW_A,j ΔW_T,j| with η_j = 1 + βσ(|ΔW_j| − τ).

    The one term that looks at single entries: each matrix is formed, and formed again in the backward
    pass, one at a time, so that memory holds one matrix and not all.

    Args:
        split: the drift.
        beta: β.
        tau: τ, in units of a weight.
        rows: m output rows per matrix, drawn without replacement and weighted out/m: value and gradient
            are then unbiased and cost m/out of the exact ones. None, or m ≥ out: all rows.
        generator: draws the rows (CPU).
    """

    def total(drift: Factored, safety: Factored, task: Factored) -> Tensor:
        eta = 1 + beta * torch.sigmoid(drift.dense().abs() - tau)
        return (eta * (safety.dense() * task.dense()).abs()).sum()

    sums: list[Tensor] = []
    for parts in zip(split.drift, split.safety, split.task, strict=True):
        out = parts[0].left.shape[0]
        if rows is None or rows >= out:
            sums.append(checkpoint(total, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            drawn = torch.randperm(out, generator=generator)[:rows].to(parts[0].left.device)
            sums.append(total(*(part.rows(drawn) for part in parts)) * (out / rows))
    return torch.stack(sums).sum() / sum(matrix.entries for matrix in split.drift)


def geodesic_term(split: SplitDrift) -> Tensor:
    """cos²(ΔW_A, ΔW_T) = ⟨ΔW_A, ΔW_T⟩²/(‖ΔW_A‖²‖ΔW_T‖²), in [0, 1]; 0 where a part is 0.

    With an orthogonal projector (`subspace_split`) the parts are orthogonal and this is identically 0
    but for rounding; it is kept for parity with the paper's form. `block_split` makes it non-zero.
    """
    product = torch.stack([a.inner(t) for a, t in zip(split.safety, split.task, strict=True)]).sum()
    norm_a = torch.stack([a.squared_norm() for a in split.safety]).sum()
    norm_t = torch.stack([t.squared_norm() for t in split.task]).sum()
    # A part that is only rounding of the other has no direction of its own.
    info = torch.finfo(product.dtype)
    floor = (info.eps * (norm_a + norm_t).detach()).clamp(min=info.tiny)
    return (product / norm_a.clamp(min=floor)) * (product / norm_t.clamp(min=floor))


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
