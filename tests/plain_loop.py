"""The planned training written with torch alone, by the conventions of `transformers.Trainer`."""

import math
from collections.abc import Callable

import torch
from torch import nn


def factor(schedule: str, done: int, warmup: int, total: int) -> float:
    """Share of the peak after so many steps."""
    if schedule == "constant":
        return 1.0
    if done < warmup:
        return done / warmup
    part = (done - warmup) / max(1, total - warmup)
    return {"linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}[schedule]


def decay_groups(model: nn.Module, decay: float) -> list[dict]:
    """Biases do not decay."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": decay},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]


def plain_training(
    model: nn.Module,
    loss: Callable,
    batches: list,
    training: dict,
    steps: int,
    *,
    planned: int | None = None,
    before_step: Callable | None = None,
) -> object:
    """Yields the training loss of every step after it was taken; rows count alike, clipping is 1."""
    settings = dict(training)
    kind, rate = settings.pop("optimizer"), settings.pop("learning_rate")
    clip, pieces = settings.pop("max_grad_norm", 1.0), settings.pop("gradient_accumulation", 1)
    schedule, warm = settings.pop("schedule", "constant"), settings.pop("warmup_steps", 0)
    groups = decay_groups(model, settings.pop("weight_decay", 0.0))
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](groups, lr=rate, **settings)
    left: list = []
    for step in range(steps):
        left = left or list(batches)
        micro, left = left[:pieces], left[pieces:]
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(schedule, step, warm, planned or steps)
        optimizer.zero_grad()
        if before_step:
            before_step(step + 1)
        losses = [loss(model, batch).mean() for batch in micro]
        total = sum(losses) / len(losses)
        total.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        yield float(total.detach())
