"""One entry to the engines that compute per-sample gradients, as blocks or as factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arisk.base.errors import NumericsError
from arisk.base.task import Batch, LossFn
from arisk.gradients.factors import Part, tensors_of
from arisk.gradients.functional import vmap_gradients
from arisk.gradients.hooks import hook_gradients, hook_parts
from arisk.gradients.layout import ParameterLayout
from arisk.gradients.loop import loop_gradients
from arisk.gradients.sink import PartSink, Sink

__all__ = ["ENGINES", "per_sample_gradients", "per_sample_parts"]

#: Engines by name, fastest first.
ENGINES = {"hooks": hook_gradients, "vmap": vmap_gradients, "loop": loop_gradients}


def per_sample_gradients(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sink: Sink,
    *,
    engine: str,
    offset: int = 0,
) -> Tensor:
    """G_i = ∇_θ ℓ_i(θ) for every sample of a batch, inside `measuring`.

    Args:
        model: the model.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sink: called once per parameter with its block (B, *shape), in the parameter's dtype.
        engine: "hooks", "vmap" or "loop".
        offset: index of the batch's first sample, for messages.

    Returns:
        (B,) losses, detached.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite; names the sample.
    """

    def checked(name: str, block: Tensor) -> None:
        # The sum is one read of the block; only a suspicious one is looked at closely.
        if not bool(torch.isfinite(block.sum())):
            _require_finite(block.flatten(1).isfinite().all(1), f"gradient of {name!r}", offset)
        sink(name, block)

    losses = ENGINES[engine](model, batch, loss_fn, layout, checked)
    _require_finite(torch.isfinite(losses), "loss", offset)
    return losses


def per_sample_parts(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sink: PartSink,
    *,
    engine: str,
    offset: int = 0,
) -> Tensor:
    """The same gradients as sums of parts, by hooks factors where a module has them.

    Args:
        model: the model, inside `measuring`.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sink: called once per parameter with its parts, in the parameter's dtype.
        engine: "hooks" gives factors, "vmap" and "loop" blocks.
        offset: index of the batch's first sample, for messages.

    Returns:
        (B,) losses, detached.

    Raises:
        NumericsError: a loss, factor or block is NaN or infinite; names the sample. A product of finite
            factors that overflows is the caller's to find.
    """
    if engine != "hooks":
        return per_sample_gradients(
            model, batch, loss_fn, layout, lambda n, block: sink(n, [block]), engine=engine, offset=offset
        )

    def checked(name: str, parts: Sequence[Part]) -> None:
        for tensor in (tensor for part in parts for tensor in tensors_of(part)):
            if not bool(torch.isfinite(tensor.sum())):
                _require_finite(tensor.flatten(1).isfinite().all(1), f"gradient of {name!r}", offset)
        sink(name, parts)

    losses = hook_parts(model, batch, loss_fn, layout, checked)
    _require_finite(torch.isfinite(losses), "loss", offset)
    return losses


def _require_finite(finite: Tensor, what: str, offset: int) -> None:
    if not bool(finite.all()):
        sample = int((~finite).to(torch.int64).argmax()) + offset
        raise NumericsError(
            f"the {what} of sample {sample} is NaN or infinite",
            where=f"sample {sample} (counted from 0, in data order)",
            fix="look at that row (empty response, extreme length), or load the model in float32",
        )
