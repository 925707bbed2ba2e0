"""Which stages are fresh, which are stale, and why: reasons as data, for `run` and `status` alike.

A stage's key is the sha256 of its ingredients: stage and format version, its slice of the config, the seed,
fingerprints of the files it reads, and the keys of the stages before it. A stage is fresh when its manifest
has that key and its files are what the manifest says. No torch, no timestamps.

A committed stage may be taken from another run directory instead of being computed again: keys are made of
contents, so equal keys mean equal inputs, settings and version, wherever the run lives. The source is only
read, and needs no lock: commits are atomic, and every file is checked against the source's manifest after
it was brought over, so a source that is damaged, or changes meanwhile, is not taken. Files are hard links
where the file system has them (nothing in a run directory is ever written in place), else copies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arisk.base.artifacts import CONFIG_FILE, FORMAT_VERSION, WORKSPACES, disk_error
from arisk.base.errors import ArtifactError, NewerFormatError
from arisk.base.terminal import table
from arisk.engine.fingerprints import DigestCache, file_digest, input_fingerprints, stage_key
from arisk.engine.rundir import RunDir, remove_tree
from arisk.engine.stage import Catalogue, Stage

if TYPE_CHECKING:
    from arisk.config.plan import Config

__all__ = [
    "Reason",
    "StageState",
    "check_run_dir",
    "describe",
    "differences",
    "ingredients_of",
    "made_from",
    "plan",
    "stage_key",
    "status_rows",
    "take",
]


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
                return f"{self.path} is not up to date"
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
    also = () if spec.config_also is None else spec.config_also(config)
    taken = {dotted: _at(values, dotted) for dotted in (*spec.config, *also)}
    for name, section in taken.items():
        # Contents are fingerprinted: where a file lies changes nothing.
        if isinstance(section, dict) and "path" in section:
            section["path"] = inputs.get(name, {}).get("hub")
        if name == "probes" and isinstance(section, dict):
            for probe, settings in section.items():
                settings["path"] = inputs.get(name, {}).get(probe, {}).get("hub")
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
    states: dict[str, StageState] = {}
    keys: dict[str, str] = {}
    fresh: dict[str, bool] = {}
    for spec in map(catalogue.get, catalogue.ordered(catalogue.names)):
        shown = [name for name in spec.shows if fresh[name]]
        settled = None if spec.settled is None else spec.settled(config, rundir)
        ingredients = ingredients_of(spec, settled or config, inputs, keys, shown)
        if not (force and spec.name == asked):
            ingredients = _as_far_as_stored(spec, ingredients, rundir, insist=spec.name == asked)
        key = stage_key(ingredients)
        reasons = tuple(_reasons(spec, key, ingredients, rundir, fresh))
        keys[spec.name], fresh[spec.name] = key, not reasons
        states[spec.name] = StageState(spec.name, not reasons, reasons, key, ingredients)
    return [states[name] for name in catalogue.names]


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
            # A stage that would get another key has not been run with it: that it is out of date comes below.
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


def check_run_dir(path: Path) -> None:
    """Refuse what is no run directory.

    Raises:
        ArtifactError: it does not exist, is a file, a stage's folder, or holds no run.
    """
    fix = "give the folder that `arisk run CONFIG --run-dir FOLDER` wrote, or a YAML config"
    if not path.exists():
        raise ArtifactError("there is no such run directory or config", where=str(path), fix=fix)
    if (path / CONFIG_FILE).exists():
        return
    if (path / "manifest.json").exists():
        what, fix = f"this is the stage {path.name} of a run, not a run", f"give {path.parent}"
    else:
        what = "this is not a run directory: it has no config.yaml"
    raise ArtifactError(what, where=str(path), fix=fix)


def made_from(rundir: RunDir, spec: Stage, *, reads: Sequence[str] = ()) -> dict[str, Any]:
    """What a committed, undamaged stage of this version of arisk was made from, for a reader of its files.

    Args:
        rundir: where it lies.
        spec: the stage.
        reads: stages before it that are still those it was made from, as far as it read them.

    Raises:
        ArtifactError: there is none, it is damaged or of another version, or one of `reads` is another now.
    """
    run = rundir.path
    if not run.is_dir():
        raise ArtifactError(
            "this is a file, not a run directory" if run.exists() else "the run directory does not exist",
            where=str(run),
            fix="give the folder that `arisk run CONFIG --run-dir FOLDER` wrote",
        )
    manifest, again = rundir.manifest(spec.name), f"run `arisk run {run}`"
    if manifest is None:
        known = (run / CONFIG_FILE).exists()
        what = f"the stage {spec.name} has not been run here" if known else "this is not a run directory"
        raise ArtifactError(what, where=str(run), fix=again if known else "give the folder of a finished run")
    made: dict[str, Any] = manifest["ingredients"]
    old = made.get("stage_version")
    if old != spec.version or not isinstance(made.get("upstream"), dict):
        raise ArtifactError(
            f"the stage {spec.name} is of version {old}; this arisk computes {spec.version}",
            where=str(rundir.stage_dir(spec.name)),
            fix=f"{again}; no model is loaded for that",
        )
    for name in reads:
        if (key := made["upstream"].get(name)) is None:
            continue
        before = rundir.manifest(name)
        if before is None or before["key"] != key:
            raise ArtifactError(
                f"the stage {name} is missing" if before is None else f"the stage {name} was run again since",
                where=str(rundir.stage_dir(name)),
                fix=f"{again}: it brings {name} and {spec.name} together",
            )
    rundir.verify(spec.name, deep=False)
    return made


def take(rundir: RunDir, state: StageState, sources: Sequence[Path]) -> Path | None:
    """Commit the stage from the first source that has it with the same key, whole and undamaged.

    Args:
        rundir: the run directory that takes, locked by the caller.
        state: the stage, with the key and ingredients it must have.
        sources: run directories to look in, in order.

    Returns:
        The source, or None where none has it; nothing is changed then.

    Raises:
        ArtifactError: this run directory cannot be written, or its disk is full.
    """
    for source in sources:
        if source.resolve() != rundir.path.resolve() and _take(rundir, state, source):
            return source
    return None


def _take(rundir: RunDir, state: StageState, source: Path) -> bool:
    other = RunDir(source)
    try:
        manifest = other.manifest(state.stage)
    except ArtifactError:
        return False
    if manifest is None or manifest.get("key") != state.key:
        return False
    staging = rundir.path / WORKSPACES / f"taken-{state.stage}"
    if not _bring(manifest.get("outputs", {}), other.stage_dir(state.stage), staging):
        remove_tree(staging)
        return False
    # What a killed run left of this stage is not needed any more.
    for left in staging.parent.glob(f"{state.stage}-*"):
        remove_tree(left)
    rundir.commit(
        state.stage,
        key=state.key,
        ingredients=state.ingredients,
        workspace=staging,
        seconds=float(manifest.get("seconds", 0.0)),
        taken_from=str(manifest.get("taken_from") or source),
    )
    return True


def _bring(outputs: Mapping[str, Mapping[str, Any]], source: Path, staging: Path) -> bool:
    """Link or copy the files of a stage; False where one is missing or not what its manifest says.

    Raises:
        ArtifactError: the target cannot be written.
    """
    try:
        remove_tree(staging)
        staging.mkdir(parents=True)
        for name, expected in outputs.items():
            file, placed = source / name, staging / name
            if not _inside(name) or not file.is_file():
                return False
            placed.parent.mkdir(parents=True, exist_ok=True)
            _place(file, placed)
            if placed.stat().st_size != expected["bytes"] or file_digest(placed) != expected["sha256"]:
                return False
    except FileNotFoundError:
        return False
    except OSError as err:
        raise disk_error(err, staging) from err
    return bool(outputs)


def _inside(name: str) -> bool:
    """A manifest from elsewhere may not name files outside its stage."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _place(file: Path, placed: Path) -> None:
    """A hard link, or a copy where links are not possible."""
    try:
        os.link(file.resolve(), placed)
    except OSError:
        shutil.copyfile(file, placed)


#: States in the words that the terminal and the page share.
SHOWN = {"fresh": "up to date", "stale": "out of date"}


def status_rows(catalogue: Catalogue, config: Config, run_dir: Path) -> list[dict[str, Any]]:
    """One mapping per stage: name, fresh, optional, state, reasons, seconds, bytes, whether it can resume.

    `state` is fresh, stale, or "not run" for an optional stage, which makes nothing stale.
    """
    rundir = RunDir(run_dir)
    cache = DigestCache(run_dir / ".digests.json")
    states = plan(catalogue, config, input_fingerprints(config, cache), rundir)
    if (run_dir / CONFIG_FILE).is_file():  # Whatever else is there stays as it is.
        cache.save()
    optional, left_out = catalogue.optional, catalogue.left_out(config, rundir)
    rows: list[dict[str, Any]] = []
    for state in states:
        damaged = any(reason.kind == "damaged" for reason in state.reasons)
        manifest = None if damaged else rundir.manifest(state.stage)
        outputs = manifest["outputs"].values() if manifest else []
        partial = run_dir / WORKSPACES / f"{state.stage}-{state.key[:16]}"
        rows.append(
            {
                "stage": state.stage,
                "fresh": state.fresh,
                "optional": state.stage in optional,
                "state": _state(state, state.stage in (*optional, *left_out)),
                "left_out": state.stage in left_out,
                "reasons": [reason.sentence() for reason in state.reasons],
                "seconds": manifest["seconds"] if manifest else None,
                "bytes": sum(output["bytes"] for output in outputs),
                "partial": partial.is_dir(),
            }
        )
    return rows


def describe(rows: Sequence[dict[str, Any]], *, width: int | None = None, command: str = "") -> str:
    """The rows as a table of reasons, with the total size and the command to type next.

    Args:
        rows: of `status_rows`.
        width: columns of the terminal; None: no wrapping.
        command: the command that brings the stages up to date; empty: not said.
    """
    cells = [
        [
            row["stage"],
            SHOWN.get(row["state"], str(row["state"])),
            "–" if row["seconds"] is None else f"{row['seconds']:.1f} s",
            _size(row["bytes"]),
            _why(row) + (" (resumes what a killed run left)" if row["partial"] else ""),
        ]
        for row in rows
    ]
    total = sum(row["bytes"] for row in rows)
    lines = [table(cells, ["stage", "state", "time", "size", "why"], width=width), ""]
    lines.append(f"total size: {_size(total)}")
    if command:
        stale = any(row["state"] == "stale" for row in rows)
        lines.append(f"next: {command}" if stale else "next: nothing to do, all is up to date")
    return "\n".join(lines)


def _state(state: StageState, optional: bool) -> str:
    if state.fresh:
        return "fresh"
    missing = any(reason.kind == "missing" for reason in state.reasons)
    return "not run" if optional and missing else "stale"


def _why(row: Mapping[str, Any]) -> str:
    if row["state"] == "not run":
        what = "left out by `why`" if row.get("left_out") else "optional"
        return f"{what}; `arisk {row['stage']}` runs it"
    return "; ".join(row["reasons"])


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count else "–"
