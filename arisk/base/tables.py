"""Plain text tables, readable at 80 columns and in a pipe."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from arisk.base.terminal import columns, wrapped

__all__ = ["fitted", "said", "table"]


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, width: int | None = None) -> str:
    """A plain aligned table.

    Args:
        rows: the cells; an empty tail of a row leaves its last text free to run to the right.
        header: names of the columns.
        width: columns of the terminal, to which the last text of a row is wrapped; None: no wrapping.
    """
    filled = [_without_tail(row) for row in [header, *rows]]
    sizes = [max((len(r[i]) for r in filled if i < len(r) - 1), default=0) for i in range(len(header))]
    sizes = [max(size, len(name)) for size, name in zip(sizes, header, strict=True)]
    full = [row[-1] for row in filled if len(row) == len(header)]
    sizes[-1] = max([len(header[-1]), *map(len, full)])
    if width is not None:
        sizes[-1] = max(len(header[-1]), min(sizes[-1], width - sum(sizes[:-1]) - 2 * len(header) + 2))
    lines = [line for row in filled for line in _row_lines(row, sizes, width)]
    lines.insert(1, "  ".join("-" * size for size in sizes))
    return "\n".join(lines)


def _without_tail(row: Sequence[str]) -> list[str]:
    """The cells up to the last one that is not empty."""
    cells = list(row)
    while len(cells) > 1 and not cells[-1]:
        cells.pop()
    return cells


def _row_lines(row: Sequence[str], sizes: Sequence[int], width: int | None) -> list[str]:
    """One row, its last text wrapped below itself."""
    start = "".join(cell.ljust(size) + "  " for cell, size in zip(row[:-1], sizes, strict=False))
    if width is None or len(start) + len(row[-1]) <= width:
        return [(start + row[-1]).rstrip()]
    room = max(16, width - len(start))
    parts = textwrap.wrap(row[-1], room, break_on_hyphens=False, break_long_words=False)
    return [(start + part if i == 0 else " " * len(start) + part).rstrip() for i, part in enumerate(parts)]


def fitted(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """The table wrapped to the terminal; as wide as it is in a pipe."""
    return table(rows, header, width=columns(sys.stdout) - 1 if sys.stdout.isatty() else None)


def said(text: str, indent: str = "") -> str:
    """A sentence wrapped to the terminal, its later lines indented; one line in a pipe."""
    return wrapped(text, sys.stdout, indent=indent)
