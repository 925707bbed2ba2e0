"""The planned optimizer on the local quadratic model, and the safety loss along its way.

The fine-tuning model is g(δ) ≈ g + R T Rᵀ δ with R (P, J) from a Krylov space: R = Q for SGD, R = D^{−½}Q
when the space was built in the metric of a preconditioner D. Two roads:

* `krylov_path`: δ_k = D^½ Q z_k, a recursion of J numbers. Exact for SGD without weight decay, and
  for a preconditioner frozen at the start.
* `optimizer_path`: the true recursion of an optimizer of `RECURSIONS` on P-sized vectors, no model calls.

Every road is signed and additive: nothing is clamped. A third road follows one straight direction, from
losses measured on it, and `read_at_flow` carries what is known along a path over to other learning rates.

Safety: ΔL_i(δ) = c_i + ½ c_i² with c = G δ is sample i's share of ⟨ḡ_s, δ⟩ + ½ δᵀFδ, so the mean over
samples is the local model, and a bootstrap over samples needs no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "RECURSIONS",
    "LocalModel",
    "Recursion",
    "aic_lower_bound",
    "bootstrap_means",
    "diffusion",
    "first_crossing",
    "interpolate_rows",
    "interpolated_crossing",
    "krylov_path",
    "local_change",
    "optimizer_path",
    "quadratic_path",
    "ray_positions",
    "ray_speeds",
    "read_at_flow",
    "recorded_steps",
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


@dataclass(frozen=True)
class Recursion:
    """The planned optimizer on the local model, as torch.optim defines it.

    Attributes:
        rates: (T,) learning rates, one per step.
        optimizer: a name of `RECURSIONS`: "sgd" (momentum) or "adamw" (betas, eps).
        weight_decay: λ, or (P,) where coordinates differ.
        ratios: (P,) learning rate of each coordinate over the plan's; None for 1.
        max_grad_norm: clipping by the global gradient norm, None for none.
        noise_divisor: micro-batches averaged per step; gradient noise variance is divided by it.
    """

    rates: Tensor
    optimizer: str = "adamw"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tensor = 0.0
    ratios: Tensor | None = None
    max_grad_norm: float | None = None
    noise_divisor: int = 1


@dataclass(frozen=True)
class LocalModel:
    """Quadratic model of the fine-tuning loss at θ*.

    Attributes:
        gradient: (P,) g.
        curvature_basis: (P, J) R.
        curvature: (J, J) float64 T, so that H ≈ R T Rᵀ.
        noise_variance: (P,) variance of one micro-batch gradient about g.
        theta: (P,) θ*, needed for weight decay only; None otherwise.
    """

    gradient: Tensor
    curvature_basis: Tensor
    curvature: Tensor
    noise_variance: Tensor
    theta: Tensor | None = None


def recorded_steps(horizon: int, limit: int) -> list[int]:
    """Steps 0 … horizon, thinned to about `limit` points that grow geometrically from the start.

    Every step is kept while that fits; beyond, neighbours differ by at most a constant factor, so a
    crossing between two recorded steps is known to that factor.

    Args:
        horizon: last step, ≥ 1.
        limit: points wanted, ≥ 2.

    Returns:
        Ascending distinct steps with first 0 and last `horizon`.
    """
    if horizon + 1 <= limit:
        return list(range(horizon + 1))
    if limit == 2:
        return [0, horizon]
    ratio = math.log(horizon) / (limit - 2)
    points = {0, horizon} | {round(math.exp(ratio * i)) for i in range(limit - 1)}
    return sorted(points)


def krylov_path(curvature: Tensor, beta: float, rates: Tensor, *, momentum: float = 0.0) -> Tensor:
    """z_{k+1} = z_k − η_k w_k with w_k = μ w_{k−1} + β e₁ + T z_k (heavy ball), z₀ = 0.

    The displacement is δ_k = D^½ Q z_k, and G δ_k = C z_k with C = G D^½ Q.

    Args:
        curvature: (J, J) T.
        beta: ‖D^½ g‖.
        rates: (T,) learning rates.
        momentum: μ in [0, 1).

    Returns:
        (T + 1, J) float64; infinite or NaN rows once the recursion diverges.
    """
    curvature = curvature.to(torch.float64)
    gradient = torch.zeros(curvature.shape[0], dtype=torch.float64)
    gradient[0] = beta
    position, velocity = torch.zeros_like(gradient), torch.zeros_like(gradient)
    path = [position]
    for rate in rates.tolist():
        velocity = momentum * velocity + gradient + curvature @ position
        position = position - rate * velocity
        path.append(position)
    return torch.stack(path)


def optimizer_path(
    model: LocalModel, recipe: Recursion, steps: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Displacements δ_k = θ_k − θ* of the true optimizer recursion on the local model.

    The second moment of AdamW sees g(δ)² plus the batch-noise variance, which is what the squared
    mini-batch gradients average to; without it AdamW moves too far on noisy data.

    Args:
        model: the quadratic model.
        recipe: the planned optimizer.
        steps: ascending steps to record; 0 gives δ = 0.

    Yields:
        (step, δ) with δ (P,) in the gradient's dtype; the tensor is a copy.
    """
    update = RECURSIONS[recipe.optimizer]
    ratios = 1.0 if recipe.ratios is None else recipe.ratios
    delta = torch.zeros_like(model.gradient)
    state = {"m": torch.zeros_like(delta), "v": torch.zeros_like(delta)}
    wanted = set(steps)
    curvature = model.curvature.to(model.gradient)
    if 0 in wanted:
        yield 0, delta.clone()
    for k, rate in enumerate(recipe.rates[: max(wanted)].tolist(), start=1):
        z = curvature @ (model.curvature_basis.T @ delta)
        gradient = torch.addmv(model.gradient, model.curvature_basis, z)
        scale = _clip_factor(gradient, model, recipe)
        delta.add_(update(delta, gradient, scale, k, state, model, recipe).mul_(ratios), alpha=-rate)
        if k in wanted:
            yield k, delta.clone()


def _clip_factor(gradient: Tensor, model: LocalModel, recipe: Recursion) -> float:
    """min(1, c/‖g_b‖) with ‖g_b‖² = ‖g‖² + tr(noise)/divisor, the mean squared batch norm."""
    if recipe.max_grad_norm is None:
        return 1.0
    noise = float(model.noise_variance.sum()) / recipe.noise_divisor
    norm = math.sqrt(float(gradient.square().sum()) + noise)
    return min(1.0, recipe.max_grad_norm / norm) if norm > 0 else 1.0


def _decay(delta: Tensor, model: LocalModel, recipe: Recursion) -> Tensor | None:
    """λ(θ* + δ); None where nothing decays."""
    if model.theta is None or (isinstance(recipe.weight_decay, float) and not recipe.weight_decay):
        return None
    return (model.theta + delta) * recipe.weight_decay


def _sgd_step(
    delta: Tensor,
    gradient: Tensor,
    scale: float,
    k: int,  # noqa: ARG001 - same call as the AdamW step
    state: dict[str, Tensor],
    model: LocalModel,
    recipe: Recursion,
) -> Tensor:
    """One step of torch.optim.SGD per unit learning rate: weight decay joins the gradient, then momentum."""
    gradient = gradient * scale
    decay = _decay(delta, model, recipe)
    if decay is not None:
        gradient = gradient + decay
    return state["m"].mul_(recipe.momentum).add_(gradient).clone()


def _adamw_step(
    delta: Tensor,
    gradient: Tensor,
    scale: float,
    k: int,
    state: dict[str, Tensor],
    model: LocalModel,
    recipe: Recursion,
) -> Tensor:
    """One step of torch.optim.AdamW per unit learning rate: decoupled decay, bias-corrected moments."""
    beta1, beta2 = recipe.betas
    second = gradient.square().add_(model.noise_variance, alpha=1 / recipe.noise_divisor)
    state["m"].mul_(beta1).add_(gradient, alpha=(1 - beta1) * scale)
    state["v"].mul_(beta2).add_(second, alpha=(1 - beta2) * scale**2)
    denominator = (state["v"] / (1 - beta2**k)).sqrt_().add_(recipe.eps)
    step = (state["m"] / denominator).div_(1 - beta1**k)
    decay = _decay(delta, model, recipe)
    return step if decay is None else step.add_(decay)


#: (δ, gradient, clip factor, step, state, model, recursion) → the step per unit learning rate.
RECURSIONS: dict[str, Callable[..., Tensor]] = {"sgd": _sgd_step, "adamw": _adamw_step}


def ray_speeds(times: Tensor, finetune_change: Tensor, *, slope: float) -> Tensor:
    """Speed in [0, 1] on each interval between measured points: clip(−ΔL_f/Δt / slope, 0, 1).

    Gradient flow along u slows down where the fine-tuning loss stops falling as fast as it did at
    the start, where its slope is −⟨g, D g⟩.

    Args:
        times: (M,) ascending, first 0.
        finetune_change: (M,) measured change of the fine-tuning loss (nats).
        slope: ⟨g, D g⟩ > 0.

    Returns:
        (M − 1,) float64; 0 where the loss is not finite.
    """
    slopes = torch.diff(finetune_change) / torch.diff(times)
    return torch.nan_to_num(-slopes / slope, nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1)


def ray_positions(times: Tensor, finetune_change: Tensor, increments: Tensor, *, slope: float) -> Tensor:
    """x_k = x_{k−1} + Δt_k · speed(x_{k−1}), held at the last measured point.

    Args:
        times: (M,) flow times measured, first 0.
        finetune_change: (M,) measured change of the fine-tuning loss.
        increments: (T,) flow time of each planned step.
        slope: ⟨g, D g⟩ at the start.

    Returns:
        (T + 1,) float64 positions in flow time, ascending from 0.
    """
    speeds = ray_speeds(times, finetune_change, slope=slope).tolist()
    ends = times.tolist()
    position, interval, path = 0.0, 0, [0.0]
    for step in increments.tolist():
        left = step
        # A step may cross several measured intervals, each with its own speed.
        while left > 0 and interval < len(speeds) and speeds[interval] > 0:
            room = (ends[interval + 1] - position) / speeds[interval]
            used = min(left, room)
            position += used * speeds[interval]
            left -= used
            if used < room:
                break
            interval += 1
            position = ends[interval]
        path.append(position)
    return torch.tensor(path, dtype=torch.float64)


def interpolate_rows(times: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Piecewise linear interpolation of each row of `values` (N, M) at `positions` (K,) → (N, K)."""
    right = torch.searchsorted(times, positions, right=True).clamp(1, len(times) - 1)
    left = right - 1
    share = ((positions - times[left]) / (times[right] - times[left])).clamp(0, 1)
    return values[:, left] * (1 - share) + values[:, right] * share


#: Numbers above this are as good as infinite and would spoil an interpolation.
LARGEST = 1e300
#: |λ τ| below which a direction is flat.
FLAT = 1e-8


def read_at_flow(times: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Curves known at some flow times, read at others; linear in the signed root of the change.

    Args:
        times: (M,) ascending flow times from 0.
        values: (K, M) curves there.
        wanted: (S,) flow times ≥ 0.

    Returns:
        (K, S) float64; NaN beyond the last known time (rounding apart): nothing is extrapolated.
    """
    root = values.to(torch.float64).clamp(-LARGEST, LARGEST)
    root = root.sign() * root.abs().sqrt()
    if len(times) == 1:
        read = root.expand(-1, len(wanted)).clone()
    else:
        right = torch.searchsorted(times, wanted).clamp(1, len(times) - 1)
        width = (times[right] - times[right - 1]).clamp(min=1e-300)
        share = ((wanted - times[right - 1]) / width).clamp(0, 1)
        read = root[:, right - 1] * (1 - share) + root[:, right] * share
    read = read * read.abs()
    read[:, wanted > times[-1] * (1 + 1e-9)] = math.nan
    return read


def quadratic_path(curvature: Tensor, beta: float, rates: Tensor, counts: Tensor) -> Tensor:
    """`krylov_path` without momentum in closed form, for groups of equal learning rates.

    In the eigenbasis of T (eigenvalues λ): z = −(b/λ)(1 − Π_j (1 − η_j λ)^{m_j}), and −b Σ m_j η_j
    where λ is 0. Exact for any rates with m_j = 1.

    Args:
        curvature: (J, J) T.
        beta: ‖D^½ g‖.
        rates: (S,) learning rate η_j of each group.
        counts: (S,) steps m_j of each group.

    Returns:
        (S + 1, J) float64 positions after each group, from 0; infinite where the recursion diverges.
    """
    eigenvalues, vectors = torch.linalg.eigh(curvature.to(torch.float64))
    start = beta * vectors[0]
    factors = (1 - rates[:, None] * eigenvalues[None]) ** counts.to(torch.float64)[:, None]
    left = torch.cat([torch.ones(1, len(eigenvalues), dtype=torch.float64), torch.cumprod(factors, 0)])
    flow = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(rates * counts, 0)])[:, None]
    flat = (eigenvalues.abs() * flow[-1]) < FLAT
    safe = torch.where(flat, torch.ones_like(eigenvalues), eigenvalues)
    z = torch.where(flat, -start * flow, -(start / safe) * (1 - left))
    return z @ vectors.T
