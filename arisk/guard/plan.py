"""What an arm of stage guard is: its name, what it is built from, what it does to a planned run.

A protection is called between backward pass and clipping, so that whatever it adds is clipped and scaled by
the optimizer like the task's own gradient.

Gradients of penalties beside the task's own: adding them, comparing them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from arisk.base.errors import AriskError, ConfigError, InputError, NumericsError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import TrainingConfig
from arisk.config.sections import BehaviourConfig, GuardSettings
from arisk.geometry.vectors import norm
from arisk.gradients import ParameterLayout
from arisk.guard.minibatches import SafetyBatches
from arisk.guard.record import Arm
from arisk.training.loop import PlannedRun, Protect
from arisk.training.recipe import Recipe, recipe_of
from arisk.verification.run import measured_steps

__all__ = [
    "ArmName",
    "ArmPlan",
    "Method",
    "PlainRun",
    "Protection",
    "Shared",
    "Terms",
    "add_gradients",
    "by_strength",
    "gradient_of",
    "gradients_of",
    "in_words",
    "measured_points",
    "penalising",
    "put_gradients",
    "replayed",
]


Made = TypeVar("Made")


@dataclass
class Shared:
    """What arms measured at the aligned point, by what it is, for the arms after them.

    Attributes:
        made: the values.
        seconds: CPU seconds that each took.
        saved: seconds of those that were found made, all together.
    """

    made: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any])
    seconds: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    saved: float = 0.0


@dataclass(frozen=True)
class ArmPlan:
    """What a protection is built from.

    Attributes:
        task: model and data; the model stands at the aligned point, inside `measuring`.
        layout: the parameters that train.
        recipe: how the plan trains.
        config: strengths and settings.
        behaviour: the judge of answers.
        last: the last optimizer step that is taken.
        norm_steps: steps at which the gradient norm of every single term is recorded.
        seed: seeds dropout, directions and minibatches.
        plain: the plain run, where it is known.
        rises: (N,) predicted rise of every safety row's loss; None where nothing is predicted.
        shared: what arms measured at the aligned point; see `once`.
    """

    task: Task
    layout: ParameterLayout
    recipe: Recipe
    config: GuardSettings
    behaviour: BehaviourConfig
    last: int
    norm_steps: frozenset[int]
    seed: int
    plain: Arm | None = None
    rises: Tensor | None = None
    shared: Shared = field(default_factory=Shared, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        task: Task,
        layout: ParameterLayout,
        *,
        config: GuardSettings,
        training: TrainingConfig,
        steps: int,
        seed: int,
        behaviour: BehaviourConfig | None,
    ) -> ArmPlan:
        """The plan without protection, to `config.steps` of its `steps`; the judge is the rule by default."""
        last = min(config.steps or steps, steps)
        points = frozenset(measured_points(last))
        judge = behaviour or BehaviourConfig()
        return cls(task, layout, recipe_of(training, steps), config, judge, last, points, seed)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all arms and forecasts of this task.

        Args:
            key: names it, with every setting it depends on, the seed included where it draws.
            make: measures at the aligned point.
        """
        shared = self.shared
        if key in shared.made:
            shared.saved += shared.seconds[key]
        else:
            started = time.process_time()
            shared.made[key] = make()
            shared.seconds[key] = time.process_time() - started
        return shared.made[key]

    def fresh(self) -> PlannedRun:
        """The planned run from its start."""
        return PlannedRun(self.task, self.layout, self.recipe, self.seed)

    @property
    def set_up_errors(self) -> tuple[type[AriskError], ...]:
        """Errors of setting an arm up that leave it out; who names a method wants to know why it fails."""
        asked = self.config.methods is not None
        return (NumericsError,) if asked else (NumericsError, ConfigError, InputError)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.task.model.parameters()).device


@dataclass(frozen=True)
class ArmName:
    """Which arm: a method at a strength, in one of its kinds.

    Attributes:
        label: unique.
        method: its name in `METHODS`.
        strength: c or λ; None where there is none.
        kind: `loss`, `after` or `as_given` for a penalty, `conflict` or `subspace` for projection, `rate` or
            `steps` for a smaller plan.
    """

    label: str
    method: str
    strength: float | None
    kind: str = "loss"


@dataclass(frozen=True)
class Protection:
    """What is done to the gradients: `protect` of a planned run, and what there is to say about it.

    Attributes:
        protect: changes the gradients; None changes nothing.
        correct: changes the parameters after the optimizer's step; None changes nothing.
        weights: λ by term.
        note: what is guarded, and what is not.
    """

    protect: Protect | None
    weights: Mapping[str, float]
    note: str
    correct: Protect | None = None


@dataclass(frozen=True)
class PlainRun:
    """What is left of the plain run in memory: θ*, θ_T, and running means of θ by share of the run."""

    start: Sequence[Tensor]
    end: Sequence[Tensor]
    means: Mapping[float, Sequence[Tensor]]


@dataclass(frozen=True)
class Method:
    """One way to protect a fine-tune: which arms it has, how an arm is built, and what it takes.

    Attributes:
        arms: its arms by the settings, in order.
        build: the protection of one arm.
        safety_gradients: whether an arm needs the gradient of every safety row beforehand.
        calibrated: whether an arm sets its λ by plain steps beforehand.
        rows: safety rows whose gradient an arm takes at every step.
        planned: the plan as an arm carries it out: another training loss, another rate.
        unfit: why the method cannot be used on a task; None where it can, as far as is known beforehand.
        references: whether an arm measures every fine-tuning row at the aligned point.
        read_off: the weights of an arm that is read off the plain run, from where that began, where it ended,
            and its running means by share; None for a method that trains.
        shares: shares of the run whose running means that takes.
    """

    arms: Callable[[GuardSettings], list[ArmName]]
    build: Callable[[ArmPlan, ArmName], Protection]
    safety_gradients: Callable[[ArmName], bool] = lambda _: False
    calibrated: Callable[[ArmName], bool] = lambda _: False
    rows: Callable[[ArmName, GuardSettings], int] = lambda _, __: 0
    planned: Callable[[ArmPlan, ArmName], ArmPlan] = lambda plan, _: plan
    unfit: Callable[[Task], str | None] = lambda _: None
    references: bool = False
    read_off: Callable[[ArmName, PlainRun], list[Tensor]] | None = None
    shares: Callable[[GuardSettings], list[float]] = lambda _: []


def by_strength(method: str) -> Callable[[GuardSettings], list[ArmName]]:
    """Arms of a method with strengths in the loss, and after the step where it has relaxations."""

    def arms(config: GuardSettings) -> list[ArmName]:
        settings: Any = getattr(config, method)
        after = dict.fromkeys(getattr(settings, "relaxations", ()))
        return [
            *(_in_the_loss(method, value) for value in dict.fromkeys(settings.strengths)),
            *(ArmName(f"{method} after {in_words(c)}", method, c, "after") for c in after),
        ]

    return arms


def _in_the_loss(method: str, strength: float | str) -> ArmName:
    if isinstance(strength, str):
        return ArmName(f"{method} as given", method, None, "as_given")
    return ArmName(f"{method} {in_words(strength)}", method, strength, "loss")


def in_words(value: float) -> str:
    """A number as short as it can be told from every other one.

    >>> in_words(0.3), in_words(1000.0), in_words(0.10000001)
    ('0.3', '1000', '0.10000001')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


#: An arm is measured at so many steps: measuring costs as much as training, and arms are compared at the end.
POINTS = 9


def measured_points(last: int) -> list[int]:
    """Ascending steps 0 … `last` at which an arm's losses are measured: some of those of `verify`."""
    steps = measured_steps(last)
    count = min(POINTS, len(steps))
    return [steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)]


#: Scalar penalty terms with gradient, by name.
Terms = Mapping[str, Tensor]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`.grad` of every parameter, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def put_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Set `.grad` of every parameter."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add_gradients(parameters: Sequence[nn.Parameter], terms: Terms, *, each: bool) -> dict[str, float]:
    """Add ∇Σ terms to `.grad`; tells values and norms.

    Args:
        parameters: what trains.
        terms: weighted terms.
        each: also the gradient norm of every single term, one more backward pass each.

    Returns:
        Each term's value, `‖∇task‖`, `‖∇penalty‖`, and with `each` `‖∇term‖`.

    Raises:
        NumericsError: a term or its gradient is NaN or infinite; `.grad` is then left alone.
    """
    told = {name: float(value.detach()) for name, value in terms.items()}
    acting = {name: value for name, value in terms.items() if value.requires_grad}
    told["‖∇task‖"] = norm([p.grad for p in parameters])
    if each:
        told |= {f"‖∇{name}‖": norm(gradient_of(value, parameters)) for name, value in acting.items()}
    added: Sequence[Tensor | None] = []
    if acting:
        added = gradient_of(torch.stack(list(acting.values())).sum(), parameters, keep=False)
        told["‖∇penalty‖"] = norm(added)
    bad = [name for name, value in told.items() if not math.isfinite(value)]
    if bad:
        raise NumericsError(
            f"the protection diverges: {bad[0]} is {told[bad[0]]}",
            where=f"penalty: {bad[0]}",
            fix="lower the strength of this method, or `training.learning_rate`",
        )
    for parameter, more in zip(parameters, added, strict=False):
        if more is not None:
            parameter.grad = more if parameter.grad is None else parameter.grad + more
    return told


def gradient_of(
    value: Tensor, parameters: Sequence[nn.Parameter], *, keep: bool = True
) -> Sequence[Tensor | None]:
    """∇value by parameter, None where it does not depend on one; `keep` keeps the graph."""
    return torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=keep)


def penalising(plan: ArmPlan, parameters: Sequence[nn.Parameter], terms: Callable[[int], Terms]) -> Protect:
    """Adds the gradient of every term and tells values and gradient norms."""
    return lambda number: add_gradients(parameters, terms(number), each=number in plan.norm_steps)


def replayed(plan: ArmPlan, samples: SampleSet, strength: float, rows: int, note: str) -> Protection:
    """L + λ L_safety: a minibatch of these rows at every step.

    Args:
        plan: model and seed.
        samples: rows that are replayed, with their loss.
        strength: λ.
        rows: rows of a minibatch.
        note: what is guarded.
    """
    model, run = plan.task.model, plan.fresh()
    parameters, stream = run.parameters, SafetyBatches(samples, rows, plan.seed, plan.device)

    def protect(number: int) -> Mapping[str, float]:
        with run.beside():
            loss = samples.loss_fn(model, stream.at(number)).mean()
        return add_gradients(parameters, {"safety loss": strength * loss}, each=False)

    return Protection(protect, {"safety loss": strength}, note)
