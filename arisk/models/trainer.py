"""The regulariser inside Hugging Face's `Trainer`: a mixin over its `compute_loss`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

__all__ = ["GuardedTrainerMixin"]


class _Terms(Protocol):
    @property
    def total(self) -> Tensor: ...


class _Guard(Protocol):
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

    def __init__(self, *args: Any, mitigator: _Guard, **kwargs: Any) -> None:
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
