"""Elastic weight consolidation: a quadratic penalty with the diagonal Fisher matrix of the safety data.

The coordinates are those that train. For a LoRA adapter these are A and B themselves: with a fresh
B = 0 the safety gradient with respect to A is 0, so A is not guarded at all, and F_jj of B depends on
the random A. (`LoRAMitigator` works on ΔW instead.)

Source: Kirkpatrick et al., arXiv 1612.00796, eq. 3, the factor ½ left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from arisk.base.task import SampleSet
from arisk.gradients import (
    ParameterLayout,
    batch_size,
    choose_engine,
    move_batch,
    per_sample_gradients,
    slice_batch,
)

__all__ = ["ewc_penalty", "fisher_diagonals", "per_sample_rows"]


def fisher_diagonals(
    model: nn.Module, layout: ParameterLayout, samples: SampleSet, *, chunk_size: int = 8
) -> list[Tensor]:
    """F_jj = (1/N) Σ_i G_ij² of every parameter, in its shape and at least float32, inside `measuring`.

    Args:
        model: at the aligned point.
        layout: the parameters that train.
        samples: safety samples with their loss.
        chunk_size: samples per backward pass.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}

    def sink(name: str, block: Tensor) -> None:
        wide = block if block.dtype == torch.float64 else block.float()
        square = wide.square().sum(0)
        sums[name] = sums[name] + square if name in sums else square

    total = _sweep(model, layout, samples, sink, chunk_size)
    return [sums[name] / total for name in layout.names]


def per_sample_rows(
    model: nn.Module, layout: ParameterLayout, samples: SampleSet, *, chunk_size: int = 8
) -> Tensor:
    """G (N, P), the safety gradients over all parameters that train, in memory; inside `measuring`.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite.
    """
    parts: dict[str, list[Tensor]] = {}

    def sink(name: str, block: Tensor) -> None:
        parts.setdefault(name, []).append(block.detach().flatten(1).clone())

    _sweep(model, layout, samples, sink, chunk_size)
    return torch.cat([torch.cat(parts[name]) for name in layout.names], dim=1)


def _sweep(
    model: nn.Module,
    layout: ParameterLayout,
    samples: SampleSet,
    sink: Callable[[str, Tensor], None],
    chunk_size: int,
) -> int:
    """Every sample's gradients, chunk by chunk; returns N."""
    device = next(model.parameters()).device
    engine, total = None, 0
    for batch in samples.batches:
        for start in range(0, batch_size(batch), chunk_size):
            chunk = move_batch(slice_batch(batch, start, min(start + chunk_size, batch_size(batch))), device)
            engine = engine or choose_engine(model, chunk, samples.loss_fn, layout, "auto").engine
            per_sample_gradients(model, chunk, samples.loss_fn, layout, sink, engine=engine, offset=total)
            total += batch_size(chunk)
    return total


def ewc_penalty(
    parameters: Sequence[Tensor], reference: Sequence[Tensor], diagonals: Sequence[Tensor]
) -> Tensor:
    """Σ_j F_jj (θ_j − θ*_j)² ≥ 0, with gradient (nats²)."""
    parts = [
        (f * (p - p0).to(f.dtype).square()).sum()
        for p, p0, f in zip(parameters, reference, diagonals, strict=True)
    ]
    return torch.stack(parts).sum()
