"""One entry to the engines that compute per-sample gradients, as blocks or as factors.

Per-sample gradients by torch.func: vmap over samples of grad of the functional loss.

Per-sample gradients one sample at a time: slow, obvious, and the oracle of the other engines.

The gradient of a batch's mean loss, as training would compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import Batch, LossFn
from arisk.gradients.batches import batch_size, map_tensors, slice_batch
from arisk.gradients.factors import Part, PartSink, Sink, tensors_of
from arisk.gradients.hooks import hook_gradients, hook_parts
from arisk.gradients.layout import ParameterLayout, is_sharded, parameters_of, recomputing

__all__ = [
    "ENGINES",
    "loop_gradients",
    "mean_gradient",
    "per_sample_gradients",
    "per_sample_parts",
    "vmap_gradients",
]


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


class _Loss(nn.Module):
    """The loss as a module, so that `functional_call` can swap parameters under any loss function."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch).mean()


def vmap_gradients(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, sink: Sink
) -> Tensor:
    """G_i = ∇ℓ_i for all samples of the batch at once; see `per_sample_gradients`.

    Tensors without a sample dimension and non-tensor values are shared by all samples.
    """
    wrapped = _Loss(model, loss_fn)
    parameters = {
        f"model.{name}": p.detach()
        for name, p in zip(layout.names, parameters_of(model, layout), strict=True)
    }
    size = batch_size(batch)
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.ndim > 0:
            tensors.append(tensor)
        return tensor

    map_tensors(batch, collect)

    def loss_of(values: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
        waiting = iter(sample)

        def put(tensor: Tensor) -> Any:
            return next(waiting).unsqueeze(0) if tensor.ndim > 0 else tensor

        return functional_call(wrapped, values, (map_tensors(batch, put),), tie_weights=True)

    gradients, losses = vmap(grad_and_value(loss_of), in_dims=(None, 0), randomness="error")(
        parameters, tensors
    )
    for name in layout.names:
        sink(name, gradients.pop(f"model.{name}").detach())
    assert losses.shape == (size,)
    return losses.detach()


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


def mean_gradient(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layout: ParameterLayout, *, create_graph: bool = False
) -> tuple[float, Tensor]:
    """Mean loss of the batch and its gradient g_b (P,), inside `measuring`.

    Args:
        model: the model.
        batch: one micro-batch on the model's device.
        loss_fn: per-sample losses or their mean.
        layout: the selected parameters.
        create_graph: keep the graph, for a second backward.

    Returns:
        The loss (nats) and g_b in the parameters' dtype; zeros where a parameter is unused.

    Raises:
        NumericsError: the loss or the gradient is NaN or infinite.
        ConfigError: the parameters are sharded over processes.
    """
    if is_sharded(model):
        raise ConfigError(
            "this stage moves parameters, and the model's are sharded over processes (FSDP2)",
            where="model",
            fix="stages collect and subspace run on sharded models; for the others load the model whole, "
            "on one device or over several by `run.device_map`",
        )
    parameters = parameters_of(model, layout)
    with recomputing(model):
        loss = loss_fn(model, batch).mean()
    if not bool(torch.isfinite(loss)):
        raise NumericsError(
            f"the mean loss of a batch is {float(loss.detach())}",
            where="a training batch",
            fix="check its rows (empty responses, extreme lengths), or load the model in float32",
        )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, create_graph=create_graph)
    flat = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )
    if not bool(torch.isfinite(flat.detach()).all()):
        raise NumericsError(
            "the gradient of a batch has a NaN or infinite entry",
            where="a training batch",
            fix="check its rows, or load the model in float32",
        )
    return float(loss.detach()), flat if create_graph else flat.detach()


#: Engines by name, fastest first.
ENGINES = {"hooks": hook_gradients, "vmap": vmap_gradients, "loop": loop_gradients}
