"""From displacements to safety loss: the local model, the paper's bound, and collapse steps.

ΔL_i(δ) = c_i + ½ c_i² with c = G δ is sample i's share of ⟨ḡ_s, δ⟩ + ½ δᵀFδ, so the mean over
samples is the local model, and a bootstrap over samples needs no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "aic_lower_bound",
    "bootstrap_means",
    "diffusion",
    "first_crossing",
    "interpolated_crossing",
    "local_change",
]


def local_change(c: Tensor) -> Tensor:
    """Per-sample ΔL_i = c_i + ½ c_i² (nats); its mean over samples is ⟨ḡ_s, δ⟩ + ½ δᵀFδ, exactly.

    Args:
        c: (N,) or (N, M) c-vectors G δ at M steps.

    Returns:
        Same shape, float64, signed: negative where fine-tuning lowers the safety loss.
    """
    c = c.to(torch.float64)
    return c + 0.5 * c**2


def aic_lower_bound(times: Tensor, gamma_hat: float, epsilon_hat: float) -> Tensor:
    """½ max(½ γ̂ t² − ε̂ t, 0)²: the bound of the Alignment Instability Condition on ΔL_s.

    γ̂ = ‖F^½ P H g‖ and ε̂ = ‖F^½ P g‖ carry F^½ already; multiplying by an eigenvalue again is
    wrong by that eigenvalue. At an orthogonal start it is γ̂²t⁴/8. It is a lower bound: it says 0
    where the gradient lies inside the subspace and the truth collapses. Never a forecast.

    Args:
        times: (M,) flow times t = Σ η.
        gamma_hat: coupling, ≥ 0.
        epsilon_hat: first-order term, ≥ 0.

    Returns:
        (M,) float64 ≥ 0, nats.

    Source: arXiv 2602.15799, Theorems 6.1 and 6.2 (as read second-hand).
    """
    drift = 0.5 * gamma_hat * times**2 - epsilon_hat * times
    return 0.5 * drift.clamp(min=0) ** 2


def diffusion(c_batches: Tensor, rates: Tensor, *, noise_divisor: int = 1) -> Tensor | None:
    """½ Σ_k η_k² tr(F Cov[D g_b]): safety loss from mini-batch noise, a random walk beside the drift.

    tr(F Cov) = (1/N) Σ_i Var_b(c_ib) with c_b = G D g_b.

    Args:
        c_batches: (N, B) c-vectors of single micro-batches.
        rates: (T,) learning rates.
        noise_divisor: micro-batches averaged per step.

    Returns:
        (T + 1,) float64 ≥ 0, or None with fewer than two batches.
    """
    if c_batches.shape[1] < 2:
        return None
    spread = float(c_batches.to(torch.float64).var(dim=1).mean()) / noise_divisor
    steps = torch.cumsum(rates.to(torch.float64) ** 2, 0)
    return 0.5 * spread * torch.cat([torch.zeros(1, dtype=torch.float64), steps])


def bootstrap_means(values: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Means of `draws` resamples (with replacement) of the rows.

    Args:
        values: (N, M).
        draws: number of resamples.
        generator: source of the draws.

    Returns:
        (draws, M) float64.
    """
    n = values.shape[0]
    picks = torch.randint(n, (draws, n), generator=generator)
    weights = torch.zeros(draws, n, dtype=torch.float64)
    weights.scatter_add_(1, picks, torch.ones(draws, n, dtype=torch.float64))
    return weights @ values.to(torch.float64) / n


def first_crossing(steps: list[int], values: Tensor, threshold: float) -> int | None:
    """First recorded step ≥ 1 whose value reaches the threshold; None = not within the last step.

    A value that is not finite counts as reached: the model diverged there.
    """
    reached = (values >= threshold) | ~torch.isfinite(values)
    reached[0] = False
    return steps[int(reached.to(torch.int64).argmax())] if bool(reached.any()) else None


def interpolated_crossing(steps: list[int], values: Tensor, threshold: float) -> int | None:
    """`first_crossing`, refined between recorded steps by linear interpolation of √ΔL.

    ΔL is close to a square of a smooth path, so its root is the straighter quantity. The answer is
    rounded up: the first whole step at or above the threshold.
    """
    step = first_crossing(steps, values, threshold)
    if step is None:
        return None
    j = steps.index(step)
    low, high = steps[j - 1], steps[j]
    if high - low == 1 or not bool(torch.isfinite(values[j])):
        return step
    a, b = (float(values[i].clamp(min=0).sqrt()) for i in (j - 1, j))
    share = (threshold**0.5 - a) / (b - a) if b > a else 1.0
    return min(high, low + max(1, -int(-(high - low) * share // 1)))
