"""Reading data sets: JSONL, JSON, CSV, Parquet or a hub id, in three row layouts, every row checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arisk.base.errors import InputError
from arisk.config.plan import DataConfig
from arisk.models.loading import hf_module

__all__ = ["Row", "raw_rows", "read_rows"]

#: Bad rows named in one error.
LISTED = 10
#: File endings that `datasets` reads.
LOADERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}


@dataclass(frozen=True)
class Row:
    """One example: turns before the response, the response, and its place in the file.

    Attributes:
        messages: chat turns before the response, each {role, content}; empty for plain text.
        response: the text whose tokens carry the loss.
        line: line of the file (from 1), or row number for other sources.
    """

    messages: tuple[dict[str, str], ...]
    response: str
    line: int

    @property
    def prompt(self) -> str:
        """The last turn before the response, for display."""
        return self.messages[-1]["content"] if self.messages else ""


def read_rows(config: DataConfig, *, section: str, seed: int) -> list[Row]:
    """Rows of a data set, checked, and cut to `max_samples` by a seeded draw that keeps their order.

    Args:
        config: path, layout and columns.
        section: name of the config section, for messages.
        seed: seed of the draw.

    Raises:
        InputError: the file is missing, empty or unreadable, or rows are wrong (each named).
    """
    rows: list[Row] = []
    bad: list[InputError] = []
    for line, raw in raw_rows(config, section):
        try:
            rows.append(_parse(raw, line, config))
        except InputError as err:
            bad.append(err)
            if len(bad) == LISTED:
                break
    if bad:
        raise InputError(bad[0].what, where=bad[0].where, fix=bad[0].fix, also=bad[1:])
    if not rows:
        raise InputError(
            "the data set is empty", where=f"{section}.path: {config.path}", fix="give at least two rows"
        )
    if config.max_samples is not None and config.max_samples < len(rows):
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(rows), generator=generator)[: config.max_samples]
        rows = [rows[i] for i in sorted(kept.tolist())]
    return rows


def raw_rows(config: DataConfig, section: str) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1, mapping) of every row as it stands in the file; blank lines left out.

    Args:
        config: path and layout.
        section: name of the config section, for messages.

    Yields:
        A line that is no JSON comes as its `JSONDecodeError`.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    path = Path(config.path)
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, section)
    else:
        yield from enumerate(_load_with_datasets(config, section), start=1)


def _json_lines(path: Path, section: str) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as err:
                    yield number, err
    except FileNotFoundError as err:
        raise InputError(
            "the data file does not exist", where=f"{section}.path: {path}", fix="check the path"
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(
            f"the data file cannot be read: {err}", where=str(path), fix="give a UTF-8 JSONL file"
        ) from err


def _load_with_datasets(config: DataConfig, section: str) -> Any:
    """Rows through the `datasets` library: local CSV, JSON and Parquet files, and hub ids."""
    datasets = hf_module("datasets")
    datasets.disable_progress_bars()
    path = Path(config.path)
    try:
        if path.is_file():
            loader = LOADERS.get(path.suffix)
            if loader is None:
                raise InputError(
                    f"files ending in {path.suffix!r} are not read",
                    where=f"{section}.path: {path}",
                    fix="give .jsonl, .json, .csv or .parquet",
                )
            return datasets.load_dataset(loader, data_files=str(path), split="train")
        return datasets.load_dataset(config.path, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as err:
        raise InputError(
            f"the data set cannot be loaded: {str(err).splitlines()[0] if str(err) else type(err).__name__}",
            where=f"{section}.path: {config.path}",
            fix="check the path or hub id (a hub id needs the network or a local cache) and the split",
        ) from err


def _parse(raw: Any, line: int, config: DataConfig) -> Row:
    where = f"{config.path}, line {line}"
    if isinstance(raw, json.JSONDecodeError):
        raise InputError(
            f"this is not valid JSON: {raw.msg} at column {raw.colno}",
            where=where,
            fix="give one JSON object per line",
        )
    if not isinstance(raw, dict):
        raise InputError("the row is not an object", where=where, fix="give one JSON object per line")
    if config.format == "messages":
        return _from_messages(raw, line, where, config)
    if config.format == "text":
        return Row((), _text(raw, config.text_column, where), line)
    prompt = _text(raw, config.prompt_column, where)
    return Row(({"role": "user", "content": prompt},), _text(raw, config.response_column, where), line)


def _text(raw: dict[str, Any], column: str, where: str) -> str:
    value = raw.get(column)
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if column not in raw else ("is empty" if value in ("", None) else "is no text")
        if isinstance(value, str) and value:
            what = "is blank"
        raise InputError(
            f"the column {column!r} {what}",
            where=where,
            fix=f"give it text, or name another column (`*_column`); this row has {sorted(raw)}",
        )
    return value


def _from_messages(raw: dict[str, Any], line: int, where: str, config: DataConfig) -> Row:
    """Turns up to the last assistant turn, which is the response."""
    turns: Any = raw.get(config.messages_column)
    fine = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=0) if fine else 0
    if not fine or last == 0 or not turns[last]["content"].strip():
        raise InputError(
            f"the column {config.messages_column!r} is not a chat that ends with an assistant turn",
            where=where,
            fix='give [{"role": "user", "content": …}, {"role": "assistant", "content": …}]',
        )
    before = tuple({"role": t["role"], "content": t["content"]} for t in turns[:last])
    return Row(before, turns[last]["content"], line)
