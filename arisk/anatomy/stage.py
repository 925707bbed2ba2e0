"""Stages collect, subspace and score: how they run on a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.anatomy.budget import LEAST, affordable, counts_in
from arisk.base.artifacts import write_tensors
from arisk.base.processes import is_first, rank
from arisk.engine.job import Job
from arisk.engine.stage import Stage, where_hidden

if TYPE_CHECKING:
    from torch import Tensor

    from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
    from arisk.anatomy.subspace import SafetySide
    from arisk.base.task import Task
    from arisk.config.plan import Config, ScoreConfig
    from arisk.engine.rundir import RunDir
    from arisk.gradients import ParameterLayout
    from arisk.report.page import Section

__all__ = ["COLLECT", "SCORE", "SUBSPACE", "safety_side"]

#: Settings of collect that change its numbers or files; its budgets do not.
COLLECT_KEYS = ("engine", "fisher", "store", "store_dtype", "chunk_size")


def _fisher_task(job: Job) -> Task:
    """The task with the labels that its safety gradients are taken of: drawn ones where sampled."""
    from arisk.models.losses import sample_labels

    if job.config.collect.fisher != "sampled":
        return job.task
    drawn = sample_labels(job.task.model, job.task.safety, job.config.run.seed)
    return replace(job.task, safety=drawn)


def _collect(job: Job, workspace: Path) -> CollectResult:
    from arisk.anatomy.collect import collect
    from arisk.base.task import without_text

    made = collect(_fisher_task(job), job.config.collect, workspace, progress=job.show.progress)
    # The stage may serve other plans: it tells of the safety rows alone, `rollout` of the plan's data.
    data = {"safety": made.task.get("data", {}).get("safety", {})}
    if not job.config.report.show_text:
        made = replace(made, rows=[without_text(row) for row in made.rows])
    return replace(made, task={**made.task, "data": data} if "data" in made.task else made.task)


def _subspace(job: Job, workspace: Path) -> SubspaceResult:
    import torch

    from arisk.anatomy.subspace import subspace

    del workspace
    collected: CollectResult = job.record("collect")
    layout = _layout(collected)
    budget = job.config.collect.memory_budget_gb * 1e9

    def dense() -> Tensor:
        return torch.cat([safety_side(job).columns(name) for name in layout.names], dim=1)

    fits = collected.store == "gradients" and len(collected.losses) * layout.numel * 8 <= budget
    gradients = dense if fits else None
    return subspace(collected, job.config.subspace, seed=job.config.run.seed, gradients=gradients)


def _score(job: Job, workspace: Path) -> ScoreResult:
    from arisk.anatomy.score import score
    from arisk.base.task import without_text
    from arisk.geometry.vectors import Scratch

    config = job.settled("score")
    with Scratch(workspace / f"vectors-{rank()}", config.collect.memory_budget_gb * 1e9) as scratch:
        made = score(
            job.task,
            job.record("collect"),
            job.record("subspace"),
            safety_side(job),
            config=config.score,
            training=config.training,
            seed=config.run.seed,
            scratch=scratch,
            progress=job.show.progress,
        )
    if is_first():
        write_tensors(workspace / "directions.safetensors", made.directions)
    made_record = replace(made.record, lowered=_lowered(job.config.score, config.score, job.task))
    if config.report.show_text:
        return made_record
    return replace(made_record, examples=[without_text(row) for row in made_record.examples])


def _layout(collected: CollectResult) -> ParameterLayout:
    """The selected parameters, from the artifact: needs no model."""
    from arisk.gradients import ParameterLayout

    return ParameterLayout(
        tuple(collected.parameter_names),
        tuple(tuple(shape) for shape in collected.parameter_shapes),
        tuple(collected.modules),
        tuple(collected.module_of_parameter),
    )


def safety_side(job: Job) -> SafetySide:
    """Products with the safety gradients: from the store, or by running the model where none was kept."""
    import torch

    from arisk.anatomy.collect import GRADIENTS_FOLDER
    from arisk.anatomy.subspace import recomputed_side, stored_side
    from arisk.gradients import GradientStore

    collected: CollectResult = job.record("collect")
    settings, layout = job.config.collect, _layout(collected)
    room = settings.memory_budget_gb * 1e9
    if collected.store == "gradients":
        store = GradientStore(job.rundir.stage_dir("collect") / GRADIENTS_FOLDER)
        return stored_side(store, layout, memory=room)
    dtype = torch.bfloat16 if collected.store_dtype == "bfloat16" else None
    engine, size = collected.engine["name"], settings.chunk_size
    return recomputed_side(_fisher_task(job), layout, engine, size, memory=room, dtype=dtype)


def _section(job: Job, later: Mapping[str, Any]) -> Section:
    from arisk.anatomy import page

    if not job.states["score"].fresh:
        return page.left_out(
            f"`{job.command} --why full` adds it",
            looked=bool(later.get("rows_told")),
            dear=_settled(job.config, job.rundir) is None,
        )
    shown = job.config.report
    return page.section(
        job.record("collect"),
        job.record("subspace"),
        job.record("score"),
        threshold=later["threshold"],
        specificity_told=later["specificity_told"],
        worth=later["worth"],
        rows_told="screen" in later.get("done", ()) or bool(later.get("rows_told")),
        show_text=shown.show_text,
        max_examples=shown.max_examples,
    )


def _lowered(asked: ScoreConfig, taken: ScoreConfig, task: Task) -> dict[str, list[int]]:
    """Settings that `why: auto` lowered: what was taken, and what was asked for."""
    from arisk.anatomy.cost import numel

    found = {name: [getattr(taken, name), getattr(asked, name)] for name in LEAST}
    found["krylov_dim"] = [settings.krylov_steps(numel(task)) for settings in (taken, asked)]
    return {name: both for name, both in found.items() if both[0] != both[1]}


def _settled(config: Config, rundir: RunDir) -> Config | None:
    """With `why: auto`, what of score the verdict pays for; None where not even its least."""
    if config.why != "auto" or not config.rollout.enabled:
        return config
    counts = counts_in(rundir.stage_dir("rollout"))
    if counts is None:
        return config
    batch, chunk = config.training.batch_size, config.collect.chunk_size
    score = affordable(config.score, counts, batch=batch, chunk=chunk)
    return None if score is None else config.model_copy(update={"score": score})


def _explains(config: Config) -> bool:
    """The verdict rests on the rollout; without one it rests on what is measured here."""
    return config.rollout.enabled


COLLECT = Stage(
    name="collect",
    version=4,
    help="Per-sample gradients of the safety data and their inner products",
    explains=_explains,
    settled=_settled,
    run=_collect,
    config=(*("model", "safety"), *(f"collect.{key}" for key in COLLECT_KEYS)),
    config_also=where_hidden(),
    inputs=("model", "adapter", "safety"),
    parallel=True,
    resume_files=("losses-*.safetensors", "group-*.safetensors", "parts/*"),
    record="arisk.anatomy.record:CollectResult",
    cost="arisk.anatomy.cost:collect_cost",
)


SUBSPACE = Stage(
    name="subspace",
    version=2,
    help="The safety subspace: eigenvectors of the safety Fisher matrix",
    explains=_explains,
    settled=_settled,
    run=_subspace,
    upstream=("collect",),
    config=("subspace",),
    record="arisk.anatomy.record:SubspaceResult",
    cost="arisk.anatomy.cost:subspace_cost",
)


SCORE = Stage(
    name="score",
    version=5,
    help="How the planned first update meets the subspace, by layer and row",
    explains=_explains,
    settled=_settled,
    run=_score,
    upstream=("collect", "subspace"),
    config=(
        *("finetune", "control", "score", "training.optimizer", "training.betas", "training.eps"),
        *("training.batch_size", "training.gradient_accumulation", "training.packing"),
        *("training.weight_decay", "training.weight_decay_on", "training.loss", "training.order"),
        *("training.drop_last", "training.loraplus_lr_ratio"),
    ),
    config_also=where_hidden(),
    inputs=("finetune", "control"),
    parallel=True,
    record="arisk.anatomy.record:ScoreResult",
    cost="arisk.anatomy.cost:score_cost",
    section=_section,
)
