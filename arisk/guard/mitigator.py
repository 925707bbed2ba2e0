"""The AlignGuard regulariser: its settings, its penalty on a model that trains, how one is built and kept.

`build_mitigator` measures the directions on safety data; a mitigator goes to and from a folder as safetensors
and JSON with a format version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from arisk.base.artifacts import FORMAT_VERSION, read_json, read_tensors, write_tensors, write_text
from arisk.base.errors import ArtifactError, ConfigError, NewerFormatError, NumericsError
from arisk.base.task import SampleSet
from arisk.config.python import PythonSettings
from arisk.config.sections import NonNegativeFloat, PositiveInt
from arisk.guard.directions import (
    FisherMass,
    SafetyDirections,
    Site,
    adapter_sites,
    drift_of,
    fisher_mass,
    require_sound,
    safety_directions,
)
from arisk.guard.terms import (
    Factored,
    SplitDrift,
    block_split,
    fisher_term,
    geodesic_term,
    overlap_term,
    subspace_split,
)

__all__ = [
    "AlignGuardConfig",
    "GuardState",
    "LoRAMitigator",
    "PenaltyTerms",
    "RegularizedLoss",
    "build_mitigator",
    "matched_sites",
    "read_state",
    "write_state",
]


class AlignGuardConfig(PythonSettings):
    """Weights and form of the penalty; the defaults of the weights are those of the peer package."""

    lambda_a: NonNegativeFloat = 0.25
    """λ_A of the Fisher term ‖F^½ΔW_A‖²: drift that safety is sensitive to."""
    lambda_t: NonNegativeFloat = 0.5
    """λ_T of the task term ‖H^½ΔW_T‖²: the rest of the drift."""
    lambda_nc: NonNegativeFloat = 0.1
    """λ_NC of the two collision terms, overlap and geodesic."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of λ_NC that the overlap term has; 0 skips this, the one costly term."""
    beta: NonNegativeFloat = 4.0
    """β in η_j = 1 + βσ(|ΔW_j| − τ), the extra weight of large entries in the overlap term."""
    tau: NonNegativeFloat = 0.01
    """τ in η_j, in units of a weight."""
    overlap_rows: PositiveInt | None = None
    """Output rows per matrix on which the overlap term is estimated, other ones at every call: unbiased,
    and cheap. null: all of them, exactly."""
    task_metric: Literal["identity", "fisher_diagonal"] | Callable[..., Any] = "identity"
    """H. identity: plain ‖ΔW_T‖²; fisher_diagonal: of the fine-tuning loss, rank one per matrix, mean 1;
    or `(weight name, ΔW_T as arisk.guard.Factored) -> scalar tensor` in its place."""
    split: Literal["subspace", "blocks"] = "subspace"
    """ΔW_A. subspace: PΔW with the projector on the safety subspace; blocks: output rows by Fisher mass."""
    rank: PositiveInt | None = None
    """Directions of the safety subspace in ΔW space; default that of the report's subspace, else 32."""
    width: PositiveInt = 32
    """Rows and columns of the core into which each matrix's safety gradients are compressed."""
    metric_batches: PositiveInt = 8
    """Fine-tuning batches that `fisher_diagonal` is measured on."""
    chunk_size: PositiveInt = 8
    """Samples per backward pass while the directions are measured; memory grows with it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random compression; the global random state is not used."""


TENSORS, RECORD = "tensors.safetensors", "record.json"
KIND = "LoRAMitigator"


@dataclass(frozen=True)
class GuardState:
    """What a mitigator is made of, without the model.

    Attributes:
        sites: guarded weights.
        config: its settings.
        reason: why it is skipped, or None.
        directions: the safety subspace, or None.
        metric: Fisher mass of the fine-tuning loss, or None.
        reference: by site, the trained parameters at the reference.
    """

    sites: Sequence[Site]
    config: AlignGuardConfig
    reason: str | None
    directions: SafetyDirections | None
    metric: FisherMass | None
    reference: Sequence[Sequence[Tensor]]


def write_state(
    folder: Path,
    *,
    sites: Sequence[Site],
    config: Mapping[str, Any],
    reason: str | None,
    directions: SafetyDirections | None,
    metric: FisherMass | None,
    reference: Sequence[Sequence[Tensor]],
) -> None:
    """Write the parts of a `GuardState`; `config` is JSON, a custom metric being null.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for i, group in enumerate(reference):
        tensors.update({f"reference.{i}.{j}": kept for j, kept in enumerate(group)})
    if directions is not None:
        tensors.update({"basis": directions.basis, "eigenvalues": directions.eigenvalues})
        for i, (u, v) in enumerate(directions.frames):
            tensors.update({f"frame.{i}.u": u, f"frame.{i}.v": v})
        tensors.update(_mass_tensors("mass", directions.mass))
        shares = {"captured": directions.captured, "explained": directions.explained}
    if metric is not None:
        tensors.update(_mass_tensors("metric", metric))
    body = {
        "format_version": FORMAT_VERSION,
        "type": KIND,
        "sites": [asdict(site) for site in sites],
        "config": config,
        "reason": reason,
        "shares": shares,
    }
    write_tensors(folder / TENSORS, tensors)
    write_text(folder / RECORD, json.dumps(body, indent=1, allow_nan=False) + "\n")


def read_state(folder: Path, task_metric: Callable[..., Any] | None) -> GuardState:
    """Read what `write_state` wrote.

    Raises:
        ArtifactError: a file is missing, damaged, or of a newer format.
        ConfigError: there was a custom metric and none is given.
    """
    try:
        body, tensors = read_json(folder / RECORD), read_tensors(folder / TENSORS)
        if body.get("type") != KIND:
            raise _damaged(folder, f"it holds {body.get('type')!r}")
        sites = [Site(**site) for site in body["sites"]]
        reference = [
            [tensors[f"reference.{i}.{j}"] for j in range(len(site.trained))] for i, site in enumerate(sites)
        ]
        directions = None if "basis" not in tensors else _directions(tensors, len(sites), body["shares"])
        metric = None if "metric.0.rows" not in tensors else _mass("metric", tensors, len(sites))
        settings = dict(body["config"])
    except NewerFormatError:
        raise
    except (ArtifactError, KeyError, TypeError) as err:
        raise _damaged(folder, str(err).splitlines()[0]) from err
    if settings["task_metric"] is None:
        settings["task_metric"] = task_metric
        if task_metric is None:
            raise ConfigError(
                "this mitigator had a custom task metric, which cannot be saved",
                where=str(folder),
                fix="give the same function as `task_metric=` to `load`",
            )
    config = AlignGuardConfig(**settings)
    return GuardState(sites, config, body["reason"], directions, metric, reference)


def _damaged(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"a saved mitigator cannot be read: {why}",
        where=str(folder),
        fix="give the folder that `save` wrote, or build the mitigator again",
    )


def _mass_tensors(name: str, mass: FisherMass) -> dict[str, Tensor]:
    found = {f"{name}.{i}.rows": rows for i, rows in enumerate(mass.rows)}
    return found | {f"{name}.{i}.columns": columns for i, columns in enumerate(mass.columns)}


def _mass(name: str, tensors: Mapping[str, Tensor], sites: int) -> FisherMass:
    return FisherMass(
        [tensors[f"{name}.{i}.rows"] for i in range(sites)],
        [tensors[f"{name}.{i}.columns"] for i in range(sites)],
    )


def _directions(tensors: Mapping[str, Tensor], sites: int, shares: Mapping[str, float]) -> SafetyDirections:
    return SafetyDirections(
        frames=[(tensors[f"frame.{i}.u"], tensors[f"frame.{i}.v"]) for i in range(sites)],
        basis=tensors["basis"],
        eigenvalues=tensors["eigenvalues"],
        mass=_mass("mass", tensors, sites),
        captured=shares["captured"],
        explained=shares["explained"],
    )


@dataclass(frozen=True)
class PenaltyTerms:
    """The weighted terms of the penalty, scalars with gradient.

    Attributes:
        fisher: λ_A‖F^½ΔW_A‖².
        task: λ_T‖H^½ΔW_T‖².
        overlap: λ_NC α · mean η_j|ΔW_A,j ΔW_T,j|, the Riemannian collision term.
        geodesic: λ_NC (1 − α) cos²(ΔW_A, ΔW_T); identically 0 but for rounding with the orthogonal
            projector of `split: subspace`, and kept for parity.
    """

    fisher: Tensor
    task: Tensor
    overlap: Tensor
    geodesic: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the terms."""
        return self.fisher + self.task + self.overlap + self.geodesic

    def named(self) -> dict[str, Tensor]:
        """The terms by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RegularizedLoss:
    """The loss to differentiate, and what it is made of.

    Attributes:
        total_loss: task_loss + fisher_term + task_term + overlap_term + geodesic_term.
        task_loss: as given.
        fisher_term: see `PenaltyTerms`; with the next three.
        task_term: λ_T‖H^½ΔW_T‖².
        overlap_term: the Riemannian collision term.
        geodesic_term: the geodesic collision term.
    """

    total_loss: Tensor
    task_loss: Tensor
    fisher_term: Tensor
    task_term: Tensor
    overlap_term: Tensor
    geodesic_term: Tensor


@dataclass(frozen=True)
class _Constants:
    """What does not change between steps, on the device and in the dtype of the parameters."""

    frames: Sequence[tuple[Tensor, Tensor]]
    basis: Tensor
    eigenvalues: Tensor
    shares: Sequence[Tensor]
    metric: Sequence[tuple[Tensor, Tensor]]


class LoRAMitigator:
    """L = L_task + λ_A‖F^½ΔW_A‖² + λ_T‖H^½ΔW_T‖² + λ_NC[α·mean η_j|Δ_A,jΔ_T,j| + (1−α)cos²(Δ_A, Δ_T)].

    ΔW = s·BA − (its value at the reference) for adapters, θ − θ_ref for weights that train themselves;
    ΔW_A is its part that safety is sensitive to (`config.split`), ΔW_T the rest. All but the overlap
    term are computed on factors of rank r and core width p, in O((r + p)²(out + in)) per matrix; the
    overlap term forms one ΔW at a time.

    With the orthogonal projector of `split: subspace` the last term is identically 0 (the parts are
    orthogonal); it is kept for parity with the paper's form. `split: blocks` is not degenerate.

    Source: arXiv 2508.02079, in the form of the peer package `alignment-risk`. Departures: P and F live
    in ΔW space, not in raw (A, B) coordinates, so A is guarded although a fresh B is 0; F^½ is exact
    on the retained directions; H may be the identity (the default).

    Args:
        model: the model that trains; its parameters are read, never written.
        sites: guarded weights; empty for a skipped mitigator.
        directions: the safety subspace, None for a skipped mitigator.
        config: weights and form.
        metric: Fisher mass of the fine-tuning loss, for `task_metric: fisher_diagonal`.
        reason: why the mitigator is skipped, None where it is not.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        directions: SafetyDirections | None,
        config: AlignGuardConfig,
        *,
        metric: FisherMass | None = None,
        reason: str | None = None,
    ) -> None:
        self.config = config
        self.sites = tuple(sites)
        self.directions = directions
        self.metric = metric
        self.reason = reason
        self._constants: dict[tuple[torch.device, torch.dtype], _Constants] = {}
        if directions is not None:
            require_sound(model, sites)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = [[parameters[name] for name in site.trained] for site in self.sites]
        self._reference: list[list[Tensor]] = []
        self._calls = 0
        self.reset_reference()

    @property
    def status(self) -> Literal["ready", "skipped"]:
        """`skipped` guards nothing: its penalty is 0, and `reason` says why. It is not "no risk"."""
        return "skipped" if self.directions is None else "ready"

    def reset_reference(self) -> None:
        """Anchor ΔW = 0 at the parameters as they are now; the safety directions stay."""
        self._reference = [[p.detach().clone() for p in group] for group in self._parameters]

    def penalty(self, step: int | None = None) -> PenaltyTerms:
        """The weighted terms at the parameters as they are now, with gradient to A and B.

        Args:
            step: names the rows that `overlap_rows` draws; None draws other ones at every call.

        Raises:
            NumericsError: a term is NaN or infinite; names it.
        """
        config = self.config
        if self.directions is None:
            return PenaltyTerms(*(torch.zeros(()) for _ in range(4)))
        split = self._split()
        terms = PenaltyTerms(
            fisher=config.lambda_a * fisher_term(split.coefficients, self._now().eigenvalues),
            task=config.lambda_t * self._task_norm(split.task),
            overlap=_weighted(config.lambda_nc * config.alpha, lambda: self._overlap(split, step), split),
            geodesic=_weighted(config.lambda_nc * (1 - config.alpha), lambda: geodesic_term(split), split),
        )
        for name, value in terms.named().items():
            if not bool(torch.isfinite(value)):
                raise NumericsError(
                    f"the {name} term of the AlignGuard penalty is {float(value.detach())}",
                    where=f"penalty: {name}",
                    fix="lower the learning rate, or check the adapter's weights for NaN",
                )
        return terms

    def regularized_loss(self, task_loss: Tensor) -> RegularizedLoss:
        """The task loss plus the penalty; differentiate `.total_loss`.

        Args:
            task_loss: scalar fine-tuning loss of this step's batch.

        Raises:
            NumericsError: a term is NaN or infinite; names it.
        """
        terms = self.penalty()
        total = task_loss + terms.total.to(task_loss.device)
        return RegularizedLoss(total, task_loss, terms.fisher, terms.task, terms.overlap, terms.geodesic)

    def gradient_norms(self) -> dict[str, float]:
        """‖∇ term‖ over the guarded parameters, by term; `.grad` is left alone.

        Which of the terms acts at all: one whose gradient is far below the task's does nothing.
        """
        if self.directions is None:
            return dict.fromkeys(PenaltyTerms.__dataclass_fields__, 0.0)
        parameters = [p for group in self._parameters for p in group if p.requires_grad]
        with torch.enable_grad():
            named = self.penalty().named()
            return {name: _gradient_norm(value, parameters) for name, value in named.items()}

    def save(self, path: Path | str) -> None:
        """Write directions, reference and settings into a folder, as safetensors and JSON.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        config = self.config.model_dump(exclude={"task_metric"})
        custom = not isinstance(self.config.task_metric, str)
        config["task_metric"] = None if custom else self.config.task_metric
        write_state(
            Path(path),
            sites=self.sites,
            config=json.loads(json.dumps(config)),
            reason=self.reason,
            directions=self.directions,
            metric=self.metric,
            reference=self._reference,
        )

    @classmethod
    def load(
        cls, path: Path | str, model: nn.Module, *, task_metric: Callable[..., Any] | None = None
    ) -> LoRAMitigator:
        """Read a mitigator back onto a model with the same parameter names.

        Args:
            path: the folder that `save` wrote.
            model: the model that trains.
            task_metric: the custom metric, which cannot be saved; needed where there was one.

        Raises:
            ArtifactError: a file is missing, damaged, or of a newer format.
            ConfigError: the model lacks a guarded parameter, or the custom metric is missing.
        """
        state = read_state(Path(path), task_metric)
        found = cls(
            model, state.sites, state.directions, state.config, metric=state.metric, reason=state.reason
        )
        found._reference = [
            [kept.to(p.device, p.dtype) for kept, p in zip(own, group, strict=True)]
            for own, group in zip(state.reference, found._parameters, strict=True)
        ]
        return found

    def _split(self) -> SplitDrift:
        constants = self._now()
        drift = [
            drift_of(site, group, [kept.to(group[0].device) for kept in reference])
            for site, group, reference in zip(self.sites, self._parameters, self._reference, strict=True)
        ]
        if self.config.split == "subspace":
            return subspace_split(drift, constants.frames, constants.basis)
        return block_split(drift, constants.frames, constants.basis, constants.shares)

    def _overlap(self, split: SplitDrift, step: int | None) -> Tensor:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + (self._calls if step is None else step))
        self._calls += 1
        return overlap_term(split, config.beta, config.tau, rows=config.overlap_rows, generator=generator)

    def _task_norm(self, task: Sequence[Factored]) -> Tensor:
        """‖H^½ΔW_T‖² for the configured metric."""
        metric = self.config.task_metric
        if metric == "identity":
            parts = [matrix.squared_norm() for matrix in task]
        elif metric == "fisher_diagonal":
            weights = self._now().metric
            parts = [m.squared_norm(rows, columns) for m, (rows, columns) in zip(task, weights, strict=True)]
        else:
            parts = [metric(site.weight, m) for site, m in zip(self.sites, task, strict=True)]
        return torch.stack(parts).sum()

    def _now(self) -> _Constants:
        """The constants where the parameters are now; a model may move after the mitigator is made."""
        parameter = self._parameters[0][0]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        key = (parameter.device, dtype)
        if key not in self._constants:
            assert self.directions is not None
            self._constants = {key: _constants(self.directions, self.metric, *key)}
        return self._constants[key]


def _weighted(weight: float, value: Callable[[], Tensor], split: SplitDrift) -> Tensor:
    """The product weight · value, not computed where the weight is 0."""
    return weight * value() if weight else split.coefficients.new_zeros(())


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
    if not value.requires_grad or not parameters:
        return 0.0
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [float(gradient.double().norm()) for gradient in gradients if gradient is not None]
    return sum(norm * norm for norm in norms) ** 0.5


def _constants(
    directions: SafetyDirections, metric: FisherMass | None, device: torch.device, dtype: torch.dtype
) -> _Constants:
    mass = directions.mass
    # Half in each part at the mean density of Fisher mass, and never wholly in one.
    densities = [rows / len(columns) for rows, columns in zip(mass.rows, mass.columns, strict=True)]
    shares = [density / (density + mass.density) for density in densities]
    return _Constants(
        frames=[(u.to(device, dtype), v.to(device, dtype)) for u, v in directions.frames],
        basis=directions.basis.to(device, dtype),
        eigenvalues=directions.eigenvalues.to(device, dtype),
        shares=[share.to(device, dtype) for share in shares],
        metric=[] if metric is None else _rank_one(metric, device, dtype),
    )


def _rank_one(metric: FisherMass, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """h_jk = rows_j columns_k, the rank-one fit with the Fisher diagonal's row and column sums, mean 1."""
    scale = metric.density or 1.0
    pairs = zip(metric.rows, metric.columns, strict=True)
    return [
        ((r / (r.sum().clamp(min=1e-300) * scale)).to(device, dtype), c.to(device, dtype)) for r, c in pairs
    ]


#: Directions kept where neither the config nor a report names a rank.
DEFAULT_RANK = 32


def matched_sites(model: nn.Module) -> tuple[list[Site], str | None]:
    """Sites of the active adapters, and what is wrong with them, or None."""
    sites, unmatched = adapter_sites(model)
    if not sites:
        return [], "the model has no trainable LoRA pair (lora_A and lora_B of one linear layer)"
    if unmatched:
        return sites, f"the LoRA parameter {unmatched[0]!r} belongs to no (lora_A, lora_B) pair"
    return sites, None


def build_mitigator(
    model: nn.Module,
    safety: SampleSet | None,
    config: AlignGuardConfig | None = None,
    *,
    sites: Sequence[Site] | None = None,
    finetune: SampleSet | None = None,
    rank: int | None = None,
    require_lora_match: bool = True,
) -> LoRAMitigator:
    """A mitigator anchored at the model as it is, with directions measured on safety data.

    Args:
        model: the model before fine-tuning; left as found.
        safety: safety samples with their loss.
        config: weights and form; default the peer's.
        sites: guarded weights; default the active peft adapters. `weight_sites` names weights that
            train themselves.
        finetune: fine-tuning data, needed by `task_metric: fisher_diagonal` alone.
        rank: directions kept where the config names none.
        require_lora_match: False gives a mitigator that is skipped, with its reason, where a trainable
            LoRA parameter has no partner; True refuses.

    Raises:
        ConfigError: adapter pairs or the data for the metric are missing.
        InputError: a weight cannot be measured.
        NumericsError: a gradient is NaN or infinite, or all are zero.
    """
    config = config or AlignGuardConfig()
    if safety is None:
        raise ConfigError(
            "there are no safety samples to measure the directions on",
            where="build_lora_mitigator",
            fix="call `run` on the pipeline first, or pass `safety=SampleSet(...)`",
        )
    if sites is None:
        sites, problem = matched_sites(model)
        if problem is not None and require_lora_match:
            raise ConfigError(
                problem,
                where="build_lora_mitigator",
                fix="attach a LoRA adapter to linear layers (peft), or pass `require_lora_match=False` "
                "to go on without protection",
            )
        if problem is not None:
            return LoRAMitigator(model, [], None, config, reason=problem)
    metric = None
    if config.task_metric == "fisher_diagonal":
        if finetune is None:
            raise ConfigError(
                "`task_metric: fisher_diagonal` needs fine-tuning data, and there is none",
                where="AlignGuardConfig.task_metric",
                fix="give `finetune` (in the pipeline: fine_tune_dataloader and fine_tune_loss_fn)",
            )
        metric = fisher_mass(
            model, sites, finetune, batches=config.metric_batches, chunk_size=config.chunk_size
        )
    directions = safety_directions(
        model,
        sites,
        safety,
        rank=config.rank or rank or DEFAULT_RANK,
        width=config.width,
        chunk_size=config.chunk_size,
        seed=config.seed,
    )
    return LoRAMitigator(model, sites, directions, config, metric=metric)
