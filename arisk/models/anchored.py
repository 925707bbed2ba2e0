"""Losses that tie a fine-tuned causal LM to the aligned one, without a second model.

* Constrained first tokens: the fine-tuning loss itself, token by token held near what the aligned model gave
  the same token, the first ones of a response most. No safety rows are needed.
* Divergence from the aligned model on given rows.

The aligned model is the same model with the values that its trained parameters had at the start. For a fresh
adapter that is the model with its adapter switched off.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError
from arisk.base.task import TokenLoss
from arisk.gradients import evaluating
from arisk.models.losses import response_logits, trained_losses, trained_tokens

__all__ = [
    "BETAS",
    "KEPT_GB",
    "LATER_BETA",
    "AlignedPoint",
    "ReferenceLosses",
    "constrained",
    "constrained_loss",
    "constrained_weights",
    "kl_to_aligned",
    "kl_to_reference",
]

#: β_t of the first response tokens, and of those after them. Source: arXiv 2406.05946, section 4.
BETAS, LATER_BETA = (0.5, 2.0, 2.0, 2.0, 2.0), 0.1
#: Logits of the aligned model that are kept, where they are asked for again and again (GB).
KEPT_GB = 0.5


class AlignedPoint:
    """The values of the parameters as they are now; inside `standing()` the model has them again.

    Storages are exchanged and put back, so that a graph which waits for its backward pass keeps its values.

    Args:
        parameters: those that will train.
        memory_gb: logits of batches that are kept at most.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], memory_gb: float = KEPT_GB) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]
        self.left = memory_gb * 1e9
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(n, V) what the aligned model says at the response tokens, see `response_logits`, without dropout.

        A batch is known by its tensor `input_ids` itself: one that comes again is read where it was kept.
        """
        ids: Tensor = batch["input_ids"]
        if id(ids) in self._known:
            return self._known[id(ids)][1]
        with self.standing(), evaluating(model):
            found, _ = response_logits(model, batch)
        if found.nbytes <= self.left:
            self.left -= found.nbytes
            self._known[id(ids)] = ids, found
        return found

    @contextmanager
    def standing(self) -> Generator[None]:
        """Inside, the model is the aligned one; no gradient."""
        here = [p.data for p in self.parameters]
        # Autocast keeps narrow copies of the weights it has seen.
        torch.clear_autocast_cache()
        try:
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.data = value.to(parameter.device)
            with torch.no_grad():
                yield
        finally:
            for parameter, value in zip(self.parameters, here, strict=True):
                parameter.data = value
            torch.clear_autocast_cache()


class ReferenceLosses:
    """−log p_ref of the trained tokens of rows, each row measured once, at the model as it is then.

    A row is known by its own tokens and labels, whatever batch it comes in.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Measure the rows of a batch that are not known yet. No gradient.

        Args:
            model: the aligned model, in evaluation mode.
            batch: as for `arisk.models.losses.response_logits`.
        """
        keys = _row_keys(batch)
        if all(key in self._known for key in keys):
            return
        with torch.no_grad():
            each, where = trained_losses(model, batch)
        for row, key in enumerate(keys):
            self._known.setdefault(key, each[row][where[row]].clone())

    def of(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, S) the reference losses of a batch in the places of `trained_losses`, 0 elsewhere (nats).

        Raises:
            InputError: a row was never measured.
        """
        labels = batch["labels"]
        try:
            rows = [self._known[key] for key in _row_keys(batch)]
        except KeyError as err:
            raise InputError(
                "a fine-tuning row has no loss of the aligned model to be held to",
                where="constrained first tokens",
                fix="measure every row before training (`ReferenceLosses.add`)",
            ) from err
        where = torch.nn.functional.pad(labels[:, 1:] >= 0, (0, 1), value=False)
        found = torch.zeros(labels.shape, dtype=rows[0].dtype, device=labels.device)
        return found.masked_scatter(where, torch.cat(rows).to(labels.device))


def _row_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """Tokens and labels of every row without its padding."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    return [torch.cat([i[m], y[m]]).numpy().tobytes() for i, y, m in zip(ids, labels, real, strict=True)]


def constrained_loss(losses: Tensor, reference: Tensor, betas: Tensor) -> Tensor:
    """(2/β) softplus(β (ℓ − ℓ_ref)) with ℓ = −log p_θ: a token's loss, flat once p_θ exceeds p_ref.

    Its gradient is w ∇ℓ with w = 2 (1 − σ(β (log p_θ − log p_ref))): 1 at the aligned model, towards 0
    where the token has become likelier than it was, and at most 2.

    Args:
        losses: ℓ (nats), any shape.
        reference: ℓ_ref, the same shape.
        betas: β > 0, the same shape; larger holds tighter.

    Source: arXiv 2406.05946, eq. 3 and 4.
    """
    return 2 / betas * torch.nn.functional.softplus(betas * (losses - reference))


def constrained_weights(losses: Tensor, reference: Tensor, betas: Tensor) -> Tensor:
    """The weight w = 2 (1 − σ(β (log p_θ − log p_ref))) of each token's gradient, in (0, 2)."""
    return 2 * torch.sigmoid(betas * (losses.detach() - reference))


def _betas(where: Tensor, betas: Sequence[float], later: float) -> Tensor:
    """β of every place (B, S); each trained stretch of a row, an answer of a chat, begins anew."""
    places = torch.arange(where.shape[1], device=where.device).expand(where.shape)
    before = torch.where(where, -1, places).cummax(1).values
    number = places - before - 1
    table = torch.tensor([*betas, later], dtype=torch.float64, device=where.device)
    return table[number.clamp(0, len(betas))]


def constrained(
    reference: ReferenceLosses, betas: Sequence[float] = BETAS, later: float = LATER_BETA
) -> TokenLoss:
    """The training loss Σ_t (2/β_t) softplus(β_t (ℓ_t − ℓ_ref,t)) of each row, as a `TokenLoss`.

    Over a step's trained tokens it takes the place of the sum of token losses. At the aligned model its
    gradient is that of plain fine-tuning.

    Args:
        reference: the losses of the aligned model on every row that trains.
        betas: β_1, β_2, … of the first tokens of each response.
        later: β of all tokens after them.

    Source: Qi et al., Safety alignment should be made more than just a few tokens deep, arXiv 2406.05946.
    """

    def sums(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        each, where = trained_losses(model, batch)
        tied = constrained_loss(each, reference.of(batch).to(each), _betas(where, betas, later).to(each))
        return (tied * where).sum(1)

    return TokenLoss(sums, trained_tokens)


def kl_to_reference(logits: Tensor, reference: Tensor) -> Tensor:
    """Σ_v p_ref(v) (log p_ref(v) − log p(v)) ≥ 0 of every position (n,), with gradient to `logits` (nats).

    Args:
        logits: (n, V).
        reference: (n, V) of the aligned model.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    now, then = torch.log_softmax(logits.to(wide), -1), torch.log_softmax(reference.to(wide), -1)
    return (then.exp() * (then - now)).sum(-1)


def kl_to_aligned(model: nn.Module, batch: Mapping[str, Any], aligned: AlignedPoint) -> Tensor:
    """(B,) mean over the response tokens of a row of KL(p_aligned ‖ p_θ), with gradient (nats per token).

    0 at the aligned model, and its gradient as well: it acts once the model has moved.

    Args:
        model: a causal LM.
        batch: safety rows, as for `response_logits`.
        aligned: the aligned model; one forward pass without a gradient for a batch that is new to it.

    Source: distillation from the model before training, Li and Hoiem, Learning without forgetting, arXiv
    1606.09282; on safety rows here, where that takes the rows of the new task.
    """
    then = aligned.logits(model, batch)
    now, where = response_logits(model, batch)
    each = kl_to_reference(now, then)
    rows = where.nonzero()[:, 0].to(each.device)
    sums = torch.zeros(len(where), dtype=each.dtype, device=each.device).index_add(0, rows, each)
    return sums / torch.bincount(rows, minlength=len(where)).clamp(min=1)
