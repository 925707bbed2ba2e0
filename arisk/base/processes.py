"""Several processes at one run: who does which share of the work, and how the results come together.

Started by `torchrun`, every process runs the same command on the same run directory. Work that is a
sum or a list over batches is shared out; everything else every rank does for itself, from numbers
that are the same to the bit, so that no rank takes another turn. With one process nothing here does
anything. Collectives carry losses, inner products and vectors of the size of the parameters, on the
CPU through gloo whatever device the model is on. No torch is imported before there is a group.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from arisk.base.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "alone",
    "barrier",
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

#: Ranks that joined; (0, 1) until `join` found others. Never read from torch: a training script that
#: has a group of its own may call arisk from one of its ranks.
_place = (0, 1)


def join() -> None:
    """Meet the other processes that torchrun started; nothing where there are none, or again."""
    global _place  # noqa: PLW0603 - one process has one place
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _place[1] > 1 or "RANK" not in os.environ:
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
    return _place[0] == 0 if world() > 1 else os.environ.get("RANK", "0") == "0"


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
