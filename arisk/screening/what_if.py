"""What dropping the flagged rows would change: the plan rolled out with and without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arisk.base.task import Batch, Progress, RowBatches, Task, silent
from arisk.config.plan import BehaviourConfig, ForecastConfig, RolloutConfig, TrainingConfig
from arisk.forecast.record import RolloutResult
from arisk.forecast.refusals import refusal_forecast
from arisk.forecast.rollout import rollout
from arisk.models.judge import judge_for

__all__ = ["WithoutRows", "dropping", "without_rows"]


class WithoutRows:
    """Planned batches with some rows left out: the rest in the same order, regrouped to full batches.

    Args:
        batches: the planned batches.
        dropped: rows left out; at least one other must stay.
    """

    def __init__(self, batches: RowBatches, dropped: Sequence[int]) -> None:
        self.batches = batches
        self.dropped = frozenset(dropped)
        self.size = batches.size
        full, rest = divmod(batches.row_count - len(self.dropped), batches.size)
        #: Micro-batches of an epoch.
        self.per_epoch = max(1, full + (rest > 0))
        whole = -(-batches.row_count // batches.size)
        self._old_epoch = int(getattr(batches, "per_epoch", whole))
        self._epoch, self._order = -1, list[int]()

    @property
    def row_count(self) -> int:
        """Different rows that stay."""
        return self.batches.row_count - len(self.dropped)

    def indices(self, number: int) -> list[int]:
        """Rows of the micro-batch with this number, counted from 0."""
        epoch, inside = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            first = epoch * self._old_epoch
            every = [row for n in range(first, first + self._old_epoch) for row in self.batches.indices(n)]
            self._epoch, self._order = epoch, [row for row in every if row not in self.dropped]
        return self._order[inside * self.size : (inside + 1) * self.size]

    def of(self, rows: Sequence[int]) -> Batch:
        """A batch of these rows."""
        return self.batches.of(rows)

    def sample(self, count: int) -> list[int]:
        """Numbers of at most `count` different rows that stay."""
        drawn = self.batches.sample(count + len(self.dropped))
        return [row for row in drawn if row not in self.dropped][:count]

    def __getitem__(self, number: int) -> Batch:
        """The micro-batch with this number; there is no last one."""
        return self.of(self.indices(number))

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        while True:
            yield self[number]
            number += 1


def without_rows(task: Task, dropped: Sequence[int]) -> Task:
    """The same plan on the other rows.

    Raises:
        TypeError: the data cannot be regrouped by row.
    """
    batches = task.finetune.batches
    if not isinstance(batches, RowBatches):
        raise TypeError("the fine-tuning data cannot be regrouped by row")
    return replace(task, finetune=replace(task.finetune, batches=WithoutRows(batches, dropped)))


def dropping(
    task: Task,
    dropped: Sequence[int],
    *,
    config: RolloutConfig,
    training: TrainingConfig,
    steps: int,
    seed: int = 0,
    behaviour: BehaviourConfig | None = None,
    forecast: ForecastConfig | None = None,
    before: RolloutResult | None = None,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Predicted refusals, safety and control changes along the plan, with all rows and without some.

    Args:
        task: model and data; the model is left as found.
        dropped: rows left out.
        config: pilot and segments of the rollout.
        training: the planned recipe; as many steps are taken on the rows that stay.
        steps: planned optimizer steps T.
        seed: seeds dropout and noise of the real steps.
        behaviour: prompts that are followed and answered; None: refusals are not measured.
        forecast: confidence and draws of the refusals' band; default those of a config that names none.
        before: the rollout of this very plan, where it has been made; else it is made here.
        workspace: folder in which unfinished rollouts are kept.
        progress: told of gradients taken.

    Returns:
        `status`: "measured", or "not_measured" with `reason`; else for `before` and `after` the
        `steps`, mean `safety` and `control` changes (nats per response token), `diverged_at`, and `refusals`:
        share of the `prompts` refused at the `start` and at the `end` of the plan, with its band of
        `confidence` from `low` to `high`; None where not measured.
    """
    if not dropped:
        return {"status": "not_measured", "reason": "no row is flagged"}
    if not isinstance(task.finetune.batches, RowBatches):
        return {"status": "not_measured", "reason": "the fine-tuning data cannot be regrouped by row"}
    found: dict[str, Any] = {"status": "measured", "dropped": len(dropped)}

    def curves(made: RolloutResult) -> dict[str, Any]:
        refused = _refusals(made, behaviour, forecast or ForecastConfig(), steps, seed)
        return {**_curves(made), "refusals": refused}

    if before is not None:
        found["before"] = curves(before)
    task = replace(task, probes=())  # Nobody reads them here.
    plans = {"before": task, "after": without_rows(task, dropped)}
    for name, some in plans.items():
        if name in found:
            continue
        folder = workspace / name if workspace else None
        if folder:
            folder.mkdir(exist_ok=True)
        made = rollout(
            some,
            config=config,
            training=training,
            steps=steps,
            seed=seed,
            behaviour=behaviour and behaviour.model_copy(update={"ordinary_prompts": 0}),
            workspace=folder,
            progress=progress,
        )
        found[name] = curves(made)
    return found


def _refusals(
    made: RolloutResult, behaviour: BehaviourConfig | None, forecast: ForecastConfig, steps: int, seed: int
) -> dict[str, Any] | None:
    """Refusals of a rollout at both ends of the plan; None where they were not measured."""
    if behaviour is None or made.behaviour is None:
        return None
    judge = judge_for(behaviour, made.behaviour.learnt)
    found = refusal_forecast(made, judge, forecast, horizon=steps, seed=seed)
    if found.status != "measured":
        return None
    ends = {
        "start": found.median[0],
        "end": found.median[-1],
        "low": found.lower[-1],
        "high": found.upper[-1],
        "confidence": forecast.confidence,
    }
    return {"prompts": found.prompts, **ends}


def _curves(made: RolloutResult) -> dict[str, Any]:
    return {
        "steps": list(made.steps),
        "safety": made.safety.mean(0).tolist(),
        "control": None if made.control is None else made.control.mean(0).tolist(),
        "diverged_at": made.diverged_at,
    }
