"""Batches of any shape people use: tensors, tuples, lists, mappings and dataclasses of tensors.

A narrow model in float32 for a while: differences of bfloat16 gradients are mostly rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ShapeError
from arisk.base.task import Batch

__all__ = ["batch_size", "in_float32", "is_narrow", "map_tensors", "move_batch", "slice_batch", "widened"]


def map_tensors(batch: Batch, change: Callable[[Tensor], Any]) -> Batch:
    """The same structure with every tensor changed; other leaves are kept as they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {key: map_tensors(value, change) for key, value in batch.items()}
        if type(batch) is dict:
            return changed
        try:
            return type(batch)(changed)  # pyright: ignore[reportCallIssue] - BatchEncoding and other dict-likes keep their type
        except TypeError:
            return changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_tensors(getattr(batch, f.name), change) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, keep)
    return iter(found)


def batch_size(batch: Batch) -> int:
    """Number of samples: the common size of dimension 0 of all tensors with a dimension.

    Raises:
        ShapeError: there is no tensor, or the tensors disagree.
    """
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim > 0}
    if len(sizes) != 1:
        what = (
            f"tensors of a batch disagree on dimension 0: {sorted(sizes)}" if sizes else "no tensor in batch"
        )
        raise ShapeError(
            what,
            where=f"batch of type {type(batch).__name__}",
            fix="let dimension 0 of every tensor be the sample, and keep other values out of the batch",
        )
    return sizes.pop()


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start … stop − 1, keeping dimension 0; scalars and non-tensors are shared."""
    return map_tensors(batch, lambda tensor: tensor[start:stop] if tensor.ndim > 0 else tensor)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


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
