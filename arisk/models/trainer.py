"""Protection inside Hugging Face's `Trainer`: a mixin over its `compute_loss`, and a watch on safety."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from arisk.base.errors import ConfigError
from arisk.models.loading import hf_module

__all__ = ["GuardedTrainerMixin", "drift_watch"]


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
        every: optimizer steps between measurements.
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
            if state.global_step % every or self.start is None:
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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return float(measure(model))
    finally:
        for module, training in modes:
            module.training = training
