"""Gradients of one batch before they are multiplied out: sums of outer products over positions.

A weight W (O, I) of a linear layer has G_i = Σ_s y'_is x_isᵀ. The two factors, S · (O + I) numbers a
sample, are smaller than the block O · I while S < O · I / (O + I); an embedding's left factor is one-hot
and is kept as its row numbers. What has no such form is a plain block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Outer",
    "Part",
    "Rows",
    "block_of",
    "dots_of",
    "entries_of",
    "lightest",
    "samples_of",
    "tensors_of",
    "weighted_sum_of",
    "with_tensors",
]

#: Entries of a block that is multiplied out at a time where it is not wanted as a whole.
BLOCK_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Outer:
    """Σ_s left_is right_isᵀ with left (B, S, O) and right (B, S, I)."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (O, I) of the parameter."""
        return self.left.shape[2], self.right.shape[2]


@dataclass(frozen=True)
class Rows:
    """Σ_s e_{index_is} right_isᵀ with index (B, S) below `height` and right (B, S, I)."""

    index: Tensor
    right: Tensor
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (height, I) of the parameter."""
        return self.height, self.right.shape[2]


#: What one call of a module adds to a parameter's gradients: factors, or a block (B, *shape).
Part = Outer | Rows | Tensor


def block_of(part: Part) -> Tensor:
    """The gradients multiplied out, (B, *shape)."""
    if isinstance(part, Outer):
        return torch.bmm(part.left.transpose(1, 2), part.right)
    if isinstance(part, Rows):
        size, width = part.index.shape[0], part.right.shape[2]
        block = part.right.new_zeros(size * part.height, width)
        offsets = torch.arange(size, device=part.index.device)[:, None] * part.height
        block.index_add_(0, (part.index + offsets).reshape(-1), part.right.reshape(-1, width))
        return block.view(size, part.height, width)
    return part


def tensors_of(part: Part) -> tuple[Tensor, ...]:
    """The tensors a part holds, each with the samples in dimension 0."""
    if isinstance(part, Tensor):
        return (part,)
    return (part.left, part.right) if isinstance(part, Outer) else (part.index, part.right)


def with_tensors(part: Part, tensors: Sequence[Tensor]) -> Part:
    """A part of the same kind that holds other tensors."""
    if isinstance(part, Tensor):
        return tensors[0]
    first, right = tensors
    return Outer(first, right) if isinstance(part, Outer) else Rows(first, right, part.height)


def samples_of(parts: Sequence[Part]) -> int:
    """B, the samples of a batch's parts."""
    return tensors_of(parts[0])[0].shape[0]


def entries_of(part: Part) -> int:
    """Numbers held for one sample."""
    return sum(math.prod(tensor.shape[1:]) for tensor in tensors_of(part))


def lightest(parts: Sequence[Part]) -> list[Part]:
    """The parts as they are, or multiplied out and summed where that takes less memory."""
    if len(parts) == 1 and isinstance(parts[0], Tensor):
        return list(parts)
    shape = parts[0].shape[1:] if isinstance(parts[0], Tensor) else parts[0].shape
    if sum(map(entries_of, parts)) < math.prod(shape):
        return list(parts)
    total = block_of(parts[0])
    for part in parts[1:]:
        total = total + block_of(part)
    return [total]


def dots_of(parts: Sequence[Part], directions: Tensor) -> Tensor:
    """⟨G_i, V_m⟩ (B, m) without G where that is cheaper: Σ_s ⟨y'_is, V x_is⟩.

    Args:
        parts: what the module calls left for one parameter.
        directions: (*shape, m) V in the dtype of the parts.
    """
    return sum((_dots(part, directions) for part in parts[1:]), _dots(parts[0], directions))


def _dots(part: Part, directions: Tensor) -> Tensor:
    count = directions.shape[-1]
    if isinstance(part, Tensor):
        return part.flatten(1) @ directions.reshape(-1, count)
    if isinstance(part, Rows):
        # One row of V per position: S · I multiplications.
        picked = directions[part.index].flatten(1, 2)
        return torch.bmm(part.right.flatten(1)[:, None], picked)[:, 0]
    if count == 1:
        return ((part.left @ directions[..., 0]) * part.right).sum((1, 2))[:, None]
    # Several directions: multiplying out once is cheaper than one product each.
    total = directions.new_zeros(part.left.shape[0], count)
    step = max(1, BLOCK_ENTRIES // (part.left.shape[0] * part.right.shape[2]))
    for start in range(0, part.left.shape[2], step):
        block = torch.bmm(part.left[:, :, start : start + step].transpose(1, 2), part.right)
        total += block.flatten(1) @ directions[start : start + step].flatten(0, 1)
    return total


def weighted_sum_of(parts: Sequence[Part], weights: Tensor) -> Tensor:
    """Σ_i w_i G_i (*shape) without G: the samples' positions are summed over as well.

    Args:
        parts: what the module calls left for one parameter.
        weights: (B,) in the dtype of the parts.
    """
    return sum((_weighted(part, weights) for part in parts[1:]), _weighted(parts[0], weights))


def _weighted(part: Part, weights: Tensor) -> Tensor:
    if isinstance(part, Tensor):
        return torch.tensordot(weights, part, 1)
    right = (part.right * weights[:, None, None]).flatten(0, 1)
    if isinstance(part, Outer):
        return part.left.flatten(0, 1).T @ right
    return right.new_zeros(part.shape).index_add_(0, part.index.flatten(), right)
