"""Labels drawn from the model itself, for the sampled Fisher matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from arisk.errors import ConfigError
from arisk.models.losses import KEEP
from arisk.models.rendering import IGNORED
from arisk.task import SampleSet

__all__ = ["sample_labels"]


def sample_labels(model: nn.Module, samples: SampleSet, seed: int) -> SampleSet:
    """The same inputs with every response label replaced by one draw from the model's distribution.

    The empirical Fisher of a well-fitted model vanishes like (1 − p)²; with labels drawn from the
    model, one per position, it vanishes like p(1 − p), so a perfectly aligned model does not look
    safest.

    Args:
        model: a causal LM.
        samples: batches with `labels`.
        seed: seeds the draws.

    Raises:
        ConfigError: the batches have no `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        batches = [_resampled(model, batch, generator, device) for batch in samples.batches]
    finally:
        model.train(training)
    return replace(samples, batches=batches)


def _resampled(
    model: nn.Module, batch: object, generator: torch.Generator, device: torch.device
) -> dict[str, Any]:
    if not isinstance(batch, dict) or "labels" not in batch:
        raise ConfigError(
            "the sampled Fisher needs batches with `labels` over a vocabulary",
            where="collect.fisher",
            fix="use `fisher: empirical` for models from Python",
        )
    inputs = {key: value.to(device) for key, value in batch.items() if key not in ("labels", KEEP)}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].float()
    flat = torch.softmax(logits, -1).flatten(0, 1).cpu()
    drawn = torch.multinomial(flat, 1, generator=generator).view(logits.shape[:2])
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == IGNORED, labels[:, 1:], drawn)
    return {**batch, "labels": labels}
