"""Estimates of a row's score that cost less than its gradient: which rows are worth exact products.

The score is the slope of the row's loss along one direction v, the same for all rows:

    s_j = ⟨v, g_j⟩ = (ℓ_j(θ + εv) − ℓ_j(θ − εv))/2ε + O(ε²)

`differences` takes two forward passes and no backward pass. `sketch` takes one forward and backward pass
in which no weight gradient is multiplied out, and projects the factors with random sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from arisk.anatomy.probe import batch_losses
from arisk.base.errors import NumericsError
from arisk.base.task import LossFn
from arisk.gradients import ParameterLayout, move_batch
from arisk.gradients.layout import parameters_of
from arisk.gradients.sketch import Sketch, balanced, per_sample_sketches, sketch_of
from arisk.gradients.wide import in_float32, is_narrow, widened
from arisk.screening.points import Place
from arisk.screening.rows import RowGroup, overflowing, with_row
from arisk.training.loop import put

__all__ = ["Estimate", "by_differences", "by_sketches", "contrast", "worth_estimating"]

#: ``estimate(groups)``: (B, 2) float64, every row's estimated score (nats per unit learning rate) and loss
#: (nats per response token).
Estimate = Callable[[Sequence[RowGroup]], Tensor]

#: Rows from which `screen.method: auto` estimates, where at least this share of the model is selected:
#: a gradient of few parameters costs no more than two forward passes.
ROWS, SELECTED = 5_000, 0.5
#: Share of ‖θ‖ (of 1 where that is less) from which the search for ε starts, its rounds, and the root mean
#: square of ℓ(θ + εv) − ℓ(θ − εv) that it ends at (nats per token): a step at which losses already bend.
START, ROUNDS, RISE = 1e-4, 4, 2e-2
#: From there ε falls by this factor so many times: at the bottom losses are mostly rounding.
FACTOR, RUNGS = 4.0, 7


def worth_estimating(model: nn.Module, layout: ParameterLayout, rows: int | None) -> bool:
    """Whether `auto` estimates before it multiplies: many rows, and gradients of most of the model.

    Args:
        model: the model.
        layout: the selected parameters.
        rows: rows to be scored; None where that is not known.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    return rows is not None and rows >= ROWS and layout.numel >= SELECTED * every


def contrast(place: Place) -> Tensor:
    """The direction v (P,): −D(∇L_s − ∇L_c), or −D∇L_s without control data."""
    directions = place.directions
    return directions[:, 0] - directions[:, 2] if directions.shape[1] > 2 else directions[:, 0]


@contextmanager
def by_differences(
    model: nn.Module, layout: ParameterLayout, place: Place, loss_fn: LossFn, probe: Sequence[RowGroup]
) -> Generator[Estimate]:
    """Slopes along v by central differences; a narrow model is float32 inside.

    An AdamW direction is long where gradients are small, so losses bend early along it, while bulk rows
    have slopes near the rounding of their loss. ε is the one of a ladder at which slopes change least.

    Args:
        model: the model, inside `measuring`; stands anywhere, and is moved.
        layout: the selected parameters.
        place: the point.
        loss_fn: per-sample losses.
        probe: rows on which ε is set, best spread over the data.

    Raises:
        NumericsError: a loss is not finite; names the row.
    """
    narrow = any(is_narrow(parameter) for parameter in model.parameters())
    with in_float32(model) if narrow else nullcontext():
        parameters = parameters_of(model, layout)
        along, at = contrast(place), place.theta.to(torch.promote_types(place.theta.dtype, torch.float32))
        along = along.to(at.dtype)

        def losses(groups: Sequence[RowGroup], step: float) -> Tensor:
            put(parameters, list(layout.split(at + step * along).values()))
            return torch.cat([_losses(model, group, loss_fn) for group in groups])

        def slopes(step: float) -> Tensor:
            return (losses(probe, step) - losses(probe, -step)) / (2 * step)

        size = float(along.norm())
        step = _step(slopes, START * max(float(at.norm()), 1.0) / size if size else 1.0)

        def estimate(groups: Sequence[RowGroup]) -> Tensor:
            up, down = losses(groups, step), losses(groups, -step)
            _require_finite(groups, up + down)
            # The loss itself to O(ε²), from passes that are made anyway.
            return torch.stack([(up - down) / (2 * step), (up + down) / 2], dim=1)

        yield estimate


def _step(slopes: Callable[[float], Tensor], step: float) -> float:
    """ε at which slopes (B,) change least from one rung to the next, measured by the median row.

    Slopes beyond the numbers are those of a step that is too long.
    """
    for _ in range(ROUNDS):
        rise = 2 * step * float(slopes(step).square().mean().sqrt())
        # Beyond what the losses bear, or below their rounding, the ratio says nothing: no wild leaps.
        if not math.isfinite(rise):
            step *= 1e-2
        else:
            step *= min(max(RISE / rise, 1e-2), 1e2) if rise else 1e2
    best, least = step, math.inf
    before = slopes(step)
    for _ in range(RUNGS):
        step /= FACTOR
        now = slopes(step)
        known = now.isfinite()
        size = now.abs() + now[known].abs().median() if bool(known.any()) else now
        # Slopes that are all 0 do not change.
        changes = ((now - before).abs() / size)[known & (size > 0)]
        change = float(changes.median()) if len(changes) else (0.0 if bool(known.all()) else math.inf)
        if change < least:
            best, least = step, change
        before = now
    return best


def _losses(model: nn.Module, group: RowGroup, loss_fn: LossFn) -> Tensor:
    """(B,) losses of a group, finite or not."""
    batch = widened(move_batch(group.batch, next(model.parameters()).device))
    return batch_losses(model, batch, loss_fn)


def _require_finite(groups: Sequence[RowGroup], losses: Tensor) -> None:
    """Name the first row whose loss is not finite."""
    finite = losses.isfinite()
    if bool(finite.all()):
        return
    row = [row for group in groups for row in group.rows][int((~finite).to(torch.int64).argmax())]
    raise NumericsError(
        f"the loss of row {row} is not finite beside the point at which rows are scored",
        where=f"row {row} (counted from 0, in data order)",
        fix="check the row, load the model in float32 or float64, or set `screen.method: exact`, which takes "
        "no step away from the point",
    )


@contextmanager
def by_sketches(
    model: nn.Module, layout: ParameterLayout, place: Place, loss_fn: LossFn, side: int, engine: str
) -> Generator[Estimate]:
    """Unbiased estimates ⟨L(G∘s)Rᵀ, L(V/s)Rᵀ⟩ from sketches whose sides are balanced for v.

    See `arisk.gradients.sketch` for L, R and s; V is v as a matrix, parameter by parameter.

    Args:
        model: the model, inside `measuring`; is moved to the point.
        layout: the selected parameters.
        place: the point.
        loss_fn: per-sample losses.
        side: entries kept of each side of a matrix.
        engine: engine of the per-sample gradients; only hooks has factors, which make a sketch cheap.

    Raises:
        NumericsError: a loss or gradient is not finite; names the row.
    """
    parameters = parameters_of(model, layout)
    like = parameters[0]
    sketch = Sketch(layout, side=side, dtype=like.dtype, device=like.device)
    direction = contrast(place)
    values = torch.empty(sketch.numel, dtype=like.dtype, device=like.device)
    for name in layout.names:
        where, plain = layout.slice_of(name), sketch.sides[name]
        own = direction[where].to(torch.float64).reshape(plain.rows, plain.columns)
        # 1/D is the root mean square of the optimizer's gradients, where it has one.
        ratio = own.abs() * place.metric[where].to(torch.float64).reshape(own.shape)
        sketch.sides[name], scale = balanced(plain, ratio) if bool(own.any()) else (plain, 1.0)
        values[sketch.places[name]] = sketch_of([(own / scale)[None].to(like)], plain)[0]

    def estimate(groups: Sequence[RowGroup]) -> Tensor:
        put(parameters, list(layout.split(place.theta).values()))
        made: list[Tensor] = []
        for group in groups:
            batch = move_batch(group.batch, like.device)
            try:
                losses, rows = per_sample_sketches(model, batch, loss_fn, layout, sketch, engine=engine)
            except NumericsError as err:
                raise with_row(err, group) from err
            found = (rows @ values).to("cpu", torch.float64)
            if not bool(found.isfinite().all()):
                raise overflowing(group, found.isfinite())
            made.append(torch.stack([found, losses.detach().to("cpu", torch.float64)], dim=1))
        return torch.cat(made)

    yield estimate
