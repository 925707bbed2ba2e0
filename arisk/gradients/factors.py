"""Gradients of one batch before they are multiplied out: sums of outer products over positions.

A weight W (O, I) of a linear layer has G_i = Σ_s y'_is x_isᵀ. The two factors, S · (O + I) numbers a
sample, are smaller than the block O · I while S < O · I / (O + I); an embedding's left factor is one-hot
and is kept as its row numbers. What has no such form is a plain block.

Where per-sample gradients go as they are made.

Inner products and moments of one parameter's gradients over all samples, from their factors.

The gradients are multiplied out some columns at a time, used while they are in the cache, and dropped.
Their Gram matrix comes from those columns, or, where sequences are short, straight from the factors:
⟨G_i, G_j⟩ = Σ_{s,t} ⟨y'_is, y'_jt⟩⟨x_is, x_jt⟩ ("ghost" products), by the cheaper count of operations.

Source: Goodfellow, Efficient per-example gradient computations (arXiv 1510.01799), for norms; Li et al.,
Large language models can be strong differentially private learners (arXiv 2110.05679), for sequences. Here
for all pairs of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.geometry.vectors import COLUMNS, gram

__all__ = [
    "Outer",
    "ParameterProducts",
    "Part",
    "PartSink",
    "Rows",
    "Sink",
    "block_of",
    "blocks_of",
    "dots_of",
    "entries_of",
    "ghost_gram",
    "is_ghost",
    "lightest",
    "parameter_products",
    "samples_of",
    "tensors_of",
    "weighted_sum_of",
    "widened",
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


def widened(part: Part) -> Part:
    """The part with half-precision numbers in float32; numbers that are wide already are shared."""
    half = (torch.bfloat16, torch.float16)
    return with_tensors(part, [t.float() if t.dtype in half else t for t in tensors_of(part)])


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


#: ``sink(parameter name, block)`` with block (B, *shape), detached; one call per parameter and batch.
Sink = Callable[[str, Tensor], None]

#: ``sink(parameter name, parts)``: the parameter's gradients are the sum of the parts.
PartSink = Callable[[str, Sequence[Part]], None]


#: Entries of a block (N × columns) that is made at a time; it stays in the last cache.
GRAM_ENTRIES = 1 << 23
#: Rows of a parameter in a block, as far as they take no more than twice that: fewer multiply slowly.
BLOCK_ROWS = 96
#: One of the S² numbers of a pair of samples costs so many multiplications: it is read and written
#: several times and never leaves memory, by `tests.bench store`.
PAIR_COST = 12
#: Share of the multiplications of N² inner products that the tiles of `gram` leave.
TILED = 0.625


@dataclass(frozen=True)
class ParameterProducts:
    """K (N, N) float64, mean and mean square (p,) of one parameter's gradients."""

    gram: Tensor
    mean: Tensor
    diagonal: Tensor


def parameter_products(
    batches: Sequence[Sequence[Part]],
    shape: Sequence[int],
    *,
    ghost: bool | None = None,
    share: tuple[int, int] = (0, 1),
) -> ParameterProducts:
    """K = G Gᵀ, ḡ and the mean of G² of one parameter.

    Args:
        batches: parts of every batch of samples, in order.
        shape: shape of the parameter.
        ghost: whether K comes from the factors; None chooses by `is_ghost`.
        share: (rank, world): this process takes part of the work, and the sum over processes is whole.
    """
    samples = sum(map(samples_of, batches))
    if ghost is None:
        ghost = is_ghost(batches, shape)
    total = torch.zeros(samples, samples, dtype=torch.float64)
    if ghost:
        total = ghost_gram(batches, share=share)
    dtype = tensors_of(batches[0][0])[-1].dtype
    mean, diagonal = torch.zeros(2, math.prod(shape), dtype=dtype)
    weights = torch.full((samples,), 1 / samples, dtype=dtype)
    for where, block in blocks_of(batches, shape, share=share):
        if not ghost:
            total += gram(block)
        for start in range(0, block.shape[1], COLUMNS):
            # Two results from one visit of the cache.
            part = block[:, start : start + COLUMNS]
            place = slice(where.start + start, where.start + start + part.shape[1])
            mean[place] = weights @ part
            diagonal[place] = weights @ part.square()
    return ParameterProducts(total, mean, diagonal)


def _width(part: Part) -> tuple[int, float]:
    """Positions S of a sample, and multiplications of one pair of positions."""
    if isinstance(part, Outer):
        return part.left.shape[1], sum(part.shape)
    if isinstance(part, Rows):
        return part.index.shape[1], part.shape[1]
    return 0, math.inf


def is_ghost(batches: Sequence[Sequence[Part]], shape: Sequence[int]) -> bool:
    """Whether K is cheaper from the factors: N² Σ S S' (O + I) / 2 against N² O I multiplications.

    Blocks have no factors. The mean and the diagonal want the gradients multiplied out in any case, so
    that work does not count.
    """
    samples = sum(map(samples_of, batches))
    pairs = 0.0
    positions = [sum(_width(part)[0] for part in parts) for parts in batches]
    weighted = sum(samples_of(parts) * count for parts, count in zip(batches, positions, strict=True))
    for parts in batches:
        for part in parts:
            length, cost = _width(part)
            if math.isinf(cost):
                return False
            pairs += samples_of(parts) * length * weighted * (cost + PAIR_COST)
    return pairs / 2 < TILED * samples**2 * math.prod(shape)


def ghost_gram(batches: Sequence[Sequence[Part]], *, share: tuple[int, int] = (0, 1)) -> Tensor:
    """K (N, N) float64 from factors alone, pair by pair of batches; `share` as in `parameter_products`."""
    edges = [0]
    for parts in batches:
        edges.append(edges[-1] + samples_of(parts))
    total = torch.zeros(edges[-1], edges[-1], dtype=torch.float64)
    for i, ours in enumerate(batches):
        for j in range(i + 1):
            if (i + j) % share[1] != share[0]:
                continue
            found = sum(_pairs(a, b) for a in ours for b in batches[j])
            total[edges[i] : edges[i + 1], edges[j] : edges[j + 1]] = found
    return torch.tril(total) + torch.tril(total, -1).T


def _pairs(first: Part, second: Part) -> Tensor:
    """Σ_{s,t} ⟨left_is, left_jt⟩⟨right_is, right_jt⟩, (B, B') float64."""
    assert not isinstance(first, Tensor)
    assert not isinstance(second, Tensor)
    a, b = first.right.shape, second.right.shape
    products = first.right.reshape(-1, a[2]) @ second.right.reshape(-1, b[2]).T
    products *= _lefts(first, second)
    return products.view(a[0], a[1], b[0], b[1]).sum((1, 3), dtype=torch.float64)


def _lefts(first: Outer | Rows, second: Outer | Rows) -> Tensor:
    """⟨left_is, left_jt⟩ as (B S, B' S'), a one-hot left being given by its row numbers."""
    if isinstance(first, Outer) and isinstance(second, Outer):
        return first.left.reshape(-1, first.shape[0]) @ second.left.reshape(-1, second.shape[0]).T
    if isinstance(first, Outer) and isinstance(second, Rows):
        return first.left.reshape(-1, first.shape[0])[:, second.index.reshape(-1)]
    if isinstance(first, Rows) and isinstance(second, Outer):
        return _lefts(second, first).T
    assert isinstance(first, Rows)
    assert isinstance(second, Rows)
    return first.index.reshape(-1, 1) == second.index.reshape(1, -1)


def blocks_of(
    batches: Sequence[Sequence[Part]], shape: Sequence[int], *, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, (N, columns) gradients) over one process's share of a parameter's columns.

    The block is overwritten by the next one.
    """
    samples = sum(map(samples_of, batches))
    like = tensors_of(batches[0][0])[-1]
    rows, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    fitting = GRAM_ENTRIES // max(1, samples * width)
    step = max(1, min(rows, max(fitting, min(BLOCK_ROWS, 2 * fitting))))
    # As many blocks for every process: a parameter has few, and the last process would wait for the first.
    count = math.ceil(math.ceil(rows / step) / share[1]) * share[1]
    step = math.ceil(rows / count)
    buffer = like.new_empty(samples, step, width)
    writers = _writers(batches)
    for start in range(share[0] * step, rows, share[1] * step):
        stop = min(start + step, rows)
        block = buffer if stop - start == step else like.new_empty(samples, stop - start, width)
        for write in writers:
            write(block, start, stop)
        yield slice(start * width, stop * width), block.flatten(1)


def _writers(batches: Sequence[Sequence[Part]]) -> list[Callable[[Tensor, int, int], None]]:
    """What fills each batch's rows of a block with parameter rows start … stop − 1."""
    writers: list[Callable[[Tensor, int, int], None]] = []
    row = 0
    for parts in batches:
        size = samples_of(parts)
        for number, part in enumerate(parts):
            writers.append(_writer(part, slice(row, row + size), first=number == 0))
        row += size
    return writers


def _writer(part: Part, rows: slice, *, first: bool) -> Callable[[Tensor, int, int], None]:
    """Sets or adds one part; rows of an embedding are found by a sorted list of its tokens."""
    if isinstance(part, Rows):
        order = part.index.flatten().argsort()
        tokens = part.index.flatten()[order]
        sample = order // part.index.shape[1]

        def write_rows(block: Tensor, start: int, stop: int) -> None:
            target = block[rows]
            if first:
                target.zero_()
            found = slice(*torch.searchsorted(tokens, torch.tensor([start, stop])).tolist())
            if found.start < found.stop:
                place = sample[found] * target.shape[1] + tokens[found] - start
                flat = target.view(-1, target.shape[2])
                flat.index_add_(0, place, part.right.reshape(-1, target.shape[2])[order[found]])

        return write_rows

    def write(block: Tensor, start: int, stop: int) -> None:
        target = block[rows]
        if isinstance(part, Outer):
            left = part.left[:, :, start:stop].transpose(1, 2)
            if first:
                torch.bmm(left, part.right, out=target)
            else:
                target.baddbmm_(left, part.right)
            return
        made = part.reshape(part.shape[0], -1, target.shape[2])[:, start:stop]
        target.copy_(made) if first else target.add_(made)

    return write
