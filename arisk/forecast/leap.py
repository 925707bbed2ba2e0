"""Blocks of real optimizer steps and the leaps between them: projective integration of a fine-tune.

A block of q real steps gives the mean update d per unit learning rate. A leap stands for the next L steps
and moves by x f (Σ η) d:

* f, the distance correction. Over L steps a real run goes L g in its mean direction and √L σ at
  random; L times a mean over q noisy batches goes too far. With S = ‖ḡ‖² − σ²/q, all lengths
  measured with the optimizer's own scale, f² = (L²S + Lσ²) / (L²S + L²σ²/q), per tensor.
* x, the speed. With r = ⟨g(end), d⟩ / ⟨ḡ, d⟩ the slope along d changes exponentially, by e^{−a} with
  a = 1 − r over the leap: x = (1 − e^{−a})/a. A run that slows down is pulled back, one that overshoots
  a valley further, most where the loss of a batch rises over the leap; one that gathers speed (r > 1,
  negative curvature) goes on, to x ≤ 1.72 at most, as a single batch may mislead.

Real steps afterwards damp what the leap stirred up. Source of the idea: Gear and Kevrekidis, projective
methods for stiff differential equations (2003); the two corrections are this project's.

Rows too rare to be met by the few real steps are brought in with their true weight. A handful of harmful
rows in hundreds fills a fraction of a percent of a fine-tune. A rollout that really sees only a few batches
misses them or, worse, multiplies one of them. So the rows are stratified: those whose loss the aligned
model finds far outside the rest form a stratum of share w, or, where they are more than a twentieth of all
rows, an even pick among them of that share. The real steps between leaps leave them out, and after every
leap the stratum is brought in,

    δ ← δ − (Σ η) D w (ḡ_rare − ḡ),

with D the optimizer's step per unit gradient and ḡ_rare from one batch of the stratum: to first order in
the learning rate the mean update of all rows, whatever rows the stratum holds. It saves variance where rare
rows pull hard. The idea is that of stratified sampling; its use here is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arisk.base.errors import NumericsError
from arisk.base.task import RowBatches
from arisk.config.sections import RolloutConfig
from arisk.gradients import move_batch
from arisk.training.loop import PlannedRun, StepDone, follow
from arisk.training.optimizers import Ageing
from arisk.training.panels import panel_of_rows
from arisk.training.state import Extra

__all__ = [
    "Block",
    "Leaper",
    "RareRows",
    "block_from",
    "kept_block",
    "outliers",
    "pilot_length",
    "planned_points",
    "rollout_cost",
    "scored_rows",
    "segment_count",
    "segment_ends",
]

#: Rows scored, as a share of those the plan would see, and at most.
SCORED_SHARE, MOST_SCORED = 0.25, 320
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
        scored = batches.sample(max(batches.size, scored_rows(planned)))
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
        panel = panel_of_rows(self.run.task.finetune, rows, self.run.stream.device)
        with self.run.reading():
            losses = panel.losses(self.run.task.model)
        return torch.where(losses.isfinite(), losses, -math.inf)


def scored_rows(planned: int) -> int:
    """Rows scored for a plan that would see so many."""
    return min(MOST_SCORED, math.ceil(SCORED_SHARE * planned))


def outliers(losses: Tensor) -> list[int]:
    """Positions of (N,) losses above median + 8 × 1.48 MAD (nats), the largest first."""
    median = losses.median()
    deviation = 1.4826 * (losses - median).abs().median()
    order = torch.argsort(losses, descending=True, stable=True).tolist()
    return [i for i in order if losses[i] > median + OUTSIDE * deviation]


#: A leap whose end is not finite is halved this often before the run counts as diverged.
HALVINGS = 6
#: Largest slow-down a single check may ask for (x ≥ 1/STIFFEST).
STIFFEST = 20.0
#: Largest gain in speed a single check may ask for: a ≥ −1, x ≤ e − 1.
FASTEST = 1.0


@dataclass(frozen=True)
class Block:
    """What the last q real steps of a block showed, one tensor per parameter.

    Attributes:
        direction: mean update per unit learning rate.
        mean: mean gradient ḡ. square: mean of squared gradients.
        count: q. loss: mean training loss before those steps.
        rare_share: share of the rare rows among those of the q steps; 0 where they are not known.
        leaps: leaps made before it.
    """

    direction: list[Tensor]
    mean: list[Tensor]
    square: list[Tensor]
    count: int
    loss: float
    rare_share: float = 0.0
    leaps: int = 0


#: Parts of a block that are saved: numbers, and one tensor per parameter.
_VALUES, _TENSORS = ("count", "loss", "rare_share", "leaps"), ("direction", "mean", "square")


def kept_block(block: Block | None) -> Extra:
    """A block for `arisk.training.state.save_state`."""
    if block is None:
        return Extra()
    tensors = {f"{key}.{i}": part for key in _TENSORS for i, part in enumerate(getattr(block, key))}
    return Extra(tensors, {key: getattr(block, key) for key in _VALUES})


def block_from(extra: Extra, parameters: Sequence[Tensor]) -> Block | None:
    """The saved block on the parameters' device; None where there was none."""
    if not extra.values:
        return None
    parts = {key: [extra.tensors[f"{key}.{i}"].to(p) for i, p in enumerate(parameters)] for key in _TENSORS}
    return Block(**parts, **extra.values)


class _Watch:
    """Sums of gradients over the steps it is told of, and where they began."""

    def __init__(self, run: PlannedRun) -> None:
        self.run = run
        self.anchor = [p.detach().clone() for p in run.parameters]
        self.mean: list[Tensor] = []
        self.square: list[Tensor] = []
        self.losses: list[float] = []

    def __call__(self, done: StepDone) -> None:
        """Add a step's gradient, which is still there after it."""
        self.losses.append(done.loss)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.run.parameters]
        if not self.mean:
            self.mean = [g.clone() for g in gradients]
            self.square = [g.square() for g in gradients]
            return
        for total, squares, gradient in zip(self.mean, self.square, gradients, strict=True):
            total.add_(gradient)
            squares.addcmul_(gradient, gradient)

    def block(self, rate: float, rare_share: float, leaps: int) -> Block:
        """What was seen, per unit of the learning rates' sum."""
        count = len(self.losses)
        for total in (*self.mean, *self.square):
            total.div_(count)
        with torch.no_grad():
            moves = zip(self.run.parameters, self.anchor, strict=True)
            direction = [(p - a).div_(rate or 1.0).detach() for p, a in moves]
        loss = sum(self.losses) / count
        return Block(direction, self.mean, self.square, count, loss, rare_share, leaps)


class Leaper:
    """Real blocks and leaps on a planned run.

    Args:
        run: the planned run; its model moves.
        speed_control: check each leap with one gradient at its end.
        distance_correction: shorten leaps along noisy directions.
        rare: rows to be brought in with their true weight; None to leave that out.
    """

    def __init__(
        self,
        run: PlannedRun,
        *,
        speed_control: bool = True,
        distance_correction: bool = True,
        rare: RareRows | None = None,
    ) -> None:
        self.run = run
        self.rare = rare
        self.speed_control = speed_control
        self.distance_correction = distance_correction

    @property
    def left_out(self) -> frozenset[int]:
        """Rows that real steps after a leap leave out, because leaps bring them in."""
        return self.rare.members if self.rare else frozenset()

    def real(self, done: int, count: int, seen: int, leaps: int = 0) -> Block:
        """Steps done + 1 … done + count after so many leaps; the last `seen` describe the block.

        Raises:
            NumericsError: the training loss is not finite.
        """
        seen = min(seen, count)
        first = done + count - seen + 1
        follow(self.run, done + 1, first - 1, [])
        watch = _Watch(self.run)
        follow(self.run, first, done + count, [watch])
        rate = sum(self.run.rates[first - 1 : done + count])
        rare = 0.0
        if self.rare and not self.run.stream.without:
            rare = self.rare.share_seen(first, done + count)
        return watch.block(rate, rare, leaps)

    def leap(self, block: Block, done: int, length: int) -> float:
        """Stand in for steps done + 1 … done + length; returns the share x of the way that was kept.

        Raises:
            NumericsError: the loss is not finite even after a short part of the leap.
        """
        rate = sum(self.run.rates[done : done + length])
        factors = self._distance_factors(block, length)
        way = [d * (f * rate) for d, f in zip(block.direction, factors, strict=True)]
        share, left = 1.0, 1.0
        if self.speed_control:
            before = self.run.loss(done + length)
            self._move(way, 1.0)
            share, left = self._checked(block, way, done + length, before)
        else:
            self._move(way, 1.0)
        self._age_state(block, length, left)
        if self.rare is not None:
            inner = sum(self.run.rates[done + length : done + length + block.count])
            gone = [part * share for part in way]
            self._bring_in(self.rare, block, gone, length + block.count, (rate, inner))
        return share

    def _bring_in(
        self, rare: RareRows, block: Block, gone: list[Tensor], length: int, rates: tuple[float, float]
    ) -> None:
        """Move by what the rare rows add to the leap, less where their loss falls less than it would.

        Their share of the second moments is added first: a step along a coordinate that only rare
        rows move would otherwise be far too long. Where the block met more rare rows than the run
        holds, the surplus is taken back out of the leap, no coordinate by more than the leap went:
        the batch may pull at coordinates that the rare rows of the block never moved.

        Args:
            rare: the stratum, of share w.
            block: the steps the leap was made from, with a share s of rare rows.
            gone: the way that was kept of the leap.
            length: steps of the leap and of the real ones after it.
            rates: their Σ η, apart: the real steps leave the rare rows out.
        """
        seen = block.rare_share
        if seen == 1:
            return  # Nothing but rare rows was seen: there is no ordinary gradient to correct from.
        missing = rare.share - seen
        due = (max(missing, 0.0) * rates[0] + rare.share * rates[1]) / (1 - seen)
        surplus = max(-missing, 0.0) * rates[0] / (1 - seen)
        gradient, loss = rare.gradient(block.leaps)
        clipped = rare.kept_by_clipping(block.mean, gradient)
        way: list[Tensor] = []
        for parameter, mean, square, pull, leapt in zip(
            self.run.parameters, block.mean, block.square, gradient, gone, strict=True
        ):
            part, group = self.run.part_of(parameter)
            if part.kind.admit is not None:
                held = missing if missing > 0 else rare.share
                part.kind.admit(part.optimizer.state[parameter], group, pull, held / rare.step_rows, length)
            step = (pull * clipped - mean) * self._scale(parameter, square)
            step.mul_(-part.kind.gain(group) * group["ratio"])
            limit = leapt.abs()
            way.append(step * due + (step * -surplus).clamp(-limit, limit))
        self._move(way, 1.0)
        expected = sum(float((g * w).sum()) for g, w in zip(gradient, way, strict=True))
        if expected < 0:
            fallen = (rare.loss(block.leaps) - loss) / expected
            slowing = min(max(2 * (1 - fallen), 0.0), STIFFEST) if math.isfinite(fallen) else STIFFEST
            self._move(way, _kept(slowing) - 1)

    def _move(self, way: list[Tensor], share: float) -> None:
        with torch.no_grad():
            for parameter, part in zip(self.run.parameters, way, strict=True):
                parameter.add_(part, alpha=share)

    def _checked(self, block: Block, way: list[Tensor], number: int, before: float) -> tuple[float, float]:
        """Pull back along the way, or go on along it, by what the gradient at its end says.

        Where the loss of one and the same batch rose over the leap, the way led out of the valley:
        its slope at the start is then read off that batch, as the parabola through both losses and
        the end's slope has it, and a way that leads uphill from the start is all but taken back.

        Args:
            block: the steps the way was made from.
            way: the whole leap.
            number: the step whose batch checks it.
            before: loss of that batch at the start of the leap.

        Returns:
            The share x of the way that is kept, and the share e^{−a} of the slope left there.
        """
        share = 1.0
        for _ in range(HALVINGS):
            try:
                after = self.run.gradient(number)
                break
            except NumericsError:
                share /= 2
                self._move(way, -share)
        else:
            raise NumericsError(
                f"the virtual run diverges before step {number}",
                where=f"rollout: step {number}",
                fix="lower `training.learning_rate`, or set `training.max_grad_norm`",
            )
        start = sum(float((g * w).sum()) for g, w in zip(block.mean, way, strict=True))
        end = sum(
            float((p.grad * w).sum())
            for p, w in zip(self.run.parameters, way, strict=True)
            if p.grad is not None
        )
        # The parabola through both losses and the end's slope; uphill from the start: 0 or more.
        own_start = 2 * (after - before) / share - end
        if block.rare_share:
            start = own_start  # The checking batch leaves out the rare rows that the block's mean holds.
        if after > before:
            start = own_start
            slowing = STIFFEST if start >= 0 else _slowing(start, end)
        elif start >= 0 or not math.isfinite(end):
            return share, 1.0
        else:
            slowing = _slowing(start, end)
        # What lies beyond an end that was already cut short is not finite.
        kept = _kept(slowing if share == 1 else max(slowing, 0.0))
        self._move(way, share * (kept - 1))
        return share * kept, math.exp(-slowing)

    def _distance_factors(self, block: Block, length: int) -> list[float]:
        """F of every tensor; 1 with a single batch, whose noise cannot be seen."""
        if not self.distance_correction or block.count < 2:
            return [1.0] * len(block.mean)
        factors: list[float] = []
        for parameter, mean, square in zip(self.run.parameters, block.mean, block.square, strict=True):
            weight = self._scale(parameter, square).square()
            signal = float((mean.square() * weight).sum())
            total = float((square * weight).sum())
            noise = max(0.0, (total - signal) * block.count / (block.count - 1))
            signal = max(0.0, signal - noise / block.count)
            far = length**2 * (signal + noise / block.count)
            real = length**2 * signal + length * noise
            factors.append(min(1.0, math.sqrt(real / far)) if far > 0 else 1.0)
        return factors

    def _scale(self, parameter: Tensor, square: Tensor) -> Tensor:
        """D: the optimizer's step per unit gradient here."""
        part, group = self.run.part_of(parameter)
        return part.kind.scale(part.optimizer.state[parameter], group, square)

    def _age_state(self, block: Block, length: int, left: float) -> None:
        """The optimizer's state as if the block's mean gradient had been seen `length` times more."""
        for parameter, mean, square in zip(self.run.parameters, block.mean, block.square, strict=True):
            part, group = self.run.part_of(parameter)
            if part.kind.age is not None:
                state = part.optimizer.state[parameter]
                part.kind.age(state, group, Ageing(mean, square, length, left))


def _slowing(start: float, end: float) -> float:
    """Exponent a of a slope that goes from `start` < 0 to `end` over the leap, both along the way."""
    return min(max(1 - end / start, -FASTEST), STIFFEST)


def _kept(slowing: float) -> float:
    """(1 − e^{−a})/a, the share of the way a flow covers whose slope changes by e^{−a}; above 1 for a < 0."""
    return -math.expm1(-slowing) / slowing if abs(slowing) > 1e-6 else 1.0


#: Steps of the pilot at which losses are measured.
PILOT_POINTS = (3, 8, 20, 30, 45, 70, 100, 150, 200, 300, 500, 700, 1000)
#: Real steps taken at the start at most, and as a share of the run; shorter runs are real throughout.
PILOT_STEPS, PILOT_SHARE, ALL_REAL = 20, 0.2, 20
#: Segments of a 200-step run, more for every factor of ten, and the share of the run they may cost.
SEGMENTS, SEGMENTS_PER_DECADE, COST_SHARE = 8, 12, 0.38


def planned_points(horizon: int, config: RolloutConfig) -> tuple[int, list[int]]:
    """Real steps of the pilot, and the ends of all segments (the pilot's points among them)."""
    inner = config.batches_per_segment
    pilot = pilot_length(horizon, config.pilot_steps, inner)
    points = [p for p in PILOT_POINTS if p < pilot] + [pilot]
    count = config.segments or segment_count(horizon, pilot, inner)
    return pilot, points + segment_ends(pilot, horizon, count, inner)


def rollout_cost(horizon: int, config: RolloutConfig) -> tuple[int, int]:
    """Gradients of a rollout in optimizer steps, and its passes over safety and control samples.

    Every leap is checked by one gradient; rare rows, where there are any, cost one more per leap.
    """
    pilot, points = planned_points(horizon, config)
    gradients, done = pilot, pilot
    for end in points[points.index(pilot) + 1 :]:
        real = min(end - done, config.batches_per_segment)
        gradients += real + (config.speed_control and end - done > real)
        done = end
    return gradients, len(points) + 1


def pilot_length(horizon: int, wanted: int | None, inner: int) -> int:
    """Real steps at the start of a run of `horizon` steps.

    Args:
        horizon: planned optimizer steps T.
        wanted: a fixed number, None to choose: 20 where that is at most 20 % of the run, else that
            share, and the whole run when it is no longer than 20 steps.
        inner: real steps per segment, the least that gives a direction.
    """
    if wanted is not None:
        return min(horizon, max(wanted, inner))
    if horizon <= ALL_REAL:
        return horizon
    return max(inner, min(PILOT_STEPS, int(PILOT_SHARE * horizon)))


def segment_count(horizon: int, pilot: int, inner: int) -> int:
    """Leaps after the pilot: 8 for 200 steps, 12 more per factor of ten, within 38 % of the run's cost.

    A segment costs `inner` gradients and one more that checks its leap.
    """
    wanted = SEGMENTS + SEGMENTS_PER_DECADE * max(0.0, math.log10(horizon / 200))
    affordable = (COST_SHARE * horizon - pilot) / (inner + 1)
    return max(2, min(round(wanted), int(affordable)))


def segment_ends(start: int, horizon: int, count: int, inner: int) -> list[int]:
    """Last steps of `count` segments whose lengths grow geometrically from about `inner`.

    Where the rest of the run is no longer than `count` blocks of real steps, every segment is real.

    Args:
        start: steps done.
        horizon: T.
        count: segments wanted, ≥ 1.
        inner: real steps at the end of each segment.

    Returns:
        Ascending steps, the last of them T; empty when nothing is left.
    """
    rest = horizon - start
    if rest <= 0:
        return []
    if rest <= count * inner:
        return [min(horizon, start + inner * (i + 1)) for i in range(math.ceil(rest / inner))]
    ratio = _growth(rest / inner, count)
    ends, at = [], float(start)
    for i in range(1, count + 1):
        at += inner * ratio**i
        ends.append(round(at))
    ends[-1] = horizon
    return ends


def _growth(total: float, count: int) -> float:
    """R ≥ 1 with r + r² + … + r^count = total, by bisection."""
    low, high = 1.0, total
    for _ in range(80):
        middle = 0.5 * (low + high)
        if _sum(middle, count) < total:
            low = middle
        else:
            high = middle
    return high


def _sum(ratio: float, count: int) -> float:
    powers: Sequence[float] = [ratio**i for i in range(1, count + 1)]
    return sum(powers)
