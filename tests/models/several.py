"""The protections of a `Trainer` for three steps, where torchrun runs this file; weights as safetensors."""

import os
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from arisk.guard import projection, replay
from arisk.models.trainer import ConstrainedTrainerMixin, GuardedTrainerMixin, ProjectedTrainerMixin
from tests.models.test_trainer import arguments, tiny


class Constrained(ConstrainedTrainerMixin, transformers.Trainer):
    pass


class Guarded(GuardedTrainerMixin, transformers.Trainer):
    pass


class Projected(ProjectedTrainerMixin, transformers.Trainer):
    pass


KINDS = {
    "plain": lambda *_: (transformers.Trainer, {}),
    "constrained": lambda *_: (Constrained, {}),
    "guarded": lambda *given: (Guarded, {"mitigator": replay(*given, rows=4)}),
    "projected": lambda *given: (Projected, {"project": projection(*given, rows=4)}),
}


def still():
    """Model, rows with trained tokens of several numbers, and safety samples, without dropout."""
    model, rows, safety = tiny()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for number, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: 1 + number % 5] = -100
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    return model, rows, safety


def trained(kind, folder, batch):
    """The weights after three steps of so many rows in each process."""
    model, rows, safety = still()
    kept = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
    )
    made, extra = KINDS[kind](model, safety)
    with torch.random.fork_rng():
        made(model=model, args=settings, train_dataset=rows, **extra).train()
    return {f"{kind} {name}": p.detach().clone() for name, p in kept.items()}


def main(folder):
    """Write the weights of the first process."""
    torch.set_num_threads(1)
    found = {name: p for kind in KINDS for name, p in trained(kind, folder / "out", 2).items()}
    if int(os.environ["RANK"]) == 0:
        save_file(found, folder / "weights.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
