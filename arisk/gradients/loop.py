"""Per-sample gradients one sample at a time: slow, obvious, and the oracle of the other engines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arisk.base.task import Batch, LossFn
from arisk.gradients.batches import batch_size, slice_batch
from arisk.gradients.layout import ParameterLayout, parameters_of
from arisk.gradients.sink import Sink

__all__ = ["loop_gradients"]


def loop_gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, sink: Sink
) -> Tensor:
    """G_i = ∇ℓ_i by ordinary autograd, sample by sample; see `per_sample_gradients`."""
    parameters = parameters_of(model, layout)
    losses: list[Tensor] = []
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for i in range(batch_size(batch)):
        loss = loss_fn(model, slice_batch(batch, i, i + 1)).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(loss.detach())
        for row, parameter, gradient in zip(rows, parameters, gradients, strict=True):
            row.append(torch.zeros_like(parameter) if gradient is None else gradient.detach())
    for name, row in zip(layout.names, rows, strict=True):
        sink(name, torch.stack(row))
    return torch.stack(losses)
