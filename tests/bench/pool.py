"""Several processes share a list of work through files: each does what none has begun, where it can be done.

Every process is given the same list in the same order. What a process begins it claims by a file, so that no
other does it too; what fails stays claimed, and its traceback stands beside the claim.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds before a process looks again, where nothing can be begun yet.
PAUSE = 0.5


@dataclass(frozen=True)
class Item:
    """One piece of work.

    Attributes:
        name: unique; names the claim.
        group: items of one group share what is loaded for them.
        make: does it.
        done: whether it is done.
        ready: whether what it needs is there.
    """

    name: str
    group: str
    make: Callable[[], object]
    done: Callable[[], bool]
    ready: Callable[[], bool] = lambda: True


def share(items: Sequence[Item], claims: Path, *, first: str = "", late: Callable[[], bool]) -> None:
    """Do items until none is left that this process could begin; those of the group at hand come first.

    Args:
        items: all of them, the same for every process.
        claims: folder of claims.
        first: the group to begin with.
        late: whether nothing may be begun any more.
    """
    claims.mkdir(parents=True, exist_ok=True)
    group = first
    while not late():
        left = [i for i in items if not (claims / i.name).exists() and not i.done()]
        if not left:
            return
        ready = sorted((i for i in left if i.ready()), key=lambda i: i.group != group)
        chosen = next((i for i in ready if _claimed(claims / i.name)), None)
        if chosen is None:
            time.sleep(PAUSE)
            continue
        group, started = chosen.group, time.perf_counter()
        try:
            chosen.make()
        except Exception:  # noqa: BLE001
            (claims / f"{chosen.name}.failed").write_text(traceback.format_exc(), encoding="utf-8")
            print(f"{time.strftime('%H:%M:%S')} FAILED {chosen.name}", traceback.format_exc(), flush=True)
            continue
        print(f"{time.strftime('%H:%M:%S')} {time.perf_counter() - started:.1f} s {chosen.name}", flush=True)


def _claimed(path: Path) -> bool:
    """Claim it; False where another process was first."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
