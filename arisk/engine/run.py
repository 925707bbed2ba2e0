"""Runs stages in order: skip the fresh ones, execute the others, commit each.

Torch and the model are loaded only when a stage needs them; a run whose stages are all fresh, or
whose only stale stage is the report, loads no model. Stages that run only when asked for are carried out
by `run_asked`, which also brings the report that shows them up to date.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base import processes
from arisk.base.artifacts import (
    RECORD_FILE,
    TENSORS_FILE,
    WORKSPACES,
    finite,
    read_json,
    read_record,
    write_record,
)
from arisk.base.errors import AriskError, ArtifactError, ConfigError, DamagedError
from arisk.config.plan import Config
from arisk.config.yaml import dump_config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState, plan, take
from arisk.engine.job import REPORT_FILE, SUMMARY_FILE, Display, Job
from arisk.engine.report import REPORT
from arisk.engine.rundir import RunDir, remove_tree
from arisk.engine.stage import Catalogue, Stage, named

if TYPE_CHECKING:
    from arisk.base.task import Task

__all__ = ["AskedOutcome", "Outcome", "asked_text", "run_asked", "run_stages", "run_task"]

#: Files of any workspace, below it too, that a killed process left half written.
RESUME_FILES = ("**/*.partial",)


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


def run_stages(
    catalogue: Catalogue,
    config: Config,
    *,
    run_dir: Path,
    show: Display,
    command: str,
    first: str | None = None,
    last: str | None = None,
    only: str | None = None,
    upstream: bool = False,
    force: bool = False,
    reuse: Sequence[Path] = (),
    models: dict[str, Any] | None = None,
    decided: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Bring stages up to date: those that decide with their report, then those that say why with theirs.

    Args:
        catalogue: the stages.
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that reproduces this run, for the report and the lock.
        first: run this stage and all that read it even where they are fresh.
        last: stop after this stage.
        only: run this stage alone; the stages it reads must be fresh.
        upstream: with `only`, run those as well where they are not fresh.
        force: run every considered stage even where it is fresh.
        reuse: run directories from which a stage with the same key is taken instead of being run.
        models: models that runs before this one have loaded; those after it find its own here.
        decided: told when the report shows what was decided and work that says why is still to come.

    Raises:
        AriskError: what went wrong; stages finished before are committed.
    """
    rundir = RunDir(run_dir)
    aim = _Aim(catalogue, config, only, catalogue.after([first]) | {first} if first else set(), force)
    wanted = aim.wanted(last, upstream=upstream)
    if first is not None and first not in wanted:
        raise ConfigError(
            f"{first} comes after {last}, so nothing would be run again",
            where=f"--from {first} --until {last}",
            fix=f"give a stage before {last} as --from, or leave one of them out",
        )
    processes.join()

    def prepared() -> tuple[dict[str, Any], list[StageState]]:
        cache = DigestCache(run_dir / ".digests.json")
        inputs = input_fingerprints(config, cache)
        cache.save()
        states = plan(catalogue, config, inputs, rundir, asked=only, force=force)
        due = aim.due(states, wanted, upstream=upstream)
        _refuse_own_files(config, rundir, due)
        rundir.write("config.yaml", dump_config(config))
        for name in due:
            if (refuse := catalogue.get(name).before) is not None:
                refuse(config)
        return inputs, states

    with rundir.lock(command) if processes.is_first() else nullcontext():
        inputs, states = processes.from_first(prepared)
        job = Job(catalogue, config, rundir, command, show, {state.stage: state for state in states})
        job.models = {} if models is None else models
        run = _Rounds(job, inputs, aim, reuse)

        def split(states: Sequence[StageState]) -> tuple[list[str], list[str], list[str]]:
            due = aim.due(states, wanted, upstream=upstream)
            out = () if only or last in aim.aside else catalogue.left_out(config, rundir)
            why = [name for name in due if name in aim.aside and only is None and name not in out]
            return due, why, [*why, *catalogue.after(why).intersection(wanted)]

        due, why, later = split(states)
        with _telling(show):
            first_round = [name for name in wanted if only or name not in aim.aside or name not in due]
            run.round(first_round, due, without={*aim.aside, *later} if why else ())
            # Only now is it known what the verdict took.
            _, why, later = split(run.states())
            if why:
                if decided is not None and run.shows(REPORT, wanted):
                    decided(run.outcome(wanted))
                show.note("the verdict stands; what follows says why")
                run.round(catalogue.ordered(later), later)
    return run.outcome(wanted)


@dataclass(frozen=True)
class _Aim:
    """What a call of `run_stages` asks for; `again` holds the stages that run even where they are fresh."""

    catalogue: Catalogue
    config: Config
    only: str | None
    again: set[str]
    force: bool

    @property
    def aside(self) -> tuple[str, ...]:
        """Stages that only say why."""
        return self.catalogue.explaining(self.config)

    def wanted(self, last: str | None, *, upstream: bool) -> list[str]:
        """Stages considered, in the order in which they run."""
        names = self.catalogue.names
        if self.only is not None:
            wanted = {self.only, *(self._before(self.only) if upstream else ())}
        else:
            wanted = set(names[: names.index(last) + 1] if last else names) - set(self.catalogue.optional)
            wanted = wanted.union(*map(self._before, wanted))
        return self.catalogue.ordered(list(wanted))

    def _before(self, name: str) -> set[str]:
        found = set(self.catalogue.before(name, self.config))
        return found.union(*(self._before(earlier) for earlier in found))

    def due(self, states: Sequence[StageState], wanted: Sequence[str], *, upstream: bool) -> list[str]:
        """Stages to run, in order."""
        stale = {state.stage for state in states if not state.fresh}
        if self.only and not upstream:
            needed = self.catalogue.before(self.only, self.config)
            for state in states:
                if state.stage in needed and state.stage in stale:
                    why = "; ".join(reason.sentence() for reason in state.reasons)
                    raise ArtifactError(
                        f"the stage {state.stage} before it is not up to date: {why}",
                        where=f"stage {self.only}",
                        fix=f"run `arisk {state.stage} CONFIG` first, or add --with-upstream",
                    )
        return [name for name in wanted if self.force or name in stale or name in self.again]


class _Rounds:
    """Carries out stages; each is planned anew before it runs, as stages that it includes may have come."""

    def __init__(self, job: Job, inputs: Mapping[str, Any], aim: _Aim, reuse: Sequence[Path]) -> None:
        self.job = job
        self.inputs = inputs
        self.aim = aim
        self.reuse = reuse
        self.ran: list[str] = []
        self.fresh: list[str] = []
        self.taken: dict[str, str] = {}

    def round(self, considered: Sequence[str], due: Sequence[str], without: Collection[str] = ()) -> None:
        """Run what is due of the stages considered.

        Args:
            considered: names, in the order in which they run.
            due: those to run, as far as was known before.
            without: stages of the next round. What waits for nothing else is left to that round.
        """
        due = [name for name in considered if name in due and not self._waits(name, without)]
        self.job.show.planned(due)
        for name in considered:
            if name in due:
                self._run(self._planned(name))
            elif self.job.states[name].fresh:
                self.fresh.append(name)
                self.job.show.skip(name)

    def _waits(self, name: str, without: Collection[str]) -> bool:
        """Whether only stages of the next round make it stale."""
        reasons = self.job.states[name].reasons
        return bool(reasons) and all(r.kind == "upstream" and r.path in without for r in reasons)

    def _planned(self, name: str) -> StageState:
        """The stage's state now."""
        self.states()
        return self.job.states[name]

    def states(self) -> list[StageState]:
        """The states of all stages now."""
        job, aim = self.job, self.aim

        def planned() -> list[StageState]:
            return plan(job.catalogue, job.config, self.inputs, job.rundir, asked=aim.only, force=aim.force)

        states = processes.from_first(planned)
        job.states = {state.stage: state for state in states}
        return states

    def _run(self, state: StageState) -> None:
        source = _taken(self.job, state, self.reuse)
        if source is None:
            _execute(self.job, state)
            self.ran.append(state.stage)
        else:
            self.taken[state.stage] = str(source)
            self.job.states[state.stage] = replace(state, fresh=True, reasons=())

    def shows(self, stage: str, wanted: Sequence[str]) -> bool:
        """Whether a stage is wanted and up to date."""
        return stage in wanted and self._planned(stage).fresh

    def outcome(self, wanted: Sequence[str]) -> Outcome:
        """What was done so far."""
        rundir = self.job.rundir
        report = rundir.stage_dir(REPORT) / REPORT_FILE if REPORT in wanted else None
        summary = read_json(rundir.stage_dir(REPORT) / SUMMARY_FILE) if report else None
        fresh = tuple(name for name in dict.fromkeys(self.fresh) if name not in self.ran)
        ran = tuple(name for name in dict.fromkeys(self.ran) if name not in self.taken)
        return Outcome(rundir.path, ran, fresh, report, summary, self.taken)


def run_task(
    catalogue: Catalogue,
    task: Task,
    config: Config,
    stages: Sequence[str],
    *,
    run_dir: Path,
    show: Display,
) -> Job:
    """Run stages on a task that is in memory, in a fresh run directory.

    Args:
        catalogue: the stages.
        task: the model with its data.
        config: settings of every stage; its model and data sections are not read.
        stages: names; those they read must be among them. Those that `why` leaves out are not run.
        run_dir: a folder of this run alone. Nothing says whether what lies in it belongs to this task.
        show: told what happens.

    Returns:
        The finished job with its records.

    Raises:
        AriskError: what went wrong.
    """
    rundir = RunDir(run_dir)
    states = {state.stage: state for state in plan(catalogue, config, {}, rundir)}
    job = Job(catalogue, config, rundir, "", show, states, given=task)
    with rundir.lock("arisk from Python"), _telling(show):
        for name in catalogue.ordered(stages):
            if name in catalogue.left_out(config, rundir):
                continue
            job.states = {state.stage: state for state in plan(catalogue, config, {}, rundir)}
            _execute(job, job.states[name])
    return job


def _refuse_own_files(config: Config, rundir: RunDir, due: Sequence[str]) -> None:
    """Refuse data and folders for a model where a stage that is to run puts its own files.

    Data would be replaced while it is read, and a model with the stage's folder.

    Args:
        config: of the run.
        rundir: the run directory.
        due: stages that are to run.

    Raises:
        ConfigError: one lies in the folder of such a stage.
    """
    from arisk.config.plan import data_sets

    data = data_sets(config).items()
    read = [(f"{name}.path", part.path) for name, parts in data for part in parts if part.path is not None]
    saved = [
        (f"{name}.save_model", path)
        for name, path in (("verify", config.verify.save_model), ("guard", config.guard.save_model))
        if name in due and path is not None
    ]
    folders = [rundir.stage_dir(name).resolve() for name in due] + [(rundir.path / WORKSPACES).resolve()]
    for setting, path in (*read, *saved):
        if any(Path(path).resolve().is_relative_to(folder) for folder in folders):
            raise ConfigError(
                "the run puts its own files there, and replaces what is in it",
                where=f"{setting}: {path}",
                fix="give another run directory by --run-dir, or another place for this",
            )


@contextmanager
def _telling(show: Display) -> Generator[None]:
    """Tells the display how a run ends that does not end well."""
    try:
        yield
    except KeyboardInterrupt:
        show.interrupted()
        raise
    except AriskError:
        show.failed()
        raise


def _taken(job: Job, state: StageState, reuse: Sequence[Path]) -> Path | None:
    """The run directory that the stage was taken from, or None: it is to be run."""
    if not job.catalogue.get(state.stage).reusable:
        return None
    source = processes.from_first(lambda: take(job.rundir, state, reuse))
    if source is not None:
        job.records.pop(state.stage, None)
        job.show.note(f"{state.stage:<9} taken from {source}")
    return source


def _execute(job: Job, state: StageState) -> None:
    """Run one stage in its workspace and commit it."""
    stage = job.catalogue.get(state.stage)
    why = "; ".join(reason.sentence() for reason in state.reasons) or "forced"
    job.show.start(stage.name, why)
    started = time.monotonic()
    workspace = processes.from_first(lambda: job.rundir.workspace(stage.name, state.key))
    job.records.pop(stage.name, None)
    made = _made_over_damage(stage, job, workspace)

    def commit() -> None:
        if made is not None:
            write_record(workspace, made)
        job.rundir.commit(
            stage.name,
            key=state.key,
            ingredients=state.ingredients,
            workspace=workspace,
            seconds=time.monotonic() - started,
            leave_out=(*RESUME_FILES, *stage.resume_files),
        )

    processes.barrier()  # Every file of the workspace is written.
    processes.from_first(commit)
    job.states[stage.name] = replace(state, fresh=True, reasons=())
    job.show.finish(stage.name)
    if made is not None:
        # As the next process would find it: sums over another memory layout round otherwise.
        job.records[stage.name] = read_record(job.rundir.stage_dir(stage.name), type(made))


def _made_over_damage(stage: Stage, job: Job, workspace: Path) -> Any:
    """The stage's record; what a stopped run left in the workspace and cannot be read is made again.

    First the damaged file or record alone goes, so that the rest of the work is kept; where that does not
    help, all of it.

    Raises:
        DamagedError: several processes share the work, as the others wait where one has failed; or the stage
            cannot read what it has just written.
    """
    gone = set[Path]()
    while True:
        try:
            return _made(stage, job, workspace)
        except DamagedError as err:
            file = Path(err.where)
            inside = file.is_relative_to(workspace)
            if processes.world() > 1 or not inside or workspace in gone:
                raise
            part = file.parent if file.name in (RECORD_FILE, TENSORS_FILE) else file
            part = workspace if part in gone or not part.exists() else part
            told = "all of it" if part == workspace else part.relative_to(workspace)
            job.show.note(f"{stage.name:<9} {file.name} cannot be read: {told} is made again")
            gone.add(part)
            if part.is_dir():
                remove_tree(part)
            else:
                part.unlink()
            workspace.mkdir(exist_ok=True)


def _made(stage: Stage, job: Job, workspace: Path) -> Any:
    """The stage's record: from all processes together, or from the first one alone."""
    if stage.parallel:
        return stage.run(job, workspace)
    if processes.is_first():
        with processes.alone():
            return stage.run(job, workspace)
    return None


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
            return f"no report: stage {self.missing} is not up to date; next: {self.next}"
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
    catalogue: Catalogue,
    name: str,
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
        catalogue: the stages.
        name: the optional stage.
        config: the resolved config.
        run_dir: where the run lives.
        show: told what happens.
        command: the command that does this, for the lock.
        report_command: the command that makes the report.
        force: carry it out even where a fresh record exists.

    Raises:
        AriskError: what went wrong; what was finished before is kept.
    """

    def ran(stage: str, told: str, *, again: bool = False) -> Outcome:
        return run_stages(
            catalogue, config, run_dir=run_dir, show=show, command=told, only=stage, last=stage, force=again
        )

    stage = catalogue.get(name)
    done = ran(name, command, again=force)
    missing = _stale_before(catalogue, REPORT, config, run_dir)
    made = None if missing else ran(REPORT, report_command)
    summary = made.summary if made is not None and made.summary else {}
    found = summary.get(name) if stage.beside else None
    if not found and stage.found is not None:
        found = finite(stage.found(RunDir(run_dir).stage_dir(name), config))
    return AskedOutcome(
        name,
        run_dir,
        ran=bool(done.ran),
        report=None if made is None else made.report,
        missing=missing,
        next=report_command if missing else None,
        found=found or {},
    )


def asked_text(catalogue: Catalogue, outcome: AskedOutcome) -> str:
    """What an optional stage found, for people; the last line is the report's path or what it waits for."""
    text = catalogue.get(outcome.stage).text
    return named(text)(outcome) if text is not None else outcome.last_line


def _stale_before(catalogue: Catalogue, stage: str, config: Config, run_dir: Path) -> str | None:
    """The first stage it reads that is not up to date."""
    needed = catalogue.before(stage, config)
    cache = DigestCache(run_dir / ".digests.json")
    states = plan(catalogue, config, input_fingerprints(config, cache), RunDir(run_dir))
    return next((state.stage for state in states if state.stage in needed and not state.fresh), None)
