"""Where the guarded drift ΔW comes from: LoRA adapters, or trained weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, InputError
from arisk.guard.terms import Factored
from arisk.models.selection import LORA_MARKERS, lora_pairs

__all__ = ["Site", "adapter_sites", "drift_of", "require_sound", "weight_sites"]


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
    """Sites of the active peft adapters, and LoRA parameters that belong to none.

    Args:
        model: a model with linear LoRA layers of peft.

    Returns:
        The sites in the model's order, and the names of trainable LoRA-like parameters without a
        partner (a DoRA magnitude, an embedding adapter, a layer that is not peft's).
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
    matched = {name for site in sites for name in site.trained}
    return sites, [name for name in lora if name not in matched]


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
