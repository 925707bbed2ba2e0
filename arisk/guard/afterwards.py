"""Protections that cost no training: weights read off the plain run, along it or after it.

* average: the mean of the weights along the run, θ̄_k = θ̄_{k−1} + (θ_k − θ̄_{k−1})/(sT), the aligned model
  first; s is the share of the run that it looks back on.
* alpha: θ* + α(θ_T − θ*), the run's whole move taken back to a share α of it. Its arms make the α-curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arisk.config.sections import GuardSettings
from arisk.guard.plan import ArmName, ArmPlan, Method, PlainRun, Protection, in_words
from arisk.training.loop import StepDone
from arisk.training.state import Extra

__all__ = ["ALPHA", "AVERAGE", "Averages", "between"]


def between(start: Sequence[Tensor], end: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """θ* + α(θ_T − θ*) by tensor: 0 gives the aligned model, 1 the fine-tuned one.

    Args:
        start: θ*.
        end: θ_T, the same shapes.
        alpha: α; for adapters it acts on A and B, whose product then moves with α to α².

    Source: weight interpolation, Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """
    return [torch.lerp(a, b.to(a), alpha) for a, b in zip(start, end, strict=True)]


class Averages:
    """Running means of parameters over a run, one for each share of it; an observer of its steps.

    θ̄ ← θ̄ + (θ − θ̄)/max(1, s T), from the aligned model on: it looks back on about s T steps.

    Args:
        parameters: those that train, at the aligned point.
        shares: s in (0, 1].
        steps: T.

    Source: averaging along the path, Polyak and Juditsky (1992); exponential as in arXiv 1803.05407's use for
    deep networks.
    """

    def __init__(self, parameters: Sequence[Tensor], shares: Sequence[float], steps: int) -> None:
        self.parameters = parameters
        self.steps = steps
        self.means = {share: [p.detach().clone() for p in parameters] for share in shares}

    def __call__(self, done: StepDone | None = None) -> None:
        """Take in the parameters as they are after a step."""
        del done
        for share, means in self.means.items():
            weight = 1 / max(1.0, share * self.steps)
            for mean, parameter in zip(means, self.parameters, strict=True):
                mean.lerp_(parameter.detach(), weight)

    def kept(self) -> Extra:
        """The means, for `arisk.training.state.save_state`."""
        tensors = {
            f"average.{i}.{j}": mean
            for i, means in enumerate(self.means.values())
            for j, mean in enumerate(means)
        }
        return Extra(tensors)

    def restore(self, tensors: Mapping[str, Any]) -> None:
        """Go on from `kept`."""
        for i, means in enumerate(self.means.values()):
            for j, mean in enumerate(means):
                mean.copy_(tensors[f"average.{i}.{j}"])


def _average_arms(config: GuardSettings) -> list[ArmName]:
    return [ArmName(f"average {in_words(s)}", "average", s) for s in dict.fromkeys(config.average.shares)]


def _alpha_arms(config: GuardSettings) -> list[ArmName]:
    return [ArmName(f"alpha {in_words(a)}", "alpha", a) for a in dict.fromkeys(config.alpha.values)]


def _nothing_added(plan: ArmPlan, arm: ArmName) -> Protection:
    del plan
    how = (
        "Mean of the plain run's weights over its last"
        if arm.method == "average"
        else "The plain run's move at"
    )
    return Protection(None, {}, f"{how} {arm.strength:.0%}; it costs no training.")


def _mean(arm: ArmName, run: PlainRun) -> list[Tensor]:
    return list(run.means[arm.strength or 0.0])


def _part(arm: ArmName, run: PlainRun) -> list[Tensor]:
    return between(run.start, run.end, arm.strength or 0.0)


AVERAGE = Method(
    _average_arms,
    _nothing_added,
    read_off=_mean,
    shares=lambda config: list(dict.fromkeys(config.average.shares)),
)
ALPHA = Method(_alpha_arms, _nothing_added, read_off=_part)
