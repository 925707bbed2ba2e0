"""Arms that hold a fine-tune to what the aligned model itself says: its probabilities, or its own refusals.

* constrained: the fine-tuning loss with the first tokens of every response held near the aligned model's.
* kl: the divergence from the aligned model on safety rows.
* own_replay: the aligned model's own refusals of the safety prompts, trained on as replay trains on rows.

The first and the last need no safe responses; none needs a second model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from arisk.base.errors import ConfigError
from arisk.base.task import RowBatches, Task
from arisk.forecast.leap import scored_rows
from arisk.guard.minibatches import SafetyBatches
from arisk.guard.plan import ArmName, ArmPlan, Method, Protection, add_gradients, by_strength, replayed
from arisk.models.anchored import KEPT_GB, AlignedPoint, ReferenceLosses, constrained, kl_to_aligned
from arisk.models.answers import GreedyAnswers, own_refusals
from arisk.models.losses import per_sample_nll, trained_tokens
from arisk.training.panels import panel_of_rows

__all__ = ["CONSTRAINED", "KL", "OWN_REPLAY", "kept_gb"]

CAUSAL = "it needs the loss of a Hugging Face causal LM, and this one is given from Python"


def _require(problem: str | None, method: str) -> None:
    if problem is not None:
        raise ConfigError(
            f"{method} cannot be used here: {problem}",
            where=f"guard.methods: {method}",
            fix=f"leave `{method}` out of `guard.methods`",
        )


def _uncountable(task: Task) -> str | None:
    finetune = task.finetune
    return None if finetune.loss_fn is per_sample_nll and finetune.tokens is not None else CAUSAL


def _constrained_plan(plan: ArmPlan, arm: ArmName) -> ArmPlan:
    """The plan with the constrained loss in place of its own; the references are measured here."""
    _require(_uncountable(plan.task), "constrained")
    settings, scale, finetune = plan.config.constrained, arm.strength or 1.0, plan.task.finetune
    references = plan.once(("reference losses", plan.seed), lambda: _references(plan))
    loss = constrained(references, [scale * beta for beta in settings.first], scale * settings.later)

    def means(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return loss.sums(model, batch) / trained_tokens(batch).clamp(min=1)

    tied = replace(finetune, loss_fn=means, tokens=loss)
    return replace(plan, task=replace(plan.task, finetune=tied))


def _references(plan: ArmPlan) -> ReferenceLosses:
    """Losses of the aligned model on every row that the run, or a forecast of it, takes a gradient of."""
    run, found = plan.fresh(), ReferenceLosses()
    numbers = range(run.batches_of(1).start, run.batches_of(plan.last).stop)
    batches: Any = plan.task.finetune.batches
    with run.reading():
        if isinstance(batches, RowBatches):
            step_rows = plan.recipe.training.gradient_accumulation * batches.size
            rows = {row for number in numbers for row in batches.indices(number)}
            rows |= set(batches.sample(max(batches.size, scored_rows(plan.recipe.horizon * step_rows))))
            for batch in panel_of_rows(plan.task.finetune, sorted(rows), plan.device).batches:
                found.add(plan.task.model, batch)
        else:
            for number in numbers:
                found.add(plan.task.model, run.stream.at(number))
    return found


def _constrained(plan: ArmPlan, arm: ArmName) -> Protection:
    del plan
    note = "Every token of the fine-tuning rows, the first ones of a response most; no safety rows are used."
    return Protection(None, {"β scale": arm.strength or 1.0}, note)


def _safety_loss_is_foreign(task: Task) -> str | None:
    return None if task.safety.loss_fn is per_sample_nll else CAUSAL


def _kl(plan: ArmPlan, arm: ArmName) -> Protection:
    _require(_safety_loss_is_foreign(plan.task), "kl")
    model, run, strength = plan.task.model, plan.fresh(), arm.strength or 0.0
    stream = SafetyBatches(plan.task.safety, plan.config.kl.rows, plan.seed, plan.device)
    aligned = AlignedPoint(run.parameters)

    def protect(number: int) -> Mapping[str, float]:
        with run.beside():
            divergence = kl_to_aligned(model, stream.at(number), aligned).mean()
        return add_gradients(run.parameters, {"divergence": strength * divergence}, each=False)

    note = "What the aligned model says after each token of the safe responses."
    return Protection(protect, {"divergence": strength}, note)


def kept_gb(task: Task) -> float:
    """Logits of the aligned model that `kl` keeps, in float32 at most (GB)."""
    head: Any = getattr(task.model, "get_output_embeddings", lambda: None)()
    if head is None or _safety_loss_is_foreign(task) is not None:
        return 0.0
    tokens = sum(float(trained_tokens(batch).sum()) for batch in task.safety.batches)
    return min(KEPT_GB, tokens * head.weight.shape[0] * 4 / 1e9)


def _unasked(task: Task) -> str | None:
    if isinstance(task.safety.generate, GreedyAnswers):
        return None
    return "the safety rows have no prompt, or no tokenizer to answer it with"


def _own_replay(plan: ArmPlan, arm: ArmName) -> Protection:
    _require(_unasked(plan.task), "own_replay")
    settings = plan.config.own_replay
    own = plan.once(
        ("own refusals", settings.prompts, settings.tokens),
        lambda: own_refusals(
            plan.task.model,
            plan.task.safety,
            plan.behaviour,
            prompts=settings.prompts,
            max_new_tokens=settings.tokens,
            where="guard.methods: own_replay",
        ),
    )
    refused = f"{len(own.rows)} of {own.statistics['asked']} safety prompts"
    note = f"Trains on the model's own refusals of {refused}; no safe response is needed."
    return replayed(plan, own, arm.strength or 0.0, settings.rows, note)


CONSTRAINED = Method(
    by_strength("constrained"),
    _constrained,
    planned=_constrained_plan,
    unfit=_uncountable,
    references=True,
)
KL = Method(by_strength("kl"), _kl, rows=lambda _, config: config.kl.rows, unfit=_safety_loss_is_foreign)
OWN_REPLAY = Method(
    by_strength("own_replay"),
    _own_replay,
    rows=lambda _, config: config.own_replay.rows,
    unfit=_unasked,
)
