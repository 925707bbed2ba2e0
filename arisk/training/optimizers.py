"""Optimizers of the planned run: one table of what training, leaps and the local model need of each.

`OPTIMIZERS` maps a name to one object. It builds torch's optimizer; it tells the step per unit gradient at
a state D, by which a leap weighs noise and brings in rare rows; it tells how the state ages over steps
that a leap stands for; and it tells D at the start, which the linear local model uses. The trainer's names
for one and the same algorithm are entries of their own; kinds that save memory (8 bit, paged, GaLore) are
carried out as their full-precision parent, and their note says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from arisk.base.errors import ConfigError
from arisk.config import names
from arisk.config.names import Table
from arisk.config.plan import TrainingConfig
from arisk.models.loading import hf_module

__all__ = ["OPTIMIZERS", "Ageing", "Built", "OptimizerKind", "optimizer_named"]

#: √v̂ counts as at least this share of its root mean square, so that D stays invertible.
RELATIVE_FLOOR = 1e-3
#: Smallest squared gradient of a step's scale where no state holds one.
TINY = 1e-30

#: Parameter groups as torch takes them: `params`, `weight_decay`, `ratio` of the learning rate, …
Groups = list[dict[str, Any]]
State = dict[str, Any]
#: Derivatives of one number with respect to a parameter, its gradient and the tensors of its state, by name.
Slopes = Mapping[str, Tensor]
#: Selected parameters in order, with their shapes.
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Ageing:
    """What a leap says about the steps it stands for, on one parameter.

    Attributes:
        mean, square: mean gradient and mean squared gradient of the real steps before it.
        length: steps it stands for. left: share of the slope that is left at its end.
    """

    mean: Tensor
    square: Tensor
    length: int
    left: float


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        name: as in `training.optimizer`.
        build: (groups, training) → its torch optimizers, each with the kind that its parameters follow.
        scale: (state, group, square) → D, the step per unit gradient and unit learning rate; `square` is
            the mean squared gradient lately. It broadcasts against the parameter.
        age: (state, group, ageing) changes the state as if those steps had been made; None leaves it
            alone, and the report says so.
        admit: (state, group, pull, share, length) adds to a second moment what gradients `pull` in that
            share of the last `length` steps leave in it; None where none is held.
        start: (gradient, noise, training, shapes) → D (P,) at θ*, from the mean gradient (P,) and the
            variance (P,) of a step's gradient over all selected parameters; `shapes` names them in order.
        gain: group → long-run displacement of a steady step, 1/(1 − μ) with momentum.
        adjoint: (state, group, gradient, slopes, smoothing) → slopes before a step, from those after it:
            `state` is that before it, `gradient` what the step was given, `slopes` has `parameter` and the
            state's tensors (0 where absent), and what comes back has `gradient` as well. `smoothing` levels
            an adaptive scale by this share of its root mean square; 0 is exact. None where a step has no
            useful derivative.
        recursion: update of the local model's own recursion, see `arisk.geometry.dynamics`; None where D
            stays that of the start.
        reads: fields of `training` that only some optimizers read.
        arguments: its further settings and their defaults, for `training.optimizer_args`.
        note: what is not carried out as named; None where all is.
    """

    name: str
    build: Callable[[Groups, TrainingConfig], list[Built]]
    scale: Callable[[State, Mapping[str, Any], Tensor], Tensor]
    age: Callable[[State, Mapping[str, Any], Ageing], None] | None
    admit: Callable[[State, Mapping[str, Any], Tensor, float, int], None] | None
    start: Callable[[Tensor, Tensor, TrainingConfig, Shapes], Tensor]
    gain: Callable[[Mapping[str, Any]], float] = lambda group: 1.0  # noqa: ARG005 - one step moves once
    adjoint: Callable[[State, Mapping[str, Any], Tensor, Slopes, float], Slopes] | None = None
    recursion: str | None = None
    reads: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    note: str | None = None


@dataclass(frozen=True)
class Built:
    """A torch optimizer, and the kind that its parameters follow."""

    optimizer: Optimizer
    kind: OptimizerKind


def optimizer_named(name: str) -> OptimizerKind:
    """The optimizer of a name.

    Raises:
        ConfigError: it is not known.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"the optimizer {name!r} is not known",
            where="training.optimizer",
            fix=f"give one of {', '.join(OPTIMIZERS)}",
        )
    return OPTIMIZERS[name]


def arguments_of(kind: OptimizerKind, training: TrainingConfig) -> dict[str, Any]:
    """Its further settings: the defaults, and what the plan sets.

    Raises:
        ConfigError: one that it does not have.
    """
    unknown = sorted(set(training.optimizer_args) - set(kind.arguments))
    if unknown:
        takes = f"it takes {', '.join(kind.arguments)}" if kind.arguments else "it takes none"
        raise ConfigError(
            f"the optimizer {kind.name!r} has no setting {unknown[0]!r}",
            where="training.optimizer_args",
            fix=f"leave it out: {takes}",
        )
    return {**kind.arguments, **training.optimizer_args}


# AdamW


def _build_adamw(groups: Groups, training: TrainingConfig) -> list[Built]:
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=training.betas, eps=training.eps)
    return [Built(optimizer, ADAMW)]


def _scale_adamw(state: State, group: Mapping[str, Any], square: Tensor) -> Tensor:
    if "exp_avg_sq" not in state:
        return torch.ones((), dtype=square.dtype, device=square.device)
    second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return second.sqrt_().add_(group["eps"]).reciprocal_()


def _age_adamw(state: State, group: Mapping[str, Any], ageing: Ageing) -> None:
    """Moments and step count as if the mean gradient had been seen so many times more."""
    if "exp_avg" not in state:
        return
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(ageing.mean, 1 - beta1**ageing.length)
    state["exp_avg_sq"].lerp_(ageing.square, 1 - beta2**ageing.length)
    state["step"] += ageing.length


def _admit_adamw(state: State, group: Mapping[str, Any], pull: Tensor, share: float, length: int) -> None:
    if "exp_avg_sq" in state:
        state["exp_avg_sq"].addcmul_(pull, pull, value=share * (1 - group["betas"][1] ** length))


def _start_adamw(gradient: Tensor, noise: Tensor, training: TrainingConfig, shapes: Shapes) -> Tensor:
    """1/(√v̂ + ε) with v̂ ≈ E[g_b²].

    A coordinate that has had no gradient at all (the A side of a fresh adapter) has no scale of its
    own; it gets that of the root mean square, which keeps it from dominating every D-norm.
    """
    del shapes
    second = (gradient.square() + noise).sqrt()
    typical = float(second.square().mean().sqrt())
    second = second.masked_fill(second == 0, typical)
    return 1 / (second.clamp(min=RELATIVE_FLOOR * typical) + training.eps)


def _adjoint_adamw(
    state: State, group: Mapping[str, Any], gradient: Tensor, slopes: Slopes, smoothing: float
) -> Slopes:
    """θ' = (1 − ηλ)θ − η m̂/(√v̂ + ε), m' = β₁m + (1 − β₁)g, v' = β₂v + (1 − β₂)g², taken backwards.

    Smoothed: √(v̂ + (share × root mean square of √v̂)²) for √v̂.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    step, none = float(state.get("step", 0)) + 1, torch.zeros_like(gradient)
    first = beta1 * state.get("exp_avg", none) + (1 - beta1) * gradient
    second = beta2 * state.get("exp_avg_sq", none) + (1 - beta2) * gradient.square()
    correction = 1 - beta2**step
    square = second / correction
    root = (square + smoothing**2 * square.mean()).sqrt()
    scale = root + group["eps"]
    pull = slopes["parameter"] * (-rate / (1 - beta1**step))
    by_first = slopes.get("exp_avg", none) + pull / scale
    # Where no gradient ever was, m is 0 too, and the step does not move with v.
    bend = pull * first / (2 * correction * root * scale.square())
    by_second = slopes.get("exp_avg_sq", none) - bend.masked_fill(root == 0, 0.0)
    return {
        "parameter": (1 - rate * group["weight_decay"]) * slopes["parameter"],
        "gradient": (1 - beta1) * by_first + 2 * (1 - beta2) * gradient * by_second,
        "exp_avg": beta1 * by_first,
        "exp_avg_sq": beta2 * by_second,
    }


ADAMW = OptimizerKind(
    "adamw",
    _build_adamw,
    _scale_adamw,
    _age_adamw,
    _admit_adamw,
    _start_adamw,
    adjoint=_adjoint_adamw,
    recursion="adamw",
    reads=("betas", "eps"),
)


# SGD


def _build_sgd(groups: Groups, training: TrainingConfig) -> list[Built]:
    settings = arguments_of(SGD, training)
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=training.momentum, **settings)
    return [Built(optimizer, SGD)]


def _scale_one(state: State, group: Mapping[str, Any], square: Tensor) -> Tensor:
    del state, group
    return torch.ones((), dtype=square.dtype, device=square.device)


def _age_sgd(state: State, group: Mapping[str, Any], ageing: Ageing) -> None:
    """A heavy ball arrives with what is left of its slope.

    With its full speed of the start it would shoot out of a valley that speed control has just found.
    """
    if state.get("momentum_buffer") is None:
        return
    momentum = group["momentum"]
    kept = momentum**ageing.length
    pushed = ageing.left * (1 - kept) / (1 - momentum) * (1 - group["dampening"])
    state["momentum_buffer"].mul_(kept).add_(ageing.mean, alpha=pushed)


def _start_one(gradient: Tensor, noise: Tensor, training: TrainingConfig, shapes: Shapes) -> Tensor:
    del noise, training, shapes
    return torch.ones_like(gradient)


def _adjoint_sgd(
    state: State, group: Mapping[str, Any], gradient: Tensor, slopes: Slopes, smoothing: float
) -> Slopes:
    """Derivatives of θ' = θ − η b', b' = μb + (1 − τ)(g + λθ) without b and τ in the first step.

    Nesterov: θ' = θ − η (u + μb').
    """
    del gradient, smoothing
    rate, momentum = group["lr"], group["momentum"]
    pull = -rate * slopes["parameter"]
    if not momentum:
        return {"parameter": slopes["parameter"] + group["weight_decay"] * pull, "gradient": pull}
    by_buffer = slopes.get("momentum_buffer", torch.zeros_like(pull)) + (
        momentum * pull if group["nesterov"] else pull
    )
    first = state.get("momentum_buffer") is None
    by_update = by_buffer * (1.0 if first else 1 - group["dampening"]) + (pull if group["nesterov"] else 0)
    return {
        "parameter": slopes["parameter"] + group["weight_decay"] * by_update,
        "gradient": by_update,
        "momentum_buffer": torch.zeros_like(pull) if first else momentum * by_buffer,
    }


SGD = OptimizerKind(
    "sgd",
    _build_sgd,
    _scale_one,
    _age_sgd,
    None,
    _start_one,
    adjoint=_adjoint_sgd,
    gain=lambda group: (1 - group["dampening"]) / (1 - group["momentum"]),
    recursion="sgd",
    reads=("momentum",),
    arguments={"dampening": 0.0, "nesterov": False},
)


# Lion


class Lion(Optimizer):
    """θ ← θ − η (sign(β₁m + (1 − β₁)g) + λθ), then m ← β₂m + (1 − β₂)g.

    Source: Chen et al., Symbolic discovery of optimization algorithms, arXiv 2302.06675, algorithm 2.

    Args:
        groups: parameters, or groups of them.
        lr: η.
        betas: (β₁, β₂).
        weight_decay: λ, decoupled.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; returns what `closure` gives, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                update = torch.lerp(parameter.grad, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
        return loss


def _build_lion(groups: Groups, training: TrainingConfig) -> list[Built]:
    return [Built(Lion(groups, lr=1.0, betas=training.betas), LION)]


def _scale_sign(state: State, group: Mapping[str, Any], square: Tensor) -> Tensor:
    """1/√E[g²]: how far the mean of a sign moves with the mean of what it is the sign of."""
    del state, group
    return square.clamp(min=TINY).rsqrt()


def _age_lion(state: State, group: Mapping[str, Any], ageing: Ageing) -> None:
    if "exp_avg" in state:
        state["exp_avg"].lerp_(ageing.mean, 1 - group["betas"][1] ** ageing.length)


def _start_lion(gradient: Tensor, noise: Tensor, training: TrainingConfig, shapes: Shapes) -> Tensor:
    """1/√(g² + πσ²/2): −D g is the mean sign for small g, and the sign itself without noise."""
    return _start_adamw(gradient, noise * (math.pi / 2), training, shapes)


LION = OptimizerKind("lion", _build_lion, _scale_sign, _age_lion, None, _start_lion, reads=("betas",))


# Adafactor


def _build_adafactor(groups: Groups, training: TrainingConfig) -> list[Built]:
    settings = arguments_of(ADAFACTOR, training)
    kind: Any = hf_module("transformers").Adafactor
    return [Built(kind(groups, lr=1.0, scale_parameter=False, relative_step=False, **settings), ADAFACTOR)]


def _scale_adafactor(state: State, group: Mapping[str, Any], square: Tensor) -> Tensor:
    """1/√v̂ with v̂ from its rows and columns, clipped to the root mean square that the rule allows."""
    if "exp_avg_sq_row" in state:
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        second = (rows / rows.mean(-1, keepdim=True)).unsqueeze(-1) * columns.unsqueeze(-2)
    elif "exp_avg_sq" in state:
        second = state["exp_avg_sq"]
    else:
        second = square
    scale = second.clamp(min=TINY).rsqrt()
    typical = float((square.sqrt() * scale).square().mean().sqrt())
    return scale / max(1.0, typical / group["clip_threshold"])


def _age_adafactor(state: State, group: Mapping[str, Any], ageing: Ageing) -> None:
    if "step" not in state:
        return
    kept = _kept_by_adafactor(int(state["step"]), ageing.length, group)
    square = ageing.square + group["eps"][0]
    if "exp_avg_sq_row" in state:
        state["exp_avg_sq_row"].lerp_(square.mean(-1), 1 - kept)
        state["exp_avg_sq_col"].lerp_(square.mean(-2), 1 - kept)
    else:
        state["exp_avg_sq"].lerp_(square, 1 - kept)
    state["step"] += ageing.length


def _kept_by_adafactor(done: int, length: int, group: Mapping[str, Any]) -> float:
    """Share of the second moment that is left after `length` steps more: Π (1 − k^(−0.8))."""
    steps = torch.arange(done + 1, done + length + 1, dtype=torch.float64)
    return float((1 - steps ** group["decay_rate"]).clamp(min=0).prod())


def _admit_adafactor(state: State, group: Mapping[str, Any], pull: Tensor, share: float, length: int) -> None:
    if "step" not in state:
        return
    weight = share * (1 - _kept_by_adafactor(max(int(state["step"]) - length, 0), length, group))
    square = pull.square()
    if "exp_avg_sq_row" in state:
        state["exp_avg_sq_row"].add_(square.mean(-1), alpha=weight)
        state["exp_avg_sq_col"].add_(square.mean(-2), alpha=weight)
    elif "exp_avg_sq" in state:
        state["exp_avg_sq"].add_(square, alpha=weight)


ADAFACTOR = OptimizerKind(
    "adafactor",
    _build_adafactor,
    _scale_adafactor,
    _age_adafactor,
    _admit_adafactor,
    _start_adamw,
    arguments={"clip_threshold": 1.0, "decay_rate": -0.8},
)


# RMSprop


def _build_rmsprop(groups: Groups, training: TrainingConfig) -> list[Built]:
    settings = arguments_of(RMSPROP, training)
    return [Built(torch.optim.RMSprop(groups, lr=1.0, momentum=training.momentum, **settings), RMSPROP)]


def _scale_rmsprop(state: State, group: Mapping[str, Any], square: Tensor) -> Tensor:
    second = state.get("square_avg", square)
    return second.sqrt().add_(group["eps"]).reciprocal_()


def _age_rmsprop(state: State, group: Mapping[str, Any], ageing: Ageing) -> None:
    if "square_avg" not in state:
        return
    state["square_avg"].lerp_(ageing.square, 1 - group["alpha"] ** ageing.length)
    state["step"] += ageing.length
    if group["momentum"]:
        kept = group["momentum"] ** ageing.length
        step = ageing.mean * _scale_rmsprop(state, group, ageing.square)
        state["momentum_buffer"].mul_(kept)
        state["momentum_buffer"].add_(step, alpha=ageing.left * (1 - kept) / (1 - group["momentum"]))


def _admit_rmsprop(state: State, group: Mapping[str, Any], pull: Tensor, share: float, length: int) -> None:
    if "square_avg" in state:
        state["square_avg"].addcmul_(pull, pull, value=share * (1 - group["alpha"] ** length))


RMSPROP = OptimizerKind(
    "rmsprop",
    _build_rmsprop,
    _scale_rmsprop,
    _age_rmsprop,
    _admit_rmsprop,
    _start_adamw,
    gain=lambda group: 1 / (1 - group["momentum"]),
    reads=("momentum",),
    arguments={"alpha": 0.99, "eps": 1e-8},
)


# Muon


def _build_muon(groups: Groups, training: TrainingConfig) -> list[Built]:
    """Muon for hidden matrices, AdamW for all else: embeddings, the output layer, vectors."""
    settings = arguments_of(MUON, training)
    matrices: Groups = []
    others: Groups = []
    for group in groups:
        chosen = [is_hidden_matrix(n, p.ndim) for n, p in zip(group["names"], group["params"], strict=True)]
        for wanted, kept in ((True, matrices), (False, others)):
            keep = [i for i, is_matrix in enumerate(chosen) if is_matrix == wanted]
            if keep:
                members = {key: [group[key][i] for i in keep] for key in ("params", "names")}
                kept.append({**group, **members})
    parts: list[Built] = []
    if matrices:
        optimizer = torch.optim.Muon(matrices, lr=1.0, adjust_lr_fn="match_rms_adamw", **settings)
        parts.append(Built(optimizer, MUON))
    return parts + (_build_adamw(others, training) if others else [])


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon updates it: two dimensions, and no embedding or output layer."""
    return dimensions == 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def _scale_muon(state: State, group: Mapping[str, Any], square: Tensor) -> Tensor:
    """One number: the update has a root mean square of .2 whatever the gradient's."""
    del state, group
    return 0.2 * square.mean().clamp(min=TINY).rsqrt()


def _age_muon(state: State, group: Mapping[str, Any], ageing: Ageing) -> None:
    if "momentum_buffer" in state:
        state["momentum_buffer"].lerp_(ageing.mean, 1 - group["momentum"] ** ageing.length)


def _start_muon(gradient: Tensor, noise: Tensor, training: TrainingConfig, shapes: Shapes) -> Tensor:
    scales: list[Tensor] = []
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape)
        part, spread = gradient[at:end], noise[at:end]
        if is_hidden_matrix(name, len(shape)):
            scales.append(_scale_muon({}, {}, part.square() + spread).expand_as(part))
        else:
            scales.append(_start_adamw(part, spread, training, {}))
        at = end
    return torch.cat(scales)


MUON = OptimizerKind(
    "muon",
    _build_muon,
    _scale_muon,
    _age_muon,
    None,
    _start_muon,
    reads=("betas", "eps"),
    arguments={"momentum": 0.95, "nesterov": True, "ns_steps": 5},
)


def _approximated(parent: OptimizerKind, names: Sequence[str], how: str) -> dict[str, OptimizerKind]:
    note = f"is carried out as {parent.name} in full precision: {how}"
    return {name: replace(parent, name=name, note=f"{name} {note}") for name in names}


def _same(parent: OptimizerKind, names: Sequence[str]) -> dict[str, OptimizerKind]:
    return {name: replace(parent, name=name) for name in names}


_EIGHT = "states of few bits round each step"
_PAGED = "paging changes where the states lie, not the numbers"
_GALORE = "GaLore's projected gradients and their scale are left out"

_ENTRIES: dict[str, OptimizerKind] = {
    **{kind.name: kind for kind in (ADAMW, SGD, ADAFACTOR, LION, MUON, RMSPROP)},
    **_same(ADAMW, ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")),
    **_same(LION, ("lion_32bit",)),
    **_approximated(ADAMW, ("paged_adamw_32bit",), _PAGED),
    **_approximated(LION, ("paged_lion_32bit",), _PAGED),
    **_approximated(
        ADAMW,
        ("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "paged_adamw_8bit"),
        _EIGHT,
    ),
    **_approximated(LION, ("lion_8bit", "paged_lion_8bit"), _EIGHT),
    **_approximated(
        ADAMW,
        (
            *("galore_adamw", "galore_adamw_8bit"),
            *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
        ),
        _GALORE,
    ),
    **_approximated(ADAFACTOR, ("galore_adafactor", "galore_adafactor_layerwise"), _GALORE),
}

#: All optimizers by name. A further one is one more entry.
OPTIMIZERS: Table[OptimizerKind] = Table(names.OPTIMIZERS, _ENTRIES)
