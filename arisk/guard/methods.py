"""From a method and its strength to what is done to the gradients of a planned run.

A strength c of a penalty is turned into λ by calibration: after a few plain steps, λ‖∇penalty‖ =
c‖∇L_task‖. The penalty's gradient is 0 at the aligned point, so nothing could be compared there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import Task
from arisk.config import names
from arisk.config.names import Table
from arisk.config.sections import GuardSettings
from arisk.geometry.vectors import norm
from arisk.guard import (
    AlignGuardConfig,
    LoRAMitigator,
    SafetyBatches,
    Site,
    build_mitigator,
    ewc_penalty,
    fisher_diagonals,
    matched_sites,
    relax,
    safety_subspace,
    weight_sites,
)
from arisk.guard.afterwards import ALPHA, AVERAGE
from arisk.guard.in_loop import project_against, project_outside
from arisk.guard.plan import (
    ArmName,
    ArmPlan,
    Method,
    Protection,
    Terms,
    by_strength,
    gradient_of,
    penalising,
    replayed,
)
from arisk.guard.references import CONSTRAINED, KL, OWN_REPLAY
from arisk.guard.smaller import DRIFT_REPLAY, SMALLER
from arisk.models.losses import tempered
from arisk.training.loop import put

__all__ = [
    "METHODS",
    "ArmName",
    "ArmPlan",
    "Method",
    "Protection",
    "arm_names",
    "calibrated",
    "methods_of",
    "protection",
]

#: Largest matrix of per-sample gradients that `projection: subspace` holds (GB).
MEMORY_GB = 2.0
#: Rank of the directions of the arm with the weights as given.
GIVEN_RANK = 32


def methods_of(config: GuardSettings, task: Task | None = None) -> tuple[list[str], dict[str, str]]:
    """The methods that are compared, and why others are not.

    Args:
        config: names them, or leaves them to the task.
        task: model and data; None: as far as can be told without.
    """
    if config.methods is not None:
        return list(config.methods), {}
    known = {name: METHODS[name].unfit(task) if task is not None else None for name in names.METHODS}
    return [name for name, why in known.items() if why is None], {n: w for n, w in known.items() if w}


def arm_names(config: GuardSettings, task: Task | None = None) -> list[ArmName]:
    """Every arm in order, see `methods_of`."""
    return [arm for method in methods_of(config, task)[0] for arm in METHODS[method].arms(config)]


def _projections(config: GuardSettings) -> list[ArmName]:
    kinds = dict.fromkeys(config.projection.kinds)
    return [ArmName(f"projection {kind}", "projection", None, kind) for kind in kinds]


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
    settings = plan.config.replay
    note = "Trains on safety rows; it needs them at hand."
    return replayed(plan, plan.task.safety, arm.strength or 0.0, settings.rows, note)


def _ewc(plan: ArmPlan, arm: ArmName) -> Protection:
    task, settings, parameters = plan.task, plan.config.ewc, plan.fresh().parameters
    safety = tempered(task.safety, settings.temperature, "guard.ewc.temperature")
    diagonals = plan.once(
        ("Fisher diagonals", settings.temperature),
        lambda: fisher_diagonals(task.model, plan.layout, safety),
    )
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
        return _after(arm, penalty, parameters, settings.repeats, note)
    wanted = {"fisher": arm.strength or 0.0}
    weights = calibrated(plan, lambda: {"fisher": penalty()}, wanted)
    weighted = lambda _: {"fisher": weights["fisher"] * penalty()}  # noqa: E731
    return Protection(penalising(plan, parameters, weighted), weights, note)


def _after(
    arm: ArmName,
    penalty: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    repeats: int,
    note: str,
) -> Protection:
    """The penalty applied beside the optimizer."""
    factor = arm.strength or 0.0

    def correct(number: int) -> Mapping[str, float]:
        del number
        before, after = relax(penalty, parameters, factor=factor, repeats=repeats)
        return {"fisher before relaxation": before, "fisher": after}

    said = f"{note} Applied after each optimizer step, {repeats} times {factor:g} of Polyak's step."
    return Protection(None, {}, said, correct)


def _projection(plan: ArmPlan, arm: ArmName) -> Protection:
    task, run = plan.task, plan.fresh()
    parameters = run.parameters
    if arm.kind == "subspace":
        return _subspace(plan, parameters)
    stream = SafetyBatches(task.safety, plan.config.projection.rows, plan.seed, plan.device)

    def protect(number: int) -> Mapping[str, float]:
        with run.beside():
            loss = task.safety.loss_fn(task.model, stream.at(number)).mean()
        return {"cosine with the safety gradient": project_against(parameters, loss)}

    return Protection(protect, {}, "The safety gradient is that of a new minibatch at every step.")


def _subspace(plan: ArmPlan, parameters: Sequence[nn.Parameter]) -> Protection:
    samples = max(1, len(plan.task.safety.rows))
    if samples * plan.layout.numel * 4 > MEMORY_GB * 1e9:
        raise ConfigError(
            f"the safety gradients of {plan.layout.numel:,} parameters would take more than {MEMORY_GB:g} GB",
            where="guard.projection.kinds: subspace",
            fix="use `conflict`, train an adapter, or set `safety.max_samples`",
        )
    directions = safety_subspace(
        plan.task.model, plan.layout, plan.task.safety, rank=plan.config.projection.rank
    )

    def protect(number: int) -> Mapping[str, float]:
        del number
        return {"share of the gradient taken": project_outside(parameters, directions)}

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
    guard = plan.once(
        ("AlignGuard", config.model_dump_json(), 1.0 if given else settings.temperature),
        lambda: build_mitigator(plan.task.model, safety, config, sites=sites),
    )
    assert guard.directions is not None
    note += f" {len(guard.directions.eigenvalues)} directions hold {guard.directions.explained:.0%} of tr F."
    if arm.kind == "after":
        single = _reweighted(plan, guard, {"fisher": 1.0})
        return _after(arm, lambda: single.penalty().fisher, parameters, settings.repeats, note)
    if not given:
        guard = _weighed(plan, arm.strength or 0.0, guard)
    weights = {name: weight for name, weight in _weights(guard.config).items() if weight > 0}
    if config.split == "subspace" and "geodesic" in weights:
        note += " The geodesic term is zero by construction with this split."
    return Protection(penalising(plan, parameters, lambda step: _acting(guard, weights, step)), weights, note)


def _weighed(plan: ArmPlan, strength: float, guard: LoRAMitigator) -> LoRAMitigator:
    """The mitigator with λ by calibration, the geodesic term left out."""
    settings = plan.config.alignguard
    shares = {"fisher": 1.0, "task": settings.task_share, "overlap": settings.overlap_share}
    wanted = {name: strength * share for name, share in shares.items() if share > 0}
    single = _reweighted(plan, guard, dict.fromkeys(wanted, 1.0))
    found = calibrated(plan, lambda: _acting(single, wanted), wanted)
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
            by_strength("alignguard"),
            _alignguard,
            safety_gradients=lambda _: True,
            calibrated=lambda arm: arm.kind == "loss",
        ),
        "ewc": Method(
            by_strength("ewc"),
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
        "replay": Method(by_strength("replay"), _replay, rows=lambda _, config: config.replay.rows),
        "constrained": CONSTRAINED,
        "kl": KL,
        "own_replay": OWN_REPLAY,
        "drift_replay": DRIFT_REPLAY,
        "smaller": SMALLER,
        "average": AVERAGE,
        "alpha": ALPHA,
    },
)


def calibrated(plan: ArmPlan, terms: Callable[[], Terms], wanted: Mapping[str, float]) -> dict[str, float]:
    """λ by term such that λ‖∇term‖ = c‖∇L_task‖ after a few plain steps.

    ‖∇L_task‖ is the mean over those steps, ‖∇term‖ is taken after the last; the parameters are put
    back. At the aligned point itself the gradient of a quadratic penalty is 0.

    Args:
        plan: takes the steps, at most those of the recipe.
        terms: the terms with weight 1, at the parameters as they are.
        wanted: c by term.

    Raises:
        NumericsError: the run diverges, or a term has no gradient there.
    """
    count = min(plan.config.calibration_steps, plan.recipe.horizon)
    task, there = plan.once(("plain steps", count, plan.seed), lambda: _plain_steps(plan, count))
    parameters = plan.fresh().parameters
    start = [p.detach().clone() for p in parameters]
    try:
        put(parameters, there)
        found = {n: norm(gradient_of(value, parameters)) for n, value in terms().items() if n in wanted}
    finally:
        put(parameters, start)
    weak = [name for name in wanted if not found.get(name, 0.0) > 0]
    if weak:
        raise NumericsError(
            f"the {weak[0]} term has no gradient after {count} plain steps, so no strength can be set",
            where=f"guard: {weak[0]}",
            fix="raise `guard.calibration_steps`, or check that the safety loss depends on what trains",
        )
    return {name: c * task / found[name] for name, c in wanted.items()}


def _plain_steps(plan: ArmPlan, count: int) -> tuple[float, list[Tensor]]:
    """Mean norm of the task's gradient over the first steps, and where they end; put back."""
    run = plan.fresh()
    start = [p.detach().clone() for p in run.parameters]
    try:
        norms: list[float] = []
        for number in range(1, count + 1):
            run.step(number)
            norms.append(norm([p.grad for p in run.parameters]))
        return sum(norms) / len(norms), [p.detach().clone() for p in run.parameters]
    finally:
        put(run.parameters, start)
