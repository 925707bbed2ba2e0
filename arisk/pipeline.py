"""Runs stages in order: skip the fresh ones, execute the others, commit each.

Torch and the model are loaded only when a stage needs them; a run whose stages are all fresh, or
whose only stale stage is the report, loads no model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arisk.artifacts import read_json, read_record, read_tensors, write_record, write_tensors, write_text
from arisk.config import Config
from arisk.configfile import dump_config
from arisk.errors import AriskError, ArtifactError
from arisk.fingerprints import DigestCache, input_fingerprints
from arisk.plan import STAGES, StageState, plan
from arisk.results import CollectResult, ForecastResult, ScoreResult, SubspaceResult
from arisk.rundir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from arisk.gradients import ParameterLayout
    from arisk.stages.safety_side import SafetySide
    from arisk.task import Task

__all__ = ["Display", "Outcome", "run_stages"]

NAMES = tuple(spec.name for spec in STAGES)
REPORT_FILE, SUMMARY_FILE = "report.html", "summary.json"
#: Files of a workspace that serve resuming only.
RESUME_FILES = ("losses-*.safetensors", "group-*.safetensors", "*.partial")


class Display(Protocol):
    """Who shows progress to a person."""

    def start(self, stage: str, why: str) -> None:
        """A stage begins, for this reason."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Part of the running stage is done."""

    def finish(self, stage: str) -> None:
        """A stage is committed."""

    def skip(self, stage: str) -> None:
        """A stage is fresh."""

    def interrupted(self) -> None:
        """Ctrl-C."""

    def failed(self) -> None:
        """An error ends the run."""


@dataclass(frozen=True)
class Outcome:
    """What a run did, and the summary when a report exists."""

    run_dir: Path
    ran: tuple[str, ...]
    fresh: tuple[str, ...]
    report: Path | None
    summary: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "run_dir": str(self.run_dir),
            "ran": list(self.ran),
            "fresh": list(self.fresh),
            "report": str(self.report) if self.report else None,
            "summary": self.summary,
        }


def run_stages(
    config: Config,
    *,
    run_dir: Path,
    show: Display,
    command: str,
    first: str | None = None,
    last: str | None = None,
    only: str | None = None,
    force: bool = False,
) -> Outcome:
    """Bring stages up to date.

    Args:
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that reproduces this run, for the report and the lock.
        first: run this stage and all after it even where they are fresh.
        last: stop after this stage.
        only: run this stage alone; the stages before it must be fresh.
        force: run every considered stage even where it is fresh.

    Raises:
        AriskError: what went wrong; stages finished before are committed.
    """
    rundir = RunDir(run_dir)
    wanted = NAMES[: NAMES.index(last) + 1] if last else NAMES
    with rundir.lock(command):
        cache = DigestCache(run_dir / ".digests.json")
        inputs = input_fingerprints(config, cache)
        states = plan(config, inputs, rundir)
        cache.save()
        rundir.write("config.yaml", dump_config(config))
        due = _due(states, wanted, first, only, force)
        job = _Job(config, rundir, command, show, {state.stage: state for state in states})
        try:
            for state in states:
                if state.stage in due:
                    _execute(job, state)
                elif state.stage in wanted:
                    show.skip(state.stage)
        except KeyboardInterrupt:
            show.interrupted()
            raise
        except AriskError:
            show.failed()
            raise
    fresh = tuple(name for name in wanted if name not in due)
    report = rundir.stage_dir("report") / REPORT_FILE if "report" in wanted else None
    summary = read_json(rundir.stage_dir("report") / SUMMARY_FILE) if report else None
    return Outcome(run_dir, tuple(due), fresh, report, summary)


def _due(
    states: list[StageState], wanted: tuple[str, ...], first: str | None, only: str | None, force: bool
) -> list[str]:
    """Stages to run, in order."""
    stale = {state.stage for state in states if not state.fresh}
    if only:
        for state in states[: NAMES.index(only)]:
            if state.stage in stale:
                why = "; ".join(reason.sentence() for reason in state.reasons)
                raise ArtifactError(
                    f"the stage {state.stage} before it is not fresh: {why}",
                    where=f"stage {only}",
                    fix=f"run `arisk {state.stage} CONFIG` first, or add --with-upstream",
                )
        return [only] if force or only in stale else []
    after = NAMES[NAMES.index(first) :] if first else ()
    return [name for name in wanted if force or name in stale or name in after]


@dataclass
class _Job:
    """One run in progress: inputs loaded when first needed, records kept as they are made."""

    config: Config
    rundir: RunDir
    command: str
    show: Display
    states: Mapping[str, StageState]
    records: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def task(self) -> Task:
        """The model with its data; loading is the slowest part of a short run."""
        import torch

        from arisk.models import load_task

        if self.config.run.threads:
            torch.set_num_threads(self.config.run.threads)
        self.show.progress("loading model", 0, 1)
        task = load_task(self.config, device=_device(self.config.run.device))
        self.show.progress("loading model", 1, 1)
        return task

    def record(self, stage: str, cls: type[Any]) -> Any:
        """A stage's record, from memory or verified from the disk."""
        if stage not in self.records:
            self.rundir.verify(stage, deep=True)
            self.records[stage] = read_record(self.rundir.stage_dir(stage), cls)
        return self.records[stage]

    @property
    def collected(self) -> CollectResult:
        return self.record("collect", CollectResult)

    @cached_property
    def layout(self) -> ParameterLayout:
        """The selected parameters, from the artifact: needs no model."""
        from arisk.gradients import ParameterLayout

        held = self.collected
        return ParameterLayout(
            tuple(held.parameter_names),
            tuple(tuple(shape) for shape in held.parameter_shapes),
            tuple(held.modules),
            tuple(held.module_of_parameter),
        )

    def stored(self) -> SafetySide | None:
        """Products with the stored gradients; None when collect kept none."""
        from arisk.gradients import GradientStore
        from arisk.stages.collect import GRADIENTS_FOLDER
        from arisk.stages.safety_side import stored_side

        if self.collected.store != "gradients":
            return None
        return stored_side(GradientStore(self.rundir.stage_dir("collect") / GRADIENTS_FOLDER), self.layout)


def _device(name: str) -> Any:
    """The torch device; auto takes cuda, then mps, then cpu.

    Raises:
        ConfigError: torch does not know it, or it is not there.
    """
    import torch

    from arisk.errors import ConfigError

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(
            f"the device {name!r} cannot be used: {str(err).splitlines()[0]}",
            where="run.device",
            fix="use `auto`, `cpu`, or a device this machine has",
        ) from err
    return device


def _execute(job: _Job, state: StageState) -> None:
    """Run one stage in its workspace and commit it."""
    why = "; ".join(reason.sentence() for reason in state.reasons) or "forced"
    job.show.start(state.stage, why)
    started = time.monotonic()
    workspace = job.rundir.workspace(state.stage, state.key)
    job.records.pop(state.stage, None)
    made = _RUNNERS[state.stage](job, workspace)
    if made is not None:
        write_record(workspace, made)
    job.rundir.commit(
        state.stage,
        key=state.key,
        ingredients=state.ingredients,
        workspace=workspace,
        seconds=time.monotonic() - started,
        leave_out=RESUME_FILES,
    )
    job.show.finish(state.stage)
    if made is not None:
        job.records[state.stage] = made


def _collect(job: _Job, workspace: Path) -> CollectResult:
    from dataclasses import replace

    from arisk.stages.collect import collect

    task = job.task
    if job.config.collect.fisher == "sampled":
        from arisk.models.sampled import sample_labels

        task = replace(task, safety=sample_labels(task.model, task.safety, job.config.run.seed))
    return collect(task, job.config.collect, workspace, progress=job.show.progress)


def _subspace(job: _Job, workspace: Path) -> SubspaceResult:
    import torch

    from arisk.stages.subspace import subspace

    del workspace
    side, layout = job.stored(), job.layout
    gradients: Callable[[], Tensor] | None = None
    budget = job.config.collect.memory_budget_gb * 1e9
    if side is not None and len(job.collected.losses) * layout.numel * 8 <= budget:
        gradients = lambda: torch.cat([side.columns(name) for name in layout.names], dim=1)  # noqa: E731
    return subspace(job.collected, job.config.subspace, seed=job.config.run.seed, gradients=gradients)


def _score(job: _Job, workspace: Path) -> ScoreResult:
    from arisk.stages.safety_side import recomputed_side
    from arisk.stages.score import score

    config = job.config
    side = job.stored()
    if side is None:
        engine = job.collected.engine["name"]
        side = recomputed_side(job.task, job.layout, engine, config.collect.chunk_size)
    made = score(
        job.task,
        job.collected,
        job.record("subspace", SubspaceResult),
        side,
        config=config.score,
        training=config.training,
        seed=config.run.seed,
        progress=job.show.progress,
    )
    write_tensors(workspace / "directions.safetensors", made.directions)
    return made.record


def _forecast(job: _Job, workspace: Path) -> ForecastResult:
    from arisk.stages.forecast import forecast
    from arisk.stages.score import planned_steps

    del workspace
    scored: ScoreResult = job.record("score", ScoreResult)
    side = job.stored()
    return forecast(
        scored,
        config=job.config.forecast,
        training=job.config.training,
        steps=planned_steps(job.config.training, scored.finetune_rows),
        directions=read_tensors(job.rundir.stage_dir("score") / "directions.safetensors"),
        dots=side.dots if side else None,
        seed=job.config.run.seed,
    )


def _report(job: _Job, workspace: Path) -> None:
    import json

    from arisk.artifacts import FORMAT_VERSION
    from arisk.report import render_report, summary_json, summary_markdown

    config = job.config
    records = (
        job.collected,
        job.record("subspace", SubspaceResult),
        job.record("score", ScoreResult),
        job.record("forecast", ForecastResult),
    )
    title = config.report.title or job.rundir.path.resolve().name
    page = render_report(
        *records,
        title=title,
        provenance=_provenance(job),
        show_text=config.report.show_text,
        max_examples=config.report.max_examples,
    )
    write_text(workspace / REPORT_FILE, page)
    summary = {"format_version": FORMAT_VERSION, **_finite(summary_json(*records, title=title))}
    write_text(workspace / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    write_text(workspace / "summary.md", summary_markdown(*records, title=title))


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none is null, which readers must take as not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _provenance(job: _Job) -> dict[str, Any]:
    """What made the report: command, versions, stage keys and costs."""
    from importlib.metadata import version

    stages = {}
    for name in NAMES[:-1]:
        manifest = job.rundir.manifest(name) or {}
        size = sum(output["bytes"] for output in manifest.get("outputs", {}).values())
        stages[name] = {
            "key": job.states[name].key[:12],
            "finished": manifest.get("finished"),
            "seconds": manifest.get("seconds"),
            "bytes": size,
        }
    versions = {"arisk": version("arisk"), "torch": version("torch")}
    return {"command": job.command, "versions": versions, "stages": stages, "config": dump_config(job.config)}


_RUNNERS: dict[str, Callable[[_Job, Path], Any]] = {
    "collect": _collect,
    "subspace": _subspace,
    "score": _score,
    "forecast": _forecast,
    "report": _report,
}
