"""Kept and flagged rows as JSONL, every field of the source preserved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.artifacts import disk_error
from arisk.base.errors import InputError
from arisk.config.plan import DataConfig, parts_of
from arisk.models.rows import raw_rows

__all__ = ["FLAGGED_FILE", "KEPT_FILE", "SplitRow", "split_rows"]

KEPT_FILE, FLAGGED_FILE = "kept.jsonl", "flagged.jsonl"

#: What is added to a row: its score, its rank from 1 and why it is flagged (empty where it is not).
SplitRow = Mapping[str, Any]


def split_rows(
    data: DataConfig | tuple[DataConfig, ...],
    places: Sequence[tuple[str, int]],
    added: Sequence[SplitRow],
    flagged: frozenset[int],
    folder: Path,
) -> tuple[int, int]:
    """Write every screened row once: to `kept.jsonl` or to `flagged.jsonl`, in the order of the source.

    Each object is that of the source with the added keys; values keep their types, text stays
    readable. Rows that `max_samples` left out are in neither file.

    Args:
        data: the data set, or its parts.
        places: (N,) path and line of every screened row.
        added: (N,) keys to add to every row.
        flagged: numbers of the flagged rows.
        folder: where the files go.

    Returns:
        Rows kept, rows flagged.

    Raises:
        InputError: the source no longer has a screened row.
        ArtifactError: the disk is full or the folder is read-only.
    """
    numbers: dict[tuple[str, int], list[int]] = {}
    for j, place in enumerate(places):
        numbers.setdefault(place, []).append(j)
    counts = [0, 0]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            (folder / KEPT_FILE).open("w", encoding="utf-8", newline="\n") as kept,
            (folder / FLAGGED_FILE).open("w", encoding="utf-8", newline="\n") as dropped,
        ):
            for config in parts_of(data):
                for line, raw in raw_rows(config, "finetune"):
                    for j in numbers.pop((config.path, line), ()):
                        drop = j in flagged
                        counts[drop] += 1
                        (dropped if drop else kept).write(_line({**raw, **added[j]}))
    except OSError as err:
        raise disk_error(err, folder) from err
    if numbers:
        path, line = min(numbers)
        raise InputError(
            f"{len(numbers)} screened rows are no longer in the data",
            where=f"finetune.path: {path}, line {line}",
            fix="the file changed while it was screened: run the same command again",
        )
    return counts[0], counts[1]


def _line(row: Mapping[str, Any]) -> str:
    """One JSON line; text that is no valid Unicode is escaped."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row, default=str)
    return text + "\n"
