"""Which stages are fresh, which are stale, and why: reasons as data, for `run` and `status` alike.

A stage's key is the sha256 of its ingredients: stage and format version, its slice of the config,
the seed, fingerprints of the files it reads, and the keys of the stages before it. A stage is fresh
when its manifest has that key and its files are what the manifest says. No torch, no timestamps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from arisk.base.artifacts import FORMAT_VERSION
from arisk.base.errors import ArtifactError, NewerFormatError
from arisk.engine.fingerprints import stage_key
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue, Stage

if TYPE_CHECKING:
    from arisk.config.plan import Config

__all__ = ["Reason", "StageState", "differences", "ingredients_of", "plan", "stage_key"]


@dataclass(frozen=True)
class Reason:
    """One thing that makes a stage stale.

    Attributes:
        kind: what changed.
        path: dotted path of the ingredient, or the stage or file concerned.
        old: its stored value; `new` its present one; None where there is none.
    """

    kind: Literal["missing", "config", "input", "upstream", "version", "seed", "damaged"]
    path: str
    old: Any = None
    new: Any = None

    def sentence(self) -> str:
        """The reason in words."""
        if self.kind == "missing":
            return "not run yet"
        if self.kind == "upstream":
            if self.new is None:
                return f"{self.path} is not fresh"
            return f"{self.path} was run again" if self.old else f"{self.path} has been run"
        if self.kind == "damaged":
            return f"{self.path}: {self.new}"
        if self.kind == "input":
            return f"the {self.path.split('.')[0]} files changed"
        if self.kind == "version":
            return f"arisk computes {self.path} differently now ({self.old} → {self.new})"
        return f"{self.path}: {_short(self.old)} → {_short(self.new)}"


@dataclass(frozen=True)
class StageState:
    """Whether a stage is fresh, with the reasons where it is not."""

    stage: str
    fresh: bool
    reasons: tuple[Reason, ...]
    key: str
    ingredients: Mapping[str, Any]


def ingredients_of(
    spec: Stage,
    config: Config,
    inputs: Mapping[str, Any],
    upstream: Mapping[str, str],
    shown: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything a stage is computed from.

    Args:
        spec: the stage.
        config: the resolved config.
        inputs: fingerprints by config section.
        upstream: keys of the stages before it.
        shown: optional stages that it includes.
    """
    values = config.model_dump(mode="json")
    taken = {dotted: _at(values, dotted) for dotted in spec.config}
    for name, section in taken.items():
        # Contents are fingerprinted: where a file lies changes nothing.
        if isinstance(section, dict) and "path" in section:
            section["path"] = inputs.get(name, {}).get("hub")
        if isinstance(section, dict) and isinstance(section.get("adapter"), dict):
            section["adapter"].pop("path", None)
    return {
        "stage": spec.name,
        "stage_version": spec.version,
        "format_version": FORMAT_VERSION,
        "seed": config.run.seed,
        "config": taken,
        "inputs": {name: inputs[name] for name in spec.inputs if name in inputs},
        "upstream": {name: upstream[name] for name in (*spec.upstream, *shown)},
    }


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    place: Any = values
    for part in dotted.split("."):
        place = place[part]
    return place


def plan(
    catalogue: Catalogue,
    config: Config,
    inputs: Mapping[str, Any],
    rundir: RunDir,
    *,
    asked: str | None = None,
    force: bool = False,
) -> list[StageState]:
    """State of every stage, in order.

    Args:
        catalogue: the stages.
        config: the resolved config.
        inputs: fingerprints of the files it names.
        rundir: the run directory; may not exist yet.
        asked: a stage that is asked for by name: an optional one must then reach as far as configured.
        force: that stage is to be run again, exactly as configured.

    Raises:
        NewerFormatError: a stage was written by a newer arisk.
    """
    states: list[StageState] = []
    keys: dict[str, str] = {}
    fresh: dict[str, bool] = {}
    for spec in catalogue:
        shown = [name for name in spec.shows if fresh[name]]
        ingredients = ingredients_of(spec, config, inputs, keys, shown)
        if not (force and spec.name == asked):
            ingredients = _as_far_as_stored(spec, ingredients, rundir, insist=spec.name == asked)
        key = stage_key(ingredients)
        reasons = tuple(_reasons(spec, key, ingredients, rundir, fresh))
        keys[spec.name], fresh[spec.name] = key, not reasons
        states.append(StageState(spec.name, not reasons, reasons, key, ingredients))
    return states


def _as_far_as_stored(
    spec: Stage, ingredients: dict[str, Any], rundir: RunDir, *, insist: bool
) -> dict[str, Any]:
    """The ingredients with the stored reach, where nothing else changed and that reach will do.

    None is the whole way. A stage that is insisted on must go at least as far as now wanted.
    """
    if spec.reach is None:
        return ingredients
    try:
        manifest = rundir.manifest(spec.name) or {}
    except ArtifactError:
        return ingredients
    wanted = ingredients["config"][spec.reach]
    reached = manifest.get("ingredients", {}).get("config", {}).get(spec.reach)
    if insist and reached is not None and (wanted is None or reached < wanted):
        return ingredients
    adopted = {**ingredients, "config": {**ingredients["config"], spec.reach: reached}}
    return adopted if stage_key(adopted) == manifest.get("key") else ingredients


def _reasons(
    spec: Stage, key: str, ingredients: Mapping[str, Any], rundir: RunDir, fresh: Mapping[str, bool]
) -> Iterator[Reason]:
    try:
        manifest = rundir.manifest(spec.name)
    except NewerFormatError:
        raise
    except ArtifactError as err:
        yield Reason("damaged", spec.name, new=err.what)
        return
    if manifest is None:
        yield Reason("missing", spec.name)
        return
    if manifest.get("key") != key:
        for reason in _changes(spec, manifest.get("ingredients", {}), ingredients):
            # A stage that would get another key has not been run with it: that it is not fresh comes below.
            if reason.kind != "upstream" or reason.path not in spec.upstream or fresh[reason.path]:
                yield reason
    try:
        rundir.verify(spec.name, deep=False)
    except ArtifactError as err:
        yield Reason("damaged", err.where, new=err.what)
    for name in spec.upstream:
        if not fresh[name]:
            yield Reason("upstream", name)


def _changes(spec: Stage, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Reason]:
    """What differs between stored and present ingredients, upstream keys left to the upstream."""
    found = False
    kinds: dict[str, Any] = {"config": "config", "inputs": "input", "seed": "seed", "upstream": "upstream"}
    for path, before, after in differences(old, new):
        top, _, rest = path.partition(".")
        found = True
        if top == "upstream":
            yield Reason("upstream", rest, before, after)
        else:
            yield Reason(kinds.get(top, "version"), rest or spec.name, before, after)
    if not found:
        yield Reason("damaged", spec.name, new="the key does not belong to the stored ingredients")


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of every leaf that differs; config keys contain dots of their own."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
