"""A narrow model in float32 for a while: differences of bfloat16 gradients are mostly rounding."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arisk.base.task import Batch
from arisk.gradients.batches import map_tensors

__all__ = ["in_float32", "is_narrow", "widened"]


def is_narrow(tensor: Tensor) -> bool:
    """Whether a tensor has fewer bits than float32."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


@contextmanager
def in_float32(model: nn.Module) -> Generator[None]:
    """Inside, parameters and buffers narrower than float32 are float32; afterwards they are back to the bit.

    The narrow tensors wait on the CPU, so that a device holds the wide ones alone. Tied parameters stay
    tied. A model that has none is left alone.
    """
    narrow = [t for t in (*model.parameters(), *model.buffers()) if is_narrow(t)]
    kept = [(tensor, tensor.data.cpu(), tensor.device) for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, old, device in kept:
            tensor.data = old.to(device)


def widened(batch: Batch) -> Batch:
    """The batch with its narrow floating-point tensors in float32."""
    return map_tensors(batch, lambda tensor: tensor.to(torch.float32) if is_narrow(tensor) else tensor)
