"""Which layers and which rows carry the change of safety along the virtual run, to first order.

Layers, by the path integral along the chord Δ = θ_T − θ* (integrated gradients, Sundararajan et al. 2017,
with parameters in the place of inputs), which adds up to the whole change:

    L_s(θ_T) − L_s(θ*) = ∫₀¹ ⟨∇L_s(θ* + tΔ), Δ⟩ dt ≈ ⟨ḡ, Δ⟩,  ḡ the mean of ∇L_s at two Gauss nodes.

Rows: a plan that meets N rows equally often moves by about −(Σ_k η_k / N) Σ_i D g_i, so row i adds

    a_i = −(Σ_k η_k / N) ⟨ḡ, D g_i⟩

with g_i at the chord's middle and D the optimizer's step per unit gradient at the end. The product with g_i
is a central difference of the row's own loss: two forward passes a row, no gradient of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arisk.forecast.record import DriftAccount
from arisk.gradients import ParameterLayout, batch_size, recomputing, slice_batch
from arisk.training.loop import PlannedRun, put
from arisk.training.panels import Panel, panel_of

__all__ = ["NODES", "PANEL", "account", "looked_at"]

#: Gauss–Legendre nodes on the chord, of equal weight.
NODES = (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12))
#: Safety rows whose gradient is taken.
PANEL = 8
#: Length of a difference for a row's product, as a share of the chord's: far enough for bfloat16.
REACH = 0.25
#: Rows looked at, as a share of the rows that the rollout took gradients of, and its limits: all of this is
#: about a twentieth of a short rollout.
SHARE_OF_GRADIENTS, FEWEST, MOST = 1 / 24, 8, 64
#: Bytes of a number that differences can be taken in.
SINGLE = 4


def looked_at(gradient_rows: float, rows: int) -> int:
    """Fine-tuning rows whose part is measured.

    Args:
        gradient_rows: rows that the rollout took gradients of.
        rows: there are.
    """
    return min(rows, MOST, max(FEWEST, round(SHARE_OF_GRADIENTS * gradient_rows)))


def account(
    run: PlannedRun, layout: ParameterLayout, start: Sequence[Tensor], panel: Panel, change: float
) -> DriftAccount | None:
    """Who carries the change of safety between the aligned model and where the run stands.

    Args:
        run: at its end, inside `measuring`; it is left as found.
        layout: the selected parameters.
        start: θ*, in layout order.
        panel: safety rows.
        change: measured change of their mean loss between the two (nats per token).

    Returns:
        The account; None where the parameters did not move or a loss on the way is not finite.
    """
    end = [parameter.detach().clone() for parameter in run.parameters]
    try:
        return _between(run, layout, start, end, panel, change)
    finally:
        put(run.parameters, end)
        run.clear()
        torch.clear_autocast_cache()


def _between(
    run: PlannedRun,
    layout: ParameterLayout,
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    panel: Panel,
    change: float,
) -> DriftAccount | None:
    run.clear()
    for t in NODES:
        _move_to(run, start, end, t)
        _add_safety_gradient(run, panel)
    parts, squares = torch.zeros(len(layout.modules), dtype=torch.float64), 0.0
    for parameter, first, last, owner in zip(
        run.parameters, start, end, layout.module_of_parameter, strict=True
    ):
        moved = (last - first).to(torch.float64)
        squares += float(moved.square().sum())
        if parameter.grad is not None:
            parts[owner] += float((parameter.grad.to(torch.float64) * moved).sum())
    if squares == 0 or not bool(parts.isfinite().all()):
        return None
    _move_to(run, start, end, 0.5)
    rows, of = _rows(run, math.sqrt(squares))
    return DriftAccount(list(layout.modules), parts.tolist(), change, len(panel), rows, of)


@torch.no_grad()
def _move_to(run: PlannedRun, start: Sequence[Tensor], end: Sequence[Tensor], t: float) -> None:
    """The parameters at a place of the chord."""
    for parameter, first, last in zip(run.parameters, start, end, strict=True):
        parameter.copy_(torch.lerp(first, last, t))
    torch.clear_autocast_cache()


def _add_safety_gradient(run: PlannedRun, panel: Panel) -> None:
    """Add a node's part of ḡ to `.grad`, a few rows at a time: no more than a training step has."""
    model, most = run.task.model, max(batch_size(run.stream.at(0)), 1)
    for batch in panel.batches:
        for first in range(0, batch_size(batch), most):
            piece = slice_batch(batch, first, min(first + most, batch_size(batch)))
            with recomputing(model), run.autocasting():
                losses = panel.loss_fn(model, piece)
            # A foreign loss is the mean of its batch.
            total = losses.sum() if losses.ndim else losses * batch_size(piece)
            (total / len(panel) / len(NODES)).backward()


def _rows(run: PlannedRun, length: float) -> tuple[list[dict[str, Any]], int | None]:
    """The part of some rows, spread over the data, and of how many rows they are.

    Args:
        run: at the chord's middle, with ḡ in `.grad`; its parameters are left elsewhere.
        length: ‖Δ‖.
    """
    data = run.task.finetune
    known = len(data.rows) or data.units or None
    if any(parameter.dtype.itemsize < SINGLE for parameter in run.parameters):
        return [], known  # A difference drowns in the rounding of the weights.
    squares = _scaled(run)
    seen = run.gradient_evaluations * batch_size(run.stream.at(0))
    panel = panel_of(data, looked_at(seen, known or MOST), run.stream.device)
    if squares == 0 or not math.isfinite(squares):
        return [], known
    reach = REACH * length / math.sqrt(squares)
    ahead, behind = (_losses_at(run, panel, way) for way in (reach, -2 * reach))
    parts = -sum(run.rates) / (known or len(panel)) * (ahead - behind) / (2 * reach) * _weights(run, panel)
    described = (dict(data.rows[row]) if row < len(data.rows) else {} for row in panel.rows)
    rows = [
        {**row, "index": index, "first_order": part, "loss": loss}
        for row, index, part, loss in zip(
            described, panel.rows, parts.tolist(), ((ahead + behind) / 2).tolist(), strict=True
        )
    ]
    return [row for row in rows if math.isfinite(row["first_order"])], known


@torch.no_grad()
def _scaled(run: PlannedRun) -> float:
    """Turn `.grad` into D times itself, the way a step would go; returns its squared norm."""
    squares = 0.0
    for parameter in run.parameters:
        if parameter.grad is None:
            continue
        part, group = run.part_of(parameter)
        scale = part.kind.scale(part.optimizer.state[parameter], group, parameter.grad.square())
        parameter.grad.mul_(scale).mul_(group["ratio"])
        squares += float(parameter.grad.to(torch.float64).square().sum())
    return squares


@torch.no_grad()
def _losses_at(run: PlannedRun, panel: Panel, way: float) -> Tensor:
    """Losses of the rows after a move of the parameters along `.grad`."""
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.add_(parameter.grad, alpha=way)
    torch.clear_autocast_cache()
    with run.reading():
        return panel.losses(run.task.model)


def _weights(run: PlannedRun, panel: Panel) -> Tensor:
    """What a row's own mean counts for in a step: its trained tokens over their mean, or 1."""
    tokens = run.task.finetune.tokens
    if not run.by_tokens or tokens is None:
        return torch.ones(len(panel), dtype=torch.float64)
    counts = panel.in_order(torch.cat([tokens.counts(b) for b in panel.batches]).to("cpu", torch.float64))
    return counts / counts.mean().clamp(min=1)
