"""What becomes of every line of an imported file: the records, and the rules that fill them.

A family of files (`arisk.config.imports`) is mostly a table from its keys to rules. A rule says into which
setting a value goes, or why it goes nowhere; a key without a rule is listed as unknown. Nothing is
dropped in silence: `Account.rest` sees to what no rule has touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from arisk.base.errors import ConfigError
from arisk.config.yaml import shortened

__all__ = [
    "Account",
    "Import",
    "Line",
    "Outcome",
    "Rule",
    "Source",
    "idle",
    "mapping_of",
    "number",
    "other",
    "taken",
    "text",
    "truth",
    "whole",
]

#: No setting of a training is larger.
LARGEST_NUMBER = 1e15
#: taken: into a setting as it is · computed: into one that follows from it · assumed: not in the file, its
#: tool's default · idle: nothing that is trained depends on it · other: not modelled, the run may differ ·
#: unknown: no rule for the key.
Outcome = Literal["taken", "computed", "assumed", "idle", "other", "unknown"]


@dataclass(frozen=True)
class Source:
    """An imported file.

    Attributes:
        name: as the user gave it.
        mapping: what it holds.
        lines: line of each dotted key, counted from 1; keys that a JSON on one line holds share it.
    """

    name: str
    mapping: Mapping[str, Any]
    lines: Mapping[str, int]

    def place(self, key: str) -> str:
        """File, line and key, for messages."""
        number_of = self.lines.get(key)
        return f"{self.name}, line {number_of}: {key}" if number_of else f"{self.name}: {key}"


@dataclass(frozen=True)
class Line:
    """One key of an imported file, or one default of its tool, and what became of it.

    Attributes:
        source: the file. number: its line, where known. key: dotted. value: as text, shortened.
        outcome: see `Outcome`.
        note: the setting it went into with its value, or why it went nowhere and what that may change.
    """

    source: str
    number: int | None
    key: str
    value: str
    outcome: Outcome
    note: str


@dataclass
class Import:
    """The plan so far, and the account of every line.

    Attributes:
        plan: dotted key of arisk's config → value.
        origin: dotted key → the place that set it.
        lines: one entry per key of every file, in their order.
        kinds: what each file was taken for.
        devices: processes that train side by side; each takes its own rows of a step.
    """

    plan: dict[str, Any] = field(default_factory=dict[str, Any])
    origin: dict[str, str] = field(default_factory=dict[str, str])
    lines: list[Line] = field(default_factory=list[Line])
    kinds: list[str] = field(default_factory=list[str])
    devices: int = 1


@dataclass(frozen=True)
class Rule:
    """What to do with one key.

    Attributes:
        outcome: taken, idle or other.
        target: dotted key of arisk's config, for taken.
        read: the value as the target takes it; it raises ValueError for one that is none.
        why: for idle and other.
        off: values that switch the key off: null, false, zero and nothing among them always.
    """

    outcome: Outcome
    target: str = ""
    read: Callable[[Any], Any] = lambda value: value
    why: str = ""
    off: tuple[Any, ...] = ()


def taken(target: str, read: Callable[[Any], Any] = lambda value: value) -> Rule:
    """A rule: the value goes into a setting."""
    return Rule("taken", target, read)


def idle(why: str) -> Rule:
    """A rule: nothing that is trained depends on the key."""
    return Rule("idle", why=why)


def other(why: str, *off: Any) -> Rule:
    """A rule: where it is switched on, the run differs from the forecast one, as `why` says."""
    return Rule("other", why=why, off=off)


class Account:
    """One file being read into an `Import`."""

    def __init__(self, source: Source, into: Import) -> None:
        self.source, self.into = source, into
        self.seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.raw(key) is not None

    def raw(self, key: str) -> Any:
        """The value at a dotted key as it stands; None where there is none."""
        here: Any = self.source.mapping
        for part in key.split("."):
            here = here.get(part) if isinstance(here, Mapping) else None
        return here

    def section(self, key: str) -> Mapping[str, Any]:
        """The mapping at a dotted key; an empty one where there is none."""
        value = self.raw(key)
        return {str(name): each for name, each in value.items()} if isinstance(value, Mapping) else {}

    def several(self, key: str) -> list[Any]:
        """The list at a dotted key; one value is a list of one, none an empty list."""
        value = self.raw(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    def read(self, key: str, read: Callable[[Any], Any]) -> Any:
        """The value at a dotted key, read; None where there is none.

        Raises:
            ConfigError: it cannot be read so.
        """
        value = self.raw(key)
        if value is None:
            return None
        try:
            return read(value)
        except ValueError as err:
            raise ConfigError(
                f"{shortened(str(err))} (given: {shortened(repr(value))})",
                where=self.source.place(key),
                fix="correct the value in that file",
            ) from err

    def note(self, key: str, outcome: Outcome, note: str) -> None:
        """Account for a key, and for all that lies below it."""
        self.seen.add(key)
        shown = shortened(_shown(self.raw(key)), 60) if outcome != "assumed" else ""
        self.into.lines.append(
            Line(self.source.name, self.source.lines.get(key), key, shown, outcome, shortened(note, 400))
        )

    def take(self, key: str, target: str, value: Any, *, note: str = "", computed: bool = False) -> None:
        """Put a value into the plan, and account for its key.

        Raises:
            ConfigError: another line has put a different value there.
        """
        self.put(target, value, self.source.place(key))
        outcome: Outcome = "computed" if computed else "taken"
        said = f"{target}: {shortened(_shown(value), 60)}"
        self.note(key, outcome, f"{said} ({note})" if note else said)

    def put(self, target: str, value: Any, place: str) -> None:
        """Put a value into the plan.

        Raises:
            ConfigError: another line has put a different value there.
        """
        plan, origin = self.into.plan, self.into.origin
        if target in plan and plan[target] != value and not origin[target].startswith("assumed"):
            both = f"{shortened(_shown(plan[target]))} and {shortened(_shown(value))}"
            raise ConfigError(
                f"`{target}` is given twice: {both}",
                where=f"{origin[target]} and {place}",
                fix="take one of them out, or import the files that belong to one run",
            )
        plan[target], origin[target] = value, place

    def assume(self, target: str, value: Any, why: str) -> None:
        """Put a default of the tool into the plan where no line says otherwise."""
        if target in self.into.plan:
            return
        self.into.plan[target], self.into.origin[target] = value, f"assumed for {self.source.name}"
        self.into.lines.append(
            Line(
                self.source.name, None, "", "", "assumed", f"{target}: {shortened(_shown(value), 60)} ({why})"
            )
        )

    def idle(self, keys: Iterable[str], why: str) -> None:
        """Account for those of the keys that the file has and nothing has dealt with: they change nothing."""
        for key in keys:
            if self._has(key) and key not in self.seen:
                self.note(key, "idle", "not set" if self.raw(key) is None else why)

    def apply(self, table: Mapping[str, Rule], prefix: str = "") -> None:
        """Account for every key of the file that the table has a rule for and nothing has dealt with yet."""
        for key, rule in table.items():
            dotted = prefix + key
            if self._has(dotted) and dotted not in self.seen:
                self._apply(dotted, rule)

    def _has(self, key: str) -> bool:
        parent, _, last = key.rpartition(".")
        inside = self.raw(parent) if parent else self.source.mapping
        return isinstance(inside, Mapping) and last in inside

    def _apply(self, key: str, rule: Rule) -> None:
        value = self.raw(key)
        if _is_off(value, rule.off):
            self.note(key, "idle", "switched off" if rule.outcome == "other" else rule.why or "not set")
        elif rule.outcome == "taken":
            self.take(key, rule.target, self.read(key, rule.read))
        else:
            self.note(key, rule.outcome, rule.why)

    def rest(self) -> None:
        """Account for every key that nothing has dealt with: they are unknown."""
        for key in self._leaves(self.source.mapping, ""):
            parts = key.split(".")
            if any(".".join(parts[: i + 1]) in self.seen for i in range(len(parts))):
                continue
            if _is_off(self.raw(key), ()):
                self.note(key, "idle", "not set")
            else:
                self.note(
                    key, "unknown", "arisk does not know this key; whether the run depends on it is open"
                )

    def _leaves(self, mapping: Mapping[Any, Any], prefix: str) -> Iterator[str]:
        for key, value in mapping.items():
            dotted = f"{prefix}{key}"
            partly = any(seen.startswith(f"{dotted}.") for seen in self.seen)
            if isinstance(value, Mapping) and value and partly:
                yield from self._leaves(value, f"{dotted}.")
            else:
                yield dotted


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    """Whether a value switches its key off; a number 0 for a rule that is taken is a value all the same."""
    if value is None or value in ("", [], {}):
        return True
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in off)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def number(value: Any) -> float:
    """A number, also one written as text (PyYAML takes `2e-5` for text)."""
    if isinstance(value, (bool, list, dict)):
        raise ValueError("this is to be a number")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as err:
        raise ValueError("this is to be a number") from err
    if not math.isfinite(found) or abs(found) > LARGEST_NUMBER:
        raise ValueError("this is to be a finite number of a common size")
    return found


def whole(value: Any) -> int:
    """A whole number; `3.0` and "3" are one."""
    found = number(value)
    if found != int(found):
        raise ValueError("this is to be a whole number")
    return int(found)


def truth(value: Any) -> bool:
    """True or false, also as text."""
    known = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    if isinstance(value, bool):
        return value
    if str(value).lower() in known:
        return known[str(value).lower()]
    raise ValueError("this is to be true or false")


def text(value: Any) -> str:
    """One text."""
    if isinstance(value, (bool, list, dict)) or value is None:
        raise ValueError("this is to be one text")
    return str(value)


def mapping_of(value: Any) -> dict[str, Any]:
    """A mapping, also as JSON text or as `key=value,…`."""
    if isinstance(value, Mapping):
        return {str(key): each for key, each in value.items()}
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                found = json.loads(value)
            except (ValueError, RecursionError) as err:
                raise ValueError("this is to be a mapping") from err
            if isinstance(found, dict):
                return found
        elif all("=" in part for part in value.split(",")):
            pairs = (part.split("=", 1) for part in value.split(","))
            return {key.strip(): _scalar(each.strip()) for key, each in pairs}
    raise ValueError("this is to be a mapping")


def _scalar(given: str) -> Any:
    for read in (whole, number, truth):
        try:
            return read(given)
        except ValueError:
            continue
    return given
