"""A report's numbers under the names of the peer package `alignment-risk`: the one place that maps them.

Each view carries the record it is made of, and gives everything that record has as well. A number
that was not measured is NaN, an array that was not measured is empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arisk.anatomy.record import CollectResult, OverlapNulls, ScoreResult, SubspaceResult
from arisk.base.errors import InputError
from arisk.forecast.record import Curve, ForecastResult
from arisk.geometry.spectrum import dual_coefficients

__all__ = [
    "CurvatureCouplingResult",
    "InitialRiskScore",
    "ParameterSlice",
    "SafetyForecast",
    "SensitivitySubspace",
    "curvature_of",
]

#: An overlap up to this counts as an orthogonal start (the peer's default).
ORTHOGONAL = 0.05


@dataclass(frozen=True)
class ParameterSlice:
    """Where a parameter lies in the flat vector θ: entries start … end − 1."""

    name: str
    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _View:
    """A record under other names; what is not renamed is looked up in `record`."""

    record: Any

    def __getattr__(self, name: str) -> Any:
        if name == "record":
            raise AttributeError(name)
        return getattr(self.record, name)


@dataclass(frozen=True, repr=False)
class SensitivitySubspace(_View):
    """The safety subspace: a `SubspaceResult`, with what lies beside it.

    Attributes:
        record: the eigenpairs as found.
        collected: the safety side.
        basis: (P, k) orthonormal columns, None where it was too large to keep.
    """

    record: SubspaceResult
    collected: CollectResult
    basis: Tensor | None

    @property
    def parameter_slices(self) -> list[ParameterSlice]:
        """The selected parameters in flattening order."""
        slices: list[ParameterSlice] = []
        start = 0
        for name, shape in zip(self.collected.parameter_names, self.collected.parameter_shapes, strict=True):
            end = start + math.prod(shape)
            slices.append(ParameterSlice(name, start, end, tuple(shape)))
            start = end
        return slices

    @property
    def fisher_eigenvalues(self) -> Tensor:
        """(k,) descending eigenvalues of F (nats² per unit θ²)."""
        return self.record.eigenvalues

    @property
    def fisher_eigenvectors(self) -> Tensor:
        """(P, k) orthonormal basis of the subspace.

        Raises:
            InputError: it was not kept.
        """
        if self.basis is None:
            raise InputError(
                "the basis (P × k) was not kept: it exceeds `collect.memory_budget_gb`, or gradients "
                "were not stored, or nothing was measured",
                where="report.subspace.fisher_eigenvectors",
                fix="raise `collect.memory_budget_gb` or lower `fisher.top_rank`, and run again",
            )
        return self.basis

    @property
    def fisher_diagonal(self) -> Tensor:
        """(P,) diagonal of F."""
        return self.collected.fisher_diagonal

    @property
    def module_scores(self) -> dict[str, float]:
        """Mean of the Fisher diagonal over each module's entries; `module_traces` has the sums."""
        sizes = [0] * len(self.collected.modules)
        for part, module in zip(self.parameter_slices, self.collected.module_of_parameter, strict=True):
            sizes[module] += part.end - part.start
        traces = self.record.module_traces.tolist()
        named = zip(self.collected.modules, traces, sizes, strict=True)
        return {name: trace / size for name, trace, size in named}

    @property
    def top_weight_indices(self) -> Tensor:
        """(m,) places in θ of the largest entries of the Fisher diagonal, largest first."""
        return torch.topk(self.fisher_diagonal, len(self.record.top_weights)).indices

    @property
    def top_weight_scores(self) -> Tensor:
        """(m,) those entries."""
        return self.fisher_diagonal[self.top_weight_indices]

    def __repr__(self) -> str:
        k, p = self.record.rank, self.fisher_diagonal.numel()
        return f"SensitivitySubspace(rank={k}, parameters={p}, explained={self.record.explained:.3g})"


@dataclass(frozen=True)
class InitialRiskScore(_View):
    """The overlap of the first update with the safety subspace: an `OverlapNulls`, with lengths.

    Attributes:
        record: the overlap and its nulls.
        update_norm: η‖D g‖, length of the first step at the peak learning rate (warm-up aside).
    """

    record: OverlapNulls
    update_norm: float

    @property
    def projected_ratio(self) -> float:
        """‖Pu‖/‖u‖, in [0, 1]."""
        return self.record.ratio

    @property
    def cosine_to_subspace(self) -> float:
        """The same number: the cosine between u and the closest direction of the subspace."""
        return self.record.ratio

    @property
    def projected_norm(self) -> float:
        """Length of the first step's part inside the subspace."""
        return self.record.ratio * self.update_norm

    @property
    def trigger_curvature_check(self) -> bool:
        """Whether the start is orthogonal (ratio ≤ 0.05): then only curvature brings drift in."""
        return self.record.ratio <= ORTHOGONAL


@dataclass(frozen=True)
class CurvatureCouplingResult:
    """Curvature coupling of the fine-tuning loss with the safety subspace, before the step-size map.

    Attributes:
        gamma_hat: ‖F^½ P D H D g‖. epsilon_hat: ‖F^½ P D g‖.
        acceleration_norm: ‖D^½ H D g‖; ‖H g‖ for SGD.
        projected_acceleration_norm: ‖P D H D g‖; NaN for `diag_topk`.
    """

    gamma_hat: float
    epsilon_hat: float
    acceleration_norm: float
    projected_acceleration_norm: float

    def __getitem__(self, name: str) -> float:
        return getattr(self, name)


def curvature_of(scored: ScoreResult, space: SubspaceResult) -> CurvatureCouplingResult:
    """Both norms lie in the Krylov space, so the records hold them."""
    acceleration = projected = math.nan
    if scored.krylov_t.numel():
        first = scored.krylov_t[:, 0] * scored.krylov_beta
        acceleration = float(first.norm())
        if space.dual_vectors.numel():
            c = (scored.c_krylov @ first.to(scored.c_krylov)).to(torch.float64)
            projected = float(dual_coefficients(c, space.eigenvalues, space.dual_vectors).norm())
    return CurvatureCouplingResult(scored.gamma_hat, scored.epsilon_hat, acceleration, projected)


@dataclass(frozen=True, repr=False)
class SafetyForecast(_View):
    """The forecast the verdict rests on: a `ForecastResult`, with that forecaster's curve as arrays.

    `collapse_step` is the measured forecast's. The peer's own formula is kept as `projected_drift` and
    `quartic_lower_bound`: a lower bound, which says 0 where the gradient lies inside the subspace.
    """

    record: ForecastResult

    @property
    def collapse_step(self) -> int | None:
        """First step whose loss rise reaches the threshold; None = not within the horizon."""
        return self.record.collapse_step

    @property
    def collapse_time(self) -> float | None:
        """The same as a number of optimizer steps."""
        return None if self.collapse_step is None else float(self.collapse_step)

    @property
    def steps(self) -> np.ndarray:
        """(M,) optimizer steps of the arrays below, from 0."""
        return np.asarray(_steps(self._curve()), dtype=int)

    @property
    def times(self) -> np.ndarray:
        """(M,) the same as floats."""
        return self.steps.astype(float)

    @property
    def estimated_loss(self) -> np.ndarray:
        """(M,) rise of the mean safety loss (nats per response token), signed."""
        curve = self._curve()
        return np.asarray(curve.median if curve else [], dtype=float)

    @property
    def quartic_lower_bound(self) -> np.ndarray:
        """(M,) ½ max(½γ̂t² − ε̂t, 0)², by linear interpolation of the curve `bound`."""
        bound = self.record.forecasters.get("bound")
        if bound is None or not bound.steps:
            return np.full(self.steps.shape, math.nan)
        return np.interp(self.times, bound.steps, bound.median)

    @property
    def projected_drift(self) -> np.ndarray:
        """(M,) ‖F^½ P δ‖ of that bound: √(2 · bound)."""
        return np.sqrt(2 * self.quartic_lower_bound)

    def _curve(self) -> Curve | None:
        return self.record.forecasters.get(self.record.verdict.basis)

    def __repr__(self) -> str:
        v = self.record.verdict
        return f"SafetyForecast({v.level}, collapse_step={v.collapse_step}, horizon={v.horizon})"


def _steps(curve: Curve | None) -> list[int]:
    return list(curve.steps) if curve else []
