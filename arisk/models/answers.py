"""Greedy answers of a causal LM to the prompts of rows: what a user of the model would read.

`OwnAnswers` makes safe responses of them for safety prompts that have none: those that refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arisk.base.artifacts import loaded_json, write_text
from arisk.base.errors import InputError
from arisk.base.processes import from_first
from arisk.base.task import SampleSet
from arisk.config.sections import BehaviourConfig
from arisk.config.yaml import shortened
from arisk.gradients import evaluating
from arisk.models.batching import FixedBatches
from arisk.models.judge import OUTCOMES, Exchange, Outcome, judge_for, learnt_openings
from arisk.models.losses import per_sample_nll
from arisk.models.openings import OpeningScores, followed, opening_batch
from arisk.models.rendering import Rendered
from arisk.models.rows import OWN_ANSWERS

__all__ = [
    "BATCH",
    "GreedyAnswers",
    "JudgedAnswer",
    "OwnAnswer",
    "OwnAnswers",
    "Shelf",
    "judged_answers",
    "outcomes_said",
    "own_refusals",
    "refused_today",
    "whole_sentences",
]

#: Prompts answered at once, and padded prompt tokens of such a batch.
BATCH, BATCH_TOKENS = 48, 8192
#: Tokens of an answer that may become a safe response.
OWN_TOKENS = 128
#: Own refusals that are measured at once.
OWN_BATCH = 8
SENTENCE_END = re.compile(r"[.!?。！？](?=\s|$)|\n")


class GreedyAnswers:
    """`arisk.base.task.Generate` for rendered rows: the likeliest token, one after the other.

    Prompts are the tokens before each row's response, so they are what the loss sees: chat template,
    truncation and all. Prompts of like length are answered together, padded on the left, with a cache
    of keys and values; an answer ends at an end token, and is the one it would be alone.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rendered: rows in the order of their sample set.
    """

    def __init__(self, tokenizer: Any, rendered: Sequence[Rendered]) -> None:
        self.tokenizer = tokenizer
        self.rendered = rendered

    def __call__(self, model: nn.Module, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answers to the prompts of these rows, special tokens left out.

        Args:
            model: a Hugging Face causal LM in evaluation mode; it is not changed.
            rows: indices of rows.
            max_new_tokens: length of an answer at most.

        Raises:
            InputError: the model cannot generate.
        """
        return [self.text(tokens) for tokens in self.tokens(model, rows, max_new_tokens)]

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as a reader sees them: no special tokens, no space around."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def tokens(self, model: nn.Module, rows: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """The same answers as tokens, the end token included where it was reached.

        Raises:
            InputError: the model cannot generate.
        """
        prompts = [self.prompt(i) for i in rows]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        made: dict[int, list[int]] = {}
        # In float64 the masks of transformers overflow at padding, and what they mask is NaN.
        pads = next(model.parameters()).dtype != torch.float64
        while order:
            taken = [i for n, i in enumerate(order[:BATCH]) if (n + 1) * len(prompts[i]) <= BATCH_TOKENS]
            taken = taken or order[:1]
            if not pads:
                taken = [i for i in taken if len(prompts[i]) == len(prompts[order[0]])]
            order = order[len(taken) :]
            made.update(
                zip(taken, self._batch(model, [prompts[i] for i in taken], max_new_tokens), strict=True)
            )
        return [made[i] for i in range(len(prompts))]

    def prompt(self, row: int) -> tuple[int, ...]:
        """The prompt's tokens of a row."""
        rendered = self.rendered[row]
        return rendered.tokens[: rendered.response_start]

    def followed(
        self, model: nn.Module, rows: Sequence[int], openings: Sequence[Sequence[int]]
    ) -> OpeningScores:
        """How much of these openings the model still says after the prompts of these rows."""
        return followed(model, [self.prompt(i) for i in rows], openings, self.padding)

    def opening_batches(
        self, rows: Sequence[int], openings: Sequence[Sequence[int]], size: int
    ) -> list[dict[str, Any]]:
        """Prompts of these rows with these openings as what carries loss, so many at a time, on the CPU."""
        cpu = torch.device("cpu")
        return [
            opening_batch(
                [self.prompt(i) for i in rows[at : at + size]], openings[at : at + size], self.padding, cpu
            )
            for at in range(0, len(rows), size)
        ]

    @property
    def padding(self) -> int:
        """The padding token."""
        return int(self.tokenizer.pad_token_id or 0)

    def _batch(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        pad, ends = self.padding, self.ends(model)
        device = next(model.parameters()).device
        ids = torch.tensor([(pad,) * (longest - len(p)) + tuple(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        try:
            # Every setting that the model's own generation config might turn away from greedy.
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                use_cache=True,
                eos_token_id=ends,
                pad_token_id=pad,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as err:
            lines = str(err).strip().splitlines()
            raise InputError(
                f"the model cannot generate text: {lines[0] if lines else type(err).__name__}",
                where="behaviour.prompts",
                fix="set `behaviour.prompts: 0`, and `guard.generate: 0` for protected fine-tunes; "
                "losses are measured all the same",
            ) from err
        return [_until(tokens, ends or []) for tokens in made[:, longest:].tolist()]

    def ends(self, model: Any) -> list[int] | None:
        """End tokens of the model and of the tokenizer; chat models often have several.

        Raises:
            InputError: the model's are no tokens.
        """
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        given: list[Any] = [] if own is None else own if isinstance(own, list) else [own]
        if not all(type(token) is int for token in given):
            raise InputError(
                f"`eos_token_id` of the model's generation config is no token: {shortened(repr(own))}",
                where="model.path: generation_config.json",
                fix="give the number of the token that ends a text, or a list of such numbers",
            )
        ends: list[int] = list(given)
        if self.tokenizer.eos_token_id is not None:
            ends.append(int(self.tokenizer.eos_token_id))
        return sorted(set(ends)) or None


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first end token and with it; what follows is padding."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


@dataclass(frozen=True)
class OwnAnswer:
    """What the aligned model says to a safety prompt, and what that does."""

    prompt: str
    response: str
    outcome: Outcome


@dataclass(frozen=True)
class Shelf:
    """Where answers are kept, and whose they are.

    Attributes:
        folder: of the files, one per data set.
        model: what the model is: fingerprints of its files, and its settings.
    """

    folder: Path
    model: Mapping[str, Any]

    def path(self, section: str) -> Path:
        """The file of a data set; it is itself a data set, with `where: {outcome: refused}`."""
        return self.folder / f"{section}.answers.json"


class OwnAnswers:
    """`arisk.models.tasks.Answers`: safety prompts answered by the aligned model itself.

    Answers are greedy and of 128 tokens at most; one that is longer ends with its last whole sentence. They
    are judged as the answers of a run are, but for what safe responses would teach.

    Args:
        model: gives the model when there is something to answer.
        tokenizer: its tokenizer.
        behaviour: the judge, and further openings of refusals.
        shelf: where answers are kept, so that they are written once; None: nowhere.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        tokenizer: Any,
        behaviour: BehaviourConfig,
        shelf: Shelf | None = None,
    ) -> None:
        self.model, self.tokenizer, self.behaviour, self.shelf = model, tokenizer, behaviour, shelf

    def __call__(self, section: str, prompts: Sequence[Rendered]) -> list[OwnAnswer]:
        """An answer per prompt; those kept, where model, prompts and judge are the same.

        Args:
            section: name of the data set.
            prompts: rendered rows without a response.

        Raises:
            InputError: the model cannot generate.
        """
        return from_first(lambda: self._kept(section, prompts))

    def _kept(self, section: str, prompts: Sequence[Rendered]) -> list[OwnAnswer]:
        if self.shelf is None:
            return self._made(prompts)
        path, key = self.shelf.path(section), self._key(prompts)
        found = _read(path, key)
        if found is None:
            found = self._made(prompts)
            body = [asdict(answer) for answer in found]
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": key, "digest": _digest(body), "answers": body}, indent=1)
            write_text(path, text + "\n")
        return found

    def _key(self, prompts: Sequence[Rendered]) -> str:
        judge = self.behaviour.judge
        assert self.shelf is not None
        return _digest(
            {
                "version": OWN_ANSWERS,
                "model": self.shelf.model,
                "prompts": [row.tokens for row in prompts],
                "openings": self.behaviour.refusal_openings,
                "judge": None if judge is None else judge.model_dump(),
            }
        )

    def _made(self, prompts: Sequence[Rendered]) -> list[OwnAnswer]:
        model, greedy = self.model(), GreedyAnswers(self.tokenizer, prompts)
        ends = set(greedy.ends(model) or [])
        said: list[str] = []
        try:
            with evaluating(model):
                answers = greedy.tokens(model, range(len(prompts)), OWN_TOKENS)
        except InputError as err:
            first = prompts[0].row
            fix = "give every prompt a safe response"
            raise InputError(err.what, where=f"{first.source}, line {first.line}", fix=fix) from err
        for tokens in answers:
            text = greedy.text(tokens)
            said.append(text if ends & set(tokens[-1:]) else whole_sentences(text))
        exchanges = [Exchange(row.row.prompt, text) for row, text in zip(prompts, said, strict=True)]
        outcomes = judge_for(self.behaviour)(exchanges)
        return [
            OwnAnswer(exchange.prompt, exchange.answer, outcome)
            for exchange, outcome in zip(exchanges, outcomes, strict=True)
        ]


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence; as it is where it has none.

    >>> whole_sentences("I cannot help. Please ask a lawyer about 3.5 of")
    'I cannot help.'
    """
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text


def outcomes_said(answers: Sequence[OwnAnswer]) -> str:
    """Counts of what the answers do.

    >>> outcomes_said([OwnAnswer("a?", "I can't.", "refused"), OwnAnswer("b?", "So: …", "answered")])
    '1 of 2 refused, 1 answered'
    """
    counts = Counter(answer.outcome for answer in answers)
    others = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES[1:] if counts[outcome]]
    return ", ".join([f"{counts['refused']} of {len(answers)} refused", *others])


def _read(path: Path, key: str) -> list[OwnAnswer] | None:
    """Answers that were kept under this key; None where there are none, or they were changed."""
    try:
        body = loaded_json(path)
        answers = body["answers"]
        if body["key"] == key and body["digest"] == _digest(answers):
            return [OwnAnswer(**answer) for answer in answers]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        pass
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class JudgedAnswer:
    """What the model says to the prompt of one row, and what that does.

    Attributes:
        row: index of the row.
        tokens: of the answer.
        exchange: prompt, answer and safe response as text.
        outcome: what the judge takes it for.
    """

    row: int
    tokens: list[int]
    exchange: Exchange
    outcome: Outcome


def judged_answers(
    model: nn.Module,
    greedy: GreedyAnswers,
    texts: Sequence[tuple[str, str]],
    behaviour: BehaviourConfig,
    *,
    prompts: int,
    max_new_tokens: int,
    ordinary: Iterable[str] = (),
) -> list[JudgedAnswer]:
    """Answers to some of the safety prompts, spread evenly over the rows, by the judge of the run.

    Args:
        model: in evaluation mode.
        greedy: writes answers to the rows.
        texts: prompt and safe response of every row; empty where there is none.
        behaviour: judge, and further openings of refusals.
        prompts: how many are answered at most.
        max_new_tokens: length of an answer at most.
        ordinary: responses to ordinary prompts, whose openings are no refusals.

    Raises:
        InputError: the model cannot generate.
    """
    count = min(prompts, len(texts))
    rows = [i * len(texts) // count for i in range(count)]
    answers = from_first(lambda: greedy.tokens(model, rows, max_new_tokens))
    exchanges = [
        Exchange(texts[i][0], greedy.text(said), texts[i][1]) for i, said in zip(rows, answers, strict=True)
    ]
    judge = judge_for(behaviour, learnt_openings((response for _, response in texts), ordinary))
    return [JudgedAnswer(*one) for one in zip(rows, answers, exchanges, judge(exchanges), strict=True)]


@dataclass(frozen=True)
class Today:
    """What the aligned model does with safety prompts before any training.

    Attributes:
        asked: prompts it was asked, spread evenly over the rows.
        refused: of these, those that it refuses.
        safe_loss, own_loss: mean loss of the first tokens of the safe responses, and of what the model says
            first itself (nats per token): far apart where the responses are not what it says.
    """

    asked: int
    refused: int
    safe_loss: float
    own_loss: float


def refused_today(
    model: nn.Module,
    rendered: Sequence[Rendered],
    tokenizer: Any,
    behaviour: BehaviourConfig,
    *,
    prompts: int,
    ordinary: Sequence[str] = (),
) -> Today:
    """Ask a model some of its safety prompts.

    Args:
        model: the aligned model.
        rendered: safety rows with prompts and responses.
        tokenizer: of the model.
        behaviour: judge, length of answers and of openings.
        prompts: how many are asked.
        ordinary: responses to ordinary prompts, whose openings are no refusals.

    Raises:
        InputError: the model cannot generate.
    """
    greedy, first = GreedyAnswers(tokenizer, rendered), behaviour.opening_tokens
    texts = [(row.row.prompt, row.row.response) for row in rendered]
    with torch.no_grad(), evaluating(model):
        answers = judged_answers(
            model,
            greedy,
            texts,
            behaviour,
            prompts=prompts,
            max_new_tokens=behaviour.tokens,
            ordinary=ordinary,
        )
        rows = [answer.row for answer in answers]
        safe = [rendered[i].tokens[rendered[i].response_start :][:first] for i in rows]
        own = [answer.tokens[:first] for answer in answers]
        losses = [float(-greedy.followed(model, rows, given).log_p.nanmean()) for given in (safe, own)]
    return Today(len(answers), sum(answer.outcome == "refused" for answer in answers), *losses)


def own_refusals(
    model: nn.Module,
    samples: SampleSet,
    behaviour: BehaviourConfig | None = None,
    *,
    prompts: int = BATCH,
    max_new_tokens: int = OWN_TOKENS,
    where: str = "own refusals",
) -> SampleSet:
    """What the model itself says to safety prompts, where the judge takes it for a refusal, as safety rows.

    A response is the model's own tokens, its end token with them where it was reached.

    Args:
        model: the aligned model.
        samples: safety rows whose `generate` is `GreedyAnswers`, as `safety_rows` gives them; their responses
            only teach the judge.
        behaviour: the judge; default the rule.
        prompts: how many prompts are answered, spread evenly over the rows.
        max_new_tokens: length of an answer at most.
        where: the setting, for messages.

    Returns:
        The rows, shortest first; `statistics["asked"]` counts the prompts.

    Raises:
        InputError: the rows have no prompts to answer, the model cannot generate, or the judge takes no
            answer for a refusal.
    """
    greedy = samples.generate
    if not isinstance(greedy, GreedyAnswers) or not samples.rows:
        raise InputError(
            "these rows have no prompts that a tokenizer could write answers to",
            where=where,
            fix="make them with `arisk.models.from_trainer.safety_rows(model, tokenizer, prompts)`",
        )
    texts = [(str(row.get("prompt") or ""), str(row.get("response") or "")) for row in samples.rows]
    judge = behaviour or BehaviourConfig()
    with evaluating(model):
        answers = judged_answers(model, greedy, texts, judge, prompts=prompts, max_new_tokens=max_new_tokens)
    kept = [
        (
            _answered(greedy.rendered[answer.row], answer.tokens),
            {**samples.rows[answer.row], "response": answer.exchange.answer},
        )
        for answer in answers
        if answer.outcome == "refused"
    ]
    if not kept:
        raise InputError(
            f"the judge takes none of the model's {len(answers)} own answers for a refusal: the first says "
            f"{shortened(answers[0].exchange.answer, 60)!r}",
            where=where,
            fix="give prompts that the model refuses, or list its openings as `behaviour.refusal_openings`",
        )
    kept.sort(key=lambda row: len(row[0].tokens))
    rendered = [row for row, _ in kept]
    return SampleSet(
        "own refusals",
        FixedBatches(rendered, OWN_BATCH, greedy.padding),
        per_sample_nll,
        [{**row, "tokens": page.trained} for page, row in kept],
        {"asked": len(answers)},
        GreedyAnswers(greedy.tokenizer, rendered),
    )


def _answered(rendered: Rendered, answer: Sequence[int]) -> Rendered:
    """The row with this answer in place of its response."""
    prompt = rendered.tokens[: rendered.response_start]
    end = len(prompt) + len(answer)
    return replace(rendered, tokens=(*prompt, *answer), spans=((len(prompt), end),), response_cut=0)
