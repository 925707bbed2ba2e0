"""Overlap of the planned update with the safety subspace in ΔW space, for LoRA adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from arisk.anatomy.safety_side import SafetySide
from arisk.base.task import LoraPair, Task
from arisk.geometry.gram import gram
from arisk.geometry.lora import displacement_coordinates, gradient_coordinates, tangent_frame
from arisk.geometry.overlap import dual_coefficients, projection_ratio
from arisk.geometry.spectrum import eigenpairs
from arisk.gradients import ParameterLayout

__all__ = ["delta_w_overlap"]


def delta_w_overlap(
    task: Task, layout: ParameterLayout, side: SafetySide, rank: int, direction: Tensor
) -> tuple[float | None, int]:
    """‖P u‖/‖u‖ with gradients and update taken as first-order changes of ΔW = (α/r) B A.

    Args:
        task: names the adapters; their current A and B are read from the model.
        layout: the selected parameters.
        side: columns of the per-sample safety gradients.
        rank: rank of the subspace.
        direction: (P,) u in raw (A, B) coordinates.

    Returns:
        The ratio in [0, 1] and the dimension of the tangent space; (None, 0) unless every selected
        parameter belongs to an adapter.
    """
    pairs = [p for p in task.lora_pairs if p.name_a in layout.names and p.name_b in layout.names]
    if not pairs or 2 * len(pairs) != len(layout.names):
        return None, 0
    parts = [_pair_products(task, layout, side, pair, direction) for pair in pairs]
    total = torch.stack([part[0] for part in parts]).sum(0)
    c = torch.stack([part[1] for part in parts]).sum(0)
    norm = sum(part[2] for part in parts) ** 0.5
    values, vectors = eigenpairs(total)
    values, vectors = values[:rank], vectors[:, :rank]
    ratio = projection_ratio(dual_coefficients(c, values, vectors), norm)
    return ratio, sum(part[3] for part in parts)


def _pair_products(
    task: Task, layout: ParameterLayout, side: SafetySide, pair: LoraPair, direction: Tensor
) -> tuple[Tensor, Tensor, float, int]:
    """One adapter's Gram (N, N), c-vector (N,), squared displacement and tangent dimension."""
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    a, b = parameters[pair.name_a].cpu(), parameters[pair.name_b].cpu()
    frame = tangent_frame(a, b, pair.scaling)
    grad_a = side.columns(pair.name_a).reshape(-1, *a.shape)
    grad_b = side.columns(pair.name_b).reshape(-1, *b.shape)
    rows = gradient_coordinates(frame, grad_a, grad_b)
    step_a = direction[layout.slice_of(pair.name_a)].reshape(a.shape)
    step_b = direction[layout.slice_of(pair.name_b)].reshape(b.shape)
    step = displacement_coordinates(frame, step_a, step_b)
    return gram(rows), rows @ step, float(step.square().sum()), frame.dimension
