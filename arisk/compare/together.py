"""Which runs may stand in one table: the same model, adapter and safety rows; and what else differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arisk.base.errors import ArtifactError
from arisk.compare.record import PlannedRun
from arisk.config.plan import Config
from arisk.engine.freshness import differences, stage_key

__all__ = ["differing_settings", "distinct_names", "notes", "refuse_different_safety", "same_plans"]

#: Ways to measure the same safety side: they change rounding and files, not what is measured.
SAME_ENOUGH = ("config.collect.engine", "config.collect.store", "config.collect.chunk_size")
#: Config sections that say nothing about the plan.
NOT_THE_PLAN = ("run", "report", "verify")
WORDS = {
    "inputs.model": "the model's files",
    "inputs.adapter": "the adapter's files",
    "inputs.safety": "the safety rows",
    "stage_version": "the version of arisk that measured",
    "format_version": "the version of arisk that measured",
}


def refuse_different_safety(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Refuse runs of different models, adapters or safety rows.

    Args:
        sides: ingredients of stage collect by run.

    Returns:
        Notes on differences that do not matter for the comparison.

    Raises:
        ArtifactError: names what differs, and in which run.
    """
    (first, reference), *others = sides.items()
    said: list[str] = []
    for name, side in others:
        if stage_key(side) == stage_key(reference):
            continue
        found = list(differences(reference, side))
        fatal = [item for item in found if item[0] not in SAME_ENOUGH]
        if fatal:
            raise ArtifactError(
                f"these are not plans for one model and one safety set: {_told(fatal)}",
                where=f"{first} against {name}",
                fix="compare runs of the same model, adapter, seed and safety rows; give both configs the "
                "same `model`, `safety` and `run.seed`",
            )
        said.append(
            f"{name} measured the safety side in another way than {first} ({_told(found)}): not shared."
        )
    return said


def _told(found: Sequence[tuple[str, Any, Any]]) -> str:
    """What differs, files in words and settings with both values."""
    told: dict[str, None] = {}
    for path, old, new in found:
        word = next((text for start, text in WORDS.items() if f"{path}.".startswith(f"{start}.")), None)
        if path.startswith("inputs."):
            told[f"{word} differ"] = None
        else:
            told[f"{word or path.removeprefix('config.')} ({_short(old)} against {_short(new)})"] = None
    return "; ".join(told)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    if len(text) <= 60:
        return text
    # Of a path, the end tells more.
    return "…" + text[-57:] if "/" in text else text[:57] + "…"


def differing_settings(configs: Mapping[str, Config]) -> dict[str, list[str]]:
    """Settings that are not the same in every plan: values by dotted key, in the order of the runs."""
    flat = {name: dict(_leaves(config.model_dump(mode="json"), "")) for name, config in configs.items()}
    keys = sorted({key for leaves in flat.values() for key in leaves})
    found: dict[str, list[str]] = {}
    for key in keys:
        values = [_short(leaves.get(key)) for leaves in flat.values()]
        if key.split(".")[0] not in NOT_THE_PLAN and len(set(values)) > 1:
            found[key] = values
    return found


def _leaves(value: Any, path: str) -> Sequence[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(path, value)]
    return [
        leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else str(key))
    ]


def notes(runs: Sequence[PlannedRun], settings: Mapping[str, Sequence[str]]) -> list[str]:
    """What makes these numbers less comparable, in words."""
    said: list[str] = []
    for what, values in {
        "collapse threshold": {run.name: f"{run.threshold:g} nats/token" for run in runs},
        "confidence of the intervals": {run.name: f"{run.confidence:.0%}" for run in runs},
        "number of planned steps": {run.name: str(run.horizon) for run in runs},
        "forecaster the verdict rests on": {run.name: run.basis for run in runs},
    }.items():
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            said.append(f"The {what} is not the same in all runs: {listed}.")
    if any(key.startswith("control.") or key == "control" for key in settings):
        said.append("The control data are not the same in all runs: compare control drift with care.")
    said += [f"{run.name}: {note}" for run in runs for note in run.notes]
    return said


def same_plans(keys: Mapping[str, str]) -> list[str]:
    """Sentences on runs that are one plan run twice: keys of stage forecast by run."""
    seen: dict[str, str] = {}
    said: list[str] = []
    for name, key in keys.items():
        first = seen.setdefault(key, name)
        if first != name:
            said.append(f"{first} and {name} are the same plan: their forecasts are equal.")
    return said


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Short distinct names of run directories: the last part, with as many before it as are needed."""
    parts = [folder.resolve().parts for folder in folders]
    made: list[str] = []
    for own in parts:
        depth = 1
        while sum(other[-depth:] == own[-depth:] for other in parts) > 1 and depth < len(own):
            depth += 1
        made.append("/".join(own[-depth:]))
    return made
