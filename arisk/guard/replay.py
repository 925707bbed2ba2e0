"""Safety minibatches for methods that look at safety rows while training: replay and projection."""

from __future__ import annotations

import torch

from arisk.base.task import Batch, SampleSet
from arisk.gradients import batch_size, move_batch, slice_batch

__all__ = ["SafetyBatches"]


class SafetyBatches:
    """Minibatches of the safety rows by step number: every epoch in a new order of its own seed.

    Batches are taken as they come and cut to at most `rows`; rows of different batches are not mixed.

    Args:
        samples: the safety samples.
        rows: largest minibatch.
        seed: seed of the orders.
        device: where the batches go.
    """

    def __init__(self, samples: SampleSet, rows: int, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.batches: list[Batch] = [
            move_batch(slice_batch(batch, start, min(start + rows, batch_size(batch))), device)
            for batch in samples.batches
            for start in range(0, batch_size(batch), rows)
        ]

    def at(self, number: int) -> Batch:
        """The minibatch of optimizer step `number` (from 1)."""
        epoch, place = divmod(number - 1, len(self.batches))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return self.batches[int(torch.randperm(len(self.batches), generator=generator)[place])]
