"""Products with the per-sample safety gradients G, from the store or by running the model again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.gradients import (
    GradientStore,
    ParameterLayout,
    batch_size,
    layout_of,
    measuring,
    move_batch,
    per_sample_gradients,
    slice_batch,
)
from arisk.ranks import rank, summed, world
from arisk.task import Task

__all__ = ["SafetySide", "recomputed_side", "stored_side"]


@dataclass(frozen=True)
class SafetySide:
    """The two products later stages need.

    Attributes:
        dots: directions (P, m) → G V (N, m) float64.
        weighted_sum: weights (N,) → Gᵀw (P,).
        columns: parameter name → (N, p) its columns of G.
    """

    dots: Callable[[Tensor], Tensor]
    weighted_sum: Callable[[Tensor], Tensor]
    columns: Callable[[str], Tensor]


def stored_side(store: GradientStore, layout: ParameterLayout) -> SafetySide:
    """Read the shards that collect wrote."""

    def columns(name: str) -> Tensor:
        where = layout.slice_of(name)
        return store.rows(name, 0, where.stop - where.start)

    return SafetySide(
        dots=lambda directions: store.dots(layout, directions),
        weighted_sum=lambda weights: store.weighted_sum(layout, weights),
        columns=columns,
    )


def recomputed_side(task: Task, layout: ParameterLayout, engine: str, chunk_size: int) -> SafetySide:
    """Run the safety samples again for every product; for runs that keep no gradient store.

    Args:
        task: model and safety samples, as collected.
        layout: the selected parameters.
        engine: engine chosen by collect.
        chunk_size: samples per pass.

    Returns:
        The products; each call costs one pass over the safety samples.
    """
    device = next(task.model.parameters()).device

    def run(sink: Callable[[int, str, Tensor], None], names: ParameterLayout, *, shared: bool = True) -> None:
        offset = number = 0
        with measuring(task.model, layout):
            for batch in task.safety.batches:
                for start in range(0, batch_size(batch), chunk_size):
                    stop = min(start + chunk_size, batch_size(batch))
                    number, at = number + 1, offset
                    offset += stop - start
                    if shared and number % world() != rank():
                        continue
                    chunk = move_batch(slice_batch(batch, start, stop), device)
                    per_sample_gradients(
                        task.model,
                        chunk,
                        task.safety.loss_fn,
                        names,
                        lambda name, block, at=at: sink(at, name, block),
                        engine=engine,
                        offset=at,
                    )

    samples = sum(batch_size(batch) for batch in task.safety.batches)

    def dots(directions: Tensor) -> Tensor:
        out = torch.zeros(samples, directions.shape[1], dtype=torch.float64)

        def sink(at: int, name: str, block: Tensor) -> None:
            flat = block.flatten(1).cpu()
            part = flat @ directions[layout.slice_of(name)].to(flat.dtype)
            out[at : at + len(flat)] += part.to(torch.float64)

        run(sink, layout)
        return summed(out)

    def weighted_sum(weights: Tensor) -> Tensor:
        out = torch.zeros(layout.numel, dtype=torch.float64)

        def sink(at: int, name: str, block: Tensor) -> None:
            flat = block.flatten(1).cpu()
            out[layout.slice_of(name)] += weights[at : at + len(flat)].to(flat.dtype) @ flat

        run(sink, layout)
        return summed(out)

    def columns(name: str) -> Tensor:
        parts: list[Tensor] = []
        names = layout_of(task.model, [name])
        run(lambda _at, _name, block: parts.append(block.flatten(1).cpu()), names, shared=False)
        return torch.cat(parts)

    return SafetySide(dots=dots, weighted_sum=weighted_sum, columns=columns)
