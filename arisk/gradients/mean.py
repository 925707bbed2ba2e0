"""The gradient of a batch's mean loss, as training would compute it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, NumericsError
from arisk.base.task import Batch, LossFn
from arisk.gradients.layout import ParameterLayout, is_sharded, parameters_of
from arisk.gradients.state import recomputing

__all__ = ["mean_gradient"]


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
