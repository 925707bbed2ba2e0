"""What a model says along a fine-tune: its own openings at every point, whole answers at a few.

One `Behaviour` watches one run, virtual or real. It is asked at every point at which losses are
measured, and keeps what it found; it labels nothing, so that another judge needs no new run. Of a task
that cannot write (no tokenizer, no prompts) it records the reason: not measured is not "nothing lost".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError
from arisk.base.task import Generate, SampleSet
from arisk.models.judge import Outcome, learnt_openings
from arisk.models.openings import OpeningScores

__all__ = [
    "DECIDING",
    "TURNED",
    "AnsweredPrompts",
    "Behaviour",
    "BehaviourResult",
    "FollowedPrompts",
    "prompts_of",
    "spread_rows",
]

#: Answers between the end of the pilot and the end of the run, at most, and the share of openings that
#: must have turned since the last answers.
ANSWERS_BETWEEN, TURNED = 3, 0.2
#: First tokens that decide what an answer becomes: the measure that tracked refusals best.
DECIDING = 3
#: Control responses that tell which openings are ordinary.
ORDINARY_RESPONSES = 1000


@dataclass(frozen=True)
class AnsweredPrompts:
    """What was written greedily after `step` optimizer steps, one text per prompt.

    Where texts may not be kept there are none, but `outcomes` instead: what each of them did.
    """

    step: int
    texts: Sequence[str]
    outcomes: Sequence[Outcome] = field(default_factory=list[Outcome])


@dataclass(frozen=True)
class FollowedPrompts:
    """One set of prompts along a run.

    Attributes:
        prompts: N rows: `prompt`, `response`, `line`; without texts `line` alone.
        openings: N texts: what the model itself says first at step 0; empty without texts.
        steps: M optimizer steps at which openings were followed.
        log_p: (N, M, k) log-probability of each token of the own opening (nats), NaN where it has fewer
            than k; None where only answers can be had.
        kept: (N, M) how many of its first tokens are still the argmax; None as above.
        answers: answers at a few of the steps, the first at 0.
        responses: what the rows' safe responses do, where their texts are not kept.
    """

    prompts: Sequence[Mapping[str, str | int | None]]
    openings: Sequence[str]
    steps: Sequence[int]
    log_p: Tensor | None
    kept: Tensor | None
    answers: Sequence[AnsweredPrompts]
    responses: Sequence[Outcome] = field(default_factory=list[Outcome])


@dataclass(frozen=True)
class BehaviourResult:
    """What a model said along a run.

    Attributes:
        status: "measured" or "not_measured", with `reason`.
        tokens: length of an answer at most.
        safety: safety prompts; None where not measured.
        ordinary: control prompts; None where not measured, with `ordinary_reason`.
        learnt: openings of refusals that the safety rows themselves taught; empty without texts.
        own_loss: mean loss per token of what the model itself says first to the safety prompts (nats);
            None where it cannot be had.
    """

    status: Literal["measured", "not_measured"]
    reason: str | None
    tokens: int
    safety: FollowedPrompts | None
    ordinary: FollowedPrompts | None
    ordinary_reason: str | None
    learnt: Sequence[str]
    own_loss: float | None


@runtime_checkable
class _Follows(Protocol):
    """A `Generate` that also gives tokens and follows openings: a tokenizer is at hand."""

    def text(self, tokens: Sequence[int]) -> str: ...

    def tokens(self, model: nn.Module, rows: Sequence[int], max_new_tokens: int) -> list[list[int]]: ...

    def followed(
        self, model: nn.Module, rows: Sequence[int], openings: Sequence[Sequence[int]]
    ) -> OpeningScores: ...


class Behaviour:
    """Watches the prompts of a run: `measure` at every point, `result` at the end.

    Args:
        safety: prompts with safe responses, with their `generate`.
        ordinary: control rows; None without.
        prompts: safety prompts followed; 0 switches all of this off.
        ordinary_prompts: control prompts followed.
        tokens: length of an answer at most.
        opening_tokens: k, first tokens followed.
    """

    def __init__(
        self,
        safety: SampleSet,
        ordinary: SampleSet | None,
        *,
        prompts: int,
        ordinary_prompts: int,
        tokens: int,
        opening_tokens: int,
    ) -> None:
        self.max_tokens = tokens
        self.reason = _reason(safety, prompts, "behaviour.prompts", "safety")
        self.ordinary_reason = (
            "there is no control data"
            if ordinary is None
            else _reason(ordinary, ordinary_prompts, "behaviour.ordinary_prompts", "control")
        )
        self.watched: dict[str, _Watched] = {}
        if self.reason is None:
            self.watched["safety"] = _Watched(safety, prompts, tokens, opening_tokens)
        if self.reason is None and ordinary is not None and self.ordinary_reason is None:
            self.watched["ordinary"] = _Watched(ordinary, ordinary_prompts, tokens, opening_tokens)
        told = [] if ordinary is None else [str(row.get("response") or "") for row in ordinary.rows]
        self.learnt = learnt_openings(
            [str(row.get("response") or "") for row in safety.rows], told[:ORDINARY_RESPONSES]
        )
        self.between = 0

    @property
    def measures(self) -> bool:
        """Whether anything is watched."""
        return self.reason is None

    def measure(self, model: nn.Module, step: int, *, answer: bool = False, turned: float = TURNED) -> None:
        """Follow the safety prompts' openings; answer where asked, at step 0, and where openings have turned.

        Ordinary prompts are followed where they are answered.

        Answers come unasked at most three times: where the share of openings that stand has fallen by
        `turned` since the last answers.

        Args:
            model: in evaluation mode; it is not changed.
            step: optimizer steps done, ascending from 0.
            answer: write answers here whatever the openings say.
            turned: share of openings that asks for answers.
        """
        if not self.measures:
            return
        try:
            lead = self.watched["safety"]
            lead.follow(model, step)
            due = self.between < ANSWERS_BETWEEN and lead.turned() >= turned
            if step > 0 and not answer and due:
                self.between += 1
            if answer or due or step == 0:
                for watched in self.watched.values():
                    if watched is not lead:
                        watched.follow(model, step)
                    watched.answer(model, step)
        except InputError as err:
            # A model that cannot write keeps its losses; the reason is on record.
            self.reason = err.what
            self.watched = {}

    def result(self) -> BehaviourResult:
        """The record."""
        found = {name: watched.result() for name, watched in self.watched.items()}
        return BehaviourResult(
            status="measured" if self.measures else "not_measured",
            reason=self.reason,
            tokens=self.max_tokens,
            safety=found.get("safety"),
            ordinary=found.get("ordinary"),
            ordinary_reason=self.ordinary_reason if self.measures else self.reason,
            learnt=list(self.learnt),
            own_loss=self.watched["safety"].own_loss() if self.measures else None,
        )

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` goes on; no NaN among them."""
        return {
            "reason": self.reason,
            "between": self.between,
            "watched": {name: watched.state() for name, watched in self.watched.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same run; an empty one says nothing."""
        if not state:
            return
        self.reason, self.between = state["reason"], state["between"]
        self.watched = {name: self.watched[name] for name in state["watched"]}
        for name, watched in self.watched.items():
            watched.restore(state["watched"][name])


class _Watched:
    """One set of prompts under way."""

    def __init__(self, samples: SampleSet, count: int, tokens: int, opening_tokens: int) -> None:
        self.rows = spread_rows(len(samples.rows), count)
        self.prompts = [prompts_of(samples.rows[i]) for i in self.rows]
        self.generate: Generate | None = samples.generate
        self.max_tokens = tokens
        self.opening_tokens = opening_tokens
        self.openings: list[list[int]] = []
        self.steps: list[int] = []
        self.log_p: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.answers: dict[int, list[str]] = {}
        #: Share of deciding openings that stood when answers were last written.
        self.stood = 1.0

    def follow(self, model: nn.Module, step: int) -> None:
        """Score the own openings; at step 0 they are read from the answers written there."""
        writer = self.generate
        if not isinstance(writer, _Follows):
            return
        if not self.openings:
            made = writer.tokens(model, self.rows, max(self.max_tokens, self.opening_tokens))
            self.openings = [tokens[: self.opening_tokens] for tokens in made]
            self.answers[step] = [writer.text(tokens[: self.max_tokens]) for tokens in made]
        scores = writer.followed(model, self.rows, self.openings)
        self.steps.append(step)
        self.log_p.append(scores.log_p)
        self.kept.append(scores.kept)

    def answer(self, model: nn.Module, step: int) -> None:
        """Write answers here."""
        if step not in self.answers and self.generate is not None:
            self.answers[step] = [str(t) for t in self.generate(model, self.rows, self.max_tokens)]
        self.stood = self.standing()

    def standing(self) -> float:
        """Share of prompts whose deciding tokens are all still the argmax; 1 where unknown."""
        if not self.kept:
            return 1.0
        whole = torch.tensor([min(DECIDING, len(opening)) for opening in self.openings])
        return float((self.kept[-1] >= whole).double().mean())

    def turned(self) -> float:
        """How far that share has fallen since the last answers."""
        return self.stood - self.standing()

    def own_loss(self) -> float | None:
        """Mean loss per token of the own openings at step 0 (nats)."""
        return -float(self.log_p[0].nanmean()) if self.log_p else None

    def result(self) -> FollowedPrompts:
        """The record."""
        writer = self.generate
        texts = [writer.text(tokens) for tokens in self.openings] if isinstance(writer, _Follows) else []
        return FollowedPrompts(
            prompts=self.prompts,
            openings=texts,
            steps=list(self.steps),
            log_p=torch.stack(self.log_p, 1) if self.log_p else None,
            kept=torch.stack(self.kept, 1) if self.kept else None,
            answers=[AnsweredPrompts(step, texts) for step, texts in sorted(self.answers.items())],
        )

    def state(self) -> dict[str, Any]:
        """Plain values; a missing token is null."""
        return {
            "openings": self.openings,
            "steps": self.steps,
            "log_p": [_plain(scores) for scores in self.log_p],
            "kept": [kept.tolist() for kept in self.kept],
            "answers": list(self.answers.items()),
            "stood": self.stood,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.openings, self.steps, self.stood = state["openings"], state["steps"], state["stood"]
        self.log_p = [
            torch.tensor([[float("nan") if v is None else v for v in row] for row in s], dtype=torch.float64)
            for s in state["log_p"]
        ]
        self.kept = [torch.tensor(kept, dtype=torch.int64) for kept in state["kept"]]
        self.answers = {int(step): list(texts) for step, texts in state["answers"]}


def _plain(scores: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in scores.tolist()]


def _reason(samples: SampleSet, count: int, setting: str, name: str) -> str | None:
    """Why prompts of a set cannot be followed; None where they can."""
    if count == 0:
        return f"{setting} is 0"
    if samples.generate is None:
        return f"the {name} rows have no prompt or no tokenizer to answer it with"
    if not samples.rows:
        return f"the task does not name its {name} rows"
    return None


def spread_rows(available: int, count: int) -> list[int]:
    """Indices of `count` rows spread evenly over those available, or of all of them; none twice.

    Safety rows lie in order of length: the first ones would all be short.

    >>> spread_rows(10, 4)
    [0, 2, 5, 7]
    """
    taken = min(count, available)
    return [i * available // taken for i in range(taken)]


def prompts_of(row: Mapping[str, object]) -> dict[str, str | int | None]:
    """What a record keeps of a row."""
    line = row.get("line")
    return {
        "prompt": str(row.get("prompt") or ""),
        "response": str(row.get("response") or ""),
        "line": line if isinstance(line, int) else None,
    }
