"""How each stage runs on a job: its inputs taken from the job, its files written to the workspace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.acting import guard_section, run_guard, run_screen, screen_section
from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.base.artifacts import FORMAT_VERSION, read_json, read_tensors, write_tensors, write_text
from arisk.base.processes import is_first, rank
from arisk.config.plan import planned_steps
from arisk.config.yaml import dump_config
from arisk.engine.job import REPORT_FILE, SUMMARY_FILE, Job
from arisk.engine.stage import STAGES
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.verification.record import VerifyResult

if TYPE_CHECKING:
    from torch import Tensor

    from arisk.report.page import Section
    from arisk.verification.truth import Comparison

__all__ = ["RUNNERS", "SECTIONS", "finite"]

#: Counts of the fine-tuning and control rows, beside the scores.
DATA_FILE = "data.json"


def _collect(job: Job, workspace: Path) -> CollectResult:
    from arisk.anatomy.collect import collect

    made = collect(job.fisher_task, job.config.collect, workspace, progress=job.show.progress)
    # The stage may serve other plans: it tells of the safety rows alone, `score` of the plan's data.
    data = {"safety": made.task.get("data", {}).get("safety", {})}
    return replace(made, task={**made.task, "data": data} if "data" in made.task else made.task)


def _subspace(job: Job, workspace: Path) -> SubspaceResult:
    import torch

    from arisk.anatomy.subspace import subspace

    del workspace
    budget = job.config.collect.memory_budget_gb * 1e9

    def dense() -> Tensor:
        return torch.cat([job.safety_side().columns(name) for name in job.layout.names], dim=1)

    fits = job.collected.store == "gradients" and len(job.collected.losses) * job.layout.numel * 8 <= budget
    gradients = dense if fits else None
    return subspace(job.collected, job.config.subspace, seed=job.config.run.seed, gradients=gradients)


def _score(job: Job, workspace: Path) -> ScoreResult:
    from arisk.anatomy.score import score
    from arisk.geometry.vectors import Scratch

    config = job.config
    with Scratch(workspace / f"vectors-{rank()}", config.collect.memory_budget_gb * 1e9) as scratch:
        made = score(
            job.task,
            job.collected,
            job.record("subspace", SubspaceResult),
            job.safety_side(),
            config=config.score,
            training=config.training,
            seed=config.run.seed,
            scratch=scratch,
            progress=job.show.progress,
        )
    if is_first():
        write_tensors(workspace / "directions.safetensors", made.directions)
        sets = {"finetune": job.task.finetune, "control": job.task.control}
        told = {name: dict(samples.statistics) for name, samples in sets.items() if samples is not None}
        body = {"format_version": FORMAT_VERSION, "data": told}
        write_text(workspace / DATA_FILE, json.dumps(finite(body), indent=1) + "\n")
    return made.record


def _rollout(job: Job, workspace: Path) -> RolloutResult:
    from arisk.forecast.rollout import rollout, skipped_rollout

    config = job.config
    if not config.rollout.enabled:
        return skipped_rollout("rollout.enabled is off")
    return rollout(
        job.task,
        config=config.rollout,
        training=config.training,
        steps=planned_steps(config.training, len(job.task.finetune.rows)),
        behaviour=config.behaviour,
        workspace=workspace,
        progress=job.show.progress,
    )


def _forecast(job: Job, workspace: Path) -> ForecastResult:
    from arisk.forecast.run import forecast
    from arisk.models.judge import judge_for

    del workspace
    scored: ScoreResult = job.record("score", ScoreResult)
    measured: RolloutResult = job.record("rollout", RolloutResult)
    return forecast(
        scored,
        measured,
        config=job.config.forecast,
        training=job.config.training,
        steps=planned_steps(job.config.training, scored.finetune_rows),
        directions=read_tensors(job.rundir.stage_dir("score") / "directions.safetensors"),
        dots=lambda displacements: job.safety_side().dots(displacements),
        seed=job.config.run.seed,
        judge=judge_for(job.config.behaviour, measured.behaviour.learnt if measured.behaviour else ()),
    )


def _verify(job: Job, workspace: Path) -> VerifyResult:
    from arisk.verification.run import verify

    config = job.config
    # The stage's own reach, to which its key belongs: a damaged stage is made again as it was.
    reach = job.states["verify"].ingredients["config"]["verify.steps"]
    return verify(
        job.task,
        config=config.verify.model_copy(update={"steps": reach}),
        training=config.training,
        steps=planned_steps(config.training, len(job.task.finetune.rows)),
        seed=config.run.seed,
        behaviour=config.behaviour,
        workspace=workspace,
        progress=job.show.progress,
    )


def _check(job: Job, forecast: ForecastResult) -> Comparison | None:
    """The real run beside the forecast, where one belongs to this plan."""
    from arisk.models.judge import judge_for
    from arisk.verification.truth import compare

    if not job.states["verify"].fresh:
        return None
    measured: VerifyResult = job.record("verify", VerifyResult)
    judge = judge_for(job.config.behaviour, measured.behaviour.learnt)
    return compare(measured, forecast, threshold=forecast.threshold, judge=judge)


def _report(job: Job, workspace: Path) -> None:
    from arisk.report.images import report_images
    from arisk.report.page import figures_of, render
    from arisk.report.summary import summary_json, summary_markdown
    from arisk.sections import sections_of

    shown = job.config.report
    forecast = job.record("forecast", ForecastResult)
    sections = sections_of(
        job.collected,
        job.record("subspace", SubspaceResult),
        job.record("score", ScoreResult),
        forecast,
        job.record("rollout", RolloutResult),
        show_text=shown.show_text,
        max_examples=shown.max_examples,
        check=_check(job, forecast),
        more=[make(job) for stage, make in SECTIONS.items() if job.states[stage].fresh],
    )
    title, provenance = shown.title or job.rundir.path.resolve().name, _provenance(job)
    write_text(workspace / REPORT_FILE, render(title, sections, provenance))
    report_images(figures_of(sections, provenance), workspace, shown.figures)
    summary = {"format_version": FORMAT_VERSION, **finite(summary_json(title, sections))}
    write_text(workspace / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    write_text(workspace / "summary.md", summary_markdown(title, sections))


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that is none is null, which readers must take as not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _provenance(job: Job) -> dict[str, Any]:
    """What made the report: command, versions, stage keys and costs."""
    stages = {}
    made = [spec.name for spec in STAGES[:-1] if not spec.optional or job.states[spec.name].fresh]
    for name in made:
        manifest = job.rundir.manifest(name) or {}
        size = sum(output["bytes"] for output in manifest.get("outputs", {}).values())
        stages[name] = {
            "key": job.states[name].key[:12],
            "finished": manifest.get("finished"),
            "seconds": manifest.get("seconds"),
            "bytes": size,
            "taken_from": manifest.get("taken_from"),
        }
    path = job.rundir.stage_dir("score") / DATA_FILE
    data = read_json(path)["data"] if path.exists() else {}
    task = dict(job.collected.task)
    if task.get("data") and data:
        task["data"] = {**task["data"], **data}
    return {
        "task": task,
        "command": job.command,
        "versions": {"arisk": version("arisk"), "torch": version("torch")},
        "stages": stages,
        "config": dump_config(job.config),
    }


RUNNERS: dict[str, Callable[[Job, Path], Any]] = {
    "collect": _collect,
    "subspace": _subspace,
    "score": _score,
    "rollout": _rollout,
    "forecast": _forecast,
    "verify": _verify,
    "screen": run_screen,
    "guard": run_guard,
    "report": _report,
}


#: What optional stages show on the report, by stage.
SECTIONS: dict[str, Callable[[Job], Section]] = {"screen": screen_section, "guard": guard_section}
