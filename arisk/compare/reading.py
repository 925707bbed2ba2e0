"""A finished run as `PlannedRun`, from its artifacts alone; what is stale, damaged or missing is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.anatomy.record import ScoreResult
from arisk.base.artifacts import read_record
from arisk.base.errors import ArtifactError, ConfigError, InputError
from arisk.compare.record import PlannedRun
from arisk.config.plan import Config
from arisk.config.yaml import load_config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState, plan
from arisk.engine.job import REPORT_FILE
from arisk.engine.reuse import CONFIG_FILE, check_run_dir
from arisk.engine.rundir import RunDir
from arisk.engine.stage import STAGES
from arisk.forecast.record import Curve, ForecastResult

__all__ = ["FinishedRun", "finished"]

#: Stages a comparison reads or rests on.
NEEDED = ("collect", "subspace", "score", "rollout", "forecast")


@dataclass(frozen=True)
class FinishedRun:
    """A run that may be compared.

    Attributes:
        run_dir: its run directory.
        config: as resolved when it ran.
        safety: ingredients of its stage collect: model, adapter, safety rows.
        states: state of each stage.
        changed: config sections whose files have changed since.
    """

    run_dir: Path
    config: Config
    safety: Mapping[str, Any]
    states: Mapping[str, StageState]
    changed: tuple[str, ...]

    def planned(self, name: str) -> PlannedRun:
        """Its numbers, under the name it has in the comparison.

        Raises:
            ArtifactError: a record is damaged.
        """
        return _planned(self, name)


def finished(run_dir: Path) -> FinishedRun:
    """A run whose stages up to the forecast belong together and to its config; no model is loaded.

    Input files need not be there any more. Where they are and have changed, `changed` says so.

    Raises:
        NewerFormatError: a stage was written by a newer arisk.
        ArtifactError: it is no run, or a stage is missing, damaged, or stale.
    """
    check_run_dir(run_dir)
    rundir = RunDir(run_dir)
    config = _config(run_dir)
    inputs = _stored_inputs(rundir)
    states = {state.stage: state for state in plan(config, inputs, rundir)}
    for stage in NEEDED:
        if not states[stage].fresh:
            why = "; ".join(reason.sentence() for reason in states[stage].reasons)
            raise ArtifactError(
                f"the stage {stage} of this run is not fresh: {why}",
                where=str(run_dir),
                fix=f"run `arisk run CONFIG --run-dir {run_dir}`, or give the config itself to compare",
            )
    safety = states["collect"].ingredients
    return FinishedRun(run_dir, config, safety, states, _changed(config, inputs, rundir))


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


def _stored_inputs(rundir: RunDir) -> dict[str, Any]:
    """Fingerprints of the inputs as the committed stages hold them."""
    found: dict[str, Any] = {}
    for spec in STAGES:
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


def _planned(run: FinishedRun, name: str) -> PlannedRun:
    rundir = RunDir(run.run_dir)
    for stage in ("forecast", "score"):
        rundir.verify(stage, deep=True)
    forecast = read_record(rundir.stage_dir("forecast"), ForecastResult)
    scored = read_record(rundir.stage_dir("score"), ScoreResult)
    verdict, rolled = forecast.verdict, forecast.forecasters.get("rollout")
    seconds, shared = _seconds(rundir)
    basis = forecast.forecasters.get(verdict.basis)
    measured = basis is not None and basis.status == "measured" and basis.kind == "forecast"
    page = rundir.stage_dir("report") / REPORT_FILE
    return PlannedRun(
        name=name,
        run_dir=str(run.run_dir),
        level=verdict.level,
        sentence=verdict.sentence,
        basis=verdict.basis,
        probability=_known(verdict.probability),
        collapse_step=verdict.collapse_step,
        horizon=verdict.horizon,
        safe_steps=verdict.safe_steps if measured else None,
        threshold=forecast.threshold,
        confidence=forecast.confidence,
        curve=basis if measured else None,
        safety_change=_last(rolled),
        control_change=_known(forecast.control_change[-1]) if forecast.control_change else None,
        overlap_to_random=_known(scored.overlap.ratio_to_random),
        gradient_evaluations=forecast.gradient_evaluations,
        planned_evaluations=forecast.planned_evaluations,
        seconds=seconds,
        shared_seconds=shared,
        finetune=_data_name(run.config),
        finetune_rows=scored.finetune_rows,
        training=dict(forecast.training),
        report=str(page) if run.states["report"].fresh and page.exists() else None,
        notes=[f"The {section} files changed since this run." for section in run.changed],
    )


def _last(curve: Curve | None) -> float | None:
    """Last measured change of the safety loss along the rollout."""
    return _known(curve.median[-1]) if curve is not None and curve.median else None


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _seconds(rundir: RunDir) -> tuple[float, float]:
    """Wall time of the stages up to the forecast: of this run, and of those taken from another."""
    own = shared = 0.0
    for stage in NEEDED:
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
    path = Path(config.finetune.path)
    return path.name if path.is_absolute() else config.finetune.path
