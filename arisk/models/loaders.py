"""Loaders as people have them, read so that nothing outside notices and every reading is the same.

A shuffling `DataLoader` draws from torch's global random state, and gives another order each time it
is read; augmentation may draw from numpy's or Python's. Here loaders see a random state of their own,
the same for every reading, and the global ones are what they were.

A caller's loss function, refused with one clear error where it returns no loss.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arisk.base.errors import InputError, ShapeError
from arisk.base.task import Batch, LossFn
from arisk.gradients import batch_size, slice_batch

__all__ = ["SteadyLoader", "checked_loss", "keeping_random_state", "kept", "taken"]


def _states() -> tuple[Any, ...]:
    """Random states of torch's CPU, Python and, where it is loaded, numpy."""
    numpy: Any = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None


def _restore(states: tuple[Any, ...]) -> None:
    numpy: Any = sys.modules.get("numpy")
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if numpy and states[2] is not None:
        numpy.random.set_state(states[2])


@contextmanager
def keeping_random_state() -> Generator[None]:
    """Inside, anything may be drawn; afterwards the global random states are what they were."""
    before = _states()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            _restore(before)


class SteadyLoader:
    """A loader that gives the same batches at every reading, and draws from no global random state.

    Args:
        loader: anything that can be read from its start more than once.
        seed: seed of the random state it sees.
    """

    def __init__(self, loader: Iterable[Batch], seed: int) -> None:
        self.loader = loader
        self.seed = seed
        self._generators = _generators(loader)

    @property
    def per_epoch(self) -> int | None:
        """Batches of one reading; None where the loader does not know."""
        try:
            return len(self.loader)  # pyright: ignore[reportArgumentType] - asked, not known
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Batch]:
        own: tuple[Any, ...] | None = None
        batches: Iterator[Batch] | None = None
        while True:
            outside, theirs = _states(), self._generator_states()
            try:
                if own is None:
                    self._seed()
                else:
                    _restore(own[0])
                    self._put_back(own[1])
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches, None)
                own = _states(), self._generator_states()
            finally:
                _restore(outside)
                self._put_back(theirs)
            if batch is None:
                return
            yield batch

    def _generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _put_back(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def _seed(self) -> None:
        # Only the CPU's generator, which `_restore` puts back; `manual_seed` would seed devices too.
        torch.default_generator.manual_seed(self.seed)
        random.seed(self.seed)
        numpy: Any = sys.modules.get("numpy")
        if numpy:
            numpy.random.seed(self.seed % 2**32)  # it takes 32 bits


def _generators(loader: Any) -> list[torch.Generator]:
    """Generators that a `DataLoader` or its samplers were given by the caller."""
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    distinct = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(distinct.values())


def taken(
    loader: Iterable[Batch],
    name: str,
    *,
    samples: int | None = None,
    batches: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """The first batches of a loader, read once.

    Args:
        loader: batches.
        name: name of the data set, for messages.
        samples: stop after so many samples, inside a batch if need be; default all.
        batches: stop after so many batches; default all.
        seed: of the random state the loader sees.

    Raises:
        InputError: it gives no batch, or cannot be iterated.
    """
    found: list[Batch] = []
    seen = 0
    for batch in itertools.islice(SteadyLoader(_iterable(loader, name), seed), batches):
        size = batch_size(batch)
        wanted = size if samples is None else min(size, samples - seen)
        if wanted:
            found.append(batch if wanted == size else slice_batch(batch, 0, wanted))
        seen += wanted
        if samples is not None and seen >= samples:
            break
    if not found:
        raise InputError(
            f"the {name} loader gives no batch",
            where=f"{name}_dataloader",
            fix="give at least one batch (an iterator that was read before is empty: pass the loader itself)",
        )
    return found


def kept(loader: Iterable[Batch], name: str, count: int, seed: int) -> Iterable[Batch]:
    """A loader to be read many times: itself, made steady, or the first `count` batches of an iterator.

    Args:
        loader: batches; a sequence is taken as it is.
        name: name of the data set, for messages.
        count: batches needed where it can be read only once.
        seed: of the random state it sees.

    Raises:
        InputError: it gives no batch, or cannot be iterated.
    """
    if isinstance(loader, Iterator):
        return taken(loader, name, batches=count, seed=seed)
    if hasattr(_iterable(loader, name), "__getitem__") and hasattr(loader, "__len__"):
        return taken(loader, name, batches=1, seed=seed) and loader
    taken(loader, name, batches=1, seed=seed)
    return SteadyLoader(loader, seed)


def _iterable(loader: Any, name: str) -> Iterable[Batch]:
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise InputError(
            f"the {name} loader is a {type(loader).__name__}, which cannot be iterated",
            where=f"{name}_dataloader",
            fix="pass a DataLoader or a list of batches",
        )
    return loader


def checked_loss(loss_fn: LossFn, name: str) -> LossFn:
    """The same function; what it returns must be a scalar or one loss per sample.

    Args:
        loss_fn: `(model, batch)` → per-sample losses (B,), or their mean as a scalar.
        name: its argument's name, for messages.

    Raises:
        InputError: it cannot be called, or (when called) returns no tensor.
        ShapeError: (when called) the tensor has another shape.
    """
    if not callable(loss_fn):
        raise InputError(
            f"the loss function is a {type(loss_fn).__name__}, which cannot be called",
            where=name,
            fix="pass a function of (model, batch)",
        )

    def checked(model: nn.Module, batch: Batch) -> Tensor:
        found: Any = loss_fn(model, batch)
        if not isinstance(found, Tensor):
            raise InputError(
                f"the loss function returned a {type(found).__name__}, not a tensor",
                where=name,
                fix="return per-sample losses (B,) or their mean, with their graph (no `.item()`)",
            )
        if found.ndim > 1 or (found.ndim == 1 and len(found) not in (1, batch_size(batch))):
            raise ShapeError(
                f"the loss has shape {tuple(found.shape)} for a batch of {batch_size(batch)}",
                where=name,
                fix="return per-sample losses (B,) or their mean as a scalar",
            )
        return found

    return checked
