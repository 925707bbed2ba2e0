"""Which parameters train: all of them, those of an adapter, or those matching name patterns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from arisk.base.errors import ConfigError
from arisk.base.task import LoraPair
from arisk.config.plan import ParameterGlobs

__all__ = ["LORA_MARKERS", "allowed_parameters", "lora_names", "lora_pairs", "select_parameters"]

#: A parameter whose name contains one of these (case ignored) belongs to a LoRA adapter.
LORA_MARKERS = ("lora_", "lora_A", "lora_B")


def select_parameters(model: nn.Module, choice: str | ParameterGlobs) -> list[str]:
    """Names of the selected parameters in the model's order; tied parameters stand once.

    Args:
        model: the model, adapter attached.
        choice: "full" (every floating-point parameter; of a model with frozen ones, those that
            require a gradient), "lora" (its LoRA matrices alone), "auto" (what requires a gradient where
            there is an adapter: with its biases and `modules_to_save`; else full), or include / exclude
            patterns.

    Raises:
        ConfigError: nothing matches, or a pattern matches nothing.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    lora = lora_names(model)
    if isinstance(choice, ParameterGlobs):
        return _matching([name for name, _ in named], choice)
    if choice == "lora":
        return _require(lora, "mode is lora, and the model has no LoRA parameters", named)
    trainable = [name for name, p in named if p.requires_grad]
    if choice == "auto" and lora:
        return trainable or lora
    trainable = trainable or [name for name, _ in named]
    return _require(trainable, "the model has no floating-point parameters", named)


def lora_names(model: nn.Module, markers: Sequence[str] = LORA_MARKERS) -> list[str]:
    """Names of floating-point parameters that contain a marker, case ignored.

    Where some of them require a gradient, only those: a frozen adapter may lie beside one that trains.
    """
    wanted = [marker.lower() for marker in markers]
    found = {
        name: p.requires_grad
        for name, p in model.named_parameters()
        if p.is_floating_point() and any(marker in name.lower() for marker in wanted)
    }
    return [name for name, trained in found.items() if trained] or list(found)


def allowed_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Exactly these parameters, in the model's order.

    Args:
        model: the model.
        names: as `named_parameters` gives them; all of them must require a gradient.

    Raises:
        ConfigError: names are missing, frozen or given twice; every one is named.
    """
    parameters = dict(model.named_parameters())
    wrong = {
        "not in the model": [name for name in dict.fromkeys(names) if name not in parameters],
        "frozen": [n for n in dict.fromkeys(names) if n in parameters and not parameters[n].requires_grad],
        "given twice": [name for name in dict.fromkeys(names) if list(names).count(name) > 1],
    }
    said = [f"{why}: {', '.join(map(repr, which))}" for why, which in wrong.items() if which]
    if said or not names:
        close = [difflib.get_close_matches(n, parameters, n=1) for n in wrong["not in the model"]]
        near = [f"{n!r} → {c[0]!r}" for n, c in zip(wrong["not in the model"], close, strict=True) if c]
        raise ConfigError(
            "parameter names that cannot be selected: " + "; ".join(said)
            if said
            else "no parameter is named",
            where="fisher.parameter_names",
            fix=f"did you mean {', '.join(near)}?"
            if near
            else "take names from `model.named_parameters()` that require a gradient, each once",
        )
    return [name for name in parameters if name in set(names)]


def _require(names: list[str], what: str, named: Sequence[tuple[str, nn.Parameter]]) -> list[str]:
    if names:
        return names
    example = named[0][0] if named else "none"
    raise ConfigError(
        f"{what} (first parameter: {example})",
        where="model.parameters",
        fix="add an `adapter` section (or attach adapters in Python), or use `full`",
    )


def _matching(names: list[str], globs: ParameterGlobs) -> list[str]:
    """Names matched by an include pattern and by no exclude pattern."""
    for kind, patterns in (("include", globs.include), ("exclude", globs.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"the {kind} pattern {pattern!r} matches no parameter",
                    where=f"model.parameters.{kind}",
                    fix=f"use patterns such as '*mlp*'; names look like {names[0]!r}",
                )
    kept = [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in globs.include)
        and not any(fnmatchcase(name, pattern) for pattern in globs.exclude)
    ]
    if not kept:
        raise ConfigError(
            "the exclude patterns leave no parameter",
            where="model.parameters",
            fix="exclude fewer, or include more",
        )
    return kept


def lora_pairs(model: nn.Module, names: Sequence[str]) -> list[LoraPair]:
    """Adapters ΔW = scaling · B A among the selected parameters, for peft's linear LoRA layers.

    Variants whose ΔW is another function of A and B (DoRA) and those of fused experts, whose A and B hold
    one block per expert, are none.
    """
    selected = set(names)
    pairs: list[LoraPair] = []
    for prefix, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, dict) or not hasattr(module, "lora_A"):
            continue
        if getattr(module, "num_experts", 1) != 1:
            continue
        for adapter, factor in scaling.items():
            if adapter in getattr(module, "lora_variant", {}):
                continue
            a, b = f"{prefix}.lora_A.{adapter}.weight", f"{prefix}.lora_B.{adapter}.weight"
            if a in selected and b in selected:
                pairs.append(LoraPair(a, b, float(factor)))
    return pairs
