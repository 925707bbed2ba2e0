"""The mixin in a real Trainer: the penalty acts once per optimizer step, whatever is accumulated."""

import pytest
import torch
from torch import nn

from arisk.models.trainer import GuardedTrainerMixin

transformers = pytest.importorskip("transformers")


class Pull:
    """A penalty with a known gradient: 1 for every entry of one parameter."""

    def __init__(self, parameter):
        self.parameter = parameter

    def penalty(self):
        return type("Terms", (), {"total": self.parameter.sum()})()


class Loss(nn.Module):
    """A model whose loss does not see `theta`, with a Trainer's signature."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3))
        self.other = nn.Parameter(torch.zeros(1))

    def forward(self, x, **kwargs):
        return {"loss": (self.other * x).mean(), "logits": x}


class Guarded(GuardedTrainerMixin, transformers.Trainer):
    pass


def own_loss(outputs, labels, num_items_in_batch=None):
    """The trainer takes a loss of the caller as normalised over the accumulated batch."""
    return outputs["loss"]


@pytest.mark.parametrize("loss_func", [None, own_loss])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_steps_move_the_parameter_by_two_gradients(tmp_path, accumulation, loss_func):
    model = Loss()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    rows = [{"x": torch.ones(1)} for _ in range(4)]
    trainer = Guarded(
        model=model,
        args=arguments,
        train_dataset=rows,
        mitigator=Pull(model.theta),
        compute_loss_func=loss_func,
    )
    with torch.random.fork_rng():
        trainer.train()
    assert torch.allclose(model.theta, torch.full((3,), -0.2))
    model.eval()
    assert float(trainer.compute_loss(model, {"x": torch.zeros(1)}).detach()) == 0
