"""Runs stages in order: skip the fresh ones, execute the others, commit each.

Torch and the model are loaded only when a stage needs them; a run whose stages are all fresh, or
whose only stale stage is the report, loads no model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.artifacts import read_json, write_record
from arisk.config import Config
from arisk.configfile import dump_config
from arisk.errors import AriskError, ArtifactError
from arisk.fingerprints import DigestCache, input_fingerprints
from arisk.job import REPORT_FILE, RUNNERS, SUMMARY_FILE, Display, Job
from arisk.plan import STAGES, StageState, plan
from arisk.rundir import RunDir

__all__ = ["Outcome", "run_stages"]

NAMES = tuple(spec.name for spec in STAGES)
#: Files of a workspace that serve resuming only.
RESUME_FILES = (
    *("losses-*.safetensors", "group-*.safetensors", "*.partial"),
    *("state.json", "state-*.safetensors"),
)


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
        job = Job(config, rundir, command, show, {state.stage: state for state in states})
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


def _execute(job: Job, state: StageState) -> None:
    """Run one stage in its workspace and commit it."""
    why = "; ".join(reason.sentence() for reason in state.reasons) or "forced"
    job.show.start(state.stage, why)
    started = time.monotonic()
    workspace = job.rundir.workspace(state.stage, state.key)
    job.records.pop(state.stage, None)
    made = RUNNERS[state.stage](job, workspace)
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
