"""Questions with options: rows of a probe that measures which answer is chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.config.plan import ProbeConfig
from arisk.models.formats import LONGEST, PROMPTS, SYSTEMS, Fields, Format, Row, RowFault, chat_row, named

__all__ = ["CHOICE"]

#: Letters that name options.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _read_choice(fields: Fields) -> Row:
    """A question with its options, of which the right one becomes the answer."""
    config = fields.config
    assert isinstance(config, ProbeConfig)
    options, labels = _options(fields.get(config.options_column), config.options_column, fields.raw)
    right = _right(fields.get(config.answer_column), options, labels, config.answer_column)
    columns = (config.prompt_column, *PROMPTS)
    prompt = next((name for name in columns if fields.raw.get(name) is not None), config.prompt_column)
    turns = {"role": "user", "content": fields.text(prompt)}, {"role": "assistant", "content": options[right]}
    return chat_row(turns, system=fields.maybe(*SYSTEMS), options=options)


def _options(value: Any, column: str, raw: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Texts of the options, and the labels by which data name them."""
    texts: Any = value.get("text") if isinstance(value, Mapping) else value
    labels: Any = value.get("label") if isinstance(value, Mapping) else None
    if not _are_options(texts):
        raise RowFault(
            f"the column {column!r} holds no list of two or more different options",
            f"give texts, or name the column (`options_column`); this row has {named(raw)}",
        )
    named_so = _is_list(labels) and len(labels) == len(texts)
    return tuple(texts), [str(label) for label in (labels if named_so else LETTERS[: len(texts)])]


def _are_options(value: Any) -> bool:
    """Two texts or more, all of them different and none blank."""
    return (
        _is_list(value)
        and all(isinstance(text, str) and text.strip() for text in value)
        and len(set(value)) == len(value) >= 2
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _right(value: Any, options: Sequence[str], labels: Sequence[str], column: str) -> int:
    """Place of the right option: named by its text, else its label, else its number from 0."""
    text = str(value)
    if isinstance(value, str) and value in options:
        return list(options).index(value)
    if isinstance(value, str) and text in labels:
        return list(labels).index(text)
    number = int(text) if re.fullmatch(r"\d{1,4}", text) and not isinstance(value, bool) else -1
    if 0 <= number < len(options):
        return number
    what = "is missing" if value is None else f"names none of {len(options)} options: {text[:LONGEST]!r}"
    raise RowFault(
        f"the column {column!r} {what}",
        "give the right option's text, its letter or label, or its number from 0 (`answer_column` names the "
        "column)",
    )


#: Questions with options: what a probe of this measure has, whatever its columns look like.
CHOICE = Format(
    "choice",
    "a question, its options and which of them is right",
    lambda _raw, _config: False,
    _read_choice,
    "completion",
)
