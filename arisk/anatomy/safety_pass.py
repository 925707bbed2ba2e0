"""Passes over the safety samples that keep per-sample gradients, as factors or blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arisk.base.artifacts import read_tensors, write_tensors
from arisk.base.progress import Progress
from arisk.base.task import Batch, Task
from arisk.gradients import ParameterLayout, batch_size, map_tensors, per_sample_parts, slice_batch
from arisk.gradients.factors import Part, lightest, tensors_of, with_tensors

__all__ = ["Products", "SafetyPass", "batch_losses", "batch_parts", "held_entries", "rounded"]


@dataclass(frozen=True)
class SafetyPass:
    """What every pass over the safety samples needs."""

    task: Task
    layout: ParameterLayout
    batches: Sequence[Batch]
    sizes: Sequence[int]
    engine: str
    progress: Progress


@dataclass(frozen=True)
class Products:
    """Inner products and moments of G: gram (L, N, N), mean and diagonal (P,), losses (N,).

    Attributes:
        rounding: relative change of ‖G_i‖ by the store's dtype, the largest over samples; None where
            the Gram matrices were taken before rounding or nothing is rounded.
    """

    gram: Tensor
    mean: Tensor
    diagonal: Tensor
    losses: Tensor
    rounding: float | None = None


def batch_parts(
    run: SafetyPass, layout: ParameterLayout, index: int, batch: Batch, parts: dict[str, list[Part]]
) -> Tensor:
    """Fill `parts` with one batch's gradients by parameter, on the CPU; return its losses, float64."""
    moved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def bring(tensor: Tensor) -> Tensor:
        # What several modules share stays shared; the original is held so that its place stays its own.
        place = _place(tensor)
        if place not in moved:
            wide = tensor.dtype in (torch.float64, torch.int64)
            moved[place] = tensor, tensor.to("cpu", tensor.dtype if wide else torch.float32)
        return moved[place][1]

    def keep(name: str, own: Sequence[Part]) -> None:
        parts[name] = [with_tensors(part, [bring(t) for t in tensors_of(part)]) for part in lightest(own)]

    losses = per_sample_parts(
        run.task.model,
        batch,
        run.task.safety.loss_fn,
        layout,
        keep,
        engine=run.engine,
        offset=sum(run.sizes[:index]),
    )
    return losses.detach().to("cpu", torch.float64)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def rounded(parts: dict[str, list[Part]], dtype: torch.dtype) -> dict[str, list[Part]]:
    """The parts with their real tensors in another dtype; shared ones stay shared."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if _place(tensor) not in made:
            made[_place(tensor)] = tensor.to(dtype)
        return made[_place(tensor)]

    return {n: [with_tensors(p, [change(t) for t in tensors_of(p)]) for p in own] for n, own in parts.items()}


def batch_losses(folder: Path, index: int, losses: Tensor | None = None) -> Tensor | None:
    """Losses of a finished batch, kept in the workspace for resuming; None where there are none."""
    file = folder / f"losses-{index:05d}.safetensors"
    if losses is not None:
        write_tensors(file, {"losses": losses})
        return losses
    return read_tensors(file)["losses"] if file.exists() else None


def held_entries(run: SafetyPass) -> dict[str, float]:
    """Numbers held for one sample by parameter, on the mean over samples.

    One sample of the batch with the most numbers per sample is run; factors grow with its length. What
    several parameters share counts once, for the first of them.
    """

    def numbers(batch: Batch) -> int:
        found = [0]
        map_tensors(batch, lambda t: (found.append(t.numel()), t)[1])
        return max(1, sum(found))

    sizes = [numbers(batch) / batch_size(batch) for batch in run.batches]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    probe: dict[str, list[Part]] = {}
    batch_parts(run, run.layout, longest, slice_batch(run.batches[longest], 0, 1), probe)
    mean = sum(s * n for s, n in zip(sizes, run.sizes, strict=True)) / sum(run.sizes) / sizes[longest]
    seen: set[tuple[Any, ...]] = set()
    entries: dict[str, float] = {}
    for name, parts in probe.items():
        entries[name] = 0.0
        for part in parts:
            for tensor in tensors_of(part):
                if _place(tensor) not in seen:
                    seen.add(_place(tensor))
                    entries[name] += tensor.numel() * (1 if isinstance(part, Tensor) else mean)
    return entries
