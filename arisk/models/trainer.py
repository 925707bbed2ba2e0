"""Protection inside Hugging Face's `Trainer`: mixins over its loss and gradients, and watches on the run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from arisk.base.errors import ConfigError
from arisk.gradients import evaluating
from arisk.models.anchored import BETAS, LATER_BETA, ReferenceLosses, constrained
from arisk.models.from_trainer import require_length
from arisk.models.loaders import keeping_random_state
from arisk.models.loading import hf_module

__all__ = [
    "ConstrainedTrainerMixin",
    "GuardedTrainerMixin",
    "ProjectedTrainerMixin",
    "drift_watch",
    "following",
]


class _Terms(Protocol):
    @property
    def total(self) -> Tensor: ...


class _GuardPlugin(Protocol):
    def penalty(self) -> _Terms: ...


class GuardedTrainerMixin:
    """Adds a mitigator's penalty to the training loss; evaluation keeps the plain loss.

    Use it before the trainer: ``class Guarded(GuardedTrainerMixin, Trainer): pass``. The penalty enters
    an optimizer step once, whatever the number of accumulated micro-batches.

    Args:
        args: for the trainer.
        mitigator: any object whose `penalty().total` is a scalar with gradient, such as an
            `arisk.LoRAMitigator` of the model.
        kwargs: for the trainer.
    """

    def __init__(self, *args: Any, mitigator: _GuardPlugin, **kwargs: Any) -> None:
        self.mitigator = mitigator
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss plus the penalty.

        Args:
            model: as the trainer gives it.
            inputs: the batch.
            return_outputs: also return the model's outputs.
            num_items_in_batch: tokens of the whole optimizer step, where the trainer counts them.

        Raises:
            NumericsError: a term is NaN or infinite.
        """
        trainer: Any = super()
        loss, outputs = trainer.compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            penalty = self.mitigator.penalty().total.to(loss.device)
            loss = loss + penalty / self._repeats(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _repeats(self, num_items_in_batch: Any) -> int:
        """How often an optimizer step adds the penalty: a per-batch mean is divided by the trainer."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_tokens = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_tokens or trainer.compute_loss_func is not None
        return int(getattr(trainer, "current_gradient_accumulation_steps", 1)) if scaled else 1


class ConstrainedTrainerMixin:
    """Trains on constrained first tokens in place of the plain loss; evaluation keeps the plain loss.

    Use it before the trainer. Before the first step every training row is measured once, at the model as it
    is then, in each process, by a loader of its own: the trainer's may leave rows to other processes, drop
    the last ones, or be kept for the evaluation. The order of training stays what it was.

    Args:
        args: for the trainer.
        betas: β of the first tokens of each response, see `arisk.models.anchored.constrained`.
        later: β of the tokens after them.
        kwargs: for the trainer.

    Attributes:
        reference: the losses of the aligned model, row by row.
    """

    def __init__(
        self, *args: Any, betas: Sequence[float] = BETAS, later: float = LATER_BETA, **kwargs: Any
    ) -> None:
        self.reference = ReferenceLosses()
        self._tied = constrained(self.reference, betas, later)
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the aligned model's losses, then train.

        Raises:
            ConfigError: the rows have no known end, or can be read only once.
            InputError: a row of training was not among those measured.
        """
        self.measure_rows()
        trainer: Any = super()
        return trainer.train(*args, **kwargs)

    def measure_rows(self) -> None:
        """Measure the rows that are not known yet, at the model as it is, in the precision of the training.

        Raises:
            ConfigError: the rows have no known end, or can be read only once.
        """
        trainer: Any = self
        require_length(trainer.train_dataset, trainer.args)
        with keeping_random_state(), evaluating(trainer.model), trainer.accelerator.autocast():
            for batch in _every_row(trainer):
                self.reference.add(trainer.model, trainer._prepare_inputs(batch))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The constrained loss of a training batch, over the trained tokens of the optimizer step.

        Args:
            model: as the trainer gives it.
            inputs: the batch.
            return_outputs: also return the model's outputs: the plain loss, as evaluation wants it.
            num_items_in_batch: tokens of the whole optimizer step, where the trainer counts them.
        """
        if return_outputs or not model.training:
            trainer: Any = super()
            return trainer.compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        loss = self._tied.sums(model, inputs).sum()
        if num_items_in_batch is None:
            return loss / self._tied.counts(inputs).sum()
        return loss / num_items_in_batch * self._processes()

    def _processes(self) -> int:
        """Processes that count their tokens together and average gradients, as for the trainer's loss."""
        trainer: Any = self
        if not trainer.args.average_tokens_across_devices:
            return 1
        return trainer.accelerator.num_processes // getattr(trainer, "get_tp_size", lambda: 1)()


def _every_row(trainer: Any) -> Iterator[Any]:
    """Batches of every training row, as the trainer collates them; a stream as far as the plan goes."""
    held, before = trainer.accelerator._dataloaders, len(trainer.accelerator._dataloaders)
    try:
        loader = trainer.get_train_dataloader()
    finally:
        del held[before:]
    dataset, size = loader.dataset, trainer.args.train_batch_size
    # What accelerate makes of a stream for one of several processes.
    dataset = dataset.dataset if type(dataset).__name__ == "IterableDatasetShard" else dataset
    whole = DataLoader(dataset, size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)
    if hasattr(dataset, "__len__"):
        return iter(whole)
    rows = trainer.args.max_steps * trainer.get_total_train_batch_size(trainer.args)
    return itertools.islice(whole, math.ceil(rows / size))


class ProjectedTrainerMixin:
    """Changes the gradients of every optimizer step before they are clipped.

    Use it before the trainer.

    Args:
        args: for the trainer.
        project: changes `.grad` in place, such as `arisk.guard.projection` gives.
        kwargs: for the trainer.
    """

    def __init__(self, *args: Any, project: Callable[[], Any], **kwargs: Any) -> None:
        self._project = project
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's step; after the last micro-batch of an optimizer step the gradients are changed."""
        trainer: Any = super()
        loss = trainer.training_step(*args, **kwargs)
        own: Any = self
        if own.accelerator.sync_gradients:
            self._project()
        return loss


class _Observes(Protocol):
    def begin(self, model: Any, steps: int, done: int) -> None: ...

    def step(self) -> None: ...

    def end(self) -> None: ...


def following(observer: _Observes) -> Any:
    """A `TrainerCallback` that hands a training to an observer, such as `arisk.guard.RunAverage`.

    Args:
        observer: told of the beginning (of a resumed run, too: with the steps that lie behind), of every
            optimizer step, and of the end, where it may change weights.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    base: Any = hf_module("transformers").TrainerCallback

    class Following(base):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The model before the first step."""
            del args, control
            observer.begin(kwargs["model"], state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """After every optimizer step."""
            del args, state, control, kwargs
            observer.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Weights that are saved afterwards are those the observer leaves."""
            del args, state, control, kwargs
            observer.end()

    return Following()


def drift_watch(
    measure: Callable[[Any], float],
    *,
    every: int = 10,
    threshold: float | None = None,
    start: float | None = None,
) -> Any:
    """A `TrainerCallback` that measures the safety loss while a `Trainer` trains, and can stop it.

    Each measurement goes to `trainer.state.log_history` as `safety_loss` and `safety_drift` (nats), the
    change against the start, and to the callback's `history` as (step, drift). The model is measured in
    evaluation mode, without gradient, and its modes are put back.

    Args:
        measure: `model -> mean safety loss`, such as `arisk.guard.mean_loss(samples)`.
        every: optimizer steps between measurements; the last step is measured as well.
        threshold: drift (nats per response token) from which training stops; None only watches. A loss
            that is not finite stops as well.
        start: safety loss of the aligned model; default that at the beginning of training, which is wrong
            for a run resumed from a checkpoint.

    Returns:
        The callback; `stopped_at` is the step at which it stopped training, or None.

    Raises:
        ConfigError: `every` is not positive.
        MissingExtraError: transformers is not installed.
    """
    if every < 1:
        raise ConfigError("`every` must be 1 or more", where="drift_watch", fix="give a number of steps")
    base: Any = hf_module("transformers").TrainerCallback

    class DriftWatch(base):
        def __init__(self) -> None:
            self.start = start
            self.history: list[tuple[int, float]] = []
            self.stopped_at: int | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The safety loss before the first step."""
            del args, state, control
            self.start = _measured(measure, kwargs["model"]) if self.start is None else self.start

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Measure where it is due; ask for the end where the drift is too large."""
            del args
            due = state.global_step % every == 0 or state.global_step == state.max_steps
            if not due or self.start is None:
                return
            loss = _measured(measure, kwargs["model"])
            drift = loss - self.start
            self.history.append((state.global_step, drift))
            state.log_history.append({"step": state.global_step, "safety_loss": loss, "safety_drift": drift})
            # NaN is not below any threshold.
            if threshold is not None and not drift < threshold:
                self.stopped_at = state.global_step
                control.should_training_stop = True

    return DriftWatch()


def _measured(measure: Callable[[Any], float], model: Any) -> float:
    with evaluating(model), torch.no_grad():
        return float(measure(model))
