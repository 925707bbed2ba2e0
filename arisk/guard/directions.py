"""The safety subspace in ΔW coordinates, compressed to a small core per weight matrix.

The Fisher matrix of the safety loss, F = (1/N) Σ_i vec(M_i) vec(M_i)ᵀ with M_i = ∂ℓ_i/∂W over all guarded
matrices together, has directions as large as the model. Per matrix they are kept as U C Vᵀ, with U (out, p)
and V (in, p') orthonormal and spanning the leading rows and columns of the M_i, and C a small core. The
eigenpairs are those of the compressed Fisher matrix ΠFΠ; where p = out and p' = in (matrices no larger than
the core) nothing is lost, else `captured` says how much of tr F is kept. Nothing of size N × P is ever in
memory.

A site is where the guarded drift ΔW comes from: LoRA adapters, or trained weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, InputError, NumericsError
from arisk.base.task import Batch, SampleSet
from arisk.geometry.spectrum import RELATIVE_FLOOR
from arisk.gradients import (
    ParameterLayout,
    batch_size,
    choose_engine,
    layout_of,
    measuring,
    move_batch,
    per_sample_gradients,
    slice_batch,
)
from arisk.guard.terms import Factored
from arisk.models.selection import LORA_MARKERS, lora_pairs

__all__ = [
    "FisherMass",
    "SafetyDirections",
    "Site",
    "adapter_sites",
    "drift_of",
    "fisher_mass",
    "require_sound",
    "safety_directions",
    "weight_sites",
]


@dataclass(frozen=True)
class Site:
    """One guarded weight matrix W (out, in), its per-sample gradient and what trains it.

    Attributes:
        weight: parameter whose gradient is ∂ℓ/∂W, the gradient with respect to ΔW.
        name_a: A (r, in) of the adapter, None where `weight` itself trains.
        name_b: B (out, r), likewise.
        scaling: ΔW = scaling · B A − reference.
        transposed: `weight` is stored (in, out), as GPT-2's Conv1D does.
    """

    weight: str
    name_a: str | None = None
    name_b: str | None = None
    scaling: float = 1.0
    transposed: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that move W."""
        if self.name_a is None or self.name_b is None:
            return (self.weight,)
        return (self.name_a, self.name_b)

    def matrix(self, weight: Tensor) -> Tensor:
        """A parameter-shaped tensor as (…, out, in), in at least float32."""
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return wide.mT if self.transposed else wide


def adapter_sites(model: nn.Module) -> tuple[list[Site], list[str]]:
    """Sites of the active peft adapters and of hand-written LoRA layers, and LoRA parameters of none.

    A hand-written layer holds parameters `lora_A` (r, in) and `lora_B` (out, r) beside its frozen `weight`,
    as in loralib, or beside one layer that has it; ΔW = s B A, s its `scaling`, else `lora_alpha`/r, else 1.
    One that merges A and B into its weight in evaluation mode is measured unmerged.

    Args:
        model: a model with linear LoRA layers.

    Returns:
        The sites in the model's order, and the names of trainable LoRA-like parameters without a
        partner (a DoRA magnitude, an embedding adapter).
    """
    lora = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(marker in name.lower() for marker in LORA_MARKERS)
    ]
    modules = dict(model.named_modules())
    sites: list[Site] = []
    for pair in lora_pairs(model, lora):
        prefix = pair.name_a.partition(".lora_A.")[0]
        base: Any = getattr(modules[prefix], "base_layer", None)
        if isinstance(getattr(base, "weight", None), Tensor):
            transposed = type(base).__name__ == "Conv1D"
            sites.append(
                Site(f"{prefix}.base_layer.weight", pair.name_a, pair.name_b, pair.scaling, transposed)
            )
    sites += _written_by_hand(model, set(lora))
    matched = {name for site in sites for name in site.trained}
    return sites, [name for name in lora if name not in matched]


def _written_by_hand(model: nn.Module, lora: set[str]) -> list[Site]:
    """Sites of modules that hold `lora_A` and `lora_B` themselves."""
    sites: list[Site] = []
    for prefix, module in model.named_modules():
        own = f"{prefix}." if prefix else ""
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        names = (f"{own}lora_A", f"{own}lora_B")
        if not (isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and lora.issuperset(names)):
            continue
        weight = _frozen_weight(module, (b.shape[0], a.shape[1]))
        if weight is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            continue
        sites.append(Site(f"{own}{weight[0]}", *names, _scaling(module, a.shape[0]), weight[1]))
    return sites


def _frozen_weight(module: nn.Module, shape: tuple[int, int]) -> tuple[str, bool] | None:
    """Name below the module of the one weight that fits, and whether it is stored (in, out)."""
    near = [("weight", getattr(module, "weight", None))]
    near += [(f"{name}.weight", getattr(child, "weight", None)) for name, child in module.named_children()]
    turned = bool(getattr(module, "fan_in_fan_out", False))
    wanted = shape[::-1] if turned else shape
    fitting = [name for name, w in near if isinstance(w, nn.Parameter) and tuple(w.shape) == wanted]
    return (fitting[0], turned) if len(fitting) == 1 else None


def _scaling(module: nn.Module, rank: int) -> float:
    for name, share in (("scaling", 1.0), ("lora_alpha", 1 / rank), ("alpha", 1 / rank)):
        value: Any = getattr(module, name, None)
        if isinstance(value, int | float):
            return float(value) * share
    return 1.0


def weight_sites(names: Sequence[str]) -> list[Site]:
    """Sites of parameters that train themselves: ΔW = θ − θ_ref, flattened to a matrix."""
    return [Site(name) for name in names]


def require_sound(model: nn.Module, sites: Sequence[Site]) -> None:
    """Check that every site can be measured, before any data is touched.

    Raises:
        ConfigError: nothing to guard, an unknown name, or one weight guarded twice.
        InputError: a weight is quantised, shared with another module, or does not fit its adapter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [n for site in sites for n in (site.weight, *site.trained) if n not in parameters]
    if not sites or unknown:
        raise ConfigError(
            f"the model has no parameter {unknown[0]!r}" if unknown else "there is nothing to guard",
            where="guarded weights",
            fix="attach a LoRA adapter before the mitigator is built, or name trained parameters",
        )
    if len({site.weight for site in sites}) != len(sites):
        raise ConfigError(
            "one weight is moved by two active adapters",
            where="guarded weights",
            fix="activate the adapter that trains (`model.set_adapter`), and freeze the other",
        )
    owners: dict[int, int] = {}
    for parameter in parameters.values():
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for site in sites:
        _require_measurable(site, parameters, shared=owners[id(parameters[site.weight])] > 1)


def _require_measurable(site: Site, parameters: Mapping[str, nn.Parameter], *, shared: bool) -> None:
    weight = parameters[site.weight]
    problem: tuple[str, str] | None = None
    if not weight.is_floating_point():
        problem = ("is quantised, so its gradient cannot be measured", "load the model unquantised")
    elif shared and site.name_a is not None:
        problem = ("is tied to another module", "leave this module out of the adapter's targets")
    elif site.name_a is not None and site.name_b is not None:
        shape = (parameters[site.name_b].shape[0], parameters[site.name_a].shape[1])
        own = tuple(weight.shape[::-1] if site.transposed else weight.shape)
        if shape != own:
            problem = (f"is {own} and its adapter {shape}", "adapt linear layers only")
    if problem is not None:
        raise InputError(f"the weight {site.weight!r} {problem[0]}", where=site.weight, fix=problem[1])


def drift_of(site: Site, now: Sequence[Tensor], reference: Sequence[Tensor]) -> Factored:
    """ΔW against the reference, factored for an adapter.

    s(BA − B₀A₀) = [s(B − B₀), sB₀] · [A; A − A₀]: no difference of large products is taken, so a drift
    far below the adapter's size keeps its digits. At the reference the gradient of any quadratic
    penalty is 0. With B = 0 against another reference it reaches B, and A only where B is not 0:
    ∂/∂A = s Bᵀ ∂/∂ΔW. A fresh adapter is thus guarded through both factors from the first step of
    training on, unlike by a penalty on raw (A, B) coordinates whose directions have no part in A.

    Args:
        site: the guarded weight.
        now: the parameters of `site.trained`.
        reference: their values at the reference.
    """
    if len(now) == 1:
        change = _wide(now[0]) - _wide(reference[0])
        # A vector is a column, a convolution kernel a matrix of its output channels.
        return Factored(site.matrix(change.reshape(change.shape[0], -1)))
    a, b = _wide(now[0]), _wide(now[1])
    a0, b0 = _wide(reference[0]), _wide(reference[1])
    left = torch.cat([site.scaling * (b - b0), site.scaling * b0], dim=1)
    return Factored(left, torch.cat([a, a - a0]))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


#: Extra columns of the random test matrices.
OVERSAMPLE = 8


@dataclass(frozen=True)
class FisherMass:
    """Row and column sums of the Fisher diagonal of each matrix.

    Attributes:
        rows: (out,) float64 by site: Σ_k mean_i M_i,jk².
        columns: (in,) float64 by site.
    """

    rows: Sequence[Tensor]
    columns: Sequence[Tensor]

    @property
    def trace(self) -> float:
        """Trace of F over all sites (nats² per unit weight²)."""
        return float(sum(row.sum() for row in self.rows))

    @property
    def density(self) -> float:
        """Mean of the Fisher diagonal over all P entries."""
        return self.trace / sum(len(r) * len(c) for r, c in zip(self.rows, self.columns, strict=True))


@dataclass(frozen=True)
class SafetyDirections:
    """Leading eigenpairs of the safety Fisher matrix over ΔW.

    Attributes:
        frames: U (out, p) and V (in, p') float64 with orthonormal columns, by site.
        basis: (k, C) float64 orthonormal rows, C = Σ p p': cores of the directions b_j.
        eigenvalues: (k,) float64, descending (nats² per unit weight²).
        mass: row and column sums of the Fisher diagonal, not compressed.
        captured: share of tr F inside the frames, in [0, 1].
        explained: Σ_j λ_j / tr F, in [0, 1].
    """

    frames: Sequence[tuple[Tensor, Tensor]]
    basis: Tensor
    eigenvalues: Tensor
    mass: FisherMass
    captured: float
    explained: float


def safety_directions(
    model: nn.Module,
    sites: Sequence[Site],
    samples: SampleSet,
    *,
    rank: int,
    width: int,
    chunk_size: int = 8,
    seed: int = 0,
) -> SafetyDirections:
    """Leading eigenpairs of F over ΔW, from two passes over the safety samples.

    Args:
        model: at the point whose safety is to be kept; left as found.
        sites: the guarded weights.
        samples: safety samples with their loss.
        rank: k wanted; fewer where F has fewer eigenvalues above 1e-10 of the largest.
        width: largest p and p'.
        chunk_size: samples per backward pass.
        seed: seed of the random test matrices.

    Raises:
        NumericsError: a gradient is NaN or infinite, or all are zero.
        ConfigError, InputError: the sites cannot be measured.
    """
    require_sound(model, sites)
    run = _Run(model, sites, samples, chunk_size)
    frames, mass = _frames(run, width, seed)
    cores = _sample_cores(run, frames)
    if mass.trace == 0:
        raise NumericsError(
            "every safety gradient is exactly zero",
            where="safety directions",
            fix="check that the safety loss depends on the guarded weights",
        )
    _, singular, basis = torch.linalg.svd(cores / len(cores) ** 0.5, full_matrices=False)
    values = singular.square()
    kept = values > RELATIVE_FLOOR * values[0]
    values, basis = values[kept][:rank], basis[kept][:rank]
    captured = float(cores.square().sum()) / len(cores) / mass.trace
    return SafetyDirections(
        frames, basis.contiguous(), values, mass, min(captured, 1.0), float(values.sum()) / mass.trace
    )


def fisher_mass(
    model: nn.Module, sites: Sequence[Site], samples: SampleSet, *, batches: int, chunk_size: int = 8
) -> FisherMass:
    """Row and column sums of the Fisher diagonal of a loss, from its first batches.

    Args:
        model: left as found.
        sites: the guarded weights.
        samples: any data set with its loss.
        batches: batches read.
        chunk_size: samples per backward pass.

    Raises:
        NumericsError: a gradient is NaN or infinite.
    """
    require_sound(model, sites)
    collector = _MassCollector(len(sites))
    _Run(model, sites, samples, chunk_size, batches).sweep(lambda _at, i, block: collector.add(i, block))
    return collector.result()


class _Run:
    """Passes over samples: gradients with respect to the guarded matrices, chunk by chunk."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        samples: SampleSet,
        chunk_size: int,
        batches: int | None = None,
    ) -> None:
        self.model, self.sites, self.samples = model, sites, samples
        self.chunk_size, self.batches = chunk_size, batches
        self.layout: ParameterLayout = layout_of(model, [site.weight for site in sites])
        self.engine: str | None = None

    def chunks(self) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        for batch in islice(iter(self.samples.batches), self.batches):
            for start in range(0, batch_size(batch), self.chunk_size):
                stop = min(start + self.chunk_size, batch_size(batch))
                yield move_batch(slice_batch(batch, start, stop), device)

    def sweep(self, take: Callable[[int, int, Tensor], None]) -> int:
        """Call `take(first sample, site number, M (B, out, in))` for every chunk; return N."""
        place = {site.weight: i for i, site in enumerate(self.sites)}
        offset = 0
        with measuring(self.model, self.layout):
            for chunk in self.chunks():
                if self.engine is None:
                    choice = choose_engine(self.model, chunk, self.samples.loss_fn, self.layout, "auto")
                    self.engine = choice.engine

                def sink(name: str, block: Tensor, at: int = offset) -> None:
                    i = place[name]
                    rows = block.detach().reshape(*block.shape[:2], -1)
                    take(at, i, self.sites[i].matrix(rows))

                self._gradients(chunk, sink, offset)
                offset += batch_size(chunk)
        if offset == 0:
            raise NumericsError(
                "there are no samples to measure",
                where=f"data set {self.samples.name!r}",
                fix="give at least one batch (a one-shot iterator can be read only once)",
            )
        return offset

    def _gradients(self, chunk: Any, sink: Callable[[str, Tensor], None], offset: int) -> None:
        assert self.engine is not None
        loss_fn = self.samples.loss_fn
        per_sample_gradients(self.model, chunk, loss_fn, self.layout, sink, engine=self.engine, offset=offset)


class _MassCollector:
    """Sums of squared entries by row and column of each matrix."""

    def __init__(self, sites: int) -> None:
        self.rows: list[Any] = [0.0] * sites
        self.columns: list[Any] = [0.0] * sites
        self.samples = [0] * sites

    def add(self, i: int, block: Tensor) -> None:
        square = block.square().sum(0)
        self.rows[i] = self.rows[i] + square.sum(1).to("cpu", torch.float64)
        self.columns[i] = self.columns[i] + square.sum(0).to("cpu", torch.float64)
        self.samples[i] += len(block)

    def result(self) -> FisherMass:
        return FisherMass(
            [row / n for row, n in zip(self.rows, self.samples, strict=True)],
            [column / n for column, n in zip(self.columns, self.samples, strict=True)],
        )


class _Range:
    """Leading `width` left singular vectors of Σ_i M_i M_iᵀ by a random range finder, in one pass."""

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        self.width = width
        self.test: Tensor | None = None
        self.total: Tensor | None = None
        if size > width:
            self.test = torch.randn(size, min(size, width + OVERSAMPLE), generator=generator)
        self.size = size

    def add(self, block: Tensor) -> None:
        """Add M (B, size, other)."""
        if self.test is None:
            return
        test = self.test.to(block.device, block.dtype)
        part = torch.bmm(block, block.mT @ test).sum(0).to("cpu", torch.float64)
        self.total = part if self.total is None else self.total + part

    def basis(self) -> Tensor:
        """(size, p) float64 with orthonormal columns; the identity where size ≤ width."""
        if self.total is None:
            return torch.eye(self.size, dtype=torch.float64)
        return torch.linalg.svd(self.total, full_matrices=False)[0][:, : self.width].contiguous()


def _frames(run: _Run, width: int, seed: int) -> tuple[list[tuple[Tensor, Tensor]], FisherMass]:
    """U and V of every site, and the Fisher mass, from one pass."""
    generator = torch.Generator().manual_seed(seed)
    collector = _MassCollector(len(run.sites))
    ranges: dict[int, tuple[_Range, _Range]] = {}

    def take(_at: int, i: int, block: Tensor) -> None:
        collector.add(i, block)
        ranges[i][0].add(block)
        ranges[i][1].add(block.mT)

    parameters = dict(run.model.named_parameters(remove_duplicate=False))
    for i, site in enumerate(run.sites):
        weight = parameters[site.weight]
        out, other = site.matrix(weight.detach().reshape(weight.shape[0], -1)).shape
        ranges[i] = (_Range(out, width, generator), _Range(other, width, generator))
    run.sweep(take)
    return [(ranges[i][0].basis(), ranges[i][1].basis()) for i in range(len(run.sites))], collector.result()


def _sample_cores(run: _Run, frames: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(N, C) float64 the compressed gradients UᵀM_iV of all sites, one row per sample."""
    rows: dict[int, list[Tensor]] = {}

    def take(_at: int, i: int, block: Tensor) -> None:
        u, v = (frame.to(block.device, block.dtype) for frame in frames[i])
        core = (u.T @ block @ v).flatten(1).to("cpu", torch.float64)
        rows.setdefault(i, []).append(core)

    run.sweep(take)
    return torch.cat([torch.cat(rows[i]) for i in range(len(frames))], dim=1)
