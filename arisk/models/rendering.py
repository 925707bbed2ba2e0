"""Rows to tokens as the user's trainer makes them: which carry loss, and what is cut away.

A row is tokenised as a whole; where a trained part begins is the first token that the tokens of the text
before it do not share, as TRL finds a completion. No end token is put after an answer: the template
writes what belongs there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig
from arisk.models.formats import FORMATS, SAFETY_SETS, Row, pair_row
from arisk.models.templates import LaidOut, LossOn, lay_out

__all__ = [
    "IGNORED",
    "TRAINED",
    "Rendered",
    "keep_start",
    "loss_on",
    "marked",
    "render_rows",
    "token_rows",
    "whole_rows",
]

#: Label of a token that carries no loss.
IGNORED = -100
#: The config section whose rows are trained on; the rows of the others are measured.
TRAINED = "finetune"
#: Rows tokenised at once.
AT_ONCE = 1000


@dataclass(frozen=True)
class Rendered:
    """One row as tokens.

    Attributes:
        tokens: token ids of the whole row.
        spans: (start, end) of each run of tokens that carry loss.
        response_start: index of the first token of the last trained part, at least 1: its tokens up to here
            are the prompt of an answer.
        row: the row it came from.
        mode: what of it is trained.
        prompt_cut, response_cut: tokens lost to `max_length` before and after that index.
    """

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    response_start: int
    row: Row
    mode: LossOn
    prompt_cut: int = 0
    response_cut: int = 0

    @property
    def trained(self) -> int:
        """Tokens that carry loss: those of the spans that another token comes before."""
        return sum(end - max(start, 1) for start, end in self.spans if end > 1)

    @property
    def untrained(self) -> int:
        """Assistant turns of its chat that carry no loss."""
        answers = [i for i, turn in enumerate(self.row.messages) if turn["role"] == "assistant"]
        first = self.row.completion if self.mode == "completion" else 0
        trained = {"all": len(answers), "completion": sum(i >= first for i in answers)}
        return len(answers) - trained.get(self.mode, len(self.spans))

    def labels(self) -> list[int]:
        """Token ids where there is loss, −100 elsewhere."""
        labels = [IGNORED] * len(self.tokens)
        for start, end in self.spans:
            labels[start:end] = self.tokens[start:end]
        return labels


def loss_on(row: Row, config: DataConfig, section: str) -> LossOn:
    """Which tokens of a row carry loss, `auto` resolved.

    The rows that are trained on are taken as TRL's SFTTrainer takes them, turns with a weight as OpenAI
    does; safety rows by their last answer; other rows that are measured by all answers.
    """
    if config.loss_on != "auto":
        return config.loss_on
    if section != TRAINED:
        return "last" if section in SAFETY_SETS else "assistant"
    if any("weight" in turn or "train" in turn for turn in row.messages):
        return "assistant"
    return FORMATS[row.format].trained if row.format in FORMATS else "completion"


def render_rows(rows: Sequence[Row], tokenizer: Any, config: DataConfig, *, section: str) -> list[Rendered]:
    """Tokenise rows as the fine-tune would, and cut them to `max_length`.

    Rows of the fine-tuning data without a token that carries loss are left out, as trainers do; among rows
    that are measured they are an error. Prompts without a response have no such token, and stay.

    Args:
        rows: the rows.
        tokenizer: a Hugging Face tokenizer.
        config: template, loss and length settings.
        section: name of the config section: what it is for, and for messages.

    Raises:
        InputError: no row has a token that carries loss; a measured row has none; the template fails.
        ConfigError: `chat_template: true` on a tokenizer without one.
    """
    whole = whole_rows(rows, tokenizer, config, section=section)
    cut = _CUTS[_truncation(config, section)]
    rendered = [kept for row in whole if (kept := cut(row, config.max_length)) is not None]
    unwritten = [row for row in whole if row.row.answered and row.trained <= 0]
    if unwritten and len(unwritten) == len(whole) and whole[0].row.messages:
        raise InputError(
            "the chat template writes nothing of the answers, so no token carries loss",
            where=f"{section}: {config.path}",
            fix=f"correct the tokenizer's template, or set `{section}.chat_template: false`",
        )
    empty = [row for row in rendered if row.row.answered and row.trained <= 0]
    if len(empty) == len(rendered) and rows:
        raise InputError(
            "every response is truncated away or has no token",
            where=f"{section}: {config.path}",
            fix=f"raise `{section}.max_length` (now {config.max_length})",
        )
    if empty and section != TRAINED:
        raise InputError(
            f"{len(empty)} of {len(rendered)} rows have no response token",
            where=f"{empty[0].row.source}, line {empty[0].row.line}",
            fix=f"remove those rows, or raise `{section}.max_length` (now {config.max_length})",
        )
    return [row for row in rendered if row.trained > 0 or not row.row.answered]


def whole_rows(rows: Sequence[Row], tokenizer: Any, config: DataConfig, *, section: str) -> list[Rendered]:
    """Tokenise rows as the fine-tune would, and cut none of them.

    Args:
        rows: the rows.
        tokenizer: a Hugging Face tokenizer.
        config: template and loss settings.
        section: name of the config section.

    Raises:
        InputError: the template fails.
        ConfigError: `chat_template: true` on a tokenizer without one.
    """
    plain = not _uses_template(tokenizer, config, section)
    if config.chat_template is True:
        rows = [_as_chat(row) for row in rows]
    modes: list[LossOn] = [loss_on(row, config, section) for row in rows]
    laid = lay_out(rows, modes, tokenizer, plain=plain, section=section)
    return _tokenised(rows, modes, laid, tokenizer)


def _uses_template(tokenizer: Any, config: DataConfig, section: str) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if config.chat_template is True and not has:
        raise ConfigError(
            "the tokenizer has no chat template",
            where=f"{section}.chat_template",
            fix="use `auto` or `false`, or a tokenizer that has one",
        )
    return has and config.chat_template is not False


def _as_chat(row: Row) -> Row:
    """A prompt and completion in plain text as a chat."""
    if row.messages or not row.text[0].strip():
        return row
    return pair_row(*row.text, plain=False, format=row.format, source=row.source, line=row.line)


def _tokenised(
    rows: Sequence[Row], modes: Sequence[LossOn], laid: Sequence[LaidOut], tokenizer: Any
) -> list[Rendered]:
    """Tokens of every row, and which of them its trained parts take."""
    found: list[Rendered] = []
    for start in range(0, len(laid), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        ids = _ids(laid[part], tokenizer)
        found += [
            _one(row, mode, page, ids)
            for row, mode, page in zip(rows[part], modes[part], laid[part], strict=True)
        ]
    return found


def _ids(laid: Sequence[LaidOut], tokenizer: Any) -> dict[tuple[str, bool], list[int]]:
    """Tokens of every text; a tokenizer takes many at once far faster than one after the other."""
    texts = dict.fromkeys((page.text, page.special) for page in laid)
    for page in laid:
        texts.update(dict.fromkeys((text, page.special) for text in _beginnings(page)))
    ids: dict[tuple[str, bool], list[int]] = {}
    for special in (False, True):
        wanted = [text for text, kind in texts if kind is special]
        if wanted:
            try:
                tokens = tokenizer(wanted, add_special_tokens=special)["input_ids"]
            except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RuntimeError) as err:
                first = str(err).strip().splitlines()
                raise InputError(
                    f"the tokenizer cannot read text: {first[0][:200] if first else type(err).__name__}",
                    where="model.path: tokenizer_config.json",
                    fix="a setting there has a value of the wrong kind; save the tokenizer again",
                ) from err
            ids.update({(text, special): each for text, each in zip(wanted, tokens, strict=True)})
    return ids


def _beginnings(page: LaidOut) -> Iterable[str]:
    """Texts whose tokens say where a trained part begins or ends."""
    for place in (place for span in page.spans for place in span):
        if isinstance(place, str):
            yield place
        elif 0 < place < len(page.text):
            yield page.text[:place]


def _one(row: Row, mode: LossOn, page: LaidOut, ids: dict[tuple[str, bool], list[int]]) -> Rendered:
    tokens = ids[page.text, page.special]

    def index(place: int | str) -> int:
        if place == 0:
            return 0
        if place == len(page.text):
            return len(tokens)
        return _shared(ids[place if isinstance(place, str) else page.text[:place], page.special], tokens)

    spans = tuple((index(start), index(end)) for start, end in page.spans)
    spans = tuple((start, end) for start, end in spans if end > start or not row.answered)
    last = spans[-1][0] if spans else len(tokens)
    return Rendered(tuple(tokens), spans, max(1, last), row, mode)


def _shared(some: Sequence[int], tokens: Sequence[int]) -> int:
    """Tokens that two rows have in common from their beginnings."""
    for place, (one, other) in enumerate(zip(some, tokens, strict=False)):
        if one != other:
            return place
    return min(len(some), len(tokens))


def _truncation(config: DataConfig, section: str) -> str:
    if config.truncation != "auto":
        return config.truncation
    return "keep_start" if section == TRAINED else "keep_response"


def _window(row: Rendered, start: int, end: int) -> Rendered:
    """The tokens from start to end."""
    if start == 0 and end >= len(row.tokens):
        return row
    spans = tuple(
        (max(first, start) - start, min(last, end) - start)
        for first, last in row.spans
        if min(last, end) > max(first, start)
    )
    begins, whole = row.response_start, len(row.tokens)
    response_cut = whole - begins - max(0, end - max(start, begins))
    return replace(
        row,
        tokens=row.tokens[start:end],
        spans=spans,
        response_start=max(1, min(begins, end) - start),
        prompt_cut=whole - (end - start) - response_cut,
        response_cut=response_cut,
    )


def _keep_response(row: Rendered, limit: int) -> Rendered:
    """The head of the prompt goes first, then the tail of the response, which keeps half of the window.

    Its first token is predicted from the token before it, so one token of the prompt always stays.
    """
    begins, whole = row.response_start, len(row.tokens)
    if whole <= limit:
        return row
    response = min(whole - begins, max(limit // 2, limit - begins))
    return _window(row, max(0, begins + response - limit), begins + response)


def keep_start(row: Rendered, limit: int) -> Rendered:
    """The first tokens of a row, as many as the limit has."""
    return _window(row, 0, min(limit, len(row.tokens)))


#: What stays of a row that is longer than the limit; None leaves it out.
_CUTS: dict[str, Callable[[Rendered, int], Rendered | None]] = {
    "keep_start": keep_start,
    "keep_end": lambda row, limit: _window(row, max(0, len(row.tokens) - limit), len(row.tokens)),
    "keep_response": _keep_response,
    "drop": lambda row, limit: row if len(row.tokens) <= limit else None,
}


def token_rows(rendered: Sequence[Rendered], tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first rows as plain data, for whoever checks that these are the tokens of their run.

    Args:
        rendered: the rows.
        tokenizer: their tokenizer.
        count: rows at most.

    Returns:
        A mapping per row: `source`, `line`, `format`, `input_ids`, `tokens` (the text of each), `trained`
        (1 where the token carries loss, else 0) and `text`, trained parts in « ».
    """
    return [
        {
            "source": row.row.source,
            "line": row.row.line,
            "format": row.row.format,
            "input_ids": list(row.tokens),
            "tokens": [tokenizer.decode([token]) for token in row.tokens],
            "trained": [int(label != IGNORED) for label in row.labels()],
            "text": marked(row, tokenizer),
        }
        for row in rendered[:count]
    ]


def marked(rendered: Rendered, tokenizer: Any) -> str:
    """A row as the model sees it, the parts that carry loss in double angle quotes."""
    text, place = "", 0
    for start, end in rendered.spans:
        text += tokenizer.decode(list(rendered.tokens[place:start]))
        text += f"«{tokenizer.decode(list(rendered.tokens[start:end]))}»"
        place = end
    return text + tokenizer.decode(list(rendered.tokens[place:]))
