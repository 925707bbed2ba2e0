"""Products with the per-sample safety gradients G, from the store or by running the model again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from arisk.anatomy.collect import rounded
from arisk.base.processes import rank, summed, world
from arisk.base.task import Task
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
from arisk.gradients.factors import (
    Part,
    block_of,
    dots_of,
    lightest,
    tensors_of,
    weighted_sum_of,
    widened,
)

__all__ = ["SafetySide", "recomputed_side", "stored_side"]


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
