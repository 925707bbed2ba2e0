"""Kept and flagged rows as JSONL, every field of the source preserved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.artifacts import disk_error
from arisk.base.errors import InputError
from arisk.config.plan import DataConfig
from arisk.models.rows import raw_rows

__all__ = ["FLAGGED_FILE", "KEPT_FILE", "SplitRow", "split_rows"]

KEPT_FILE, FLAGGED_FILE = "kept.jsonl", "flagged.jsonl"

#: What is added to a row: its score, its rank from 1 and why it is flagged (empty where it is not).
SplitRow = Mapping[str, Any]


def split_rows(
    config: DataConfig, lines: Sequence[int], added: Sequence[SplitRow], flagged: frozenset[int], folder: Path
) -> tuple[int, int]:
    """Write every screened row once: to `kept.jsonl` or to `flagged.jsonl`, in the order of the source.

    Each object is that of the source with the added keys; values keep their types, text stays
    readable. Rows that `max_samples` left out are in neither file.

    Args:
        config: the data set.
        lines: (N,) line of every screened row.
        added: (N,) keys to add to every row.
        flagged: numbers of the flagged rows.
        folder: where the files go.

    Returns:
        Rows kept, rows flagged.

    Raises:
        InputError: the source no longer has a screened row.
        ArtifactError: the disk is full or the folder is read-only.
    """
    number = {line: j for j, line in enumerate(lines)}
    counts = [0, 0]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            (folder / KEPT_FILE).open("w", encoding="utf-8", newline="\n") as kept,
            (folder / FLAGGED_FILE).open("w", encoding="utf-8", newline="\n") as dropped,
        ):
            for line, raw in raw_rows(config, "finetune"):
                j = number.pop(line, None)
                if j is None:
                    continue
                drop = j in flagged
                counts[drop] += 1
                (dropped if drop else kept).write(_line({**raw, **added[j]}))
    except OSError as err:
        raise disk_error(err, folder) from err
    if number:
        raise InputError(
            f"{len(number)} screened rows are no longer in the data",
            where=f"finetune.path: {config.path}, line {min(number)}",
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
