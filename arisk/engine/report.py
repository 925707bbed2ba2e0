"""Stage report: the page and the summaries, from the sections that the other stages hand in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import FORMAT_VERSION, finite, write_text
from arisk.engine.job import REPORT_FILE, SUMMARY_FILE, Job
from arisk.engine.stage import Cost, CostScene, Stage

if TYPE_CHECKING:
    from arisk.config.plan import Config
    from arisk.report.page import Section

__all__ = ["REPORT", "report_stage", "sections_of"]

#: The stage that writes the page and the summaries.
REPORT = "report"
#: Seconds to make the page.
DRAWING = 2.5


def sections_of(job: Job) -> list[Section]:
    """What every stage shows, in the order in which they run.

    They are made in reverse: each may use what those of later stages share.
    """
    made: list[Section] = []
    shared: dict[str, Any] = {}
    for stage in map(job.catalogue.get, reversed(job.catalogue.ordered(job.catalogue.names))):
        section = stage.section(job, shared) if stage.section is not None else None
        if section is not None:
            made.append(section)
            shared |= section.shared
            if stage.optional and job.states[stage.name].fresh:
                shared["done"] = [*shared.get("done", ()), stage.name]
    return made[::-1]


def _report(job: Job, workspace: Path) -> None:
    from arisk.report.figure import report_images
    from arisk.report.identity import identity, subject
    from arisk.report.page import figures_of, render, summary_json, summary_markdown

    shown, sections = job.config.report, sections_of(job)
    provenance = _provenance(job, sections)
    title, first = shown.title or subject(provenance), identity(provenance)
    text = summary_markdown(title, sections, first)
    write_text(workspace / REPORT_FILE, render(title, sections, provenance, text))
    report_images(figures_of(sections, provenance), workspace, shown.figures)
    summary = {
        "format_version": FORMAT_VERSION,
        **finite(summary_json(title, sections, first, provenance["again"], provenance["elsewhere"])),
    }
    write_text(workspace / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    write_text(workspace / "summary.md", text)


def _provenance(job: Job, sections: Sequence[Section]) -> dict[str, Any]:
    """What made the report: command, versions, stage keys and costs, and what sections say of the task."""
    from arisk.config.yaml import dump_config

    stages = {}
    for stage in job.catalogue:
        if stage.name == REPORT or not job.states[stage.name].fresh:
            continue
        manifest = job.rundir.manifest(stage.name) or {}
        size = sum(output["bytes"] for output in manifest.get("outputs", {}).values())
        stages[stage.name] = {
            "key": job.states[stage.name].key[:12],
            "finished": manifest.get("finished"),
            "seconds": manifest.get("seconds"),
            "bytes": size,
            "optional": stage.optional,
            "taken_from": manifest.get("taken_from"),
        }
    task = next((section.shared["task"] for section in sections if "task" in section.shared), {})
    return {
        "task": task,
        "plan": _plan(job.config),
        "again": _again(job),
        "elsewhere": shlex.quote(f"{job.rundir.path}-changed"),
        "command": job.command,
        "versions": {"arisk": version("arisk"), "torch": version("torch")},
        "stages": stages,
        "config": dump_config(job.config),
    }


def _plan(config: Config) -> dict[str, Any]:
    """Names of the data and of the judge, for the first line of the report."""
    from arisk.config.plan import data_sets

    named = data_sets(config)
    return {
        "finetune": [str(part.path) for part in named.get("finetune", ()) if part.path is not None],
        "judge": None if config.behaviour.judge is None else config.behaviour.judge.path,
    }


def _again(job: Job) -> str:
    """What every command takes to work on this run: its config with its options, or its folder."""
    parts = shlex.split(job.command)
    if parts[:2] == ["arisk", "run"]:
        return shlex.join(parts[2:])
    return shlex.quote(str(job.rundir.path)) if parts[:1] == ["arisk"] else ""


def _drawable(config: Config) -> None:
    """Refuse figures that were asked for and cannot be drawn before hours are spent, not after."""
    if config.report.figures in ("png", "svg"):
        from arisk.report.figure import require_drawable

        require_drawable()


def _cost(scene: CostScene) -> Cost:
    return Cost(seconds=DRAWING, memory_gb=scene.memory["gradients"])


def report_stage(stages: Sequence[Stage]) -> Stage:
    """The last stage, which shows all others: those that decide in any case, the rest where they are fresh.

    Args:
        stages: all others, in order.
    """
    shown = [key for stage in stages for key in stage.shown]
    aside = tuple(stage.name for stage in stages if stage.optional or stage.explains is not None)
    return Stage(
        name=REPORT,
        version=15,
        help="The HTML page and the summaries, from the artifacts",
        run=_report,
        upstream=tuple(stage.name for stage in stages if stage.name not in aside),
        config=("report", *dict.fromkeys(shown)),
        shows=aside,
        reusable=False,  # The page names its run, so each run makes its own.
        before=_drawable,
        cost=_cost,
    )
