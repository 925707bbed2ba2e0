"""Curvature of the fine-tuning loss: products of its Hessian or Gauss-Newton matrix with a vector.

Hessian: by double backward, or by central differences of gradients. Gauss-Newton: JᵀΛJ with J the
derivative of the model's outputs (logits) and Λ the Hessian of the loss in them, positive semidefinite
where the loss is convex in its logits; J v by differences, so that no kernel needs a second derivative.
Differences of a model narrower than float32 are taken in float32 (`arisk.gradients.layout`).

Source of the Gauss-Newton product: Schraudolph, Fast curvature matrix-vector products (2002).

Losses at extrapolated model outputs: outputs often move straighter than losses do.

Softmax turns a straight path of logits into a curved loss, so a short pilot says more through
z₀ + (z_k − z₀) s than through its losses. Works for any loss that calls the model as a function and
gets a tensor, or an object with `logits`; other losses have no outputs to extrapolate.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError
from arisk.base.processes import share, summed
from arisk.base.task import Batch, LossFn
from arisk.gradients.engines import mean_gradient
from arisk.gradients.layout import ParameterLayout, in_float32, parameters_of, widened

__all__ = ["HvpPlan", "choose_hvp", "hvp", "logits_of", "loss_at", "losses_between", "outputs_of"]

#: Relative step lengths tried: ε = share · max(‖θ‖, 1).
STEP_SHARES = (3e-4, 1e-3, 3e-3)
#: Double backward is believed when it is this close to finite differences.
AGREEMENT = 0.1


@dataclass(frozen=True)
class HvpPlan:
    """How products are computed: method, difference step ‖ε‖ (None for autograd), relative error."""

    method: str
    step: float | None
    error: float | None


def hvp(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    layout: ParameterLayout,
    vector: Tensor,
    *,
    method: str,
    step: float | None = None,
) -> Tensor:
    """H v with H the Hessian of the mean loss over the batches, inside `measuring`.

    autograd: ∇⟨∇L, v⟩. finite_difference: (∇L(θ + εv̂) − ∇L(θ − εv̂)) ‖v‖/2ε, parameters restored to
    the bit. ggn: JᵀΛJ v in place of H v, with J v ≈ (z(θ + εv̂) − z(θ − εv̂)) ‖v‖/2ε for logits z.

    Args:
        model: the model.
        batches: micro-batches, each with equal weight.
        loss_fn: per-sample losses or their mean.
        layout: the selected parameters.
        vector: (P,) v.
        method: "autograd", "finite_difference" or "ggn".
        step: ε of the differences, in the length of θ.

    Returns:
        (P,) in the dtype of the parameters (at least float32), on the CPU; zeros for v = 0.

    Raises:
        ConfigError: "ggn" with a loss that has no logits.
    """
    norm = float(vector.norm())
    if norm == 0:
        return torch.zeros_like(vector)
    if method == "autograd":
        total = torch.zeros(layout.numel, dtype=_wide(parameters_of(model, layout)[0].dtype))
        for number in share(len(batches)):
            total += _double_backward(model, batches[number], loss_fn, layout, vector)
        return summed(total) / len(batches)
    step = step or STEP_SHARES[1] * _theta_norm(model, layout)
    with in_float32(model):
        wide = [widened(batch) for batch in batches]
        if method == "ggn":
            total = torch.zeros(layout.numel, dtype=_wide(parameters_of(model, layout)[0].dtype))
            for number in share(len(wide)):
                total += _gauss_newton(model, wide[number], loss_fn, layout, vector, step / norm)
            return summed(total) / len(wide)
        ahead = _gradient_at(model, wide, loss_fn, layout, vector, step / norm)
        behind = _gradient_at(model, wide, loss_fn, layout, vector, -step / norm)
    return (ahead - behind) * (norm / (2 * step))


def choose_hvp(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    layout: ParameterLayout,
    vector: Tensor,
    requested: str,
) -> HvpPlan:
    """Method and step for products with vectors like this one, with their measured error.

    autograd is taken where double backward works, and checked once against differences; ggn only where it
    is asked for. Otherwise the step is the one whose product changes least against the next longer one, and
    that change is the error given: with a third-order remainder it is an upper estimate (Richardson).

    Raises:
        ConfigError: `autograd` was asked for and the model does not allow double backward, or `ggn` and
            the loss has no logits.
    """
    first = batches[:1]
    by = "ggn" if requested == "ggn" else "finite_difference"
    steps = _steps(model, layout)
    products = {s: hvp(model, first, loss_fn, layout, vector, method=by, step=s) for s in steps}
    changes = [_relative(products[a], products[b]) for a, b in itertools.pairwise(steps)]
    best = min(range(len(changes)), key=changes.__getitem__)
    differences = HvpPlan(by, steps[best], changes[best])
    if requested == by:
        return differences
    try:
        exact = hvp(model, first, loss_fn, layout, vector, method="autograd")
        error = _relative(products[steps[best]], exact)
        why = f"it disagrees with finite differences by {error:.0%}"
    except (RuntimeError, NotImplementedError) as err:
        error, why = math.inf, str(err).splitlines()[0]
    # A kernel that cannot be differentiated twice may also pass for a constant, without an error.
    if error <= AGREEMENT:
        return HvpPlan("autograd", None, error)
    if requested == "autograd":
        raise ConfigError(
            f"double backward does not work on this model: {why}",
            where="score.hvp",
            fix="use `hvp: auto` or `finite_difference`, or `model.attention: eager`",
        )
    return differences


def _steps(model: nn.Module, layout: ParameterLayout) -> list[float]:
    length = _theta_norm(model, layout)
    return [share * length for share in STEP_SHARES]


def _theta_norm(model: nn.Module, layout: ParameterLayout) -> float:
    squares = sum(float(p.detach().float().square().sum()) for p in parameters_of(model, layout))
    return max(squares**0.5, 1.0)


def _relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖; 0 when both vanish."""
    length = float(b.norm())
    return float((a - b).norm()) / length if length > 0 else float(a.norm() > 0)


def _double_backward(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, vector: Tensor
) -> Tensor:
    """∇⟨∇L, v⟩ of one batch; zeros where the gradient does not depend on θ."""
    _, gradient = mean_gradient(model, batch, loss_fn, layout, create_graph=True)
    parameters = parameters_of(model, layout)
    if not gradient.requires_grad:
        return torch.zeros_like(vector)
    product = gradient @ vector.to(gradient.device, gradient.dtype)
    seconds = torch.autograd.grad(product, parameters, allow_unused=True)
    parts = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, seconds, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts]).detach().to("cpu", _wide(gradient.dtype))


def _gradient_at(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    layout: ParameterLayout,
    vector: Tensor,
    scale: float,
) -> Tensor:
    """Mean gradient over the batches at θ + scale · v; θ is restored to the bit."""
    with _moved(model, layout, vector, scale) as parameters:
        total = torch.zeros(layout.numel, dtype=_wide(parameters[0].dtype))
        for number in share(len(batches)):
            total += mean_gradient(model, batches[number], loss_fn, layout)[1].to("cpu", total.dtype)
    return summed(total) / len(batches)


@contextmanager
def _moved(
    model: nn.Module, layout: ParameterLayout, vector: Tensor, scale: float
) -> Generator[list[nn.Parameter]]:
    """Inside, θ + scale · v; θ is restored to the bit."""
    parameters = parameters_of(model, layout)
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, part in zip(parameters, layout.split(vector).values(), strict=True):
                p.add_(part.to(p.device, p.dtype), alpha=scale)
        yield parameters
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)


def _gauss_newton(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, vector: Tensor, scale: float
) -> Tensor:
    """JᵀΛJ v of one batch's mean loss, with J v from outputs at θ ± scale · v."""
    sides: list[Tensor] = []
    for sign in (1, -1):
        with _moved(model, layout, vector, sign * scale):
            sides.append(_logits(outputs_of(model, batch, loss_fn)))
    tangent = (sides[0] - sides[1]) / (2 * scale)
    output = outputs_of(model, batch, loss_fn, graph=True)
    logits = _logits(output)
    leaf = logits.detach().requires_grad_()
    losses = loss_at(model, batch, loss_fn, output, leaf)
    if losses is None:
        raise _no_logits()
    (slope,) = torch.autograd.grad(losses.mean(), leaf, create_graph=True)
    # A loss that is linear in its logits has no curvature there.
    curved = torch.autograd.grad(slope, leaf, tangent)[0] if slope.requires_grad else torch.zeros_like(leaf)
    parameters = parameters_of(model, layout)
    if not logits.requires_grad:
        # No selected parameter reaches them.
        return torch.zeros(layout.numel, dtype=_wide(leaf.dtype))
    parts = torch.autograd.grad(logits, parameters, curved, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
    return torch.cat([part.reshape(-1) for part in flat]).to("cpu", _wide(leaf.dtype))


def _logits(output: Any) -> Tensor:
    found = logits_of(output)
    if found is None:
        raise _no_logits()
    return found


def _no_logits() -> ConfigError:
    return ConfigError(
        "Gauss-Newton products need a loss that calls the model once and uses its logits (or tensor) alone",
        where="score.hvp",
        fix="use `hvp: auto` or `finite_difference`",
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; anything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Replay(nn.Module):
    """Stands in for a model: gives a fixed output, and the model's other attributes."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["_model"] = model
        self.__dict__["_output"] = output
        self.__dict__["calls"] = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """The fixed output."""
        self.__dict__["calls"] += 1
        return self.__dict__["_output"]


def outputs_of(model: nn.Module, batch: Batch, loss_fn: LossFn, *, graph: bool = False) -> Any | None:
    """The model's output in this loss; None when it is not called exactly once or gives no logits.

    With `graph` it can be differentiated by the parameters.
    """
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _m, _i, output: seen.append(output))
    try:
        with torch.set_grad_enabled(graph):
            loss_fn(model, batch)
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 and logits_of(seen[0]) is not None else None


def loss_at(model: nn.Module, batch: Batch, loss_fn: LossFn, output: Any, logits: Tensor) -> Tensor | None:
    """The loss of other logits in place of the output's; None when it does not use the stand-in."""
    stand_in = _Replay(model, _with_logits(output, logits))
    losses = loss_fn(stand_in, batch)
    return losses if stand_in.__dict__["calls"] == 1 else None


def losses_between(
    model: nn.Module, batch: Batch, loss_fn: LossFn, start: Any, end: Any, scales: Sequence[float]
) -> Tensor | None:
    """ℓ_i at outputs z₀ + (z_k − z₀) s.

    Args:
        model: asked for attributes only; it does not run.
        batch: the batch the outputs belong to.
        loss_fn: per-sample losses.
        start: output from `outputs_of` at the first point.
        end: output at the second.
        scales: s, 0 at the start and 1 at the end.

    Returns:
        (B, S) float64, or None when the loss gives one number or does not use the stand-in.
    """
    first, last = logits_of(start), logits_of(end)
    if first is None or last is None:
        return None
    columns: list[Tensor] = []
    for scale in scales:
        with torch.no_grad():
            losses = loss_at(model, batch, loss_fn, end, torch.lerp(first, last, float(scale)))
        if losses is None or losses.ndim == 0:
            return None
        columns.append(losses.reshape(-1).to("cpu", torch.float64))
    return torch.stack(columns, dim=1)


def logits_of(output: Any) -> Tensor | None:
    """The floating-point tensor in a model's output: itself, or its `logits`."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _with_logits(output: Any, logits: Tensor) -> Any:
    if isinstance(output, Tensor):
        return logits
    changed = copy.copy(output)
    changed.logits = logits
    return changed
