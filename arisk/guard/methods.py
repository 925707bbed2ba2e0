"""From a method and its strength to what is done to the gradients of a planned run.

A protection is called between backward pass and clipping, so that whatever it adds is clipped and
scaled by the optimizer like the task's own gradient. A strength c of a penalty is turned into λ by
calibration: after a few plain steps, λ‖∇penalty‖ = c‖∇L_task‖. The penalty's gradient is 0 at the
aligned point, so nothing could be compared there.

Gradients of penalties beside the task's own: adding them, comparing them, setting λ from a strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import Task
from arisk.config import names
from arisk.config.names import Table
from arisk.config.sections import GuardSettings
from arisk.gradients import ParameterLayout
from arisk.guard import (
    AlignGuardConfig,
    LoRAMitigator,
    SafetyBatches,
    Site,
    build_mitigator,
    ewc_penalty,
    fisher_diagonals,
    leading_directions,
    matched_sites,
    outside,
    per_sample_rows,
    relax,
    weight_sites,
    without_conflict,
)
from arisk.models.losses import tempered
from arisk.training.loop import PlannedRun, Protect, put

__all__ = [
    "METHODS",
    "ArmName",
    "ArmPlan",
    "Method",
    "Protection",
    "Terms",
    "add_gradients",
    "arm_names",
    "calibrated",
    "gradients_of",
    "norm_of",
    "protection",
    "put_gradients",
]

#: Largest matrix of per-sample gradients that `projection: subspace` holds (GB).
MEMORY_GB = 2.0
#: Rank of the directions of the arm with the weights as given.
GIVEN_RANK = 32


@dataclass(frozen=True)
class ArmPlan:
    """What a protection is built from.

    Attributes:
        task: model and data; the model stands at the aligned point, inside `measuring`.
        layout: the parameters that train.
        fresh: makes the planned run from its start.
        config: strengths and settings.
        norm_steps: steps at which the gradient norm of every single term is recorded.
        seed: seeds directions and minibatches.
    """

    task: Task
    layout: ParameterLayout
    fresh: Callable[[], PlannedRun]
    config: GuardSettings
    norm_steps: frozenset[int]
    seed: int


@dataclass(frozen=True)
class ArmName:
    """Which arm: a method at a strength, in one of its kinds.

    Attributes:
        label: unique.
        method: its name in `METHODS`.
        strength: c or λ; None where there is none.
        kind: `loss`, `after` or `as_given` for a penalty, `conflict` or `subspace` for projection.
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
class Method:
    """One way to protect a fine-tune: which arms it has, how an arm is built, and what it takes.

    Attributes:
        arms: its arms by the settings, in order.
        build: the protection of one arm.
        safety_gradients: whether an arm needs the gradient of every safety row beforehand.
        calibrated: whether an arm sets its λ by plain steps beforehand.
        rows: safety rows whose gradient an arm takes at every step.
    """

    arms: Callable[[GuardSettings], list[ArmName]]
    build: Callable[[ArmPlan, ArmName], Protection]
    safety_gradients: Callable[[ArmName], bool] = lambda _: False
    calibrated: Callable[[ArmName], bool] = lambda _: False
    rows: Callable[[ArmName, GuardSettings], int] = lambda _, __: 0


def arm_names(config: GuardSettings) -> list[ArmName]:
    """Every arm in order."""
    return [arm for method in config.methods for arm in METHODS[method].arms(config)]


def _by_strength(method: str) -> Callable[[GuardSettings], list[ArmName]]:
    """Arms of a method with strengths in the loss, and after the step where it has relaxations."""

    def arms(config: GuardSettings) -> list[ArmName]:
        settings: Any = getattr(config, method)
        after = dict.fromkeys(getattr(settings, "relaxations", ()))
        return [
            *(_in_the_loss(method, value) for value in dict.fromkeys(settings.strengths)),
            *(ArmName(f"{method} after {c:g}", method, c, "after") for c in after),
        ]

    return arms


def _projections(config: GuardSettings) -> list[ArmName]:
    kinds = dict.fromkeys(config.projection.kinds)
    return [ArmName(f"projection {kind}", "projection", None, kind) for kind in kinds]


def _in_the_loss(method: str, strength: float | str) -> ArmName:
    if isinstance(strength, str):
        return ArmName(f"{method} as given", method, None, "as_given")
    return ArmName(f"{method} {strength:g}", method, strength, "loss")


def protection(plan: ArmPlan, arm: ArmName) -> Protection:
    """Build the protection of one arm.

    Raises:
        ConfigError: the method cannot be used on this model.
        NumericsError: a safety gradient is not finite, or all are zero.
    """
    return METHODS[arm.method].build(plan, arm)


def _plain(plan: ArmPlan, arm: ArmName) -> Protection:
    del plan, arm
    return Protection(None, {}, "No protection.")


def _replay(plan: ArmPlan, arm: ArmName) -> Protection:
    strength = arm.strength or 0.0
    task, parameters = plan.task, plan.fresh().parameters
    stream = SafetyBatches(task.safety, plan.config.replay.rows, plan.seed, _device(plan))

    def protect(number: int) -> Mapping[str, float]:
        loss = task.safety.loss_fn(task.model, stream.at(number)).mean()
        return add_gradients(parameters, {"safety loss": strength * loss}, each=False)

    return Protection(protect, {"safety loss": strength}, "Trains on safety rows; it needs them at hand.")


def _ewc(plan: ArmPlan, arm: ArmName) -> Protection:
    task, settings, parameters = plan.task, plan.config.ewc, plan.fresh().parameters
    safety = tempered(task.safety, settings.temperature, "guard.ewc.temperature")
    diagonals = fisher_diagonals(task.model, plan.layout, safety)
    reference = [p.detach().clone() for p in parameters]
    blind = sum(d.numel() for d in diagonals if not bool(d.any()))
    total = sum(d.numel() for d in diagonals)
    if blind == total:
        raise _all_zero("ewc")
    note = "Coordinates: the parameters that train."
    if blind:
        note += f" {blind / total:.0%} of them (a fresh adapter's A) have Fisher 0 and are not guarded."

    def penalty() -> Tensor:
        return ewc_penalty(parameters, reference, diagonals)

    if arm.kind == "after":
        return _after(plan, arm, penalty, parameters, settings.repeats, note)
    wanted = {"fisher": arm.strength or 0.0}
    weights = calibrated(plan.fresh, lambda: {"fisher": penalty()}, wanted, plan.config.calibration_steps)
    weighted = lambda _: {"fisher": weights["fisher"] * penalty()}  # noqa: E731
    return Protection(_penalising(plan, parameters, weighted), weights, note)


def _after(
    plan: ArmPlan,
    arm: ArmName,
    penalty: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    repeats: int,
    note: str,
) -> Protection:
    """The penalty applied beside the optimizer."""
    del plan
    factor = arm.strength or 0.0

    def correct(number: int) -> Mapping[str, float]:
        del number
        before, after = relax(penalty, parameters, factor=factor, repeats=repeats)
        return {"fisher before relaxation": before, "fisher": after}

    said = f"{note} Applied after each optimizer step, {repeats} times {factor:g} of Polyak's step."
    return Protection(None, {}, said, correct)


def _projection(plan: ArmPlan, arm: ArmName) -> Protection:
    task, parameters = plan.task, plan.fresh().parameters
    if arm.kind == "subspace":
        return _subspace(plan, parameters)
    stream = SafetyBatches(task.safety, plan.config.projection.rows, plan.seed, _device(plan))

    def protect(number: int) -> Mapping[str, float]:
        loss = task.safety.loss_fn(task.model, stream.at(number)).mean()
        safety = torch.autograd.grad(loss, parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, safety, strict=True)]
        changed, cosine = without_conflict(gradients_of(parameters), filled)
        put_gradients(parameters, changed)
        return {"cosine with the safety gradient": cosine}

    return Protection(protect, {}, "The safety gradient is that of a new minibatch at every step.")


def _subspace(plan: ArmPlan, parameters: Sequence[nn.Parameter]) -> Protection:
    samples = max(1, len(plan.task.safety.rows))
    if samples * plan.layout.numel * 4 > MEMORY_GB * 1e9:
        raise ConfigError(
            f"the safety gradients of {plan.layout.numel:,} parameters would take more than {MEMORY_GB:g} GB",
            where="guard.projection.kinds: subspace",
            fix="use `conflict`, train an adapter, or set `safety.max_samples`",
        )
    rows = per_sample_rows(plan.task.model, plan.layout, plan.task.safety)
    if not bool(rows.any()):
        raise _all_zero("projection subspace")
    directions = leading_directions(rows, plan.config.projection.rank)

    def protect(number: int) -> Mapping[str, float]:
        del number
        changed, share = outside(gradients_of(parameters), directions)
        put_gradients(parameters, changed)
        return {"share of the gradient taken": share}

    note = f"{len(directions)} directions, fixed at the aligned point, in the parameters that train."
    return Protection(protect, {}, note)


def _alignguard(plan: ArmPlan, arm: ArmName) -> Protection:
    settings, parameters = plan.config.alignguard, plan.fresh().parameters
    given = arm.kind == "as_given"
    form = {name: getattr(settings, name) for name in ("width", "split", "overlap_rows")}
    rank = GIVEN_RANK if given else settings.rank
    config = AlignGuardConfig(**form, rank=rank, seed=plan.seed)
    sites, note = _sites(plan)
    safety = tempered(
        plan.task.safety, 1.0 if given else settings.temperature, "guard.alignguard.temperature"
    )
    guard = build_mitigator(plan.task.model, safety, config, sites=sites)
    assert guard.directions is not None
    note += f" {len(guard.directions.eigenvalues)} directions hold {guard.directions.explained:.0%} of tr F."
    if arm.kind == "after":
        single = _reweighted(plan, guard, {"fisher": 1.0})
        return _after(plan, arm, lambda: single.penalty().fisher, parameters, settings.repeats, note)
    if not given:
        guard = _weighed(plan, arm.strength or 0.0, guard)
    weights = {name: weight for name, weight in _weights(guard.config).items() if weight > 0}
    if config.split == "subspace" and "geodesic" in weights:
        note += " The geodesic term is zero by construction with this split."
    return Protection(
        _penalising(plan, parameters, lambda step: _acting(guard, weights, step)), weights, note
    )


def _weighed(plan: ArmPlan, strength: float, guard: LoRAMitigator) -> LoRAMitigator:
    """The mitigator with λ by calibration, the geodesic term left out."""
    settings = plan.config.alignguard
    shares = {"fisher": 1.0, "task": settings.task_share, "overlap": settings.overlap_share}
    wanted = {name: strength * share for name, share in shares.items() if share > 0}
    single = _reweighted(plan, guard, dict.fromkeys(wanted, 1.0))
    found = calibrated(plan.fresh, lambda: _acting(single, wanted), wanted, plan.config.calibration_steps)
    return _reweighted(plan, guard, found)


def _reweighted(plan: ArmPlan, guard: LoRAMitigator, weights: Mapping[str, float]) -> LoRAMitigator:
    """The same directions with other λ by term; the geodesic term left out."""
    config = guard.config.model_copy(
        update={
            "lambda_a": weights.get("fisher", 0.0),
            "lambda_t": weights.get("task", 0.0),
            "lambda_nc": weights.get("overlap", 0.0),
            "alpha": 1.0,
        }
    )
    return LoRAMitigator(plan.task.model, guard.sites, guard.directions, config)


def _acting(guard: LoRAMitigator, names: Mapping[str, float], step: int = 0) -> Terms:
    return {name: value for name, value in guard.penalty(step).named().items() if name in names}


def _weights(config: AlignGuardConfig) -> dict[str, float]:
    """λ by term."""
    collision = config.lambda_nc
    return {
        "fisher": config.lambda_a,
        "task": config.lambda_t,
        "overlap": collision * config.alpha,
        "geodesic": collision * (1 - config.alpha),
    }


def _sites(plan: ArmPlan) -> tuple[list[Site], str]:
    """Guarded weights: the adapters, or the trained matrices of linear layers."""
    if plan.task.lora_pairs:
        sites, problem = matched_sites(plan.task.model)
        if problem is not None:
            raise ConfigError(
                problem, where="guard.methods: alignguard", fix="adapt linear layers only, or leave it out"
            )
        return sites, f"ΔW of {len(sites)} adapted matrices."
    modules = dict(plan.task.model.named_modules())
    names = [n for n in plan.layout.names if isinstance(modules.get(n.rpartition(".")[0]), nn.Linear)]
    matrices = [name for name in names if name.endswith("weight")]
    if not matrices:
        raise ConfigError(
            "the selected parameters hold no weight of a linear layer",
            where="guard.methods: alignguard",
            fix="train linear layers, or leave `alignguard` out of `guard.methods`",
        )
    note = f"{len(matrices)} matrices of linear layers; embeddings, norms and biases are not guarded."
    return weight_sites(matrices), note


def _penalising(plan: ArmPlan, parameters: Sequence[nn.Parameter], terms: Callable[[int], Terms]) -> Protect:
    """Adds the gradient of every term and tells values and gradient norms."""
    return lambda number: add_gradients(parameters, terms(number), each=number in plan.norm_steps)


def _device(plan: ArmPlan) -> torch.device:
    return next(plan.task.model.parameters()).device


def _all_zero(where: str) -> NumericsError:
    return NumericsError(
        "every safety gradient is exactly zero",
        where=f"guard: {where}",
        fix="check that the safety loss depends on the parameters that train",
    )


#: Methods by name; the settings of a run name those it compares.
METHODS: Table[Method] = Table(
    names.METHODS,
    {
        "plain": Method(lambda _: [ArmName("plain", "plain", None)], _plain),
        "alignguard": Method(
            _by_strength("alignguard"),
            _alignguard,
            safety_gradients=lambda _: True,
            calibrated=lambda arm: arm.kind == "loss",
        ),
        "ewc": Method(
            _by_strength("ewc"),
            _ewc,
            safety_gradients=lambda _: True,
            calibrated=lambda arm: arm.kind == "loss",
        ),
        "projection": Method(
            _projections,
            _projection,
            safety_gradients=lambda arm: arm.kind == "subspace",
            rows=lambda arm, config: config.projection.rows if arm.kind == "conflict" else 0,
        ),
        "replay": Method(_by_strength("replay"), _replay, rows=lambda _, config: config.replay.rows),
    },
)


#: Scalar penalty terms with gradient, by name.
Terms = Mapping[str, Tensor]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`.grad` of every parameter, zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def put_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Set `.grad` of every parameter."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def norm_of(tensors: Sequence[Tensor | None]) -> float:
    """‖·‖ over all tensors together; None counts as zero."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors if t is not None))


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
    told["‖∇task‖"] = norm_of([p.grad for p in parameters])
    if each:
        told |= {f"‖∇{name}‖": norm_of(_gradient(value, parameters)) for name, value in acting.items()}
    added: Sequence[Tensor | None] = []
    if acting:
        added = _gradient(torch.stack(list(acting.values())).sum(), parameters, keep=False)
        told["‖∇penalty‖"] = norm_of(added)
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


def _gradient(
    value: Tensor, parameters: Sequence[nn.Parameter], *, keep: bool = True
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=keep)


def calibrated(
    fresh: Callable[[], PlannedRun], terms: Callable[[], Terms], wanted: Mapping[str, float], steps: int
) -> dict[str, float]:
    """λ by term such that λ‖∇term‖ = c‖∇L_task‖ after a few plain steps.

    ‖∇L_task‖ is the mean over those steps, ‖∇term‖ is taken after the last; the parameters are put
    back. At the aligned point itself the gradient of a quadratic penalty is 0.

    Args:
        fresh: makes the planned run from its start.
        terms: the terms with weight 1, at the parameters as they are.
        wanted: c by term.
        steps: plain steps, at most those of the plan.

    Raises:
        NumericsError: the run diverges, or a term has no gradient there.
    """
    run = fresh()
    start = [p.detach().clone() for p in run.parameters]
    try:
        norms: list[float] = []
        for number in range(1, min(steps, len(run.rates)) + 1):
            run.step(number)
            norms.append(norm_of([p.grad for p in run.parameters]))
        task = sum(norms) / len(norms)
        found = {n: norm_of(_gradient(value, run.parameters)) for n, value in terms().items() if n in wanted}
    finally:
        put(run.parameters, start)
    weak = [name for name in wanted if not found.get(name, 0.0) > 0]
    if weak:
        raise NumericsError(
            f"the {weak[0]} term has no gradient after {len(norms)} plain steps, so no strength can be set",
            where=f"guard: {weak[0]}",
            fix="raise `guard.calibration_steps`, or check that the safety loss depends on what trains",
        )
    return {name: c * task / found[name] for name, c in wanted.items()}
