"""What `arisk screen` prints: the most harmful rows, what dropping them changes, and the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.base.tables import table

__all__ = ["screen_text"]

#: Rows of the terminal's table, and characters of a row's text there.
SHOWN, WIDTH = 12, 60


def screen_text(outcome: Any) -> str:
    """The most harmful rows, what dropping them changes, and the files; the report's path comes last."""
    found = outcome.found
    lines = [found["sentence"], "", table(*_rows(found)), ""]
    lines += [f"finding: {sentence}" for sentence in found["findings"]]
    lines += [f"caveat: {sentence}" for sentence in found["warnings"]]
    files = [str(outcome.folder / name) for name in found["files"]]
    lines += [f"files: {', '.join(files)}" if files else f"no files: {found['files_missing']}"]
    return "\n".join([*lines, outcome.last_line])


def _rows(found: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    header = ["rank", "row", "flagged", "score", "safety", "control", "p", "text"]
    rows = [
        [
            str(row["rank"]),
            str(row.get("line", row["row"])),
            "yes" if row["flagged"] else "no",
            _signed(row["score"]),
            _signed(row["first_order"]),
            _signed(row["control_order"]),
            "not measured" if row["p_value"] is None else f"{row['p_value']:.1e}",
            _short(f"{row.get('prompt', '')} → {row.get('response', '')}" if "prompt" in row else ""),
        ]
        for row in found["examples"][:SHOWN]
    ]
    return rows, header


def _signed(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.3g}"


def _short(text: str) -> str:
    flat = "".join(c if c.isprintable() else " " for c in text)
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
