"""Rows too rare to be met by the few real steps of a rollout, brought in with their true weight.

A handful of harmful rows in hundreds fills a fraction of a percent of a fine-tune. A rollout that
really sees only a few batches misses them or, worse, multiplies one of them. So the rows are
stratified: those whose loss the aligned model finds far outside the rest form a stratum of share w,
or, where they are more than a twentieth of all rows, an even pick among them of that share.
The real steps between leaps leave them out, and after every leap the stratum is brought in,

    δ ← δ − (Σ η) D w (ḡ_rare − ḡ),

with D the optimizer's step per unit gradient and ḡ_rare from one batch of the stratum: to first order
in the learning rate the mean update of all rows, whatever rows the stratum holds. It saves variance
where rare rows pull hard. The idea is that of stratified sampling; its use here is this project's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arisk.base.processes import gathered, share
from arisk.base.task import RowBatches
from arisk.gradients import move_batch
from arisk.training.loop import PlannedRun

__all__ = ["RareRows", "outliers"]

#: Rows scored, as a share of those the plan would see.
SCORED_SHARE = 0.25
#: Distance from the median loss, in deviations (1.48 MAD), from which a row is far outside.
OUTSIDE = 8.0
#: Largest share of all rows that the stratum takes: what is more is met by the real steps themselves.
LARGEST_SHARE = 0.05


class RareRows:
    """The stratum of surprising rows of a planned run; made at the aligned point.

    Args:
        run: the planned run; its model stands at θ*.
        batches: the planned batches, which can be regrouped by row.

    Attributes:
        rows: numbers of the rows in the stratum; empty where none are rare.
        share: w, those rows over all rows; their tokens, where the plan trains on means over tokens.
        step_rows: rows of one optimizer step.
    """

    def __init__(self, run: PlannedRun, batches: RowBatches) -> None:
        self.run = run
        self.batches = batches
        self.step_rows = run.training.gradient_accumulation * batches.size
        planned = run.recipe.horizon * self.step_rows
        scored = batches.sample(max(batches.size, math.ceil(SCORED_SHARE * planned)))
        outside = outliers(self._losses(scored))
        # Evenly over their losses; the rest, and rows that were not scored, stay in the real steps with
        # their natural weight.
        count = min(len(outside), int(LARGEST_SHARE * len(scored)))
        self.rows = [scored[outside[i * len(outside) // count]] for i in range(count)]
        self.share = len(self.rows) / batches.row_count
        if self.rows:
            # By tokens, a row counts as many times as it trains tokens.
            self.share *= self._tokens(self.rows) / self._tokens(scored)
        self.members = frozenset(self.rows)

    def share_seen(self, first: int, last: int) -> float:
        """Share of the stratum among the rows of steps first … last (from 1)."""
        numbers = range(self.run.batches_of(first).start, self.run.batches_of(last).stop)
        rows = [row for number in numbers for row in self.batches.indices(number)]
        rare = [row for row in rows if row in self.members]
        return len(rare) / len(rows) * (self._tokens(rare) / self._tokens(rows) if rare else 0.0)

    def _tokens(self, rows: list[int]) -> float:
        """Mean number of trained tokens of these rows; 1 where the plan trains on means of rows."""
        tokens = self.run.task.finetune.tokens
        if not self.run.by_tokens or tokens is None:
            return 1.0
        size = self.batches.size
        counts = [tokens.counts(self.batches.of(rows[i : i + size])) for i in range(0, len(rows), size)]
        return max(float(torch.cat(counts).double().mean()), 1.0)

    def gradient(self, turn: int) -> tuple[list[Tensor], float]:
        """ḡ_rare here, one tensor per parameter, and the loss, on the turn's batch of the stratum."""
        run = self.run
        run.clear()
        loss = self._loss(turn)
        loss.backward()
        run.gradient_evaluations += 1
        made = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in run.parameters]
        return made, float(loss.detach())

    def kept_by_clipping(self, mean: list[Tensor], pull: list[Tensor]) -> float:
        """Share that `max_grad_norm` leaves of a batch with one rare row among B: ḡ + (ḡ_rare − ḡ)/B."""
        limit = self.run.training.max_grad_norm
        if limit is None:
            return 1.0
        squares = sum(
            float(torch.lerp(m, p, 1 / self.step_rows).square().sum())
            for m, p in zip(mean, pull, strict=True)
        )
        return min(1.0, limit / max(math.sqrt(squares), 1e-30))

    def loss(self, turn: int) -> float:
        """The loss of the turn's batch here."""
        with torch.no_grad():
            return float(self._loss(turn))

    def _loss(self, turn: int) -> Tensor:
        """The training loss of the turn's batch here; the same noise for the same turn."""
        size = min(self.batches.size, len(self.rows))
        rows = [self.rows[(turn * self.batches.size + i) % len(self.rows)] for i in range(size)]
        batch = move_batch(self.batches.of(rows), self.run.stream.device)
        return self.run.loss_on(batch, turn + 1)

    def _losses(self, rows: list[int]) -> Tensor:
        """Loss of every row at θ*; one that is not finite is never an outlier: real steps name it."""
        size = self.batches.size
        found: list[Tensor] = []
        with torch.no_grad():
            starts = range(0, len(rows), size)
            for start in (starts[number] for number in share(len(starts))):
                batch = move_batch(self.batches.of(rows[start : start + size]), self.run.stream.device)
                found.append(self.run.task.finetune.loss_fn(self.run.task.model, batch).reshape(-1).cpu())
        losses = torch.cat(gathered(found, len(starts))).to(torch.float64)
        if len(losses) != len(rows):
            return torch.zeros(len(rows))
        return torch.where(losses.isfinite(), losses, -math.inf)


def outliers(losses: Tensor) -> list[int]:
    """Positions of (N,) losses above median + 8 × 1.48 MAD (nats), the largest first."""
    median = losses.median()
    deviation = 1.4826 * (losses - median).abs().median()
    order = torch.argsort(losses, descending=True, stable=True).tolist()
    return [i for i in order if losses[i] > median + OUTSIDE * deviation]
