"""What a model says first: its own opening followed along a fine-tune, and the loss of safe openings.

Two measures of behaviour that cost one forward pass each. The *own opening* is what the aligned model
itself says first to a prompt (its greedy tokens, kept from the start): its log-probability later on, and
how many of its tokens are still the likeliest ones. The *opening loss* is the loss of the first tokens of
given responses beside that of all of them. The first tokens decide what an answer becomes; a mean over
fifty tokens hardly notices when they turn.

Logits are computed where a label is predicted, and nowhere else: the vocabulary is the widest layer of
a small model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arisk.models.losses import PIECE, response_logits, token_nll, trained_losses
from arisk.models.rendering import IGNORED

__all__ = ["OpeningScores", "followed", "losses_at_scales", "opening_batch", "response_losses"]

#: Prompts followed at once.
BATCH = 16


@dataclass(frozen=True)
class OpeningScores:
    """How much of its own openings a model still says.

    Attributes:
        log_p: (N, k) log-probability of each opening token after those before it (nats, ≤ 0); NaN where
            an opening has fewer tokens.
        kept: (N,) how many tokens from the first on are still the argmax, 0 to the opening's length.
    """

    log_p: Tensor
    kept: Tensor


def response_losses(model: nn.Module, batch: Mapping[str, Any], first: int) -> tuple[Tensor, Tensor]:
    """Mean NLL of all response tokens and of the first `first` of them, from one forward pass.

    Args:
        model: a causal LM.
        batch: as for `response_logits`.
        first: k, tokens of the opening; a shorter response counts as a whole.

    Returns:
        Two (B,) tensors (nats per token): −(1/S_i) Σ_s log p(y_is | y_i,<s), equal to `per_sample_nll`,
        and −(1/k) Σ_{s≤k} log p(y_is | y_i,<s).
    """
    each, where = trained_losses(model, batch)
    early = where & (where.cumsum(1) <= first)
    return _row_means(each, where), _row_means(each, early)


def losses_at_scales(
    first: Tensor, last: Tensor, wanted: Tensor, batch: Mapping[str, Any], scales: Sequence[float]
) -> Tensor:
    """Mean NLL of all response tokens at logits z₀ + (z_k − z₀) s, a few positions at a time.

    Args:
        first: (n, V) z₀, from `response_logits`.
        last: z_k in the same way.
        wanted: (B, S) where they lie.
        batch: the batch, with `labels`.
        scales: s, 0 at the start and 1 at the end.

    Returns:
        (B, len(scales)) float64 on the CPU (nats per token).
    """
    labels = batch["labels"][:, 1:][wanted[:, :-1]].to(first.device)
    size = max(1, PIECE // first.shape[1])
    columns: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            a, b = (z[rows] if z.dtype == torch.float64 else z[rows].float() for z in (first, last))
            step = b - a
            columns.append(torch.stack([token_nll(a.add(step, alpha=s), labels[rows]) for s in scales], 1))
    losses = torch.cat(columns).to("cpu", torch.float64)
    rows = wanted.nonzero()[:, 0].to("cpu")
    sums = torch.zeros(len(wanted), len(scales), dtype=torch.float64).index_add_(0, rows, losses)
    return sums / torch.bincount(rows, minlength=len(wanted)).clamp(min=1)[:, None]


def _row_means(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)


def followed(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    openings: Sequence[Sequence[int]],
    pad: int,
) -> OpeningScores:
    """How much of its openings a model says: log p(o_s | prompt, o_<s), and how many are still the argmax.

    Args:
        model: a causal LM in evaluation mode.
        prompts: N prompts as tokens.
        openings: N openings as tokens, one or more each.
        pad: padding token.

    Returns:
        Scores in float64 on the CPU, in the order of the prompts; no gradient is kept.
    """
    longest = max((len(opening) for opening in openings), default=0)
    log_p = torch.full((len(prompts), longest), float("nan"), dtype=torch.float64)
    kept = torch.zeros(len(prompts), dtype=torch.int64)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = opening_batch([prompts[i] for i in rows], [openings[i] for i in rows], pad, device)
        with torch.no_grad():
            logits = response_logits(model, batch)[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        tokens = torch.tensor([token for i in rows for token in openings[i]], device=logits.device)
        # A token that ties with another is kept: nothing has overtaken it.
        best = logits.gather(1, tokens[:, None])[:, 0] >= logits.max(1).values
        scores = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0].to("cpu", torch.float64)
        at = 0
        for i in rows:
            length = len(openings[i])
            log_p[i, :length] = scores[at : at + length]
            kept[i] = int(best[at : at + length].to(torch.int64).cumprod(0).sum())
            at += length
    return OpeningScores(log_p, kept)


def opening_batch(
    prompts: Sequence[Sequence[int]], openings: Sequence[Sequence[int]], pad: int, device: torch.device
) -> dict[str, Any]:
    """Prompt and opening of each row, its labels the opening's tokens; padded on the right.

    Args:
        prompts: N prompts as tokens.
        openings: N openings as tokens, one or more each.
        pad: padding token.
        device: where the tensors go.

    Returns:
        A batch as of `per_sample_nll`, which is then −(1/k) Σ_s log p(o_s | prompt, o_<s).
    """
    lengths = [len(prompt) + len(opening) for prompt, opening in zip(prompts, openings, strict=True)]
    shape = (len(prompts), max(lengths))
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (prompt, opening) in enumerate(zip(prompts, openings, strict=True)):
        ids[row, : lengths[row]] = torch.tensor([*prompt, *opening])
        mask[row, : lengths[row]] = 1
        labels[row, len(prompt) : lengths[row]] = torch.tensor(opening)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    made = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    return {key: value.to(device) for key, value in made.items()}
