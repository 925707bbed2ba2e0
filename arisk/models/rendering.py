"""Rows to tokens: chat template, loss on response tokens, truncation that keeps the response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig
from arisk.models.rows import Row

__all__ = ["IGNORED", "Rendered", "render_rows"]

#: Label of a token that carries no loss.
IGNORED = -100
#: Prompt of models without a chat template.
PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


@dataclass(frozen=True)
class Rendered:
    """One row as tokens.

    Attributes:
        tokens: prompt and response token ids.
        response_start: index of the first token that carries loss.
        row: the row it came from.
        prompt_cut, response_cut: tokens lost to `max_length`.
    """

    tokens: tuple[int, ...]
    response_start: int
    row: Row
    prompt_cut: int
    response_cut: int


def render_rows(rows: Sequence[Row], tokenizer: Any, config: DataConfig, *, section: str) -> list[Rendered]:
    """Tokenise rows as the fine-tune would.

    The head of a long prompt is cut first, then the tail of the response; the response keeps at
    least half of the window. Its first token is predicted from the token before it, so one prompt
    token always stays.

    Args:
        rows: the rows.
        tokenizer: a Hugging Face tokenizer.
        config: template and length settings.
        section: name of the config section, for messages.

    Raises:
        InputError: no row has a response token left.
        ConfigError: `chat_template: true` on a tokenizer without one.
    """
    use_template = _uses_template(tokenizer, config, section)
    rendered = [_render(row, tokenizer, config, use_template) for row in rows]
    empty = [r for r in rendered if len(r.tokens) - max(r.response_start, 1) <= 0]
    if len(empty) == len(rendered):
        raise InputError(
            "every response is truncated away or has no token",
            where=f"{section}: {config.path}",
            fix=f"raise `{section}.max_length` (now {config.max_length})",
        )
    if empty:
        raise InputError(
            f"{len(empty)} of {len(rendered)} rows have no response token",
            where=f"{config.path}, line {empty[0].row.line}",
            fix=f"remove those rows, or raise `{section}.max_length` (now {config.max_length})",
        )
    return rendered


def _uses_template(tokenizer: Any, config: DataConfig, section: str) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if config.chat_template is True and not has:
        raise ConfigError(
            "the tokenizer has no chat template",
            where=f"{section}.chat_template",
            fix="use `auto` or `false`, or a tokenizer that has one",
        )
    return has and config.chat_template is not False


def _render(row: Row, tokenizer: Any, config: DataConfig, use_template: bool) -> Rendered:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if config.format == "text":
        tokens = [*tokenizer(row.response)["input_ids"], *end]
        cut = max(0, len(tokens) - config.max_length)
        return Rendered(tuple(tokens[: config.max_length]), 1, row, 0, cut)
    if use_template:
        text = tokenizer.apply_chat_template(list(row.messages), tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        turns = "\n\n".join(turn["content"] for turn in row.messages)
        prompt = tokenizer(PLAIN_TEMPLATE.format(prompt=turns))["input_ids"]
    response = [*tokenizer(row.response, add_special_tokens=False)["input_ids"], *end]
    return _fit(prompt, response, row, config.max_length)


def _fit(prompt: list[int], response: list[int], row: Row, limit: int) -> Rendered:
    """Cut to the window: head of the prompt first, then tail of the response."""
    if len(prompt) + len(response) <= limit:
        return Rendered((*prompt, *response), len(prompt), row, 0, 0)
    kept_response = response[: max(limit // 2, limit - len(prompt))]
    kept_prompt = prompt[-(limit - len(kept_response)) :]
    return Rendered(
        (*kept_prompt, *kept_response),
        len(kept_prompt),
        row,
        len(prompt) - len(kept_prompt),
        len(response) - len(kept_response),
    )
