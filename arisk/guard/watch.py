"""The safety loss as a plain function of a model, for whoever watches training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from arisk.base.task import SampleSet
from arisk.gradients import move_batch

__all__ = ["mean_loss"]


def mean_loss(samples: SampleSet) -> Callable[[nn.Module], float]:
    """`model -> mean_i ℓ_i`, every sample with the same weight (nats per response token for language models).

    Args:
        samples: batches with a per-sample loss; a loss that is a scalar counts a batch as one sample.
    """

    def measure(model: nn.Module) -> float:
        device = next(model.parameters()).device
        with torch.no_grad():
            losses = [samples.loss_fn(model, move_batch(b, device)).reshape(-1) for b in samples.batches]
        return float(torch.cat(losses).double().mean())

    return measure
