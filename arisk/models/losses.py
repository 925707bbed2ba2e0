"""The loss of causal language models: mean negative log-likelihood per response token, per sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from arisk.models.rendering import IGNORED

__all__ = ["per_sample_nll"]


def per_sample_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """ℓ_i = −(1/S_i) Σ_s log p(y_is | y_i,<s) over the S_i response tokens of sample i (nats).

    Args:
        model: a causal LM whose output has `logits` (B, S, V).
        batch: `input_ids`, `attention_mask`, `position_ids` and `labels` (−100 = no loss), (B, S).

    Returns:
        (B,) in at least float32; every sample has the same weight whatever its length.
    """
    # Labels move one place left, so that logits need no slice and flatten without a copy; rows of the
    # vocabulary stay contiguous, which is many times faster than a class dimension in the middle.
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    counted = labels != IGNORED
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
