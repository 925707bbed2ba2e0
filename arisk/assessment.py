"""What a planned fine-tune does to a `Task`: forecast, verified, its rows screened, its protections compared.

Each function takes any torch model with its data and losses, works in memory and a temporary folder, and
leaves the model, its gradients and the random state as found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arisk.anatomy.collect import GRADIENTS_FOLDER, collect
from arisk.anatomy.record import CollectResult, SubspaceResult
from arisk.anatomy.safety_side import SafetySide, recomputed_side, stored_side
from arisk.anatomy.score import score
from arisk.anatomy.subspace import subspace
from arisk.base.task import Progress, Task, silent
from arisk.config.plan import planned_steps
from arisk.config.python import PipelineConfig
from arisk.forecast.rollout import rollout, skipped_rollout
from arisk.forecast.run import forecast
from arisk.geometry.vectors import Scratch
from arisk.gradients import GradientStore, layout_of
from arisk.guard.record import GuardResult
from arisk.guard.run import guard
from arisk.models.judge import judge_for
from arisk.risk_report import RiskReport
from arisk.screening.record import ScreenResult
from arisk.screening.run import screen as scored_rows
from arisk.screening.what_if import dropping
from arisk.verification.record import VerifyResult
from arisk.verification.run import verify as real_run

__all__ = ["assess", "protect", "screen", "verify"]


def assess(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> RiskReport:
    """Run collect, subspace, score and forecast on a task, in a temporary folder.

    Args:
        task: the model with its data.
        config: settings of every stage.
        progress: told of finished parts.
    """
    with tempfile.TemporaryDirectory(prefix="arisk-") as folder:
        collected = collect(task, config.collect_settings, Path(folder), progress=progress)
        side, dots, dense = _safety_side(task, config, collected, Path(folder))
        space = subspace(collected, config.subspace_settings, seed=config.seed, gradients=dense)
        room = config.collect_settings.memory_budget_gb * 1e9
        scored = score(
            task,
            collected,
            space,
            side,
            config=config.score,
            training=config.training,
            seed=config.seed,
            scratch=Scratch(Path(folder) / "vectors", room),
            progress=progress,
        )
        steps = planned_steps(config.training, len(task.finetune.rows))
        measured = skipped_rollout("rollout.enabled is off")
        if config.rollout.enabled:
            measured = rollout(
                task,
                config=config.rollout,
                training=config.training,
                steps=steps,
                behaviour=config.behaviour,
                progress=progress,
            )
        learnt = measured.behaviour.learnt if measured.behaviour is not None else ()
        result = forecast(
            scored.record,
            measured,
            config=config.forecast,
            training=config.training,
            steps=steps,
            directions=scored.directions,
            dots=dots,
            seed=config.seed,
            judge=judge_for(config.behaviour, learnt),
        )
        basis = _basis(config, collected, space, side)
    return RiskReport(collected, space, scored.record, measured, result, basis=basis)


def verify(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> VerifyResult:
    """Really fine-tune as planned and measure safety along the way; the model is put back to the bit.

    `RiskReport.compare` lays the outcome over a forecast.

    Args:
        task: any torch module with its data and losses; `task.heldout` is measured where it is given,
            else the safety samples themselves.
        config: the planned training, and `config.verify`.
        progress: told of optimizer steps done.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    return real_run(
        task,
        config=config.verify,
        training=config.training,
        steps=planned_steps(config.training, len(task.finetune.rows)),
        seed=config.seed,
        behaviour=config.behaviour,
        progress=progress,
    )


def screen(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> ScreenResult:
    """Rank the fine-tuning rows by the harm that each is predicted to push, and flag the harmful ones.

    `result.order` is the ranking, `result.scores` the harm per unit learning rate, `result.flagged` what
    leaves the null behind. With `config.screen.what_if`, the plan is rolled out with and without the flagged
    rows, where the loader can be regrouped.

    Args:
        task: any torch module with its data and losses.
        config: the planned training, and `config.screen`.
        progress: told of rows scored.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    steps = planned_steps(config.training, len(task.finetune.rows))
    made = scored_rows(task, config=config.screen, training=config.training, steps=steps, progress=progress)
    if not config.screen.what_if:
        return replace(made, what_if={"status": "not_measured", "reason": "screen.what_if is off"})
    with tempfile.TemporaryDirectory(prefix="arisk-") as folder:
        what_if = dropping(
            task,
            made.flagged,
            config=config.rollout,
            training=config.training,
            steps=steps,
            workspace=Path(folder),
            progress=progress,
        )
    return replace(made, what_if=what_if)


def protect(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> GuardResult:
    """Carry out the planned fine-tune plain and under every protection, each from the same start and seed.

    Args:
        task: any torch module with its data and losses.
        config: the planned training, and `config.guard`.
        progress: told of optimizer steps done.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    return guard(
        task,
        config=config.guard,
        training=config.training,
        steps=planned_steps(config.training, len(task.finetune.rows)),
        seed=config.seed,
        progress=progress,
    )


def _safety_side(
    task: Task, config: PipelineConfig, collected: CollectResult, folder: Path
) -> tuple[SafetySide, Callable[[Tensor], Tensor], Callable[[], Tensor] | None]:
    """Products with G, their store-only form for the forecast, and dense G where it was stored."""
    layout = layout_of(task.model, task.parameter_names)
    settings = config.collect_settings
    room = settings.memory_budget_gb * 1e9
    if collected.store == "gram":
        engine = collected.engine["name"]
        dtype = torch.bfloat16 if collected.store_dtype == "bfloat16" else None
        side = recomputed_side(task, layout, engine, settings.chunk_size, memory=room, dtype=dtype)
        return side, side.dots, None
    side = stored_side(GradientStore(folder / GRADIENTS_FOLDER), layout, memory=room)

    def dense() -> Tensor:
        return torch.cat([side.columns(name) for name in layout.names], dim=1)

    return side, side.dots, dense


def _basis(
    config: PipelineConfig, collected: CollectResult, space: SubspaceResult, side: SafetySide
) -> Tensor | None:
    """(P, k) b_j = Gᵀu_j/√(Nλ_j), or unit vectors of `diag_topk`; None above the memory budget."""
    parameters = collected.fisher_diagonal.numel()
    itemsize = collected.fisher_diagonal.element_size()
    too_large = parameters * space.rank * itemsize > config.collect_settings.memory_budget_gb * 1e9
    if collected.store == "gram" or too_large:
        return None
    if space.method == "diag_topk":
        basis = torch.zeros(parameters, space.rank, dtype=collected.fisher_diagonal.dtype)
        basis[space.coordinates, torch.arange(space.rank)] = 1
        return basis
    weights = space.dual_vectors / torch.sqrt(len(space.dual_vectors) * space.eigenvalues)
    blocks = [side.columns(name).to(torch.float64).T @ weights for name in collected.parameter_names]
    return torch.cat(blocks).to(collected.fisher_diagonal.dtype)
