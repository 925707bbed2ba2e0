"""Checked rows of a data set: layout told, every fault named, those asked for kept, a subset drawn.

Raw rows come from `arisk.models.files`; what a layout's columns say, from `arisk.models.formats`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig, ProbeConfig
from arisk.models.choices import CHOICE
from arisk.models.files import PLAIN, raw_rows
from arisk.models.formats import FORMATS, LONGEST, Fields, Format, Row, RowFault, named

if TYPE_CHECKING:
    from torch import Generator

__all__ = [
    "OWN_ANSWERS",
    "ReadRows",
    "Row",
    "prompts_alone",
    "read_data",
    "read_rows",
]

#: Version of the way in which the model's own answers become responses.
OWN_ANSWERS = 1

#: Bad rows named in one error.
LISTED = 10
#: Rows whose columns decide about the layout.
LOOKED_AT = 100


@dataclass(frozen=True)
class ReadRows:
    """The rows of a data set, and what was taken of it.

    Attributes:
        rows: the rows, in the order of the file.
        format: the layout that was recognised or named.
        unread: rows with text in a column that was not read, by column.
        filtered: rows that `where` left out.
        left_out: rows that the layout leaves out, such as answers labelled as bad.
        held_out: rows that `val_set_size` keeps from the training.
        empty: columns without text in any row, where the rows are therefore taken for prompts alone.
    """

    rows: list[Row]
    format: Format
    unread: Mapping[str, int] = field(default_factory=dict[str, int])
    filtered: int = 0
    left_out: int = 0
    held_out: int = 0
    empty: tuple[str, ...] = ()

    def said(self) -> str:
        """What was taken, in one line for people."""
        parts = [f"read as {self.format.name}: {self.format.summary}"]
        if self.empty:
            parts.append(f"empty in every row: {', '.join(f'`{name}`' for name in self.empty)}")
        if self.unread:
            names = ", ".join(f"`{name}` ({count} rows)" for name, count in self.unread.items())
            parts.append(f"text in columns that are not used: {names}")
        counts = {
            "left out by `where`": self.filtered,
            "left out by their label": self.left_out,
            "held out by `val_set_size`": self.held_out,
        }
        parts += [f"{count} rows {what}" for what, count in counts.items() if count]
        return "; ".join(parts)


def read_rows(config: DataConfig, *, section: str, seed: int) -> list[Row]:
    """The rows of `read_data`.

    Args:
        config: path, layout and columns.
        section: name of the config section, for messages.
        seed: seed of the draw.
    """
    return read_data(config, section=section, seed=seed).rows


def read_data(config: DataConfig, *, section: str, seed: int) -> ReadRows:
    """Rows of a data set, checked, and cut to `max_samples` by a seeded draw that keeps their order.

    `val_set_size` takes its rows away as `datasets.Dataset.train_test_split` does with the same seed, whose
    order the others then have.

    Args:
        config: path, layout and columns.
        section: name of the config section, for messages.
        seed: seed of the draw.

    Raises:
        ConfigError: there is no such layout.
        InputError: the file is missing, empty or unreadable, rows are wrong (each named), of no known
            layout, or none of them is what `where` asks for.
    """
    raws = raw_rows(config, section)
    first = list(itertools.islice(raws, LOOKED_AT))
    columns = _columns([raw for _, raw in first])
    asked = isinstance(config, ProbeConfig) and config.measure == "choice"
    layout = CHOICE if asked else _layout(config, columns, section)
    found = _read(itertools.chain(first, raws), layout, config, section)
    if layout.name == "prompts" and config.format == "auto":
        found = replace(found, empty=_empty(columns, found, config, section))
    rows = found.rows
    import torch

    generator = torch.Generator().manual_seed(seed)
    held_out = 0
    if config.val_set_size:
        rows, held_out = _training_rows(rows, config.val_set_size, section, seed)
    if config.max_samples is not None and config.max_samples < len(rows):
        kept = torch.randperm(len(rows), generator=generator)[: config.max_samples]
        rows = [rows[i] for i in sorted(kept.tolist())]
    if config.weight != 1:
        rows = _repeated(rows, config.weight, generator)
    return replace(found, rows=rows, held_out=held_out)


def prompts_alone(config: DataConfig, section: str) -> bool:
    """Whether a data set is prompts without responses, told from its first rows and without torch.

    Files that another library reads, and hub ids, say so by `format: prompts`.

    Args:
        config: path and layout.
        section: name of the config section.
    """
    if config.format != "auto" or Path(config.path).suffix not in PLAIN or not Path(config.path).is_file():
        return config.format == "prompts"
    try:
        first = [raw for _, raw in itertools.islice(raw_rows(config, section), LOOKED_AT)]
        return _layout(config, _columns(first), section).name == "prompts"
    except InputError:
        # Whoever reads the rows says what is wrong with them.
        return False


def _columns(raws: Sequence[Any]) -> dict[str, Any]:
    """The columns of these rows, each with its first value that says something."""
    columns: dict[str, Any] = {}
    for raw in raws:
        for key, value in raw.items() if isinstance(raw, Mapping) else ():
            if _blank(columns.get(key)):
                columns[key] = value
    return columns


def _blank(value: Any) -> bool:
    """Nothing, no text, or an empty list."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _empty(columns: Mapping[str, Any], found: ReadRows, config: DataConfig, section: str) -> tuple[str, ...]:
    """The columns without text in any row that would make the rows more than prompts.

    Raises:
        InputError: one is empty in the rows that decided about the layout, and has text in others.
    """
    written = _written(columns)
    empty = tuple(
        name
        for name in sorted(columns.keys() - written.keys())
        if _fitting({**written, name: "text"}, config) is not found.format
    )
    late = next((name for name in empty if name in found.unread), None)
    if late is not None:
        raise InputError(
            f"the column {late!r} is empty in the first {LOOKED_AT} rows and has text in "
            f"{found.unread[late]} others",
            where=f"{section}.path: {config.path}",
            fix="fill it in every row; or set `format: prompts`, and it is not read",
        )
    return empty


def _written(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if not _blank(value)}


def _fitting(columns: Mapping[str, Any], config: DataConfig) -> Format | None:
    return next((layout for layout in FORMATS.values() if layout.fits(columns, config)), None)


def _layout(config: DataConfig, columns: Mapping[str, Any], section: str) -> Format:
    """The layout that is named, or the first that fits the columns of the rows looked at."""
    place = f"{section}.format: {config.path}"
    known = ", ".join(FORMATS)
    if config.format != "auto":
        if config.format not in FORMATS:
            raise ConfigError(
                f"there is no layout {config.format[:LONGEST]!r}",
                where=f"{section}.format",
                fix=f"one of auto, {known}",
            )
        return FORMATS[config.format]
    implied = config.named_format()
    if implied is not None:
        return FORMATS[implied]
    # A column without any text is as good as not there, unless then nothing is left.
    fitting = _fitting(_written(columns), config) or _fitting(columns, config)
    if fitting is None:
        # Rows that are broken name themselves.
        if not columns:
            return FORMATS["prompt_response"]
        raise InputError(
            f"the layout of the rows is not known; their columns are {named(columns)}",
            where=place,
            fix=f"name the columns (`prompt_column`, `response_column`, `messages_column`, `text_column`), "
            f"or a format: {known}",
        )
    if fitting.refused is not None:
        raise InputError(
            fitting.refused,
            where=place,
            fix=f"set `{section}.format: {fitting.name}` to train on the good answers ({fitting.summary})",
        )
    return fitting


def _read(raws: Iterable[tuple[int, Any]], layout: Format, config: DataConfig, section: str) -> ReadRows:
    """Every row read; bad ones together in one error."""
    rows: list[Row] = []
    bad: list[InputError] = []
    unread: Counter[str] = Counter()
    filtered = left_out = 0
    wanted = _Wanted(config.where)
    for line, raw in raws:
        try:
            fields = Fields(_mapping(raw), config)
            if not wanted(fields):
                filtered += 1
                continue
            row = layout.read(fields)
            if row is None:
                left_out += 1
                continue
            _require_text(row)
        except RowFault as fault:
            bad.append(InputError(fault.what, where=f"{config.path}, line {line}", fix=fault.fix))
            if len(bad) == LISTED:
                break
            continue
        unread.update(fields.unread())
        rows.append(replace(row, format=layout.name, source=config.path, line=line))
    if bad:
        raise InputError(bad[0].what, where=bad[0].where, fix=bad[0].fix, also=bad[1:])
    if not rows:
        raise _nothing(config, section, filtered, left_out, wanted)
    return ReadRows(rows, layout, dict(unread), filtered, left_out)


def _nothing(config: DataConfig, section: str, filtered: int, left_out: int, wanted: _Wanted) -> InputError:
    """Why a data set has no rows."""
    where = f"{section}.path: {config.path}"
    if filtered:
        seen = "; ".join(f"{key} has {named(sorted(values))}" for key, values in wanted.seen.items())
        return InputError(
            f"none of {filtered} rows is what `where` asks for", where=where, fix=f"in the data, {seen}"
        )
    if left_out:
        return InputError(
            f"none of {left_out} rows has a good answer", where=where, fix="give rows whose label is true"
        )
    return InputError("the data set is empty", where=where, fix="give at least two rows")


class _Wanted:
    """Whether a row has the values that `where` names; remembers a few values of the others."""

    def __init__(self, where: Mapping[str, Any] | None) -> None:
        self.where = {
            column: {_plain(value) for value in (values if isinstance(values, list) else [values])}
            for column, values in (where or {}).items()
        }
        self.seen: dict[str, set[str]] = {column: set() for column in self.where}

    def __call__(self, fields: Fields) -> bool:
        fine = True
        for column, values in self.where.items():
            if column not in fields.raw:
                raise RowFault(
                    f"the row has no column {column!r}, which `where` names",
                    f"its columns are {named(fields.raw)}",
                )
            value = _plain(fields.get(column))
            if value not in values:
                fine = False
                if len(self.seen[column]) <= LISTED:
                    self.seen[column].add(value[:LONGEST])
        return fine


def _plain(value: Any) -> str:
    """A value as text, so that `1` in YAML meets `1` in a CSV file, and true meets True."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "null" if value is None else str(value)
    return text.lower() if text in ("True", "False") else text


def _mapping(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, RowFault):
        raise raw
    if not isinstance(raw, Mapping):
        raise RowFault("the row is not an object", "give one JSON object per line")
    return raw


def _require_text(row: Row) -> None:
    """Refuse text that no encoding holds: a tokenizer would stop at it."""
    try:
        json.dumps([row.messages, row.text, row.tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as err:
        raise RowFault(
            f"the text has half of a character (U+{ord(err.object[err.start]):04X}, a lone surrogate)",
            "write the character itself, or remove it",
        ) from err
    except RecursionError as err:
        raise RowFault("the row is nested too deeply", "flatten it") from err


def _training_rows(rows: list[Row], size: float, section: str, seed: int) -> tuple[list[Row], int]:
    """What is left for training, and how many rows are not."""
    import numpy as np

    held_out = int(np.ceil(size * len(rows))) if size < 1 else int(size)
    if held_out >= len(rows):
        raise InputError(
            f"`val_set_size` holds out {held_out} of {len(rows)} rows",
            where=f"{section}.val_set_size",
            fix="give a smaller number or share",
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[held_out:]], held_out


def _repeated(rows: list[Row], weight: float, generator: Generator) -> list[Row]:
    """Every row as often as the weight says, its fraction drawn; the order stays."""
    import torch

    whole, part = divmod(weight, 1)
    more = set(torch.randperm(len(rows), generator=generator)[: round(part * len(rows))].tolist())
    chosen = [row for i, row in enumerate(rows) for _ in range(int(whole) + (i in more))]
    return chosen or rows[:1]
