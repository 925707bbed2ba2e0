"""The planned fine-tune as one object: rates by step, optimizer, parameter groups, a step's batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError
from arisk.config.plan import TrainingConfig
from arisk.training.optimizers import Groups, OptimizerKind, arguments_of, optimizer_named
from arisk.training.schedules import flow_times, learning_rates

__all__ = [
    "Recipe",
    "decay_by_coordinate",
    "decaying_names",
    "parameter_groups",
    "recipe_of",
    "require_recipe",
    "start_ratios",
    "step_batches",
    "warmup_steps",
]

#: Settings that only some optimizers read.
OWN_SETTINGS = ("momentum", "betas", "eps")
#: Names of parameters that `transformers.Trainer` decays by no weight.
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
#: Learning rate of adapters of embeddings under LoRA+, as peft sets it.
LORAPLUS_EMBEDDING = 1e-6
#: Peak that this is held against where the plan's own does not matter.
TYPICAL_PEAK = 2e-4


@dataclass(frozen=True)
class Recipe:
    """How the plan trains.

    Attributes:
        training: the plan's settings.
        kind: its optimizer.
        peak: peak learning rate η.
        rates: (T,) learning rate of every step, float64.
        notes: what is carried out otherwise than its name says, one sentence each.
    """

    training: TrainingConfig
    kind: OptimizerKind
    peak: float
    rates: Tensor
    notes: tuple[str, ...]

    @property
    def horizon(self) -> int:
        """Planned optimizer steps T."""
        return len(self.rates)

    @property
    def plain(self) -> bool:
        """Whether the plan is SGD without decay and clipping, which the local model follows exactly."""
        training = self.training
        return self.kind.recursion == "sgd" and not training.weight_decay and training.max_grad_norm is None

    @property
    def momentum(self) -> float:
        """μ of a heavy ball; 0 for an optimizer without one."""
        return self.training.momentum if "momentum" in self.kind.reads else 0.0

    @cached_property
    def times(self) -> Tensor:
        """(T + 1,) flow times, see `arisk.training.schedules.flow_times`."""
        # Shares of the peak are summed, so that equal steps stay equal to the bit.
        return self.peak * flow_times(self.rates / self.peak, momentum=self.momentum)


def recipe_of(training: TrainingConfig, steps: int, *, scale: float = 1.0) -> Recipe:
    """The recipe of `steps` optimizer steps.

    Args:
        training: the plan's settings.
        steps: T.
        scale: multiplies the peak learning rate.

    Raises:
        ConfigError: the optimizer, the schedule or one of their settings is not known.
    """
    kind = optimizer_named(training.optimizer)
    arguments_of(kind, training)
    for name in OWN_SETTINGS:
        default = TrainingConfig.model_fields[name].default
        if name not in kind.reads and getattr(training, name) != default:
            raise ConfigError(
                f"`{name}` is none of the settings of {training.optimizer}",
                where=f"training.{name}",
                fix=f"leave it out; {training.optimizer} takes {', '.join(kind.reads) or 'none of its kind'}",
            )
    warmup = warmup_steps(training, steps)
    peak = training.learning_rate * scale
    rates = learning_rates(
        peak,
        steps,
        schedule=training.schedule,
        warmup_steps=warmup,
        arguments=training.schedule_args,
    )
    return Recipe(training, kind, peak, rates, tuple(_notes(training, kind, warmup)))


def require_recipe(training: TrainingConfig) -> tuple[str, ...]:
    """Refuse a recipe that cannot be carried out, before any model is loaded.

    Returns:
        What is carried out otherwise than its name says, one sentence each.

    Raises:
        ConfigError: a name is not known, or a setting is none that its optimizer or schedule takes.
        MissingExtraError: the optimizer needs a package that is not installed.
    """
    steps = training.max_steps or 200
    recipe = recipe_of(training, steps)
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    group = {"params": [weight], "names": ["weight"], "weight_decay": training.weight_decay, "ratio": 1.0}
    try:
        for part in recipe.kind.build([group], training):
            # Some settings are read in the second step alone.
            part.optimizer.step()
            part.optimizer.step()
    except (ValueError, TypeError) as err:
        raise ConfigError(
            f"{training.optimizer} cannot be built with these settings: {str(err).splitlines()[0]}",
            where="training.optimizer_args",
            fix=f"correct them, or `training.{'`, `training.'.join(recipe.kind.reads) or 'optimizer'}`",
        ) from err
    return recipe.notes


def warmup_steps(training: TrainingConfig, steps: int) -> int:
    """Warm-up steps w: as given, or the share of the run, rounded up."""
    if training.warmup_ratio is not None:
        return math.ceil(steps * training.warmup_ratio)
    return training.warmup_steps


def _notes(training: TrainingConfig, kind: OptimizerKind, warmup: int) -> list[str]:
    notes = [f"{kind.note}."] if kind.note else []
    if kind.age is None:
        notes.append(f"How the state of {kind.name} ages over a leap is not known: leaps leave it alone.")
    if training.schedule == "constant" and warmup:
        notes.append(
            "The schedule `constant` has no warm-up, as in transformers; `constant_with_warmup` has one."
        )
    return notes


def step_batches(number: int, accumulation: int, per_epoch: int | None) -> range:
    """Micro-batches of optimizer step `number` (from 1), counted from 0 over the whole run.

    An epoch ends with a short step where its batches do not divide by the accumulation.

    Args:
        number: the step.
        accumulation: micro-batches of a full step.
        per_epoch: micro-batches of an epoch; None where the data has no known end.
    """
    if per_epoch is None:
        return range((number - 1) * accumulation, number * accumulation)
    steps = math.ceil(per_epoch / accumulation)
    epoch, inside = divmod(number - 1, steps)
    first = epoch * per_epoch + inside * accumulation
    return range(first, min(first + accumulation, (epoch + 1) * per_epoch))


def decaying_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay shrinks: none of a `LayerNorm`, no bias and no norm by name.

    Source: `Trainer.get_decay_parameter_names` of transformers 5.
    """
    found: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        # The outermost module may be of any kind: the rule looks at children.
        if prefix and isinstance(module, nn.LayerNorm):
            continue
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{prefix}.{name}" if prefix else name
            if not UNDECAYED.search(full.lower()):
                found.add(full)
    return found


def _decaying(model: nn.Module, names: Sequence[str], training: TrainingConfig) -> set[str]:
    return set(names) if training.weight_decay_on == "all" else decaying_names(model)


def parameter_groups(
    model: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter], training: TrainingConfig
) -> Groups:
    """Groups of equal decay and learning-rate ratio, in the order of their first parameter.

    Args:
        model: whose modules tell what a parameter is.
        names: the selected parameters.
        parameters: these parameters.
        training: decay and LoRA+ ratio.

    Returns:
        Each with `params`, `names`, `weight_decay` and `ratio` (its learning rate over the plan's).
    """
    decaying = _decaying(model, names, training)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in zip(names, parameters, strict=True):
        decay = training.weight_decay if name in decaying else 0.0
        ratio = _rate_ratio(model, name, parameter.ndim, training, training.learning_rate)
        group = groups.setdefault(
            (decay, ratio), {"params": [], "names": [], "weight_decay": decay, "ratio": ratio}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _rate_ratio(model: nn.Module, name: str, dimensions: int, training: TrainingConfig, peak: float) -> float:
    """LoRA+: B matrices and vectors learn faster, adapters of embeddings at a rate of their own."""
    if training.loraplus_lr_ratio is None:
        return 1.0
    holder = ".".join(name.split(".")[:-2])
    if holder and isinstance(attrgetter(holder)(model), nn.Embedding):
        return LORAPLUS_EMBEDDING / peak
    return training.loraplus_lr_ratio if "lora_B" in name or dimensions == 1 else 1.0


def start_ratios(model: nn.Module, names: Sequence[str], training: TrainingConfig) -> Tensor | None:
    """(P,) learning rate of every coordinate over the plan's, whatever the peak is; None for 1 everywhere."""
    if training.loraplus_lr_ratio is None:
        return None
    of = dict(model.named_parameters(remove_duplicate=False))
    return _spread({n: _rate_ratio(model, n, of[n].ndim, training, TYPICAL_PEAK) for n in names}, of)


def decay_by_coordinate(model: nn.Module, names: Sequence[str], training: TrainingConfig) -> Tensor:
    """(P,) weight decay of every coordinate."""
    of = dict(model.named_parameters(remove_duplicate=False))
    decaying = _decaying(model, names, training)
    return _spread({n: training.weight_decay if n in decaying else 0.0 for n in names}, of)


def _spread(values: Mapping[str, float], parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([torch.full((parameters[n].numel(),), value) for n, value in values.items()])
