"""Sketches of per-sample gradients: small random projections whose inner products estimate the true ones.

A weight's gradient G (O, I) becomes L G Rᵀ with L (p, O) and R (q, I) of independent N(0, 1/p) and
N(0, 1/q) entries, so E⟨sketch, sketch'⟩ = ⟨G, G'⟩ (Johnson–Lindenstrauss); a side no longer than p is kept
as it is. From the factors of G = Y'ᵀX it is (Y'Lᵀ)ᵀ(XRᵀ): nothing of the parameter's size is made. The
sides are seeded by the parameter's name, so sketches made at different times or by different processes
go together. The error of an estimate grows with ‖G‖‖G'‖, so two gradients that are nearly orthogonal
need `balanced` sides. For ranking examples only: eigenvalues, overlap and γ̂ are biased in a sketch, and
exact products of a few directions cost less. Say "sketch" beside every number that comes from one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arisk.base.task import Batch, LossFn
from arisk.gradients.batches import batch_size
from arisk.gradients.engines import per_sample_parts
from arisk.gradients.factors import Outer, Part
from arisk.gradients.layout import ParameterLayout

__all__ = ["Sides", "Sketch", "balanced", "per_sample_sketches", "sketch_of", "sketch_products"]

#: Ratios below this share of the largest count as that.
SMALLEST = 1e-12


@dataclass(frozen=True)
class Sides:
    """Projections of one parameter, None where that side is kept: left (p, O), right (q, I).

    A parameter that is no matrix is taken as one row, O = 1.
    """

    left: Tensor | None
    right: Tensor | None
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Numbers in the sketch of one gradient."""
        height = self.rows if self.left is None else self.left.shape[0]
        return height * (self.columns if self.right is None else self.right.shape[0])


class Sketch:
    """The random sides of every selected parameter, and where its numbers stand in a sketch.

    Args:
        layout: the selected parameters.
        side: p = q, entries kept of each side of a matrix; a vector keeps side².
        dtype: dtype of the gradients.
        device: device of the gradients.
    """

    def __init__(
        self, layout: ParameterLayout, *, side: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sides: dict[str, Sides] = {}
        self.places: dict[str, slice] = {}
        self.numel = 0
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            rows, columns = shape if len(shape) == 2 else (1, math.prod(shape))
            width = side if len(shape) == 2 else side * side
            sides = Sides(
                _side(f"{name}/left", side, rows, dtype, device),
                _side(f"{name}/right", width, columns, dtype, device),
                rows,
                columns,
            )
            self.sides[name] = sides
            self.places[name] = slice(self.numel, self.numel + sides.numel)
            self.numel += sides.numel


def _side(seed: str, kept: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(kept, length) of N(0, 1/kept) drawn on the CPU from the text; None where nothing would be saved."""
    if length <= kept:
        return None
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(kept, length, generator=generator, dtype=torch.float32) / math.sqrt(kept)
    return drawn.to(device, dtype)


def balanced(sides: Sides, ratio: Tensor) -> tuple[Sides, Tensor]:
    """Sides that estimate the product with one known direction V with less noise.

    ⟨G, V⟩ = ⟨G∘s, V/s⟩ for any s > 0, and the noise grows with ‖G∘s‖‖V/s‖, which is least in the mean
    at s² ∝ |V|/rms(G) (Cauchy–Schwarz). Only s = abᵀ can be drawn into the sides, so that factors stay
    factors: √ratio is fitted by the means of its logarithm over rows and columns. A side that is kept is
    left alone.

    Args:
        sides: the parameter's sides, with which V/s is to be projected.
        ratio: (rows, columns) |V|/rms(G), ≥ 0, up to a factor.

    Returns:
        The sides for G, and s (rows, columns) that V is to be divided by.
    """
    logs = 0.5 * ratio.clamp(min=max(SMALLEST * float(ratio.max()), torch.finfo(ratio.dtype).tiny)).log()
    both = sides.left is not None and sides.right is not None
    middle = logs.mean() / 2 if both else torch.zeros_like(logs.mean())
    a = torch.ones_like(logs[:, 0]) if sides.left is None else (logs.mean(1) - middle).exp()
    b = torch.ones_like(logs[0]) if sides.right is None else (logs.mean(0) - middle).exp()
    left = None if sides.left is None else sides.left * a.to(sides.left)
    right = None if sides.right is None else sides.right * b.to(sides.right)
    return Sides(left, right, sides.rows, sides.columns), a[:, None] * b


def sketch_of(parts: Sequence[Part], sides: Sides) -> Tensor:
    """L G_i Rᵀ (B, sketch size) of one parameter's gradients, given as the sum of parts.

    Args:
        parts: factors or blocks, as `hook_parts` hands them on.
        sides: the parameter's projections.
    """
    return sum((_projected(part, sides) for part in parts[1:]), _projected(parts[0], sides))


def _projected(part: Part, sides: Sides) -> Tensor:
    if isinstance(part, Tensor):
        block = part.reshape(part.shape[0], sides.rows, sides.columns)
        if sides.right is not None:
            block = block @ sides.right.T
        return (block if sides.left is None else sides.left @ block).flatten(1)
    right = part.right if sides.right is None else part.right @ sides.right.T
    if isinstance(part, Outer):
        left = part.left if sides.left is None else part.left @ sides.left.T
    elif sides.left is None:
        left = torch.nn.functional.one_hot(part.index, part.height).to(right.dtype)
    else:
        left = sides.left.T[part.index]
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


def per_sample_sketches(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sketch: Sketch,
    *,
    engine: str = "hooks",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) and sketches (B, D) of all samples from one forward and backward pass.

    Args:
        model: the model, inside `measuring`.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sketch: the projections.
        engine: "hooks" never multiplies a linear layer's gradient out; the others do.
        offset: index of the batch's first sample, for messages.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite; names the sample.
        ShapeError: a module's dimension 0 is not the batch, so hooks cannot tell samples apart.
    """
    rows: list[Tensor] = []

    def keep(name: str, parts: Sequence[Part]) -> None:
        made = sketch_of(parts, sketch.sides[name])
        if not rows:
            rows.append(made.new_empty(batch_size(batch), sketch.numel))
        rows[0][:, sketch.places[name]] = made

    losses = per_sample_parts(model, batch, loss_fn, layout, keep, engine=engine, offset=offset)
    return losses, rows[0]


def sketch_products(first: Tensor, second: Tensor) -> Tensor:
    """Estimates of ⟨G_i, G_j⟩, (N, M) float64, from sketches (N, D) and (M, D).

    Column blocks are multiplied in the sketches' dtype and summed in float64.
    """
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for start in range(0, first.shape[1], 4096):
        total += first[:, start : start + 4096] @ second[:, start : start + 4096].T
    return total
