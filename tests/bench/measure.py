"""CPU seconds and peak memory of a piece of work, in this process or in one of its own."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_own_process(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of the work and the peak resident memory of a fresh process that did it (GB)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, args))


def _measured(work: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, float]:
    result = work(*args)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, as it stands in `tests/bench/README.md`."""
    print(f"\n### {title}\n\n{markdown_table(header, rows)}", end="")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a Markdown table, each with its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
