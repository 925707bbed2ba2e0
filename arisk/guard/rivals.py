"""What AlignGuard is compared with: elastic weight consolidation, and two projections of the gradient.

* EWC: λ Σ_j F_jj (θ_j − θ*_j)², F_jj the diagonal Fisher matrix of the safety data. The coordinates are those
  that train. For a LoRA adapter these are A and B themselves: with a fresh B = 0 the safety gradient with
  respect to A is 0, so A is not guarded at all, and F_jj of B depends on the random A. (`LoRAMitigator` works
  on ΔW instead.) Source: Kirkpatrick et al., arXiv 1612.00796, eq. 3, the factor ½ left out.
* conflict: g − min(0, ⟨g, s⟩) s / ‖s‖², g the gradient over all parameters that train, before clipping and
  optimizer, and s that of a safety minibatch at the present point. An SGD step along the result does not
  raise that loss to first order. Source: A-GEM, arXiv 1812.00420, eq. 11, with the safety rows as the memory.
* subspace: g − QQᵀg with orthonormal rows Qᵀ, the leading eigenvectors of the safety Fisher matrix at the
  aligned point. Nothing is recomputed. Source: after gradient projection memory, arXiv 2103.09762, with
  gradients instead of activations.

An optimizer with momentum or coordinatewise scaling (AdamW) does not step along the gradient it is given, so
neither projection holds of its update; weight decay is not projected either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from arisk.base.errors import NumericsError
from arisk.base.task import SampleSet
from arisk.geometry.vectors import inner_product, squared_norm
from arisk.gradients import (
    ParameterLayout,
    batch_size,
    choose_engine,
    move_batch,
    per_sample_gradients,
    slice_batch,
)

__all__ = [
    "ewc_penalty",
    "fisher_diagonals",
    "leading_directions",
    "outside",
    "per_sample_rows",
    "safety_subspace",
    "without_conflict",
]


def fisher_diagonals(
    model: nn.Module, layout: ParameterLayout, samples: SampleSet, *, chunk_size: int = 8
) -> list[Tensor]:
    """F_jj = (1/N) Σ_i G_ij² of every parameter, in its shape and at least float32, inside `measuring`.

    Args:
        model: at the aligned point.
        layout: the parameters that train.
        samples: safety samples with their loss.
        chunk_size: samples per backward pass.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}

    def sink(name: str, block: Tensor) -> None:
        wide = block if block.dtype == torch.float64 else block.float()
        square = wide.square().sum(0)
        sums[name] = sums[name] + square if name in sums else square

    total = _sweep(model, layout, samples, sink, chunk_size)
    return [sums[name] / total for name in layout.names]


def per_sample_rows(
    model: nn.Module, layout: ParameterLayout, samples: SampleSet, *, chunk_size: int = 8
) -> Tensor:
    """G (N, P), the safety gradients over all parameters that train, in memory; inside `measuring`.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite.
    """
    parts: dict[str, list[Tensor]] = {}

    def sink(name: str, block: Tensor) -> None:
        parts.setdefault(name, []).append(block.detach().flatten(1).clone())

    _sweep(model, layout, samples, sink, chunk_size)
    return torch.cat([torch.cat(parts[name]) for name in layout.names], dim=1)


def _sweep(
    model: nn.Module,
    layout: ParameterLayout,
    samples: SampleSet,
    sink: Callable[[str, Tensor], None],
    chunk_size: int,
) -> int:
    """Every sample's gradients, chunk by chunk; returns N."""
    device = next(model.parameters()).device
    engine, total = None, 0
    for batch in samples.batches:
        for start in range(0, batch_size(batch), chunk_size):
            chunk = move_batch(slice_batch(batch, start, min(start + chunk_size, batch_size(batch))), device)
            engine = engine or choose_engine(model, chunk, samples.loss_fn, layout, "auto").engine
            per_sample_gradients(model, chunk, samples.loss_fn, layout, sink, engine=engine, offset=total)
            total += batch_size(chunk)
    return total


def ewc_penalty(
    parameters: Sequence[Tensor], reference: Sequence[Tensor], diagonals: Sequence[Tensor]
) -> Tensor:
    """Σ_j F_jj (θ_j − θ*_j)² ≥ 0, with gradient (nats²)."""
    parts = [
        (f * (p - p0).to(f.dtype).square()).sum()
        for p, p0, f in zip(parameters, reference, diagonals, strict=True)
    ]
    return torch.stack(parts).sum()


def without_conflict(gradients: Sequence[Tensor], safety: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """`g − min(0, ⟨g, s⟩) s / ‖s‖²`, and cos(g, s) before it.

    Args:
        gradients: g by parameter; one that is not finite, such as a float16 step that overflows, is left to
            whoever takes the step.
        safety: s by parameter.

    Returns:
        The new gradient, the same tensors where there is no conflict; the cosine in [−1, 1], NaN where
        a gradient is 0 or not finite.

    Raises:
        NumericsError: s is NaN or infinite.
    """
    pairs = list(zip(gradients, safety, strict=True))
    inner = inner_product(pairs)
    square, own = squared_norm(safety), squared_norm(gradients)
    if not math.isfinite(square):
        raise NumericsError(
            f"the safety gradient of projection is not finite: its squared norm is {square}",
            where="projection: safety gradient",
            fix="check the loss of the safety rows, or lower the learning rate",
        )
    cosine = inner / (square * own) ** 0.5 if square > 0 and 0 < own < math.inf else float("nan")
    if inner >= 0 or square == 0 or not math.isfinite(own):
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


def safety_subspace(model: nn.Module, layout: ParameterLayout, samples: SampleSet, *, rank: int) -> Tensor:
    """(k, P) Qᵀ of `leading_directions` for these safety rows, k ≤ rank; inside `measuring`.

    Args:
        model: at the aligned point.
        layout: the parameters that train; N × P gradients are in memory.
        samples: N safety rows with their loss.
        rank: directions wanted.

    Raises:
        NumericsError: a gradient is NaN or infinite, or all are zero.
    """
    rows = per_sample_rows(model, layout, samples)
    if not bool(rows.any()):
        raise NumericsError(
            "every safety gradient is exactly zero",
            where="guard: projection subspace",
            fix="check that the safety loss depends on the parameters that train",
        )
    return leading_directions(rows, rank)


def outside(gradients: Sequence[Tensor], directions: Tensor) -> tuple[list[Tensor], float]:
    """`g − QQᵀg` by parameter, and the share ‖QQᵀg‖/‖g‖ in [0, 1] that was taken (NaN where g = 0).

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
