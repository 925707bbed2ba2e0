"""Names of optimizers and schedules that a plan may use.

What each is stands in the tables of `arisk.training`, which hold these names and add to them; the names alone
are here so that a misspelt one is told with all other mistakes of a config, before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, MutableMapping
from typing import TypeVar

__all__ = ["METHODS", "OPTIMIZERS", "SCHEDULES", "Table", "known_method", "known_optimizer", "known_schedule"]

Entry = TypeVar("Entry")

#: Names of optimizers: arisk's own, and transformers' `optim` where they mean one of them.
OPTIMIZERS = [
    *("adamw", "sgd", "adafactor", "lion", "muon", "rmsprop"),
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "lion_32bit"),
    *("paged_adamw_32bit", "paged_lion_32bit", "adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"),
    *("adamw_torch_4bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "galore_adamw"),
    *("galore_adamw_8bit", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    *("galore_adafactor", "galore_adafactor_layerwise"),
]

#: Names of schedules, those of transformers' `lr_scheduler_type`.
SCHEDULES = [
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"),
    *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt"),
    "warmup_stable_decay",
]
#: Names of the methods that `arisk guard` compares.
METHODS = ["plain", "alignguard", "ewc", "projection", "replay"]
#: Names of the ways to estimate a row's score before the exact ones.
ROW_SCORES = ["differences", "sketch"]
#: Schedules of transformers that no plan can tell beforehand.
MEASURED = ("reduce_lr_on_plateau", "greedy")


class Table(MutableMapping[str, Entry]):
    """A table by name whose further entries are known to configs as well.

    Args:
        names: the list of names that configs are held against.
        entries: what they are.
    """

    def __init__(self, names: list[str], entries: dict[str, Entry]) -> None:
        self._names, self._entries = names, dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry
        if name not in self._names:
            self._names.append(name)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._names.remove(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def known_optimizer(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is none.
    """
    return _known(name, OPTIMIZERS, "an optimizer")


def known_schedule(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is none, or the schedule follows losses that no plan can tell.
    """
    if name in MEASURED:
        raise ValueError(
            f"`{name}` follows losses that are measured on the way, so no plan can tell it: give the "
            "schedule you expect, such as `constant` or `linear`"
        )
    return _known(name, SCHEDULES, "a schedule")


def known_method(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is none.
    """
    return _known(name, METHODS, "a method of protection")


def known_row_score(name: str) -> str:
    """The name, if it is one; `auto` and `exact` are none of the table and always known.

    Raises:
        ValueError: it is none.
    """
    return _known(name, ["auto", "exact", *ROW_SCORES], "a way to score rows")


def _known(name: str, names: list[str], what: str) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(names)}"
    raise ValueError(f"'{name}' is not the name of {what}; {meant}")
