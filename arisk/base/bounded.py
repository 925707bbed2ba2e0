"""Work whose end nobody can promise, such as a foreign template: done in a child under limits.

The child is a fork that runs plain Python and answers with JSON; its processor time and its memory are
limited by the system, so a loop inside an expression ends as surely as one between them. Where there is
no fork (Windows) the work is done in this process, without limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["LimitReachedError", "bounded"]

#: Wall-clock seconds allowed per second of processor time, on a machine with other work, and on top.
PATIENCE, GRACE = 10, 30
#: Exit codes of the child.
DONE, OUT_OF_MEMORY, FAILED = 0, 3, 4


class LimitReachedError(Exception):
    """The work took more time or memory than it may; the message says which."""


def bounded(work: Callable[[], Any], *, seconds: int, memory: int = 1 << 31) -> Any:
    """What `work` returns, or an error once it has used up its limits.

    Args:
        work: returns plain values (they come back through JSON); it must not use torch or start threads,
            which a fork does not have.
        seconds: processor time.
        memory: bytes that it may allocate beyond what this process has (Linux alone counts them).

    Raises:
        LimitReachedError: it took longer, or wanted more memory.
        RuntimeError: it failed otherwise; the message is its own.
    """
    if not hasattr(os, "fork"):
        return work()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn of forks beside threads; this one takes no lock that a thread may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _work_in_child(work, writing, seconds, memory)
    os.close(writing)
    try:
        answer = _answer(reading, time.monotonic() + seconds * PATIENCE + GRACE)
    finally:
        os.close(reading)
        # Dead already, unless this process was interrupted or the answer was too late.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return _read(answer, status, seconds)


def _answer(reading: int, deadline: float) -> bytes | None:
    """All the child writes; None where it is not done in time."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reading, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _read(answer: bytes | None, status: int, seconds: int) -> Any:
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OUT_OF_MEMORY:
        raise LimitReachedError("it wants more memory than it may have")
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    if answer is None or (not answer and late):
        raise LimitReachedError(f"it does not end within {seconds} s")
    try:
        kind, value = json.loads(answer)
    except ValueError as err:
        raise RuntimeError("it ends without an answer") from err
    if kind == "failed":
        raise RuntimeError(value)
    return value


def _work_in_child(work: Callable[[], Any], writing: int, seconds: int, memory: int) -> NoReturn:
    """Do the work, write the answer and leave without the clean-up that belongs to the parent."""
    code = FAILED
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        _limit(seconds, memory)
        try:
            answer = json.dumps(["done", work()])
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, AttributeError) as err:
            answer = json.dumps(["failed", f"{type(err).__name__}: {err}"])
        with os.fdopen(writing, "wb") as file:
            file.write(answer.encode())
        code = DONE
    except MemoryError:
        code = OUT_OF_MEMORY
    finally:
        os._exit(code)


def _limit(seconds: int, memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform == "linux" and Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
