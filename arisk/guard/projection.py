"""Fine-tuning gradients without what is against safety.

Two forms, on the gradient over all parameters that train, before clipping and optimizer:

* conflict: g − min(0, ⟨g, s⟩) s / ‖s‖² with s the gradient of a safety minibatch at the present point.
  An SGD step along the result does not raise that loss to first order.
* subspace: g − QQᵀg with orthonormal rows Qᵀ, the leading eigenvectors of the safety Fisher matrix at
  the aligned point. Nothing is recomputed.

An optimizer with momentum or coordinatewise scaling (AdamW) does not step along the gradient it is
given, so neither holds of its update; weight decay is not projected either.

Source: conflict is A-GEM, arXiv 1812.00420, eq. 11, with the safety rows as the memory; subspace after
gradient projection memory, arXiv 2103.09762, with gradients instead of activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["leading_directions", "outside", "without_conflict"]


def without_conflict(gradients: Sequence[Tensor], safety: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """G − min(0, ⟨g, s⟩) s / ‖s‖², and cos(g, s) before it.

    Args:
        gradients: g by parameter.
        safety: s by parameter.

    Returns:
        The new gradient, the same tensors where there is no conflict; the cosine in [−1, 1], NaN where
        a gradient is 0.
    """
    pairs = list(zip(gradients, safety, strict=True))
    inner = sum(float((g.double() * s.double()).sum()) for g, s in pairs)
    square = sum(float(s.double().square().sum()) for s in safety)
    own = sum(float(g.double().square().sum()) for g in gradients)
    cosine = inner / (square * own) ** 0.5 if square > 0 and own > 0 else float("nan")
    if inner >= 0 or square == 0:
        return list(gradients), cosine
    return [g - (inner / square) * s for g, s in pairs], cosine


def leading_directions(rows: Tensor, rank: int) -> Tensor:
    """(k, P) orthonormal leading right singular vectors of per-sample gradients G (N, P), k ≤ rank.

    Directions with an eigenvalue below 1e-10 of the largest are left out. Taken from the Gram matrix
    GGᵀ in float64.
    """
    wide = rows.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = [i for i in reversed(range(len(values))) if values[i] > 1e-10 * values[-1]][:rank]
    found = (vectors[:, kept].T @ wide) / values[kept].sqrt()[:, None]
    return found.to(rows.dtype)


def outside(gradients: Sequence[Tensor], directions: Tensor) -> tuple[list[Tensor], float]:
    """G − QQᵀg by parameter, and the share ‖QQᵀg‖/‖g‖ in [0, 1] that was taken (NaN where g = 0).

    Args:
        gradients: g by parameter.
        directions: (k, P) orthonormal rows Qᵀ.
    """
    flat = torch.cat([g.reshape(-1) for g in gradients])
    inside = directions.T @ (directions @ flat)
    norm = float(flat.norm())
    share = float(inside.norm()) / norm if norm > 0 else float("nan")
    kept = (flat - inside).split([g.numel() for g in gradients])
    return [part.view_as(g) for part, g in zip(kept, gradients, strict=True)], share
