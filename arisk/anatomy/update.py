"""The direction in which the planned optimizer starts, and how noisy it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError, NumericsError
from arisk.base.processes import gathered, share, world
from arisk.base.task import Batch, LossFn, Progress, SampleSet, Task
from arisk.config.plan import TrainingConfig
from arisk.geometry.vectors import VectorStack
from arisk.gradients import ParameterLayout, mean_gradient, move_batch
from arisk.training.loop import training_loss
from arisk.training.optimizers import optimizer_named
from arisk.training.recipe import start_ratios

__all__ = ["Update", "first_batches", "measure_update", "preconditioner", "step_loss"]


@dataclass(frozen=True)
class Update:
    """Mini-batch gradients of the fine-tuning loss at θ*, and the step they give.

    Attributes:
        loss: mean loss over the batches.
        gradient: (P,) g, mean over the batches, weighted by their trained tokens where the plan trains so.
        noise_variance: (P,) unbiased variance of one micro-batch gradient; 0 with one batch.
        preconditioner: (P,) D of the planned optimizer: ones for SGD, 1/(√v̂ + ε) for AdamW with
            v̂ = g² + noise/accumulation.
        direction: (P,) u = −D g.
        batch_losses: (B,).
    """

    loss: float
    gradient: Tensor
    noise_variance: Tensor
    preconditioner: Tensor
    direction: Tensor
    batch_losses: Tensor


def first_batches(samples: SampleSet, count: int, device: torch.device) -> list[Batch]:
    """The first `count` batches in planned order (fewer when the data set is finite and shorter)."""
    batches = [move_batch(batch, device) for batch in itertools.islice(iter(samples.batches), count)]
    if not batches:
        raise InputError(
            "the data set gives no batch",
            where=f"data set {samples.name!r}",
            fix="give at least one row",
        )
    return batches


def preconditioner(
    model: nn.Module,
    layout: ParameterLayout,
    gradient: Tensor,
    noise_variance: Tensor,
    training: TrainingConfig,
) -> Tensor:
    """D (P,) of the planned optimizer at the start, learning-rate ratios of LoRA+ included.

    Args:
        model: whose parameters these are.
        layout: the selected parameters.
        gradient: (P,) mean gradient.
        noise_variance: (P,) variance of one micro-batch gradient.
        training: the planned optimizer.

    Raises:
        ConfigError: the optimizer is not known.
    """
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    noise = noise_variance / training.gradient_accumulation
    d = optimizer_named(training.optimizer).start(gradient, noise, training, shapes)
    ratios = start_ratios(model, layout.names, training)
    return d if ratios is None else d * ratios.to(d)


def measure_update(
    task: Task,
    samples: SampleSet,
    layout: ParameterLayout,
    training: TrainingConfig,
    batches: Sequence[Batch],
    progress: Progress,
    *,
    stack: VectorStack | None = None,
) -> Update:
    """Average the first batches' gradients and precondition them as the optimizer would.

    Mean and variance are updated with each gradient (Welford), so that no more than one per process is
    held at a time.

    Args:
        task: the model, inside `measuring`.
        samples: the data set the batches come from.
        layout: the selected parameters.
        training: the planned optimizer.
        batches: micro-batches on the model's device.
        progress: told of finished batches.
        stack: an empty stack that takes the batches' gradients; None keeps none.

    Raises:
        NumericsError: a loss or gradient is not finite, or the mean gradient is exactly zero.
    """
    losses: list[float] = []
    mean = squares = torch.zeros(0)
    loss_fn = step_loss(samples, batches, training)
    gradients = _gradients(task, samples.name, loss_fn, layout, batches, progress)
    for number, (loss, gradient) in enumerate(gradients, 1):
        losses.append(loss)
        if stack is not None:
            stack.append(gradient)
        if number == 1:
            mean, squares = gradient.clone(), torch.zeros_like(gradient)
            continue
        off = gradient - mean
        mean.add_(off, alpha=1 / number)
        squares.addcmul_(off, gradient.sub_(mean))
    progress(f"{samples.name} gradients", len(batches), len(batches))
    noise = squares.div_(max(1, len(losses) - 1))
    if float(mean.norm()) == 0:
        raise NumericsError(
            f"the update of the {samples.name} data is exactly zero",
            where=f"score: gradient of data set {samples.name!r}",
            fix="check that its loss depends on the selected parameters, and that its rows are not "
            "already fitted perfectly",
        )
    d = preconditioner(task.model, layout, mean, noise, training)
    return Update(
        loss=sum(losses) / len(losses),
        gradient=mean,
        noise_variance=noise,
        preconditioner=d,
        direction=-d * mean,
        batch_losses=torch.tensor(losses, dtype=torch.float64),
    )


def step_loss(samples: SampleSet, batches: Sequence[Batch], training: TrainingConfig) -> LossFn:
    """The loss whose plain mean over these micro-batches is that of one step on all of them.

    By tokens: Σ of token losses over the mean number of trained tokens of a micro-batch.
    """
    if training.loss != "tokens" or samples.tokens is None:
        return samples.loss_fn
    counts = [float(samples.tokens.counts(batch).sum()) for batch in batches]
    return partial(_by_tokens, samples, max(sum(counts) / len(counts), 1.0))


def _by_tokens(samples: SampleSet, trained: float, model: nn.Module, batch: Batch) -> Tensor:
    return training_loss(samples, model, batch, trained)


def _gradients(
    task: Task,
    name: str,
    loss_fn: LossFn,
    layout: ParameterLayout,
    batches: Sequence[Batch],
    progress: Progress,
) -> Iterator[tuple[float, Tensor]]:
    """Loss and gradient of every batch in order, float32 or float64, on the CPU.

    The ranks work on as many batches at a time as there are ranks, and each gets all gradients.
    """
    for start in range(0, len(batches), world()):
        progress(f"{name} gradients", start, len(batches))
        own: list[tuple[float, Tensor]] = []
        count = min(world(), len(batches) - start)
        for index in share(count):
            loss, gradient = mean_gradient(task.model, batches[start + index], loss_fn, layout)
            own.append((loss, gradient.cpu() if gradient.dtype == torch.float64 else gradient.float().cpu()))
        yield from gathered(own, count)
