"""Other Fisher matrices than the empirical one: labels drawn from the model, losses at a temperature."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet
from arisk.models.losses import KEEP, per_sample_nll
from arisk.models.rendering import IGNORED

__all__ = ["sample_labels", "tempered"]

#: Temperature where none is named and the loss allows one.
DEFAULT_TEMPERATURE = 4.0


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


def tempered(samples: SampleSet, temperature: float | None, where: str) -> SampleSet:
    """The same samples with the loss −log softmax(z / T): no vanishing gradients where it is sure.

    Args:
        samples: of a causal LM, with the loss of this package.
        temperature: T; 1 gives the samples themselves; None is 4, or 1 for a loss of another kind.
        where: the setting, for messages.

    Raises:
        ConfigError: T is not 1 and the loss is of another kind.
    """
    own = samples.loss_fn is per_sample_nll
    temperature = temperature or (DEFAULT_TEMPERATURE if own else 1.0)
    if temperature == 1:
        return samples
    if not own:
        raise ConfigError(
            "a temperature needs the loss of a Hugging Face causal LM, and this one is given from Python",
            where=where,
            fix="set it to 1",
        )
    return replace(samples, loss_fn=partial(per_sample_nll, temperature=temperature))
