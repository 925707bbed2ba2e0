"""What collect, subspace and score hand on: frozen records of tensors and plain values.

`arisk.base.artifacts` writes any of these records to a directory (tensor fields to safetensors, all else
to JSON) and reads it back. Symbols: N safety samples, P selected parameters, L modules, k rank,
J Krylov vectors, B fine-tuning batches; θ* the aligned point; losses in nats per response token.
"Not measured" is None, or NaN inside a tensor; never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

__all__ = ["CollectResult", "OverlapNulls", "ScoreResult", "SubspaceResult"]


@dataclass(frozen=True)
class CollectResult:
    """Per-sample safety gradients G (N, P) at θ*, kept through their inner products.

    Attributes:
        parameter_names: selected parameters in flattening order; `parameter_shapes` beside them.
        modules: L module names; `module_of_parameter[i]` is the index into it of parameter i.
        gram: (L, N, N) float64, K^(l)_ij = ⟨G_i, G_j⟩ over module l, not divided by N.
        mean_gradient: (P,) ḡ_s = mean of the rows of G.
        fisher_diagonal: (P,) mean of squared entries, the diagonal of F = GᵀG/N.
        losses: (N,) float64 ℓ_i(θ*).
        gradient_norms: (N,) float64 ‖G_i‖.
        rows: per sample `prompt`, `response`, `tokens`, `line` (what the loader knew).
        dropped_duplicates: samples left out because their gradient equals an earlier one.
        store: "gradients" (shards beside this artifact) or "gram" (none).
        fisher: "empirical" or "sampled".
        engine: engine used, `parity` its relative error against `loop` on two samples, reasons
            for engines not taken.
        batch_invariance: smallest cosine between a sample's gradient alone and in its batch.
        coverage: shares of parameters and of squared gradient norm that the engine covers.
        task: provenance of model and data as the loader described it.
        warnings: sentences for the report.
        store_dtype: what gradients are rounded to; a float64 model keeps its own where it is float32.
        store_rounding: largest relative change of a gradient's length by rounding, over one batch; None
            where the Gram matrices were taken of unrounded gradients.
    """

    parameter_names: Sequence[str]
    parameter_shapes: Sequence[Sequence[int]]
    modules: Sequence[str]
    module_of_parameter: Sequence[int]
    gram: Tensor
    mean_gradient: Tensor
    fisher_diagonal: Tensor
    losses: Tensor
    gradient_norms: Tensor
    rows: Sequence[Mapping[str, Any]]
    dropped_duplicates: int
    store: Literal["gradients", "gram"]
    fisher: Literal["empirical", "sampled"]
    engine: Mapping[str, Any]
    batch_invariance: float | None
    coverage: Mapping[str, float]
    task: Mapping[str, Any]
    warnings: Sequence[str]
    store_dtype: str = "float32"
    store_rounding: float | None = None


@dataclass(frozen=True)
class SubspaceResult:
    """The safety subspace: leading eigenpairs of F, in the dual K/N = U Λ Uᵀ (K = Σ_l K^(l)).

    Attributes:
        method: how the eigenpairs were found.
        eigenvalues: (k,) float64, descending, of the retained directions.
        spectrum: (≤ N,) float64, every eigenvalue above the numerical floor.
        dual_vectors: (N, k) float64 U; basis b_j = Gᵀu_j/√(Nλ_j). Empty for `diag_topk`.
        coordinates: (k,) int64 indices into θ for `diag_topk`, else empty.
        rank: k, the smallest with Σ_{j≤k} λ_j ≥ target · tr F, at most the limit.
        trace: tr F, the whole trace (nats² per unit θ²).
        explained: Σ_{j≤k} λ_j / tr F, in [0, 1]. `tail_energy` is tr F minus the retained sum.
        effective_rank: exp of the entropy of λ/tr F.
        heldout_energy: share of held-out safety gradient energy inside a subspace of the same rank
            fitted on the other half: mean over random splits; `heldout_energy_std` their spread.
            None when N < 4.
        module_traces: (L,) tr F^(l); they add up to the trace.
        top_weights: largest entries of the Fisher diagonal: name, index (list), value.
        warnings: sentences for the report.
    """

    method: str
    eigenvalues: Tensor
    spectrum: Tensor
    dual_vectors: Tensor
    coordinates: Tensor
    rank: int
    trace: float
    explained: float
    tail_energy: float
    effective_rank: float
    heldout_energy: float | None
    heldout_energy_std: float | None
    module_traces: Tensor
    top_weights: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]


#: p-value up to which an overlap is more than chance.
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class OverlapNulls:
    """The overlap ‖Pu‖/‖u‖ of the update direction u with the safety subspace, and its nulls.

    Attributes:
        ratio: in [0, 1].
        random: √(k/P), what a random direction has; `ratio_to_random` = ratio / random.
        control: overlap of the control data's update direction; None when there is none.
        permuted_mean, permuted_max: overlaps of u with its entries permuted inside each tensor.
        p_value: (1 + #{permuted ≥ ratio}) / (1 + permutations); None with no permutations.
        delta_w: the same ratio in ΔW = (α/r)BA space (adapters); None when it does not apply.
        delta_w_random: √(k/q) with q the dimension of that tangent space.
        conflict_cosine: cos(ḡ_s, u): negative means the first step lowers the safety loss.
    """

    ratio: float
    random: float
    ratio_to_random: float
    control: float | None
    permutations: int
    permuted_mean: float | None
    permuted_max: float | None
    p_value: float | None
    delta_w: float | None
    delta_w_random: float | None
    conflict_cosine: float | None

    @property
    def beyond_chance(self) -> bool | None:
        """Whether p ≤ 5 %; None where it is not known, or where so few permutations cannot show it.

        The smallest p that n permutations allow is 1/(n + 1): an update beyond all of fewer than 19 has
        beaten everything it was compared with, and is still no evidence at 5 %.
        """
        if self.p_value is None or math.isnan(self.ratio):
            return None
        floor = 1 / (self.permutations + 1)
        undecided = self.p_value > SIGNIFICANT and self.p_value <= floor
        return None if undecided else self.p_value <= SIGNIFICANT


@dataclass(frozen=True)
class ScoreResult:
    """How the planned update meets the safety subspace, at θ*.

    With g the mean fine-tuning gradient, D the optimizer's preconditioner (identity for SGD,
    1/(√v̂ + ε) for AdamW) and H the fine-tuning Hessian: u = −D g is the direction of the flow.

    Attributes:
        optimizer: the planned one, whose D preconditions.
        finetune_loss: mean loss of the measured batches (nats per token).
        update_norm: ‖D g‖.
        overlap: the overlap and its nulls.
        gamma_hat: ‖F^½ P D H D g‖; epsilon_hat: ‖F^½ P D g‖ (both carry F^½ once).
        aic_conditions: the three conditions of the Alignment Instability Condition, each with
            `name`, `holds` (true, false or null = not measured) and `evidence` (a sentence).
        c_update: (N,) G u. c_batches: (N, B) G D g_b negated, one column per batch.
        c_krylov: (N, J) G D^½ Q.  krylov_t: (J, J) T = Qᵀ D^½ H D^½ Q.
        krylov_beta: ‖D^½ g‖, so that D^½ g = beta · q₁.
        hvp_method: "autograd", "finite_difference" or "ggn"; hvp_error: its relative error by Richardson
            extrapolation (or symmetry check), None when not measured.
        module_second_order: (L,) ⟨F u, u⟩ by module,
            adding up to uᵀFu.
        examples: fine-tuning rows with `index`, `prompt`, `response`, `tokens`, `loss`,
            `gradient_norm`, `first_order` (−⟨ḡ_s, D g_j⟩, nats per unit learning rate) and
            `second_order` (⟨F u, −D g_j⟩): positive means harmful.
        finetune_rows: rows of the fine-tuning data, or packed sequences; 0 when not known; turns epochs into
            steps.
        probe_times: (M,) flow times t of a straight virtual move θ* + t u, ascending from 0.
        probe_safety: (N, M) measured change of each safety sample's loss there (nats).
        probe_finetune: (M,) measured change of the mean fine-tuning loss there (nats).
        probe_control: (M,) measured change of the mean control loss; None without control data.
        warnings: sentences for the report.
        lowered: settings that were lowered to keep the cost within its share: (taken, asked for) by name.
    """

    optimizer: str
    finetune_loss: float
    update_norm: float
    overlap: OverlapNulls
    gamma_hat: float
    epsilon_hat: float
    aic_conditions: Sequence[Mapping[str, Any]]
    c_update: Tensor
    c_batches: Tensor
    c_krylov: Tensor
    krylov_t: Tensor
    krylov_beta: float
    hvp_method: str
    hvp_error: float | None
    module_second_order: Tensor
    examples: Sequence[Mapping[str, Any]]
    finetune_rows: int
    warnings: Sequence[str]
    probe_times: Tensor | None = None
    probe_safety: Tensor | None = None
    probe_finetune: Tensor | None = None
    probe_control: Tensor | None = None
    lowered: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
