"""Stage collect: per-sample safety gradients G (N, P), kept through their inner products.

Two stores. `gradients` keeps G on disk, and later stages read it. `gram` keeps none of it, and later
stages run the model again for the products they need. Both give the same Gram matrices, and both resume
from what a killed run had finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from arisk.anatomy.keeping import GRADIENTS_FOLDER, Plan, measure, plan_store
from arisk.anatomy.record import CollectResult
from arisk.anatomy.safety_pass import Products, SafetyPass
from arisk.base.errors import InputError, NumericsError
from arisk.base.progress import Progress, silent
from arisk.base.task import Batch, Task
from arisk.config.plan import CollectConfig
from arisk.gradients import (
    EngineChoice,
    ParameterLayout,
    batch_invariance,
    batch_size,
    choose_engine,
    layout_of,
    measuring,
    move_batch,
    slice_batch,
)

__all__ = ["GRADIENTS_FOLDER", "collect"]

#: A sample's gradient may not depend on its batch; below this cosine the report warns.
BATCH_INVARIANCE = 0.999


def collect(task: Task, config: CollectConfig, folder: Path, *, progress: Progress = silent) -> CollectResult:
    """Measure G at θ* and keep K^(l) = G^(l) G^(l)ᵀ per module, ḡ_s, diag F and the losses.

    Args:
        task: model, safety samples and selected parameters; the model is left as found.
        config: engine, store and budgets.
        folder: where shards (or finished parameter groups) go; reused to resume.
        progress: told of finished batches.

    Returns:
        The record; shards lie in `folder / GRADIENTS_FOLDER` when its store is "gradients".

    Raises:
        InputError: fewer than two safety samples.
        NumericsError: a loss or gradient is NaN or infinite, or every gradient is zero.
        ConfigError: the requested engine does not fit the selection.
        ArtifactError: the disk is full, or a shard is damaged.
    """
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        batches = _batches(task, config.chunk_size)
        sizes = [batch_size(batch) for batch in batches]
        choice, invariance = _self_test(task, layout, batches, config.engine)
        run = SafetyPass(task, layout, batches, sizes, choice.engine, progress)
        plan = plan_store(run, config, folder)
        products = measure(run, plan, folder, config.memory_budget_gb)
    _require_gradient(products.gram)
    return _record(run, config, plan, choice, invariance, products)


def _batches(task: Task, chunk_size: int) -> list[Batch]:
    """Safety batches on the model's device, none larger than the chunk size."""
    device = next(task.model.parameters()).device
    chunks: list[Batch] = []
    for batch in task.safety.batches:
        size = batch_size(batch)
        if size <= chunk_size:
            chunks.append(move_batch(batch, device))
        else:
            chunks += [
                move_batch(slice_batch(batch, i, min(i + chunk_size, size)), device)
                for i in range(0, size, chunk_size)
            ]
    if sum(batch_size(batch) for batch in chunks) < 2:
        raise InputError(
            "at least two safety samples are needed, to tell a direction from noise",
            where=f"data set {task.safety.name!r}",
            fix="give more safety rows (64 or more are advised)",
        )
    return chunks


def _self_test(
    task: Task, layout: ParameterLayout, batches: Sequence[Batch], requested: str
) -> tuple[EngineChoice, float | None]:
    """Choose the engine, and measure what batching does to the gradients."""
    first = max(batches, key=batch_size)
    loss_fn = task.safety.loss_fn
    choice = choose_engine(task.model, first, loss_fn, layout, requested)
    invariance = None
    if batch_size(first) > 1:
        invariance = batch_invariance(task.model, first, loss_fn, layout, choice.engine)
    return choice, invariance


def _require_gradient(gram: Tensor) -> None:
    if float(gram.diagonal(dim1=1, dim2=2).sum()) == 0:
        raise NumericsError(
            "every safety gradient is exactly zero",
            where="collect",
            fix="check that the safety loss depends on the selected parameters (`model.parameters`)",
        )


def _record(
    run: SafetyPass,
    config: CollectConfig,
    plan: Plan,
    choice: EngineChoice,
    invariance: float | None,
    products: Products,
) -> CollectResult:
    """Put the measurements together with their provenance."""
    layout = run.layout
    statistics: Mapping[str, Any] = run.task.safety.statistics
    result = CollectResult(
        parameter_names=list(layout.names),
        parameter_shapes=[list(shape) for shape in layout.shapes],
        modules=list(layout.modules),
        module_of_parameter=list(layout.module_of_parameter),
        gram=products.gram,
        mean_gradient=products.mean,
        fisher_diagonal=products.diagonal,
        losses=products.losses,
        gradient_norms=products.gram.diagonal(dim1=1, dim2=2).sum(0).clamp(min=0).sqrt(),
        rows=[dict(row) for row in run.task.safety.rows],
        dropped_duplicates=int(statistics.get("duplicates", 0)),
        store=plan.store,
        fisher=config.fisher,
        engine={"name": choice.engine, "parity": choice.parity, "refused": choice.refused},
        batch_invariance=invariance,
        coverage=dict(choice.coverage),
        task=dict(run.task.description),
        warnings=[],
        store_dtype=plan.dtype or "float32",
        store_rounding=products.rounding,
    )
    return replace(result, warnings=_warnings(result))


def _warnings(result: CollectResult) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found: list[str] = []
    invariance = result.batch_invariance
    if invariance is not None and not invariance >= BATCH_INVARIANCE:
        found.append(
            f"A safety sample's gradient changes with the batch it is in (cosine {invariance:.4f}, "
            f"wanted {BATCH_INVARIANCE}): set `collect.chunk_size: 1`, or check padding and batch "
            "statistics in the model."
        )
    if len(result.losses) < 64:
        found.append(f"Only {len(result.losses)} safety samples: bootstrap intervals are calibrated from 64.")
    if not result.engine["parity"]:
        found.append("The gradients were not compared with another engine: the model is sharded.")
    rounding = result.store_rounding
    if rounding is not None:
        found.append(
            f"The Gram matrices were taken of gradients rounded to {result.store_dtype}: the lengths of one "
            f"batch changed by up to {rounding:.1e} of themselves."
        )
    zero = int((result.gradient_norms == 0).sum())
    if zero:
        found.append(f"{zero} safety samples have a gradient of exactly zero.")
    return found
