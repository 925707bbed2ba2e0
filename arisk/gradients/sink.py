"""Where per-sample gradients go as they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from arisk.gradients.factors import Part

__all__ = ["PartSink", "Sink"]

#: ``sink(parameter name, block)`` with block (B, *shape), detached; one call per parameter and batch.
Sink = Callable[[str, Tensor], None]

#: ``sink(parameter name, parts)``: the parameter's gradients are the sum of the parts.
PartSink = Callable[[str, Sequence[Part]], None]
