"""A finished run as `RankedRun`, from its artifacts alone; what is stale, damaged or missing is refused.

What was named on the command line: run directories and configs, each one plan with a run directory.

Which runs may stand in one table: the same model and safety rows, whatever trains; and what else differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.anatomy.record import ScoreResult
from arisk.base.artifacts import CONFIG_FILE, read_record
from arisk.base.errors import AriskError, ArtifactError, ConfigError, InputError
from arisk.compare.record import RankedRun
from arisk.config.plan import Config, parts_of
from arisk.config.yaml import load_config, run_directory
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState, check_run_dir, differences, plan, stage_key
from arisk.engine.job import REPORT_FILE
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue
from arisk.forecast.record import Curve, ForecastResult, RolloutResult
from arisk.report.identity import subject

__all__ = [
    "FinishedRun",
    "NamedPlan",
    "differing_settings",
    "distinct_names",
    "finished",
    "notes",
    "plans_of",
    "refuse_different_safety",
    "same_plans",
]


@dataclass(frozen=True)
class FinishedRun:
    """A run that may be compared.

    Attributes:
        run_dir: its run directory.
        config: as resolved when it ran.
        safety: ingredients of its stage collect: model, adapter, safety rows.
        inputs: fingerprints of all that it read, by section of the config.
        states: state of each stage.
        changed: config sections whose files have changed since.
        needed: the stages that the comparison reads or rests on.
    """

    run_dir: Path
    config: Config
    safety: Mapping[str, Any]
    inputs: Mapping[str, Any]
    states: Mapping[str, StageState]
    changed: tuple[str, ...]
    needed: tuple[str, ...]

    def planned(self, name: str) -> RankedRun:
        """Its numbers, under the name it has in the comparison.

        Raises:
            ArtifactError: a record is damaged.
        """
        return _planned(self, name)


def finished(catalogue: Catalogue, run_dir: Path) -> FinishedRun:
    """A run whose stages up to the forecast belong together and to its config; no model is loaded.

    Input files need not be there any more. Where they are and have changed, `changed` says so.

    Raises:
        NewerFormatError: a stage was written by a newer arisk.
        ArtifactError: it is no run, or a stage is missing, damaged, or stale.
    """
    check_run_dir(run_dir)
    rundir = RunDir(run_dir)
    config = _config(run_dir)
    inputs = _stored_inputs(catalogue, rundir)
    states = {state.stage: state for state in plan(catalogue, config, inputs, rundir)}
    needed = catalogue.get("report").upstream
    for stage in needed:
        if not states[stage].fresh:
            why = "; ".join(reason.sentence() for reason in states[stage].reasons)
            raise ArtifactError(
                f"the stage {stage} of this run is not up to date: {why}",
                where=str(run_dir),
                fix=f"run `arisk run {run_dir}`, or give the config itself to compare",
            )
    safety = states["collect"].ingredients
    return FinishedRun(run_dir, config, safety, inputs, states, _changed(config, inputs, rundir), needed)


def _config(run_dir: Path) -> Config:
    """The config as it was resolved.

    Raises:
        ArtifactError: this arisk does not understand it.
    """
    try:
        return load_config(run_dir / CONFIG_FILE)
    except ConfigError as err:
        raise ArtifactError(
            f"the run's config is not one of this arisk: {err.what}",
            where=str(run_dir / CONFIG_FILE),
            fix=f"run `arisk run CONFIG --run-dir {run_dir}` again with this version",
        ) from err


def _stored_inputs(catalogue: Catalogue, rundir: RunDir) -> dict[str, Any]:
    """Fingerprints of the inputs as the committed stages hold them."""
    found: dict[str, Any] = {}
    for spec in catalogue:
        try:
            manifest = rundir.manifest(spec.name)
        except ArtifactError:
            # The plan says what is wrong with it.
            continue
        if manifest is not None:
            found.update(manifest.get("ingredients", {}).get("inputs", {}))
    return found


def _changed(config: Config, stored: Mapping[str, Any], rundir: RunDir) -> tuple[str, ...]:
    """Config sections whose files are there and are not what the run read."""
    try:
        present = input_fingerprints(config, DigestCache(rundir.path / ".digests.json"))
    except (InputError, OSError):
        return ()
    return tuple(name for name, mark in present.items() if name in stored and stored[name] != mark)


def _planned(run: FinishedRun, name: str) -> RankedRun:
    rundir = RunDir(run.run_dir)
    known = [stage for stage in ("rollout", "forecast", "score") if run.states[stage].fresh]
    for stage in known:
        rundir.verify(stage, deep=True)
    forecast = read_record(rundir.stage_dir("forecast"), ForecastResult)
    rolled_out = read_record(rundir.stage_dir("rollout"), RolloutResult)
    scored = read_record(rundir.stage_dir("score"), ScoreResult) if "score" in known else None
    verdict, rolled = forecast.verdict, forecast.forecasters.get("rollout")
    why = [name for name in ("collect", "subspace", "score") if run.states[name].fresh]
    seconds, shared = _seconds([*run.needed, *why], rundir)
    basis = forecast.forecasters.get(verdict.basis)
    measured = basis is not None and basis.status == "measured" and basis.kind == "forecast"
    page = rundir.stage_dir("report") / REPORT_FILE
    return RankedRun(
        name=name,
        run_dir=str(run.run_dir),
        level=verdict.level,
        sentence=verdict.sentence,
        basis="the plan itself" if forecast.carried_out else verdict.basis,
        probability=_known(verdict.probability),
        collapse_step=verdict.collapse_step,
        horizon=verdict.horizon,
        safe_steps=verdict.safe_steps if measured else None,
        threshold=forecast.threshold,
        confidence=forecast.confidence,
        curve=basis if measured else None,
        safety_change=_last(rolled),
        control_change=_known(forecast.control_change[-1]) if forecast.control_change else None,
        overlap_to_random=None if scored is None else _known(scored.overlap.ratio_to_random),
        gradient_evaluations=forecast.gradient_evaluations,
        planned_evaluations=forecast.planned_evaluations,
        seconds=seconds,
        shared_seconds=shared,
        finetune=_data_name(run.config),
        finetune_rows=(rolled_out.task.get("data") or {}).get("finetune", {}).get("rows", 0),
        training=dict(forecast.training),
        report=str(page) if run.states["report"].fresh and page.exists() else None,
        notes=[f"The {section} files changed since this run." for section in run.changed],
        refusals=forecast.refusals,
        probes=forecast.probes,
        trains=subject({"task": rolled_out.task}),
    )


def _last(curve: Curve | None) -> float | None:
    """Last measured change of the safety loss along the rollout."""
    return _known(curve.median[-1]) if curve is not None and curve.median else None


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _seconds(stages: Sequence[str], rundir: RunDir) -> tuple[float, float]:
    """Wall time of the stages up to the forecast: of this run, and of those taken from another."""
    own = shared = 0.0
    for stage in stages:
        manifest = rundir.manifest(stage) or {}
        if manifest.get("taken_from"):
            shared += float(manifest.get("seconds", 0.0))
        else:
            own += float(manifest.get("seconds", 0.0))
    return own, shared


def _data_name(config: Config) -> str:
    """File name or hub id of the fine-tuning data; the entry point of a Python task."""
    if config.finetune is None:
        return str(config.model.entry)
    paths = [data.path for data in parts_of(config.finetune)]
    return " + ".join(Path(path).name if Path(path).is_absolute() else path for path in paths)


@dataclass(frozen=True)
class NamedPlan:
    """One planned fine-tune: `config` is None where a finished run was named."""

    given: Path
    run_dir: Path
    config: Config | None


def plans_of(given: Sequence[Path], overrides: Sequence[str], base: Path | None) -> list[NamedPlan]:
    """The plans, every mistake in them at once.

    Args:
        given: run directories and YAML configs.
        overrides: `key=value` for every config.
        base: configs run in `base/<name of the config>`; None: as `arisk run` does.

    Raises:
        AriskError: one is neither, a config is wrong, there are fewer than two, or two are one run.
    """
    plans: list[NamedPlan] = []
    wrong: list[AriskError] = []
    for path in given:
        try:
            plans.append(_plan(path, overrides, base))
        except AriskError as err:
            wrong.append(err)
    if wrong:
        first, *others = wrong
        raise type(first)(first.what, where=first.where, fix=first.fix, also=[*first.also, *others])
    if len(plans) < 2:
        raise ConfigError(
            "a comparison needs two plans or more",
            where=" ".join(map(str, given)) or "arisk compare",
            fix="name further run directories or configs; one run alone has its own report",
        )
    _distinct(plans)
    return plans


def _plan(path: Path, overrides: Sequence[str], base: Path | None) -> NamedPlan:
    if path.is_file():
        config = load_config(path, overrides)
        return NamedPlan(path, base / path.stem if base else run_directory(config, path, None), config)
    check_run_dir(path)
    return NamedPlan(path, path, None)


def _distinct(plans: Sequence[NamedPlan]) -> None:
    """Refuse two plans in one run directory.

    Raises:
        ConfigError: names both.
    """
    seen: dict[Path, NamedPlan] = {}
    for named in plans:
        other = seen.setdefault(named.run_dir.resolve(), named)
        if other is named:
            continue
        if other.given == named.given:
            what, fix = f"{named.given} is given twice", "name each plan once"
        else:
            what = f"{other.given} and {named.given} are one run: {named.run_dir}"
            fix = "give configs names of their own, or `run.dir`, or leave one out"
        raise ConfigError(what, where="arisk compare", fix=fix)


#: Ways to measure the same safety side: they change rounding and files, not what is measured.
SAME_ENOUGH = ("config.collect.engine", "config.collect.store", "config.collect.chunk_size")
#: What trains: a new adapter changes no answer before the first step, so losses start from the same model.
TRAINS = ("config.model.adapter", "config.model.parameters")
#: Config sections that say nothing about the plan.
NOT_THE_PLAN = ("run", "report", "verify", "why")
WORDS = {
    "inputs.model": "the model's files",
    "inputs.adapter": "the adapter's files",
    "inputs.safety": "the safety rows",
    "stage_version": "the version of arisk that measured",
    "format_version": "the version of arisk that measured",
}


def refuse_different_safety(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Refuse runs of different models or safety rows; what trains may differ.

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
        trains = [item for item in found if _trains_else(*item)]
        fatal = [item for item in found if item[0] not in SAME_ENOUGH and item not in trains]
        if fatal:
            raise ArtifactError(
                f"these are not plans for one model and one safety set: {_told(fatal)}",
                where=f"{first} against {name}",
                fix="compare runs of the same model, seed and safety rows; give both configs the same "
                "`model`, `safety` and `run.seed`",
            )
        if trains:
            said.append(
                f"{name} trains something else than {first} ({_told(trains)}): refusals and the loss of the "
                "safe responses are comparable and start from the same model; the gradients of the safety "
                "rows and the subspace are not shared, and overlaps are of different parameters."
            )
            continue
        said.append(
            f"{name} measured the safety side in another way than {first} ({_told(found)}): not shared."
        )
    return said


def _trains_else(path: str, old: Any, new: Any) -> bool:
    """Whether a difference is one of what trains; an adapter that exists already is another model."""
    if not any(path == key or path.startswith(f"{key}.") for key in TRAINS):
        return False
    loaded = path.endswith(".path") or any(
        isinstance(value, Mapping) and value.get("path") is not None for value in (old, new)
    )
    return not loaded


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


def differing_settings(
    configs: Mapping[str, Config], inputs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, list[str]]:
    """Settings that are not the same in every plan: values by dotted key, in the order of the runs.

    Args:
        configs: by the name of the run.
        inputs: fingerprints of what each run read; a path whose file is the same in all is no difference.
    """
    flat = {name: dict(_leaves(config.model_dump(mode="json"), "")) for name, config in configs.items()}
    keys = sorted({key for leaves in flat.values() for key in leaves})
    found: dict[str, list[str]] = {}
    for key in keys:
        values = [_short(leaves.get(key)) for leaves in flat.values()]
        if key.split(".")[0] in NOT_THE_PLAN or len(set(values)) == 1 or _same_file(key, inputs):
            continue
        found[key] = values
    return found


def _same_file(key: str, inputs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting is the path of a file that all runs read with the same content."""
    section, _, last = key.rpartition(".")
    marks = [read.get(section.removeprefix("model.")) for read in inputs]
    return last == "path" and bool(marks) and marks[0] is not None and all(m == marks[0] for m in marks)


def _leaves(value: Any, path: str) -> Sequence[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(path, value)]
    return [
        leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else str(key))
    ]


def notes(runs: Sequence[RankedRun], settings: Mapping[str, Sequence[str]]) -> list[str]:
    """What makes these numbers less comparable, in words."""
    said: list[str] = []
    for what, values in {
        "collapse threshold": {run.name: f"{run.threshold:g} nats/token" for run in runs},
        "confidence of the intervals": {run.name: f"{run.confidence:.0%}" for run in runs},
        "number of planned steps": {run.name: str(run.horizon) for run in runs},
        "basis of the verdict": {run.name: run.basis for run in runs},
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
