"""The safety side: stage subspace from Gram matrices alone, and products with the gradients G themselves.

Stage subspace finds the leading eigenvectors of the safety Fisher matrix. Products with per-sample safety
gradients come from the store, or by running the model again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arisk.anatomy.collect import rounded
from arisk.anatomy.record import CollectResult, SubspaceResult
from arisk.base.errors import ConfigError
from arisk.base.processes import rank, summed, world
from arisk.base.task import Task
from arisk.config.plan import SubspaceConfig
from arisk.geometry.spectrum import (
    effective_rank,
    eigenpairs,
    heldout_energy,
    randomized_eigenpairs,
    rank_for_variance,
)
from arisk.geometry.vectors import DEFAULT_MEMORY, Columns, column_groups, columns_of
from arisk.gradients import (
    GradientStore,
    ParameterLayout,
    batch_size,
    layout_of,
    measuring,
    move_batch,
    per_sample_parts,
    slice_batch,
)
from arisk.gradients.factors import Part, block_of, dots_of, lightest, tensors_of, weighted_sum_of, widened

__all__ = ["SafetySide", "recomputed_side", "stored_side", "subspace"]

#: A subspace that holds less of the held-out safety energy than this does not generalise.
GENERALISES = 0.5
#: Below this mean squared gradient norm the safety loss is flat at θ* (nats² per unit θ²).
FLAT_TRACE = 1e-10


def subspace(
    collected: CollectResult,
    config: SubspaceConfig,
    *,
    seed: int,
    gradients: Callable[[], Tensor] | None = None,
) -> SubspaceResult:
    """Eigenpairs of F = GᵀG/N in the dual, their rank, and whether they generalise.

    Args:
        collected: Gram matrices and Fisher diagonal.
        config: method and rank rule.
        seed: seeds held-out splits and the randomised method.
        gradients: gives G (N, P) in memory; needed by `svd` alone.

    Returns:
        The record; ranks and shares are of the whole trace.

    Raises:
        ConfigError: `rank` above the number of independent samples, or `svd` without gradients.
        NumericsError: the Gram matrix is zero or not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(collected.losses)
    total = collected.gram.sum(0)
    spectrum, dual = eigenpairs(total)
    trace = float(total.diagonal().sum()) / n
    _check_rank(config.rank, len(spectrum), n, config.method, collected.fisher_diagonal.numel())
    values, vectors, coordinates = _directions(collected, config, total, generator, gradients)
    if config.method == "gram":
        values, vectors = spectrum, dual
    rank = config.rank or rank_for_variance(values, trace, config.target_explained_variance, config.max_rank)
    values, vectors, coordinates = values[:rank], vectors[:, :rank], coordinates[:rank]
    held = heldout_energy(total, rank, splits=config.heldout_splits, generator=generator) if n >= 4 else None
    held = held[~held.isnan()] if held is not None else torch.zeros(0)
    explained = float(values.sum()) / trace
    mean_held = float(held.mean()) if held.numel() else None
    return SubspaceResult(
        method=config.method,
        eigenvalues=values,
        spectrum=spectrum,
        dual_vectors=vectors,
        coordinates=coordinates,
        rank=rank,
        trace=trace,
        explained=explained,
        tail_energy=max(trace - float(values.sum()), 0.0),
        effective_rank=effective_rank(spectrum),
        heldout_energy=mean_held,
        heldout_energy_std=float(held.std()) if held.numel() > 1 else None,
        module_traces=collected.gram.diagonal(dim1=1, dim2=2).sum(1) / n,
        top_weights=_top_weights(collected, config.top_weights),
        warnings=_warnings(config, rank, explained, mean_held, trace, n),
    )


def _check_rank(rank: int | None, independent: int, samples: int, method: str, parameters: int) -> None:
    limit = parameters if method == "diag_topk" else independent
    if rank is not None and rank > limit:
        raise ConfigError(
            f"rank {rank} is more than the {limit} independent directions of {samples} safety samples",
            where="subspace.rank",
            fix=f"set `subspace.rank` to at most {limit}, or give more safety samples",
        )


def _directions(
    collected: CollectResult,
    config: SubspaceConfig,
    total: Tensor,
    generator: torch.Generator,
    gradients: Callable[[], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, dual vectors and coordinates of the chosen method, before the rank is cut."""
    n = len(collected.losses)
    none = torch.zeros(0, dtype=torch.int64)
    if config.method == "svd":
        return (*_svd(gradients), none)
    if config.method == "randomized_svd":
        wanted = min(n, config.rank or config.max_rank)
        return (*randomized_eigenpairs(total, wanted, generator=generator), none)
    if config.method == "diag_topk":
        diagonal = collected.fisher_diagonal.to(torch.float64)
        count = min(config.rank or config.max_rank, diagonal.numel())
        top = torch.topk(diagonal, count)
        return top.values, torch.zeros(n, 0, dtype=torch.float64), top.indices
    return torch.zeros(0), torch.zeros(n, 0), none


def _svd(gradients: Callable[[], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Squared singular values over N and left singular vectors of G, in float64."""
    if gradients is None:
        raise ConfigError(
            "`svd` needs the per-sample gradients in memory, and this run keeps only their Gram matrix",
            where="subspace.method",
            fix="use `method: gram` (the same eigenpairs, faster), or `collect.store: gradients` "
            "with a larger `collect.memory_budget_gb`",
        )
    g = gradients().to(torch.float64)
    left, singular, _ = torch.linalg.svd(g, full_matrices=False)
    values = singular**2 / g.shape[0]
    keep = values > 1e-10 * values[0]
    return values[keep], left[:, keep]


def _top_weights(collected: CollectResult, count: int) -> Sequence[dict[str, Any]]:
    """The largest entries of the Fisher diagonal with parameter name and index."""
    top = torch.topk(collected.fisher_diagonal, min(count, collected.fisher_diagonal.numel()))
    sizes = torch.tensor([int(torch.tensor(s).prod()) if s else 1 for s in collected.parameter_shapes])
    ends = torch.cumsum(sizes, 0)
    rows: list[dict[str, Any]] = []
    for value, flat in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        which = int(torch.searchsorted(ends, flat, right=True))
        offset = flat - (int(ends[which]) - int(sizes[which]))
        index = torch.unravel_index(torch.tensor(offset), tuple(collected.parameter_shapes[which]) or (1,))
        rows.append(
            {"name": collected.parameter_names[which], "index": [int(i) for i in index], "value": value}
        )
    return rows


def _warnings(
    config: SubspaceConfig, rank: int, explained: float, held: float | None, trace: float, n: int
) -> list[str]:
    found: list[str] = []
    if config.rank is None and explained < config.target_explained_variance - 1e-9:
        found.append(
            f"Rank {rank} explains {explained:.0%} of the safety Fisher trace, below the target "
            f"{config.target_explained_variance:.0%}: the subspace is not low rank at this limit."
        )
    if held is None:
        found.append(f"Held-out energy was not measured: it needs four safety samples, there are {n}.")
    elif held < GENERALISES:
        found.append(
            f"The subspace holds {held:.0%} of held-out safety gradient energy: it does not "
            "generalise; add safety samples before trusting overlap or coupling."
        )
    if trace < FLAT_TRACE:
        found.append(
            f"The safety loss is flat at the aligned point (tr F = {trace:.1e}): local quantities say "
            "nothing; only measured losses along the fine-tune are informative."
        )
    return found


@dataclass(frozen=True)
class SafetySide:
    """The two products later stages need.

    Attributes:
        dots: directions (P, m), a tensor or what is read block by block → G V (N, m) float64.
        weighted_sum: weights (N,) → Gᵀw (P,).
        columns: parameter name → (N, p) its columns of G.
    """

    dots: Callable[[Tensor | Columns], Tensor]
    weighted_sum: Callable[[Tensor], Tensor]
    columns: Callable[[str], Tensor]


def stored_side(
    store: GradientStore, layout: ParameterLayout, *, memory: float = DEFAULT_MEMORY
) -> SafetySide:
    """Read the shards that collect wrote; `memory` bytes of directions are held at a time."""

    def columns(name: str) -> Tensor:
        where = layout.slice_of(name)
        return store.rows(name, 0, where.stop - where.start)

    return SafetySide(
        dots=lambda directions: store.dots(layout, directions, memory),
        weighted_sum=lambda weights: store.weighted_sum(layout, weights),
        columns=columns,
    )


def _over_samples(
    task: Task,
    engine: str,
    chunk_size: int,
    dtype: torch.dtype | None,
    sink: Callable[[int, str, Sequence[Part]], None],
    layout: ParameterLayout,
    *,
    shared: bool = True,
) -> None:
    """One pass over the safety samples: ``sink(index of the first sample, parameter, parts)``."""
    device = next(task.model.parameters()).device
    offset = number = 0
    with measuring(task.model, layout):
        for batch in task.safety.batches:
            for start in range(0, batch_size(batch), chunk_size):
                stop = min(start + chunk_size, batch_size(batch))
                number, at = number + 1, offset
                offset += stop - start
                if shared and number % world() != rank():
                    continue
                per_sample_parts(
                    task.model,
                    move_batch(slice_batch(batch, start, stop), device),
                    task.safety.loss_fn,
                    layout,
                    lambda name, parts, at=at: sink(at, name, _as_stored(parts, dtype)),
                    engine=engine,
                    offset=at,
                )


def _as_stored(parts: Sequence[Part], dtype: torch.dtype | None) -> Sequence[Part]:
    """The parts with the values they have when they are read from a store of this dtype."""
    if dtype is None:
        return parts
    half = rounded({"": lightest(parts)}, dtype)[""]
    return [widened(part) for part in half]


def recomputed_side(
    task: Task,
    layout: ParameterLayout,
    engine: str,
    chunk_size: int,
    *,
    memory: float = DEFAULT_MEMORY,
    dtype: torch.dtype | None = None,
) -> SafetySide:
    """Run the safety samples again for every product; for runs that keep no gradient store.

    Args:
        task: model and safety samples, as collected.
        layout: the selected parameters.
        engine: engine chosen by collect.
        chunk_size: samples per pass.
        memory: bytes of directions that are held at a time (one direction at least).
        dtype: what the gradients are rounded to, as in the store they stand for; None keeps their own.

    Returns:
        The products; each call costs one pass over the safety samples, for every group of directions
        that fits in memory.
    """
    run = partial(_over_samples, task, engine, chunk_size, dtype)
    samples = sum(batch_size(batch) for batch in task.safety.batches)

    def dots(directions: Tensor | Columns) -> Tensor:
        given = columns_of(directions)
        out = torch.zeros(samples, given.shape[1], dtype=torch.float64)
        everything = slice(0, layout.numel)
        # Directions that lie in memory as they are need no more room.
        room = math.inf if isinstance(directions, Tensor) else memory
        for group in column_groups(layout.numel, given.shape[1], room):
            held = given.block(everything, group)

            def sink(
                at: int, name: str, parts: Sequence[Part], held: Tensor = held, group: slice = group
            ) -> None:
                # No gradient is multiplied out that need not be.
                like = tensors_of(parts[0])[-1]
                own = held[layout.slice_of(name)].to(like.device, like.dtype)
                part = dots_of(parts, own.reshape(*layout.shape_of(name), -1)).to("cpu", torch.float64)
                out[at : at + len(part), group] += part

            run(sink, layout)
        return summed(out)

    def weighted_sum(weights: Tensor) -> Tensor:
        out = torch.zeros(layout.numel, dtype=torch.float64)

        def sink(at: int, name: str, parts: Sequence[Part]) -> None:
            like = tensors_of(parts[0])[-1]
            own = weights[at : at + len(like)].to(like.device, like.dtype)
            out[layout.slice_of(name)] += weighted_sum_of(parts, own).flatten().cpu()

        run(sink, layout)
        return summed(out)

    def columns(name: str) -> Tensor:
        rows: list[Tensor] = []
        names = layout_of(task.model, [name])

        def sink(at: int, name: str, parts: Sequence[Part]) -> None:
            del at, name
            rows.append(sum((block_of(p) for p in parts[1:]), block_of(parts[0])).flatten(1).cpu())

        run(sink, names, shared=False)
        return torch.cat(rows)

    return SafetySide(dots=dots, weighted_sum=weighted_sum, columns=columns)
