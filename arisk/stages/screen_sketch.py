"""Estimates of a row's products with a few directions from a sketch of its gradient.

Sketching costs less than a plain forward and backward pass, since no weight gradient is multiplied
out; what it gives is noisy. So it only says which rows are worth exact products. The directions are
projected by the same random sides, see `arisk.gradients.sketch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arisk.errors import NumericsError
from arisk.gradients import ParameterLayout, move_batch
from arisk.gradients.sketch import Sketch, per_sample_sketches, sketch_of
from arisk.stages.screen_rows import RowGroup, overflowing, with_row
from arisk.task import LossFn

__all__ = ["SketchedDirections", "row_estimates", "sketched", "worth_sketching"]

#: Rows from which `screen.method: auto` sketches, where a sketch is this much smaller than a gradient.
ROWS, SMALLER = 20_000, 16


@dataclass(frozen=True)
class SketchedDirections:
    """Directions in the coordinates of a sketch.

    Attributes:
        sketch: the random sides.
        values: (D, m), the projections of the m directions.
    """

    sketch: Sketch
    values: Tensor


def worth_sketching(layout: ParameterLayout, side: int, rows: int | None, engine: str) -> bool:
    """Whether `auto` sketches: many rows, factors at hand, and gradients far larger than their sketch.

    Args:
        layout: the selected parameters.
        side: entries kept of each side of a matrix.
        rows: rows to be scored; None where that is not known.
        engine: engine of the per-sample gradients; only hooks has factors.
    """
    if rows is None or rows < ROWS or engine != "hooks":
        return False
    return layout.numel >= SMALLER * _numel(layout, side)


def _numel(layout: ParameterLayout, side: int) -> int:
    """Numbers in the sketch of one gradient, without drawing it."""
    total = 0
    for shape in layout.shapes:
        if len(shape) == 2:
            total += min(side, shape[0]) * min(side, shape[1])
        else:
            total += min(side * side, torch.Size(shape).numel())
    return total


def sketched(layout: ParameterLayout, directions: Tensor, side: int, like: Tensor) -> SketchedDirections:
    """Project directions (P, m) with the sides of a sketch on the device and in the dtype of `like`."""
    sketch = Sketch(layout, side=side, dtype=like.dtype, device=like.device)
    values = torch.empty(sketch.numel, directions.shape[1], dtype=like.dtype, device=like.device)
    for name in layout.names:
        block = directions[layout.slice_of(name)].T.to(like).reshape(-1, *layout.shape_of(name))
        values[sketch.places[name]] = sketch_of([block], sketch.sides[name]).T
    return SketchedDirections(sketch, values)


def row_estimates(
    model: nn.Module,
    group: RowGroup,
    loss_fn: LossFn,
    layout: ParameterLayout,
    directions: SketchedDirections,
    *,
    engine: str,
) -> Tensor:
    """Unbiased estimates of what `row_products` gives exactly.

    Args:
        model: the model, inside `measuring`.
        group: B rows.
        loss_fn: their loss.
        layout: the selected parameters.
        directions: m directions.
        engine: engine of the per-sample gradients.

    Returns:
        (B, m + 3) float64: estimates of ⟨v_m, g_j⟩ and of ‖g_j‖, NaN for the D-norm, and the exact ℓ_j.

    Raises:
        NumericsError: a loss or gradient is not finite; names the row.
    """
    batch = move_batch(group.batch, next(model.parameters()).device)
    try:
        losses, rows = per_sample_sketches(model, batch, loss_fn, layout, directions.sketch, engine=engine)
    except NumericsError as err:
        raise with_row(err, group) from err
    products = (rows @ directions.values).to("cpu", torch.float64)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
    finite = products.isfinite().all(1) & norms.isfinite()
    if not bool(finite.all()):
        raise overflowing(group, finite)
    loss = losses.detach().reshape(-1, 1).to("cpu", torch.float64)
    nothing = torch.full_like(loss, torch.nan)
    return torch.cat([products, norms[:, None], nothing, loss], dim=1)
