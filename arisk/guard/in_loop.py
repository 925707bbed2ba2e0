"""The protections of `arisk guard` for a training loop of one's own, or for `Trainer`.

What is added to the loss has a `penalty()` whose `total` is a scalar with gradient, as a `LoRAMitigator`
has: add it in the loop, or give it to `GuardedTrainerMixin` as `mitigator`. Weights read off the run are
observers: `begin`, `step` after every optimizer step, `end`; `arisk.models.trainer.following` makes a
callback of one.

A run that is resumed from a checkpoint makes them anew, of the adapter that the first process had: what of θ*
and of directions belongs to the LoRA matrices A, which are drawn at random, is wrong for another draw.

The model may move to another device after a protection was made, as `Trainer(…)` moves it: rows, references
and directions follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import SampleSet
from arisk.gradients import ParameterLayout, layout_of, measuring
from arisk.guard.afterwards import Averages, between
from arisk.guard.minibatches import SafetyBatches
from arisk.guard.plan import gradients_of, put_gradients
from arisk.guard.relaxation import relax
from arisk.guard.rivals import ewc_penalty, fisher_diagonals, outside, safety_subspace, without_conflict
from arisk.models.anchored import AlignedPoint, kl_to_aligned
from arisk.training.loop import put

__all__ = [
    "Addition",
    "MovePart",
    "Relaxation",
    "RunAverage",
    "Total",
    "consolidation",
    "divergence",
    "project_against",
    "project_outside",
    "projection",
    "replay",
    "subspace_projection",
    "trained_layout",
]


@dataclass(frozen=True)
class Total:
    """A penalty's value, a scalar with gradient (nats)."""

    total: Tensor


@dataclass(frozen=True)
class Addition:
    """Something that is added to the training loss; every call of `penalty` takes the next minibatch.

    Attributes:
        name: which protection it is, for messages.
        value: its weighted value at the parameters as they are.
    """

    name: str
    value: Callable[[], Tensor]

    def penalty(self) -> Total:
        """The value to add, with gradient.

        Raises:
            NumericsError: it is NaN or infinite.
        """
        total = self.value()
        if not bool(torch.isfinite(total)):
            raise NumericsError(
                f"the protection diverges: the loss that {self.name} adds is {float(total.detach())}",
                where=f"penalty: {self.name}",
                fix="check the loss of the safety rows, or lower the weight or the learning rate",
            )
        return Total(total)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ConfigError(
            "no parameter of the model trains", where="guard", fix="attach the adapter, or unfreeze, first"
        )
    return found


def trained_layout(model: nn.Module) -> ParameterLayout:
    """Layout of the parameters that train now.

    Raises:
        ConfigError: there are none.
    """
    known = {id(p) for p in _trained(model)}
    return layout_of(model, [name for name, p in model.named_parameters() if id(p) in known])


def _minibatches(model: nn.Module, samples: SampleSet, rows: int, seed: int) -> Callable[[], object]:
    stream = SafetyBatches(samples, rows, seed, next(model.parameters()).device)
    number = 0

    def following() -> object:
        nonlocal number
        number += 1
        return stream.at(number, next(model.parameters()).device)

    return following


def _follow(tensors: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors where their parameters are by now; they stay there."""
    tensors[:] = [tensor.to(p.device) for tensor, p in zip(tensors, parameters, strict=True)]
    return tensors


class _FirstAdapter:
    """The LoRA matrices A as they are now, to tell those that a checkpoint puts in place from another draw.

    The cosine of two draws of n entries has a standard deviation of 1/√n; training turns A much less.
    """

    def __init__(self, model: nn.Module, what: str) -> None:
        self.what = what
        self.start = {n: p.detach().clone() for n, p in model.named_parameters() if _drawn(n, p)}

    def require(self, model: nn.Module) -> None:
        """Check that the model's A go on from these.

        Raises:
            ConfigError: they are another draw.
        """
        now = {n: p.detach() for n, p in model.named_parameters() if n in self.start}
        pairs = [
            (self.start[n].flatten().to(p.device).double(), p.flatten().double()) for n, p in now.items()
        ]
        dot = sum(float(a @ b) for a, b in pairs)
        size = math.prod(math.sqrt(sum(float(x @ x) for x in one)) for one in zip(*pairs, strict=True))
        count = sum(len(a) for a, _ in pairs)
        if pairs and dot < min(MOST, DEVIATIONS / math.sqrt(count)) * size:
            raise ConfigError(
                f"{self.what} holds other LoRA matrices A than the resumed run: they are drawn at random",
                where="guard: a run that goes on from a checkpoint",
                fix="make it of the first run's adapter: attach it with the same seed, or save it before the "
                "first run and load it",
            )


#: Standard deviations from 0 below which the cosine of A at two times is that of two draws; and at most so
#: much, where A are few numbers.
DEVIATIONS, MOST = 4.0, 0.5


def _drawn(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and "lora_a" in name.lower()


def replay(
    model: nn.Module, samples: SampleSet, *, weight: float = 0.3, rows: int = 8, seed: int = 0
) -> Addition:
    """λ L_safety on a minibatch of these rows: safety rows, own refusals, or rows at risk.

    Args:
        model: the model that trains.
        samples: the rows with their loss, such as `own_refusals` or `rows_at_risk` give.
        weight: λ.
        rows: rows of a minibatch.
        seed: of their order.
    """
    upcoming = _minibatches(model, samples, rows, seed)
    return Addition("replay", lambda: weight * samples.loss_fn(model, upcoming()).mean())


def divergence(
    model: nn.Module, samples: SampleSet, *, weight: float = 1.0, rows: int = 8, seed: int = 0
) -> Addition:
    """λ KL(p_aligned ‖ p_θ) on a minibatch of safety rows; the aligned model is this one as it is now.

    Args:
        model: a causal LM before it trains.
        samples: safety rows.
        weight: λ.
        rows: rows of a minibatch.
        seed: of their order.

    Raises:
        ConfigError: no parameter trains.
    """
    upcoming, aligned = _minibatches(model, samples, rows, seed), AlignedPoint(_trained(model))

    def value() -> Tensor:
        return weight * kl_to_aligned(model, upcoming(), aligned).mean()  # pyright: ignore[reportArgumentType] - a batch of a causal LM

    return Addition("divergence", value)


def consolidation(model: nn.Module, samples: SampleSet, *, weight: float) -> Addition:
    """λ Σ_j F_jj (θ_j − θ*_j)², see `arisk.guard.ewc_penalty`; θ* and F are taken now.

    Args:
        model: the model before it trains. For a run that is resumed its adapter must be the first run's, A
            and all: attached with the same seed, or saved and loaded. The first value refuses another draw.
        samples: safety rows.
        weight: λ.

    Raises:
        ConfigError: no parameter trains.
        NumericsError: a gradient is not finite.
    """
    parameters, layout = _trained(model), trained_layout(model)
    with measuring(model, layout):
        diagonals = fisher_diagonals(model, layout, samples)
    reference = [p.detach().clone() for p in parameters]
    unchecked = [_FirstAdapter(model, "consolidation(…)")]

    def value() -> Tensor:
        while unchecked:
            unchecked.pop().require(model)
        here = _follow(reference, parameters), _follow(diagonals, parameters)
        return weight * ewc_penalty(parameters, *here)

    return Addition("consolidation", value)


def project_against(parameters: Sequence[nn.Parameter], loss: Tensor) -> float:
    """Take out of `.grad` what is against ∇loss, see `arisk.guard.without_conflict`.

    Args:
        parameters: what trains.
        loss: of safety rows here, with gradient.

    Returns:
        The cosine between both gradients before.

    Raises:
        NumericsError: ∇loss is NaN or infinite; `.grad` is then left alone.
    """
    safety = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    filled = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, safety, strict=True)]
    changed, cosine = without_conflict(gradients_of(parameters), filled)
    put_gradients(parameters, changed)
    return cosine


def project_outside(parameters: Sequence[nn.Parameter], directions: Tensor) -> float:
    """Take these directions out of `.grad`; returns the share that was taken, see `arisk.guard.outside`.

    Args:
        parameters: what trains.
        directions: (k, P) orthonormal rows.
    """
    changed, share = outside(gradients_of(parameters), directions)
    put_gradients(parameters, changed)
    return share


def projection(model: nn.Module, samples: SampleSet, *, rows: int = 8, seed: int = 0) -> Callable[[], float]:
    """Takes out of `.grad` what is against a safety minibatch's gradient; call it before clipping.

    Args:
        model: the model that trains.
        samples: safety rows.
        rows: rows of a minibatch.
        seed: of their order.

    Returns:
        A function without arguments; it returns the cosine between both gradients before, and raises
        NumericsError where the safety gradient is NaN or infinite.

    Raises:
        ConfigError: no parameter trains.
    """
    parameters, upcoming = _trained(model), _minibatches(model, samples, rows, seed)

    def project() -> float:
        with torch.enable_grad():
            loss = samples.loss_fn(model, upcoming()).mean()
        return project_against(parameters, loss)

    return project


def subspace_projection(model: nn.Module, samples: SampleSet, *, rank: int = 32) -> Callable[[], float]:
    """Takes the leading safety directions, as they are now, out of `.grad`; call it before clipping.

    Args:
        model: the model before it trains; in a run that is resumed with the adapter of the first, as for
            `consolidation`.
        samples: N safety rows; N × P gradients of what trains are held in memory.
        rank: directions.

    Returns:
        A function without arguments; it returns the share of the gradient that was taken, in [0, 1].

    Raises:
        ConfigError: no parameter trains.
        NumericsError: a gradient is NaN or infinite, or all are zero.
    """
    parameters, layout = _trained(model), trained_layout(model)
    with measuring(model, layout):
        directions = [safety_subspace(model, layout, samples, rank=rank)]
    unchecked = [_FirstAdapter(model, "subspace_projection(…)")]

    def project() -> float:
        while unchecked:
            unchecked.pop().require(model)
        return project_outside(parameters, _follow(directions, parameters[:1])[0])

    return project


def _resumed(what: str, fix: str) -> ConfigError:
    return ConfigError(
        f"the run goes on from a checkpoint, and {what} is not known", where="guard: observer", fix=fix
    )


class RunAverage:
    """Puts the mean of the weights along the run in place of the last ones, see `arisk.guard.Averages`.

    Args:
        share: the share of the run that it looks back on, in (0, 1].
    """

    def __init__(self, share: float = 0.2) -> None:
        self.share = share
        self._averages: Averages | None = None

    def begin(self, model: nn.Module, steps: int, done: int = 0) -> None:
        """Start at the aligned model.

        Args:
            model: as it is before the first step.
            steps: planned optimizer steps.
            done: those that lie behind, in a run that is resumed.

        Raises:
            ConfigError: steps lie behind, whose weights are not in the mean.
        """
        if done:
            raise _resumed("the mean so far", "train in one run, or use `MovePart(alpha, start=model)`")
        self._averages = Averages(_trained(model), [self.share], steps)

    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        assert self._averages is not None
        self._averages()

    def end(self) -> None:
        """Put the mean in place."""
        assert self._averages is not None
        put(self._averages.parameters, self._averages.means[self.share])


class MovePart:
    """Leaves θ* + α(θ_T − θ*) after the run, see `arisk.guard.between`.

    Args:
        alpha: α in [0, 1].
        start: the model at θ*, whose weights are copied now; a run that is resumed from a checkpoint needs
            it, with the first run's adapter, A and all: attached with the same seed, or saved and loaded.
            Default: the model as `begin` finds it.
    """

    def __init__(self, alpha: float, start: nn.Module | None = None) -> None:
        self.alpha = alpha
        self._parameters: list[nn.Parameter] = []
        self._given = None if start is None else [p.detach().clone() for p in _trained(start)]
        self._adapter = None if start is None else _FirstAdapter(start, "MovePart(start=…)")
        self._start: list[Tensor] = []

    def begin(self, model: nn.Module, steps: int, done: int = 0) -> None:
        """Keep the aligned model's weights, unless `start` gave them.

        Args:
            model: the model that trains.
            steps: planned optimizer steps.
            done: those that lie behind, in a run that is resumed.

        Raises:
            ConfigError: steps lie behind and no start was given, or one of another adapter; or other
                parameters train than at the start.
        """
        del steps
        self._parameters = _trained(model)
        if self._given is None and done:
            raise _resumed("the aligned model", "give it: `MovePart(alpha, start=model)` before `train()`")
        self._start = self._given or [p.detach().clone() for p in self._parameters]
        if [p.shape for p in self._start] != [p.shape for p in self._parameters]:
            raise ConfigError(
                "other parameters train than at the start",
                where="MovePart(start=…)",
                fix="attach the adapter, or unfreeze, before `start` is given",
            )
        if done and self._adapter is not None:
            self._adapter.require(model)

    def step(self) -> None:
        """Nothing is done on the way."""

    def end(self) -> None:
        """Take the move back to its part."""
        there = [start.to(p.device) for start, p in zip(self._start, self._parameters, strict=True)]
        put(self._parameters, between(there, [p.detach() for p in self._parameters], self.alpha))


class Relaxation:
    """Goes down a penalty after every optimizer step, in place of adding it to the loss: `arisk.guard.relax`.

    Args:
        value: v ≥ 0 at the parameters as they are, with gradient, 0 at the aligned model: `value` of
            `consolidation`, or `lambda: mitigator.penalty().fisher`. Its weight does not matter.
        factor: c of Polyak's step, in (0, 4).
        repeats: steps down after each optimizer step.
    """

    def __init__(self, value: Callable[[], Tensor], *, factor: float = 1.5, repeats: int = 3) -> None:
        self.value, self.factor, self.repeats = value, factor, repeats
        self._parameters: list[nn.Parameter] = []

    def begin(self, model: nn.Module, steps: int, done: int = 0) -> None:
        """Take the parameters that train; where the run is does not matter."""
        del steps, done
        self._parameters = _trained(model)

    def step(self) -> None:
        """Take the parameters down the penalty.

        Raises:
            NumericsError: the penalty or its gradient is NaN or infinite.
        """
        relax(self.value, self._parameters, factor=self.factor, repeats=self.repeats)

    def end(self) -> None:
        """Nothing is left to do."""
