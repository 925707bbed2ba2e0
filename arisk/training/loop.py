"""The planned fine-tune itself: torch's optimizer on the model in place, batches in planned order.

Equal to `transformers.Trainer` with the same arguments, parameter by parameter: one step's loss is the mean
over all trained tokens of its micro-batches, the model is in training mode, weights may run under autocast,
an epoch ends with a short step. Whoever wants to look on is an observer of `follow`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError, InputError, NumericsError
from arisk.base.processes import rank, summed, world
from arisk.base.task import Batch, RowBatches, SampleSet, Task
from arisk.gradients import ParameterLayout, batch_size, move_batch, recomputing, slice_batch
from arisk.gradients.layout import parameters_of
from arisk.models.losses import twice_differentiable
from arisk.training.optimizers import Built
from arisk.training.recipe import Recipe, parameter_groups, step_batches

__all__ = [
    "BatchStream",
    "Observer",
    "PlannedRun",
    "Protect",
    "StepDone",
    "draws_noise",
    "follow",
    "keeping_parameters",
    "put",
    "row_terms",
    "training_loss",
]

#: `protect(step)` changes `.grad`, or the parameters, in place and tells values for the record.
Protect = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class StepDone:
    """What observers are told after a step; the model stands where the step led.

    Attributes:
        number: the step, from 1.
        loss: training loss before it.
        notes: what a protection said of it.
    """

    number: int
    loss: float
    notes: Mapping[str, float]


#: Told of every step; what it returns as True ends the run.
Observer = Callable[[StepDone], bool | None]


@contextmanager
def keeping_parameters(model: nn.Module, layout: ParameterLayout) -> Generator[list[Tensor]]:
    """Inside, the selected parameters may move; afterwards they are back to the bit, buffers as well.

    Yields:
        The one copy θ* that is kept, in layout order.
    """
    parameters = parameters_of(model, layout)
    start = [parameter.detach().clone() for parameter in parameters]
    buffers = running_statistics(model)
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield start
    finally:
        put(parameters, start)
        put(buffers, kept)


def put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers that forward passes in training mode change: running statistics of batch norms."""
    tracking = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    return [buffer for module in tracking for buffer in module.buffers(recurse=False)]


def draws_noise(model: nn.Module) -> bool:
    """Whether the model drops anything in training mode, by its dropout modules or rates it names."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:  # pyright: ignore[reportPrivateUsage] - the common base of all kinds
            return True
        rates = [value for name, value in vars(module).items() if name.endswith(("dropout", "dropout_p"))]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


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

    @property
    def per_epoch(self) -> int | None:
        """Micro-batches of an epoch; None where the data has no known end."""
        batches: Any = self.samples.batches
        if hasattr(batches, "per_epoch"):
            return batches.per_epoch
        return len(batches) if hasattr(batches, "__len__") else None

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


def training_loss(samples: SampleSet, model: nn.Module, batch: Batch, trained: float | None) -> Tensor:
    """A micro-batch's part of a step's loss.

    Args:
        samples: the fine-tuning data with its losses.
        model: the model.
        batch: rows of a micro-batch, or some of them.
        trained: trained tokens of the whole step; None for the mean over the rows.

    Returns:
        Scalar: Σ of token losses over `trained`, or the mean over the rows of their own means.
    """
    if trained is None or samples.tokens is None:
        return samples.loss_fn(model, batch).mean()
    return samples.tokens.sums(model, batch).sum() / trained


def row_terms(samples: SampleSet, model: nn.Module, batch: Batch, trained: float | None) -> Tensor:
    """What every row adds to `training_loss`, (B,), by losses that can be differentiated twice.

    Args:
        samples: the fine-tuning data with its losses.
        model: the model.
        batch: rows of a micro-batch.
        trained: trained tokens of the whole step; None for the mean over the rows.
    """
    tokens, count = samples.tokens, batch_size(batch)
    if trained is not None and tokens is not None:
        return twice_differentiable(tokens.sums)(model, batch) / trained
    losses = samples.loss_fn(model, batch)
    if losses.ndim == 0 and count > 1:
        losses = torch.stack([samples.loss_fn(model, slice_batch(batch, i, i + 1)) for i in range(count)])
    return losses.reshape(-1) / count


class PlannedRun:
    """Steps of the planned fine-tune on a model's selected parameters, inside `measuring`.

    Args:
        task: model and fine-tuning data; its parameters move, so wrap in `keeping_parameters`.
        layout: the selected parameters.
        recipe: how the plan trains.
        seed: seeds dropout and noise, anew at every step: a resumed run draws the same.
    """

    def __init__(self, task: Task, layout: ParameterLayout, recipe: Recipe, seed: int = 0) -> None:
        self.task = task
        self.recipe = recipe
        self.training = recipe.training
        self.rates: list[float] = recipe.rates.tolist()
        self.seed = seed
        self.parameters = parameters_of(task.model, layout)
        self.running = running_statistics(task.model)
        self.stream = BatchStream(task.finetune, self.parameters[0].device)
        groups = parameter_groups(task.model, layout.names, self.parameters, recipe.training)
        self.parts = recipe.kind.build(groups, recipe.training)
        self._of: dict[int, tuple[Built, dict[str, Any]]] = {
            id(parameter): (part, group)
            for part in self.parts
            for group in part.optimizer.param_groups
            for parameter in group["params"]
        }
        self.gradient_evaluations = 0
        #: Called with the step's number between the backward pass and clipping; changes `.grad`.
        self.protect: Protect | None = None
        #: Called with the step's number after the optimizer's step; changes the parameters.
        self.correct: Protect | None = None
        #: What they gave back for the last step.
        self.notes: Mapping[str, float] = {}
        #: Whether ranks share the rows of a micro-batch; not where noise is drawn for a whole batch.
        self.shared = not (draws_noise(task.model) or recipe.training.neftune_noise_alpha)
        self.by_tokens = recipe.training.loss == "tokens" and task.finetune.tokens is not None
        on_gpu = self.stream.device.type == "cuda"
        #: Autocast of forward passes; the trainer has none in float16 on a CPU.
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16 if on_gpu else None}.get(
            recipe.training.precision
        )
        scales = self.autocast == torch.float16
        self.scaler = torch.amp.GradScaler(self.stream.device.type, enabled=True) if scales else None
        self.skipped = 0

    # What the optimizer knows of a parameter

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's state of a parameter; it may be changed in place."""
        return self._of[id(parameter)][0].optimizer.state[parameter]

    def part_of(self, parameter: Tensor) -> tuple[Built, dict[str, Any]]:
        """The optimizer that moves a parameter, and its group there."""
        return self._of[id(parameter)]

    # Steps

    def batches_of(self, number: int) -> range:
        """Micro-batches of step `number`, counted from 0."""
        return step_batches(number, self.training.gradient_accumulation, self.stream.per_epoch)

    def step(self, number: int) -> float:
        """Optimizer step `number` (from 1) on its planned batches; returns the mean loss before it.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        loss = self.gradient(number)
        # A step that overflows in float16 is skipped, and the schedule waits for it.
        rate = self.rates[number - 1 - self.skipped]
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            if self.scaler is None:
                part.optimizer.step()
            else:
                self.scaler.step(part.optimizer)
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < before
        if self.correct is not None:
            self.notes = {**self.notes, **self.correct(number)}
        return loss

    def loss(self, number: int) -> float:
        """The mean loss over the micro-batches of step `number`, without a gradient."""
        batches, trained = self._batches(number)
        with torch.no_grad(), self._training(number):
            losses = [self._loss(batch, trained, len(batches)).detach() for batch in batches]
        return float(self._total(torch.stack(losses)))

    def gradient(self, number: int) -> float:
        """Clipped `.grad` of the loss of step `number` over its micro-batches; returns that loss.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        self.clear()
        batches, trained = self._batches(number)
        total = 0.0
        with self._training(number):
            for batch in batches:
                part = self._loss(batch, trained, len(batches))
                loss = float(self._total(part.detach()))
                if not math.isfinite(loss):
                    raise NumericsError(
                        f"training diverges: the loss is {loss} at step {number}",
                        where=f"planned step {number}",
                        fix="lower `training.learning_rate`, or set `training.max_grad_norm`",
                    )
                if part.requires_grad:
                    (part if self.scaler is None else self.scaler.scale(part)).backward()
                total += loss
        if self._splits:
            self._sum_gradients()
        self.gradient_evaluations += len(batches)
        for part in self.parts if self.scaler is not None else ():
            self.scaler.unscale_(part.optimizer)  # pyright: ignore[reportOptionalMemberAccess]
        if self.protect is not None:
            self.notes = self.protect(number)
        if self.training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm)
        return total

    def row_terms(self, number: int) -> Generator[tuple[int, Tensor]]:
        """What every row adds to the loss of step `number`, micro-batch by micro-batch, with its graph.

        The sum over all of them is the loss that `gradient` is that of; it can be differentiated twice.

        Yields:
            The micro-batch's number, counted from 0 over the run, and its terms (B,).
        """
        batches, trained = self._batches(number)
        samples, share = self.task.finetune, 1.0 if trained is not None else 1 / len(batches)
        with self._training(number):
            for place, batch in zip(self.batches_of(number), batches, strict=True):
                with self.autocasting():
                    terms = row_terms(samples, self.task.model, batch, trained)
                yield place, terms * share

    def terms_per_loss(self, number: int, batch: Batch, among: int | None = None) -> Tensor:
        """Term in step `number` of rows over their loss, (B,), were they among those of that step.

        Args:
            number: the step.
            batch: B rows.
            among: rows of the micro-batch of that step that they are of; None: all of the step's count alike.
        """
        batches, trained = self._batches(number)
        tokens = self.task.finetune.tokens
        if trained is not None and tokens is not None:
            return tokens.counts(batch).to("cpu", torch.float64) / trained
        rows = sum(batch_size(batch) for batch in batches) if among is None else among * len(batches)
        return torch.full((batch_size(batch),), 1 / rows, dtype=torch.float64)

    def loss_on(self, batch: Batch, number: int) -> Tensor:
        """The training loss of any rows as a step of their own, with its graph.

        Args:
            batch: rows on the model's device.
            number: the step whose noise is drawn.
        """
        tokens = self.task.finetune.tokens
        trained = None
        if self.by_tokens and tokens is not None:
            trained = max(float(tokens.counts(batch).sum()), 1.0)
        with self._training(number), self.autocasting():
            return training_loss(self.task.finetune, self.task.model, batch, trained)

    @contextmanager
    def reading(self) -> Generator[None]:
        """Inside: passes without a gradient, in the precision of the plan's own forward passes.

        Weights that move inside need `torch.clear_autocast_cache`.
        """
        with torch.no_grad(), self.autocasting():
            yield

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _batches(self, number: int) -> tuple[list[Batch], float | None]:
        """The micro-batches of a step, and how many tokens they train; None where rows count."""
        batches = [self.stream.at(i) for i in self.batches_of(number)]
        tokens = self.task.finetune.tokens
        if not self.by_tokens or tokens is None:
            return batches, None
        trained = sum(float(tokens.counts(batch).sum()) for batch in batches)
        return batches, max(trained, 1.0)

    @property
    def _splits(self) -> bool:
        return self.shared and world() > 1

    @contextmanager
    def _training(self, number: int) -> Generator[None]:
        """Inside: training mode as the trainer has it, with this step's noise."""
        model = self.task.model
        modes = [(module, module.training) for module in model.modules()]
        torch.manual_seed(self.seed + number)
        hook = self._neftune()
        try:
            model.train()
            with recomputing(model):
                yield
        finally:
            if hook is not None:
                hook.remove()
            for module, training in modes:
                module.training = training

    def _neftune(self) -> Any:
        """A hook that adds uniform noise to embedded tokens; None where none is asked for."""
        alpha = self.training.neftune_noise_alpha
        if alpha is None:
            return None
        embeddings: Any = getattr(self.task.model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            raise ConfigError(
                "NEFTune needs a model that names its input embeddings",
                where="training.neftune_noise_alpha",
                fix="leave it out, or give the model a `get_input_embeddings` method",
            )

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            del module, args
            size = alpha / math.sqrt(output.shape[1] * output.shape[2])
            return output + torch.zeros_like(output).uniform_(-size, size)

        return embeddings.register_forward_hook(add)

    def _loss(self, batch: Batch, trained: float | None, count: int) -> Tensor:
        """A micro-batch's part of the step's loss, or this rank's part of that."""
        samples, model = self.task.finetune, self.task.model
        share = 1.0 if trained is not None else 1 / count
        if self._splits:
            size = batch_size(batch)
            own = slice(size * rank() // world(), size * (rank() + 1) // world())
            if own.start == own.stop:
                return torch.zeros((), device=self.stream.device)
            batch = slice_batch(batch, own.start, own.stop)
            share = share if trained is not None else share * (own.stop - own.start) / size
        with self.autocasting():
            return training_loss(samples, model, batch, trained) * share

    def autocasting(self) -> torch.autocast:
        """Inside: forward passes in the plan's own precision."""
        kind = self.stream.device.type
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)

    def beside(self) -> torch.autocast:
        """Inside: forward passes of a loss beside the plan's own, whose gradient no scaler scales.

        In bfloat16 where the plan is; a plan in float16 has them in the precision of the weights.
        """
        narrow = self.autocast if self.autocast == torch.bfloat16 else None
        return torch.autocast(self.stream.device.type, dtype=narrow, enabled=narrow is not None)

    def _sum_gradients(self) -> None:
        """Sum of all ranks' gradients; a parameter that no rank used keeps none, as with one process."""
        used = summed(torch.tensor([float(p.grad is not None) for p in self.parameters]))
        for parameter, count in zip(self.parameters, used.tolist(), strict=True):
            if count:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = summed(own)

    def _total(self, losses: Tensor) -> Tensor:
        return summed(losses).sum() if self._splits else losses.sum()


def follow(run: PlannedRun, first: int, last: int, observers: Sequence[Observer]) -> int:
    """Take steps first … last, telling every observer of each.

    Args:
        run: the planned run.
        first: the first step to take.
        last: the last one.
        observers: in the order they are told; one that ends the run is the last that is told.

    Returns:
        The last step taken: `last`, an earlier one where an observer ended it, first − 1 for none.

    Raises:
        NumericsError: the loss is not finite.
    """
    for number in range(first, last + 1):
        loss = run.step(number)
        done = StepDone(number, loss, run.notes)
        if any(observer(done) for observer in observers):
            return number
    return max(last, first - 1)
