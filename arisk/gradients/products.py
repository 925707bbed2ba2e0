"""Inner products and moments of one parameter's gradients over all samples, from their factors.

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

from arisk.geometry.gram import COLUMNS, gram
from arisk.gradients.factors import Outer, Part, Rows, samples_of, tensors_of

__all__ = ["ParameterProducts", "blocks_of", "ghost_gram", "is_ghost", "parameter_products"]

#: Entries of a block (N × columns) that is made at a time; it stays in the last cache.
BLOCK_ENTRIES = 1 << 23
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
    fitting = BLOCK_ENTRIES // max(1, samples * width)
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
