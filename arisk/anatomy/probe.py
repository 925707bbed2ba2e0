"""Measured losses along a straight virtual move θ* + t u: where the local model stops being true.

Forward passes only. The range of t is found by doubling until the safety loss or the fine-tuning
loss has moved by a nat, so it does not depend on the planned learning rate: every learning rate and
schedule reads the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arisk.base.task import Batch, Progress, SampleSet, Task
from arisk.gradients import ParameterLayout
from arisk.training.panels import sample_losses

__all__ = ["Probe", "displaced", "probe_along"]

#: First displacement tried, as a share of ‖θ‖ (of 1 where θ = 0), and the most doublings after it.
FIRST_SHARE, DOUBLINGS = 2.0**-14, 22
#: The move has gone far enough when a mean loss has changed by this (nats).
FAR = 1.0


@dataclass(frozen=True)
class Probe:
    """Changes of losses at flow times t (first 0): safety (N, M), fine-tuning (M,), control (M,)."""

    times: Tensor
    safety: Tensor
    finetune: Tensor
    control: Tensor | None


@contextmanager
def displaced(model: nn.Module, layout: ParameterLayout, delta: Tensor) -> Generator[None]:
    """Move the selected parameters by δ (P,) inside the block; restored to the bit afterwards."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    saved = {name: parameters[name].detach().clone() for name in layout.names}
    try:
        with torch.no_grad():
            for name, part in layout.split(delta).items():
                parameter = parameters[name]
                parameter.add_(part.to(parameter.device, parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)


def probe_along(
    task: Task,
    layout: ParameterLayout,
    direction: Tensor,
    *,
    points: int,
    safety: Sequence[Batch],
    finetune: Sequence[Batch],
    control: Sequence[Batch],
    progress: Progress,
) -> Probe:
    """Measure safety, fine-tuning and control losses at `points` flow times along u.

    Args:
        task: the model, inside `measuring`; its parameters are restored.
        layout: the selected parameters.
        direction: (P,) u.
        points: M − 1, at flow times t_far / 2^(points − j).
        safety: batches of all safety samples.
        finetune: batches for the fine-tuning loss.
        control: batches for the control loss; empty for none.
        progress: told of finished points.
    """
    sets: list[tuple[Sequence[Batch], SampleSet]] = [(safety, task.safety), (finetune, task.finetune)]
    if task.control is not None and control:
        sets.append((control, task.control))

    def losses_at(time: float) -> list[Tensor]:
        with displaced(task.model, layout, direction * time):
            return [sample_losses(task.model, batches, samples.loss_fn) for batches, samples in sets]

    far = _far_time(task, layout, direction, safety[:1], finetune[:1])
    times = [0.0] + [far / 2 ** (points - j) for j in range(1, points + 1)]
    measured: list[list[Tensor]] = []
    for index, time in enumerate(times):
        progress("virtual move", index, len(times))
        measured.append(losses_at(time))
    progress("virtual move", len(times), len(times))
    changes = [torch.stack([m[s] - measured[0][s] for m in measured], dim=1) for s in range(len(sets))]
    return Probe(
        times=torch.tensor(times, dtype=torch.float64),
        safety=changes[0],
        finetune=changes[1].mean(0),
        control=changes[2].mean(0) if len(changes) > 2 else None,
    )


def _far_time(
    task: Task,
    layout: ParameterLayout,
    direction: Tensor,
    safety: Sequence[Batch],
    finetune: Sequence[Batch],
) -> float:
    """Flow time at which a mean loss has moved by `FAR`, or the last doubling tried."""
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    norm = math.sqrt(sum(float(parameters[n].detach().float().square().sum()) for n in layout.names))
    time = FIRST_SHARE * (norm or 1.0) / float(direction.norm())

    def means() -> Tensor:
        pairs = ((safety, task.safety.loss_fn), (finetune, task.finetune.loss_fn))
        return torch.stack([sample_losses(task.model, b, loss_fn).mean() for b, loss_fn in pairs])

    start = means()
    for _ in range(DOUBLINGS):
        with displaced(task.model, layout, direction * time):
            change = means() - start
        if not bool((change.abs() < FAR).all()):
            break
        time *= 2
    return time
