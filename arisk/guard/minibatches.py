"""Safety rows while a model trains: minibatches by the number of the step, and the mean loss of all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from arisk.base.task import Batch, SampleSet
from arisk.gradients import batch_size, move_batch, slice_batch

__all__ = ["SafetyBatches", "mean_loss"]


class SafetyBatches:
    """Minibatches of the safety rows by step number: every epoch in a new order of its own seed.

    Batches are taken as they come and cut to at most `rows`; rows of different batches are not mixed.

    Args:
        samples: the safety samples.
        rows: largest minibatch.
        seed: seed of the orders.
        device: where the batches go first.
    """

    def __init__(self, samples: SampleSet, rows: int, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.batches: list[Batch] = [
            move_batch(slice_batch(batch, start, min(start + rows, batch_size(batch))), device)
            for batch in samples.batches
            for start in range(0, batch_size(batch), rows)
        ]

    def at(self, number: int, device: torch.device | None = None) -> Batch:
        """The minibatch of optimizer step `number` (from 1).

        Args:
            number: of the step.
            device: where the model is by now; the minibatch then stays there. None: where it is.
        """
        epoch, place = divmod(number - 1, len(self.batches))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        which = int(torch.randperm(len(self.batches), generator=generator)[place])
        if device is not None:
            self.batches[which] = move_batch(self.batches[which], device)
        return self.batches[which]


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
