"""How long work reports on itself: one callback, given by whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

#: ``progress(label, done, total)``; called with ``done == 0`` first and ``done == total`` last.
Progress = Callable[[str, int, int], None]


def silent(label: str, done: int, total: int) -> None:
    """Report nothing."""
