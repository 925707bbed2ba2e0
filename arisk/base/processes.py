"""Several processes at one run: who does which share of the work, and how the results come together.

Started by `torchrun`, every process runs the same command on the same run directory. Work that is a sum or
a list over batches is shared out; everything else every rank does for itself, from numbers that are the
same to the bit, so that no rank takes another turn. With one process nothing here does anything.
Collectives carry losses, inner products and vectors of the size of the parameters, on the CPU through gloo
whatever device the model is on. No torch is imported before there is a group.

Work whose end nobody can promise, such as a foreign template, is done in a child under limits: a fork that
runs plain Python and answers with JSON, with its processor time and its memory bounded. Where there is no
fork (Windows) the work is done in this process, without limits.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from arisk.base.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LimitReachedError",
    "alone",
    "barrier",
    "bounded",
    "from_first",
    "gathered",
    "is_first",
    "join",
    "local_rank",
    "local_world",
    "rank",
    "share",
    "summed",
    "world",
]

T = TypeVar("T")

#: Numbers of processes are shorter than this.
DIGITS = 9
#: Ranks that joined; (0, 1) until `join` found others. Never read from torch: a training script that
#: has a group of its own may call arisk from one of its ranks.
_place = (0, 1)


def _told() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun tells; (0, 1) where it told nothing sound.

    Schedulers leave a `RANK` or a `WORLD_SIZE` behind where nobody started several processes of this program.
    """
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(text.isascii() and text.isdigit() and len(text) < DIGITS for text in given):
        return 0, 1
    number, count = map(int, given)
    return (number, count) if number < count else (0, 1)


def join() -> None:
    """Meet the other processes that torchrun started; nothing where there are none, or again."""
    global _place  # noqa: PLW0603 - one process has one place
    if _place[1] > 1 or _told()[1] == 1:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    atexit.register(_leave)
    _place = (dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes that work on this run."""
    return _place[1]


def rank() -> int:
    """Number of this process, from 0."""
    return _place[0]


def is_first() -> bool:
    """Whether this process is the one that plans, writes and speaks; true before `join` only of it."""
    return (_place[0] if world() > 1 else _told()[0]) == 0


def local_rank() -> int:
    """Number of this process on its machine, which chooses its device."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def local_world() -> int:
    """Number of processes of this run on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def share(count: int) -> range:
    """This rank's part of 0 … count − 1; together the ranks have each number once."""
    return range(_place[0], count, _place[1])


@contextmanager
def alone() -> Generator[None]:
    """Inside, this process works as if there were no other: for work that one of them does for all."""
    global _place  # noqa: PLW0603 - see `join`
    kept, _place = _place, (0, 1)
    try:
        yield
    finally:
        _place = kept


@contextmanager
def _together() -> Generator[None]:
    """A collective; one that cannot be finished is told as what it means.

    Raises:
        ArtifactError: another process is gone.
    """
    try:
        yield
    except RuntimeError as err:
        raise ArtifactError(
            f"another process of this run has stopped: {str(err).splitlines()[0]}",
            where=f"process {rank()} of {world()}",
            fix="look at its own message above; what was finished is kept, so run the same command again",
        ) from err


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        import torch.distributed as dist

        with _together():
            dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank; the value must be picklable."""
    if world() == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [make() if is_first() else None]
    with _together():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(parts: Sequence[T], count: int) -> list[T]:
    """The parts of all ranks in order of their number.

    Args:
        parts: those of this rank, for the numbers in `share(count)`.
        count: how many there are over all ranks.
    """
    if world() == 1:
        return list(parts)
    import torch.distributed as dist

    everyone: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(everyone, list(parts))
    return [everyone[number % world()][number // world()] for number in range(count)]


def summed(tensor: Tensor) -> Tensor:
    """Sum over ranks, the same to the bit on each; on the tensor's own device and in its dtype."""
    if world() == 1:
        return tensor
    import torch.distributed as dist

    total = tensor.detach().to("cpu").contiguous()
    if total.data_ptr() == tensor.data_ptr():
        total = total.clone()
    with _together():
        dist.all_reduce(total)
    return total.to(tensor.device)


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
