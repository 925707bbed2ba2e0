"""The loss of causal language models: mean negative log-likelihood per response token, per sample.

Other Fisher matrices than the empirical one: labels drawn from the model, losses at a temperature.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import ConfigError
from arisk.base.task import LossFn, SampleSet, TokenLoss
from arisk.gradients import evaluating
from arisk.models.rendering import IGNORED

__all__ = [
    "KEEP",
    "TOKENS",
    "per_sample_nll",
    "response_logits",
    "sample_labels",
    "summed_nll",
    "tempered",
    "token_nll",
    "trained_losses",
    "trained_sums",
    "trained_tokens",
    "twice_differentiable",
]

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
    return summed_nll(model, batch, temperature) / trained_tokens(batch).clamp(min=1)


def trained_tokens(batch: Mapping[str, Any]) -> Tensor:
    """S_i, the response tokens of each sample (B,): labels that are predicted from a token before them."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1)


def summed_nll(model: nn.Module, batch: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
    """−Σ_s log p(y_is | y_i,<s) over the response tokens of each sample (nats), as of `per_sample_nll`.

    Args:
        model: a causal LM whose output has `logits` (B, S, V).
        batch: as for `per_sample_nll`.
        temperature: logits are divided by this first.

    Returns:
        (B,) in at least float32.
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
    return (losses * (labels != IGNORED)).sum(1)


def trained_sums(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The same sums as `summed_nll`, with logits at the trained tokens alone and no copy of them in float32.

    For a training step and for losses without a gradient: it cannot be differentiated twice.

    Args:
        model: a causal LM whose output has `logits`.
        batch: as for `response_logits`.

    Returns:
        (B,) in at least float32 (nats).
    """
    each, _ = trained_losses(model, batch)
    return each.sum(1)


def trained_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """−log p(y_s | y_<s) of every trained token, where it is predicted.

    Args:
        model: a causal LM whose output has `logits`.
        batch: as for `response_logits`.

    Returns:
        (B, S) in at least float32 (nats), 0 elsewhere, and (B, S) bool: where there is a loss.
    """
    logits, wanted = response_logits(model, batch)
    losses = token_nll(logits, batch["labels"][:, 1:][wanted[:, :-1]].to(logits.device))
    where = wanted.to(losses.device)
    each = torch.zeros(where.shape, dtype=losses.dtype, device=losses.device)
    return each.masked_scatter(where, losses), where


def response_logits(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits at the n positions of a batch from which a label is predicted, row by row.

    The output head gets the hidden states of those positions alone (by a hook before it, so whatever
    the model does to logits afterwards, soft caps or scales, is done as always). A model whose head is
    not a module of its own computes all logits, and those are selected.

    Args:
        model: a causal LM whose output has `logits`.
        batch: `input_ids`, `attention_mask`, `position_ids` and `labels` (−100 = no label), (B, S).

    Returns:
        logits (n, V) as the model gives them, and where they lie: (B, S) bool, true at position s where
        token s + 1 is a label.
    """
    wanted = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1), value=False)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", KEEP)}
    selected = False

    def select(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal selected
        hidden = given[0] if given else None
        if selected or not isinstance(hidden, Tensor) or hidden.shape[:2] != wanted.shape:
            return None
        selected = True
        return (hidden[wanted.to(hidden.device)][None], *given[1:])

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    handle = head.register_forward_pre_hook(select) if isinstance(head, nn.Module) else None
    try:
        logits = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return (logits[0] if selected else logits[wanted.to(logits.device)]), wanted


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(z_i)[y_i] for every row, a few rows at a time; differentiable once.

    Logits narrower than float32 are widened piece by piece, and the gradient is written in their own dtype:
    no table in float32 is ever there as a whole.

    Args:
        logits: (n, V).
        labels: (n,) below V.

    Returns:
        (n,) in at least float32 (nats).
    """
    found: Tensor = _TokenNll.apply(logits, labels)
    return found


#: Logits that are widened at once.
PIECE = 1_000_000


class _TokenNll(torch.autograd.Function):
    """Cross entropy that keeps logits and their log-partitions; softmax is made in pieces, going backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses of all rows."""
        none = logits.new_zeros(0, dtype=_wide(logits.dtype))
        normalisers, losses = [none], [none]
        for piece, own in _pieces(logits, labels):
            normaliser = torch.logsumexp(piece, 1)
            normalisers.append(normaliser)
            losses.append(normaliser - piece.gather(1, own[:, None])[:, 0])
        ctx.save_for_backward(logits, labels, torch.cat(normalisers))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch calls it so
        """slope_i (softmax(z_i) − e_y)."""
        (slopes,) = grad_outputs
        logits, labels, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        start = 0
        for piece, own in _pieces(logits, labels):
            rows = slice(start, start + len(own))
            soft = piece.sub(normalisers[rows, None]).exp_()
            soft[torch.arange(len(own), device=soft.device), own] -= 1
            gradient[rows] = soft.mul_(slopes[rows, None])
            start += len(own)
        return gradient, None


def _pieces(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of logits in at least float32 with their labels, as many at a time as `PIECE` allows."""
    size = max(1, PIECE // max(1, logits.shape[1]))
    for start in range(0, len(labels), size):
        yield logits[start : start + size].to(_wide(logits.dtype)), labels[start : start + size]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def twice_differentiable(sums: LossFn) -> LossFn:
    """The same sums by a function that can be differentiated twice; `sums` itself where it can already."""
    return summed_nll if sums is trained_sums else sums


#: The loss of a training step.
TOKENS = TokenLoss(trained_sums, trained_tokens)


def _inner(model: nn.Module) -> nn.Module:
    """The model inside a peft wrapper, whose own signature names no arguments."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    return unwrap()


@cache
def _keeps_logits(kind: type[nn.Module]) -> bool:
    return KEEP in inspect.signature(kind.forward).parameters


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
    with evaluating(model):
        batches = [_resampled(model, batch, generator, device) for batch in samples.batches]
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
