"""Runs stages in order: skip the fresh ones, execute the others, commit each.

Torch and the model are loaded only when a stage needs them; a run whose stages are all fresh, or
whose only stale stage is the report, loads no model.

Stages that run only when asked for (verify, screen, guard): carry one out, and say what it found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arisk.base import processes
from arisk.base.artifacts import read_json, read_record, write_record
from arisk.base.errors import AriskError, ArtifactError
from arisk.config.plan import Config
from arisk.config.yaml import dump_config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState, plan
from arisk.engine.job import REPORT_FILE, SUMMARY_FILE, Display, Job
from arisk.engine.reuse import take
from arisk.engine.rundir import RunDir
from arisk.engine.stage import STAGES
from arisk.guard.page import guard_text
from arisk.guard.record import GuardResult, guard_summary
from arisk.models.judge import judge_for, learnt_openings
from arisk.runners import RUNNERS, finite
from arisk.screening.page import screen_text
from arisk.screening.record import ScreenResult
from arisk.verification.page import verify_text
from arisk.verification.record import VerifyResult
from arisk.verification.truth import compare

__all__ = ["AskedOutcome", "Outcome", "asked_text", "run_asked", "run_optional", "run_stages"]

NAMES = tuple(spec.name for spec in STAGES)
#: Stages that only their own command runs.
OPTIONAL = tuple(spec.name for spec in STAGES if spec.optional)
#: Stages in which all processes of a run take part; the others are small, and the first one's alone.
SHARED = ("collect", "score", "rollout", "forecast", "verify", "screen", "guard")
#: Files of a workspace that serve resuming only.
RESUME_FILES = (
    *("losses-*.safetensors", "group-*.safetensors", "parts/*", "*.partial"),
    *("point-*.safetensors", "rows-*.safetensors"),
    *("state.json", "state-*.safetensors", "arm-*/*"),
)


@dataclass(frozen=True)
class Outcome:
    """What a run did, and the summary when a report exists; `taken`: run directory by stage."""

    run_dir: Path
    ran: tuple[str, ...]
    fresh: tuple[str, ...]
    report: Path | None
    summary: Mapping[str, Any] | None
    taken: Mapping[str, str] = field(default_factory=dict[str, str])

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "run_dir": str(self.run_dir),
            "ran": list(self.ran),
            "fresh": list(self.fresh),
            "taken": dict(self.taken),
            "report": str(self.report) if self.report else None,
            "summary": self.summary,
        }


def run_optional(
    stage: str,
    config: Config,
    *,
    run_dir: Path,
    show: Display,
    command: str,
    report_command: str,
    force: bool = False,
) -> tuple[bool, Outcome | None, str | None]:
    """Run an optional stage, and bring the report that shows it up to date where the others are fresh.

    Args:
        stage: its name.
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that does this, for the lock.
        report_command: the command that makes the report.
        force: run it even where it is fresh.

    Returns:
        Whether it ran now; the report's outcome, or None with the stage the report waits for.

    Raises:
        AriskError: what went wrong; what was finished before is committed.
    """
    done = run_stages(
        config, run_dir=run_dir, show=show, command=command, only=stage, last=stage, force=force
    )
    missing = _stale_before("report", config, run_dir)
    if missing is not None:
        return bool(done.ran), None, missing
    made = run_stages(
        config, run_dir=run_dir, show=show, command=report_command, only="report", last="report"
    )
    return bool(done.ran), made, None


def _stale_before(stage: str, config: Config, run_dir: Path) -> str | None:
    """The first stage it reads that is not fresh."""
    needed = STAGES[NAMES.index(stage)].upstream
    cache = DigestCache(run_dir / ".digests.json")
    states = plan(config, input_fingerprints(config, cache), RunDir(run_dir))
    return next((state.stage for state in states if state.stage in needed and not state.fresh), None)


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
    reuse: Sequence[Path] = (),
    models: dict[str, Any] | None = None,
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
        reuse: run directories from which a stage with the same key is taken instead of being run.
        models: models that runs before this one have loaded; those after it find its own here.

    Raises:
        AriskError: what went wrong; stages finished before are committed.
    """
    rundir = RunDir(run_dir)
    taken: dict[str, str] = {}
    considered = NAMES[: NAMES.index(last) + 1] if last else NAMES
    wanted = (only,) if only in OPTIONAL else tuple(n for n in considered if n not in OPTIONAL)
    processes.join()

    def planned() -> tuple[list[StageState], list[str]]:
        cache = DigestCache(run_dir / ".digests.json")
        states = plan(config, input_fingerprints(config, cache), rundir, asked=only, force=force)
        cache.save()
        rundir.write("config.yaml", dump_config(config))
        due = _due(states, wanted, first, only, force)
        _drawable(config, due)
        return states, due

    with rundir.lock(command) if processes.is_first() else nullcontext():
        states, due = processes.from_first(planned)
        job = Job(config, rundir, command, show, {state.stage: state for state in states})
        job.models = {} if models is None else models
        show.planned(due)
        try:
            for state in states:
                if state.stage in due:
                    source = _taken(job, state, reuse)
                    if source is None:
                        _execute(job, state)
                    else:
                        taken[state.stage] = str(source)
                elif state.stage in wanted and state.fresh:
                    show.skip(state.stage)
        except KeyboardInterrupt:
            show.interrupted()
            raise
        except AriskError:
            show.failed()
            raise
    fresh = tuple(s.stage for s in states if s.fresh and s.stage in wanted and s.stage not in due)
    report = rundir.stage_dir("report") / REPORT_FILE if "report" in wanted else None
    summary = read_json(rundir.stage_dir("report") / SUMMARY_FILE) if report else None
    ran = tuple(stage for stage in due if stage not in taken)
    return Outcome(run_dir, ran, fresh, report, summary, taken)


def _drawable(config: Config, due: list[str]) -> None:
    """Refuse figures that were asked for and cannot be drawn before hours are spent, not after."""
    if "report" in due and config.report.figures in ("png", "svg"):
        from arisk.report.images import require_drawable

        require_drawable()


def _due(
    states: list[StageState], wanted: tuple[str, ...], first: str | None, only: str | None, force: bool
) -> list[str]:
    """Stages to run, in order."""
    stale = {state.stage for state in states if not state.fresh}
    if only:
        needed = STAGES[NAMES.index(only)].upstream
        for state in states:
            if state.stage in needed and state.stage in stale:
                why = "; ".join(reason.sentence() for reason in state.reasons)
                raise ArtifactError(
                    f"the stage {state.stage} before it is not fresh: {why}",
                    where=f"stage {only}",
                    fix=f"run `arisk {state.stage} CONFIG` first, or add --with-upstream",
                )
        return [only] if force or only in stale else []
    after = NAMES[NAMES.index(first) :] if first else ()
    return [name for name in wanted if force or name in stale or name in after]


def _taken(job: Job, state: StageState, reuse: Sequence[Path]) -> Path | None:
    """The run directory that the stage was taken from, or None: it is to be run."""
    source = processes.from_first(lambda: take(job.rundir, state, reuse))
    if source is not None:
        job.records.pop(state.stage, None)
        job.show.note(f"{state.stage:<9} taken from {source}")
    return source


def _execute(job: Job, state: StageState) -> None:
    """Run one stage in its workspace and commit it."""
    why = "; ".join(reason.sentence() for reason in state.reasons) or "forced"
    job.show.start(state.stage, why)
    started = time.monotonic()
    workspace = processes.from_first(lambda: job.rundir.workspace(state.stage, state.key))
    job.records.pop(state.stage, None)
    made = None
    if state.stage in SHARED:
        made = RUNNERS[state.stage](job, workspace)
    elif processes.is_first():
        with processes.alone():
            made = RUNNERS[state.stage](job, workspace)

    def commit() -> None:
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

    processes.barrier()  # Every file of the workspace is written.
    processes.from_first(commit)
    job.show.finish(state.stage)
    if made is not None:
        # As the next process would find it: sums over another memory layout round otherwise.
        job.records[state.stage] = read_record(job.rundir.stage_dir(state.stage), type(made))


@dataclass(frozen=True)
class AskedOutcome:
    """What an optional stage found.

    Attributes:
        stage: its name, the key of `found` in the JSON.
        run_dir: the run directory.
        ran: whether it was carried out now, or a fresh record found.
        report: the report that shows it; None while there is no forecast to show it beside.
        missing: the stage that the report waits for, and `next` the command that runs it; both None
            where there is a report.
        found: plain values of the record, finite.
    """

    stage: str
    run_dir: Path
    ran: bool
    report: Path | None
    missing: str | None
    next: str | None
    found: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The stage's folder, with its files."""
        return RunDir(self.run_dir).stage_dir(self.stage)

    @property
    def last_line(self) -> str:
        """The report's path, or what the report waits for."""
        if self.report is None:
            return f"no report: stage {self.missing} is not fresh; next: {self.next}"
        return f"report: {self.report}"

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "run_dir": str(self.run_dir),
            "folder": str(self.folder),
            "ran": self.ran,
            "report": str(self.report) if self.report else None,
            "missing": self.missing,
            "next": self.next,
            self.stage: self.found,
        }


def run_asked(
    stage: str,
    config: Config,
    *,
    run_dir: Path,
    show: Display,
    command: str,
    report_command: str,
    force: bool = False,
) -> AskedOutcome:
    """Carry out an optional stage, and bring the report up to date where there is a forecast.

    Args:
        stage: verify, screen or guard.
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that does this, for the lock.
        report_command: the command that makes the report.
        force: carry it out even where a fresh record exists.

    Raises:
        AriskError: what went wrong; what was finished before is kept.
    """
    ran, made, missing = run_optional(
        stage,
        config,
        run_dir=run_dir,
        show=show,
        command=command,
        report_command=report_command,
        force=force,
    )
    # Only the report's summary has the real run beside its forecast; the other records speak for themselves.
    beside = made.summary.get(stage) if made is not None and made.summary and stage == "verify" else None
    found = beside or finite(FOUND[stage](RunDir(run_dir).stage_dir(stage), config))
    report = None if made is None else made.report
    return AskedOutcome(stage, run_dir, ran, report, missing, report_command if missing else None, found)


def _truth(folder: Path, config: Config) -> dict[str, Any]:
    """The real run without a forecast beside it."""
    measured = read_record(folder, VerifyResult)
    judge = judge_for(config.behaviour, measured.behaviour.learnt)
    return compare(measured, None, threshold=config.forecast.collapse_threshold, judge=judge).as_json()


def _screened(folder: Path, config: Config) -> dict[str, Any]:
    del config
    return read_record(folder, ScreenResult).as_json()


def _guarded(folder: Path, config: Config) -> dict[str, Any]:
    result = read_record(folder, GuardResult)
    learnt = learnt_openings(str(row.get("response") or "") for row in result.prompts)
    return guard_summary(
        result,
        threshold=config.forecast.collapse_threshold,
        tolerated=config.guard.tolerated_task_loss,
        wanted=config.guard.wanted_drift,
        judge=judge_for(config.behaviour, learnt),
    )


#: Plain values of every optional stage's record.
FOUND: dict[str, Callable[[Path, Config], dict[str, Any]]] = {
    "verify": _truth,
    "screen": _screened,
    "guard": _guarded,
}


def asked_text(outcome: AskedOutcome) -> str:
    """What an optional stage found, for people; the last line is the report's path or what it waits for."""
    return TEXTS[outcome.stage](outcome)


TEXTS: dict[str, Callable[[AskedOutcome], str]] = {
    "verify": verify_text,
    "screen": screen_text,
    "guard": guard_text,
}
