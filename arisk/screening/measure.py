"""What harm is measured by: the loss of the safe responses, or that of the model's own refusals' openings.

The mean loss of fifty response tokens hardly notices when the first three turn, and those decide what an
answer becomes. So the second measure is −(1/k) Σ_s log p of the first k tokens that the aligned model itself
says, over the safety prompts that it refuses today. Either is a set of samples with a loss; whatever scores
rows against the one does so against the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from arisk.base.errors import InputError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import BehaviourConfig, ScreenConfig
from arisk.models.answers import GreedyAnswers, judged_answers
from arisk.models.losses import per_sample_nll
from arisk.screening.record import MEASURES
from arisk.training.behaviour import DECIDING, ORDINARY_RESPONSES, prompts_of

__all__ = ["MeasuredTask", "measured_by", "refused_prompts", "writer_of"]

#: Safety prompts answered to find those that are refused, tokens of each answer, and refusals that suffice.
PROMPTS, TOKENS, LEAST = 48, 24, 4
#: Openings measured at once.
TOGETHER = 16


@dataclass(frozen=True)
class MeasuredTask:
    """A task whose safety set is what harm is measured on.

    Attributes:
        task: the task.
        measure: a key of `MEASURES`.
        note: a sentence for the report where another measure was wanted than could be had.
    """

    task: Task
    measure: Literal["loss", "opening"]
    note: str | None = None


def measured_by(task: Task, config: ScreenConfig, behaviour: BehaviourConfig | None = None) -> MeasuredTask:
    """The task with the safety set that `screen.measure` asks for, inside `measuring`.

    auto: the opening where prompts can be answered and are refused, else the loss. On a refusing SmolLM2 the
    opening finds rows that the mean loss does not (`tests/bench/README.md`).

    Args:
        task: model and data.
        config: the measure.
        behaviour: the judge that tells which prompts are refused; default the rule.

    Raises:
        InputError: the opening was asked for, and the safety set has no prompts that the model refuses.
    """
    if config.measure == "loss":
        return MeasuredTask(task, "loss")
    try:
        return MeasuredTask(replace(task, safety=_openings(task, behaviour or BehaviourConfig())), "opening")
    except InputError as err:
        if config.measure == "opening":
            raise
        return MeasuredTask(task, "loss", f"Harm is measured by {MEASURES['loss']}: {err.what}.")


def refused_prompts(
    task: Task, writer: GreedyAnswers, model: nn.Module, behaviour: BehaviourConfig, why: str
) -> tuple[list[int], list[list[int]]]:
    """Safety prompts, spread over the set, that the model refuses: their rows, and what it says as tokens.

    `why` says what else a person may ask for where it refuses too few.

    Raises:
        InputError: it refuses too few, or cannot generate.
    """
    ordinary = [] if task.control is None else task.control.rows[:ORDINARY_RESPONSES]
    answers = judged_answers(
        model,
        writer,
        [(str(row.get("prompt") or ""), str(row.get("response") or "")) for row in task.safety.rows],
        behaviour,
        prompts=PROMPTS,
        max_new_tokens=TOKENS,
        ordinary=[str(row.get("response") or "") for row in ordinary],
    )
    kept = [answer for answer in answers if answer.outcome == "refused"]
    if len(kept) < LEAST:
        raise InputError(
            f"the model refuses {len(kept)} of {len(answers)} safety prompts, fewer than {LEAST}",
            where="safety",
            fix=f"give prompts that the model refuses, or {why}",
        )
    return [answer.row for answer in kept], [answer.tokens for answer in kept]


def writer_of(task: Task, why: str) -> GreedyAnswers:
    """What answers the safety prompts.

    Raises:
        InputError: the safety set has no prompts, or no tokenizer to answer them with.
    """
    writer = task.safety.generate
    if not isinstance(writer, GreedyAnswers) or not task.safety.rows:
        raise InputError(
            "the safety set has no prompts that the model could answer",
            where="safety",
            fix=f"give rows with prompts and a model with a tokenizer, or {why}",
        )
    return writer


def _openings(task: Task, behaviour: BehaviourConfig) -> SampleSet:
    """The model's own refusals' first tokens as a safety set."""
    why = "set `screen.measure: loss`"
    writer = writer_of(task, why)
    rows, answers = refused_prompts(task, writer, task.model, behaviour, why)
    openings = [tokens[:DECIDING] for tokens in answers]
    return SampleSet(
        "safety",
        writer.opening_batches(rows, openings, TOGETHER),
        per_sample_nll,
        [{**prompts_of(task.safety.rows[i]), "tokens": len(o)} for i, o in zip(rows, openings, strict=True)],
    )
