"""The loss of causal language models: mean negative log-likelihood per response token, per sample."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from arisk.models.rendering import IGNORED

__all__ = ["KEEP", "per_sample_nll"]

#: Argument of Hugging Face models: how many of the last positions get logits.
KEEP = "logits_to_keep"


def per_sample_nll(model: nn.Module, batch: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
    """ℓ_i = −(1/S_i) Σ_s log p(y_is | y_i,<s) over the S_i response tokens of sample i (nats).

    Args:
        model: a causal LM whose output has `logits` (B, S, V).
        batch: `input_ids`, `attention_mask`, `position_ids` and `labels` (−100 = no loss), (B, S), and
            optionally `logits_to_keep`, an int k: no label lies before the last k positions but one.
        temperature: logits are divided by this first.

    Returns:
        (B,) in at least float32; every sample has the same weight whatever its length.
    """
    # Labels move one place left, so that logits need no slice and flatten without a copy; rows of the
    # vocabulary stay contiguous, which is many times faster than a class dimension in the middle.
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", KEEP)}
    if KEEP in batch and _keeps_logits(type(_inner(model))):
        # Positions of the prompts alone: the vocabulary is the widest layer of a small model.
        inputs[KEEP] = batch[KEEP]
    logits = model(**inputs).logits
    labels = labels[:, -logits.shape[1] :]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(
        (wide if temperature == 1 else wide / temperature).flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    ).view(labels.shape)
    counted = labels != IGNORED
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


def _inner(model: nn.Module) -> nn.Module:
    """The model inside a peft wrapper, whose own signature names no arguments."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    return unwrap()


@cache
def _keeps_logits(kind: type[nn.Module]) -> bool:
    return KEEP in inspect.signature(kind.forward).parameters
