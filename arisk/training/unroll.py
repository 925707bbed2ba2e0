"""The planned run taken backwards: how its end changes with what every step was given.

    μ_{k−1} = (∂(θ_k, s_k)/∂(θ_{k−1}, s_{k−1}))ᵀ μ_k,     c_k = (∂(θ_k, s_k)/∂g_k)ᵀ μ_k

with s_k the optimizer's state, g_k = ∇L_k(θ_{k−1}) the gradient of a step before clipping and μ the
derivative of a number measured at the end. Row j of the step, with a weight ε_j on its term, moves the end by
⟨c_k, ∇(its term)⟩ at ε = 1. A step's gradient depends on the parameters as well, by the Hessian of its loss,
so that part of μ_{k−1} is H_k c_k: with curvature one double backward pass per step, which gives the products
with rows too; without, that part is left out, and whoever asks makes the products.

Steps are stored as they are taken, where memory allows; else every so many, and walked again in between.
With curvature and without smoothing the derivatives are exact.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from arisk.base.errors import ConfigError
from arisk.base.task import Progress, silent
from arisk.geometry.vectors import inner_product, norm
from arisk.training.loop import PlannedRun, put
from arisk.training.optimizers import Slopes

__all__ = ["Unrolled", "Walk", "require_unrollable"]

#: What torch adds to the norm of a gradient before it divides by it.
CLIP_EPS = 1e-6


@dataclass(frozen=True)
class _Stand:
    """Where a run stood before a step: parameters and states; and the step's gradient, once it was taken."""

    parameters: list[Tensor]
    states: list[dict[str, Any]]
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class Unrolled:
    """One step taken backwards; the run stands before it.

    Attributes:
        number: the step, from 1.
        pull: c_k by parameter: derivative of the measured end with respect to the step's gradient.
        rows: micro-batch number (from 0 over the run) and (B,) derivatives of the end with respect to the
            weight of each of its rows in the loss of this step; empty without curvature.
    """

    number: int
    pull: Sequence[Tensor]
    rows: Sequence[tuple[int, Tensor]]


def require_unrollable(run: PlannedRun, where: str) -> None:
    """Refuse a run whose steps have no derivative.

    Raises:
        ConfigError: its optimizer, or its precision.
    """
    fix = "set `screen.score: point`, which needs no derivative of a step"
    if any(part.kind.adjoint is None for part in run.parts):
        raise ConfigError(f"steps of {run.recipe.kind.name} cannot be taken backwards", where=where, fix=fix)
    if run.scaler is not None:
        raise ConfigError(
            "steps in float16 with a loss scale cannot be taken backwards", where=where, fix=fix
        )


class Walk:
    """Steps 1 … `last` of a planned run, taken and then taken back; inside `measuring`.

    Args:
        run: at the start of the plan.
        last: steps to take.
        memory: bytes for stored steps.
        smoothing: multiple of its root mean square by which an adaptive optimizer's scale is levelled on the
            way back; 0 is exact. An exact derivative of AdamW counts that a row raises v̂, and so slows all
            later steps, which is not what leaving out many rows like it does.
        curvature: whether a step's gradient counts as depending on the parameters.
        progress: told of steps.

    Raises:
        ConfigError: the run cannot be unrolled, or not within the memory.
        NumericsError: the loss of a step is not finite.
    """

    def __init__(
        self,
        run: PlannedRun,
        last: int,
        memory: float,
        *,
        smoothing: float = 0.0,
        curvature: bool = True,
        progress: Progress = silent,
    ) -> None:
        require_unrollable(run, "screen.score")
        self.run, self.last, self.smoothing, self.progress = run, last, smoothing, progress
        self.curvature = curvature
        self._raw: list[Tensor | None] = []
        self._starts: dict[int, _Stand] = {}
        self._stands: dict[int, _Stand] = {}
        self.stride = last
        self._walk(1, last, memory)

    def _walk(self, first: int, last: int, memory: float | None = None) -> None:
        """Take steps, keep where the run stood before each, and before every `stride`-th for good."""
        run = self.run
        run.protect = self._keep
        try:
            for number in range(first, last + 1):
                stand = _stand(run)
                if number == 2 and memory is not None:
                    self.stride = _stride(_bytes(stand), self.last, memory)
                if (number - 1) % self.stride == 0:
                    self._starts.setdefault(number, stand)
                    self._stands.clear()
                self.progress("planned steps", number - 1, last)
                run.step(number)
                self._stands[number] = _Stand(stand.parameters, stand.states, self._raw)
        finally:
            run.protect = None
        self.progress("planned steps", last, last)

    def _keep(self, number: int) -> Mapping[str, float]:
        del number
        self._raw = [None if p.grad is None else p.grad.detach().clone() for p in self.run.parameters]
        return {}

    def backwards(self, slopes: Sequence[Tensor]) -> Generator[Unrolled]:
        """The steps from the last to the first.

        Args:
            slopes: derivative of the measured end with respect to every parameter there.

        Yields:
            Steps; the run's parameters stand before each.

        Raises:
            ConfigError: with curvature, and the model has no second derivatives.
        """
        run = self.run
        after: list[Slopes] = [{"parameter": _wide(slope)} for slope in slopes]
        for number in range(self.last, 0, -1):
            self.progress("steps taken back", self.last - number, self.last)
            if number not in self._stands:
                first = (number - 1) // self.stride * self.stride + 1
                _go_to(run, self._starts[first])
                self._walk(first, number)
            stand = self._stands.pop(number)
            _go_to(run, stand)
            after, pull = self._adjoint(number, stand, after)
            rows: list[tuple[int, Tensor]] = []
            if self.curvature:
                rows, curved = self._second(number, pull)
                after = [
                    {**slope, "parameter": slope["parameter"] + bend}
                    for slope, bend in zip(after, curved, strict=True)
                ]
            yield Unrolled(number, pull, rows)
        self.progress("steps taken back", self.last, self.last)

    def _adjoint(
        self, number: int, stand: _Stand, after: Sequence[Slopes]
    ) -> tuple[list[Slopes], list[Tensor]]:
        """Slopes before the step, but for what the gradient's own change adds; and those of the gradient."""
        run, rate = self.run, self.run.rates[number - 1]
        shrunk = _clipping(stand.gradients, run.training.max_grad_norm)
        before: list[Slopes] = []
        pull: list[Tensor] = []
        for parameter, state, raw, slopes in zip(
            run.parameters, stand.states, stand.gradients, after, strict=True
        ):
            if raw is None:
                # The optimizer leaves a parameter without a gradient alone.
                before.append(slopes)
                pull.append(torch.zeros_like(slopes["parameter"]))
                continue
            part, group = run.part_of(parameter)
            assert part.kind.adjoint is not None
            now = {**group, "lr": rate * group["ratio"]}
            held = {key: _wide(v) if isinstance(v, Tensor) else v for key, v in state.items()}
            found = dict(part.kind.adjoint(held, now, _wide(raw) * shrunk, slopes, self.smoothing))
            pull.append(found.pop("gradient"))
            before.append(found)
        return before, _unclipped(pull, stand.gradients, shrunk, run.training.max_grad_norm)

    def _second(self, number: int, pull: Sequence[Tensor]) -> tuple[list[tuple[int, Tensor]], list[Tensor]]:
        """⟨c, ∇ term_j⟩ of the step's rows, and H c."""
        parameters = self.run.parameters
        rows: list[tuple[int, Tensor]] = []
        curved = [torch.zeros_like(c) for c in pull]
        try:
            with sdpa_kernel(SDPBackend.MATH):
                for place, terms in self.run.row_terms(number):
                    weights = torch.ones_like(terms, requires_grad=True)
                    first = torch.autograd.grad(
                        terms @ weights, parameters, create_graph=True, allow_unused=True
                    )
                    along = [(f * c).sum() for f, c in zip(first, pull, strict=True) if f is not None]
                    found = torch.autograd.grad(
                        torch.stack(along).sum(), [weights, *parameters], allow_unused=True
                    )
                    rows.append((place, found[0].detach().to("cpu", torch.float64)))
                    curved = [
                        total if part is None else total + part
                        for total, part in zip(curved, found[1:], strict=True)
                    ]
        except (RuntimeError, NotImplementedError) as err:
            raise ConfigError(
                f"the model cannot be differentiated twice: {str(err).splitlines()[0]}",
                where="screen.score",
                fix="set `model.attention: eager`, or leave `screen.curvature` out",
            ) from err
        return rows, curved


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: slopes of narrow weights are small numbers, summed over many steps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stand(run: PlannedRun) -> _Stand:
    """Copies of parameters and states as they are."""
    states = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in run.state_of(p).items()}
        for p in run.parameters
    ]
    return _Stand([p.detach().clone() for p in run.parameters], states, [])


def _go_to(run: PlannedRun, stand: _Stand) -> None:
    """Put parameters and states back."""
    put(run.parameters, stand.parameters)
    for parameter, kept in zip(run.parameters, stand.states, strict=True):
        state = run.state_of(parameter)
        state.clear()
        state.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()})


def _bytes(stand: _Stand) -> int:
    """What a stored step takes, its gradient counted like a copy of the parameters."""
    tensors = [v for state in stand.states for v in state.values() if isinstance(v, Tensor)]
    own = sum(t.numel() * t.element_size() for t in stand.parameters)
    return 2 * own + sum(t.numel() * t.element_size() for t in tensors)


def _stride(size: int, steps: int, memory: float) -> int:
    """Steps from one that is kept for good to the next: all where they fit, else the fewest that do.

    Raises:
        ConfigError: no stride fits.
    """
    room = int(memory // size)
    if steps <= room:
        return steps
    for stride in range(math.isqrt(steps - 1) + 1, steps):
        if stride + math.ceil(steps / stride) <= room:
            return stride
    least = 2 * math.isqrt(steps - 1) + 2
    raise ConfigError(
        f"path scores store steps of {size / 1e9:.2g} GB each, {least} of {steps} at least, "
        f"and `screen.memory_gb` is {memory / 1e9:.3g}",
        where="screen.score",
        fix=f"train an adapter (`model.adapter`), set `screen.memory_gb: {math.ceil(least * size / 1e9)}`, "
        "or `screen.score: point`",
    )


def _clipping(gradients: Sequence[Tensor | None], limit: float | None) -> float:
    """The factor by which a step's gradient was clipped."""
    return 1.0 if not limit else min(1.0, limit / (norm(gradients) + CLIP_EPS))


def _unclipped(
    pull: list[Tensor], gradients: Sequence[Tensor | None], factor: float, limit: float | None
) -> list[Tensor]:
    """Slopes of the gradient before clipping: s c − ⟨c, g⟩ g s²/(‖g‖ limit) where it was clipped by s."""
    if not limit or factor == 1.0:
        return pull
    along = inner_product((c, g) for c, g in zip(pull, gradients, strict=True) if g is not None)
    share = along * factor**2 / (limit * norm(gradients))
    return [factor * c if g is None else factor * c - share * g for c, g in zip(pull, gradients, strict=True)]
