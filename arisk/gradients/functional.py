"""Per-sample gradients by torch.func: vmap over samples of grad of the functional loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from arisk.base.task import Batch, LossFn
from arisk.gradients.batches import batch_size, map_tensors
from arisk.gradients.layout import ParameterLayout, parameters_of
from arisk.gradients.sink import Sink

__all__ = ["vmap_gradients"]


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
