"""Where per-sample gradients go as they are made."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Sink"]

#: ``sink(parameter name, block)`` with block (B, *shape), detached; one call per parameter and batch.
Sink = Callable[[str, Tensor], None]
