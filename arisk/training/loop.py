"""The planned fine-tune itself: torch's optimizer on the model in place, batches in planned order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError, NumericsError
from arisk.base.processes import rank, summed, world
from arisk.base.task import Batch, RowBatches, SampleSet, Task
from arisk.config.plan import TrainingConfig
from arisk.gradients import ParameterLayout, batch_size, move_batch, recomputing, slice_batch
from arisk.gradients.layout import parameters_of

__all__ = ["BatchStream", "PlannedRun", "Protect", "keeping_parameters", "put"]

#: `protect(step)` changes `.grad`, or the parameters, in place and tells values for the record.
Protect = Callable[[int], Mapping[str, float]]


@contextmanager
def keeping_parameters(model: nn.Module, layout: ParameterLayout) -> Generator[list[Tensor]]:
    """Inside, the selected parameters may move; afterwards they are back to the bit.

    Yields:
        The one copy θ* that is kept, in layout order.
    """
    parameters = parameters_of(model, layout)
    start = [parameter.detach().clone() for parameter in parameters]
    try:
        yield start
    finally:
        put(parameters, start)


def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy values into parameters in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


class BatchStream:
    """Micro-batches of the planned run by number, in any order.

    A sequence is taken as one epoch and repeated; a planned order gives any number directly; any
    other iterable is read forward, and from its start again when it ends or lies behind.

    Args:
        samples: the fine-tuning data.
        device: where the batches go.
    """

    def __init__(self, samples: SampleSet, device: torch.device) -> None:
        self.samples = samples
        self.device = device
        #: Rows left out of the batches, where the data can be regrouped.
        self.without: frozenset[int] = frozenset()
        self._iterator: Iterator[Batch] = iter(())
        self._next = 0
        self._length: int | None = None

    def at(self, number: int) -> Batch:
        """The micro-batch with this number, counted from 0.

        Raises:
            InputError: the data set gives no batch.
        """
        batches: Any = self.samples.batches
        if self.without and isinstance(batches, RowBatches):
            every = batches.indices(number)
            kept = [row for row in every if row not in self.without] or every
            return move_batch(batches.of(kept), self.device)
        if hasattr(batches, "__getitem__"):
            size = len(batches) if hasattr(batches, "__len__") else None
            if size == 0:
                raise self._empty()
            return move_batch(batches[number % size if size else number], self.device)
        return move_batch(self._read(number), self.device)

    def _read(self, number: int) -> Batch:
        if self._length:
            number %= self._length
        if number < self._next or self._next == 0:
            self._iterator, self._next = iter(self.samples.batches), 0
        for batch in itertools.islice(self._iterator, number - self._next, None):
            self._next = number + 1
            return batch
        # The iterable ended: only now is its length known.
        self._length = sum(1 for _ in self.samples.batches)
        if self._length == 0:
            raise self._empty()
        self._next = 0
        return self._read(number)

    def _empty(self) -> InputError:
        return InputError(
            "the data set gives no batch",
            where=f"data set {self.samples.name!r}",
            fix="give at least one row",
        )


class PlannedRun:
    """Steps of the planned fine-tune on a model's selected parameters, inside `measuring`.

    Args:
        task: model and fine-tuning data; its parameters move, so wrap in `keeping_parameters`.
        layout: the selected parameters.
        training: optimizer, clipping, accumulation.
        rates: (T,) learning rates.
    """

    def __init__(self, task: Task, layout: ParameterLayout, training: TrainingConfig, rates: Tensor) -> None:
        self.task = task
        self.training = training
        self.rates = rates.tolist()
        self.parameters = parameters_of(task.model, layout)
        self.stream = BatchStream(task.finetune, self.parameters[0].device)
        self.optimizer = planned_optimizer(self.parameters, training)
        self.gradient_evaluations = 0
        #: Called with the step's number between the backward pass and clipping; changes `.grad`.
        self.protect: Protect | None = None
        #: Called with the step's number after the optimizer's step; changes the parameters.
        self.correct: Protect | None = None
        #: What they gave back for the last step.
        self.notes: Mapping[str, float] = {}
        #: Whether ranks share the rows of a micro-batch; off where noise is drawn for a whole batch.
        self.shared = True

    def step(self, number: int) -> float:
        """Optimizer step `number` (from 1) on its planned batches; returns the mean loss before it.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        loss = self.gradient(number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[number - 1]
        self.optimizer.step()
        if self.correct is not None:
            self.notes = {**self.notes, **self.correct(number)}
        return loss

    def loss(self, number: int) -> float:
        """The mean loss over the micro-batches of step `number`, without a gradient."""
        count = self.training.gradient_accumulation
        with torch.no_grad():
            losses = [self._loss(self.stream.at(i)) for i in range((number - 1) * count, number * count)]
        return float(self._total(torch.stack(losses))) / count

    def gradient(self, number: int) -> float:
        """Clipped `.grad` of the mean loss over the micro-batches of step `number`; returns that loss.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        count = self.training.gradient_accumulation
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i in range(count):
            part = self._loss(self.stream.at((number - 1) * count + i))
            loss = float(self._total(part.detach()))
            if not math.isfinite(loss):
                raise NumericsError(
                    f"training diverges: the loss is {loss} at step {number}",
                    where=f"planned step {number}",
                    fix="lower `training.learning_rate`, or set `training.max_grad_norm`",
                )
            if part.requires_grad:
                (part / count).backward()
            total += loss / count
        if self._splits:
            self._sum_gradients()
        self.gradient_evaluations += count
        if self.protect is not None:
            self.notes = self.protect(number)
        if self.training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm)
        return total

    @property
    def _splits(self) -> bool:
        return self.shared and world() > 1

    def _loss(self, batch: Batch) -> Tensor:
        with recomputing(self.task.model):
            return self._mean_loss(batch)

    def _mean_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch, or this rank's part of that sum."""
        model, loss_fn = self.task.model, self.task.finetune.loss_fn
        if not self._splits:
            return loss_fn(model, batch).mean()
        size = batch_size(batch)
        own = slice(size * rank() // world(), size * (rank() + 1) // world())
        if own.start == own.stop:
            return torch.zeros((), device=self.stream.device)
        weight = (own.stop - own.start) / size
        return loss_fn(model, slice_batch(batch, own.start, own.stop)).mean() * weight

    def _sum_gradients(self) -> None:
        """Sum of all ranks' gradients; a parameter that no rank used keeps none, as with one process."""
        used = summed(torch.tensor([float(p.grad is not None) for p in self.parameters]))
        for parameter, count in zip(self.parameters, used.tolist(), strict=True):
            if count:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = summed(own)

    def _total(self, losses: Tensor) -> Tensor:
        return summed(losses).sum() if self._splits else losses.sum()


def planned_optimizer(parameters: list[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """Torch's optimizer of the plan; learning rates are set step by step."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=1.0, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=1.0, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay
    )
